"""Whether the largest phase of a study fits a slot, what the slots' checkpoints take, and settings that need less memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from orchestrator.cluster.machine import machine_memory, num_cores
from orchestrator.planning.memory import PhaseMemory
from orchestrator.planning.meta_models import Shapes
from orchestrator.planning.reachable import ReachableTrial, reached_at
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Slot, Study
from trainables.config.errors import ModelError
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec
from trainables.storage.files import bytes_text
from trainables.training.phase_graph import phase_runs

DRIVER = 1.5e9  # bytes of the driver and of Ray's own processes, where CPU slots share this machine (measured)


@dataclass(frozen=True)
class MemoryEstimate:
    """The most that a worker holds in a phase, bytes by part, with micro-batches of `rows` of its `share` sequences."""

    trial: ReachableTrial
    run: PhaseRun
    moment: str  # "" in a training step
    parts: Mapping[str, float]
    rows: int
    share: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def where(self) -> str:
        return f"phase {self.run} of {self.trial.name}{self.moment}"

    def __str__(self) -> str:
        return ", ".join(f"{part} {bytes_text(size)}" for part, size in self.parts.items() if size)


def memory_lines(study: Study, shapes: Shapes, trials: Sequence[ReachableTrial], largest: MemoryEstimate) -> list[str]:
    """Returns what the plan says of memory and checkpoints. Raises StudyError where the largest phase does not fit a
    slot, though it be the only one."""
    available = slot_memory(study.slot)
    if available is not None and largest.total > available:
        here = "" if study.slot.memory_gb is not None else " on this machine (slot.memory_gb states another one's)"
        raise StudyError(
            f"{study.file}: {largest.where} needs {bytes_text(largest.total)} ({largest}), and a slot has "
            f"{bytes_text(available)} for a worker{here}; {advice(study.slot, shapes, largest)}"
        )
    micro = f" in micro-batches of {largest.rows} of {largest.share} sequences" if largest.rows < largest.share else ""
    of = f" of {bytes_text(available)}" if available is not None else ""
    lines = [f"up to {bytes_text(largest.total)}{of} in {largest.where}{micro}: {largest}"]
    if available is None:
        least = largest_phase(study, shapes, trials, rows=1)
        lines += [
            f"{bytes_text(least.total)} with one sequence at a time, in {least.where}; a slot's memory is unknown here: "
            "slot.memory_gb: N lets the plan check it",
            advice(study.slot, shapes, largest),
        ]
    num, most = num_slots(study.slot, largest.total), num_slots(study.slot)
    if num < most:
        have = f"{bytes_text(num * study.slot.workers * largest.total)} of {bytes_text(_room())}"
        lines.append(f"{num} of {most} slots at once, since the memory of this machine holds no more: {have}")
    return [*lines, _checkpoint_line(study, shapes, trials, num)]


def num_slots(slot: Slot, needed: float | None = None) -> int:
    """Returns how many trials run at once on this machine, by its cores, and by its memory where each worker needs
    `needed` bytes of it."""
    num = max(1, int(num_cores() / slot.cpus + 1e-6) // slot.workers)
    if needed is None or slot.gpus or slot.memory_gb is not None:
        return num
    return max(1, min(num, int(_room() / (needed * slot.workers) + 1e-6)))


def _room() -> float:
    """Bytes of this machine that trials may take."""
    return max(0.0, machine_memory() - DRIVER)


def slot_memory(slot: Slot) -> float | None:
    """Bytes for one worker of the only slot: as stated, or as this machine has; None where trials ask for a device that is not
    here."""
    if slot.memory_gb is not None:
        return slot.memory_gb * 1e9
    if slot.gpus:
        if not torch.cuda.is_available():
            return None
        return float(torch.cuda.get_device_properties(0).total_memory) * slot.gpus
    return _room() / slot.workers


# ----------------------------------------------------------------------------------------------------- largest of a study


def largest_phase(
    study: Study, shapes: Shapes, trials: Iterable[ReachableTrial], *, rows: int | None = None
) -> MemoryEstimate:
    """Returns the phase that needs most, of the trials that a study can reach. Where several factors of a search change
    the memory, the trial at the worst ends of all of them counts, too. `rows`: as in `estimate_memory`."""

    def estimate(trial: ReachableTrial) -> MemoryEstimate:
        runs = phase_runs(trial.spec)
        return max((estimate_memory(trial, run, study.slot, shapes, rows=rows) for run in runs), key=_total)

    estimates = [estimate(trial) for trial in trials]
    by_sizes: dict[str, dict[str, list[MemoryEstimate]]] = {}
    for found in estimates:
        if found.trial.end is not None:
            sizes, factor = found.trial.end
            by_sizes.setdefault(sizes, {}).setdefault(factor, []).append(found)
    for ends in by_sizes.values():
        worst = [max(found, key=_total) for found in ends.values() if len({end.total for end in found}) > 1]
        point = {factor: value for end in sorted(worst, key=_total) for factor, value in end.trial.point.items()}
        if len(worst) > 1 and (together := reached_at(study, point)) is not None:
            estimates.append(estimate(together))
    return max(estimates, key=_total)


def _total(estimate: MemoryEstimate) -> float:
    return estimate.total


def estimate_memory(
    trial: ReachableTrial, run: PhaseRun, slot: Slot, shapes: Shapes, *, rows: int | None = None
) -> MemoryEstimate:
    """Returns what a worker needs in a phase, at the moment that needs most.

    `rows`: of a micro-batch; by default the worker's share, which the training loop halves on a GPU until it fits.
    """
    memory = PhaseMemory(trial.spec, run, shapes, "cuda" if slot.gpus else "cpu", slot.workers)
    num = memory.share if rows is None else min(rows, memory.share)
    available = slot_memory(slot) if slot.gpus and rows is None else None
    while available is not None and num > 1 and sum(memory.step(num).values()) > available:
        num //= 2
    moment, parts = max(memory.moments(num).items(), key=lambda item: sum(item[1].values()))
    return MemoryEstimate(trial, run, moment, parts, num, memory.share)


def _checkpoint_line(study: Study, shapes: Shapes, trials: Sequence[ReachableTrial], num: int) -> str:
    """Describes weights and optimizer of all that a phase trains, and whether the room that the study gives them suffices."""
    slot, room = study.slot, study.limits.checkpoint_gb
    phases = [(trial.spec, name) for trial in trials for name in trial.spec.phases]
    size, name = max((PhaseMemory(spec, PhaseRun(name), shapes).trained().checkpoint, name) for spec, name in phases)
    num = 1 if slot.gpus else num
    keepers = "each slot keeps" if slot.gpus else f"{num} slots keep"
    line = (
        f"a checkpoint in phase {name} is {bytes_text(size)}; {keepers} up to {bytes_text(2 * num * size)}, "
        "two each while one replaces another"
    )
    early = bool(study.search and study.search.stop_early)  # then half of the room is for points that were stopped
    if room is not None and 2 * num * size * (1 + early) > room * 1e9:
        line += f"; limits.checkpoint_gb {room:g} is too little: what exceeds the limit is not written"
    return line


# ---------------------------------------------------------------------------------------------------------------- advice


def advice(slot: Slot, shapes: Shapes, largest: MemoryEstimate) -> str:
    """Returns what each single change would save in the largest phase, and whether the phase then fits."""
    rows = 1 if slot.gpus else None
    before = estimate_memory(largest.trial, largest.run, slot, shapes, rows=rows).total
    found = []
    for label, spec, changed_slot in _changes(slot, largest):
        try:
            trial = ReachableTrial(spec, largest.trial.name, {})
            after = estimate_memory(trial, largest.run, changed_slot, shapes, rows=rows).total
        except ModelError:  # this family cannot be trained so
            continue
        room = slot_memory(changed_slot)
        fits = " (fits)" if room is not None and after <= room else ""
        if before - after > 0.01 * before:
            found.append(f"{label} saves {bytes_text(before - after)}{fits}")
        elif fits:
            found.append(f"{label} gives a worker {bytes_text(room or 0)}{fits}")
    return "to need less: " + (", ".join(found) or "smaller models; no single setting saves 1 %")


def _changes(slot: Slot, largest: MemoryEstimate) -> Iterator[tuple[str, TrialSpec, Slot]]:
    """Yields (label, trial, slot): single settings that need less memory, those that leave results alone first."""
    spec, name = largest.trial.spec, largest.run.phase
    phase, at = spec.phases[name], f"phases.{name}"
    if slot.memory_gb is None and 0 < slot.gpus < 1:
        more = min(1.0, 2 * slot.gpus)
        yield f"slot.gpus: {more:g}", spec, slot.model_copy(update={"gpus": more})
    if all(other.batch % (2 * slot.workers) == 0 for other in spec.phases.values()):
        yield f"slot.workers: {2 * slot.workers}", spec, slot.model_copy(update={"workers": 2 * slot.workers})
    settings: list[tuple[str, Any]] = [(f"{at}.gradient_checkpointing", True), ("precision", "bf16")]
    frozen = [model for model in spec.models_of(name) if model not in phase.train]
    settings += [
        (f"models.{model}.{key}", value) for model in frozen for key, value in (("dtype", "bf16"), ("quantize", "nf4"))
    ]
    adamw = [model for model, optimizer in phase.optimizer.items() if optimizer.kind == "adamw"]
    settings += [(f"{at}.optimizer.{model}.kind", kind) for kind in ("adamw_8bit", "adafactor") for model in adamw]
    settings += [(f"{at}.train.{model}", {"kind": "lora"}) for model, how in phase.train.items() if how == "full"]
    if phase.batch % (2 * slot.workers) == 0 and not slot.gpus:  # the loop halves a GPU's micro-batches by itself
        settings.append((f"{at}.batch", phase.batch // 2))
    settings += [(f"data.{name}.length", data.length // 2) for name, data in spec.data.items()]
    for path, value in settings:
        label = f"trial.{path}".replace("data.corpus.", "data.")
        if len(phase.optimizer) == 1:  # then the study need not name the model
            label = label.replace(f".optimizer.{next(iter(phase.optimizer))}.", ".optimizer.")
        with suppress(ValidationError):  # a change that makes the trial invalid is none
            text = "true" if value is True else "{kind: lora}" if isinstance(value, dict) else value
            yield f"{label}: {text}", _with_setting(spec, path, value), slot


def _with_setting(spec: TrialSpec, path: str, value: Any) -> TrialSpec:
    *parents, last = path.split(".")
    raw = node = spec.model_dump(mode="json", by_alias=True)
    for key in parents:
        node = node[key]
    node[last] = value
    return TrialSpec.model_validate(raw)
