"""Plain files that are the truth: atomic writes, memoised phases, checkpoints. Any fsspec URI; knows no Ray.

A phase lies under `phases/<key>/`. Its weights are content-addressed files; `phase.json`, written last and only once,
names them with their checksums: before it the phase is not there, and the first complete publication wins.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trainables import cache

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("codistill")
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
    ]
)


class StorageError(OSError):
    """The storage does not do as it should: full, away, or not allowed. No trial is to blame."""


@dataclass(frozen=True)
class Storage:
    """A folder by path or URI. Names below it use `/`. Everything raises StorageError where the storage fails."""

    uri: str

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri or self.uri.startswith(("file://", "local://"))

    def _at(self, name: str) -> tuple[Any, str]:
        fs, root = fsspec.core.url_to_fs(os.path.abspath(self.uri) if "://" not in self.uri else self.uri)
        return fs, f"{root.rstrip('/')}/{name}" if name else root.rstrip("/")

    @contextmanager
    def _reached(self, path: str) -> Iterator[None]:
        """Each backend has errors of its own: of these, one. That a name is there, or is not, is none."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, FileExistsError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None and error.strerror:
                raise StorageError(error.errno, error.strerror, path) from error
            if isinstance(error, OSError) or not self.is_local:
                text = (str(error).strip().splitlines() or [""])[0]
                raise StorageError(errno.EIO, text or type(error).__name__, path) from error
            raise

    def sub(self, name: str) -> Storage:
        return Storage(f"{self.uri.rstrip('/')}/{name}")

    def path(self, name: str = "") -> Path:
        """The local path of a name (local storage only)."""
        return Path(self._at(name)[1])

    def read(self, name: str) -> bytes | None:
        fs, path = self._at(name)
        try:
            with self._reached(path):
                return bytes(fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all. Locally: a temporary file, fsync, rename; elsewhere one PUT."""
        fs, path = self._at(name)
        with self._reached(path):
            if not self.is_local:
                fs.pipe_file(path, content)
                return
            temporary = _temporary(path, content)
            os.replace(temporary, path)
            _sync_folder(path)

    def create(self, name: str, content: bytes) -> bool:
        """Writes unless the name is there; says whether it did."""
        fs, path = self._at(name)
        with self._reached(path):
            if not self.is_local:
                if fs.exists(path):
                    return False
                fs.pipe_file(path, content)
                return True
            temporary = _temporary(path, content)
            try:
                os.link(temporary, path)  # fails if the name exists: no window between the question and the answer
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            _sync_folder(path)
        return True

    def list(self, name: str = "") -> list[str]:
        """The names in a folder, sorted; none where it is not."""
        fs, path = self._at(name)
        try:
            with self._reached(path):
                found = fs.ls(path, detail=False, refresh=True) if not self.is_local else fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        inside = {str(item).rstrip("/") for item in found} - {path}  # object stores may list the folder itself
        return sorted(name for item in inside if not (name := item.rsplit("/", 1)[-1]).startswith("."))

    def size(self, name: str) -> int:
        """Bytes of a file, or of all files below a folder."""
        fs, path = self._at(name)
        with self._reached(path):
            return int(fs.du(path)) if fs.exists(path) else 0

    def delete(self, name: str) -> None:
        fs, path = self._at(name)
        with self._reached(path):
            if fs.exists(path):
                fs.rm(path, recursive=True)

    def move(self, name: str, to: str) -> None:
        fs, path = self._at(name)
        with self._reached(path):
            fs.mv(path, self._at(to)[1], recursive=True)


def _temporary(path: str, content: bytes) -> str:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(uri: str) -> None:
    """Raises OSError where nothing can be written."""
    storage = Storage(uri)
    name = f".probe-{uuid.uuid4().hex[:8]}"
    storage.write(name, b"codistill")
    if storage.read(name) != b"codistill":
        raise OSError(f"{uri}: what was written could not be read back")
    storage.delete(name)


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------------ memoised phases


@dataclass(frozen=True)
class Published:
    """A finished phase as its marker tells it."""

    key: str
    files: Mapping[str, Mapping[str, Any]]  # model or model@fraction -> file, sha256
    configs: Mapping[str, Mapping[str, Any]]  # transformers config of each trained model
    records: tuple[Mapping[str, Any], ...]
    cost: Mapping[str, float]  # steps, tokens, seconds, device_seconds, flops
    provenance: Mapping[str, Any]  # trial, commit, versions, device, finished (UTC ms)
    examples: Mapping[str, str] | None = None  # file, sha256: scores of each example of test


@dataclass(frozen=True)
class PhaseStore:
    storage: Storage

    def find(self, key: str) -> Published | None:
        """The phase, if it is complete; one whose marker cannot be read is set aside and counts as absent."""
        text = self.storage.read(f"phases/{key}/phase.json")
        if text is None:
            return None
        try:
            value = unsealed(text)
            return Published(**{**value, "records": tuple(value["records"])})
        except (ValueError, KeyError, TypeError) as error:
            self.set_aside(key, f"phase.json is corrupt ({error})")
            return None

    def put_weights(self, key: str, weights: Mapping[str, Tensor]) -> dict[str, str]:
        """Writes one model's weights; what it returns belongs into the marker."""
        content = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
        return self._put(key, content, "safetensors")

    def put_examples(self, key: str, columns: Mapping[str, list[Any]]) -> dict[str, str]:
        """Writes scores by example (`EXAMPLES`); what it returns belongs into the marker."""
        buffer = io.BytesIO()
        pq.write_table(pa.table(dict(columns), schema=EXAMPLES), buffer, compression="zstd")
        return self._put(key, buffer.getvalue(), "parquet")

    def _put(self, key: str, content: bytes, suffix: str) -> dict[str, str]:
        sha256 = hashlib.sha256(content).hexdigest()
        file = f"{sha256[:16]}.{suffix}"
        self.storage.write(f"phases/{key}/{file}", content)
        return {"file": file, "sha256": sha256}

    def _get(self, key: str, entry: Mapping[str, Any]) -> bytes:
        """What was put. Raises Corrupt where the file differs from its checksum."""
        name = f"phases/{key}/{entry['file']}"
        here = self.storage.is_local
        content = self.storage.read(name) if here else cache.read(entry["sha256"], lambda: self.storage.read(name))
        if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise Corrupt(key, f"{entry['file']} is {'missing' if content is None else 'corrupt'}")
        return content

    def examples(self, key: str) -> pd.DataFrame | None:
        """Scores by example, or None where the phase has none that are whole."""
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

    def publish(self, phase: Published) -> Published:
        """Makes the phase visible, unless another publication came first; returns the one that counts."""
        value = {name: getattr(phase, name) for name in Published.__dataclass_fields__}
        value["records"] = list(phase.records)
        if self.storage.create(f"phases/{phase.key}/phase.json", sealed(value)):
            return phase
        return self.find(phase.key) or phase

    def weights(self, key: str, model: str) -> dict[str, Tensor]:
        """Weights by `model` or `model@fraction`. Raises Corrupt where a file differs from its checksum."""
        phase = self.find(key)
        if phase is None or model not in phase.files:
            raise Corrupt(key, f"no weights of {model}")
        tensors: dict[str, Tensor] = load_tensors(self._get(key, phase.files[model]))
        return tensors

    def set_aside(self, key: str, why: str) -> None:
        """Takes a phase out of use without deleting it; whoever needs it trains it again."""
        log.warning("phase %s set aside: %s", key, why)
        text = self.storage.read(f"phases/{key}/phase.json")
        if text is not None:
            self.storage.write(f"phases/{key}/corrupt-{uuid.uuid4().hex[:8]}.json", text)
            self.storage.delete(f"phases/{key}/phase.json")


class Corrupt(Exception):
    """A published phase whose files are not what the marker says."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"phase {key}: {why}")
        self.key, self.why = key, why


def sealed(value: Mapping[str, Any]) -> bytes:
    """As JSON, with a checksum in it."""
    return as_json({**value, "checksum": _checksum(value)})


def unsealed(text: bytes) -> dict[str, Any]:
    """What was sealed. Raises ValueError, KeyError, TypeError or AttributeError where it is not what was written."""
    value: dict[str, Any] = json.loads(text)
    if value.pop("checksum") != _checksum(value):
        raise ValueError("checksum differs")
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def attempts(storage: Storage, home: str) -> list[str]:
    """The folders of a trial's attempts, by number."""
    names = (name for name in storage.list(home) if name.startswith("attempt-"))
    return [f"{home}/{name}" for name in sorted(names, key=lambda name: int(name.removeprefix("attempt-")))]


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(storage: Storage, folder: str, state: Mapping[str, Any], *, room: int | None = None) -> bool:
    """The state of a phase in progress, under `folder`; the pointer is replaced last, then older states go.

    While one replaces another there are two. Where both do not fit into `room` bytes nothing is written; says whether it was.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    if room is not None and 2 * len(content) > room:
        log.warning("no checkpoint at step %d: two of %d bytes do not fit into %d", state["step"], len(content), room)
        return False
    file = f"checkpoint-{state['key'][:8]}-{state['step']:09d}.pt"
    storage.write(f"{folder}/{file}", content)
    pointer = {"file": file, "sha256": hashlib.sha256(content).hexdigest(), "key": state["key"], "step": state["step"]}
    storage.write(f"{folder}/checkpoint.json", as_json(pointer))
    drop_checkpoints(storage, folder, keep=file)
    return True


def load_checkpoint(storage: Storage, folders: Iterable[str], key: str) -> dict[str, Any] | None:
    """The furthest sound checkpoint of phase `key` in these folders; a damaged one is passed over with a warning."""
    best: dict[str, Any] | None = None
    for folder in folders:
        text = storage.read(f"{folder}/checkpoint.json")
        if text is None:
            continue
        try:
            pointer = json.loads(text)
            if pointer["key"] != key or (best is not None and pointer["step"] <= best["step"]):
                continue
            content = storage.read(f"{folder}/{pointer['file']}")
            if content is None or hashlib.sha256(content).hexdigest() != pointer["sha256"]:
                raise ValueError("checksum differs")
            best = torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:  # whatever is wrong with it, the phase begins anew
            log.warning("checkpoint in %s passed over: %s", folder, error)
    return best


def drop_checkpoints(storage: Storage, folder: str, keep: str | None = None) -> None:
    """Optimizer state goes when a phase ends."""
    for name in storage.list(folder):
        if name.startswith("checkpoint") and name not in (keep, "checkpoint.json" if keep else None):
            storage.delete(f"{folder}/{name}")
