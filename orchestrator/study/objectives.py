"""What a search optimises and within which bounds, the costs that can be optimised, and when an arm is good enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import model_validator

from orchestrator.study.claims import AXIS_WORDS, CostAxis, Task
from trainables.config.value import Name, Positive, Value

ModelCost = Literal["parameters", "forward_flops", "latency_ms"]  # of the trained model, measured at the end of a phase
Cost = Literal[CostAxis, ModelCost]
TRAINING_COSTS: tuple[CostAxis, ...] = get_args(CostAxis)  # of the phase and of those before it, at their recorded cost
MODEL_COSTS: tuple[ModelCost, ...] = get_args(ModelCost)
COST_WORDS: Mapping[str, str] = {
    **{str(axis): words for axis, words in AXIS_WORDS.items()},
    "device_seconds": "seconds of device time",
    "parameters": "parameters",
    "forward_flops": "FLOPs of a forward pass",
    "latency_ms": "ms per sequence",
}
TIMES = ("device_seconds", "latency_ms")  # which other trials on the device make longer


class Measured(Value):
    """A number that is known of each trial that ended: a metric on dev, or a cost."""

    phase: Name  # at whose end the number is taken
    model: Name  # the model that is measured
    metric: str  # e.g. mlm_loss, score, rougeL; in later objectives and constraints also a cost
    task: Task | None = None  # data sets over which the metric is a mean

    @property
    def is_cost(self) -> bool:
        return self.metric in COST_WORDS

    @property
    def spent(self) -> CostAxis | None:
        """The cost of training that this is, if it is one."""
        return next((axis for axis in TRAINING_COSTS if axis == self.metric), None)

    def words(self) -> str:
        return COST_WORDS.get(self.metric, f"{self.metric} on dev")


class Objective(Measured):
    """The score of a search: on dev, at the end of `phase`; with `minus`, the paired difference to that arm."""

    mode: Literal["min", "max"]  # whether less or more is better
    minus: Name | None = None

    @property
    def sign(self) -> float:
        """By which a score is multiplied so that lower is better."""
        return 1.0 if self.mode == "min" else -1.0

    @model_validator(mode="after")
    def _costs_are_minimised(self) -> Self:
        if self.is_cost and self.mode == "max":
            raise ValueError(f"{self.metric} is a cost; expected mode: min")
        return self

    def words(self) -> str:
        return super().words() + (f", minus paired {self.minus}" if self.minus else "")


class Constraint(Measured):
    """A bound on what a searched point may measure: points within it come first, and only they can win."""

    at_most: float | None = None  # the largest number within the bound
    at_least: float | None = None  # the smallest number within the bound

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("expected one of at_most and at_least")
        return self

    def excess(self, value: float) -> float:
        """Returns by how much a value is beyond the bound; at most 0 within it, as Optuna counts."""
        return value - self.at_most if self.at_most is not None else (self.at_least or 0.0) - value

    def words(self) -> str:
        sign, bound = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        return f"{super().words()} {sign} {bound:g}"


class GoodEnough(Value):
    """Asks for the cheapest arm that is no worse than the best arm by `within`, in the first objective's metric on test."""

    within: Positive  # how much worse than the best arm is good enough
    cost: Cost = "flops"  # by which the cheapest arm is found
