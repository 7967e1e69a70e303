"""Numbers that change over a phase's budget: the weight of a term, the share of steps that read generated replies.

A schedule is a value. Its state, where it has one, is a dict of numbers that goes into the checkpoint; the empty dict
is the state before the first evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Discriminator, Field, RootModel, Tag

from trainables.config.extension import OrOwn
from trainables.config.value import Fraction, Value

State = Mapping[str, float]
START: State = {}


class _Schedule:
    """How every schedule behaves, unless its class says otherwise."""

    def value_at(self, progress: float, state: State = START) -> float:
        """Returns the value at a fraction of the budget."""
        raise NotImplementedError

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last value; all others lie between the two."""
        return self.value_at(0.0), self.value_at(1.0)

    @property
    def is_off(self) -> bool:
        """Whether the value is 0 over the whole budget."""
        return self.ends == (0, 0)

    @property
    def can_be_zero(self) -> bool:
        """Whether the value is 0 at some step."""
        return 0 in self.ends

    def observe(self, state: State, loss: Callable[[], float], source_loss: Callable[[], float]) -> State:
        """Returns the state after an evaluation. `loss`, `source_loss`: compute the dev losses of the model that learns
        and of the model that teaches."""
        return state


class Constant(_Schedule, RootModel[float]):
    """A number, the same over the whole budget."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    root: float = Field(ge=0)

    def value_at(self, progress: float, state: State = START) -> float:
        return self.root


class _StartToEnd(_Schedule, Value):
    start: float = Field(ge=0)  # value at the start of the phase
    end: float = Field(ge=0)  # value at the end of the phase


class Linear(_StartToEnd):
    """From `start` to `end` in a straight line over the phase's budget."""

    kind: Literal["linear"]

    def value_at(self, progress: float, state: State = START) -> float:
        return self.start + (self.end - self.start) * progress


class Cosine(_StartToEnd):
    """From `start` to `end` along half a cosine over the phase's budget."""

    kind: Literal["cosine"]

    def value_at(self, progress: float, state: State = START) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


class Step(_StartToEnd):
    """`start` before the fraction `at` of the budget, then `end`."""

    kind: Literal["step"]
    at: Fraction  # fraction of the budget

    def value_at(self, progress: float, state: State = START) -> float:
        return self.start if progress < self.at else self.end


class OffWhenBetter(_Schedule, Value):
    """`weight` until the dev loss of `to` is below that of `from` at an evaluation, then zero for good (DWT)."""

    kind: Literal["off_when_better"]
    weight: float = Field(gt=0)

    def value_at(self, progress: float, state: State = START) -> float:
        return 0.0 if state.get("off") else self.weight

    @property
    def ends(self) -> tuple[float, float]:
        return self.weight, 0.0

    def observe(self, state: State, loss: Callable[[], float], source_loss: Callable[[], float]) -> State:
        if state.get("off"):
            return state
        theirs, ours = source_loss(), loss()
        return {"off": float(ours < theirs)}


class RisesWithLoss(_Schedule, Value):
    """`start`, and `step` more each time the dev loss has risen by `tolerance` since the last rise (DistiLLM, Ko et al.
    2024).

    The first evaluation only sets the loss that later ones are compared with.
    """

    kind: Literal["rises_with_loss"]
    start: Fraction = 0.0  # value before the first rise
    step: float = Field(0.1, gt=0, le=1)  # size of a rise
    tolerance: float = Field(0.1, ge=0)  # rise of the loss that raises the value

    def value_at(self, progress: float, state: State = START) -> float:
        return state.get("value", self.start)

    @property
    def ends(self) -> tuple[float, float]:
        return self.start, 1.0

    def observe(self, state: State, loss: Callable[[], float], source_loss: Callable[[], float]) -> State:
        now = loss()
        if "loss" not in state:
            return {"value": self.start, "loss": now}
        if now < state["loss"] + self.tolerance:
            return state
        return {"value": min(state["value"] + self.step, 1.0), "loss": now}


class OwnSchedule(_Schedule, Value):
    """A schedule that a user's own file brings: `value_at`, from 0 on, between its two `ends`."""

    kind: str


_by_type = Discriminator(
    lambda value: "number" if isinstance(value, int | float | str | None | Constant) else "schedule"
)
Schedule = Annotated[Linear | Cosine | Step | OffWhenBetter, Field(discriminator="kind"), OrOwn(OwnSchedule)]
Weight = Annotated[Annotated[Constant, Tag("number")] | Annotated[Schedule, Tag("schedule")], _by_type]
Share = Annotated[
    Annotated[Constant, Tag("number")]
    | Annotated[Annotated[Linear | Cosine | Step | RisesWithLoss, Field(discriminator="kind")], Tag("schedule")],
    _by_type,
]
