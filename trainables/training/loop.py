"""The one training loop: a phase, whatever its models, streams and terms. Knows no paper, no tracker and no Ray.

All randomness is a function of (seed, purpose, step), so that a checkpoint holds no generator state and further models
change no draw. Only dropout depends on how a batch is cut into micro-batches.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainables.config.phase_run import PhaseRun
from trainables.config.schedules import START
from trainables.models import build, lora
from trainables.storage.checkpoints import drop_checkpoints, save_checkpoint
from trainables.storage.files import log
from trainables.storage.phase_store import StoredPhase, adapter_name
from trainables.training import early_stopping, gradients, on_policy
from trainables.training.forward import batch_of, normaliser, projector_name
from trainables.training.records import examples_of, loss_of, records_of, score
from trainables.training.setup import begin, learning_states, parameters_of
from trainables.training.state import Diverged, PhaseState, Progress, Suspended, TrialContext
from trainables.training.stop_signals import StopReason

CHECK_EVERY = 25  # steps between checks that the loss is finite


def train_phase(trial: TrialContext, instance: PhaseRun) -> StoredPhase:
    """Trains a phase from its start or its furthest checkpoint, and publishes the result."""
    phase = begin(trial, instance)
    if trial.session.world > 1 and trial.device.startswith("cuda"):
        gradients.fit_micro_batch(phase)
    progress, total = phase.progress, phase.total
    evaluate_at = {_step_of(fraction, total): fraction for fraction in phase.spec.evaluate}
    interrupts = _Interrupts(phase)
    if progress.records:
        trial.emit(list(progress.records))
    elif 0 in evaluate_at and progress.step == 0:
        evaluate(phase, evaluate_at[0])
    started = time.monotonic()
    while not early_stopping.is_over(phase):
        step(phase)
        if progress.step % CHECK_EVERY == 0:
            _add_up(phase)
        _save_weights(phase)
        is_due, asked = interrupts.take()
        if progress.step in evaluate_at or is_due or asked:
            _add_up(phase)
            progress.seconds += time.monotonic() - started  # without evaluation and checkpoints
            if progress.step in evaluate_at:
                evaluate(phase, evaluate_at[progress.step])
            if is_due or asked:
                _checkpoint(phase)
                interrupts.checkpointed()
            if asked:
                log.info("phase %s: left at step %d of %d (%s)", instance, progress.step, total, asked)
                raise Suspended(asked)
            started = time.monotonic()
    if early_stopping.choose(phase):
        evaluate(phase, 1.0)
    for model, stream in phase.evaluated:  # where the trial was killed between the last evaluation and this line
        if (model, stream) not in phase.scored:
            phase.scored[model, stream] = score(phase, model, phase.loader(stream), "test")
    published: StoredPhase = trial.session.agree(_publish(phase) if trial.session.rank == 0 else None)
    return published


def step(phase: PhaseState) -> None:
    """Takes one optimizer step over the global batch."""
    spec, progress, done = phase.spec, phase.progress, phase.progress.step / phase.total
    for group in phase.optimizer.param_groups:
        rule = spec.optimizer_of(group["model"])
        group["lr"] = rule.lr * rule.lr_factor(progress.step, phase.total)
    weights = {name: term.weight.value_at(done, progress.weights.get(name, START)) for name, term in spec.terms.items()}
    used = {term.on for name, term in spec.terms.items() if weights[name]}
    read = {name: on_policy.read_batches(phase, name) for name in phase.streams if name in used}
    batches = {name: batch for of_stream in read.values() for name, batch in of_stream.items()}
    terms = {name: term.at_state(progress.terms.get(name, START)) for name, term in spec.terms.items()}
    sums = gradients.backward_within_memory(phase, terms, weights, batches)
    for name in spec.train:
        max_norm = spec.optimizer_of(name).max_grad_norm
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters_of(spec, phase.models.wrapped, name), max_norm)
    phase.optimizer.step()
    phase.optimizer.zero_grad(set_to_none=True)
    for name, value in sums.items():
        # in double precision sums of floats are exact, so that the order of adding them up changes nothing
        phase.local[name] = phase.local[name] + value if name in phase.local else value
        term = spec.terms[name]
        num = normaliser(term, batch_of(batches, term.on, term.target))
        progress.counts[name] = progress.counts.get(name, 0) + num
        if term.has_state:  # over all ranks, else their states would differ
            (total,) = phase.context.session.total([float(value)])
            progress.terms[name] = term.next_state(progress.terms.get(name, START), total / num, done)
    progress.tokens += sum(batches[name].num_tokens for name in read)
    progress.step += 1


def evaluate(phase: PhaseState, fraction: float) -> None:
    """Evaluates the models, moves schedules that depend on dev losses, and reports."""
    records, losses = records_of(phase, fraction)
    progress, spec = phase.progress, phase.spec
    early_stopping.observe(phase, records)

    def dev_loss(model: str, stream: str) -> float:
        key = (model, phase.streams[stream].spec.data)
        if key not in losses:
            losses[key] = loss_of(score(phase, model, phase.streams[stream], "dev").metrics)
        return losses[key]

    for name, term in spec.terms.items():
        before = progress.weights.get(name, START)
        loss, source_loss = (partial(dev_loss, model, term.on) for model in (term.target, term.source or term.target))
        after = term.weight.observe(before, loss, source_loss)
        if term.weight.value_at(fraction, after) != term.weight.value_at(fraction, before):
            log.info(
                "the weight of %s is %g from step %d on", name, term.weight.value_at(fraction, after), progress.step
            )
        progress.weights[name] = after
    for name, state in progress.replies.items():
        source, item = spec.streams[name].replies, phase.streams[name].spec.data
        assert source is not None
        model = next(model for model in (*source.models, *spec.train) if (model, item) in losses)
        loss = partial(dev_loss, model, name)
        state["share"] = source.share.observe(state["share"], loss, loss)
    progress.records += records
    if phase.context.environment.checkpoint_at_reports:
        _checkpoint(phase)
    phase.context.emit(records)


class _Interrupts:
    """After each step: whether a checkpoint is due and whether the trial is asked to leave, the same on all ranks.

    The ranks' clocks differ and asking each other costs time, so that several ranks ask about once a second, at steps
    on which they have agreed.
    """

    # where ranks read different requests, the first of these counts
    ASKS = (StopReason.BY_HAND, StopReason.LEAVE, StopReason.TERMINATED)

    def __init__(self, phase: PhaseState) -> None:
        self.phase, self.saved = phase, time.monotonic()
        self.next, self.last = phase.progress.step + 1, (phase.progress.step, time.monotonic())

    def checkpointed(self) -> None:
        self.saved = time.monotonic()

    def take(self) -> tuple[bool, StopReason | None]:
        step, session, now = self.phase.progress.step, self.phase.context.session, time.monotonic()
        environment = self.phase.context.environment
        asked = environment.notice.look()
        is_due = now - self.saved > environment.checkpoint_seconds
        if session.world == 1:
            return is_due, asked
        if step < self.next:
            return False, None
        stride = (step - self.last[0]) / max(now - self.last[1], 1e-3)  # steps in a second
        self.last = (step, now)
        first = float(session.rank == 0)
        mine = [first * is_due, first * min(max(round(stride), 1), 1000), *(float(asked == ask) for ask in self.ASKS)]
        due, stride, *asks = session.total(mine)
        self.next = step + int(stride)
        return due > 0, next((ask for ask, count in zip(self.ASKS, asks, strict=True) if count), None)


def _step_of(fraction: float, total: int) -> int:
    """Returns the step after which a fraction of the budget is spent; only the fraction 0 is before the first step."""
    return max(1, round(fraction * total)) if fraction else 0


def _add_up(phase: PhaseState) -> None:
    """Takes the terms' sums off the devices and over all ranks. Raises Diverged, on all ranks."""
    names = sorted(phase.spec.terms)
    sums = phase.context.session.total([float(phase.local.get(name, 0.0)) for name in names])
    for name, value in zip(names, sums, strict=True):
        if not math.isfinite(value):
            raise Diverged(f"phase {phase.instance}: {name} is {value} by step {phase.progress.step}")
        phase.progress.sums[name] = phase.progress.sums.get(name, 0.0) + value
    phase.local.clear()


