"""Memoised phases: each is stored once under its key, published whole, and checked when it is read.

A phase lies under `phases/<key>/`. Weights and scores by example are files that are named by their content; `phase.json`,
written last and only once, names them with their checksums: before it the phase does not exist, and the first complete
publication wins.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trainables.storage import cache
from trainables.storage.files import Storage, log, verify_checksum, with_checksum

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = pa.schema(  # the score of each example of a phase's test data, at its end
    [
        ("model", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("part", pa.int64()),  # of a test set that has several; 0 in others
        ("example", pa.int64()),
        ("label", pa.float64()),  # class or number; null where the data are a corpus, as `prediction`
        ("prediction", pa.float64()),
        ("loss", pa.float64()),  # nats (squared error for numbers), summed over the example's supervised positions
        ("count", pa.int64()),  # these positions; 1 in a task
        ("cluster", pa.int64()),  # the same for examples of one document or text; null where unknown
        ("scores", pa.string()),  # of replies: JSON, by the metrics that the data set names; else null
        ("samples", pa.list_(pa.float32())),  # the score of each drawn reply; null where none is drawn
    ]
)


def adapter_name(model: str) -> str:
    """Returns the name of the pairs that a model's LoRA trained, beside the merged weights."""
    return f"adapter of {model}"


@dataclass(frozen=True)
class StoredPhase:
    """A finished phase, as phase.json describes it."""

    key: str
    files: Mapping[
        str, Mapping[str, Any]
    ]  # model, model@fraction, `adapter_name` or a projector's name -> file, sha256
    configs: Mapping[str, Mapping[str, Any]]  # transformers config of each trained model
    records: tuple[Mapping[str, Any], ...]
    cost: Mapping[str, float]  # steps, tokens, seconds, device_seconds, flops
    provenance: Mapping[str, Any]  # trial, commit, versions, device, finished (UTC ms)
    examples: Mapping[str, str] | None = None  # file, sha256: scores of each example of test


@dataclass(frozen=True)
class PhaseStore:
    storage: Storage

    def find(self, key: str) -> StoredPhase | None:
        """Returns the phase if it is complete; a phase whose phase.json cannot be read is set aside and counts as absent."""
        text = self.storage.read(f"phases/{key}/phase.json")
        if text is None:
            return None
        try:
            value = verify_checksum(text)
            return StoredPhase(**{**value, "records": tuple(value["records"])})
        except (ValueError, KeyError, TypeError) as error:
            self.set_aside(key, f"phase.json is corrupt ({error})")
            return None

    def put_weights(self, key: str, weights: Mapping[str, Tensor]) -> dict[str, str]:
        """Writes the weights of a model; returns their entry in phase.json."""
        content = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
        return self._put(key, content, "safetensors")

    def put_examples(self, key: str, columns: Mapping[str, list[Any]]) -> dict[str, str]:
        """Writes scores by example (`EXAMPLES`); returns their entry in phase.json."""
        buffer = io.BytesIO()
        pq.write_table(pa.table(dict(columns), schema=EXAMPLES), buffer, compression="zstd")
        return self._put(key, buffer.getvalue(), "parquet")

    def _put(self, key: str, content: bytes, suffix: str) -> dict[str, str]:
        sha256 = hashlib.sha256(content).hexdigest()
        file = f"{sha256[:16]}.{suffix}"
        self.storage.write(f"phases/{key}/{file}", content)
        return {"file": file, "sha256": sha256}

    def _get(self, key: str, entry: Mapping[str, Any]) -> bytes:
        """Reads a file of an entry. Raises Corrupt where the file differs from its checksum."""
        name = f"phases/{key}/{entry['file']}"
        here = self.storage.is_local
        content = self.storage.read(name) if here else cache.read(entry["sha256"], lambda: self.storage.read(name))
        if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise Corrupt(key, f"{entry['file']} is {'missing' if content is None else 'corrupt'}")
        return content

    def examples(self, key: str) -> pd.DataFrame | None:
        """Returns scores by example, or None where the phase has none or they are damaged."""
        phase = self.find(key)
        if phase is None or phase.examples is None:
            return None
        try:
            content = self._get(key, phase.examples)
        except Corrupt as damage:
            log.warning("%s", damage)
            return None
        table: pd.DataFrame = pq.read_table(io.BytesIO(content)).to_pandas()
        return table

    def publish(self, phase: StoredPhase) -> StoredPhase:
        """Publishes the phase unless it was published before; returns the phase that counts."""
        value = {name: getattr(phase, name) for name in StoredPhase.__dataclass_fields__}
        value["records"] = list(phase.records)
        if self.storage.create(f"phases/{phase.key}/phase.json", with_checksum(value)):
            return phase
        return self.find(phase.key) or phase

    def weights(self, key: str, model: str) -> dict[str, Tensor]:
        """Reads weights by `model` or `model@fraction`. Raises Corrupt where a file differs from its checksum."""
        phase = self.find(key)
        if phase is None or model not in phase.files:
            raise Corrupt(key, f"no weights of {model}")
        tensors: dict[str, Tensor] = load_tensors(self._get(key, phase.files[model]))
        return tensors

    def set_aside(self, key: str, why: str) -> None:
        """Takes a phase out of use without deleting its files; a trial that needs the phase trains it again."""
        log.warning("phase %s set aside: %s", key, why)
        text = self.storage.read(f"phases/{key}/phase.json")
        if text is not None:
            self.storage.write(f"phases/{key}/corrupt-{uuid.uuid4().hex[:8]}.json", text)
            self.storage.delete(f"phases/{key}/phase.json")


class Corrupt(Exception):
    """A published phase whose files are not what phase.json says."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"phase {key}: {why}")
        self.key, self.why = key, why
