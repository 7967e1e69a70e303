"""The runs of the phases of a trial: the origin and the head of each model, and the key under which a run is memoised.

The key is a Merkle hash of only what the phase reads: the models that the phase trains or reads (shape, and the key of the
phase or remap of their origin), streams with data fingerprints, terms, budget, optimizer, precision, seed, `NUMERICS`.
Commit, versions and device are provenance, and no part of the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainables.config.extension import uses_members
from trainables.config.models import Remap
from trainables.config.phase import Epochs, Phase, Steps, Stream, Tokens
from trainables.config.phase_run import PhaseRun, Start
from trainables.config.trial import NUMERICS, TrialSpec
from trainables.config.value import digest

SHARED_SEED = -1  # of phases with `seed: shared`


@dataclass(frozen=True)
class Origin:
    """The run of an earlier phase, and the point of its budget, whose weights a model has when a phase starts."""

    instance: PhaseRun
    model: str
    fraction: float

    @property
    def entry(self) -> str:
        """The name of the weights in the store."""
        return self.model if self.fraction == 1.0 else f"{self.model}@{self.fraction:g}"


@dataclass(frozen=True)
class TaskHead:
    """The classification or regression head of a model; equal heads share their weights."""

    data: str
    num_labels: int  # 1: a number
    is_derived: bool  # for labels that a model made


def phase_runs(spec: TrialSpec) -> tuple[PhaseRun, ...]:
    """Returns the runs of a pruned trial, each after the runs that it needs."""
    return tuple(
        PhaseRun(name, item) for name in spec.order() for item in (spec.phases[name].for_each_dataset or (None,))
    )


def streams_of(spec: TrialSpec, instance: PhaseRun) -> dict[str, Stream]:
    """Returns the streams of a run: a phase that fans out reads its own data set in each. Only corpora are corrupted."""
    found = {}
    for name, stream in spec.phases[instance.phase].streams.items():
        data = instance.item or stream.data
        corruption = stream.corruption if "corruption" in spec.data[data].format.supports else None
        changes = {"data": data, "labels": stream.labels and stream.labels.on(data), "corruption": corruption}
        found[name] = stream.model_copy(update=changes)
    return found


def origin_of(spec: TrialSpec, instance: PhaseRun, model: str) -> Origin | None:
    """Returns the origin of the weights of `model` when the run starts. A branch continues the branch of the same data."""
    start = spec.origin(instance.phase, model)
    if start is None:
        return None
    run, fraction = Start.parse(start)
    if spec.phases[run.phase].for_each_dataset:
        run = PhaseRun(run.phase, run.item or instance.item)
    return Origin(run, model, fraction)


def head_of(spec: TrialSpec, instance: PhaseRun, model: str) -> TaskHead | None:
    """Returns the head of a model in a run, or None for a language model."""
    phase, streams = spec.phases[instance.phase], streams_of(spec, instance)
    read = {term.on for term in phase.terms.values() if model in term.reads}
    for name, stream in streams.items():
        num_labels = spec.data[stream.data].num_labels
        if num_labels is None:
            continue
        if name in read and stream.labels is not None:
            return TaskHead(stream.data, stream.labels.NUM, True)
        if name in read or (stream.labels is not None and model in stream.labels.of):
            return TaskHead(stream.data, num_labels, False)
    return None


def source_of(spec: TrialSpec, instance: PhaseRun, model: str) -> tuple[str, Origin | None]:
    """Returns the model whose weights `model` starts with, itself or the source of its remap, and their origin."""
    origin = origin_of(spec, instance, model)
    while origin is None and isinstance(init := spec.models[model].init, Remap):
        model = init.from_
        origin = origin_of(spec, instance, model)
    return model, origin


def carried_projectors(spec: TrialSpec, instance: PhaseRun) -> dict[str, PhaseRun]:
    """Returns the terms whose projector goes on, with the run that trained it: that in which the model `to` was trained
    before, if a term of this name joined the same models there (as the stages of TinyBERT and ERNIE-Tiny do)."""
    found = {}
    for name, term in spec.phases[instance.phase].terms.items():
        origin = origin_of(spec, instance, term.target) if term.has_projector else None
        if origin is not None and origin.fraction == 1.0:
            before = spec.phases[origin.instance.phase].terms.get(name)
            if before is not None and before.has_projector and before.reads == term.reads:
                found[name] = origin.instance
    return found


def reads_head(spec: TrialSpec, instance: PhaseRun, model: str) -> bool:
    """Returns whether a run needs the head of a model: trains the model, or reads its logits, labels or replies."""
    phase = spec.phases[instance.phase]
    makers = {maker for stream in phase.streams.values() for maker in stream.models}
    read = {name for term in phase.terms.values() if term.inputs == "logits" for name in term.reads}
    return model in {*phase.train, *makers, *read}


def seed_of(spec: TrialSpec, phase: str) -> int:
    return spec.seed if spec.phases[phase].seed == "trial" else SHARED_SEED


def pace_reading(spec: TrialSpec, instance: PhaseRun) -> str:
    """Names the data of the stream that sets the pace, as a model reads them that learns from it."""
    phase = spec.phases[instance.phase]
    item = streams_of(spec, instance)[phase.pace].data
    return next((spec.reading(item, model) for model in phase.readers(phase.pace)), item)


def num_steps(phase: Phase, *, length: int, num_sequences: int) -> int:
    """Returns the optimizer steps of the budget. `length`, `num_sequences`: of train of the stream that sets the pace."""
    match phase.budget:
        case Steps(steps=steps):
            return steps
        case Tokens(tokens=tokens):
            return -(-tokens // (phase.batch * length))
        case Epochs(epochs=epochs):
            return max(1, -(-int(epochs * num_sequences) // phase.batch))


def phase_key(spec: TrialSpec, instance: PhaseRun, fingerprints: Mapping[str, str]) -> str:
    """Returns 32 hex digits. `spec` is pruned; `fingerprints` has `data:<name>` and, for pretrained models, `model:<name>`."""
    phase = spec.phases[instance.phase]
    value = phase.model_dump(mode="json", exclude={"start", "streams", "seed", "for_each_dataset"})
    value["optimizer"] = {model: phase.optimizer_of(model).model_dump(mode="json") for model in phase.train}
    value |= {
        "numerics": NUMERICS,
        "phase": str(instance),
        "precision": spec.precision,
        "seed": seed_of(spec, instance.phase),
        "streams": {
            name: {
                **stream.model_dump(mode="json", exclude={"data"}),
                "data": _as_read(spec, stream.data, (*phase.readers(name), *stream.models), fingerprints),
            }
            for name, stream in streams_of(spec, instance).items()
        },
        "models": {model: _as_held(spec, instance, model, fingerprints) for model in spec.models_of(instance.phase)},
        "eval_only": {item: _as_read(spec, item, phase.train, fingerprints) for item in phase.eval_only},
    }
    if carried := carried_projectors(spec, instance):
        value["projectors"] = sorted(carried)
    read = [spec.data[stream.data] for stream in streams_of(spec, instance).values()]
    read += [spec.data[item] for item in phase.eval_only]
    if spec.extension is not None and uses_members([phase, *read]):  # other phases keep their keys
        value["extension"] = spec.extension
    return digest(value, 32)


def _as_read(
    spec: TrialSpec, item: str, models: Iterable[str], fingerprints: Mapping[str, str]
) -> str | dict[str, str]:
    """Returns the fingerprint of a data set as these models read it: of each where their tokenizers differ."""
    prints = {model: fingerprints[f"data:{spec.reading(item, model)}"] for model in models}
    return prints if len(set(prints.values())) > 1 else next(iter(prints.values()), fingerprints[f"data:{item}"])


def _as_held(spec: TrialSpec, instance: PhaseRun, name: str, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Returns all that determines a model in the run, quantised or not, except for the head."""
    kind = spec.models[name].quantize if name not in spec.phases[instance.phase].train else None
    return _weights(spec, instance, name, fingerprints) | ({"quantize": kind} if kind is not None else {})


def _weights(spec: TrialSpec, instance: PhaseRun, name: str, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Returns all that determines a model's weights and behaviour when the run starts, except for the head."""
    model, phase = spec.models[name], instance.phase
    origin = origin_of(spec, instance, name)
    if origin is not None:
        return {"phase": phase_key(spec, origin.instance, fingerprints), "entry": origin.entry}
    if model.pretrained is not None:
        return {"pretrained": fingerprints[f"model:{name}"], "dropout": model.dropout, "dtype": model.dtype}
    value: dict[str, Any] = {"name": name, "seed": seed_of(spec, phase), "length": longest(spec)}
    value["shape"] = model.by_content(fingerprints.get(f"model:{name}"), exclude={"init", "quantize"})
    if isinstance(model.init, Remap):
        value["remap"] = model.init.model_dump(mode="json", include={"depth", "width", "rest"})
        value["source"] = _weights(spec, instance, model.init.from_, fingerprints)
    else:
        value["init"] = model.init.model_dump(mode="json")
    return value


def longest(spec: TrialSpec) -> int:
    """Returns the positions for which models are made: the longest sequence of the trial."""
    return max(data.length for data in spec.data.values())
