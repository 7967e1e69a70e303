"""The one training loop: a phase, whatever its models, streams and terms. Knows no paper, no tracker and no Ray.

All randomness is a function of (seed, purpose, step), so a checkpoint holds no generator state and other models change no
draw. Only dropout depends on how a batch is cut into micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainables.config.terms import CrossEntropy, InterpolatedKL, OffWhenBetter, Term
from trainables.config.value import random_stream
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.evaluation.model_size import FLOPS
from trainables.generation.sample import Generation
from trainables.models import build, lora
from trainables.storage.checkpoints import drop_checkpoints, save_checkpoint
from trainables.storage.files import log
from trainables.storage.phase_store import StoredPhase
from trainables.training import controllers, forward, on_policy
from trainables.training.forward import Batch, units
from trainables.training.phase_graph import PhaseRun
from trainables.training.records import examples_of, loss_of, records_of, score
from trainables.training.schedules import lr_factor, weight_at
from trainables.training.setup import begin, parameters_of
from trainables.training.state import (
    Diverged,
    PhaseState,
    Progress,
    Suspended,
    TrialContext,
    is_out_of_memory,
    reader_of,
    scored_of,
)
from trainables.training.stop_signals import Ask

CHECK_EVERY = 25  # steps between looks at whether the loss is still a number


def train_phase(run: TrialContext, instance: PhaseRun) -> StoredPhase:
    """Trains a phase from its start or its furthest checkpoint, and publishes it."""
    at, key = run.at, run.key(instance)
    phase = begin(run, instance)
    if run.session.world > 1 and at.device.startswith("cuda"):
        _fit_micro(phase)
    progress, spec, total = phase.progress, phase.spec, phase.total
    evaluate_at = {_step_of(fraction, total): fraction for fraction in spec.evaluate}
    pulse = _Pulse(phase)
    if progress.records:
        run.emit(list(progress.records))
    elif 0 in evaluate_at and progress.step == 0:
        evaluate(phase, evaluate_at[0])
    started = time.monotonic()
    while progress.step < total:
        _step(phase)
        if progress.step % CHECK_EVERY == 0:
            _add_up(phase)
        for fraction in spec.save_at:
            if progress.step == _step_of(fraction, total) and run.session.rank == 0:
                for name in spec.train:
                    weights = _weights(phase.nets[name])
                    progress.files[f"{name}@{fraction:g}"] = run.store.put_weights(key, weights)
        is_due, asked = pulse.take()
        if progress.step in evaluate_at or is_due or asked:
            _add_up(phase)
            progress.seconds += time.monotonic() - started  # without evaluation and checkpoints
            if progress.step in evaluate_at:
                evaluate(phase, evaluate_at[progress.step])
            if is_due or asked:
                _checkpoint(phase)
                pulse.checkpointed()
            if asked:
                log.info("phase %s: left at step %d of %d (%s)", instance, progress.step, total, asked)
                raise Suspended(asked)
            started = time.monotonic()
    for model, stream in scored_of(phase):  # a trial that was killed between the last look and here
        if (model, stream) not in phase.scored:
            phase.scored[model, stream] = score(phase, model, reader_of(phase, stream), "test")
    published = run.session.agree(_publish(phase, key) if run.session.rank == 0 else None)
    return published  # type: ignore[no-any-return]


class _Pulse:
    """After each step: whether a checkpoint is due and whether the trial is asked to leave, on all ranks alike.

    The ranks' clocks differ and asking each other costs, so several ranks ask about once a second, at steps on which
    they have agreed.
    """

    ASKS: tuple[Ask, ...] = ("stop", "leave", "terminated")  # what counts where ranks are asked different things

    def __init__(self, phase: PhaseState) -> None:
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


def _publish(phase: PhaseState, key: str) -> StoredPhase:
    """Weights and records into the store; the optimizer's state goes."""
    run, spec, progress, at = phase.run, phase.spec, phase.progress, phase.run.at
    files = {name: run.store.put_weights(key, _weights(phase.nets[name])) for name in spec.train}
    published = StoredPhase(
        key=key,
        files={**progress.files, **files},
        configs={name: build.plain_config(phase.nets[name].config) for name in spec.train},
        records=tuple(progress.records),
        cost={
            "steps": phase.total,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "device_seconds": progress.seconds * run.session.world,
            "flops": progress.flops,
        },
        provenance={**at.provenance, "trial": at.trial, "finished": int(time.time() * 1000)},
        examples=run.store.put_examples(key, examples_of(phase)),
    )
    published = run.store.publish(published)
    for folder in (*at.earlier, at.folder):
        drop_checkpoints(at.storage, folder)
    return published


