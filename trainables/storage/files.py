"""Files by path or any fsspec URI: atomic writes, one error for all backends, JSON with checksums. Knows no Ray."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

log = logging.getLogger("codistill")


def is_local(uri: str) -> bool:
    """Returns whether a text is a path of this machine, and no URI; in a path `::`, `?` and `#` stand for themselves."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def open_place(uri: str) -> tuple[Any, str]:
    """Returns the file system of a path or URI, and the path there."""
    if not is_local(uri):
        return fsspec.core.url_to_fs(uri)  # type: ignore[no-any-return]
    path = re.sub("^(file|local)://", "", uri)
    return LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def matching(path: str) -> list[str]:
    """Returns the local paths that a path or glob names, sorted.

    The longest part that exists is taken as written, so that the brackets of a folder's name are no pattern.
    """
    parts = os.path.abspath(path).split("/")
    num = next(num for num in range(len(parts), 0, -1) if os.path.lexists("/".join(parts[:num]) or "/"))
    folder, pattern = "/".join(parts[:num]) or "/", "/".join(parts[num:])
    if not pattern:
        return [folder]
    found = glob.glob(pattern, root_dir=folder, recursive=True, include_hidden=True)
    return sorted(os.path.join(folder, name) for name in found)


class StorageError(OSError):
    """The storage fails: it is full, unreachable, or access is denied. The trial is not at fault."""


@dataclass(frozen=True)
class Storage:
    """A folder by path or URI. Names below the folder use `/`. All methods raise StorageError where the storage fails."""

    uri: str

    @property
    def is_local(self) -> bool:
        return is_local(self.uri)

    def _at(self, name: str) -> tuple[Any, str]:
        fs, root = open_place(self.uri)
        return fs, f"{root.rstrip('/')}/{name}" if name else root.rstrip("/")

    @contextmanager
    def _reached(self, path: str) -> Iterator[None]:
        """Turns the errors of each backend into StorageError, except those that a name exists or does not."""
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
        """Returns the local path of a name (local storage only)."""
        return Path(self._at(name)[1])

    def read(self, name: str) -> bytes | None:
        """Returns the content, or None where there is no such file."""
        fs, path = self._at(name)
        try:
            with self._reached(path):
                return bytes(fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all. Locally: a temporary file, fsync, rename; elsewhere one PUT."""
        fs, path = self._at(name)
        with self._reached(path):
            if not self.is_local:
                fs.pipe_file(path, content)
                return
            temporary = _temporary(path, content)
            os.replace(temporary, path)
            sync(os.path.dirname(path))

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file unless the name exists; returns whether the file was written."""
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
            sync(os.path.dirname(path))
        return True

    def list(self, name: str = "") -> list[str]:
        """Returns the names in a folder, sorted; none where there is no such folder."""
        fs, path = self._at(name)
        try:
            with self._reached(path):
                paths = fs.ls(path, detail=False, **({} if self.is_local else {"refresh": True}))
        except (FileNotFoundError, NotADirectoryError):
            return []
        inside = {str(item).rstrip("/") for item in paths} - {path}  # object stores may list the folder itself
        return sorted(name for item in inside if not (name := item.rsplit("/", 1)[-1]).startswith("."))

    def size(self, name: str) -> int:
        """Returns the bytes of a file, or of all files below a folder."""
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
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk: the room is needed
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary


def sync(path: str | Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(uri: str) -> None:
    """Raises OSError where a file of a megabyte, as tables and a report may need, cannot be written and read back."""
    storage = Storage(uri)
    name = f".probe-{uuid.uuid4().hex[:8]}"
    content = bytes(2**20)
    storage.write(name, content)
    if storage.read(name) != content:
        raise OSError(f"{uri}: a file that was written could not be read back")
    storage.delete(name)


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def with_checksum(value: Mapping[str, Any]) -> bytes:
    """Serialises a value as JSON with its checksum."""
    return as_json({**value, "checksum": _checksum(value)})


def verify_checksum(text: bytes) -> dict[str, Any]:
    """Parses the output of `with_checksum`. Raises ValueError, KeyError, TypeError or AttributeError where it differs."""
    value: dict[str, Any] = json.loads(text)
    if value.pop("checksum") != _checksum(value):
        raise ValueError("checksum differs")
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def attempts(storage: Storage, home: str) -> list[str]:
    """Returns the folders of a trial's attempts, by number."""
    names = (name for name in storage.list(home) if name.startswith("attempt-"))
    return [f"{home}/{name}" for name in sorted(names, key=lambda name: int(name.removeprefix("attempt-")))]


def bytes_text(size: float) -> str:
    """Formats a size in bytes with a decimal unit: 1500 -> '1.5 KB'."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
