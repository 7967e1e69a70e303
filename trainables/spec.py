"""What a trial is: one frozen value. Plain data; knows no paper, no storage, no device and no Ray.

Whatever can change a number in the results is a field here; nothing else is. A spec travels as JSON and is validated at
both ends. `pruned()` drops what no result depends on (terms of weight zero, phases and models that nothing reads), so
that an ablation shares its phases with every trial that computes the same thing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

NUMERICS = 1  # raised whenever a stored reference trajectory changes: it is part of every phase's key

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Value(BaseModel):
    """A frozen value; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, allow_inf_nan=False
    )


# ------------------------------------------------------------------------------------------------------------ data


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


# ---------------------------------------------------------------------------------------------------------- models


class Random(Value):
    """Fresh weights. `std`: the family's own rule, or N(0, 1/sqrt(width)) for every matrix, or a number.

    `positions`: sinusoids let a small encoder leave the unigram level hundreds of steps earlier than drawn ones.
    """

    kind: Literal["random"] = "random"
    std: Literal["family", "width"] | Positive = "family"
    positions: Literal["random", "sinusoid"] = "random"


Depth = Literal["copy_last", "stack", "interpolate", "every_other", "first", "random"]
Width = Literal[  # how hidden size, heads and inner layer change; exact: all outputs stay as they are
    "replicate",  # copies, whose readers share. Exact: inner layer, heads; hidden size by a whole factor. Down: averages
    "replicate_noise",  # the same, and noise in the readers that cancels over copies, so that these learn apart
    "aki",  # as replicate, but copies come from the next layer, whose knowledge is advanced; never exact
    "zero_pad",  # new parts are fresh, nobody reads them yet. Exact: inner layer, heads; hidden size under RMSNorm
    "mean_pad",  # the same, new hidden channels hold the mean. Exact there: under LayerNorm before each block (GPT-2)
    "prefix",  # what overlaps, per head, zeros beside it; nothing is rescaled, and what is added may never learn
    "select",  # down: evenly spaced channels, heads, neurons. What grows is padded
    "importance",  # down: those that do most on random inputs (the least damage). What grows is padded
]


class Remap(Value):
    """Weights from another model of the trial, as it is when this one is first used.

    Without `width` the shapes differ in depth at most. With it heads may change in number and in size (exactly where
    they only grow, rotary ones to a multiple of their size), and the norms take the source's epsilon, times the ratio of
    the hidden sizes where these are padded: exactness needs that.
    """

    kind: Literal["remap"]
    from_: Name = Field(alias="from", validation_alias=AliasChoices("from", "from_"))
    depth: Depth
    width: Width | None = Field(None, exclude_if=lambda width: width is None)  # ids of trials without it stay the same
    rest: Random = Random()  # what the plan leaves open keeps this initialisation


Init = Annotated[Random | Remap, Field(discriminator="kind")]


class Sharing(Value):
    """Layers that run more than once, for depth without parameters (Cho & Kang 2022, shuffled parameter sharing).

    `order`: all n once more (`twice`), each at once again (`each_twice`), back from n to 1 (`mirror`), or the upper or the
    lower half once more. `swap`: each further run of a layer has its query and key projections swapped.
    """

    order: Literal["twice", "each_twice", "mirror", "upper_twice", "lower_twice"] = "twice"
    swap: bool


