"""What a study will cost, for the trials that can be named: device-hours, from steps timed here, and bytes of weights."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orchestrator.planning.meta_models import Shapes
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import PlannedTrial
from orchestrator.study.schema import Study
from trainables.config.errors import ModelError
from trainables.config.models import Random
from trainables.config.phase import Phase, ReplySource, Sampled, Stream
from trainables.config.phase_run import PhaseRun
from trainables.config.schedules import RisesWithLoss
from trainables.config.trial import TrialSpec
from trainables.config.value import digest
from trainables.data.instructions.packing import ExchangeBatch
from trainables.data.prepared import Prepared
from trainables.generation.context import GenerationContext
from trainables.generation.sample import sample
from trainables.models import build, configs, output_head
from trainables.models.initialise import initialise
from trainables.storage.files import Storage, bytes_text
from trainables.storage.phase_store import PhaseStore
from trainables.training.phase_graph import head_of, longest, num_steps, pace_reading, streams_of

PROBE_FLOPS = 2e11  # of a larger step some rows are timed here; a larger row is not, another machine will run the study
PART_FLOPS = 2.5e10  # of those rows: half a second
TIMED_TOKENS = 9  # tokens of a reply that are timed
Rows = Mapping[str, Mapping[str, Any]]  # of the trials table, by trial


def is_over(rows: Rows, trial: PlannedTrial) -> bool:
    return rows.get(trial.id, {}).get("status") in ("ended", "stopped", "failed")


class PhaseCost(NamedTuple):
    """The cost of training a phase once; seconds on one device, None where a step was too large for this machine."""

    phase: str
    num_bytes: float  # of weights to be stored
    largest_model: float  # bytes
    seconds: float | None
    has_replies: bool


def cost_lines(scheduler: Scheduler, trials: Sequence[PlannedTrial], timer: StepTimer, slots: int) -> list[str]:
    """Device-hours from a timed step of each kind of phase, and bytes of weights; what the store has costs nothing."""
    study, storage, rows = scheduler.study, scheduler.storage, scheduler.ledger.rows
    store = PhaseStore(storage)
    todo = {
        key: (planned.spec, phase)
        for planned in trials
        if not is_over(rows, planned)
        for phase, key in planned.keys.items()
        if store.find(key) is None
    }
    costs = [_phase_cost(spec, phase, timer) for spec, phase in todo.values()]
    extra = scheduler.search.num_unplanned if scheduler.search else 0  # trials that cannot be named yet
    num_bytes = sum(cost.num_bytes for cost in costs) + extra * max((cost.largest_model for cost in costs), default=0)
    free = f", {bytes_text(shutil.disk_usage(_existing_parent(storage)).free)} free" if storage.is_local else ""
    lines = [_time_line(study, costs, extra, slots), f"about {bytes_text(num_bytes)} of weights to be written{free}"]
    if study.limits.minutes:
        lines.append(f"limit: nothing new is started after {study.limits.minutes:g} minutes")
    return lines


def _phase_cost(spec: TrialSpec, which: str, timer: StepTimer) -> PhaseCost:
    run = PhaseRun.parse(which)
    phase = spec.phases[run.phase]
    sizes = [timer.shapes.num_bytes(spec.models[model], longest(spec)) for model in phase.train]
    streams = streams_of(spec, run)
    read = timer.read(pace_reading(spec, run)).train
    steps, seconds = num_steps(phase, length=read.length, num_sequences=len(read)), timer.step_seconds(spec, run)
    replied = [stream for stream in streams.values() if stream.replies is not None]
    if seconds is not None:
        for stream in replied:
            assert stream.replies is not None
            fresh = _share_made(stream.replies, steps * phase.batch, len(timer.read(stream.data).train))
            seconds += fresh * timer.reply_seconds(spec, phase, stream)
        seconds *= steps
    return PhaseCost(which, sum(sizes) * (1 + len(phase.save_at)), max(sizes), seconds, bool(replied))


def _time_line(study: Study, costs: Sequence[PhaseCost], extra: int, num: int) -> str:
    if not costs and not extra:
        return "nothing to train"
    if any(cost.seconds is None for cost in costs):
        return "too large to be timed on this machine; device-hours show after the first phases"
    of_one_trial = {cost.phase: cost.seconds or 0.0 for cost in costs}
    seconds = sum(cost.seconds or 0.0 for cost in costs) + extra * sum(of_one_trial.values())
    slot = study.slot
    replies = ", with replies as long as they may be" if any(cost.has_replies for cost in costs) else ""
    return (
        f"about {seconds / 3600:.2g} device-hours without evaluation: {_minutes(seconds / num)} on {num} slots of "
        f"{slot.workers} x ({slot.cpus:g} cpu, {slot.gpus:g} gpu) (steps timed here{replies})"
    )


@dataclass
class StepTimer:
    """Times a step of each kind of phase, and the replies of each maker, once, on one thread of this machine's CPU."""

    data: Mapping[str, Prepared]
    shapes: Shapes
    _steps: dict[str, float | None] = field(default_factory=dict)
    _replies: dict[str, float] = field(default_factory=dict)

    def read(self, name: str) -> Prepared:
        return self.data.get(name) or next(iter(self.data.values()))

    def step_seconds(self, spec: TrialSpec, run: PhaseRun) -> float | None:
        """Seconds of one step, with fresh weights; None where a row alone is too large to try."""
        phase = spec.phases[run.phase]
        tokens = _tokens(self.read(pace_reading(spec, run)).train)
        # phases of one kind take nearly equally long for a step: tasks of about the same length do
        models = {m: spec.models[m].model_dump(mode="json", exclude={"init"}) for m in spec.models_of(run.phase)}
        own = phase.model_dump(mode="json", include={"train", "batch", "streams"})
        kind = digest([own, sorted(phase.terms), models, tokens.bit_length()])
        if kind not in self._steps:
            self._steps[kind] = self._time_step(spec, run, tokens)
        return self._steps[kind]

    def _time_step(self, spec: TrialSpec, run: PhaseRun, tokens: int) -> float | None:
        phase, streams = spec.phases[run.phase], streams_of(spec, run)
        stream = streams[phase.pace]
        num = len(self.read(pace_reading(spec, run)).train)
        used = dict.fromkeys(model for term in phase.terms.values() for model in term.reads)
        makers = {name for own in streams.values() for name in own.reply_models}
        passes = [*((model, 3 if model in phase.train else 1) for model in used), *((maker, 1) for maker in makers)]
        flops = sum(2 * num * self.shapes.num_parameters(spec.models[model], longest(spec)) for model, num in passes)
        if flops * tokens > PROBE_FLOPS:
            return None
        timed = phase.batch
        if flops * phase.batch * tokens > PROBE_FLOPS:
            timed = max(1, int(PART_FLOPS / (flops * tokens)))
        rows = torch.arange(min(timed, num))
        nets = {}
        for model in used:
            head = head_of(spec, run, model)
            config = self.shapes.config(spec.models[model], longest(spec))
            nets[model] = build.from_config(config, head.num_labels if head is not None else None)
            try:
                initialise(nets[model], Random(), name=model, seed=0)
            except Exception as error:  # a family whose own rule for its weights fails (xLSTM)
                raise ModelError(
                    f"{model} (a {config.model_type}) cannot be drawn: {configs.one_line(error)}"
                ) from None
        torch.set_num_threads(1)

        def step() -> None:
            for model, net in nets.items():
                read = self.read(spec.reading(stream.data, model))
                try:
                    with torch.set_grad_enabled(model in phase.train):
                        loss = _loss(
                            net, read.batch(rows, stream.corruption, seed=0), is_task=read.num_labels is not None
                        )
                    if model in phase.train:
                        loss.backward()  # type: ignore[no-untyped-call]
                except Exception as error:  # each family fails in its own way where text alone is not enough
                    about = f"{model} (a {net.config.model_type}) cannot read the data"
                    raise ModelError(f"{about}: {configs.one_line(error)}") from None

        step()  # warms up
        started = time.monotonic()
        step()
        return (time.monotonic() - started) * phase.batch / timed

    def reply_seconds(self, spec: TrialSpec, phase: Phase, stream: Stream) -> float:
        """Seconds of the replies of a step, each as long as it may be: for each maker a pass over the prompts, and a pass
        for each further token, timed on a few. (A teacher that verifies a draft's blocks takes less.)"""
        made = stream.replies
        assert made is not None
        seconds = 0.0
        for maker in made.models:
            shape = spec.models[maker].model_dump(mode="json", exclude={"init"})
            kind = digest([shape, made.model_dump(mode="json"), phase.batch, stream.data])
            if kind not in self._replies:
                net = build.from_config(self.shapes.config(spec.models[maker], longest(spec)))
                self._replies[kind] = _time_replies(net, made, self.read(spec.reading(stream.data, maker)), phase.batch)
            seconds += self._replies[kind]
        return seconds


