"""What is seen of a phase on its way: scores of its models, and records of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from trainables.config.terms import Flow, target
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.evaluation.generation import Other, agreements
from trainables.evaluation.model_size import size_and_speed
from trainables.evaluation.per_example import Scored
from trainables.models import lora
from trainables.storage.phase_store import EXAMPLES
from trainables.training import on_policy
from trainables.training.state import Diverged, PhaseState, Record, makers_of, peak_memory, reader_of, scored_of
from trainables.training.streams import StreamLoader


def records_of(phase: PhaseState, fraction: float) -> tuple[list[Record], dict[tuple[str, str], float]]:
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
    for name, state in progress.made.items():
        stream = phase.streams[name]
        for metric, value in on_policy.counts(state).items():
            add(",".join(makers_of(stream.spec)), stream.spec.data, "train", metric, value)
    for model, name in scored_of(phase):
        stream = reader_of(phase, name)
        if name in phase.further and fraction < 1:
            continue
        for split in ("test",) if name in phase.further else ("dev", "test"):
            found = score(phase, model, stream, split)
            if split == "test" and fraction == 1:
                phase.scored[model, name] = found
            for metric, value in found.metrics.items():
                add(model, stream.spec.data, split, metric, value)
            if split == "dev":
                losses[model, name] = loss_of(found.metrics)
                if not math.isfinite(losses[model, name]):  # the last update broke what the train loss still saw whole
                    what = f"the dev loss of {model} is {losses[model, name]} at step {progress.step}"
                    raise Diverged(f"phase {phase.instance}: {what}")
    for (model, other, data, split), agreed in _agreements(phase).items():
        for metric, value in agreed.items():
            add(model, data, split, f"{other}_{metric}", value)
    if fraction == 1:
        for model, name in {model: name for model, name in scored_of(phase) if name in phase.streams}.items():
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


def _agreements(phase: PhaseState) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """How near a model that learns to answer is to whom it learns from, by (model, other, data set, split), and to what
    that one was before: the same where it is frozen; where it learns in full nobody knows any more."""
    run, nets = phase.run, phase.nets
    others: dict[tuple[str, str], dict[str, Other]] = {}  # of a model, on a data set
    sets: dict[str, ExchangeSet] = {}
    for term in phase.spec.terms.values():
        stream = phase.streams[term.on]
        if not isinstance(term, Flow) or not isinstance(stream.data, ExchangeSet):
            continue
        sets[stream.spec.data] = stream.data
        rivals, rival = others.setdefault((term.to, stream.spec.data), {}), nets[term.from_]
        rivals[term.from_] = Other(rival)
        if lora.is_attached(rival):
            rivals[f"{term.from_}_original"] = Other(rival, partial(lora.original, rival))
    how: dict[str, Any] = {"device": run.at.device, "autocast": run.autocast, "session": run.session}
    found = dict[tuple[str, str, str, str], dict[str, float]]()
    splits: tuple[Literal["dev", "test"], ...] = ("dev", "test")
    for (model, name), rivals in others.items():
        for split in splits:
            for other, agreed in agreements(nets[model], rivals, sets[name], split, **how).items():
                found[model, other, name, split] = agreed
                if other in nets and other not in phase.spec.train:
                    found[model, f"{other}_original", name, split] = agreed
    return found


def score(phase: PhaseState, model: str, stream: StreamLoader, split: Any) -> Scored:
    at = phase.run
    at.at.notice.look()
    return stream.score(phase.nets[model], split, device=at.at.device, autocast=at.autocast, session=at.session)


def examples_of(phase: PhaseState) -> dict[str, list[Any]]:
    """The scores of each example of test, as columns."""
    columns: dict[str, list[Any]] = {name: [] for name in EXAMPLES.names}
    for (model, stream), scored in phase.scored.items():
        num = len(scored.losses_E)
        unknown = [None] * num
        values = {
            "model": [model] * num,
            "task": [reader_of(phase, stream).spec.data] * num,
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


def loss_of(found: Mapping[str, float]) -> float:
    return next(value for metric, value in found.items() if metric.endswith("_loss"))  # of each kind of data
