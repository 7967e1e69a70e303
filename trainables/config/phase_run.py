"""The names of runs of phases, and of the points of a run from which another phase starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class PhaseRun:
    """A run of a phase: the phase, or one branch of a phase that fans out over data sets."""

    phase: str
    item: str | None = None

    def __str__(self) -> str:
        return self.phase if self.item is None else f"{self.phase}[{self.item}]"

    @classmethod
    def parse(cls, text: str) -> PhaseRun:
        """Reads `phase` or `phase[data]`."""
        phase, _, item = text.partition("[")
        return cls(phase, item.removesuffix("]") or None)


class Start(NamedTuple):
    """The weights of a model at a fraction of a run's budget."""

    run: PhaseRun
    fraction: float = 1.0

    def __str__(self) -> str:
        return str(self.run) if self.fraction == 1.0 else f"{self.run}@{self.fraction:g}"

    @classmethod
    def parse(cls, text: str) -> Start:
        """Reads `phase`, `phase@0.5`, `phase[data]` or `phase[data]@0.5`. Raises ValueError where the fraction is no number."""
        run, _, fraction = text.partition("@")
        try:
            return cls(PhaseRun.parse(run), float(fraction) if fraction else 1.0)
        except ValueError:
            raise ValueError(f"{text!r} is not the start of a phase; expected phase, phase@0.5, phase[data]") from None
