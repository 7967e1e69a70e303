"""This machine's copies of remote prepared data and weights, bounded in bytes; the least recently used are deleted first.

`CODISTILL_CACHE` names the folder (~/.cache/codistill), `CODISTILL_CACHE_GB` the bound: by default half of the disk space
that is free or taken by the copies. All processes of a machine share the folder, without locks: copies are made beside their
place and renamed. (diskcache keeps a database, which NFS breaks, and no folders; fsspec's caches have no bound.)
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trainables.storage.files import Storage

log = logging.getLogger("codistill")
IN_USE_SECONDS = 600.0  # a copy that was used so lately may be about to be opened; an open file outlives its name
KINDS = ("data", "weights")


def folder(kind: str) -> Path:
    """Returns the folder of the copies of a kind (one of KINDS)."""
    return Path(os.environ.get("CODISTILL_CACHE", "~/.cache/codistill")).expanduser() / kind


def read(sha256: str, fetch: Callable[[], bytes | None]) -> bytes | None:
    """Returns a file by its checksum: the copy of this machine if it is whole, else what `fetch` returns.

    A fetched file with the right checksum is kept; a file with another checksum is returned, too, for the caller to judge. A
    cache that cannot be written is logged and does not fail the caller.
    """
    path = folder("weights") / sha256
    with suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == sha256:
            used(path)
            return content
        log.warning("%s is not as it was written; the file is fetched again", path)
    fetched = fetch()
    if fetched is not None and hashlib.sha256(fetched).hexdigest() == sha256:
        try:
            if make_room(len(fetched)):
                Storage(str(path.parent)).write(path.name, fetched)
        except OSError as error:
            log.warning("no copy is kept in %s: %s", path.parent, error.strerror or error)
    return fetched


def used(path: Path) -> None:
    """Marks a copy as used now."""
    with suppress(OSError):
        os.utime(path)


def make_room(num_bytes: int) -> bool:
    """Deletes the least recently used copies until so many bytes fit within the bound; returns whether they fit."""
    copies = sorted((copy for kind in KINDS for copy in _copies(folder(kind))), key=lambda copy: copy[0])
    total = sum(size for _, size, _ in copies)
    bound = _bound(total)
    for last, size, path in copies:
        if total + num_bytes <= bound:
            break
        if time.time() - last > IN_USE_SECONDS:
            _delete(path)
            total -= size
    return total + num_bytes <= bound


def _bound(held: int) -> int:
    """Returns the bound in bytes; `held`: bytes of all copies."""
    if given := os.environ.get("CODISTILL_CACHE_GB"):
        try:
            return int(float(given) * 1e9)
        except ValueError:
            raise ValueError(f"CODISTILL_CACHE_GB: {given!r} is not a number; expected gigabytes") from None
    root = folder(KINDS[0]).parent
    root.mkdir(parents=True, exist_ok=True)
    return (shutil.disk_usage(root).free + held) // 2


def _copies(home: Path) -> list[tuple[float, int, Path]]:
    """Returns (last use, bytes, path) of each copy."""
    copies = []
    for path in home.iterdir() if home.is_dir() else ():
        if not path.name.startswith("."):
            with suppress(OSError):  # another process was quicker
                files = (path, *path.rglob("*")) if path.is_dir() else (path,)
                copies.append((path.stat().st_mtime, sum(f.stat().st_size for f in files if f.is_file()), path))
    return copies


def _delete(path: Path) -> None:
    away = Path(tempfile.mkdtemp(prefix=".", dir=path.parent))
    with suppress(OSError):  # another process was quicker
        path.rename(away / path.name)
    shutil.rmtree(away, ignore_errors=True)
