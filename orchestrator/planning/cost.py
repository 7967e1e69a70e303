"""What a study will cost, as far as its trials can be named: device-hours, from steps timed here, and bytes of weights."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.planning.memory import bytes_text, num_slots
from orchestrator.planning.meta_models import Shapes
from orchestrator.scheduling.scheduler import Agenda
from orchestrator.scheduling.trials import PlannedTrial
from trainables.config.phase import Made, RisesWithLoss, Sampled, Stream
from trainables.config.terms import reads
from trainables.config.trial import TrialSpec, parse_start
from trainables.config.value import digest
from trainables.data.batches import corrupt
from trainables.data.classification.tasks import Task
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.data.prepared import Prepared
from trainables.generation.sample import sample
from trainables.models import build, output_head
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore
from trainables.training.controllers import fresh_share, share_at, share_start
from trainables.training.phase_graph import PhaseRun, head_of, longest, num_steps, streams_of

PROBE_FLOPS = 2e11  # a step beyond that is not timed here: the machine that runs it is another one


FEW = 9  # tokens of a reply that are timed


def cost_lines(
    agenda: Agenda, trials: list[PlannedTrial], data: Mapping[str, Prepared], shapes: Shapes, slots: int | None
) -> list[str]:
    """Device-hours from a step of each kind of phase, timed here and now; what the store has costs nothing."""
    study = agenda.study
    todo = _todo(agenda, trials)
    per_step: dict[str, float | None] = {}
    seconds, last = 0.0, dict[str, float]()
    size = largest = 0.0
    replied, replying = dict[str, float](), False
    for planned, which in todo.values():
        name, _, item = parse_start(which)
        instance, phase = PhaseRun(name, item), planned.spec.phases[name]
        sizes = [shapes.num_bytes(planned.spec.models[m], longest(planned.spec)) for m in phase.train]
        size += sum(sizes) * (1 + len(phase.save_at))
        largest = max(largest, *sizes)
        read = _of(data, streams_of(planned.spec, instance)[phase.pace].data).train
        kind = _kind(planned.spec, name, _width(read))
        if kind not in per_step:
            per_step[kind] = _time_step(planned.spec, instance, data, shapes)
        step = per_step[kind]
        if step is not None:
            steps = num_steps(phase, length=read.length, num_sequences=len(read))
            last[which] = step * steps
            for stream in streams_of(planned.spec, instance).values():
                if stream.replies is not None:
                    replying = True
                    fresh = _share_made(stream.replies, steps * phase.batch, len(_of(data, stream.data).train))
                    last[which] += fresh * steps * _time_replies(planned.spec, name, stream, data, shapes, replied)
            seconds += last[which]
    extra = study.search.points if study.search else 0
    if study.confirm and not any(p.kind == "confirm" for p in trials):
        extra += 2 * study.confirm.seeds
    extra -= sum(1 for p in trials if p.arm is None and p.kind == "trial")
    if extra > 0:
        seconds += extra * sum(last.values())
        size += extra * largest
    lines = []
    if not todo and extra <= 0:
        lines.append("nothing to train")
    elif None in per_step.values():
        lines.append("too large to be timed on this machine; device-hours show after the first phases")
    else:
        num = slots or num_slots(study.slot)
        lines.append(
            f"about {seconds / 3600:.2g} device-hours without evaluation: {_minutes(seconds / num)} on {num} slots of "
            f"{study.slot.workers} x ({study.slot.cpus:g} cpu, {study.slot.gpus:g} gpu) (steps timed here{', with replies as long as they may be' if replying else ''})"
        )
    free = shutil.disk_usage(_existing_parent(agenda.storage)).free if agenda.storage.is_local else None
    lines.append(
        f"about {bytes_text(size)} of weights to be written"
        + (f", {bytes_text(free)} free" if free is not None else "")
    )
    if study.limits.minutes:
        lines.append(f"limit: nothing new is started after {study.limits.minutes:g} minutes")
    return lines


def _todo(agenda: Agenda, trials: list[PlannedTrial]) -> dict[str, tuple[PlannedTrial, str]]:
    """The phases that no trial has trained yet, by key."""
    store = PhaseStore(agenda.storage)
    return {
        key: (planned, instance)
        for planned in trials
        if agenda.rows.get(planned.id, {}).get("status") not in ("ended", "stopped", "failed")
        for instance, key in planned.keys.items()
        if store.find(key) is None
    }


def _kind(spec: TrialSpec, name: str, width: int) -> str:
    """Phases of one kind take equally long for a step, or nearly: tasks of about the same length do."""
    phase = spec.phases[name]
    shapes = {m: spec.models[m].model_dump(mode="json", exclude={"init"}) for m in spec.models_of(name)}
    what = phase.model_dump(mode="json", include={"train", "batch", "streams"})
    return digest([what, sorted(phase.terms), shapes, width.bit_length()])


def _width(read: Any) -> int:
    """Tokens of a sequence, as a rule: packed ones are equally long, examples of a task are not."""
    lengths = getattr(read, "lengths", None)
    return int(read.length if lengths is None else lengths.mean())


def _of(data: Mapping[str, Prepared], name: str) -> Prepared:
    return data.get(name) or next(iter(data.values()))


def _time_step(spec: TrialSpec, instance: PhaseRun, data: Mapping[str, Prepared], shapes: Shapes) -> float | None:
    """Seconds of one step of a phase on this machine, with fresh weights; None where it is too large to try."""
    phase = spec.phases[instance.phase]
    stream = streams_of(spec, instance)[phase.pace]
    read = _of(data, stream.data)
    used = dict.fromkeys(model for term in phase.terms.values() for model in reads(term))
    flops = 0
    for model in used:
        per_token = 2 * shapes.num_parameters(spec.models[model], longest(spec)) * (3 if model in phase.train else 1)
        flops += per_token * phase.batch * _width(read.train)
    for maker in {name for one in streams_of(spec, instance).values() if one.replies for name in one.replies.makers}:
        flops += 2 * shapes.num_parameters(spec.models[maker], longest(spec)) * phase.batch * _width(read.train)
    if flops > PROBE_FLOPS:
        return None
    rows = range(min(phase.batch, len(read.train)))
    built = {}
    for model in used:
        head = head_of(spec, instance, model)
        config = shapes.config(spec.models[model], longest(spec))
        built[model] = build.from_config(config, head.num_labels if head is not None else None)
    torch.set_num_threads(1)

    def step() -> None:
        for model, net in built.items():
            with torch.set_grad_enabled(model in phase.train):
                if isinstance(read, Task):
                    part = read.train.rows(rows)
                    loss = output_head.class_logits(net, part.ids_BT, part.mask_BT, part.types_BT).square().mean()
                elif isinstance(read, ExchangeSet):
                    packed = read.train.rows(rows).to("cpu")
                    logits = output_head.logits_at(net, packed.ids_BT, packed.positions_N, places_BT=packed.places_BT)
                    loss = torch.nn.functional.cross_entropy(logits, packed.labels_N)
                else:
                    batch = corrupt(read.train.rows(rows), read, stream.corruption, seed=0)
                    logits = output_head.logits_at(net, batch.ids_BT, batch.positions_N)
                    loss = torch.nn.functional.cross_entropy(logits, batch.labels_N)
            if model in phase.train:
                loss.backward()  # type: ignore[no-untyped-call]

    step()  # warms up
    started = time.monotonic()
    step()
    return time.monotonic() - started


def _share_made(made: Made, num_read: int, num_prompts: int) -> float:
    """Of the steps, those that make fresh replies; where that rises with the loss, which nobody knows yet, all of them."""
    at = [(i + 0.5) / 8 for i in range(8)]
    if isinstance(made.share, RisesWithLoss):
        shares = [1.0] * len(at)
    else:
        shares = [share_at(made.share, share_start(made.share), progress) for progress in at]
    if made.replay is not None:
        rest = max(0.0, 1 - made.replay.size / max(1, num_read))  # of the budget, from when it is full
        fresh = [1 - rest + rest * fresh_share(made.replay, progress) for progress in at]
        shares = [share * one for share, one in zip(shares, fresh, strict=True)]
    mean = sum(shares) / len(shares)
    if isinstance(made, Sampled) and made.once:
        mean = min(mean, num_prompts / max(1, num_read))
    return mean


def _time_replies(
    spec: TrialSpec, name: str, stream: Stream, data: Mapping[str, Prepared], shapes: Shapes, known: dict[str, float]
) -> float:
    """Seconds of the replies of a step on this machine, none of which ends before it must: each maker's pass over the
    prompts, and a pass for each further token, from a few. (A teacher that looks over a draft's blocks takes less.)"""
    made, read = stream.replies, _of(data, stream.data)
    assert made is not None and isinstance(read, ExchangeSet)
    phase, seconds = spec.phases[name], 0.0
    batch = read.train.rows(range(min(phase.batch, len(read.train))))
    for maker in made.makers:
        model = spec.models[maker]
        shape = model.model_dump(mode="json", exclude={"init"})
        key = digest([shape, made.model_dump(mode="json"), phase.batch, stream.data])
        if key not in known:
            net = build.from_config(shapes.config(model, longest(spec)))
            took = {}
            for num in dict.fromkeys((1, min(FEW, made.max_tokens))):
                how = made.model_copy(update={"max_tokens": num})
                started = time.monotonic()
                sample(net, batch.prompts, how, end_id=-1, pad_id=batch.pad_id, vocab_size=read.vocab_size, seed=0, device="cpu")  # fmt: skip
                took[num] = time.monotonic() - started
            few = max(took)
            each = max(0.0, took[few] - took[1]) / max(1, few - 1)
            known[key] = took[1] + (made.max_tokens - 1) * each
        seconds += known[key]
    return seconds


def _existing_parent(storage: Storage) -> str:
    path = storage.path()
    while not path.exists():
        path = path.parent
    return str(path)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
