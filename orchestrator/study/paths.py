"""Paths as users write them: where those of a study lead, and the URI of a SQLite file."""

from __future__ import annotations

import logging
import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from trainables.storage.files import matching

log = logging.getLogger("codistill")


def sqlite_uri(file: Path) -> str:
    """Returns the URI of a SQLite file as SQLAlchemy reads it: `%20` is an escape, and `?` starts the options."""
    return "sqlite:///" + re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", str(file)).replace("?", "%3F")


def sqlite_file(uri: str) -> Path | None:
    """Returns the SQLite file that a URI names; None for a database in memory, and for any other URI."""
    path = unquote(re.sub(r"^sqlite:/{0,3}|\?.*$", "", uri))
    return Path(path).absolute() if uri.startswith("sqlite:") and path not in ("", ":memory:") else None


def locate(folder: str, text: str, *, may_be_id: bool) -> str:
    """Returns a path of a study, whose file is in `folder`, as every process of this machine finds it.

    What only the working directory has is taken from there, with a warning. `may_be_id`: a text that names no folder may be an
    id of the hub, and stays as it is.
    """
    if "://" in text:
        return text
    path = os.path.expanduser(text)
    if os.path.isabs(path):
        return path
    beside_study, here = (os.path.abspath(os.path.join(start, path)) for start in (folder, os.curdir))
    is_there = os.path.isdir if may_be_id else matching
    if is_there(beside_study):
        return beside_study
    if is_there(here):
        _warn(text, os.path.abspath(folder), here)
        return here
    return text if may_be_id and not text.startswith(".") else beside_study


@cache  # once for each path, however many trials name it
def _warn(text: str, folder: str, here: str) -> None:
    log.warning("%r is not in %s, the folder of the study; read from the working directory: %s", text, folder, here)
