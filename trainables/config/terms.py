"""Terms: named, weighted losses of one model, or flows from one model to another.

A term is a value that knows which models it reads, which one it teaches, what its loss is computed from and averaged
over, and its own state. Its loss is a pure function of tensors in `trainables.losses.terms`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from trainables.config.extension import OrOwn
from trainables.config.layer_maps import LayerMap, Pairs, layer_pairs
from trainables.config.schedules import Constant, OffWhenBetter, State, Weight
from trainables.config.unit_weights import Revision, UnitWeights
from trainables.config.value import Fraction, Name, Positive, Value


class _Term(Value):
    """How every term behaves, unless its class says otherwise."""

    inputs: ClassVar[Literal["logits", "hidden_states", "attention_scores", "relations"]] = "logits"
    has_state: ClassVar[bool] = False  # whether `next_state` is to be called after each step

    kind: str
    on: Name = "main"  # the stream
    weight: Weight = Constant(1.0)  # a number, or a schedule over the budget; 0: the term is off

    @property
    def source(self) -> str | None:
        """The model whose outputs are the target, or None for a hard loss."""
        return None

    @property
    def target(self) -> str:
        """The one model that the gradient reaches."""
        raise NotImplementedError

    @property
    def reads(self) -> tuple[str, ...]:
        """The models whose outputs the term needs."""
        models = (self.target,) if self.source is None else (self.source, self.target)
        return tuple(dict.fromkeys((*models, *(() if self.rule is None else self.rule.models))))

    @property
    def rule(self) -> UnitWeights | None:
        """How the positions are weighted; None: alike."""
        return None

    @property
    def averaged_over(self) -> Literal["labels", "tokens", "rows"]:
        """What the sum that the loss gives is divided by."""
        return "labels" if self.inputs == "logits" else "tokens"

    @property
    def has_projector(self) -> bool:
        """Whether a learnt matrix takes the states of `to` to the width of `from`."""
        return False

    @property
    def formula(self) -> str:
        """The loss as the plan prints it, behind its weight."""
        raise NotImplementedError

    def layer_pairs(self, num_from: int, num_to: int) -> Pairs:
        """Pairs the layers that are compared, as (from, to). Raises ValueError where no layers correspond."""
        return ()

    def at_state(self, state: State) -> Self:
        """Returns the term as it is at a step."""
        return self

    def next_state(self, state: State, loss: float, progress: float) -> State:
        """Computes the state after a step from the mean loss of its global batch and the progress before it; at first
        empty."""
        return state


class CrossEntropy(_Term):
    """The hard loss of one model: cross-entropy with the stream's labels, mean over supervised positions.

    Where the labels are numbers (regression): squared error, the cross-entropy of a Gaussian up to constants.
    """

    kind: Literal["cross_entropy"]
    of: Name  # the model that learns
    # of each position; by default 1; absent from a dump where not used, so that stored phases keep their keys
    unit_weights: Revision | None = Field(None, exclude_if=lambda value: value is None)

    @property
    def target(self) -> str:
        return self.of

    @property
    def rule(self) -> UnitWeights | None:
        return self.unit_weights

    @property
    def formula(self) -> str:
        return f"cross-entropy of {self.of}{_weighted(self.rule, '1 - ')}"

    @model_validator(mode="after")
    def _only_a_flow_can_switch_off_when_better(self) -> CrossEntropy:
        if isinstance(self.weight, OffWhenBetter):
            raise ValueError("off_when_better compares `to` with `from`: it is for flows, not for a hard loss")
        return self


class _Flow(_Term):
    """A loss whose gradient reaches only `to`; the outputs of `from` are detached."""

    from_: Name = Field(alias="from", validation_alias=AliasChoices("from", "from_"))  # the model that teaches
    to: Name  # the model that learns

    @property
    def source(self) -> str:
        return self.from_

    @property
    def target(self) -> str:
        return self.to

    @property
    def formula(self) -> str:
        values = self.model_dump(mode="json", exclude={*_Flow.model_fields, "kind"}).items()
        about = ", ".join(f"{name} {value}" for name, value in values if value)
        return f"{self.kind}({self.from_} → {self.to}; {about}), gradient into {self.to} only"

    @model_validator(mode="after")
    def _a_flow_joins_two_models(self) -> Self:
        if self.from_ == self.to and not self.joins_layers:
            raise ValueError(f"flows from {self.from_!r} to itself; expected hidden_mse with pairs of different layers")
        if self.from_ == self.to and isinstance(self.weight, OffWhenBetter):
            raise ValueError("off_when_better compares two models; here `from` is `to`")
        return self

    @property
    def joins_layers(self) -> bool:
        """Whether the flow has a meaning inside one model, from some layers to others."""
        return False


class _Soft(_Flow):
    """At the logits of supervised positions. Where these are numbers (regression): squared difference."""

    temperature: Positive = 1.0  # of both sides
    tau_squared: bool  # no default: papers disagree, so every study states it
    # of each position; by default 1; absent from a dump where not used, so that stored phases keep their keys
    unit_weights: UnitWeights | None = Field(None, exclude_if=lambda value: value is None)

    @property
    def rule(self) -> UnitWeights | None:
        return self.unit_weights

    @model_validator(mode="after")
    def _the_weights_are_for_such_a_term(self) -> Self:
        fault = self.unit_weights and self.unit_weights.fault(self.kind, self.source, self.temperature)
        if fault:
            raise ValueError(f"unit_weights: {fault}")
        return self

    @property
    def formula(self) -> str:
        factor = f"τ²={self.temperature**2:g} x " if self.tau_squared else ""
        flow = f"{self.kind}({self.from_} → {self.to}) at τ={self.temperature:g}"
        return f"{factor}{flow}{_weighted(self.rule)}, gradient into {self.to} only"


def _weighted(rule: UnitWeights | None, before: str = "") -> str:
    return "" if rule is None else f", each position weighted by {before}{rule.formula}"


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
    beta: float = Field(0.5, gt=0, lt=1)  # share of `from` in the mixture m


class SkewKL(_Soft):
    """KL(from || alpha from + (1 - alpha) to) (DistiLLM, Ko et al. 2024)."""

    kind: Literal["skew_kl"]
    alpha: float = Field(0.1, gt=0, lt=1)  # share of `from` in the mixture


class SkewReverseKL(_Soft):
    """KL(to || (1 - alpha) from + alpha to), the gradient through both of its sides (DistiLLM, Ko et al. 2024)."""

    kind: Literal["skew_reverse_kl"]
    alpha: float = Field(0.1, gt=0, lt=1)  # share of `to` in the mixture


class TotalVariation(_Soft):
    """Half the sum of absolute differences (f-distill, Wen et al. 2023)."""

    kind: Literal["total_variation"]


class AdaptiveKL(_Soft):
    """KL(from || to) and KL(to || from), each position's share by where the sides differ more: in the head of `from`,
    its likeliest tokens up to the mass `head`, or in the tail (AKL, Wu et al. 2024)."""

    kind: Literal["adaptive_kl"]
    head: float = Field(0.5, gt=0, lt=1)  # probability mass of the head


class InterpolatedKL(_Soft):
    """KL(p_t || to), where the logits of p_t are t of `from` and 1 - t of `to`, detached (TAID, Shing et al. 2025).

    t rises from `start` to `end` over the budget, and faster while the loss falls: by alpha sigmoid(m) (1 - t) a step,
    m the relative fall of the loss, averaged with momentum `beta`; t is never below the straight line from `start` to
    `end`. As in the authors' code the first step only sets the loss that the second is compared with. There the loss is
    a cross-entropy with the target, here the true divergence: its relative falls are larger.
    """

    has_state: ClassVar[bool] = True

    kind: Literal["interpolated_kl"]
    start: Fraction = 0.4  # t at the start of the phase
    end: Fraction = 1.0  # t at the end of the phase
    alpha: float = Field(5e-4, ge=0)  # the largest rise of t in a step
    beta: float = Field(0.99, ge=0, lt=1)

    @model_validator(mode="after")
    def _t_rises(self) -> InterpolatedKL:
        if self.end < self.start:
            raise ValueError(f"t rises: end {self.end:g} is below start {self.start:g}")
        return self

    def at_state(self, state: State) -> InterpolatedKL:
        """Returns the term whose `start` is the t of the step."""
        return self.model_copy(update={"start": state["t"]}) if state else self

    def next_state(self, state: State, loss: float, progress: float) -> State:
        if not state:
            return {"t": self.start, "momentum": 0.0, "loss": loss}
        fall = (state["loss"] - loss) / (state["loss"] + 1e-15)
        momentum = self.beta * state["momentum"] + (1 - self.beta) * fall
        sigmoid = (1 + math.tanh(momentum / 2)) / 2  # does not overflow
        risen = state["t"] + self.alpha * sigmoid * (1 - state["t"])
        line = self.start + (self.end - self.start) * progress
        return {"t": min(self.end, max(line, risen)), "momentum": momentum, "loss": loss}


class RankCorrelation(_Soft):
    """1 - the correlation of soft ranks among the `top` likeliest tokens of either side (RLKD, 2025)."""

    kind: Literal["rank_correlation"]
    top: int = Field(5, ge=2)
    strength: Positive = 1.0  # of the regularisation that makes ranks soft


class _Hidden(_Flow):
    inputs: ClassVar = "hidden_states"

    projector: bool = False  # a learnt matrix takes the states of `to` to the width of `from`

    @property
    def has_projector(self) -> bool:
        return self.projector


class HiddenMSE(_Hidden):
    """Mean squared error between outputs of layers, paired by `layers` (see `layer_maps.layer_pairs`).

    `first`: only each sequence's first position; `normalise`: vectors of length one; `projector`: a learnt matrix takes
    the outputs of `to` to the width of `from`. Patient KD (Sun et al. 2019) is `even`, `first`, normalised; TinyBERT's
    (Jiao et al. 2020) `uniform` with a projector. `from` may be `to` where pairs of different layers are given: then a
    model's deep layers, detached, teach its own shallow ones (Self-Feature Regularization, arXiv 2103.07350, without its
    label smoothing; its authors have withdrawn its figures).
    """

    kind: Literal["hidden_mse"]
    layers: LayerMap = "even"  # even, last, uniform, top, or pairs [from, to]; 0: the embeddings
    positions: Literal["first", "all"] = "all"  # of each sequence
    normalise: bool = False

    @property
    def averaged_over(self) -> Literal["tokens", "rows"]:
        return "rows" if self.positions == "first" else "tokens"

    @property
    def joins_layers(self) -> bool:
        return not isinstance(self.layers, str) and all(source != to for source, to in self.layers)

    def layer_pairs(self, num_from: int, num_to: int) -> Pairs:
        """Pairs the layers; Patient KD's maps leave out the last one: a `to` of one layer has no pairs and the loss 0, as published."""
        pairs = layer_pairs(self.layers, num_from, num_to)
        return pairs if self.layers in ("even", "last") and num_to == 1 else _not_empty(pairs)


