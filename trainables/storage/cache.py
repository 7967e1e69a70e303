"""This machine's copies of what lies in remote storage: prepared data and weights. Bound in bytes; the longest unused go first.

`CODISTILL_CACHE` names the folder (~/.cache/codistill), `CODISTILL_CACHE_GB` the bound: by default half of what the disk has
for it. All processes of a machine share it, without locks: copies are made beside their place and renamed.
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

log = logging.getLogger("codistill")
IN_USE_SECONDS = (
    600.0  # what was asked for so lately may be about to be opened; what is open stays readable without its name
)
KINDS = ("data", "weights")


def folder(kind: str) -> Path:
    """Where copies of a kind (one of KINDS) lie."""
    return Path(os.environ.get("CODISTILL_CACHE", "~/.cache/codistill")).expanduser() / kind


def read(sha256: str, fetch: Callable[[], bytes | None]) -> bytes | None:
    """A file by its checksum: the copy here if it is whole, else what `fetch` brings, of which a copy is kept.

    What `fetch` brings is not judged here. A cache that cannot be written is no reason to fail: it is said, and done without.
    """
    path = folder("weights") / sha256
    with suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == sha256:
            used(path)
            return content
        log.warning("%s is not as it was written; it is fetched again", path)
    fetched = fetch()
    if fetched is not None and hashlib.sha256(fetched).hexdigest() == sha256:
        try:
            if make_room(len(fetched)):
                _keep(path, fetched)
        except OSError as error:
            log.warning("nothing is kept in %s: %s", path.parent, error.strerror or error)
    return fetched


def used(path: Path) -> None:
    """Marks a copy as used now."""
    with suppress(OSError):
        os.utime(path)


def make_room(num_bytes: int) -> bool:
    """Deletes copies that were not used for longest until so many bytes fit within the bound; says whether they do."""
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
    """Bytes; `held`: what the copies take now."""
    if given := os.environ.get("CODISTILL_CACHE_GB"):
        try:
            return int(float(given) * 1e9)
        except ValueError:
            raise ValueError(f"CODISTILL_CACHE_GB: {given!r} is no number of gigabytes") from None
    root = folder(KINDS[0]).parent
    root.mkdir(parents=True, exist_ok=True)
    return (shutil.disk_usage(root).free + held) // 2


def _copies(home: Path) -> list[tuple[float, int, Path]]:
    """Last use, bytes, place of each copy."""
    found = []
    for path in home.iterdir() if home.is_dir() else ():
        if not path.name.startswith("."):
            with suppress(OSError):  # another process was quicker
                files = (path, *path.rglob("*")) if path.is_dir() else (path,)
                found.append((path.stat().st_mtime, sum(f.stat().st_size for f in files if f.is_file()), path))
    return found


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _delete(path: Path) -> None:
    away = Path(tempfile.mkdtemp(prefix=".", dir=path.parent))
    with suppress(OSError):  # another process was quicker
        path.rename(away / path.name)
    shutil.rmtree(away, ignore_errors=True)
