"""What a trial is: one frozen value. Plain data; knows no paper, no storage, no device and no Ray.

Whatever can change a number in the results is a field here; nothing else is. A spec travels as JSON and is validated at
both ends. `pruned()` drops what no result depends on (terms of weight zero, phases and models that nothing reads), so
that an ablation shares its phases with every trial that computes the same thing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

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


Data = Annotated[PythonDocs | Files | Hub, Field(discriminator="kind")]


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

    @model_validator(mode="after")
    def _either_a_shape_or_pretrained_weights(self) -> Model:
        if self.pretrained is not None:
            given = [key for key in ("family", "layers", "width", "heads", "inner") if getattr(self, key) is not None]
            if given or self.config:
                raise ValueError(f"pretrained weights bring their own shape: remove {', '.join(given) or 'config'}")
            if self.init != Random():
                raise ValueError("pretrained weights are the initialisation: remove init")
            return self
        missing = [key for key in ("family", "layers", "width") if getattr(self, key) is None]
        if missing:
            raise ValueError(f"needs {', '.join(missing)} (or pretrained: a hub id or a folder)")
        assert self.width is not None
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.num_heads}")
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
    """The hard loss of one model: cross-entropy with the stream's labels, mean over supervised positions."""

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
    """A loss whose gradient reaches only `to`; the logits of `from` are detached."""

    from_: Name = Field(alias="from", validation_alias=AliasChoices("from", "from_"))
    to: Name
    on: Name = "main"
    weight: Weight = 1.0
    temperature: Positive = 1.0  # of both sides
    tau_squared: bool  # no default: papers disagree, so every study states it

    @model_validator(mode="after")
    def _a_flow_joins_two_models(self) -> _Flow:
        if self.from_ == self.to:
            raise ValueError(f"flows from {self.from_!r} to itself")
        return self


class ForwardKL(_Flow):
    """KL(from || to)."""

    kind: Literal["forward_kl"]


class ReverseKL(_Flow):
    """KL(to || from)."""

    kind: Literal["reverse_kl"]


class Jeffreys(_Flow):
    """(KL(from || to) + KL(to || from)) / 2."""

    kind: Literal["jeffreys"]


class JSD(_Flow):
    """beta KL(from || m) + (1 - beta) KL(to || m) with m = beta from + (1 - beta) to (GKD's convention)."""

    kind: Literal["jsd"]
    beta: float = Field(0.5, gt=0, lt=1)


Flow = ForwardKL | ReverseKL | Jeffreys | JSD
Term = Annotated[CrossEntropy | ForwardKL | ReverseKL | Jeffreys | JSD, Field(discriminator="kind")]


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


class Stream(Value):
    """The sequences that a phase reads. Without corruption each token is the label of the position before it."""

    data: Name = "corpus"
    corruption: Masking | None = Masking()


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
        used = taught | {model for term in terms.values() for model in reads(term)}
        return self.model_copy(
            update={
                "terms": terms,
                "train": {model: how for model, how in self.train.items() if model in taught},
                "start": {model: start for model, start in self.start.items() if model in used},
                "optimizer": {model: self.optimizer_of(model) for model in self.train if model in taught},
                "streams": {n: s for n, s in self.streams.items() if any(t.on == n for t in terms.values())},
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
        if all(is_off(term.weight) for term in self.terms.values()):
            raise ValueError("every term has weight 0: nothing is learnt")
        if not self.evaluate or self.evaluate[-1] != 1.0 or list(self.evaluate) != sorted(set(self.evaluate)):
            raise ValueError("evaluate must rise and end in 1")
        return self


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
        self._check_start()
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
                if (item is None) != (not earlier.each) or (item is not None and item not in earlier.each):
                    valid = ", ".join(f"{source}[{i}]" for i in earlier.each) or source
                    raise ValueError(f"{at}: {start!r} is not there; valid: {valid}")

    def origin(self, phase: str, model: str) -> str | None:
        """The phase (as `phase`, `phase@0.5`, `phase[data]`) whose weights `model` has when `phase` starts, or None."""
        if model in self.phases[phase].start:
            return self.phases[phase].start[model]
        latest = None
        for name, earlier in self.phases.items():
            if name == phase:
                break
            if model in earlier.train and not earlier.each:
                latest = name
        return latest

    def models_of(self, phase: str) -> tuple[str, ...]:
        """The models that a phase trains or reads, in the order of the file."""
        p = self.phases[phase]
        used = set(p.train) | {model for term in p.terms.values() for model in reads(term)}
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

        A phase that no other phase reads, as the file stands, is a result and stays. Data stay too: models are made for
        the longest sequence, and that must not change with what is switched off.
        """
        read_as_written = {up for name in self.phases for up in self._upstream(name)}
        phases = {name: phase.without_what_is_off() for name, phase in self.phases.items()}
        lean = self.model_copy(update={"phases": phases})
        for name, phase in phases.items():  # where a phase no longer trains a model, what it had before goes on
            start = {model: lean._trained(model, at) for model, at in phase.start.items()}
            phases[name] = phase.model_copy(update={"start": {m: at for m, at in start.items() if at is not None}})
        results = [name for name in self.phases if name not in read_as_written]
        return lean._keep(set(results).union(*(lean._closure(name) for name in results)))

    def _trained(self, model: str, start: str | None) -> str | None:
        """`start`, or where that phase got the model from if it does not train it."""
        while start is not None and model not in self.phases[(source := parse_start(start)[0])].train:
            start = self.origin(source, model)
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
