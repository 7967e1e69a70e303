"""Folders that are published whole or not at all, in local or remote storage, whatever they hold."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainables.config.errors import DataError
from trainables.storage import cache
from trainables.storage.files import is_local, open_place, sync

log = logging.getLogger(__name__)

ABOUT = "about.json"  # written last; names the other files with their checksums


def publish(folder: str, name: str, write: Callable[[Path], dict[str, Any]]) -> None:
    """Makes `<folder>/<name>/` unless it is there and whole. `write` fills a folder and returns the facts of about.json."""
    fs, root = open_place(folder)
    if is_local(folder):
        _make(Path(root, name), write)
        return
    if fs.exists(f"{root}/{name}/{ABOUT}"):
        try:
            fetch(folder, name)
            return
        except DataError as error:
            log.warning("%s; the folder is made again", error)
    _make(_cached(name), write)
    _upload(fs, _cached(name), f"{root}/{name}")


def fetch(folder: str, name: str) -> Path:
    """Returns `<folder>/<name>/` as a folder of this machine; a remote folder is copied to the cache once."""
    fs, root = open_place(folder)
    if is_local(folder):
        return Path(root, name)
    _make(_cached(name), lambda temp: _download(fs, f"{root}/{name}", temp))
    cache.used(_cached(name))
    return _cached(name)


def read_about(home: Path) -> dict[str, Any]:
    """Reads about.json. Raises DataError where sizes of files differ; `publish` compares checksums."""
    try:
        about: dict[str, Any] = json.loads((home / ABOUT).read_text())
        wrong = [name for name, file in about["files"].items() if (home / name).stat().st_size != file["bytes"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no prepared data in {home} ({error}); prepare it first") from error
    if wrong:
        raise DataError(f"{', '.join(wrong)} in {home} is not as it was written; prepare the data again")
    return about


def _make(home: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Writes a folder beside `home` and renames it; the first whole folder wins, and a broken one is replaced."""
    if _is_whole(home):
        return
    home.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    broken = temp.with_name(f"{temp.name}-broken")
    try:
        about = write(temp)
        files = {str(path.relative_to(temp)): path for path in sorted(temp.rglob("*")) if path.is_file()}
        sums = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
        (temp / ABOUT).write_text(json.dumps({**about, "files": sums}, indent=1, sort_keys=True))
        for path in (*temp.rglob("*"), temp):
            sync(path)
        temp.chmod(0o755)  # mkdtemp's folders are for their owner only
        if home.exists() and not _is_whole(home):
            log.warning("%s is not whole; it is replaced", home)
            with suppress(FileNotFoundError):  # another process was quicker
                home.rename(broken)
        try:
            temp.rename(home)
        except OSError:  # the name is taken: another process was quicker
            if not _is_whole(home):
                raise
        sync(home.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(broken, ignore_errors=True)


def _is_whole(home: Path) -> bool:
    try:
        about = json.loads((home / ABOUT).read_text())
        return all(_sha256(home / name) == file["sha256"] for name, file in about["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _upload(fs: Any, home: Path, target: str) -> None:
    for name in (*json.loads((home / ABOUT).read_text())["files"], ABOUT):
        fs.makedirs(os.path.dirname(f"{target}/{name}"), exist_ok=True)
        fs.put_file(str(home / name), f"{target}/{name}")


def _download(fs: Any, source: str, temp: Path) -> dict[str, Any]:
    where = fs.unstrip_protocol(source)
    try:
        about: dict[str, Any] = json.loads(fs.cat_file(f"{source}/{ABOUT}"))
        cache.make_room(sum(file["bytes"] for file in about["files"].values()))  # the files are needed, room or not
        for name in about["files"]:
            (temp / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{source}/{name}", str(temp / name))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no prepared data in {where} ({error}); prepare it first") from error
    wrong = [name for name, file in about["files"].items() if _sha256(temp / name) != file["sha256"]]
    if wrong:
        raise DataError(f"{', '.join(wrong)} in {where} is not as it was written; prepare the data again")
    return about


def _cached(name: str) -> Path:
    return cache.folder("data") / name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