class HiddenCosine(_Hidden):
    """1 - cosine between the last hidden states at every token (DistilBERT, Sanh et al. 2019)."""

    kind: Literal["hidden_cosine"]

    def layer_pairs(self, num_from: int, num_to: int) -> Pairs:
        return ((num_from, num_to),)


class AttentionMSE(_Flow):
    """Mean squared error between attention scores before the softmax (TinyBERT); both need the same number of heads."""

    inputs: ClassVar = "attention_scores"

    kind: Literal["attention_mse"]
    layers: LayerMap = "uniform"  # as those of `hidden_mse`

    def layer_pairs(self, num_from: int, num_to: int) -> Pairs:
        pairs = layer_pairs(self.layers, num_from, num_to)
        return _not_empty(tuple(pair for pair in pairs if 0 not in pair))  # the embeddings attend to nothing


class RelationKL(_Flow):
    """KL between relations of queries, of keys and of values, in `heads` relation heads of one layer each (MiniLMv2,
    Wang et al. 2021). Layers are counted from 1; by default the last ones. Widths may differ."""

    inputs: ClassVar = "relations"

    kind: Literal["relation_kl"]
    heads: int = Field(ge=1)  # relation heads, into which queries, keys and values are split
    from_layer: int | None = Field(None, ge=1)  # by default the last
    to_layer: int | None = Field(None, ge=1)  # by default the last

    def layer_pairs(self, num_from: int, num_to: int) -> Pairs:
        return layer_pairs(((self.from_layer or num_from, self.to_layer or num_to),), num_from, num_to)


class OwnTerm(_Flow):
    """A flow that a user's own file brings with its function (see `trainables.config.own`)."""

    def total(self, source: Any, to: Any, labels_or_mask: Any) -> Any:
        """Computes the loss from what `term_loss` is given."""
        raise NotImplementedError


def _not_empty(pairs: Pairs) -> Pairs:
    if not pairs:
        raise ValueError("no layers correspond; expected another map, or explicit pairs")
    return pairs


Term = Annotated[
    CrossEntropy
    | ForwardKL
    | ReverseKL
    | Jeffreys
    | JSD
    | SkewKL
    | SkewReverseKL
    | TotalVariation
    | AdaptiveKL
    | InterpolatedKL
    | RankCorrelation
    | HiddenMSE
    | HiddenCosine
    | AttentionMSE
    | RelationKL,
    Field(discriminator="kind"),
    OrOwn(OwnTerm),
]
