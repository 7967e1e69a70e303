"""What a phase depends on: its instances, where its models come from, and the key under which it is memoised.

The key is a Merkle hash of only what the phase reads: the models it trains or reads (shape, and the key of the phase or
remap they come from), streams with data fingerprints, terms, budget, optimizer, precision, its own seed, `NUMERICS`.
Commit, versions and device are provenance, printed, not key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainables.spec import (
    NUMERICS,
    Epochs,
    Phase,
    Remap,
    Steps,
    Stream,
    Tokens,
    TrialSpec,
    digest,
    parse_start,
)

SHARED_SEED = -1  # of phases that say `seed: shared`


@dataclass(frozen=True)
class Instance:
    """A phase, or one branch of a phase that fans out over data sets."""

    phase: str
    item: str | None = None

    def __str__(self) -> str:
        return self.phase if self.item is None else f"{self.phase}[{self.item}]"


@dataclass(frozen=True)
class Origin:
    """A model's weights at the start of a phase: those of an earlier phase."""

    instance: Instance
    model: str
    fraction: float

    @property
    def entry(self) -> str:
        """Their name in the store."""
        return self.model if self.fraction == 1.0 else f"{self.model}@{self.fraction:g}"


def instances(spec: TrialSpec) -> tuple[Instance, ...]:
    """All that the trial runs, in an order that respects the DAG. `spec` is pruned."""
    return tuple(Instance(name, item) for name in spec.order() for item in (spec.phases[name].each or (None,)))


def streams_of(spec: TrialSpec, instance: Instance) -> dict[str, Stream]:
    """The streams of an instance: a phase that fans out reads its own item in each."""
    streams = spec.phases[instance.phase].streams
    if instance.item is None:
        return dict(streams)
    return {name: stream.model_copy(update={"data": instance.item}) for name, stream in streams.items()}


def origin_of(spec: TrialSpec, phase: str, model: str) -> Origin | None:
    start = spec.origin(phase, model)
    if start is None:
        return None
    source, fraction, item = parse_start(start)
    return Origin(Instance(source, item), model, fraction)


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


def phase_key(spec: TrialSpec, instance: Instance, fingerprints: Mapping[str, str]) -> str:
    """32 hex digits. `spec` is pruned; `fingerprints` has `data:<name>` and, for pretrained models, `model:<name>`."""
    phase = spec.phases[instance.phase]
    value = phase.model_dump(mode="json", exclude={"start", "streams", "seed", "each"})
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
        "models": {
            model: _weights(spec, instance.phase, model, fingerprints) for model in spec.models_of(instance.phase)
        },
    }
    return digest(value, 32)


def _weights(spec: TrialSpec, phase: str, name: str, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What a model's weights and its behaviour are a function of when the phase starts."""
    model = spec.models[name]
    origin = origin_of(spec, phase, name)
    if origin is not None:
        return {"phase": phase_key(spec, origin.instance, fingerprints), "entry": origin.entry}
    if model.pretrained is not None:
        return {"pretrained": fingerprints[f"model:{name}"], "dropout": model.dropout}
    value: dict[str, Any] = {"name": name, "seed": seed_of(spec, phase), "length": longest(spec)}
    value["shape"] = model.model_dump(mode="json", exclude={"init"})
    if isinstance(model.init, Remap):
        value["remap"] = model.init.model_dump(mode="json", include={"depth", "width", "rest"})
        value["source"] = _weights(spec, phase, model.init.from_, fingerprints)
    else:
        value["init"] = model.init.model_dump(mode="json")
    return value


def longest(spec: TrialSpec) -> int:
    """Positions that a model is made for: the longest sequence of the trial."""
    return max(data.length for data in spec.data.values())
