"""Data sets of a trial: where their text is, how the text becomes tokens, and what a phase may do with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from trainables.config.paths import DataPath, FolderOrId
from trainables.config.reply_metrics import ReplyMetric
from trainables.config.value import Name, Positive, Value


class WordPiece(Value):
    """A lower-casing WordPiece vocabulary trained on the `train` split."""

    kind: Literal["wordpiece"]
    size: int = Field(4096, ge=64)  # tokens of the vocabulary


class PretrainedTokenizer(Value):
    """A tokenizer from a local folder or from the hub."""

    kind: Literal["pretrained"]
    name: FolderOrId  # folder or hub id
    revision: str | None = None  # commit, tag or branch on the hub


class SameTokenizer(Value):
    """The tokenizer of another data set of the trial, so that a model reads both with one vocabulary."""

    kind: Literal["same"] = "same"
    as_: Name = Field("corpus", alias="as", validation_alias=AliasChoices("as", "as_"))  # name of the other data set


Tokenizer = Annotated[WordPiece | PretrainedTokenizer, Field(discriminator="kind")]
TokenizerOrSame = Annotated[WordPiece | PretrainedTokenizer | SameTokenizer, Field(discriminator="kind")]

Rule = Literal["accuracy", "f1", "accuracy_and_f1", "matthews", "pearson_and_spearman"]
BINARY_RULES: frozenset[Rule] = frozenset({"f1", "accuracy_and_f1"})  # of two classes, the second is the positive one
Feature = Literal["corruption", "token_budget", "labels", "fold", "replies", "mix"]


@dataclass(frozen=True)
class Format:
    """What the data sets of one format have in common, whatever their source: what a phase may do with them."""

    name: Literal["corpus", "task", "instructions"]
    noun: str
    plural: str
    supports: frozenset[Feature]


CORPUS = Format("corpus", "a corpus", "corpora", frozenset({"corruption", "token_budget"}))
TASK = Format("task", "a task", "tasks", frozenset({"labels", "fold", "mix"}))
INSTRUCTIONS = Format("instructions", "a set of instructions", "instructions", frozenset({"replies"}))
FORMATS = (CORPUS, TASK, INSTRUCTIONS)


class _Data(Value):
    """What every data set answers; a kind of data overrides what differs."""

    format: ClassVar[Format]
    preparation: ClassVar[tuple[str, ...]]  # fields that say how text becomes tokens; the others say where the text is

    # further ones, by the names by which models choose them; those of a data set that lends its tokenizer are lent, too
    tokenizers: dict[Name, Tokenizer] = Field({}, exclude_if=lambda value: not value)

    def __hash__(self) -> int:  # a mapping has none
        return hash(repr(self))

    @property
    def unprepared(self) -> Self:
        """The data set without its preparation: equal for two data sets that read the same text."""
        return self.model_copy(update=dict.fromkeys((*self.preparation, "tokenizers")))

    @property
    def num_labels(self) -> int | None:
        """Outputs of a model's head on these data: one for each class, 1 for a number; None for a language model."""
        return None

    @property
    def rule(self) -> Rule | None:
        """How predicted labels are scored; None where there are no labels."""
        return None

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of a test set that are scored one by one; none where the test set is one part."""
        return ()

    @property
    def has_train(self) -> bool:
        return True

    @property
    def reads_chats(self) -> bool:
        """Whether the tokenizer's chat template shapes the text."""
        return False

    @property
    def glue_task(self) -> GlueTask | None:
        return None


class _Corpus(_Data):
    """Documents, packed end to end into sequences of `length` tokens."""

    format = CORPUS
    preparation = ("tokenizer", "length", "evaluate")
    scoring: ClassVar[None] = None

    tokenizer: Tokenizer  # trained on these texts, or pretrained
    length: int = Field(128, ge=8)  # tokens of a packed sequence, special tokens included
    evaluate: int = Field(256, ge=1)  # sequences of dev, and of test, that are evaluated at most


class PythonDocs(_Corpus):
    """CPython's own English: the language reference and the standard library's docstrings. On every machine."""

    kind: Literal["python_docs"]


class Columns(Value):
    """The column of a data file that holds the text."""

    text: str = "text"  # name of the column


class Files(_Corpus):
    """Local or remote files by suffix: Parquet, JSON (an object a line, or one array), CSV, text; a path, a glob or a URI.

    Without `dev` or `test`, documents are split by a hash of their text.
    """

    kind: Literal["files"]
    train: DataPath  # a path, a glob or a URI
    dev: DataPath | None = None  # by default a part of train
    test: DataPath | None = None  # by default a part of train
    columns: Columns = Columns()  # which column holds the text


class Hub(_Corpus):
    """A data set of the Hugging Face hub, at a revision."""

    kind: Literal["hub"]
    name: str  # id on the hub
    config: str | None = None  # of the data set, where it has several
    revision: str = "main"  # commit, tag or branch
    train: str = "train"  # name of a split
    dev: str | None = None  # name of a split; by default a part of train
    test: str | None = None  # name of a split; by default a part of train
    columns: Columns = Columns()  # which column holds the text


