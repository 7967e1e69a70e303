"""Plain files that are the truth: atomic writes, memoised phases, checkpoints. Any fsspec URI; knows no Ray.

A phase lies under `phases/<key>/`. Its weights are content-addressed files; `phase.json`, written last and only once,
names them with their checksums: before it the phase is not there, and the first complete publication wins.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

log = logging.getLogger("codistill")


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


def with_checksum(value: Mapping[str, Any]) -> bytes:
    """As JSON, with a checksum in it."""
    return as_json({**value, "checksum": _checksum(value)})


def verify_checksum(text: bytes) -> dict[str, Any]:
    """What was sealed. Raises ValueError, KeyError, TypeError or AttributeError where it is not what was written."""
    value: dict[str, Any] = json.loads(text)
    if value.pop("checksum") != _checksum(value):
        raise ValueError("checksum differs")
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
