"""A trial on its way: what surrounds it, how it can end, and the state of the phase that is being trained."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainables.config.phase import Phase, Stream
from trainables.config.terms import reads
from trainables.config.trial import TrialSpec
from trainables.data.prepared import Prepared
from trainables.evaluation.per_example import Scored
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore
from trainables.training import forward, on_policy
from trainables.training.phase_graph import PhaseRun, phase_key
from trainables.training.stop_signals import Ask, Notice
from trainables.training.streams import StreamLoader

Record = dict[str, Any]


Autocast = Callable[[], AbstractContextManager[Any]]


class Session(Protocol):
    """What surrounds a trial: one process or several, and someone who listens."""

    rank: int
    world: int

    def report(self, records: list[Record]) -> None:
        """Takes the records of one evaluation, of all ranks alike. May end the trial by raising, on all ranks."""

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank; all ranks must come here. A barrier, too."""

    def total(self, values: list[float]) -> list[float]:
        """Sums over ranks; all ranks must come here."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank; all ranks must come here."""


class SingleProcess:
    """One process."""

    rank, world = 0, 1

    def agree(self, value: Any) -> Any:
        return value

    def total(self, values: list[float]) -> list[float]:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Diverged(Exception):
    """The loss is no number any more. An outcome of the trial, not a fault of the machine."""


class Stopped(BaseException):
    """The scheduler ended this trial, on all ranks; no error, and nothing that handles errors may take it."""


class Suspended(BaseException):
    """The trial was asked to leave, and its checkpoint is written. On all ranks; nothing that handles errors may take it."""

    def __init__(self, asked: Ask) -> None:
        super().__init__(asked)
        self.asked = asked


@dataclass(frozen=True)
class Environment:
    """Where a trial runs: nothing here may change a number beyond float error."""

    storage: Storage  # of all studies: phases/ and data/
    folder: str  # of this attempt below the storage, e.g. smoke/trials/<id>/attempt-1
    earlier: tuple[str, ...] = ()  # folders of earlier attempts
    trial: str = ""
    device: str = "cpu"
    threads: int = 1
    micro_batch: int | None = None  # sequences of one forward; halved when memory runs out
    checkpoint_seconds: float = 20.0
    checkpoint_bytes: int | None = None  # room for the trial's checkpoints
    checkpoint_at_reports: bool = False  # a scheduler may stop the trial there
    notice: Notice = field(default_factory=Notice)
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialContext:
    """A trial on its way: what it is, what it reads, where it writes."""

    spec: TrialSpec  # pruned
    fingerprints: Mapping[str, str]
    data: Mapping[str, Prepared]
    store: PhaseStore
    at: Environment
    session: Session
    emit: Callable[[list[Record]], None]

    def key(self, instance: PhaseRun) -> str:
        return phase_key(self.spec, instance, self.fingerprints)

    @property
    def autocast(self) -> Autocast:
        if self.spec.precision == "fp32":
            return nullcontext
        return lambda: torch.autocast(torch.device(self.at.device).type, dtype=torch.bfloat16)


@dataclass
class Progress:
    """Everything a phase needs to go on, beside models and optimizer; saved whole in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    records: list[Record] = field(default_factory=list)
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # weights kept on the way
    latched: dict[str, bool] = field(default_factory=dict)  # off-switches that have switched off
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)  # of terms whose target moves
    made: dict[str, on_policy.State] = field(default_factory=dict)  # of streams whose replies models make
    flops_of: dict[str, float] = field(default_factory=dict)  # per padded token, by the terms that are live and lengths
    sums: dict[str, float] = field(default_factory=dict)  # of each term since the last record, over all ranks
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class PhaseState:
    """A phase on its way."""

    run: TrialContext
    instance: PhaseRun
    spec: Phase
    seed: int
    streams: Mapping[str, StreamLoader]
    models: forward.Models
    optimizer: torch.optim.Optimizer
    total: int  # optimizer steps
    progress: Progress
    micro: int  # sequences of one forward
    at_once: int  # prompts that a model answers at a time
    further: Mapping[str, StreamLoader] = field(default_factory=dict)  # only there to be scored
    token_flops: dict[str, float] = field(default_factory=dict)  # of a forward, by model: what making replies costs
    local: dict[str, Tensor] = field(default_factory=dict)  # sums of each term on this rank since they were added up
    scored: dict[tuple[str, str], Scored] = field(default_factory=dict)  # on test at the end, by model and stream

    @property
    def nets(self) -> Mapping[str, Any]:
        return self.models.nets


def makers_of(stream: Stream) -> tuple[str, ...]:
    return stream.replies.makers if stream.replies is not None else ()


def reader_of(phase: PhaseState, name: str) -> StreamLoader:
    return phase.streams[name] if name in phase.streams else phase.further[name]


def scored_of(phase: PhaseState) -> list[tuple[str, str]]:
    """Trained models with the streams that they read, and the further data on which they answer."""
    terms = phase.spec.terms.values()
    read = [
        (model, name)
        for model in phase.spec.train
        for name in phase.streams
        if any(term.on == name and model in reads(term) for term in terms)
    ]
    return read + [(model, item) for model in dict.fromkeys(model for model, _ in read) for item in phase.further]


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, or of this machine (PyTorch's allocator for the CPU raises a RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def peak_memory(device: str) -> float:
    """Bytes: of the device, or of this process, since the trial began."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    try:
        with open("/proc/self/status") as file:
            return next(float(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if os.uname().sysname == "Darwin" else 1024.0)
