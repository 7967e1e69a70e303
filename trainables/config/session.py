"""What surrounds a trial: one process or several, and a listener that takes its records."""

from __future__ import annotations

from typing import Any, Protocol

Record = dict[str, Any]  # one measured value with its phase, step, model, task, split and metric


class Ranks(Protocol):
    """The processes that share a trial. Each method must be called by all of them."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...

    def agree(self, value: Any) -> Any:
        """Returns the value of rank 0 on every rank. A barrier, too."""

    def total(self, values: list[float]) -> list[float]:
        """Returns the sums over the ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in the order of the ranks."""


class Session(Ranks, Protocol):
    """The processes that share a trial, and the listener to its records."""

    def report(self, records: list[Record]) -> None:
        """Takes the records of one evaluation, the same on all ranks. May end the trial by raising, on all ranks."""


class SingleProcess:
    """A trial in one process."""

    rank, world = 0, 1

    def agree(self, value: Any) -> Any:
        return value

    def total(self, values: list[float]) -> list[float]:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]