class Model(Value):
    """A model by shape (`family`, `layers`, `width`) or by `pretrained` weights (hub id or local folder)."""

    family: str | None = None
    layers: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=4)
    heads: int | None = Field(None, ge=1)  # by default one head for each 64 channels
    inner: int | None = Field(None, ge=1)  # by default 4 x width
    dropout: float | None = Field(None, ge=0, lt=1)  # by default as the architecture has it
    config: dict[str, bool | int | float | str] = {}  # further fields of the family's transformers config
    pretrained: str | None = None
    revision: str | None = None
    init: Init = Random()
    sharing: Sharing | None = Field(None, exclude_if=lambda sharing: sharing is None)

    @model_validator(mode="after")
    def _either_a_shape_or_pretrained_weights(self) -> Model:
        if self.pretrained is not None:
            given = [key for key in ("family", "layers", "width", "heads", "inner") if getattr(self, key) is not None]
            if given or self.config:
                raise ValueError(f"pretrained weights bring their own shape: remove {', '.join(given) or 'config'}")
            if self.init != Random():
                raise ValueError("pretrained weights are the initialisation: remove init")
            if self.sharing is not None:
                raise ValueError("pretrained weights are not shared: give a shape, and `init: {kind: remap, from: …}`")
            return self
        missing = [key for key in ("family", "layers", "width") if getattr(self, key) is None]
        if missing:
            raise ValueError(f"needs {', '.join(missing)} (or pretrained: a hub id or a folder)")
        assert self.width is not None
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.num_heads}")
        if self.sharing is not None and self.family != "bert":
            raise ValueError(
                f"sharing is for family bert, whose query and key can change places; not for {self.family}"
            )
        return self

    @property
    def num_heads(self) -> int:
        return self.heads or max(1, (self.width or 64) // 64)


# --------------------------------------------------------------------------------------------------- weights, terms


class Linear(Value):
    """From `start` to `end` in a straight line over the phase's budget."""

    kind: Literal["linear"]
    start: float = Field(ge=0)
    end: float = Field(ge=0)


class Cosine(Value):
    """From `start` to `end` along half a cosine over the phase's budget."""

    kind: Literal["cosine"]
    start: float = Field(ge=0)
    end: float = Field(ge=0)


class Step(Value):
    """`start` until the fraction `at` of the budget, `end` from there on."""

    kind: Literal["step"]
    start: float = Field(ge=0)
    end: float = Field(ge=0)
    at: Fraction


class OffWhenBetter(Value):
    """`weight` until `to` beats `from` on dev (looked at each evaluation), then zero for good (DWT's off-switch)."""

    kind: Literal["off_when_better"]
    weight: float = Field(gt=0)


Schedule = Annotated[Linear | Cosine | Step | OffWhenBetter, Field(discriminator="kind")]
Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(lambda value: "number" if isinstance(value, int | float | str | None) else "schedule"),
]


class CrossEntropy(Value):
    """The hard loss of one model: cross-entropy with the stream's labels, mean over supervised positions.

    Where the labels are numbers (regression): squared error, the cross-entropy of a Gaussian but for constants.
    """

    kind: Literal["cross_entropy"]
    of: Name
    on: Name = "main"
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _only_a_flow_can_switch_off_when_better(self) -> CrossEntropy:
        if isinstance(self.weight, OffWhenBetter):
            raise ValueError("off_when_better compares `to` with `from`: it is for flows, not for a hard loss")
        return self


class _Flow(Value):
    """A loss whose gradient reaches only `to`; what `from` gives is detached."""

    from_: Name = Field(alias="from", validation_alias=AliasChoices("from", "from_"))
    to: Name
    on: Name = "main"
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _a_flow_joins_two_models(self) -> _Flow:
        if self.from_ == self.to:
            raise ValueError(f"flows from {self.from_!r} to itself")
        return self


class _Soft(_Flow):
    """At the logits, at the supervised positions. Where they are numbers (regression), squared difference instead."""

    temperature: Positive = 1.0  # of both sides
    tau_squared: bool  # no default: papers disagree, so every study states it


class ForwardKL(_Soft):
    """KL(from || to)."""

    kind: Literal["forward_kl"]


class ReverseKL(_Soft):
    """KL(to || from)."""

    kind: Literal["reverse_kl"]


class Jeffreys(_Soft):
    """(KL(from || to) + KL(to || from)) / 2."""

    kind: Literal["jeffreys"]


class JSD(_Soft):
    """beta KL(from || m) + (1 - beta) KL(to || m) with m = beta from + (1 - beta) to (GKD's convention)."""

    kind: Literal["jsd"]
    beta: float = Field(0.5, gt=0, lt=1)


LayerMap = Annotated[
    Annotated[Literal["even", "last", "uniform", "top"], Tag("name")]
    | Annotated[tuple[tuple[int, int], ...], Tag("pairs")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "pairs"),
]


class HiddenMSE(_Flow):
    """Mean squared error between outputs of layers; `layers` pairs them, (from, to) counted from 1 as they are executed.

    `even`: output j of m layers, the last one not, with layer j L / m where that is whole; `last`: the last but one of both
    and so on; `uniform`: every one, embeddings too; `top`: the last with the last. `first`: only each sequence's first
    position; `normalise`: vectors of length one. Patient KD (Sun et al. 2019) is `even`, `first`, normalised; TinyBERT's
    (Jiao et al. 2020) `uniform` with a projector. `projector`: a learnt matrix takes `to`'s outputs to `from`'s width.
    """

    kind: Literal["hidden_mse"]
    layers: LayerMap = "even"
    positions: Literal["first", "all"] = "all"
    normalise: bool = False
    projector: bool = False


