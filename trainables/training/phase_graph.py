"""What a phase depends on: its instances, where its models come from, and the key under which it is memoised.

The key is a Merkle hash of only what the phase reads: the models it trains or reads (shape, and the key of the phase or
remap they come from), streams with data fingerprints, terms, budget, optimizer, precision, its own seed, `NUMERICS`.
Commit, versions and device are provenance, printed, not key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainables.config.data import Instructions, Tasks
from trainables.config.models import Remap
from trainables.config.phase import Epochs, Phase, Steps, Stream, Tokens
from trainables.config.terms import reads
from trainables.config.trial import NUMERICS, TrialSpec, parse_start
from trainables.config.value import digest

SHARED_SEED = -1  # of phases that say `seed: shared`


@dataclass(frozen=True)
class PhaseRun:
    """A phase, or one branch of a phase that fans out over data sets."""

    phase: str
    item: str | None = None

    def __str__(self) -> str:
        return self.phase if self.item is None else f"{self.phase}[{self.item}]"


@dataclass(frozen=True)
class Origin:
    """A model's weights at the start of a phase: those of an earlier phase."""

    instance: PhaseRun
    model: str
    fraction: float

    @property
    def entry(self) -> str:
        """Their name in the store."""
        return self.model if self.fraction == 1.0 else f"{self.model}@{self.fraction:g}"


@dataclass(frozen=True)
class TaskHead:
    """What stands on a model's trunk while it reads a task; two heads that are equal are the same one."""

    data: str
    num_labels: int  # 1: a number
    is_derived: bool  # of labels that a model made


def phase_runs(spec: TrialSpec) -> tuple[PhaseRun, ...]:
    """All that the trial runs, in an order that respects the DAG. `spec` is pruned."""
    return tuple(
        PhaseRun(name, item) for name in spec.order() for item in (spec.phases[name].for_each_dataset or (None,))
    )


def streams_of(spec: TrialSpec, instance: PhaseRun) -> dict[str, Stream]:
    """The streams of an instance: a phase that fans out reads its own item in each. Only corpora are corrupted."""
    found = {}
    for name, stream in spec.phases[instance.phase].streams.items():
        data = instance.item or stream.data
        as_it_is = isinstance(spec.data[data], Tasks | Instructions)
        changes = {"data": data, "labels": stream.labels and stream.labels.on(data)}
        found[name] = stream.model_copy(update=changes | ({"corruption": None} if as_it_is else {}))
    return found


def origin_of(spec: TrialSpec, instance: PhaseRun, model: str) -> Origin | None:
    """Where `model` has its weights from when the instance starts. Branches of the same data go on from each other."""
    start = spec.origin(instance.phase, model)
    if start is None:
        return None
    source, fraction, item = parse_start(start)
    if spec.phases[source].for_each_dataset:
        item = item or instance.item
    return Origin(PhaseRun(source, item), model, fraction)


def head_of(spec: TrialSpec, instance: PhaseRun, model: str) -> TaskHead | None:
    """The head of a model in an instance, or None for that of a language model."""
    phase, streams = spec.phases[instance.phase], streams_of(spec, instance)
    read = {term.on for term in phase.terms.values() if model in reads(term)}
    for name, stream in streams.items():
        data = spec.data[stream.data]
        if not isinstance(data, Tasks):
            continue
        if name in read and stream.labels is not None:
            return TaskHead(stream.data, stream.labels.NUM, True)
        if name in read or (stream.labels is not None and model in stream.labels.of):
            return TaskHead(stream.data, data.num_labels, False)
    return None


def seed_of(spec: TrialSpec, phase: str) -> int:
    return spec.seed if spec.phases[phase].seed == "trial" else SHARED_SEED


def num_steps(phase: Phase, *, length: int, num_sequences: int) -> int:
    """Optimizer steps of the budget. `length`, `num_sequences`: of the training data of the stream that sets the pace."""
    match phase.budget:
        case Steps(steps=steps):
            return steps
        case Tokens(tokens=tokens):
            return -(-tokens // (phase.batch * length))
        case Epochs(epochs=epochs):
            return max(1, -(-int(epochs * num_sequences) // phase.batch))


def phase_key(spec: TrialSpec, instance: PhaseRun, fingerprints: Mapping[str, str]) -> str:
    """32 hex digits. `spec` is pruned; `fingerprints` has `data:<name>` and, for pretrained models, `model:<name>`."""
    phase = spec.phases[instance.phase]
    value = phase.model_dump(mode="json", exclude={"start", "streams", "seed", "for_each_dataset"})
    value["optimizer"] = {model: phase.optimizer_of(model).model_dump(mode="json") for model in phase.train}
    value |= {
        "numerics": NUMERICS,
        "phase": str(instance),
        "precision": spec.precision,
        "seed": seed_of(spec, instance.phase),
        "streams": {
            name: {**stream.model_dump(mode="json", exclude={"data"}), "data": fingerprints[f"data:{stream.data}"]}
            for name, stream in streams_of(spec, instance).items()
        },
        "models": {model: _weights(spec, instance, model, fingerprints) for model in spec.models_of(instance.phase)},
    }
    if phase.eval_only:
        value["eval_only"] = {item: fingerprints[f"data:{item}"] for item in phase.eval_only}
    return digest(value, 32)


def _weights(spec: TrialSpec, instance: PhaseRun, name: str, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What a model's weights and its behaviour are a function of when the instance starts; its head is the stream's."""
    model, phase = spec.models[name], instance.phase
    origin = origin_of(spec, instance, name)
    if origin is not None:
        return {"phase": phase_key(spec, origin.instance, fingerprints), "entry": origin.entry}
    if model.pretrained is not None:
        own = {"pretrained": fingerprints[f"model:{name}"], "dropout": model.dropout}
        return own if model.dtype == "fp32" else own | {"dtype": model.dtype}
    value: dict[str, Any] = {"name": name, "seed": seed_of(spec, phase), "length": longest(spec)}
    value["shape"] = model.model_dump(mode="json", exclude={"init"})
    if isinstance(model.init, Remap):
        value["remap"] = model.init.model_dump(mode="json", include={"depth", "width", "rest"})
        value["source"] = _weights(spec, instance, model.init.from_, fingerprints)
    else:
        value["init"] = model.init.model_dump(mode="json")
    return value


def longest(spec: TrialSpec) -> int:
    """Positions that a model is made for: the longest sequence of the trial."""
    return max(data.length for data in spec.data.values())
