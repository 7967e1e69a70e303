"""The one training loop: a phase, whatever its models, streams and terms. Knows no paper, no tracker and no Ray.

All randomness is a function of (seed, purpose, step), so a checkpoint holds no generator state and other models change no
draw. Only dropout depends on how a batch is cut into micro-batches.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from trainables import models, passes, remap
from trainables.data.corpus import Corpus
from trainables.data.tasks import Task
from trainables.evaluate import FLOPS, Scored, size_and_speed
from trainables.losses.schedules import can_be_zero, lr_factor, weight_at
from trainables.notice import Ask, Notice
from trainables.passes import Batch, units
from trainables.phases import (
    Instance,
    TaskHead,
    head_of,
    longest,
    num_steps,
    origin_of,
    phase_key,
    seed_of,
    streams_of,
)
from trainables.spec.data import Tasks
from trainables.spec.models import Remap
from trainables.spec.phase import Phase
from trainables.spec.terms import CrossEntropy, Inner, OffWhenBetter, reads, target
from trainables.spec.trial import TrialSpec
from trainables.spec.value import random_stream
from trainables.store import (
    EXAMPLES,
    Corrupt,
    PhaseStore,
    Published,
    Storage,
    drop_checkpoints,
    load_checkpoint,
    log,
    save_checkpoint,
)
from trainables.streams import Reader, open_reader

Record = dict[str, Any]
Autocast = Callable[[], AbstractContextManager[Any]]
CHECK_EVERY = 25  # steps between looks at whether the loss is still a number


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


class Alone:
    """One process."""

    rank, world = 0, 1

    def agree(self, value: Any) -> Any:
        return value

    def total(self, values: list[float]) -> list[float]:
        return values


class Diverged(Exception):
    """The loss is no number any more. An outcome of the trial, not a fault of the machine."""


class Stopped(BaseException):
    """The scheduler ended this trial, on all ranks; no error, and nothing that handles errors may take it."""


class Left(BaseException):
    """The trial was asked to leave, and its checkpoint is written. On all ranks; nothing that handles errors may take it."""

    def __init__(self, asked: Ask) -> None:
        super().__init__(asked)
        self.asked = asked


@dataclass(frozen=True)
class Surroundings:
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
class Run:
    """A trial on its way: what it is, what it reads, where it writes."""

    spec: TrialSpec  # pruned
    fingerprints: Mapping[str, str]
    data: Mapping[str, Corpus | Task]
    store: PhaseStore
    at: Surroundings
    session: Session
    emit: Callable[[list[Record]], None]

    def key(self, instance: Instance) -> str:
        return phase_key(self.spec, instance, self.fingerprints)

    @property
    def autocast(self) -> Autocast:
        if self.spec.precision == "fp32":
            return nullcontext
        return lambda: torch.autocast(torch.device(self.at.device).type, dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------------------- making models


def make(run: Run, instance: Instance, name: str, head: TaskHead | None) -> Any:
    """The model as it is when the instance starts: from an earlier phase, from pretrained weights, remapped, or fresh.

    `head`: of a task, drawn anew unless the model had it before; None: of a language model. A remap's source has the same.
    """
    spec, model = run.spec, run.spec.models[name]
    origin, seed = origin_of(spec, instance, name), seed_of(spec, instance.phase)
    num_labels = head.num_labels if head is not None else None
    if origin is not None:
        key = run.key(origin.instance)
        published = run.store.find(key)
        if published is None:
            raise Corrupt(key, "is not there")
        config, weights = published.configs[name], run.store.weights(key, origin.entry)
        if head == head_of(spec, origin.instance, name):
            return models.restore(config, weights)
        return models.with_head(config, weights, num_labels, models.initial(model), name=name, seed=seed)
    data = next(iter(run.data.values()))
    net = models.build(
        model,
        name=name,
        seed=seed,
        vocab_size=data.vocab_size,
        special_ids=models.special_ids(data.tokenizer),
        length=longest(spec),
        num_labels=num_labels,
    )
    if isinstance(model.init, Remap):
        source = make(run, instance, model.init.from_, head)
        layers = remap.check(model.init.depth, source.config, net.config, model.init.width)
        remap.apply(source, net, layers, model.init.width)
    return net


# ------------------------------------------------------------------------------------------------------------ the loop


@dataclass
class _Progress:
    """Everything a phase needs to go on, beside models and optimizer; saved whole in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    records: list[Record] = field(default_factory=list)
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # weights kept on the way
    latched: dict[str, bool] = field(default_factory=dict)  # off-switches that have switched off
    flops_of: dict[str, float] = field(default_factory=dict)  # per padded token, by the terms that are live and lengths
    sums: dict[str, float] = field(default_factory=dict)  # of each term since the last record, over all ranks
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class _Phase:
    """A phase on its way."""

    run: Run
    instance: Instance
    spec: Phase
    seed: int
    streams: Mapping[str, Reader]
    models: passes.Models
    optimizer: torch.optim.Optimizer
    total: int  # optimizer steps
    progress: _Progress
    micro: int  # sequences of one forward
    local: dict[str, Tensor] = field(default_factory=dict)  # sums of each term on this rank since they were added up
    scored: dict[tuple[str, str], Scored] = field(default_factory=dict)  # on test at the end, by model and stream

    @property
    def nets(self) -> Mapping[str, Any]:
        return self.models.nets


