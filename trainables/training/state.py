"""The state of a running trial: its environment, how it can end, and the phase that is being trained."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainables.config.phase import Phase
from trainables.config.phase_run import PhaseRun
from trainables.config.schedules import State
from trainables.config.session import Record, Session
from trainables.config.trial import TrialSpec
from trainables.data.prepared import Prepared
from trainables.evaluation.per_example import Scored
from trainables.generation.context import Autocast
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore
from trainables.training.forward import Models
from trainables.training.phase_graph import phase_key
from trainables.training.stop_signals import Notice, StopReason
from trainables.training.streams import StreamLoader

LearningStates = dict[str, dict[str, Tensor]]  # by learning module


class Diverged(Exception):
    """The loss is not finite. An outcome of the trial, not a fault of the machine."""


class Stopped(BaseException):
    """The scheduler ended this trial, on all ranks; not an error, so no handler of errors may catch it."""


class Suspended(BaseException):
    """The trial was asked to leave, and its checkpoint is written. On all ranks; no handler of errors may catch it."""

    def __init__(self, asked: StopReason) -> None:
        super().__init__(asked)
        self.asked = asked


@dataclass(frozen=True)
class Environment:
    """Where a trial runs; no field may change a number beyond float error."""

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
    """A running trial: its spec, its data, its store."""

    spec: TrialSpec  # pruned
    fingerprints: Mapping[str, str]
    data: Mapping[str, Prepared]  # by `TrialSpec.readings`
    store: PhaseStore
    environment: Environment
    session: Session
    emit: Callable[[list[Record]], None]

    def key(self, instance: PhaseRun) -> str:
        return phase_key(self.spec, instance, self.fingerprints)

    def read_by(self, model: str, item: str | None = None) -> Prepared:
        """Returns a data set, by default the first one, as a model reads it."""
        return self.data[self.spec.reading(item or next(iter(self.spec.data)), model)]

    @property
    def device(self) -> str:
        return self.environment.device

    @property
    def autocast(self) -> Autocast:
        if self.spec.precision == "fp32":
            return nullcontext
        return lambda: torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)


@dataclass
class Progress:
    """The state of a phase, beside models and optimizer; saved as a whole in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    records: list[Record] = field(default_factory=list)
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # weights saved at fractions of the budget
    weights: dict[str, State] = field(default_factory=dict)  # of the schedules of terms' weights, by term
    terms: dict[str, State] = field(default_factory=dict)  # of terms that have one
    replies: dict[str, dict[str, Any]] = field(default_factory=dict)  # of generated replies, by stream
    flops_of: dict[str, float] = field(default_factory=dict)  # per padded token, by active terms and lengths
    sums: dict[str, float] = field(default_factory=dict)  # of each term since the last record, over all ranks
    counts: dict[str, int] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # of the evaluations on dev, for early stopping


@dataclass
class PhaseState:
    """A running phase."""

    context: TrialContext
    instance: PhaseRun
    spec: Phase
    seed: int
    streams: Mapping[str, StreamLoader]
    models: Models
    optimizer: torch.optim.Optimizer
    total: int  # optimizer steps
    progress: Progress
    micro: int  # sequences of one forward
    prompts_at_once: int  # that a model answers at a time
    eval_only: Mapping[str, StreamLoader] = field(default_factory=dict)
    token_flops: dict[str, float] = field(default_factory=dict)  # of a forward, by model that generates replies
    local: dict[str, Tensor] = field(default_factory=dict)  # sums of each term on this rank since the last total
    scored: dict[tuple[str, str], Scored] = field(default_factory=dict)  # on test at the end, by model and stream
    best_weights: LearningStates = field(default_factory=dict)  # for early stopping

    @property
    def nets(self) -> Mapping[str, Any]:
        return self.models.nets

    def loader(self, name: str) -> StreamLoader:
        return self.streams[name] if name in self.streams else self.eval_only[name]

    @property
    def evaluated(self) -> list[tuple[str, str]]:
        """Trained models with the streams that they read, one for each data set, and with the data sets that they are only
        evaluated on."""
        terms = self.spec.terms.values()
        first: dict[tuple[str, str], str] = {}
        for model in self.spec.train:
            for name, stream in self.streams.items():
                if any(term.on == name and model in term.reads for term in terms):
                    first.setdefault((model, stream.spec.data), name)
        read = [(model, name) for (model, _), name in first.items()]
        return read + [(model, item) for model in dict.fromkeys(model for model, _ in read) for item in self.eval_only]


def peak_memory(device: str) -> float:
    """Reads the peak bytes of the device, or of this process, since the trial began."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    try:
        with open("/proc/self/status") as file:
            return next(float(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if os.uname().sysname == "Darwin" else 1024.0)
