"""Data sets of a trial: corpora, tasks, instructions, and how they are made into tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from trainables.config.value import Name, Positive, Value


class WordPiece(Value):
    """A lower-casing WordPiece vocabulary trained on the `train` split."""

    kind: Literal["wordpiece"]
    size: int = Field(4096, ge=64)


class PretrainedTokenizer(Value):
    """A tokenizer from a local folder or from the hub."""

    kind: Literal["pretrained"]
    name: str
    revision: str | None = None


class SameTokenizer(Value):
    """The tokenizer of another data set of the trial: a task is read as the models were pretrained."""

    kind: Literal["same"] = "same"
    as_: Name = Field("corpus", alias="as", validation_alias=AliasChoices("as", "as_"))


Tokenizer = Annotated[WordPiece | PretrainedTokenizer, Field(discriminator="kind")]


class Columns(Value):
    """Which column of a data file holds what."""

    text: str = "text"


class _Data(Value):
    tokenizer: Tokenizer
    length: int = Field(128, ge=8)  # tokens of a packed sequence, special ones included
    evaluate: int = Field(256, ge=1)  # at most so many sequences of dev, and of test, are scored


class PythonDocs(_Data):
    """CPython's own English: the language reference and the standard library's docstrings. On every machine."""

    kind: Literal["python_docs"]


class Files(_Data):
    """Local or remote files by suffix: Parquet, JSON (an object a line, or one array), CSV, text; a path, a glob or a URI.

    Without `dev` or `test`, documents are split by a hash of their text.
    """

    kind: Literal["files"]
    train: str
    dev: str | None = None
    test: str | None = None
    columns: Columns = Columns()


class Hub(_Data):
    """A data set of the Hugging Face hub, at a revision."""

    kind: Literal["hub"]
    name: str
    config: str | None = None
    revision: str = "main"
    train: str = "train"
    dev: str | None = None
    test: str | None = None
    columns: Columns = Columns()


class _Task(Value):
    """Labelled examples, each a text or a pair of texts, and how predictions are scored (x 100, as `score`)."""

    tokenizer: Annotated[WordPiece | PretrainedTokenizer | SameTokenizer, Field(discriminator="kind")] = SameTokenizer()
    length: int = Field(128, ge=8)  # tokens at most, special ones included; longer texts are cut
    examples: int | None = Field(None, ge=1)  # at most so many of train
    evaluate: int | None = Field(None, ge=1)  # at most so many of dev, and of test, are scored

    @property
    def num_labels(self) -> int:
        """Outputs of a model of this task: one for each class, or one number."""
        raise NotImplementedError

    @property
    def is_regression(self) -> bool:
        return self.num_labels == 1


GlueTask = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]


class Glue(_Task):
    """A task of GLUE from the hub, or from a folder with `<task>/train.parquet` and so on, with the hub's columns.

    `test` is the official validation set, `dev` a part of train: official test labels are hidden.
    """

    kind: Literal["glue"]
    task: GlueTask
    source: str = "nyu-mll/glue"
    revision: str = "main"

    @property
    def num_labels(self) -> int:
        return {"stsb": 1, "mnli": 3}.get(self.task, 2)


class PythonTask(_Task):
    """Made of CPython's own English: which part of the library a text is about (`topic`); whether a text describes a
    signature (`signature`, a pair). On every machine."""

    kind: Literal["python_task"]
    task: Literal["topic", "signature"]

    @property
    def num_labels(self) -> int:
        return {"topic": 8, "signature": 2}[self.task]


class LabelledColumns(Value):
    """Which column of a file holds what; without `second` each example is a single text."""

    first: str = "sentence"
    second: str | None = None
    label: str = "label"


class LabelledFiles(_Task):
    """A task of one's own: Parquet, JSON or CSV files, by suffix; a path, a glob or a URI.

    `classes` lists the labels as they stand in the file; without it labels are numbers to be predicted. Without `dev` or
    `test`, examples are split by a hash of their text.
    """

    kind: Literal["labelled_files"]
    train: str
    dev: str | None = None
    test: str | None = None
    columns: LabelledColumns = LabelledColumns()
    classes: tuple[str | int, ...] | None = Field(None, min_length=2)
    score: Literal["accuracy", "f1", "accuracy_and_f1", "matthews", "pearson_and_spearman"] | None = None

    @property
    def num_labels(self) -> int:
        return len(self.classes) if self.classes else 1

    @model_validator(mode="after")
    def _the_score_fits_the_labels(self) -> LabelledFiles:
        if self.classes and len(set(map(str, self.classes))) < len(self.classes):
            raise ValueError("classes must differ")
        if self.score is not None and (self.score == "pearson_and_spearman") != (self.classes is None):
            raise ValueError(
                f"score {self.score} is for {'numbers' if self.classes else 'classes'}, and the labels are not"
            )
        if self.score in ("f1", "accuracy_and_f1") and self.num_labels != 2:
            raise ValueError(f"score {self.score} is for two classes, of which the second is the positive one")
        return self


class Sampling(Value):
    """How the next token is drawn: `temperature`, then the `top_k` likeliest, then the fewest that hold `top_p`."""

    temperature: Positive = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(lambda k: k or None)] = None  # 0: of all
    max_tokens: int = Field(128, ge=1)  # of a reply; one that has not ended by then stays as it is, and is counted


class Scoring(Sampling):
    """How replies are made to be scored: one for each of `seeds`, whose scores are averaged, and a greedy one."""

    max_tokens: int = Field(256, ge=1)
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)


class _Instructions(Value):
    """Prompts with replies; what is learnt and scored is the reply, its end included."""

    tokenizer: Annotated[WordPiece | PretrainedTokenizer | SameTokenizer, Field(discriminator="kind")] = SameTokenizer()
    template: Literal["alpaca", "chat"] = "alpaca"  # chat: the tokenizer's own
    length: int = Field(512, ge=8)  # tokens of prompt and reply; longer replies are cut
    prompt_length: int = Field(256, ge=4)  # tokens; what has a longer prompt is left out
    examples: int | None = Field(None, ge=1)  # at most so many of train
    evaluate: int | None = Field(None, ge=1)  # at most so many of dev, and of test, are scored
    scoring: Scoring = Scoring()

    @model_validator(mode="after")
    def _there_is_room_for_a_reply(self) -> _Instructions:
        if self.prompt_length >= self.length:
            raise ValueError(f"prompt_length {self.prompt_length} leaves no room for a reply in length {self.length}")
        return self


class PythonInstructions(_Instructions):
    """Made of CPython's own English: a signature, to be answered with the first line of its docstring. On every machine."""

    kind: Literal["python_instructions"]


