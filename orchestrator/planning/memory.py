"""Whether the largest trial that a study can reach fits a slot, with memory by part, and the cheapest change if not.

Counts what PyTorch holds, from shapes alone (`orchestrator.planning.meta_models`), as if all parts were there at once, and adds a share
for what its allocator wastes. benchmarks/RESULTS.md compares with what processes were seen to take.

Of instructions it is not known which exchanges come together: a micro-batch is counted as so many full rows, with as many
tokens of replies as the data's exchange with the longest reply for its length has, or the whole row where models reply.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.planning.meta_models import At, Device, ReachableTrial, Rows, Shapes, Uncounted, reachable, reached_at
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Slot, Study
from trainables.config.data import Instructions, Sampling
from trainables.config.errors import ModelError
from trainables.config.models import Model
from trainables.config.phase import Interleaved, Phase
from trainables.config.terms import CrossEntropy, Flow, OffWhenBetter, reads
from trainables.config.trial import TrialSpec
from trainables.evaluation.generation import exchange_rows
from trainables.evaluation.per_example import ROWS
from trainables.models.build import DTYPES
from trainables.training.phase_graph import PhaseRun, head_of, longest, phase_runs, streams_of

PROCESS: Mapping[Device, float] = {"cpu": 0.65e9, "cuda": 0.6e9}  # a slot's process (measured) | CUDA (assumed)
WASTE: Mapping[Device, float] = {"cpu": 0.25, "cuda": 0.1}  # malloc (measured) | CUDA's allocator (assumed) …
STAYING = ("weights", "optimizer", "teacher")  # … of all but these parts, which come and go
EIGHT_BIT_FROM = 4096  # numbers; tensors of fewer keep moments of adamw_8bit in fp32
EIGHT_BIT_BLOCK = 256  # numbers that share a scale, fp32
DRIVER = 1.5e9  # where CPU slots share this machine: the driver and Ray's own processes (measured)
FP32 = 4  # bytes
SHORTEST = 16  # tokens; no shorter sequence is proposed


@dataclass(frozen=True)
class MemoryEstimate:
    """The most that one worker holds in a phase, bytes by part, with micro-batches of `rows` sequences."""

    reached: ReachableTrial
    instance: PhaseRun
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


def memory_lines(study: Study, shapes: Shapes, reached: Sequence[ReachableTrial]) -> list[str]:
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


# ------------------------------------------------------------------------------------------------------ what is trained


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of a model that is trained, whatever it reads. Autocast changes none of them."""

    weights: float  # each in its own type; with LoRA the base and the pairs
    gradients: float  # of what learns, in its type
    optimizer: float


def model_memory(shapes: Shapes, model: Model, length: int, phase: Phase, name: str) -> ModelMemory:
    """Of the model `name` of a phase that trains it. Raises ModelError."""
    net, kind = shapes.net(model, length, how=phase.train[name]), phase.optimizer_of(name).kind
    every = dict(net.named_parameters())
    only_pairs = phase.train[name] != "full"
    learning = [tensor for path, tensor in every.items() if ".lora_" in path or not only_pairs]
    return ModelMemory(
        float(sum(tensor.nbytes for tensor in every.values())),
        float(sum(tensor.nbytes for tensor in learning)),
        float(sum(_state(tensor, kind) for tensor in learning)),
    )


