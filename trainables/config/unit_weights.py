"""Weights of a term at the logits, one for each supervised position (of a task: each example), beside the term's own weight.

A rule is a value that knows whose logits it reads. Its weights are a pure function of logits and labels, without a
gradient, in `trainables.losses.unit_weights`. The term's sum is divided by the number of positions, not by the sum of
weights, so that a weight of 1 everywhere changes nothing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from trainables.config.value import Name, Positive, Value


class _Rule(Value):
    """How every rule behaves, unless its class says otherwise."""

    reads_labels: ClassVar[bool] = True

    kind: str

    @property
    def models(self) -> tuple[str, ...]:
        """The models whose logits decide, beside those of the term."""
        return ()

    @property
    def formula(self) -> str:
        """The weight as the plan prints it."""
        raise NotImplementedError

    def fault(self, kind: str, source: str | None, temperature: float) -> str | None:
        """Returns why a term with this kind, source and temperature cannot have the rule; None where it can."""
        return None


class Revision(_Rule):
    """The parts of a teacher's target that is revised by the label (Label Revision, arXiv 2404.03693): b T + (1 - b) y.

    Where `by` errs, b = eta / (p_max - p_label + 1), so that the label is the likeliest class of the revised target for
    each eta up to 1; where `by` is right, b = 1. `forward_kl` has the weight b and `cross_entropy` 1 - b: at temperature
    1 the gradients of the two together are that of KL from the revised target. The formula is known second-hand; the
    paper's eta and what it does where the teacher is right are not known.
    """

    kind: Literal["revision"]
    by: Name  # the model whose errors are revised: `from` of a flow
    eta: float = Field(0.8, gt=0, le=1)  # share of an erring teacher's target, at most

    @property
    def models(self) -> tuple[str, ...]:
        return (self.by,)

    @property
    def formula(self) -> str:
        return f"{self.by}'s share of the revised target ({self.eta:g} / (p_max - p_label + 1) where it errs, else 1)"

    def fault(self, kind: str, source: str | None, temperature: float) -> str | None:
        if source is not None and (kind != "forward_kl" or temperature != 1):
            return "revision mixes labels into the target of forward_kl at temperature 1"
        return f"revision is by {self.by!r}, expected {source!r}" if source not in (None, self.by) else None


class ByLoss(_Rule):
    """The share of `from` among several teachers, softmax over teachers of -cross-entropy with the label / temperature
    (Adaptive Knowledge Distillation, arXiv 2010.05445).

    There by the perplexity of a mini-batch (known second-hand), here by the loss at each position, which has no scale to
    overflow and does not depend on how a batch is cut.
    """

    kind: Literal["by_loss"]
    among: tuple[Name, ...] = Field(min_length=2)  # the teachers whose weights add up to 1
    temperature: Positive = 1.0  # of the softmax over teachers

    @property
    def models(self) -> tuple[str, ...]:
        return self.among

    @property
    def formula(self) -> str:
        return f"the softmax of -cross-entropy / {self.temperature:g} among {', '.join(self.among)}"

    def fault(self, kind: str, source: str | None, temperature: float) -> str | None:
        return (
            None
            if source in self.among
            else f"by_loss is for a flow from one of several teachers; {source!r} is not among them"
        )


class Overlap(_Rule):
    """The fraction of the `top` likeliest tokens that both sides share (the dynamic variant of RLKD, arXiv 2409.12545)."""

    reads_labels: ClassVar[bool] = False

    kind: Literal["overlap"]
    top: int = Field(5, ge=1)  # tokens of each side that are compared

    @property
    def formula(self) -> str:
        return f"the fraction of the top {self.top} tokens that both share"


UnitWeights = Annotated[Revision | ByLoss | Overlap, Field(discriminator="kind")]