def _weights(net: Any) -> dict[str, Tensor]:
    """What goes on: of the family's own class, whatever was attached for the training."""
    return lora.merged(net) if lora.is_attached(net) else build.weights_of(net)


def _step_of(fraction: float, total: int) -> int:
    """The step after which a fraction of the budget is spent; only the fraction 0 is before the first."""
    return max(1, round(fraction * total)) if fraction else 0


def _fit_micro(phase: PhaseState) -> None:
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


def _step(phase: PhaseState) -> None:
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
        name: _read(phase, name)
        for name in phase.streams
        if any(term.on == name and weights[n] for n, term in spec.terms.items())
    }
    terms = {name: _now(term, name, progress) for name, term in spec.terms.items()}
    flops = progress.flops
    while True:
        try:
            sums = _backward(phase, terms, weights, batches)
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
        clip = spec.optimizer_of(name).max_grad_norm
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters_of(spec, phase.models.wrapped, name), clip)
    phase.optimizer.step()
    phase.optimizer.zero_grad(set_to_none=True)
    for (
        name,
        value,
    ) in sums.items():  # in double precision sums of floats are exact, so it is equal when they are added up
        phase.local[name] = phase.local[name] + value if name in phase.local else value
        term = spec.terms[name]
        num = units(term, batches[term.on])
        progress.counts[name] = progress.counts.get(name, 0) + num
        if isinstance(term, InterpolatedKL):  # the same on all ranks, or their targets would part
            (total,) = phase.run.session.total([float(value)])
            state = progress.targets[name]
            progress.targets[name] = controllers.taid_step(term, state, total / num, step / phase.total)
    progress.tokens += sum(batch.num_tokens for batch in batches.values())
    progress.step += 1


def _now(term: Term, name: str, progress: Progress) -> Term:
    """The term as it is at this step, where its target moves."""
    return term.model_copy(update={"start": progress.targets[name]["t"]}) if isinstance(term, InterpolatedKL) else term


def _read(phase: PhaseState, name: str) -> Any:
    """The global batch of a stream at this step; its replies are those of the data, or made."""
    stream, progress, step = phase.streams[name], phase.progress, phase.progress.step
    drawn = (step, phase.spec.batch, phase.seed, str(phase.instance))
    if stream.spec.replies is None:
        return stream.batch(*drawn)
    assert isinstance(stream.data, ExchangeSet)
    session, at, indices = phase.run.session, phase.run.at, stream.indices(*drawn)
    batch = stream.data.train.rows(indices)
    by = on_policy.GenerationContext(
        nets=phase.nets,
        end_id=stream.data.end_id,
        pad_id=batch.pad_id,
        vocab_size=stream.data.vocab_size,
        length=stream.length,
        device=at.device,
        autocast=phase.run.autocast,
        rank=session.rank,
        world=session.world,
        gather=session.gather,
        within_memory=lambda draw: _within_memory(phase, draw),
    )
    where = on_policy.Step(phase.seed, str(phase.instance), name, step, step / phase.total)
    batch, computed = on_policy.made(stream.spec.replies, progress.made[name], batch, indices.tolist(), where, by)
    progress.flops += sum(phase.token_flops[model] * num for model, num in computed.items())
    return batch


