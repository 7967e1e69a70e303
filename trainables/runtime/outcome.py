"""What became of an attempt at a trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from trainables.training.stop_signals import StopReason


class Status(StrEnum):
    """The state of a trial as tables and files have it; SUSPENDED stands in neither, since the trial runs again."""

    RUNNING = "running"
    ENDED = "ended"
    STOPPED = "stopped"
    FAILED = "failed"
    SUSPENDED = "left"


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt; travels as JSON between processes."""

    status: Status
    reason: str | None = None  # a StopReason, or what failed
    attempts: int = 1
    faults: int | None = None  # earlier attempts that were lost with their process or machine
    node: str | None = None
    phases: Mapping[str, Any] = field(default_factory=dict)  # phase run -> key, reused, costs
    peak_memory: float = 0.0  # bytes
    last_lines: list[str] | None = None  # of the log of a failed trial
    detail: str | None = None  # what the storage answered, where the reason is STORAGE

    @property
    def is_suspended(self) -> bool:
        """Whether the trial has no outcome yet, and resumes later."""
        return self.status == Status.SUSPENDED

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        value = json.loads(text)
        return cls(**{**value, "status": Status(value["status"])})


STOPPED_EARLY = Outcome(Status.STOPPED, StopReason.EARLY)


def lost(reason: str, faults: int) -> Outcome:
    """Builds the outcome of a trial whose processes are gone for good."""
    return Outcome(Status.FAILED, reason, attempts=faults, faults=faults)
