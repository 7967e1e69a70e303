"""Whether the largest trial that a study can reach fits a slot, with memory by part, and the cheapest change if not.

Counts what PyTorch holds, from shapes alone (`orchestrator.shapes`), as if all parts were there at once, and adds a share
for what its allocator wastes. benchmarks/RESULTS.md compares with what processes were seen to take.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.messages import StudyError
from orchestrator.shapes import At, Device, Reached, Rows, Shapes, Uncounted, reachable, reached_at
from orchestrator.study import Slot, Study
from trainables.evaluate import ROWS
from trainables.models import ModelError
from trainables.phases import Instance, head_of, instances, longest, streams_of
from trainables.spec.models import Model
from trainables.spec.terms import CrossEntropy, OffWhenBetter, reads
from trainables.spec.trial import TrialSpec

PROCESS: Mapping[Device, float] = {"cpu": 0.65e9, "cuda": 0.6e9}  # a slot's process (measured) | CUDA (assumed)
WASTE: Mapping[Device, float] = {"cpu": 0.25, "cuda": 0.1}  # malloc (measured) | CUDA's allocator (assumed) …
STAYING = ("weights", "optimizer", "teacher")  # … of all but these parts, which come and go
DRIVER = 1.5e9  # where CPU slots share this machine: the driver and Ray's own processes (measured)
FP32 = 4  # bytes; weights, gradients and AdamW's two moments are fp32 whatever autocast does
SHORTEST = 16  # tokens; no shorter sequence is proposed


@dataclass(frozen=True)
class Need:
    """The most that one worker holds in a phase, bytes by part, with micro-batches of `rows` sequences."""

    reached: Reached
    instance: Instance
    when: str
    parts: Mapping[str, float]
    rows: int
    share: int  # sequences of a step for one worker

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def where(self) -> str:
        return f"phase {self.instance} of {self.reached.name}{self.when}"

    def __str__(self) -> str:
        return ", ".join(f"{part} {bytes_text(size)}" for part, size in self.parts.items() if size)


def memory_lines(study: Study, shapes: Shapes, reached: Sequence[Reached]) -> list[str]:
    """What the plan says of memory and checkpoints. Raises StudyError where the largest trial does not fit."""
    have = room(study.slot)
    try:
        worst = largest(study, shapes, reached)
        if have is not None and worst.total > have:
            raise StudyError(_too_large(study, shapes, worst, have))
        cut = f" in micro-batches of {worst.rows} of {worst.share} sequences" if worst.rows < worst.share else ""
        of = f" of {bytes_text(have)}" if have is not None else ""
        lines = [f"up to {bytes_text(worst.total)}{of} in {worst.where}{cut}: {worst}"]
        if have is None:
            least = largest(study, shapes, reached, rows=1)
            lines.append(
                f"{bytes_text(least.total)} with one sequence at a time, in {least.where}; what a slot has is unknown here: "
                "slot.memory_gb: N lets the plan check it"
            )
    except Uncounted as error:
        lines = [f"unknown: a model cannot be run without content ({error})"]
    return [*lines, _checkpoints(study, shapes, reached)]


def bytes_text(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


# ------------------------------------------------------------------------------------------------------ what a slot has


def num_slots(slot: Slot) -> int:
    """How many trials run at once on this machine, by its cores."""
    return max(1, _num_workers(slot) // slot.workers)


def _num_workers(slot: Slot) -> int:
    return int(_cores() / slot.cpus + 1e-6)


def room(slot: Slot) -> float | None:
    """Bytes for one worker: as stated, or as this machine has it; None where trials ask for a device that is not here."""
    if slot.memory_gb is not None:
        return slot.memory_gb * 1e9
    if slot.gpus:
        if not torch.cuda.is_available():
            return None
        return float(torch.cuda.get_device_properties(0).total_memory) * slot.gpus
    return max(0.0, _physical() - DRIVER) / (num_slots(slot) * slot.workers)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical() -> float:
    """Bytes of memory of this machine, or of the container that it seems to be."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):
        total = min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