class HiddenCosine(_Flow):
    """1 - cosine between the last hidden states at every token (DistilBERT, Sanh et al. 2019)."""

    kind: Literal["hidden_cosine"]
    projector: bool = False


class AttentionMSE(_Flow):
    """Mean squared error between attention scores before the softmax (TinyBERT); both need the same number of heads."""

    kind: Literal["attention_mse"]
    layers: LayerMap = "uniform"


class RelationKL(_Flow):
    """KL between relations of queries, of keys and of values, in `heads` relation heads of one layer each (MiniLMv2, Wang
    et al. 2021). Layers are counted from 1; by default the last ones. Widths may differ."""

    kind: Literal["relation_kl"]
    heads: int = Field(ge=1)
    from_layer: int | None = Field(None, ge=1)
    to_layer: int | None = Field(None, ge=1)


Flow = ForwardKL | ReverseKL | Jeffreys | JSD
AtLogits = CrossEntropy | Flow
Inner = HiddenMSE | HiddenCosine | AttentionMSE | RelationKL  # inside the models, not at their logits
Term = Annotated[
    CrossEntropy | ForwardKL | ReverseKL | Jeffreys | JSD | HiddenMSE | HiddenCosine | AttentionMSE | RelationKL,
    Field(discriminator="kind"),
]


# ---------------------------------------------------------------------------------------------------------- phases


class Masking(Value):
    """BERT's corruption: a fixed share of each sequence is supervised; of it `mask` masked, `random` replaced."""

    kind: Literal["mask"] = "mask"
    probability: float = Field(0.15, gt=0, lt=1)
    mask: Fraction = 0.8
    random: Fraction = 0.1

    @model_validator(mode="after")
    def _the_shares_leave_room(self) -> Masking:
        if self.mask + self.random > 1 + 1e-9:
            raise ValueError(f"mask {self.mask} and random {self.random} add up to more than 1")
        return self


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class PredictionQuality(Value):
    """Labels of a task's examples by how a model trained on it does there: 0 right and confident, 1 right and not, 2 wrong
    and confident, 3 wrong and not (Cho & Kang 2022, pretraining with the teacher's predictions).

    Confident: its largest probability is above the threshold, one for right answers and one for wrong ones, given or the
    median. Several models: each labels the fold of examples that it was not trained on (`Fold`), the first fold 0.
    """

    NUM: ClassVar = 4

    kind: Literal["prediction_quality"]
    of: Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)] = Field(min_length=1)
    thresholds: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0, lt=1)]] | Literal["median"] = (
        "median"
    )
    permuted: bool = False  # dealt out anew at random: as many of each label, and nothing to learn from them


class Fold(Value):
    """All training examples but one part in `num`."""

    num: int = Field(ge=2)
    leave_out: int = Field(ge=0)

    @model_validator(mode="after")
    def _there_is_such_a_fold(self) -> Fold:
        if self.leave_out >= self.num:
            raise ValueError(f"leave_out {self.leave_out}: the folds are 0 … {self.num - 1}")
        return self


class Stream(Value):
    """What a phase reads: the sequences of a corpus or the examples of a task.

    Of a corpus without corruption each token is the label of the position before it. A task is read as it is.
    """

    data: Name = "corpus"
    corruption: Masking | None = Masking()
    labels: PredictionQuality | None = Field(None, exclude_if=lambda labels: labels is None)  # by default the data's
    fold: Fold | None = Field(None, exclude_if=lambda fold: fold is None)


class Steps(Value):
    steps: int = Field(ge=1)


class Tokens(Value):
    """Rounded up to whole batches."""

    tokens: int = Field(ge=1)


class Epochs(Value):
    """Of the stream that sets the pace, rounded up to whole batches."""

    epochs: Positive