def _within_memory(phase: PhaseState, draw: Callable[[int], Generation]) -> Generation:
    """What `draw` gives with so many prompts at a time; half as many from now on whenever memory runs out.

    Each rank does so by itself: until the replies are there it waits for no other.
    """
    while True:
        try:
            return draw(phase.at_once)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or phase.at_once == 1:
                raise
        phase.at_once = max(1, phase.at_once // 2)  # here, where the error no longer holds what was computed
        log.warning("out of memory: replies to %d prompts at a time", phase.at_once)
        torch.cuda.empty_cache()


def _backward(
    phase: PhaseState, terms: Mapping[str, Term], weights: Mapping[str, float], batches: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Gradients of one step, over micro-batches of this rank's share. Each model runs once per stream.

    Returns each term's sum over the share, detached. Gradients are averaged over ranks by whoever wraps the models, so
    the loss, divided by the units of the *global* batch, is multiplied by their number.
    """
    device, session = phase.run.at.device, phase.run.session
    share = phase.spec.batch // session.world
    first, last = session.rank * share, (session.rank + 1) * share
    live = {name: term for name, term in terms.items() if weights[name]}
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
    phase: PhaseState, live: Mapping[str, Any], parts: Mapping[str, Batch], scale: Mapping[str, float], low: int
) -> tuple[Tensor, dict[str, Tensor]]:
    def dropout(model: str, stream: str) -> int:
        where = (str(phase.instance), model, stream, phase.progress.step, low)
        return random_stream(phase.seed, "dropout", *where)

    how: dict[str, Any] = {"device": phase.run.at.device, "autocast": phase.run.autocast, "dropout": dropout}
    return forward.run_terms(phase.models, live, parts, scale, **how)


@contextmanager
def _synchronised(phase: PhaseState, is_last: bool) -> Iterator[None]:
    """Ranks exchange gradients once a step, with the last micro-batch."""
    with ExitStack() as stack:
        if phase.run.session.world > 1 and not is_last:
            for wrapped in phase.models.wrapped.values():
                stack.enter_context(wrapped.no_sync())
        yield


@contextmanager
def _counting(progress: Progress, live: Mapping[str, Any], parts: Mapping[str, Batch], world: int) -> Iterator[None]:
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


def evaluate(phase: PhaseState, fraction: float) -> None:
    """Evaluates, turns off-switches, reports."""
    records, losses = records_of(phase, fraction)
    for name, term in phase.spec.terms.items():
        if isinstance(term.weight, OffWhenBetter) and not phase.progress.latched.get(name):
            assert not isinstance(term, CrossEntropy)
            for model in (term.from_, term.to):
                if (model, term.on) not in losses:
                    losses[model, term.on] = loss_of(score(phase, model, phase.streams[term.on], "dev").metrics)
            phase.progress.latched[name] = losses[term.to, term.on] < losses[term.from_, term.on]
            if phase.progress.latched[name]:
                log.info("%s is off from step %d on", name, phase.progress.step)
    for name, state in phase.progress.made.items():
        made = phase.spec.streams[name].replies
        assert made is not None
        loss = next(losses[model, name] for model in (*made.makers, *phase.spec.train) if (model, name) in losses)
        state["share"] = controllers.share_look(made.share, state["share"], loss)
    phase.progress.records += records
    if phase.run.at.checkpoint_at_reports:
        _checkpoint(phase)
    phase.run.emit(records)


def _add_up(phase: PhaseState) -> None:
    """Takes the terms' sums off the devices and over all ranks. Raises Diverged, on all ranks alike."""
    names = sorted(phase.spec.terms)
    sums = phase.run.session.total([float(phase.local.get(name, 0.0)) for name in names])
    for name, value in zip(names, sums, strict=True):
        if not math.isfinite(value):
            raise Diverged(f"phase {phase.instance}: {name} is {value} by step {phase.progress.step}")
        phase.progress.sums[name] = phase.progress.sums.get(name, 0.0) + value
    phase.local.clear()


def _checkpoint(phase: PhaseState) -> None:
    if phase.run.session.rank == 0:
        state = {name: getattr(phase.progress, name) for name in Progress.__dataclass_fields__}
        state |= {"key": phase.run.key(phase.instance), "optimizer": phase.optimizer.state_dict()}
        state["models"] = {
            name: lora.adapter_state(net) if lora.is_attached(net) else net.state_dict()
            for name, net in phase.models.learning.items()
        }
        save_checkpoint(phase.run.at.storage, phase.run.at.folder, state, room=phase.run.at.checkpoint_bytes)
    phase.run.at.notice.look()