# ---------------------------------------------------------------------------------------------------- what a phase needs


def largest(study: Study, shapes: Shapes, reached: Iterable[Reached], rows: int | None = None) -> Need:
    """Of all phases of the trials that a study can reach, the one that needs most. `rows`: as in `need`."""
    return max(needs(study, shapes, reached, rows), key=_total)


def needs(study: Study, shapes: Shapes, reached: Iterable[Reached], rows: int | None = None) -> list[Need]:
    """Of each phase of these trials, and of those where the worst ends of several ranges come together."""

    def of(one: Reached) -> list[Need]:
        return [need(one, instance, study.slot, shapes, rows) for instance in instances(one.spec)]

    found = []
    ends: dict[str, dict[str, list[Need]]] = {}  # by sizes and axis: the largest phase at each end
    for one in reached:
        found += (here := of(one))
        if one.end is not None:
            sizes, axis = one.end
            ends.setdefault(sizes, {}).setdefault(axis, []).append(max(here, key=_total))
    for axes in ends.values():
        tops = [max(at, key=_total) for at in axes.values() if len({n.total for n in at}) > 1]
        point = {axis: value for top in sorted(tops, key=_total) for axis, value in top.reached.point.items()}
        if len(tops) > 1 and (together := reached_at(study, point)) is not None:
            found += of(together)
    return found


def _total(need: Need) -> float:
    return need.total