def _save_weights(phase: PhaseState) -> None:
    """Stores the weights where a fraction of `save_at` is reached."""
    trial, progress = phase.context, phase.progress
    for fraction in phase.spec.save_at:
        if progress.step == _step_of(fraction, phase.total) and trial.session.rank == 0:
            for name in phase.spec.train:
                weights = _weights(phase.nets[name])
                progress.files[f"{name}@{fraction:g}"] = trial.store.put_weights(trial.key(phase.instance), weights)


def _weights(net: Any) -> dict[str, Tensor]:
    """Returns the weights of the family's own class, with adapters merged."""
    return lora.merged(net) if lora.is_attached(net) else build.weights_of(net)


def _checkpoint(phase: PhaseState) -> None:
    environment = phase.context.environment
    if phase.context.session.rank == 0:
        state = {name: getattr(phase.progress, name) for name in Progress.__dataclass_fields__}
        state |= {"key": phase.context.key(phase.instance), "optimizer": phase.optimizer.state_dict()}
        state |= {"models": learning_states(phase.models), "best_weights": phase.best_weights}
        save_checkpoint(environment.storage, environment.folder, state, room=environment.checkpoint_bytes)
    environment.notice.look()


def _publish(phase: PhaseState) -> StoredPhase:
    """Puts weights and records into the store, and drops the checkpoints."""
    trial, progress, environment = phase.context, phase.progress, phase.context.environment
    key = trial.key(phase.instance)
    files = {name: trial.store.put_weights(key, _weights(phase.nets[name])) for name in phase.spec.train}
    for name, net in phase.nets.items():
        if lora.is_attached(net):
            files[adapter_name(name)] = trial.store.put_weights(key, lora.adapter_state(net))
    for term, projector in phase.models.projectors.items():
        files[projector_name(term)] = trial.store.put_weights(key, projector.state_dict())
    published = StoredPhase(
        key=key,
        files={**progress.files, **files},
        configs={name: build.plain_config(phase.nets[name].config) for name in phase.spec.train},
        records=tuple(progress.records),
        cost={
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "device_seconds": progress.seconds * trial.session.world,
            "flops": progress.flops,
        },
        provenance={**environment.provenance, "trial": environment.trial, "finished": int(time.time() * 1000)},
        examples=trial.store.put_examples(key, examples_of(phase)),
    )
    published = trial.store.publish(published)
    for folder in (*environment.earlier, environment.folder):
        drop_checkpoints(environment.storage, folder)
    return published