class _Task(_Data):
    """Labelled examples, each a text or a pair of texts, and how predictions are scored (x 100, as `score`)."""

    format = TASK
    preparation: ClassVar[tuple[str, ...]] = ("tokenizer", "length", "examples", "evaluate")
    scoring: ClassVar[None] = None

    tokenizer: TokenizerOrSame = SameTokenizer()  # by default that of the data set `corpus`
    length: int = Field(128, ge=8)  # tokens of an example at most, special tokens included; longer texts are cut
    examples: int | None = Field(None, ge=1)  # examples of train that are used at most
    evaluate: int | None = Field(None, ge=1)  # examples of dev, and of test, that are evaluated at most

    @property
    def num_labels(self) -> int:
        """Outputs of a model's head: one for each class, or 1 for a number."""
        raise NotImplementedError

    @property
    def rule(self) -> Rule:
        return "pearson_and_spearman" if self.num_labels == 1 else "accuracy"


GlueTask = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
GLUE_RULES: dict[GlueTask, Rule] = {"cola": "matthews", "mrpc": "accuracy_and_f1", "qqp": "accuracy_and_f1"}


class Glue(_Task):
    """A task of GLUE from the hub, or from a folder with `<task>/train.parquet` and so on, with the hub's columns.

    `test` is the official validation set, `dev` a part of train: official test labels are hidden. Scored by the rules of
    Wang et al. 2019.
    """

    kind: Literal["glue"]
    task: GlueTask  # which of the tasks
    source: FolderOrId = "nyu-mll/glue"  # folder or hub id
    revision: str = "main"  # commit, tag or branch on the hub

    @property
    def num_labels(self) -> int:
        return {"stsb": 1, "mnli": 3}.get(self.task, 2)

    @property
    def rule(self) -> Rule:
        return GLUE_RULES.get(self.task, super().rule)

    @property
    def part_names(self) -> tuple[str, ...]:
        return ("matched", "mismatched") if self.task == "mnli" else ()

    @property
    def glue_task(self) -> GlueTask:
        return self.task


class PythonTask(_Task):
    """Made of CPython's own English: the part of the library that a text is about (`topic`); whether a text describes a
    signature (`signature`, a pair). On every machine."""

    kind: Literal["python_task"]
    task: Literal["topic", "signature"]  # topic: 8 classes; signature: 2

    @property
    def num_labels(self) -> int:
        return {"topic": 8, "signature": 2}[self.task]


Class = Annotated[
    str | int,
    BeforeValidator(
        lambda name: str(name).lower() if isinstance(name, bool) else name, json_schema_input_type=str | int | bool
    ),
]


class LabelledColumns(Value):
    """The columns of a data file that hold texts and labels; without `second` each example is a single text."""

    first: str = "sentence"  # column of the text, or of the first of a pair
    second: str | None = None  # column of the second text of a pair
    label: str = "label"  # column of the label


class LabelledFiles(_Task):
    """A user's task: Parquet, JSON or CSV files, by suffix; a path, a glob or a URI.

    `classes` lists the labels as they stand in the file; without `classes` labels are numbers to be predicted. Without
    `dev` or `test`, examples are split by a hash of their text.
    """

    preparation = (*_Task.preparation, "score")

    kind: Literal["labelled_files"]
    train: DataPath  # a path, a glob or a URI
    dev: DataPath | None = None  # by default a part of train
    test: DataPath | None = None  # by default a part of train
    columns: LabelledColumns = LabelledColumns()  # which columns hold texts and labels
    classes: tuple[Class, ...] | None = Field(None, min_length=2)  # by default labels are numbers
    score: Rule | None = None  # by default accuracy; for numbers, correlation

    @property
    def num_labels(self) -> int:
        return len(self.classes) if self.classes else 1

    @property
    def rule(self) -> Rule:
        return self.score or super().rule

    @model_validator(mode="after")
    def _the_score_fits_the_labels(self) -> LabelledFiles:
        if self.classes and len(set(map(str, self.classes))) < len(self.classes):
            raise ValueError("classes must differ")
        if self.score is not None and (self.score == "pearson_and_spearman") != (self.classes is None):
            raise ValueError(
                f"score {self.score} is for {'numbers' if self.classes else 'classes'}, and the labels are not"
            )
        if self.score in BINARY_RULES and self.num_labels != 2:
            raise ValueError(f"score {self.score} is for two classes, of which the second is the positive one")
        return self


class Sampling(Value):
    """How the next token is drawn: `temperature`, then the `top_k` likeliest, then the fewest that hold `top_p`."""

    temperature: Positive = 1.0  # divides the logits
    top_p: float = Field(1.0, gt=0, le=1)  # draw among the fewest tokens that hold this mass
    top_k: Annotated[
        Annotated[int, Field(ge=1)] | None,
        BeforeValidator(lambda k: k or None, json_schema_input_type=Annotated[int, Field(ge=0)] | None),
    ] = None  # 0: no limit
    max_tokens: int = Field(128, ge=1)  # of a reply; a longer reply is cut and counted as unfinished


