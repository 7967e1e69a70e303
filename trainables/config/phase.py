"""A phase: who is trained on which streams, by which terms, for how long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from trainables.config.data import Sampling
from trainables.config.terms import Cosine, Linear, Step, Term, is_off, reads, target
from trainables.config.value import Fraction, Name, Positive, Value, by_key, single


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


def _thresholds(value: Any) -> Any:
    pairs = list(value.values()) if isinstance(value, Mapping) else [value]
    for pair in pairs if value != "median" else ():
        numbers = isinstance(pair, list | tuple) and all(isinstance(v, int | float) and 0 < v < 1 for v in pair)
        if not (numbers and len(pair) == 2):
            raise ValueError(
                "must be 'median', or two numbers above 0 and below 1: for right answers, and for wrong ones; or data set "
                "-> two such numbers"
            )
    return value


class PredictionQuality(Value):
    """Labels of a task's examples by how a model trained on it does there: 0 right and confident, 1 right and not, 2 wrong
    and confident, 3 wrong and not (Cho & Kang 2022, pretraining with the teacher's predictions).

    Confident: its largest probability is above the threshold, one for right answers and one for wrong ones, given
    (for all tasks, or for each by its name) or the median. Several models: each labels the fold of examples that it was not trained on (`Fold`), the first fold 0.
    """

    NUM: ClassVar = 4

    kind: Literal["prediction_quality"]
    of: Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)] = Field(min_length=1)
    thresholds: Annotated[
        tuple[float, float] | dict[Name, tuple[float, float]] | Literal["median"], BeforeValidator(_thresholds)
    ] = "median"
    permuted: bool = False  # dealt out anew at random: as many of each label, and nothing to learn from them

    def on(self, data: str) -> PredictionQuality:
        """With the thresholds of this data set: what those of others are is nothing to it."""
        if not isinstance(self.thresholds, dict):
            return self
        return self.model_copy(update={"thresholds": self.thresholds[data]})


class Fold(Value):
    """All training examples but one part in `num`."""

    num: int = Field(ge=2)
    held_out: int = Field(ge=0)

    @model_validator(mode="after")
    def _there_is_such_a_fold(self) -> Fold:
        if self.held_out >= self.num:
            raise ValueError(f"held_out {self.held_out}: the folds are 0 … {self.num - 1}")
        return self


class RisesWithLoss(Value):
    """`start`, and `step` more each time that the loss on dev has risen by `tolerance` since the last time (DistiLLM)."""

    kind: Literal["rises_with_loss"]
    start: Fraction = 0.0
    step: float = Field(0.1, gt=0, le=1)
    tolerance: float = Field(0.1, ge=0)


Share = Annotated[
    Annotated[Fraction, Tag("number")]
    | Annotated[
        Annotated[Linear | Cosine | Step | RisesWithLoss, Field(discriminator="kind")],
        Tag("schedule"),
    ],
    Discriminator(lambda value: "number" if isinstance(value, int | float | str | None) else "schedule"),
]


class Replay(Value):
    """The last `size` replies, read again. Of the steps that read made replies, as many have fresh ones as `fresh` says of
    the budget: it falls from 1 to 0, rises, or is a half all the time; all of them until `size` are there (DistiLLM)."""

    size: int = Field(1000, ge=1)
    fresh: Literal["decreasing", "constant", "increasing"] = "decreasing"


class _Made(Value):
    """Replies that models make, instead of those of the data, in a `share` of the steps."""

    share: Share = 1.0
    replay: Replay | None = None

    @model_validator(mode="after")
    def _the_share_is_one(self) -> _Made:
        ends = (getattr(self.share, "start", 0.0), getattr(self.share, "end", 0.0))
        if max(ends) > 1:
            raise ValueError(f"share {max(ends):g}: it is a fraction of the steps, 0 … 1")
        return self


class Sampled(_Made, Sampling):
    """By one model: the student (on-policy), or the teacher (sequence-level distillation)."""

    kind: Literal["sampled"]
    by: Name
    once: bool = False  # each prompt is answered once, and that reply is kept

    @property
    def makers(self) -> tuple[str, ...]:
        return (self.by,)

    @model_validator(mode="after")
    def _what_is_kept_is_not_kept_twice(self) -> Sampled:
        if self.once and self.replay is not None:
            raise ValueError("once keeps every reply: remove replay")
        return self


class Interleaved(_Made, Sampling):
    """`draft` proposes `block` tokens at a time; the first that is not among the `top` likeliest of `teacher` is drawn
    anew by it, and the rest of the block is dropped (speculative distillation, Xu et al. 2025)."""

    kind: Literal["interleaved"]
    draft: Name
    teacher: Name
    block: int = Field(5, ge=1)
    top: int = Field(25, ge=1)
    teacher_temperature: Positive = 1.0
    teacher_top_p: float = Field(1.0, gt=0, le=1)

    @property
    def makers(self) -> tuple[str, ...]:
        return (self.draft, self.teacher)


Made = Annotated[Sampled | Interleaved, Field(discriminator="kind")]


class Stream(Value):
    """What a phase reads: the sequences of a corpus, the examples of a task, or instructions with replies.

    Of a corpus without corruption each token is the label of the position before it. Tasks and instructions are read as
    they are; `replies` of models take the place of those of the data.
    """

    data: Name = "corpus"
    corruption: Masking | None = Masking()
    labels: PredictionQuality | None = Field(None, exclude_if=lambda labels: labels is None)  # by default the data's
    fold: Fold | None = Field(None, exclude_if=lambda fold: fold is None)
    replies: Made | None = Field(None, exclude_if=lambda replies: replies is None)  # by default the data's


class Steps(Value):
    steps: int = Field(ge=1)


class Tokens(Value):
    """Rounded up to whole batches."""

    tokens: int = Field(ge=1)


class Epochs(Value):
    """Of the stream that sets the pace, rounded up to whole batches."""

    epochs: Positive


Budget = Annotated[
    Annotated[Steps, Tag("steps")] | Annotated[Tokens, Tag("tokens")] | Annotated[Epochs, Tag("epochs")],
    by_key("steps", "tokens", "epochs"),
]


class Lora(Value):
    """Only a low-rank change of some projections learns (Hu et al. 2022): alpha / rank times B A, B zero at the start.

    `targets` are logical: where a family keeps several projections in one matrix, each has a pair of its own.
    """

    kind: Literal["lora"]
    rank: int = Field(32, ge=1)
    alpha: Positive | None = None  # by default the rank: a scale of 1
    targets: tuple[Literal["query", "key", "value", "output"], ...] = Field(("query", "value"), min_length=1)
    dropout: float = Field(0.0, ge=0, lt=1)


How = Annotated[
    Annotated[Literal["full"], Tag("full")] | Annotated[Lora, Tag("lora")],
    Discriminator(lambda value: "full" if isinstance(value, str) else "lora"),
]


class Optimizer(Value):
    """Decoupled decay on matrices, linear warm-up, then `schedule` down to `min_lr_ratio` times `lr`.

    `adamw_8bit` keeps both moments in 8 bits; `adafactor` keeps rows and columns of the second, and takes no betas.
    """

    kind: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    lr: Positive
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: float = Field(0.01, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.0  # fraction of the phase's budget
    min_lr_ratio: Fraction = 0.0
    max_grad_norm: Positive | None = 1.0  # norm of this model's gradient


class Phase(Value):
    """One stage of training."""

    train: dict[Name, How] = Field(min_length=1)
    start: dict[
        Name, str
    ] = {}  # model -> phase, or phase@fraction; by default the latest earlier phase that trained it
    streams: dict[Name, Stream] = {"main": Stream()}
    terms: dict[Name, Term] = Field(min_length=1)
    budget: Budget
    batch: int = Field(ge=1)  # sequences of a step over all workers; the micro-batch is found, not chosen
    optimizer: Annotated[dict[Name, Optimizer], single("lr", "all")]  # by model; `all` for each that is not named
    seed: Literal["trial", "shared"] = "trial"
    evaluate: tuple[Fraction, ...] = (0.25, 0.5, 0.75, 1.0)  # of the budget
    save_at: tuple[
        Annotated[float, Field(gt=0, lt=1)], ...
    ] = ()  # weights are kept at these fractions too: `phase@0.5`
    eval_only: tuple[Name, ...] = Field(
        (), exclude_if=lambda names: not names
    )  # further data: each trained model, on test
    gradient_checkpointing: bool = Field(False, exclude_if=lambda is_on: not is_on)  # activations, to save memory
    for_each_dataset: tuple[Name, ...] = ()  # fan out: once for each of these data sets, as phase[data], never chained

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
        used = taught | {model for term in terms.values() for model in reads(term)} | set(makers(streams))
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


def makers(streams: Mapping[str, Stream]) -> Iterator[str]:
    """The models whose predictions label a stream, or that make its replies."""
    for stream in streams.values():
        if stream.labels is not None:
            yield from stream.labels.of
        if stream.replies is not None:
            yield from stream.replies.makers