def train_phase(run: Run, instance: Instance) -> Published:
    """Trains a phase from its start or its furthest checkpoint, and publishes it."""
    at, key = run.at, run.key(instance)
    phase = _begin(run, instance)
    if run.session.world > 1 and at.device.startswith("cuda"):
        _fit_micro(phase)
    progress, spec, total = phase.progress, phase.spec, phase.total
    evaluate_at = {_step_of(fraction, total): fraction for fraction in spec.evaluate}
    pulse = _Pulse(phase)
    if progress.records:
        run.emit(list(progress.records))
    elif 0 in evaluate_at and progress.step == 0:
        _look(phase, evaluate_at[0])
    started = time.monotonic()
    while progress.step < total:
        _step(phase)
        if progress.step % CHECK_EVERY == 0:
            _add_up(phase)
        for fraction in spec.keep:
            if progress.step == _step_of(fraction, total) and run.session.rank == 0:
                for name in spec.train:
                    weights = models.weights_of(phase.nets[name])
                    progress.files[f"{name}@{fraction:g}"] = run.store.put_weights(key, weights)
        is_due, asked = pulse.take()
        if progress.step in evaluate_at or is_due or asked:
            _add_up(phase)
            progress.seconds += time.monotonic() - started  # without evaluation and checkpoints
            if progress.step in evaluate_at:
                _look(phase, evaluate_at[progress.step])
            if is_due or asked:
                _checkpoint(phase)
                pulse.checkpointed()
            if asked:
                log.info("phase %s: left at step %d of %d (%s)", instance, progress.step, total, asked)
                raise Left(asked)
            started = time.monotonic()
    for model, stream in _scored(phase):  # a trial that was killed between the last look and here
        if (model, stream) not in phase.scored:
            phase.scored[model, stream] = _score(phase, model, phase.streams[stream], "test")
    published = run.session.agree(_publish(phase, key) if run.session.rank == 0 else None)
    return published  # type: ignore[no-any-return]


