"""A phase: which models are trained, on which streams, by which terms, for how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from trainables.config.data import Sampling
from trainables.config.optimizer import Optimizer
from trainables.config.schedules import Constant, Share
from trainables.config.terms import Term
from trainables.config.value import Fraction, Name, Positive, Value, by_key, single


class Masking(Value):
    """BERT's corruption: `probability` of each sequence is supervised; of these tokens `mask` are masked, `random`
    replaced."""

    kind: Literal["mask"] = "mask"
    probability: float = Field(0.15, gt=0, lt=1)  # of a token to be supervised
    mask: Fraction = 0.8  # fraction of the supervised tokens that are masked
    random: Fraction = 0.1  # fraction of the supervised tokens that are replaced at random

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
                "expected 'median', or two numbers above 0 and below 1, for right and for wrong predictions; or such a "
                "pair by data set"
            )
    return value


class PredictionQuality(Value):
    """Labels a task's examples by the predictions of a model trained on the task: 0 right and confident, 1 right and
    not confident, 2 wrong and confident, 3 wrong and not confident (Cho & Kang 2022, pretraining with the teacher's
    predictions).

    Confident: the largest probability is above a threshold, one for right and one for wrong predictions: given for all
    tasks or by task, or the median. Several models: each labels the fold that it was not trained on (`Fold`), the first
    fold 0.
    """

    NUM: ClassVar = 4

    kind: Literal["prediction_quality"]
    of: Annotated[tuple[Name, ...], BeforeValidator(_as_tuple, json_schema_input_type=Name | list[Name])] = Field(
        min_length=1
    )  # one, or one for each fold
    thresholds: Annotated[
        tuple[float, float] | dict[Name, tuple[float, float]] | Literal["median"], BeforeValidator(_thresholds)
    ] = "median"  # for right, and for wrong predictions
    permuted: bool = False  # at random over the examples: a control with the same label counts

    def on(self, data: str) -> PredictionQuality:
        """Returns the rule with the thresholds of this data set only."""
        if not isinstance(self.thresholds, dict):
            return self
        return self.model_copy(update={"thresholds": self.thresholds[data]})


class Fold(Value):
    """All training examples except one of `num` parts."""

    num: int = Field(ge=2)  # number of parts
    held_out: int = Field(ge=0)  # the part that is left out, from 0 on

    @model_validator(mode="after")
    def _there_is_such_a_fold(self) -> Fold:
        if self.held_out >= self.num:
            raise ValueError(f"held_out {self.held_out}: the folds are 0 … {self.num - 1}")
        return self


class Replay(Value):
    """The last `size` replies, read again. Of the steps that read generated replies, a fraction generates fresh ones:
    it falls from 1 to 0 over the budget, rises, or is always a half; it is 1 until `size` replies are kept
    (DistiLLM)."""

    size: int = Field(1000, ge=1)  # replies that are kept
    fresh: Literal["decreasing", "constant", "increasing"] = "decreasing"  # trend over the budget

    def fresh_share(self, progress: float) -> float:
        """Returns the fraction of fresh steps once `size` replies are kept."""
        return {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self.fresh]


class _Generated(Value):
    """Replies that models generate, in place of those of the data, in a `share` of the steps."""

    share: Share = Constant(1.0)  # fraction of the steps that read generated replies
    replay: Replay | None = None  # by default every reply is fresh

    @model_validator(mode="after")
    def _the_share_is_a_fraction(self) -> Self:
        if max(self.share.ends) > 1:
            raise ValueError(f"share {max(self.share.ends):g}: expected a fraction of the steps, 0 … 1")
        return self


class Sampled(_Generated, Sampling):
    """Replies of one model: the student (on-policy), or the teacher (sequence-level distillation)."""

    kind: Literal["sampled"]
    by: Name  # the model that replies
    once: bool = False  # each prompt is answered once, and the reply is kept

    @property
    def models(self) -> tuple[str, ...]:
        return (self.by,)

    @model_validator(mode="after")
    def _replies_are_kept_once_or_replayed(self) -> Sampled:
        if self.once and self.replay is not None:
            raise ValueError("once keeps every reply: remove replay")
        return self


class Interleaved(_Generated, Sampling):
    """`draft` proposes `block` tokens at a time; `teacher` draws a replacement for the first one that is not among its
    `top` likeliest, and the rest of the block is dropped (speculative distillation, Xu et al. 2025)."""

    kind: Literal["interleaved"]
    draft: Name  # the model that proposes tokens
    teacher: Name  # the model that replaces them
    block: int = Field(5, ge=1)  # tokens that are proposed at a time
    top: int = Field(25, ge=1)  # a proposed token must be among so many
    teacher_temperature: Positive = 1.0  # of the teacher's draws
    teacher_top_p: float = Field(1.0, gt=0, le=1)  # of the teacher's draws

    @property
    def models(self) -> tuple[str, ...]:
        return (self.draft, self.teacher)


ReplySource = Annotated[Sampled | Interleaved, Field(discriminator="kind")]


class Mix(Value):
    """Each example of a task with another one of the batch, as a mixture of word embeddings: λ E(x_i) + (1 - λ) E(x_j), in
    each model's own table, λ from Beta(alpha, alpha) (MixKD, Liang et al. 2021).

    A hard term is split λ : 1 - λ between both labels. The formula is that of mixup in the embeddings; MixKD's own is
    known from its abstract and second-hand.
    """

    alpha: Positive = 0.4  # the smaller, the nearer is λ to 0 or 1

    @property
    def formula(self) -> str:
        return f"pairs of examples, λ E(x_i) + (1 - λ) E(x_j) in each model's embeddings, λ from Beta({self.alpha:g}, {self.alpha:g})"


class Stream(Value):
    """The data that a phase reads: the sequences of a corpus, the examples of a task, or instructions with replies.

    In a corpus without corruption each token is the label of the position before. Tasks and instructions are never
    corrupted.
    """

    data: Name = "corpus"  # name of a data set
    corruption: Masking | None = Masking()  # of a corpus; null: predict each token from those before
    labels: PredictionQuality | None = None  # by default those of the data
    fold: Fold | None = None  # by default all examples
    replies: ReplySource | None = None  # by default those of the data
    # by default examples as they are; absent from a dump where not used, so that stored phases keep their keys
    mix: Mix | None = Field(None, exclude_if=lambda value: value is None)

    @property
    def reply_models(self) -> tuple[str, ...]:
        return self.replies.models if self.replies is not None else ()

    @property
    def models(self) -> tuple[str, ...]:
        """The models whose predictions label the stream, or that generate its replies."""
        return (*(self.labels.of if self.labels is not None else ()), *self.reply_models)


class Steps(Value):
    """A number of optimizer steps."""

    steps: int = Field(ge=1)  # steps of the optimizer

    def scaled(self, factor: float) -> Steps:
        return Steps(steps=max(1, round(self.steps * factor)))


class Tokens(Value):
    """A number of tokens, rounded up to whole batches."""

    tokens: int = Field(ge=1)  # tokens of the stream `main`

    def scaled(self, factor: float) -> Tokens:
        return Tokens(tokens=max(1, round(self.tokens * factor)))


class Epochs(Value):
    """Passes over the stream that sets the pace, rounded up to whole batches."""

    epochs: Positive  # passes over the stream `main`

    def scaled(self, factor: float) -> Epochs:
        return Epochs(epochs=float(f"{self.epochs * factor:.4g}"))


Budget = Annotated[
    Annotated[Steps, Tag("steps")] | Annotated[Tokens, Tag("tokens")] | Annotated[Epochs, Tag("epochs")],
    by_key("steps", "tokens", "epochs"),
]


class Lora(Value):
    """Trains only low-rank changes of projections (Hu et al. 2022): alpha / rank times B A, B zero at the start.

    `targets` are logical: where a family keeps several projections in one matrix, each has its own pair. `all_linear`: every
    linear layer below the head, as in peft (QLoRA's choice: Dettmers et al. 2023).
    """

    kind: Literal["lora"]
    rank: int = Field(32, ge=1)  # rank of each change
    alpha: Positive | None = None  # by default the rank: a scale of 1
    targets: (
        Literal["all_linear"] | Annotated[tuple[Literal["query", "key", "value", "output"], ...], Field(min_length=1)]
    ) = ("query", "value")
    dropout: float = Field(0.0, ge=0, lt=1)  # of the input of each change
    rslora: bool = Field(
        False, exclude_if=lambda value: not value
    )  # alpha / sqrt(rank) as the scale (Kalajdzievski 2023)
    # whether a classifier's head learns in full beside the changes; by default where the head is drawn anew
    head: bool | None = Field(None, exclude_if=lambda value: value is None)


How = Annotated[
    Annotated[Literal["full"], Tag("full")] | Annotated[Lora, Tag("lora")],
    Discriminator(lambda value: "full" if isinstance(value, str) else "lora"),
]


class EarlyStopping(Value):
    """Keeps the weights that were best on dev, and ends a phase after `patience` evaluations in a row without a better one.

    Judged by a `metric` of a model, or by the loss of a `term`, both on dev. Without `patience` the phase runs to its end.
    The phase's last evaluation, and `test`, are of the weights that are kept.
    """

    metric: str | None = None  # on dev, e.g. mlm_loss
    model: Name | None = None  # whose metric; by default the only model that is trained
    data: Name | None = None  # on which the metric is measured; by default the only data set that the phase reads
    term: Name | None = None  # its loss on dev
    patience: PositiveInt | None = None  # evaluations without a better one
    restore: Literal["best", "last"] = "best"  # the weights that are kept

    @model_validator(mode="after")
    def _one_number_decides(self) -> EarlyStopping:
        if (self.metric is None) == (self.term is None):
            raise ValueError("expected either `metric` or `term`")
        if self.term is not None and (self.model or self.data):
            raise ValueError("a term has its own model and data; remove `model` and `data`")
        if self.patience is None and self.restore == "last":
            raise ValueError("changes nothing: give `patience`, or `restore: best`")
        return self


class Phase(Value):
    """One stage of training."""

    train: dict[Name, How] = Field(min_length=1)  # model -> full, or lora
    # model -> phase, or phase@fraction; by default the latest earlier phase that trained the model
    start: dict[Name, str] = {}
    streams: dict[Name, Stream] = {"main": Stream()}  # name -> what the phase reads
    terms: dict[Name, Term] = Field(min_length=1)  # name -> loss; the phase minimises their weighted sum
    budget: Budget  # one of steps, tokens, epochs
    batch: int = Field(ge=1)  # sequences of a step over all workers; the micro-batch follows from the memory
    optimizer: Annotated[
        dict[Name, Optimizer], single("lr", "all", Optimizer)
    ]  # by model; `all` for each model not named
    seed: Literal["trial", "shared"] = "trial"  # shared: one run serves all seeds of a study
    evaluate: tuple[Fraction, ...] = (0.25, 0.5, 0.75, 1.0)  # fractions of the budget
    # fractions at which weights are kept, as `phase@0.5`
    save_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    eval_only: tuple[Name, ...] = ()  # further data, on whose test split each trained model is evaluated
    gradient_checkpointing: bool = False  # less memory, more time
    for_each_dataset: tuple[Name, ...] = ()  # run once for each of these data sets, as phase[data], never chained
    # by default the phase runs to its end; absent from a dump where not used, so that stored phases keep their keys
    early_stopping: EarlyStopping | None = Field(None, exclude_if=lambda value: value is None)

    @property
    def pace(self) -> str:
        """The stream that a budget of tokens or epochs counts: `main`, or the first by name."""
        return "main" if "main" in self.streams else min(self.streams)

    def optimizer_of(self, model: str) -> Optimizer:
        return self.optimizer.get(model) or self.optimizer["all"]

    @property
    def taught(self) -> set[str]:
        """The models that a term teaches."""
        return {term.target for term in self.terms.values()}

    @property
    def models(self) -> set[str]:
        """The models that the phase trains or reads."""
        of_terms = {model for term in self.terms.values() for model in term.reads}
        return of_terms | {model for stream in self.streams.values() for model in stream.models}

    def readers(self, stream: str) -> tuple[str, ...]:
        """Returns the models that a stream's terms read, those that learn first."""
        terms = [term for term in self.terms.values() if term.on == stream]
        return tuple(dict.fromkeys([*(term.target for term in terms), *(m for term in terms for m in term.reads)]))

    def pruned(self) -> Phase:
        """Drops terms of weight zero, and the models that then learn nothing."""
        terms = {name: term for name, term in self.terms.items() if not term.weight.is_off}
        used = {term.on for term in terms.values()}
        streams = {name: stream for name, stream in self.streams.items() if name in used}
        lean = self.model_copy(update={"terms": terms, "streams": streams})
        return lean.model_copy(
            update={
                "train": {model: how for model, how in self.train.items() if model in lean.taught},
                "start": {model: start for model, start in self.start.items() if model in lean.models},
                "optimizer": {model: self.optimizer_of(model) for model in self.train if model in lean.taught},
            }
        )

    @model_validator(mode="after")
    def _terms_name_streams_and_every_trained_model_is_taught(self) -> Phase:
        for name, term in self.terms.items():
            if term.on not in self.streams:
                raise ValueError(f"term {name!r} reads stream {term.on!r}; there is {', '.join(self.streams)}")
        for model in self.train:
            if model not in self.taught:
                raise ValueError(f"model {model!r} is trained but no term teaches it")
            if "all" not in self.optimizer and model not in self.optimizer:
                raise ValueError(f"no optimizer for model {model!r}")
        for model in set(self.optimizer) - set(self.train) - {"all"}:
            raise ValueError(f"optimizer for {model!r}, which this phase does not train")
        for name, term in self.terms.items():
            if term.target not in self.train:
                raise ValueError(f"term {name!r} teaches {term.target!r}, which this phase does not train")
        if not self.evaluate or self.evaluate[-1] != 1.0 or list(self.evaluate) != sorted(set(self.evaluate)):
            raise ValueError("evaluate must rise and end in 1")
        return self

    @model_validator(mode="after")
    def _early_stopping_has_one_number(self) -> Phase:
        if (rule := self.early_stopping) is None:
            return self
        if len(self.evaluate) == 1:
            raise ValueError("early_stopping: give `evaluate` fractions before the end, e.g. [0.25, 0.5, 0.75, 1]")
        if rule.term is not None:
            if rule.term not in self.terms:
                raise ValueError(f"early_stopping.term: no term {rule.term!r}; expected {', '.join(self.terms)}")
            if self.terms[rule.term].weight.is_off:
                raise ValueError(f"early_stopping.term: {rule.term!r} has weight 0; expected null or a metric")
            return self
        if rule.model is None and len(self.train) > 1:
            raise ValueError(f"early_stopping.model: expected one of {', '.join(self.train)}")
        if rule.model is not None and rule.model not in self.train:
            raise ValueError(f"early_stopping.model: {rule.model!r} is not trained; expected {', '.join(self.train)}")
        read = {stream.data for stream in self.streams.values()}
        if rule.data is None and len(read) > 1 and not self.for_each_dataset:
            raise ValueError(f"early_stopping.data: expected one of {', '.join(sorted(read))}")
        if rule.data is not None and (self.for_each_dataset or rule.data not in read):
            expected = "none, as each branch has its own" if self.for_each_dataset else ", ".join(sorted(read))
            raise ValueError(f"early_stopping.data: {rule.data!r}; expected {expected}")
        return self
