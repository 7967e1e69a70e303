"""Gradients of one optimizer step: over micro-batches of this rank's share of the global batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainables.config.errors import is_out_of_memory
from trainables.config.terms import Term
from trainables.config.value import random_stream
from trainables.evaluation.model_size import FLOPS
from trainables.storage.files import log
from trainables.training.forward import Batch, ForwardContext, GlobalBatch, batch_of, normaliser, run_terms
from trainables.training.state import PhaseState, Progress


def backward_within_memory(
    phase: PhaseState, terms: Mapping[str, Term], weights: Mapping[str, float], batches: Mapping[str, GlobalBatch]
) -> dict[str, Tensor]:
    """Runs `backward`; on a single rank, halves the micro-batch and begins the step anew where memory runs out."""
    flops = phase.progress.flops
    while True:
        try:
            return backward(phase, terms, weights, batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or phase.micro == 1 or phase.context.session.world > 1:
                raise
        phase.progress.flops = flops
        _halve(phase, "micro-batch halved to")


def backward(
    phase: PhaseState, terms: Mapping[str, Term], weights: Mapping[str, float], batches: Mapping[str, GlobalBatch]
) -> dict[str, Tensor]:
    """Fills the gradients of one step; each model runs once per stream and micro-batch.

    Returns each term's sum over this rank's share, detached. The wrapped models average gradients over ranks, so the
    loss, divided by the normaliser of the *global* batch, is multiplied by the number of ranks.
    """
    session = phase.context.session
    share = phase.spec.batch // session.world
    first, last = session.rank * share, (session.rank + 1) * share
    active = {name: term for name, term in terms.items() if weights[name]}
    scale = {
        name: weights[name] / normaliser(term, batch_of(batches, term.on, term.target)) for name, term in active.items()
    }
    sums: dict[str, Tensor] = {}
    for low in range(first, last, phase.micro):
        high = min(low + phase.micro, last)
        parts = {name: batch.rows(low, high).to(phase.context.device) for name, batch in batches.items()}
        with _count_flops(phase.progress, active, parts, session.world), _synchronised(phase, high == last):
            loss, values = run_micro_batch(phase, active, parts, scale, low=low)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.double()
            if active:  # else every weight is zero at this step
                (loss * session.world).backward()  # type: ignore[no-untyped-call]
    return sums


def run_micro_batch(
    phase: PhaseState, active: Mapping[str, Term], parts: Mapping[str, Batch], scale: Mapping[str, float], *, low: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs the terms on the micro-batch that begins at row `low` of the global batch."""

    def dropout(model: str, stream: str) -> int:
        return random_stream(phase.seed, "dropout", str(phase.instance), model, stream, phase.progress.step, low)

    context = ForwardContext(phase.context.device, phase.context.autocast, dropout)
    return run_terms(phase.models, active, parts, scale, context=context)


def fit_micro_batch(phase: PhaseState) -> None:
    """Halves the micro-batch until its forward and backward fit on every rank.

    Several ranks cannot do so in the middle of a step, where the others wait for a rank's gradients. So the first
    micro-batch of the next step is tried beforehand, without the wrapper that exchanges gradients.
    """
    session, spec, device = phase.context.session, phase.spec, phase.context.device
    drawn = (phase.progress.step, spec.batch, phase.seed, str(phase.instance))
    batches = {name: batch for stream in phase.streams.values() for name, batch in stream.batches(*drawn).items()}
    local = replace(phase, models=replace(phase.models, wrapped={}))
    while True:
        failed: BaseException | None = None
        parts = {name: batch.rows(0, phase.micro).to(device) for name, batch in batches.items()}
        try:
            loss, _ = run_micro_batch(local, spec.terms, parts, dict.fromkeys(spec.terms, 1.0), low=0)
            loss.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = error
        phase.optimizer.zero_grad(set_to_none=True)
        if not session.total([float(failed is not None)])[0]:
            return
        if phase.micro == 1:
            raise torch.OutOfMemoryError(str(failed) if failed else "another rank has no memory for one sequence")
        _halve(phase, "micro-batch of")


def _halve(phase: PhaseState, what: str) -> None:
    phase.micro = max(1, phase.micro // 2)
    log.warning("out of memory: %s %d sequences", what, phase.micro)
    phase.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()  # does nothing without a device


@contextmanager
def _synchronised(phase: PhaseState, is_last: bool) -> Iterator[None]:
    """Lets ranks exchange gradients once a step, with the last micro-batch."""
    with ExitStack() as stack:
        if phase.context.session.world > 1 and not is_last:
            for wrapped in phase.models.wrapped.values():
                stack.enter_context(wrapped.no_sync())
        yield


@contextmanager
def _count_flops(
    progress: Progress, active: Mapping[str, Term], parts: Mapping[str, Batch], world: int
) -> Iterator[None]:
    """Adds the FLOPs of a micro-batch over all ranks: counted once for each set of active terms and lengths to the next
    multiple of 8, then per padded token."""
    which = f"{','.join(sorted(active))} {'x'.join(str(-(-part.ids_BT.shape[1] // 8)) for part in parts.values())}"
    tokens = sum(part.ids_BT.numel() for part in parts.values())
    if which in progress.flops_of:
        yield
    else:
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            yield
        progress.flops_of[which] = counter.get_total_flops() / max(1, tokens)
    progress.flops += progress.flops_of[which] * tokens * world
