"""Early stopping of a phase: what was best on dev so far, the weights of that moment, and whether the phase is over.

The choice sees dev alone. All ranks have the same numbers, so that they choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from trainables.config.phase import EarlyStopping
from trainables.config.schedules import START
from trainables.config.session import Record
from trainables.evaluation.per_example import Placement, in_eval_mode
from trainables.metrics.known import metric_named
from trainables.training.forward import ForwardContext, batch_of, normaliser, run_terms
from trainables.training.setup import learning_states, load_learning_states
from trainables.training.state import PhaseState


def observe(phase: PhaseState, records: Sequence[Record]) -> None:
    """Compares an evaluation with the best one so far, and keeps the weights where it is better."""
    rule, best = phase.spec.early_stopping, phase.progress.best
    if rule is None or best.get("is_chosen"):
        return
    value, is_lower_better = _value(phase, rule, records)
    if not best or (value < best["value"] if is_lower_better else value > best["value"]):
        best |= {"value": value, "step": phase.progress.step, "num_worse": 0}
        if rule.restore == "best":
            phase.best_weights = learning_states(phase.models, is_copy=True)
    else:
        best["num_worse"] += 1


def is_over(phase: PhaseState) -> bool:
    """Returns whether the budget is spent, or the phase has been without a better evaluation for too long."""
    rule, best = phase.spec.early_stopping, phase.progress.best
    is_stopped = rule is not None and rule.patience is not None and best.get("num_worse", 0) >= rule.patience
    return phase.progress.step >= phase.total or is_stopped


def choose(phase: PhaseState) -> bool:
    """Loads the weights that are kept, at the end of a phase. Returns whether they are to be evaluated as its end."""
    rule, progress = phase.spec.early_stopping, phase.progress
    if rule is None or progress.best.get("is_chosen"):
        return False
    is_other = rule.restore == "best" and progress.best["step"] != progress.step
    if is_other:
        load_learning_states(phase.models, phase.best_weights)
    progress.best["is_chosen"] = 1
    if is_other or progress.step < phase.total:
        progress.records = [record for record in progress.records if record["progress"] != 1]  # of the last weights
        return True
    return False


def _value(phase: PhaseState, rule: EarlyStopping, records: Sequence[Record]) -> tuple[float, bool]:
    """Returns the number by which evaluations are compared, and whether a lower one is better."""
    if rule.term is not None:
        term = phase.spec.terms[rule.term]
        model, data, metric, is_lower_better = term.target, phase.streams[term.on].spec.data, rule.term, True
    else:
        assert rule.metric is not None
        model = rule.model or next(iter(phase.spec.train))
        data = rule.data or phase.instance.item or next(iter(phase.streams.values())).spec.data
        metric, is_lower_better = rule.metric, metric_named(rule.metric).lower_is_better
    wanted = {"model": model, "task": data, "split": "dev", "metric": metric}
    found = next(record for record in records if all(record[key] == value for key, value in wanted.items()))
    return float(found["value"]), is_lower_better


@torch.no_grad()
def loss_on_dev(phase: PhaseState, name: str) -> float:
    """Computes the loss of a term on dev: its sum over the split, divided once."""
    term, session = phase.spec.terms[name].at_state(phase.progress.terms.get(name, START)), phase.context.session
    on = Placement(phase.context.device, phase.context.autocast, session)
    models = replace(phase.models, trained=frozenset(), wrapped={})  # no gradient, and no exchange between ranks
    context = ForwardContext(on.device, on.autocast, lambda model, stream: 0)
    total, num = 0.0, 0
    with ExitStack() as stack:
        for model in term.reads:
            stack.enter_context(in_eval_mode(phase.nets[model]))
        for i, batches in enumerate(phase.streams[term.on].dev_batches(on.rows)):
            num += normaliser(term, batch_of(batches, term.on, term.target))
            if on.is_mine(i):
                parts = {read: batch.to(on.device) for read, batch in batches.items()}
                _, sums = run_terms(models, {name: term}, parts, {name: 1.0}, context=context)
                total += float(sums[name])
    return session.total([total])[0] / num