def by_key(*keys: str) -> Discriminator:
    """Tells members of a union apart by the key that each must have, so that an error speaks of one of them only."""

    def find(value: Any) -> str | None:
        if isinstance(value, Mapping):
            return next((key for key in keys if key in value), None)
        return next((key for key in keys if hasattr(value, key) or hasattr(value, f"{key}_")), None)

    return Discriminator(
        find, custom_error_type="which", custom_error_message=f"must have one of the keys: {', '.join(keys)}"
    )


Budget = Annotated[
    Annotated[Steps, Tag("steps")] | Annotated[Tokens, Tag("tokens")] | Annotated[Epochs, Tag("epochs")],
    by_key("steps", "tokens", "epochs"),
]


class Optimizer(Value):
    """AdamW with decoupled decay on matrices, linear warm-up, then `schedule` down to `floor` times `lr`."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    decay: float = Field(0.01, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.0  # fraction of the phase's budget
    floor: Fraction = 0.0
    clip: Positive | None = 1.0  # norm of this model's gradient


def _single(key: str, name: str) -> BeforeValidator:
    """Lets one value stand for a mapping: `{key: …}` is read as `{name: {key: …}}`."""
    return BeforeValidator(lambda v: {name: v} if isinstance(v, Mapping) and key in v else v)


class Phase(Value):
    """One stage of training."""

    train: dict[Name, Literal["full"]] = Field(min_length=1)
    start: dict[
        Name, str
    ] = {}  # model -> phase, or phase@fraction; by default the latest earlier phase that trained it
    streams: dict[Name, Stream] = {"main": Stream()}
    terms: dict[Name, Term] = Field(min_length=1)
    budget: Budget
    batch: int = Field(ge=1)  # sequences of a step over all workers; the micro-batch is found, not chosen
    optimizer: Annotated[dict[Name, Optimizer], _single("lr", "all")]  # by model; `all` for each that is not named
    seed: Literal["trial", "shared"] = "trial"
    evaluate: tuple[Fraction, ...] = (0.25, 0.5, 0.75, 1.0)  # of the budget
    keep: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()  # weights are kept at these fractions too: `phase@0.5`
    each: tuple[Name, ...] = ()  # fan out: once for each of these data sets, as phase[data], never chained

    @property
    def pace(self) -> str:
        """The stream that a budget of tokens or epochs counts: `main`, or the first by name."""
        return "main" if "main" in self.streams else min(self.streams)

    def optimizer_of(self, model: str) -> Optimizer:
        return self.optimizer.get(model) or self.optimizer["all"]

    def without_what_is_off(self) -> Phase:
        """Without terms of weight zero, and without the models that then learn nothing."""
        terms = {name: term for name, term in self.terms.items() if not is_off(term.weight)}
        taught = {target(term) for term in terms.values()}
        streams = {n: s for n, s in self.streams.items() if any(t.on == n for t in terms.values())}
        used = taught | {model for term in terms.values() for model in reads(term)} | set(_labellers(streams))
        return self.model_copy(
            update={
                "terms": terms,
                "train": {model: how for model, how in self.train.items() if model in taught},
                "start": {model: start for model, start in self.start.items() if model in used},
                "optimizer": {model: self.optimizer_of(model) for model in self.train if model in taught},
                "streams": streams,
            }
        )

    @model_validator(mode="after")
    def _terms_name_streams_and_every_trained_model_is_taught(self) -> Phase:
        for name, term in self.terms.items():
            if term.on not in self.streams:
                raise ValueError(f"term {name!r} reads stream {term.on!r}; there is {', '.join(self.streams)}")
        taught = {target(term) for term in self.terms.values()}
        for model in self.train:
            if model not in taught:
                raise ValueError(f"model {model!r} is trained but no term teaches it")
            if "all" not in self.optimizer and model not in self.optimizer:
                raise ValueError(f"no optimizer for model {model!r}")
        for model in set(self.optimizer) - set(self.train) - {"all"}:
            raise ValueError(f"optimizer for {model!r}, which this phase does not train")
        for name, term in self.terms.items():
            if target(term) not in self.train:
                raise ValueError(f"term {name!r} teaches {target(term)!r}, which this phase does not train")
        if not self.evaluate or self.evaluate[-1] != 1.0 or list(self.evaluate) != sorted(set(self.evaluate)):
            raise ValueError("evaluate must rise and end in 1")
        return self


def _labellers(streams: Mapping[str, Stream]) -> Iterator[str]:
    """The models whose predictions label a stream."""
    for stream in streams.values():
        if stream.labels is not None:
            yield from stream.labels.of


def target(term: Term) -> str:
    """The one model that the term's gradient reaches."""
    return term.of if isinstance(term, CrossEntropy) else term.to