def _state(tensor: torch.Tensor, kind: str) -> int:
    """Bytes of an optimizer's state of one tensor: two moments in its type, or in 8 bits with scales, or in fp32 the sums
    over rows and over columns of the second one. (Step numbers and tables, a few KB, aside.)"""
    if kind == "adafactor":
        shape = tuple(tensor.shape)
        rows_and_columns = tensor.numel() // shape[-1] + tensor.numel() // shape[-2] if len(shape) >= 2 else 0
        return FP32 * (rows_and_columns or tensor.numel())
    if kind == "adamw_8bit":
        scales = -(-tensor.numel() // EIGHT_BIT_BLOCK)
        return 2 * (FP32 * tensor.numel() if tensor.numel() < EIGHT_BIT_FROM else tensor.numel() + FP32 * scales)
    return 2 * tensor.nbytes


# ---------------------------------------------------------------------------------------------------- what a phase needs


def largest(study: Study, shapes: Shapes, reached: Iterable[ReachableTrial], rows: int | None = None) -> MemoryEstimate:
    """Of all phases of the trials that a study can reach, the one that needs most. `rows`: as in `need`."""
    return max(needs(study, shapes, reached, rows), key=_total)


def needs(
    study: Study, shapes: Shapes, reached: Iterable[ReachableTrial], rows: int | None = None
) -> list[MemoryEstimate]:
    """Of each phase of these trials, and of those where the worst ends of several ranges come together."""

    def of(one: ReachableTrial) -> list[MemoryEstimate]:
        return [estimate_memory(one, instance, study.slot, shapes, rows) for instance in phase_runs(one.spec)]

    found = []
    ends: dict[str, dict[str, list[MemoryEstimate]]] = {}  # by sizes and axis: the largest phase at each end
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


def _total(need: MemoryEstimate) -> float:
    return need.total


def estimate_memory(
    one: ReachableTrial, instance: PhaseRun, slot: Slot, shapes: Shapes, rows: int | None = None
) -> MemoryEstimate:
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
    moments |= {f" while {maker} replies": parts for maker, parts in phase.replying(share).items()}
    if not slot.gpus:  # else it is the machine's memory
        moments[" while it goes on from a checkpoint"] = phase.restart()
    when, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    return MemoryEstimate(one, instance, when, parts, num, share)


@dataclass(frozen=True)
class _Phase:
    """A phase, counted at three moments; each gives bytes by part."""

    spec: TrialSpec
    instance: PhaseRun
    slot: Slot
    shapes: Shapes

    def least(self) -> float:
        """Of a step, without activations."""
        held, teacher = self._held(), self._teacher()
        return PROCESS[self._at.device] + held.weights + held.gradients + held.optimizer + teacher

    def step(self, num: int) -> dict[str, float]:
        """With micro-batches of `num` sequences. A trained model keeps its activations for each stream, a frozen one
        runs past; workers exchange gradients from buckets beside them."""
        phase, held = self._phase, self._held()
        kept = passing = 0
        sides = {}
        for name, model, on, rows in self._forwards():
            how: dict[str, Any] = {"trained": name in phase.train, "how": phase.train.get(name, "full")}
            rows = replace(rows, num=num)
            taken = self.shapes.forward(
                model, self._length, rows, at=self._at, recompute=phase.gradient_checkpointing, **how
            )
            sides[name, on] = taken.side
            kept += taken.kept
            if name not in phase.train:
                passing = max(passing, taken.peak - taken.side.hidden_ND.nbytes)
        return self._whole(
            weights=held.weights,
            gradients=held.gradients * (2 if self.slot.workers > 1 else 1) + self._tied(),
            optimizer=held.optimizer,
            activations=kept + passing,
            logits=self.shapes.scores(phase, sides, self._at),
            teacher=self._teacher(),
        )

    def evaluation(self) -> dict[str, float]:
        """Of what is trained, and of a teacher that is switched off when it is beaten. Who reads instructions answers
        prompts, too, and is compared with whom it learns from."""
        phase, held = self._phase, self._held()
        asked = set(phase.train)
        for term in phase.terms.values():
            if isinstance(term.weight, OffWhenBetter) and not isinstance(term, CrossEntropy):
                asked.add(term.from_)
        peaks = [0.0]
        for name, model, rows in self._evaluated():
            if name not in asked:
                continue
            peaks.append(self.shapes.scoring(model, self._length, rows, at=self._at, how=self._how(name)))
            if rows.packed and any(isinstance(term, Flow) and term.to == name for term in phase.terms.values()):
                peaks.append(self.shapes.agreeing(rows.num * rows.positions))
        for name, data in self._answered():
            num = min(ROWS, data.evaluate or ROWS)
            peaks.append(sum(self._answering(name, num, data, data.scoring).values()))
        return self._whole(
            weights=held.weights, optimizer=held.optimizer, evaluation=max(peaks), teacher=self._teacher()
        )

    def replying(self, share: int) -> dict[str, dict[str, float]]:
        """By who makes a stream's replies, all of a worker's share at once; before a step, when there are no gradients."""
        held, found = self._held(), {}
        for stream in streams_of(self.spec, self.instance).values():
            made, data = stream.replies, self.spec.data[stream.data]
            if made is None or not isinstance(data, Instructions):
                continue
            each = [self._answering(name, share, data, made) for name in made.makers]
            worst = max(each, key=lambda parts: sum(parts.values()))
            found[" and ".join(made.makers)] = self._whole(
                weights=held.weights,
                optimizer=held.optimizer,
                **worst | {"cache": sum(parts["cache"] for parts in each)},
                teacher=self._teacher(),
            )
            if isinstance(made, Interleaved):  # the teacher's logits of a block are there at once
                logits = FP32 * share * made.block * self.shapes.vocab_size
                found[" and ".join(made.makers)]["logits"] += logits
        return found

    def restart(self) -> dict[str, float]:
        """On a CPU: the checkpoint's file and what is read from it, both in memory beside the fresh weights."""
        held = self._held()
        checkpoint = 2 * (held.gradients + held.optimizer)  # what learns is as large as its gradients
        return self._whole(weights=held.weights, checkpoint=checkpoint, teacher=self._teacher())

    def _answering(self, name: str, num: int, data: Instructions, how: Sampling) -> dict[str, float]:
        """While a model replies to `num` of the longest prompts at length: its cache of keys and values, which grows by a
        quarter at a time; the prompts' pass; a draw from the logits."""
        model, tokens = self.spec.models[name], data.prompt_length + how.max_tokens
        limit = getattr(self.shapes.config(model, self._length), "max_position_embeddings", None) or tokens
        tokens = min(tokens, limit)
        of_token = self.shapes.cached(model, self._length, at=self._at, how=self._how(name))
        rows = Rows(num, data.prompt_length, 1)
        return {
            "cache": float(of_token * num * (tokens + tokens // 4 + 32)),
            "activations": self.shapes.scoring(model, self._length, rows, at=self._at, how=self._how(name)),
            "logits": self.shapes.drawing(num, how),
        }

    def _whole(self, **parts: float) -> dict[str, float]:
        device = self._at.device
        moving = sum(size for part, size in parts.items() if part not in STAYING)
        return {"process": PROCESS[device], **parts, "allocator": WASTE[device] * moving}

    @property
    def _phase(self) -> Phase:
        return self.spec.phases[self.instance.phase]

    @property
    def _at(self) -> At:
        return At("cuda" if self.slot.gpus else "cpu", self.spec.precision)

    @property
    def _length(self) -> int:
        return longest(self.spec)

    def _how(self, name: str) -> Any:
        return self._phase.train.get(name, "full")

    def _held(self) -> ModelMemory:
        """Of the models that are trained."""
        models = self.spec.models
        each = [model_memory(self.shapes, models[name], self._length, self._phase, name) for name in self._phase.train]
        return ModelMemory(*(sum(getattr(one, part) for one in each) for part in ("weights", "gradients", "optimizer")))

    def _teacher(self) -> float:
        """Weights of the other models."""
        others = (name for name in self.spec.models_of(self.instance.phase) if name not in self._phase.train)
        return float(sum(self.shapes.num_bytes(self.spec.models[name], self._length) for name in others))

    def _tied(self) -> float:
        """Where head and embeddings are one tensor, its two gradients stand beside their sum for a moment."""
        full = [self.spec.models[name] for name, how in self._phase.train.items() if how == "full"]
        sizes = (self.shapes.num_tied(model, self._length) * _item(model) for model in full)
        return 2.0 * max(sizes, default=0)

    def _forwards(self) -> Iterator[tuple[str, Model, str, Rows]]:
        """(name, model, stream, sequences of an evaluation): each model runs once on each stream that its terms read."""
        streams = streams_of(self.spec, self.instance)
        terms = self._phase.terms.values()
        for name, on in sorted({(name, term.on) for term in terms for name in reads(term)}):
            data, masking = self.spec.data[streams[on].data], streams[on].corruption
            num = min(ROWS, data.evaluate or ROWS)
            head = head_of(self.spec, self.instance, name)
            if head is not None:
                yield name, self.spec.models[name], on, Rows(num, data.length, 1, head.num_labels)
                continue
            if isinstance(data, Instructions):
                rows = self._packed(data, min(num, exchange_rows(self.shapes.vocab_size, data.length)))
                if streams[on].replies is not None:  # these may be as long as they fit
                    rows = replace(rows, positions=data.length - 1)
                yield name, self.spec.models[name], on, rows
                continue
            positions = data.length - 1 if masking is None else max(1, round(masking.probability * data.length))
            yield name, self.spec.models[name], on, Rows(num, data.length, positions)

    def _packed(self, data: Instructions, num: int) -> Rows:
        most = math.ceil(self.shapes.reply_share * data.length)
        return Rows(num, data.length, max(1, min(most, data.length - 1)), packed=True)

    def _evaluated(self) -> Iterator[tuple[str, Model, Rows]]:
        """(name, model, sequences): what models read, replies that models make aside, and further data."""
        streams = streams_of(self.spec, self.instance)
        for name, model, on, rows in self._forwards():
            data = self.spec.data[streams[on].data]
            yield name, model, self._packed(data, rows.num) if isinstance(data, Instructions) else rows
        for name, data in self._answered():
            num = exchange_rows(self.shapes.vocab_size, data.length)
            yield name, self.spec.models[name], self._packed(data, min(num, data.evaluate or num))

    def _answered(self) -> Iterator[tuple[str, Instructions]]:
        """Trained models with the prompts that they answer when they are evaluated."""
        read = [stream.data for stream in streams_of(self.spec, self.instance).values()]
        for name in self._phase.train:
            for data in (self.spec.data[item] for item in (*read, *self._phase.eval_only)):
                if isinstance(data, Instructions):
                    yield name, data


def _item(model: Model) -> int:
    """Bytes of a weight."""
    return DTYPES[model.dtype].itemsize


def _checkpoints(study: Study, shapes: Shapes, reached: Sequence[ReachableTrial]) -> str:
    """Weights and optimizer of all that a phase trains, and whether the room that the study gives them suffices."""
    slot, room = study.slot, study.limits.checkpoint_gb
    size, name = max(
        (_checkpoint(shapes, one.spec, phase), name) for one in reached for name, phase in one.spec.phases.items()
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


def _checkpoint(shapes: Shapes, spec: TrialSpec, phase: Phase) -> float:
    """Bytes of what learns, and of the optimizer."""
    each = [model_memory(shapes, spec.models[name], longest(spec), phase, name) for name in phase.train]
    return sum(one.gradients + one.optimizer for one in each)


# -------------------------------------------------------------------------------------------------- the cheapest change


def _too_large(study: Study, shapes: Shapes, worst: MemoryEstimate, have: float) -> str:
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
        phases = (_Phase(one.spec, i, study.slot, shapes) for one in reached for i in phase_runs(one.spec))
        if have is None or any(phase.least() > have for phase in phases):  # needs no run
            return False
        return largest(study, shapes, reached, rows).total <= have
    except (StudyError, ModelError, Uncounted):
        return False


def _changes(study: Study, shapes: Shapes, worst: MemoryEstimate, have: float) -> Iterator[tuple[str, Study]]:
    """Changed studies, cheapest first: what leaves the results alone; what else leaves batches and models as large, alone
    and together; smaller batches; shorter sequences; fewer layers."""
    slot, spec = study.slot, worst.reached.spec

    def with_slot(**values: Any) -> Study:
        return study.model_copy(update={"slot": slot.model_copy(update=values)})

    def with_trial(values: Mapping[str, Any]) -> tuple[str, Study]:
        label = ", ".join(f"trial.{path}: {_said(value)}" for path, value in values.items())
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
    over: dict[str, int] = {}
    for n in needs(study, shapes, reachable(study)):
        if n.total > have:
            over[n.instance.phase] = max(n.share * slot.workers, over.get(n.instance.phase, 0))
    for values in _leaner(study, spec, tuple(over)):
        yield with_trial(values)
    if not slot.gpus:
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


def _leaner(study: Study, spec: TrialSpec, over: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Settings of what is kept and in which type, one by one and then together, fewest first. `over`: phases that do not
    fit. What the study is about stays as it is: only other models become bf16 or learn by LoRA."""
    kept = (
        "gradient_checkpointing",
        "precision",
        "dtype",
        "adamw_8bit",
        "lora",
        "adafactor",
    )  # the last ones change most
    seen = []
    for num in range(1, len(kept)):  # all but one of the two optimizers
        for chosen in sorted(itertools.combinations(kept, num), key=lambda some: kept.index(some[-1])):
            if {"adamw_8bit", "adafactor"} <= set(chosen):
                continue
            parts = [_setting(part, chosen, study, spec, over) for part in chosen]
            values = {path: value for part in parts for path, value in part.items()}
            if all(parts) and values not in seen:
                seen.append(values)
                yield values


def _setting(what: str, chosen: Sequence[str], study: Study, spec: TrialSpec, over: Sequence[str]) -> dict[str, Any]:
    """Trial paths and their values; {} where it is so already."""
    phases = {name: spec.phases[name] for name in over if name in spec.phases}
    by_lora = {  # other models that learn whole, and can learn by LoRA
        f"phases.{at}.train.{name}": {"kind": "lora"}
        for at, phase in phases.items()
        for name, how in phase.train.items()
        if how == "full" and name != study.objective.model
    }
    match what:
        case "gradient_checkpointing":
            return {
                f"phases.{name}.gradient_checkpointing": True
                for name, phase in phases.items()
                if not phase.gradient_checkpointing
            }
        case "precision":
            return {"precision": "bf16"} if spec.precision == "fp32" else {}
        case "dtype":
            whole = {n for phase in spec.phases.values() for n, how in phase.train.items() if how == "full"}
            if "lora" in chosen:
                whole -= {path.rsplit(".", 1)[-1] for path in by_lora}
            read = dict.fromkeys(name for at in phases for name in spec.models_of(at))
            narrow = [n for n in read if n not in {*whole, study.objective.model} and spec.models[n].dtype == "fp32"]
            return {f"models.{name}.dtype": "bf16" for name in narrow}
        case "lora":
            return by_lora
        case _:
            return {
                f"phases.{at}.optimizer.{'' if 'lr' in study.trial['phases'][at]['optimizer'] else f'{name}.'}kind": what
                for at, phase in phases.items()
                for name, optimizer in phase.optimizer.items()
                if optimizer.kind == "adamw"
            }


def _said(value: Any) -> str:
    """As YAML has it, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_said(part)}" for key, part in value.items()) + "}"
    return json.dumps(value) if isinstance(value, bool) else str(value)