class Scoring(Sampling):
    """How replies are drawn to be scored: one for each of `seeds`, whose scores are averaged, and a greedy one.

    Without seeds the greedy reply alone is scored. ROUGE-L is always measured; `metrics` names further ones.
    """

    max_tokens: int = Field(256, ge=1)
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)  # a reply is drawn for each
    # beside ROUGE-L; absent from a dump where there are none, so that stored phases keep their keys
    metrics: tuple[ReplyMetric, ...] = Field((), exclude_if=lambda value: not value)

    @model_validator(mode="after")
    def _each_metric_is_named_once(self) -> Scoring:
        names = [metric.kind for metric in self.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"metrics: {', '.join(twice)} is there twice; expected each metric once")
        return self


class _Instructions(_Data):
    """Prompts with replies; the reply, its end included, is learnt and scored."""

    format = INSTRUCTIONS
    preparation = ("tokenizer", "template", "length", "prompt_length", "examples", "evaluate", "scoring")

    tokenizer: TokenizerOrSame = SameTokenizer()  # by default that of the data set `corpus`
    template: Literal["alpaca", "chat"] = "alpaca"  # chat: the tokenizer's own
    length: int = Field(512, ge=8)  # tokens of prompt and reply; longer replies are cut
    prompt_length: int = Field(256, ge=4)  # tokens; rows with a longer prompt are left out
    examples: int | None = Field(None, ge=1)  # rows of train that are used at most
    evaluate: int | None = Field(None, ge=1)  # rows of dev, and of test, that are evaluated at most
    scoring: Scoring = Scoring()  # how replies are drawn to be scored

    @property
    def reads_chats(self) -> bool:
        return self.template == "chat"

    @model_validator(mode="after")
    def _there_is_room_for_a_reply(self) -> _Instructions:
        if self.prompt_length >= self.length:
            raise ValueError(f"prompt_length {self.prompt_length} leaves no room for a reply in length {self.length}")
        return self


class PythonInstructions(_Instructions):
    """Made of CPython's own English: a signature, to be answered with the first line of its docstring. On every machine."""

    kind: Literal["python_instructions"]


class InstructionColumns(Value):
    """The columns of a data file that hold prompts and replies.

    `response`: a text, or a list of texts of which any is right where replies are scored. `messages`, instead of the other
    three: lists of {role, content}, or of ShareGPT's {from, value}, of which the last one, the assistant's, is the reply.
    """

    prompt: str = "instruction"  # column of the prompt
    context: str | None = None  # column of a text that follows the prompt
    response: str = "response"  # column of the reply
    messages: str | None = None  # column of whole conversations


class _InstructionRows(_Instructions):
    """Rows of a table. Without `dev` or `test` (where there is `train`) rows are split by a hash of the column `split_by`,
    by default that of the prompt; without `train` they are only scored."""

    columns: InstructionColumns = InstructionColumns()  # which columns hold prompts and replies
    # replies of a conversation that are learnt and scored: its last message, or each message of the assistant
    turns: Literal["last", "all"] = Field("last", exclude_if=lambda value: value == "last")
    split_by: str | None = None  # column by whose hash rows are split
    train: str | None = None  # by default the rows are only scored
    dev: str | None = None  # by default a part of train
    test: str | None = None  # by default a part of train

    @property
    def has_train(self) -> bool:
        return self.train is not None

    @model_validator(mode="after")
    def _there_are_rows(self) -> _InstructionRows:
        if self.train is None and self.test is None:
            raise ValueError("needs train, or test (then it is only scored)")
        if self.train is None and self.dev is not None:
            raise ValueError("dev is for choices in training, and there is no train; name it as test")
        if self.columns.messages is None and self.turns == "all":
            raise ValueError("turns: all is for conversations; expected columns: {messages: a column of them}")
        if self.columns.messages is not None and self.template != "chat":
            raise ValueError(
                "columns.messages: conversations have turns, which only `template: chat`, the tokenizer's own, can tell apart"
            )
        return self


class InstructionFiles(_InstructionRows):
    """Parquet, JSON or CSV files, by suffix; a path, a glob or a URI."""

    kind: Literal["instruction_files"]
    train: DataPath | None = None  # a path, a glob or a URI
    dev: DataPath | None = None  # a path, a glob or a URI; by default a part of train
    test: DataPath | None = None  # a path, a glob or a URI; by default a part of train


class InstructionHub(_InstructionRows):
    """A data set of the Hugging Face hub, at a revision; `train`, `dev`, `test` name its splits."""

    kind: Literal["instruction_hub"]
    name: str  # id on the hub
    config: str | None = None  # of the data set, where it has several
    revision: str = "main"  # commit, tag or branch


Corpora = PythonDocs | Files | Hub
Tasks = Glue | PythonTask | LabelledFiles
Instructions = PythonInstructions | InstructionFiles | InstructionHub
Data = Annotated[Corpora | Tasks | Instructions, Field(discriminator="kind")]