def reads(term: Term) -> tuple[str, ...]:
    """The models whose outputs the term needs."""
    return (term.of,) if isinstance(term, CrossEntropy) else (term.from_, term.to)


def is_off(weight: Weight) -> bool:
    """Whether the weight is zero all the way: the term is then not there at all."""
    match weight:
        case OffWhenBetter():
            return False
        case Step(at=0):
            return weight.end == 0
        case Linear() | Cosine() | Step():
            return weight.start == weight.end == 0
        case _:
            return weight == 0


# ----------------------------------------------------------------------------------------------------------- trial


class TrialSpec(Value):
    """Everything that can change a number in a trial's results."""

    data: Annotated[dict[Name, Data], Field(min_length=1), _single("kind", "corpus")]
    precision: Literal["fp32", "bf16"] = "fp32"
    models: dict[Name, Model] = Field(min_length=1)
    phases: dict[Name, Phase] = Field(min_length=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _every_name_is_defined(self) -> TrialSpec:
        for name, model in self.models.items():
            if isinstance(model.init, Remap):
                _known("model", model.init.from_, self.models, f"models.{name}.init.from")
        for name, phase in self.phases.items():
            at = f"phases.{name}"
            for whose, key in ((phase.train, "train"), (phase.start, "start")):
                for used in whose:
                    _known("model", used, self.models, f"{at}.{key}")
            for term_name, term in phase.terms.items():
                for used in reads(term):
                    _known("model", used, self.models, f"{at}.terms.{term_name}")
            for item in phase.each:
                _known("data set", item, self.data, f"{at}.each")
            for stream_name, stream in phase.streams.items():
                if not phase.each:
                    _known("data set", stream.data, self.data, f"{at}.streams.{stream_name}.data")
                for used in _labellers({stream_name: stream}):
                    _known("model", used, self.models, f"{at}.streams.{stream_name}.labels.of")
        for name, data in self.data.items():
            if isinstance(data, Tasks) and isinstance(data.tokenizer, SameTokenizer):
                _known("data set", data.tokenizer.as_, self.data, f"data.{name}.tokenizer.as")
                if isinstance(self.data[data.tokenizer.as_].tokenizer, SameTokenizer):
                    raise ValueError(f"data.{name}.tokenizer.as: {data.tokenizer.as_!r} has no tokenizer of its own")
        if all(is_off(term.weight) for phase in self.phases.values() for term in phase.terms.values()):
            raise ValueError("phases: every term has weight 0: nothing is learnt")
        self._check_start()
        self._check_tasks()
        self._check_inner()
        _refuse_cycle({n: [m.init.from_] for n, m in self.models.items() if isinstance(m.init, Remap)}, "remaps")
        _refuse_cycle({name: list(self._upstream(name)) for name in self.phases}, "phases")
        return self

    def _check_start(self) -> None:
        for name, phase in self.phases.items():
            for model, start in phase.start.items():
                at = f"phases.{name}.start.{model}"
                source, fraction, item = parse_start(start)
                _known("phase", source, self.phases, at)
                earlier = self.phases[source]
                if model not in earlier.train:
                    raise ValueError(f"{at}: phase {source!r} does not train {model!r}")
                if fraction != 1.0 and fraction not in earlier.keep:
                    raise ValueError(f"{at}: phase {source!r} keeps no weights at {fraction:g}; add it to its `keep`")
                if item not in earlier.each if item is not None else not _reaches(earlier, phase):
                    valid = ", ".join(f"{source}[{i}]" for i in earlier.each) or source
                    raise ValueError(f"{at}: {start!r} is not there; valid: {valid}")

    def _check_tasks(self) -> None:
        """A stream is of a corpus or of a task; whoever reads it has one head."""
        for name, phase in self.phases.items():
            for stream_name, stream in phase.streams.items():
                at = f"phases.{name}.streams.{stream_name}"
                data = {item: self.data[item] for item in phase.each or (stream.data,)}
                tasks = [item for item, found in data.items() if isinstance(found, Tasks)]
                if tasks and len(tasks) < len(data):
                    raise ValueError(f"phases.{name}.each: {', '.join(data)} are neither all corpora nor all tasks")
                if tasks and stream.corruption not in (None, Masking()):
                    raise ValueError(f"{at}.corruption: {tasks[0]} is a task, which is read as it is; remove it")
                if tasks and isinstance(phase.budget, Tokens):
                    raise ValueError(f"phases.{name}.budget: a budget of tokens is for corpora; valid: epochs or steps")
                for part in ("labels", "fold"):
                    if not tasks and getattr(stream, part) is not None:
                        raise ValueError(f"{at}.{part}: {next(iter(data))} is a corpus; {part} are for tasks")
                if stream.labels is not None:
                    for item in tasks:
                        if self.data[item].is_regression:  # type: ignore[union-attr]
                            raise ValueError(f"{at}.labels: {item} is a regression, where no answer is right or wrong")
                    for labeller in stream.labels.of:
                        if labeller in phase.train or self.origin(name, labeller) is None:
                            raise ValueError(f"{at}.labels.of: {labeller!r} must have been trained by an earlier phase")
            for model in self.models_of(name):
                read = {t.on for t in phase.terms.values() if model in reads(t)}
                heads = {(phase.streams[on].data if not phase.each else "", phase.streams[on].labels) for on in read}
                kinds = {isinstance(self.data[item], Tasks) for on in read for item in (phase.each or (phase.streams[on].data,))}  # fmt: skip
                if True in kinds and len(heads) > 1:
                    raise ValueError(
                        f"phases.{name}: {model!r} reads several streams, and a task needs a head of its own"
                    )

    def _check_inner(self) -> None:
        for name, phase in self.phases.items():
            for term_name, term in phase.terms.items():
                if isinstance(term, HiddenMSE | HiddenCosine) and not term.projector:
                    widths = {model: self.models[model].width for model in (term.from_, term.to)}
                    if None not in widths.values() and len(set(widths.values())) > 1:
                        about = ", ".join(f"{model} has {width}" for model, width in widths.items())
                        raise ValueError(
                            f"phases.{name}.terms.{term_name}: widths differ ({about}); set projector: true"
                        )

    def origin(self, phase: str, model: str) -> str | None:
        """The phase (as `phase`, `phase@0.5`, `phase[data]`) whose weights `model` has when `phase` starts, or None.

        Where both fan out, `phase` without data means the branch of the same data: branches are never chained.
        """
        if model in self.phases[phase].start:
            return self.phases[phase].start[model]
        latest = None
        for name, earlier in self.phases.items():
            if name == phase:
                break
            if model in earlier.train and _reaches(earlier, self.phases[phase]):
                latest = name
        return latest

    def models_of(self, phase: str) -> tuple[str, ...]:
        """The models that a phase trains or reads, in the order of the file."""
        p = self.phases[phase]
        used = set(p.train) | {model for term in p.terms.values() for model in reads(term)} | set(_labellers(p.streams))
        return tuple(name for name in self.models if name in used)

    def _upstream(self, phase: str) -> Iterator[str]:
        """The phases that `phase` needs: where its models come from, remaps included."""
        todo, seen = list(self.models_of(phase)), set[str]()
        while todo:
            model = todo.pop()
            if model in seen:
                continue
            seen.add(model)
            origin = self.origin(phase, model)
            if origin is not None:
                yield parse_start(origin)[0]
                continue
            init = self.models[model].init
            if isinstance(init, Remap):
                todo.append(init.from_)

    def order(self) -> tuple[str, ...]:
        """Phases such that each comes after those it needs; otherwise in the order of the file."""
        done: list[str] = []

        def visit(name: str) -> None:
            if name not in done:
                for upstream in self._upstream(name):
                    visit(upstream)
                done.append(name)

        for name in self.phases:
            visit(name)
        return tuple(done)

    def upto(self, phase: str) -> TrialSpec:
        """The trial that runs only `phase` and what it needs."""
        return self._keep({phase, *self._closure(phase)})

    def _closure(self, phase: str) -> set[str]:
        found: set[str] = set()
        todo = [phase]
        while todo:
            for upstream in self._upstream(todo.pop()):
                if upstream not in found:
                    found.add(upstream)
                    todo.append(upstream)
        return found

    def pruned(self) -> TrialSpec:
        """Without what no result depends on: terms that are off, phases that only they read, models that nothing uses.

        A phase that no other phase reads, as the file stands, is a result and stays, unless all its terms are off. Data
        stay too: models are made for the longest sequence, and that must not change with what is switched off.
        """
        read_as_written = {up for name in self.phases for up in self._upstream(name)}
        phases = {name: phase.without_what_is_off() for name, phase in self.phases.items()}
        lean = self.model_copy(update={"phases": phases})
        for name, phase in phases.items():  # where a phase no longer trains a model, what it had before goes on
            start = {model: lean._trained(model, at) for model, at in phase.start.items()}
            phases[name] = phase.model_copy(update={"start": {m: at for m, at in start.items() if at is not None}})
        results = [name for name, phase in phases.items() if name not in read_as_written and phase.terms]
        return lean._keep(set(results).union(*(lean._closure(name) for name in results)))

    def _trained(self, model: str, start: str | None) -> str | None:
        """`start`, or where that phase got the model from if it does not train it."""
        while start is not None and model not in self.phases[(source := parse_start(start)[0])].train:
            item, start = parse_start(start)[2], self.origin(source, model)
            if item is not None and start is not None and self.phases[parse_start(start)[0]].each and "[" not in start:
                name, _, fraction = start.partition("@")
                start = f"{name}[{item}]" + (f"@{fraction}" if fraction else "")
        return start

    def _keep(self, phases: set[str]) -> TrialSpec:
        kept = {name: phase for name, phase in self.phases.items() if name in phases}
        lean = self.model_copy(update={"phases": kept})
        models = {model for name in kept for model in lean.models_of(name)}
        for name in kept:  # a remap's source is needed where the model is made
            todo = [m for m in lean.models_of(name) if lean.origin(name, m) is None]
            while todo:
                init = self.models[todo.pop()].init
                if isinstance(init, Remap) and init.from_ not in models:
                    models.add(init.from_)
                if isinstance(init, Remap) and lean.origin(name, init.from_) is None:
                    todo.append(init.from_)
        return lean.model_copy(update={"models": {n: m for n, m in self.models.items() if n in models}})


def _reaches(earlier: Phase, later: Phase) -> bool:
    """Whether `later`, or each of its branches, can go on from `earlier` without a branch being named."""
    return not earlier.each or (bool(later.each) and set(later.each) <= set(earlier.each))


def parse_start(start: str) -> tuple[str, float, str | None]:
    """`phase`, `phase@0.5`, `phase[data]`, `phase[data]@0.5` -> (phase, fraction, data)."""
    name, _, fraction = start.partition("@")
    item = None
    if name.endswith("]"):
        name, _, item = name[:-1].partition("[")
    try:
        return name, float(fraction) if fraction else 1.0, item
    except ValueError:
        raise ValueError(f"{start!r} is no place to start; valid: phase, phase@0.5, phase[data]") from None


def _known(what: str, name: str, among: Mapping[str, Any], at: str) -> None:
    if name not in among:
        raise ValueError(f"{at}: there is no {what} {name!r}; there is {', '.join(among)}")


def _refuse_cycle(edges: Mapping[str, list[str]], what: str) -> None:
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == 1:
            raise ValueError(f"{what} form a cycle: {' -> '.join((*trail[trail.index(name) :], name))}")
        if state.get(name) != 2:
            state[name] = 1
            for upstream in edges.get(name, ()):
                visit(upstream, (*trail, name))
            state[name] = 2

    for name in edges:
        visit(name, ())


# ------------------------------------------------------------------------------------------------- identity, streams


def digest(value: Any, num_hex: int = 64) -> str:
    """SHA-256 of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:num_hex]


def trial_id(spec: TrialSpec, fingerprints: Mapping[str, str]) -> str:
    """12 hex digits over the pruned spec; data and pretrained weights count by content, not by where they lie."""
    lean = spec.pruned()
    value = lean.model_dump(mode="json")
    value["data"] = {name: fingerprints[f"data:{name}"] for name in lean.data}
    for name, model in lean.models.items():
        if model.pretrained is not None:
            value["models"][name] = {"weights": fingerprints[f"model:{name}"], "dropout": model.dropout}
    return digest(value, 12)


def random_stream(*purpose: str | int | float) -> int:
    """A 63-bit seed for one purpose: (seed, what for, whose, when). Independent of any order of construction."""
    return int(digest(list(purpose), 16), 16) >> 1
