"""Evaluates the models of a running phase, and makes records of the results."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, Literal

from trainables.config.session import Record
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.evaluation.generation import ComparedModel, agreements
from trainables.evaluation.model_size import size_and_speed
from trainables.evaluation.per_example import Placement, Scored
from trainables.metrics.known import LOSSES
from trainables.models import lora
from trainables.storage.phase_store import EXAMPLES
from trainables.training import early_stopping, on_policy
from trainables.training.state import Diverged, PhaseState, peak_memory
from trainables.training.streams import StreamLoader

Split = Literal["dev", "test"]
SPLITS: tuple[Split, ...] = ("dev", "test")
DevLosses = dict[tuple[str, str], float]  # by model and data set
Measured = tuple[str, str, str, Mapping[str, float]]  # model, data set, split, metrics


def records_of(phase: PhaseState, fraction: float) -> tuple[list[Record], DevLosses]:
    """Evaluates the models; returns records of this point of the budget, and the dev losses. Raises Diverged where a
    dev loss is not finite."""
    progress, is_end = phase.progress, fraction == 1
    common = {
        "phase": phase.instance.phase,
        "step": progress.step,
        "progress": fraction,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "device_seconds": progress.seconds * phase.context.session.world,
        "flops": progress.flops,
        "t": int(time.time() * 1000),
    }
    losses = DevLosses()
    measured = chain(
        _training(phase, is_end),
        _evaluation(phase, is_end, losses),
        _agreements(phase),
        _term_on_dev(phase),
        _system(phase, is_end),
    )
    return [
        {**common, "model": model, "task": data, "split": split, "metric": metric, "value": value}
        for model, data, split, metrics in measured
        for metric, value in metrics.items()
    ], losses


def _training(phase: PhaseState, is_end: bool) -> Iterator[Measured]:
    """Measures mean losses of the terms since the last records, and metrics of labels and replies that models made."""
    progress, spec = phase.progress, phase.spec
    for name, term in spec.terms.items():
        if progress.counts.get(name):
            mean = progress.sums[name] / progress.counts[name]
            yield term.target, phase.streams[term.on].spec.data, "train", {name: mean}
    progress.sums, progress.counts = {}, {}
    for stream in phase.streams.values() if is_end else ():
        yield ",".join(stream.spec.labels.of) if stream.spec.labels else "", stream.spec.data, "train", stream.about
    for name, state in progress.replies.items():
        stream = phase.streams[name]
        yield ",".join(stream.spec.reply_models), stream.spec.data, "train", on_policy.take_counts(state)


def _evaluation(phase: PhaseState, is_end: bool, losses: DevLosses) -> Iterator[Measured]:
    """Scores on dev and test, and at the end on further data; fills `losses`."""
    for model, name in phase.evaluated:
        is_extra, loader = name in phase.eval_only, phase.loader(name)
        if is_extra and not is_end:
            continue
        for split in SPLITS[is_extra:]:
            scored = score(phase, model, loader, split)
            if split == "test" and is_end:
                phase.scored[model, name] = scored
            yield model, loader.spec.data, split, scored.metrics
            if split == "dev":
                losses[model, loader.spec.data] = loss = loss_of(scored.metrics)
                if not math.isfinite(loss):  # the last update broke the model after its train loss was computed
                    where = f"the dev loss of {model} is {loss} at step {phase.progress.step}"
                    raise Diverged(f"phase {phase.instance}: {where}")


def _system(phase: PhaseState, is_end: bool) -> Iterator[Measured]:
    """Measures size and speed of each trained model at the end; memory and throughput."""
    trial, device = phase.context, phase.context.device
    last_stream = {model: name for model, name in phase.evaluated if name in phase.streams}
    for model, name in last_stream.items() if is_end else ():
        stream = phase.streams[name]
        how: dict[str, Any] = {"is_task": stream.num_labels is not None, "device": device}
        sizes = size_and_speed(phase.nets[model], length=stream.length, autocast=trial.autocast, **how)
        yield model, stream.spec.data, "system", sizes
    machine = {"peak_memory": peak_memory(device)}
    if phase.progress.seconds > 0:
        machine["tokens_per_second"] = phase.progress.tokens / phase.progress.seconds
    yield ",".join(phase.spec.train), next(iter(phase.streams.values())).spec.data, "system", machine


def _agreements(phase: PhaseState) -> Iterator[Measured]:
    """Measures how closely each model that learns to answer agrees with the models that teach it; and with their
    original weights, where these are known: if the teacher is frozen, or learns by an adapter."""
    trial, nets = phase.context, phase.nets
    others: dict[tuple[str, str], dict[str, ComparedModel]] = {}  # of a model, on a data set
    sets: dict[tuple[str, str], ExchangeSet] = {}
    for term in phase.spec.terms.values():
        stream = phase.streams[term.on]
        read = stream.read_by(term.target)
        if term.source is None or term.inputs != "logits" or not isinstance(read, ExchangeSet):
            continue
        sets[term.target, stream.spec.data] = read
        rivals, rival = others.setdefault((term.target, stream.spec.data), {}), nets[term.source]
        rivals[term.source] = ComparedModel(rival)
        if lora.is_attached(rival):
            rivals[f"{term.source}_original"] = ComparedModel(rival, partial(lora.original, rival))
    on = Placement(trial.device, trial.autocast, trial.session)
    for (model, data), rivals in others.items():
        for split in SPLITS:
            metrics: dict[str, float] = {}
            for other, agreed in agreements(nets[model], rivals, sets[model, data], split, on=on).items():
                is_frozen = other in nets and other not in phase.spec.train
                for name in (other, f"{other}_original") if is_frozen else (other,):
                    metrics |= {f"{name}_{metric}": value for metric, value in agreed.items()}
            yield model, data, split, metrics


def _term_on_dev(phase: PhaseState) -> Iterator[Measured]:
    """Measures the loss of the term that early stopping goes by."""
    if (rule := phase.spec.early_stopping) is not None and rule.term is not None:
        term = phase.spec.terms[rule.term]
        yield (
            term.target,
            phase.streams[term.on].spec.data,
            "dev",
            {rule.term: early_stopping.loss_on_dev(phase, rule.term)},
        )


def score(phase: PhaseState, model: str, stream: StreamLoader, split: Split) -> Scored:
    trial, environment = phase.context, phase.context.environment
    environment.notice.look()
    return stream.score(
        phase.nets[model], model, split, on=Placement(environment.device, trial.autocast, trial.session)
    )


def examples_of(phase: PhaseState) -> dict[str, list[Any]]:
    """Lists the scores of each test example, as columns."""
    columns: dict[str, list[Any]] = {name: [] for name in EXAMPLES.names}
    for (model, stream), scored in phase.scored.items():
        num = len(scored.losses_E)
        unknown = [None] * num
        values = {
            "model": [model] * num,
            "task": [phase.loader(stream).spec.data] * num,
            "split": ["test"] * num,
            "part": [0] * num if scored.parts_E is None else scored.parts_E.tolist(),
            "example": list(range(num)),
            "label": unknown if scored.labels_E is None else scored.labels_E.tolist(),
            "prediction": unknown if scored.predictions_E is None else scored.predictions_E.tolist(),
            "loss": scored.losses_E.tolist(),
            "count": scored.counts_E.astype(int).tolist(),
            "cluster": unknown if scored.clusters_E is None else scored.clusters_E.tolist(),
            "scores": [
                json.dumps(dict(zip(scored.scores, values, strict=True)))
                for values in zip(*(score_E.tolist() for score_E in scored.scores.values()), strict=True)
            ]
            or unknown,
            "samples": unknown if scored.samples_EK is None else scored.samples_EK.tolist(),
        }
        for name, column in values.items():
            columns[name] += column
    return columns


def loss_of(metrics: Mapping[str, float]) -> float:
    """Finds the loss among the metrics; every kind of data has one."""
    return next(metrics[loss.name] for loss in LOSSES if loss.name in metrics)