def need(one: Reached, instance: Instance, slot: Slot, shapes: Shapes, rows: int | None = None) -> Need:
    """What a worker needs in a phase: the largest of a step, of an evaluation, whose batch is not halved, and, where the
    process' memory is the slot's, of going on from a checkpoint.

    `rows`: of a micro-batch; by default the worker's share, halved on a GPU until it fits, as the loop does.
    Raises Uncounted.
    """
    share = max(1, one.spec.phases[instance.phase].batch // slot.workers)
    num = share if rows is None else min(rows, share)
    have = room(slot) if slot.gpus and rows is None else None
    phase = _Phase(one.spec, instance, slot, shapes)
    step = phase.step(num)
    while have is not None and num > 1 and sum(step.values()) > have:
        num //= 2
        step = phase.step(num)
    moments = {"": step, " while it is evaluated": phase.evaluation()}
    if not slot.gpus:  # else it is the machine's memory
        moments[" while it goes on from a checkpoint"] = phase.restart()
    when, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    return Need(one, instance, when, parts, num, share)


@dataclass(frozen=True)
class _Phase:
    """A phase, counted at three moments; each gives bytes by part."""

    spec: TrialSpec
    instance: Instance
    slot: Slot
    shapes: Shapes

    def least(self) -> float:
        """Of a step, without activations."""
        trained, teacher = self._weights()
        return PROCESS[self._at.device] + 4 * trained + teacher

    def step(self, num: int) -> dict[str, float]:
        """With micro-batches of `num` sequences. A trained model keeps its activations for each stream, a frozen one
        runs past; workers exchange gradients from buckets beside them."""
        train = self.spec.phases[self.instance.phase].train
        trained, teacher = self._weights()
        kept = passing = 0
        sides = {}
        for name, model, on, rows in self._forwards():
            taken = self.shapes.forward(model, self._length, replace(rows, num=num), trained=name in train, at=self._at)
            sides[name, on] = taken.side
            kept += taken.kept
            if name not in train:
                passing = max(passing, taken.peak - taken.side.hidden_ND.nbytes)
        return self._whole(
            weights=trained,
            gradients=trained * (2 if self.slot.workers > 1 else 1) + self._tied(),
            optimizer=2 * trained,
            activations=kept + passing,
            logits=self.shapes.scores(self.spec.phases[self.instance.phase], sides, self._at),
            teacher=teacher,
        )

    def evaluation(self) -> dict[str, float]:
        """Of what is trained, and of a teacher that is switched off when it is beaten."""
        phase, (trained, teacher) = self.spec.phases[self.instance.phase], self._weights()
        asked = set(phase.train)
        for term in phase.terms.values():
            if isinstance(term.weight, OffWhenBetter) and not isinstance(term, CrossEntropy):
                asked.add(term.from_)
        peaks = [self.shapes.scoring(model, self._length, rows, at=self._at) for name, model, _, rows in self._forwards() if name in asked]  # fmt: skip
        return self._whole(weights=trained, optimizer=2 * trained, evaluation=max(peaks), teacher=teacher)

    def restart(self) -> dict[str, float]:
        """On a CPU: the checkpoint's file and what is read from it, both in memory beside the fresh weights."""
        trained, teacher = self._weights()
        return self._whole(weights=trained, checkpoint=2 * 3 * trained, teacher=teacher)

    def _whole(self, **parts: float) -> dict[str, float]:
        device = self._at.device
        moving = sum(size for part, size in parts.items() if part not in STAYING)
        return {"process": PROCESS[device], **parts, "allocator": WASTE[device] * moving}

    @property
    def _at(self) -> At:
        return At("cuda" if self.slot.gpus else "cpu", self.spec.precision)

    @property
    def _length(self) -> int:
        return longest(self.spec)

    def _weights(self) -> tuple[float, float]:
        """Of the models that are trained, and of the others."""
        train, sizes = self.spec.phases[self.instance.phase].train, {True: 0.0, False: 0.0}
        for name in self.spec.models_of(self.instance.phase):
            sizes[name in train] += FP32 * self.shapes.num_parameters(self.spec.models[name], self._length)
        return sizes[True], sizes[False]

    def _tied(self) -> float:
        """Where head and embeddings are one tensor, its two gradients stand beside their sum for a moment."""
        train = self.spec.phases[self.instance.phase].train
        return 2.0 * FP32 * max(self.shapes.num_tied(self.spec.models[name], self._length) for name in train)

    def _forwards(self) -> Iterator[tuple[str, Model, str, Rows]]:
        """(name, model, stream, sequences of an evaluation): each model runs once on each stream that its terms read."""
        streams = streams_of(self.spec, self.instance)
        terms = self.spec.phases[self.instance.phase].terms.values()
        for name, on in sorted({(name, term.on) for term in terms for name in reads(term)}):
            data, masking = self.spec.data[streams[on].data], streams[on].corruption
            num = min(ROWS, data.evaluate or ROWS)
            head = head_of(self.spec, self.instance, name)
            if head is not None:
                yield name, self.spec.models[name], on, Rows(num, data.length, 1, head.num_labels)
                continue
            positions = data.length - 1 if masking is None else max(1, round(masking.probability * data.length))
            yield name, self.spec.models[name], on, Rows(num, data.length, positions)


def _checkpoints(study: Study, shapes: Shapes, reached: Sequence[Reached]) -> str:
    """Weights and optimizer of all that a phase trains, and whether the room that the study gives them suffices."""
    slot, room = study.slot, study.limits.checkpoint_gb
    size, name = max(
        (3.0 * FP32 * sum(shapes.num_parameters(one.spec.models[m], longest(one.spec)) for m in phase.train), name)
        for one in reached
        for name, phase in one.spec.phases.items()
    )
    num = 1 if slot.gpus else num_slots(slot)
    places = "each slot keeps" if slot.gpus else f"{num} slots keep"
    line = (
        f"a checkpoint in phase {name} is {bytes_text(size)}; {places} up to {bytes_text(2 * num * size)}, "
        "two each while one replaces another"
    )
    early = bool(study.search and study.search.stop_early)  # then half of the room is for points that were stopped
    if room is not None and 2 * num * size * (1 + early) > room * 1e9:
        line += f"; limits.checkpoint_gb {room:g} is too little for that, and what does not fit is not written"
    return line


# -------------------------------------------------------------------------------------------------- the cheapest change


def _too_large(study: Study, shapes: Shapes, worst: Need, have: float) -> str:
    changes = (label for label, changed in _changes(study, shapes, worst, have) if _fits(changed, shapes))
    change = next(changes, None)
    spec = worst.reached.spec
    size, name = max(
        (shapes.num_parameters(spec.models[n], longest(spec)), n) for n in spec.models_of(worst.instance.phase)
    )
    here = "" if study.slot.memory_gb is not None else " on this machine (slot.memory_gb says what another one has)"
    return (
        f"{study.file}: {worst.where} needs {bytes_text(worst.total)} ({worst}), and a slot has {bytes_text(have)} for a worker"
        f"{here}; "
        + (
            f"the cheapest change that makes it fit: {change}"
            if change
            else f"nothing that was tried makes it fit; the largest model is {name} with {size:,} parameters"
        )
    )


def _fits(study: Study, shapes: Shapes) -> bool:
    """Whether all that a changed study can reach fits; a change that makes it no valid study does not."""
    try:
        have, rows, reached = room(study.slot), 1 if study.slot.gpus else None, list(reachable(study))
        phases = (_Phase(one.spec, i, study.slot, shapes) for one in reached for i in instances(one.spec))
        if have is None or any(phase.least() > have for phase in phases):  # needs no run
            return False
        return largest(study, shapes, reached, rows).total <= have
    except (StudyError, ModelError, Uncounted):
        return False


def _changes(study: Study, shapes: Shapes, worst: Need, have: float) -> Iterator[tuple[str, Study]]:
    """Changed studies, cheapest first: what leaves the results alone; bf16; smaller batches; shorter sequences; fewer
    layers."""
    slot, spec = study.slot, worst.reached.spec

    def with_slot(**values: Any) -> Study:
        return study.model_copy(update={"slot": slot.model_copy(update=values)})

    def with_trial(values: Mapping[str, Any]) -> tuple[str, Study]:
        label = ", ".join(f"trial.{path}: {value}" for path, value in values.items())
        return label, study.model_copy(update={"fixed": {**study.fixed, **values}})

    if slot.gpus and slot.memory_gb is None:
        for gpus in (0.25, 0.5, 1.0):
            if gpus > slot.gpus:
                yield f"slot.gpus: {gpus:g}", with_slot(gpus=gpus)
    elif slot.memory_gb is None:
        for num in range(num_slots(slot) - 1, 0, -1):
            if (cpus := _cores() // (num * slot.workers)) > slot.cpus:
                yield f"slot.cpus: {cpus} ({num} at a time)", with_slot(cpus=cpus)
    batches = {phase.batch for one in reachable(study) for phase in one.spec.phases.values()}
    if not slot.gpus:  # there, one sequence at a time was too much
        for workers in (slot.workers * 2**k for k in range(1, 7)):
            is_here = slot.memory_gb is not None or workers <= _num_workers(slot)
            if is_here and not any(batch % workers for batch in batches):
                yield f"slot.workers: {workers}", with_slot(workers=workers)
    if spec.precision == "fp32":
        yield with_trial({"precision": "bf16"})
    if not slot.gpus:
        over: dict[str, int] = {}
        for n in needs(study, shapes, reachable(study)):
            if n.total > have:
                over[n.instance.phase] = max(n.share * slot.workers, over.get(n.instance.phase, 0))
        for k in range(1, max(over.values()).bit_length()):
            smaller = {f"phases.{name}.batch": max(1, batch >> k) for name, batch in over.items()}
            if not any(batch % slot.workers for batch in smaller.values()):
                yield with_trial(smaller)
    for k in range(1, longest(spec).bit_length()):
        lengths = {f"data.{name}.length": data.length >> k for name, data in spec.data.items()}
        if min(lengths.values()) >= SHORTEST:
            yield with_trial(
                {"data.length": lengths["data.corpus.length"]} if "kind" in study.trial["data"] else lengths
            )
    layers = {name: spec.models[name].layers or 1 for name in spec.models_of(worst.instance.phase)}
    largest_first = sorted(layers, key=lambda name: -shapes.num_parameters(spec.models[name], longest(spec)))
    for names in (*((name,) for name in largest_first), tuple(layers)):
        for k in range(1, max(layers[name] for name in names).bit_length()):
            yield with_trial({f"models.{name}.layers": max(1, layers[name] >> k) for name in names})