class _Pulse:
    """After each step: whether a checkpoint is due and whether the trial is asked to leave, on all ranks alike.

    The ranks' clocks differ and asking each other costs, so several ranks ask about once a second, at steps on which
    they have agreed.
    """

    ASKS: tuple[Ask, ...] = ("stop", "leave", "terminated")  # what counts where ranks are asked different things

    def __init__(self, phase: _Phase) -> None:
        self.phase, self.saved = phase, time.monotonic()
        self.next, self.last = phase.progress.step + 1, (phase.progress.step, time.monotonic())

    def checkpointed(self) -> None:
        self.saved = time.monotonic()

    def take(self) -> tuple[bool, Ask | None]:
        step, session, now = self.phase.progress.step, self.phase.run.session, time.monotonic()
        asked = self.phase.run.at.notice.look()
        is_due = now - self.saved > self.phase.run.at.checkpoint_seconds
        if session.world == 1:
            return is_due, asked
        if step < self.next:
            return False, None
        stride = (step - self.last[0]) / max(now - self.last[1], 1e-3)  # steps of a second
        self.last = (step, now)
        first = float(session.rank == 0)
        mine = [first * is_due, first * min(max(round(stride), 1), 1000), *(float(asked == ask) for ask in self.ASKS)]
        due, stride, *asks = session.total(mine)
        self.next = step + int(stride)
        return due > 0, next((ask for ask, count in zip(self.ASKS, asks, strict=True) if count), None)


def _publish(phase: _Phase, key: str) -> Published:
    """Weights and records into the store; the optimizer's state goes."""
    run, spec, progress, at = phase.run, phase.spec, phase.progress, phase.run.at
    files = {name: run.store.put_weights(key, models.weights_of(phase.nets[name])) for name in spec.train}
    published = Published(
        key=key,
        files={**progress.files, **files},
        configs={name: models.plain_config(phase.nets[name].config) for name in spec.train},
        records=tuple(progress.records),
        cost={
            "steps": phase.total,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "device_seconds": progress.seconds * run.session.world,
            "flops": progress.flops,
        },
        provenance={**at.provenance, "trial": at.trial, "finished": int(time.time() * 1000)},
        examples=run.store.put_examples(key, _examples(phase)),
    )
    published = run.store.publish(published)
    for folder in (*at.earlier, at.folder):
        drop_checkpoints(at.storage, folder)
    return published


def _step_of(fraction: float, total: int) -> int:
    """The step after which a fraction of the budget is spent; only the fraction 0 is before the first."""
    return max(1, round(fraction * total)) if fraction else 0


