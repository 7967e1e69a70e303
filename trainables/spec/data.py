"""Data sets of a trial: corpora, tasks, and how they are made into tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from trainables.spec.value import Name, Value


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
    """Local or remote Parquet, JSON lines, CSV or text files, by suffix; a path, a glob or a URI.

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


class Glue(_Task):
    """A task of GLUE from the hub, or from a folder with `<task>/train.parquet` and so on, with the hub's columns.

    `test` is the official validation set, `dev` a part of train: official test labels are hidden.
    """

    kind: Literal["glue"]
    task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
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
    """A task of one's own: Parquet, JSON lines or CSV files, by suffix; a path, a glob or a URI.

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


Corpora = PythonDocs | Files | Hub
Tasks = Glue | PythonTask | LabelledFiles
Data = Annotated[PythonDocs | Files | Hub | Glue | PythonTask | LabelledFiles, Field(discriminator="kind")]