class InstructionColumns(Value):
    """Which column of a file holds what. `response`: a text, or a list of texts of which any will do where replies are
    scored. `messages`: instead of the three, lists of {role, content}, of which the last one, the assistant's, is the reply.
    """

    prompt: str = "instruction"
    context: str | None = None
    response: str = "response"
    messages: str | None = None


class _Instructed(_Instructions):
    """Without `dev` or `test` (where there is `train`) rows are split by a hash of the column `split_by`, by default that
    of the prompt; without `train` they are only there to be scored."""

    columns: InstructionColumns = InstructionColumns()
    split_by: str | None = None
    train: str | None = None
    dev: str | None = None
    test: str | None = None

    @model_validator(mode="after")
    def _there_are_rows(self) -> _Instructed:
        if self.train is None and self.test is None:
            raise ValueError("needs train, or test (then it is only scored)")
        if self.train is None and self.dev is not None:
            raise ValueError("dev is for choices in training, and there is no train; name it as test")
        return self


class InstructionFiles(_Instructed):
    """Parquet, JSON or CSV files, by suffix; a path, a glob or a URI."""

    kind: Literal["instruction_files"]


class InstructionHub(_Instructed):
    """A data set of the Hugging Face hub, at a revision; `train`, `dev`, `test` name its splits."""

    kind: Literal["instruction_hub"]
    name: str
    config: str | None = None
    revision: str = "main"


Corpora = PythonDocs | Files | Hub
Tasks = Glue | PythonTask | LabelledFiles
Instructions = PythonInstructions | InstructionFiles | InstructionHub
Data = Annotated[Corpora | Tasks | Instructions, Field(discriminator="kind")]