def _begin(run: Run, instance: Instance) -> _Phase:
    """Models, optimizer and, where the phase was interrupted, the state in which it was."""
    spec, at, seed = run.spec.phases[instance.phase], run.at, seed_of(run.spec, instance.phase)
    streams, flops = _readers(run, instance, seed)
    read = dict.fromkeys(model for term in spec.terms.values() for model in reads(term))
    nets = {name: make(run, instance, name, head_of(run.spec, instance, name)).to(at.device) for name in read}
    for name, net in nets.items():
        net.train(name in spec.train).requires_grad_(name in spec.train)
        for on in {term.on for term in spec.terms.values() if name in reads(term)}:
            if streams[on].num_labels is None:
                models.check_stream(net.config, streams[on].spec.corruption, name)
            else:
                models.check_task(net.config, name)
    passes.check_inner(spec.terms, nets)
    projectors = passes.make_projectors(spec.terms, nets, seed=seed, phase=str(instance))
    language = [name for name in nets if head_of(run.spec, instance, name) is None]
    with run.autocast():
        heads = {name: models.head_of(nets[name]) for name in language}
    called = passes.Models(nets, frozenset(spec.train), heads, projectors=projectors)
    learning = {name: module.to(at.device) for name, module in called.learning.items()}
    called = replace(called, wrapped=learning)
    if any(isinstance(term, Inner) for term in spec.terms.values()):
        _freeze_unreached(run, instance, called, streams)
    if run.session.world > 1:
        called = replace(called, wrapped={name: _wrap(net, at.device) for name, net in learning.items()})
    optimizer = _optimizer(spec, learning)
    total = num_steps(spec, length=streams[spec.pace].length, num_sequences=streams[spec.pace].num)
    progress = _Progress(flops=flops)
    saved = load_checkpoint(at.storage, (*at.earlier, at.folder), run.key(instance))
    if saved is not None:
        for name, state in saved.pop("models").items():
            learning[name].load_state_dict(state)
        optimizer.load_state_dict(saved.pop("optimizer"))
        progress = _Progress(**{key: value for key, value in saved.items() if key != "key"})
    log.info("phase %s: from step %d of %d (%s)", instance, progress.step, total, run.key(instance))
    if spec.batch % run.session.world:
        raise ValueError(f"phase {instance}: a batch of {spec.batch} cannot be shared by {run.session.world} workers")
    micro = min(spec.batch // run.session.world, at.micro_batch or spec.batch)
    return _Phase(run, instance, spec, seed, streams, called, optimizer, total, progress, micro)


def _freeze_unreached(run: Run, instance: Instance, called: passes.Models, streams: Mapping[str, Reader]) -> None:
    """What no term's gradient reaches does not learn: what stands above the last layer that a term inside a model reads.

    Several ranks would wait for its gradient in vain; a pass over one sequence tells. For the same reason they need terms
    that are there at every step.
    """
    spec, device, seed = run.spec.phases[instance.phase], run.at.device, seed_of(run.spec, instance.phase)
    passing = [name for name, term in spec.terms.items() if can_be_zero(term.weight)]
    if passing and run.session.world > 1:
        raise ValueError(
            f"phase {instance}: beside terms inside models {passing[0]} may not reach 0 on several workers"
        )
    batches = {name: stream.batch(0, spec.batch, seed, str(instance)) for name, stream in streams.items()}
    parts = {name: batch.rows(0, 1).to(device) for name, batch in batches.items()}
    how: dict[str, Any] = {"device": device, "autocast": run.autocast, "dropout": lambda *_: 0}
    loss, _ = passes.run_terms(called, spec.terms, parts, dict.fromkeys(spec.terms, 1.0), **how)
    loss.backward()  # type: ignore[no-untyped-call]
    for module in called.wrapped.values():
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None


def _readers(run: Run, instance: Instance, seed: int) -> tuple[dict[str, Reader], float]:
    """The streams of an instance, and the FLOPs of making their labels."""
    readers, flops = dict[str, Reader](), 0.0
    for name, stream in streams_of(run.spec, instance).items():
        data = run.spec.data[stream.data]
        head = TaskHead(stream.data, data.num_labels, False) if isinstance(data, Tasks) else None
        readers[name], spent = open_reader(
            name,
            stream,
            run.data[stream.data],
            lambda model, head=head: make(run, instance, model, head),  # type: ignore[misc]
            seed=seed,
            phase=str(instance),
            device=run.at.device,
            autocast=run.autocast,
        )
        flops += spent
    return readers, flops


def _fit_micro(phase: _Phase) -> None:
    """Halves the micro-batch until a forward and backward of it fits on every rank.

    One rank can do so in the middle of a step; several cannot, since the others wait for its gradients. So they find out
    beforehand, by the first micro-batch of the next step, without the wrapper that exchanges gradients.
    """
    session, spec = phase.run.session, phase.spec
    batches = {
        n: s.batch(phase.progress.step, spec.batch, phase.seed, str(phase.instance)) for n, s in phase.streams.items()
    }
    alone = replace(phase, models=replace(phase.models, wrapped={}))
    while True:
        failed: BaseException | None = None
        parts = {n: batch.rows(0, phase.micro).to(phase.run.at.device) for n, batch in batches.items()}
        try:
            _run(alone, spec.terms, parts, dict.fromkeys(spec.terms, 1.0), 0)[0].backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = error
        phase.optimizer.zero_grad(set_to_none=True)
        if not session.total([float(failed is not None)])[0]:
            return
        if phase.micro == 1:
            raise torch.OutOfMemoryError(str(failed) if failed else "another rank has no memory for one sequence")
        phase.micro = max(1, phase.micro // 2)
        log.warning("out of memory: micro-batch of %d sequences", phase.micro)
        torch.cuda.empty_cache()


def _wrap(net: Any, device: str) -> Any:
    """Gradients of a trained model are averaged over ranks while the backward runs; frozen ones stay as they are."""
    return DistributedDataParallel(net, device_ids=[torch.cuda.current_device()] if device.startswith("cuda") else None)


def _optimizer(spec: Phase, learning: Mapping[str, Any]) -> torch.optim.Optimizer:
    """One AdamW with groups per model: matrices decay, vectors (norms, biases) do not. A term's projector learns with the
    model that it projects."""
    groups: list[dict[str, Any]] = []
    for name in spec.train:
        o = spec.optimizer_of(name)
        parameters = _parameters(spec, learning, name)
        common = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "model": name}
        groups.append({**common, "params": [p for p in parameters if p.ndim >= 2], "weight_decay": o.decay})
        groups.append({**common, "params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def _parameters(spec: Phase, learning: Mapping[str, Any], model: str) -> list[Any]:
    beside = [passes.projector_of(name) for name, term in spec.terms.items() if target(term) == model]
    return [p for name in (model, *beside) if name in learning for p in learning[name].parameters() if p.requires_grad]


def _step(phase: _Phase) -> None:
    """One optimizer step over the global batch."""
    spec, progress, step = phase.spec, phase.progress, phase.progress.step
    for group in phase.optimizer.param_groups:
        rule = spec.optimizer_of(group["model"])
        group["lr"] = rule.lr * lr_factor(rule, step, phase.total)
    weights = {
        name: weight_at(term.weight, step / phase.total, off=progress.latched.get(name, False))
        for name, term in spec.terms.items()
    }
    batches = {
        name: stream.batch(step, spec.batch, phase.seed, str(phase.instance))
        for name, stream in phase.streams.items()
        if any(term.on == name and weights[n] for n, term in spec.terms.items())
    }
    flops = progress.flops
    while True:
        try:
            sums = _backward(phase, weights, batches)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or phase.micro == 1 or phase.run.session.world > 1:
                raise
            progress.flops = flops
            phase.micro = max(1, phase.micro // 2)
            log.warning("out of memory: micro-batch halved to %d sequences", phase.micro)
            phase.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # does nothing without a device
    for name in spec.train:
        clip = spec.optimizer_of(name).clip
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(_parameters(spec, phase.models.wrapped, name), clip)
    phase.optimizer.step()
    phase.optimizer.zero_grad(set_to_none=True)
    for (
        name,
        value,
    ) in sums.items():  # in double precision sums of floats are exact, so it is equal when they are added up
        phase.local[name] = phase.local[name] + value if name in phase.local else value
        term = spec.terms[name]
        progress.counts[name] = progress.counts.get(name, 0) + units(term, batches[term.on])
    progress.tokens += sum(batch.num_tokens for batch in batches.values())
    progress.step += 1


def _backward(phase: _Phase, weights: Mapping[str, float], batches: Mapping[str, Batch]) -> dict[str, Tensor]:
    """Gradients of one step, over micro-batches of this rank's share. Each model runs once per stream.

    Returns each term's sum over the share, detached. Gradients are averaged over ranks by whoever wraps the models, so
    the loss, divided by the units of the *global* batch, is multiplied by their number.
    """
    spec, device, session = phase.spec, phase.run.at.device, phase.run.session
    share = spec.batch // session.world
    first, last = session.rank * share, (session.rank + 1) * share
    live = {name: term for name, term in spec.terms.items() if weights[name]}
    scale = {name: weights[name] / units(term, batches[term.on]) for name, term in live.items()}
    sums: dict[str, Tensor] = {}
    for low in range(first, last, phase.micro):
        high = min(low + phase.micro, last)
        parts = {name: batch.rows(low, high).to(device) for name, batch in batches.items()}
        with _counting(phase.progress, live, parts, session.world), _synchronised(phase, high == last):
            loss, found = _run(phase, live, parts, scale, low)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.double()
            if live:  # else every weight is zero just now
                (loss * session.world).backward()  # type: ignore[no-untyped-call]
    return sums


def _run(
    phase: _Phase, live: Mapping[str, Any], parts: Mapping[str, Batch], scale: Mapping[str, float], low: int
) -> tuple[Tensor, dict[str, Tensor]]:
    def dropout(model: str, stream: str) -> int:
        where = (str(phase.instance), model, stream, phase.progress.step, low)
        return random_stream(phase.seed, "dropout", *where)

    how: dict[str, Any] = {"device": phase.run.at.device, "autocast": phase.run.autocast, "dropout": dropout}
    return passes.run_terms(phase.models, live, parts, scale, **how)


@contextmanager
def _synchronised(phase: _Phase, is_last: bool) -> Iterator[None]:
    """Ranks exchange gradients once a step, with the last micro-batch."""
    with ExitStack() as stack:
        if phase.run.session.world > 1 and not is_last:
            for wrapped in phase.models.wrapped.values():
                stack.enter_context(wrapped.no_sync())
        yield


@contextmanager
def _counting(progress: _Progress, live: Mapping[str, Any], parts: Mapping[str, Batch], world: int) -> Iterator[None]:
    """Adds the FLOPs of a micro-batch, over all ranks: counted once for live terms and lengths to the next multiple of 8,
    then per padded token."""
    which = f"{','.join(sorted(live))} {'x'.join(str(-(-part.ids_BT.shape[1] // 8)) for part in parts.values())}"
    tokens = sum(part.ids_BT.numel() for part in parts.values())
    if which in progress.flops_of:
        yield
    else:
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            yield
        progress.flops_of[which] = counter.get_total_flops() / max(1, tokens)
    progress.flops += progress.flops_of[which] * tokens * world


# ----------------------------------------------------------------------------------------------------- looking, keeping


def _look(phase: _Phase, fraction: float) -> None:
    """Evaluates, turns off-switches, reports."""
    records, losses = _records(phase, fraction)
    for name, term in phase.spec.terms.items():
        if isinstance(term.weight, OffWhenBetter) and not phase.progress.latched.get(name):
            assert not isinstance(term, CrossEntropy)
            for model in (term.from_, term.to):
                if (model, term.on) not in losses:
                    losses[model, term.on] = _loss(_score(phase, model, phase.streams[term.on], "dev").metrics)
            phase.progress.latched[name] = losses[term.to, term.on] < losses[term.from_, term.on]
            if phase.progress.latched[name]:
                log.info("%s is off from step %d on", name, phase.progress.step)
    phase.progress.records += records
    if phase.run.at.checkpoint_at_reports:
        _checkpoint(phase)
    phase.run.emit(records)


def _records(phase: _Phase, fraction: float) -> tuple[list[Record], dict[tuple[str, str], float]]:
    """Numbers at one point of the budget, and the dev loss by model and stream."""
    progress, spec = phase.progress, phase.spec
    common = {
        "phase": phase.instance.phase,
        "step": progress.step,
        "progress": fraction,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "device_seconds": progress.seconds * phase.run.session.world,
        "flops": progress.flops,
        "t": int(time.time() * 1000),
    }
    records: list[Record] = []

    def add(model: str, task: str, split: str, metric: str, value: float) -> None:
        records.append({**common, "model": model, "task": task, "split": split, "metric": metric, "value": value})

    for name, term in spec.terms.items():
        if progress.counts.get(name):
            mean = progress.sums[name] / progress.counts[name]
            add(target(term), phase.streams[term.on].spec.data, "train", name, mean)
    progress.sums, progress.counts = {}, {}
    if fraction == 1:
        for stream in phase.streams.values():
            labellers = ",".join(stream.spec.labels.of) if stream.spec.labels else ""
            for metric, value in stream.about.items():
                add(labellers, stream.spec.data, "train", metric, value)
    losses: dict[tuple[str, str], float] = {}
    for model, name in _scored(phase):
        stream = phase.streams[name]
        for split in ("dev", "test"):
            found = _score(phase, model, stream, split)
            if split == "test" and fraction == 1:
                phase.scored[model, name] = found
            for metric, value in found.metrics.items():
                add(model, stream.spec.data, split, metric, value)
            if split == "dev":
                losses[model, name] = _loss(found.metrics)
                if not math.isfinite(losses[model, name]):  # the last update broke what the train loss still saw whole
                    what = f"the dev loss of {model} is {losses[model, name]} at step {progress.step}"
                    raise Diverged(f"phase {phase.instance}: {what}")
    if fraction == 1:
        for model, name in dict(_scored(phase)).items():
            stream, at = phase.streams[name], phase.run
            how: dict[str, Any] = {"is_task": stream.num_labels is not None, "device": at.at.device}
            sizes = size_and_speed(phase.nets[model], length=stream.length, autocast=at.autocast, **how)
            for metric, value in sizes.items():
                add(model, stream.spec.data, "system", metric, value)
    machine = {"peak_memory": peak_memory(phase.run.at.device)}
    if progress.seconds > 0:
        machine["tokens_per_second"] = progress.tokens / progress.seconds
    for metric, value in machine.items():
        add(",".join(spec.train), next(iter(phase.streams.values())).spec.data, "system", metric, value)
    return records, losses


def _scored(phase: _Phase) -> list[tuple[str, str]]:
    """Trained models with the streams that they read."""
    terms = phase.spec.terms.values()
    return [
        (model, name)
        for model in phase.spec.train
        for name in phase.streams
        if any(term.on == name and model in reads(term) for term in terms)
    ]


def _score(phase: _Phase, model: str, stream: Reader, split: Any) -> Scored:
    at = phase.run
    at.at.notice.look()
    return stream.score(phase.nets[model], split, device=at.at.device, autocast=at.autocast, session=at.session)


def _examples(phase: _Phase) -> dict[str, list[Any]]:
    """The scores of each example of test, as columns."""
    columns: dict[str, list[Any]] = {name: [] for name in EXAMPLES.names}
    for (model, stream), scored in phase.scored.items():
        num = len(scored.losses_E)
        unknown = [None] * num
        values = {
            "model": [model] * num,
            "task": [phase.streams[stream].spec.data] * num,
            "split": ["test"] * num,
            "part": [0] * num if scored.parts_E is None else scored.parts_E.tolist(),
            "example": list(range(num)),
            "label": unknown if scored.labels_E is None else scored.labels_E.tolist(),
            "prediction": unknown if scored.predictions_E is None else scored.predictions_E.tolist(),
            "loss": scored.losses_E.tolist(),
            "count": scored.counts_E.astype(int).tolist(),
        }
        for name, column in values.items():
            columns[name] += column
    return columns


def _loss(found: Mapping[str, float]) -> float:
    return next(value for metric, value in found.items() if metric.endswith("_loss"))  # of each kind of data


def _add_up(phase: _Phase) -> None:
    """Takes the terms' sums off the devices and over all ranks. Raises Diverged, on all ranks alike."""
    names = sorted(phase.spec.terms)
    sums = phase.run.session.total([float(phase.local.get(name, 0.0)) for name in names])
    for name, value in zip(names, sums, strict=True):
        if not math.isfinite(value):
            raise Diverged(f"phase {phase.instance}: {name} is {value} by step {phase.progress.step}")
        phase.progress.sums[name] = phase.progress.sums.get(name, 0.0) + value
    phase.local.clear()


def _checkpoint(phase: _Phase) -> None:
    if phase.run.session.rank == 0:
        state = {name: getattr(phase.progress, name) for name in _Progress.__dataclass_fields__}
        state |= {"key": phase.run.key(phase.instance), "optimizer": phase.optimizer.state_dict()}
        state["models"] = {name: net.state_dict() for name, net in phase.models.learning.items()}
        save_checkpoint(phase.run.at.storage, phase.run.at.folder, state, room=phase.run.at.checkpoint_bytes)
    phase.run.at.notice.look()


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
