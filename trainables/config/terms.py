"""Terms: named, weighted losses of one model, or flows between models; and weights over a phase's budget."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Discriminator, Field, Tag, model_validator

from trainables.config.value import Fraction, Name, Positive, Value


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


class SkewKL(_Soft):
    """KL(from || alpha from + (1 - alpha) to) (DistiLLM, Ko et al. 2024)."""

    kind: Literal["skew_kl"]
    alpha: float = Field(0.1, gt=0, lt=1)


class SkewReverseKL(_Soft):
    """KL(to || (1 - alpha) from + alpha to), the gradient through both of its sides (DistiLLM, Ko et al. 2024)."""

    kind: Literal["skew_reverse_kl"]
    alpha: float = Field(0.1, gt=0, lt=1)


class TotalVariation(_Soft):
    """Half the sum of absolute differences (f-distill, Wen et al. 2023)."""

    kind: Literal["total_variation"]


class AdaptiveKL(_Soft):
    """KL(from || to) and KL(to || from), each position's share by where the sides differ more: in the head of `from`, its
    likeliest tokens up to the mass `head`, or in the tail (AKL, Wu et al. 2024)."""

    kind: Literal["adaptive_kl"]
    head: float = Field(0.5, gt=0, lt=1)


class InterpolatedKL(_Soft):
    """KL(p_t || to), where the logits of p_t are t of `from` and 1 - t of `to`, detached (TAID, Shing et al. 2025).

    t rises from `start` to `end` over the budget, and faster while the loss falls: by alpha sigmoid(m) (1 - t) a step, m
    the relative fall of the loss, averaged with momentum `beta`.
    """

    kind: Literal["interpolated_kl"]
    start: Fraction = 0.4
    end: Fraction = 1.0
    alpha: float = Field(5e-4, ge=0)
    beta: float = Field(0.99, ge=0, lt=1)

    @model_validator(mode="after")
    def _t_rises(self) -> InterpolatedKL:
        if self.end < self.start:
            raise ValueError(f"t rises: end {self.end:g} is below start {self.start:g}")
        return self


class RankCorrelation(_Soft):
    """1 - the correlation of soft ranks among the `top` likeliest tokens of either side (RLKD, 2025)."""

    kind: Literal["rank_correlation"]
    top: int = Field(5, ge=2)
    strength: Positive = 1.0  # of the regularisation that makes ranks soft


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


Flow = (
    ForwardKL
    | ReverseKL
    | Jeffreys
    | JSD
    | SkewKL
    | SkewReverseKL
    | TotalVariation
    | AdaptiveKL
    | InterpolatedKL
    | RankCorrelation
)
AtLogits = CrossEntropy | Flow
Inner = HiddenMSE | HiddenCosine | AttentionMSE | RelationKL  # inside the models, not at their logits
Term = Annotated[AtLogits | Inner, Field(discriminator="kind")]


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