def _loss(net: Any, batch: Any, *, is_task: bool) -> torch.Tensor:
    """Returns a loss whose step takes as long as those of training."""
    batch = batch.to("cpu")
    if is_task:
        return output_head.class_logits(net, batch.ids_BT, batch.mask_BT, batch.types_BT).square().mean()
    position_ids_BT = getattr(batch, "position_ids_BT", None)
    logits = output_head.logits_at(net, batch.ids_BT, batch.positions_N, position_ids_BT=position_ids_BT)
    return torch.nn.functional.cross_entropy(logits, batch.labels_N)


def _time_replies(net: Any, made: ReplySource, read: Prepared, num: int) -> float:
    batch = read.batch(torch.arange(min(num, len(read.train))), None, seed=0)
    assert isinstance(batch, ExchangeBatch)
    took = {}
    for tokens in dict.fromkeys((1, min(TIMED_TOKENS, made.max_tokens))):
        how = made.model_copy(update={"max_tokens": tokens})
        started = time.monotonic()
        sample(net, batch.prompts, how, GenerationContext((-1,), batch.pad_id, read.vocab_size, "cpu"), seed=0)  # fmt: skip
        took[tokens] = time.monotonic() - started
    most = max(took)
    return took[1] + (made.max_tokens - 1) * max(0.0, took[most] - took[1]) / max(1, most - 1)


def _tokens(train: Any) -> int:
    """Tokens of a sequence: packed ones are equally long; of a task's examples, the mean."""
    lengths = getattr(train, "lengths", None)
    return int(train.length if lengths is None else lengths.mean())


def _share_made(made: ReplySource, num_read: int, num_prompts: int) -> float:
    """Returns the share of the steps that make fresh replies; 1 where the share rises with the loss, which is not known yet."""
    fractions = [(i + 0.5) / 8 for i in range(8)]
    if isinstance(made.share, RisesWithLoss):
        shares = [1.0] * len(fractions)
    else:
        shares = [made.share.value_at(progress) for progress in fractions]
    if made.replay is not None:
        rest = max(0.0, 1 - made.replay.size / max(1, num_read))  # of the budget, from when it is full
        fresh = [1 - rest + rest * made.replay.fresh_share(progress) for progress in fractions]
        shares = [share * one for share, one in zip(shares, fresh, strict=True)]
    mean = sum(shares) / len(shares)
    if isinstance(made, Sampled) and made.once:
        mean = min(mean, num_prompts / max(1, num_read))
    return mean


def _existing_parent(storage: Storage) -> Path:
    path = storage.path()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
