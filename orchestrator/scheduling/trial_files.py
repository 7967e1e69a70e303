"""A trial's own files as the driver writes and reads them: how it began, how it ended, who asked it to leave.

`trial.json` stands before a trial runs, `end.json` after it; what an end says is checked against its checksum, and the
records against theirs, so that a damaged file counts as none: the trial runs again, and finds its phases in the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from orchestrator.analysis.tables import parse_records, records_file
from trainables.storage.checkpoints import attempts, drop_checkpoints
from trainables.storage.files import Storage, as_json, verify_checksum, with_checksum
from trainables.training.stop_signals import LEAVE

log = logging.getLogger("codistill")
Row = dict[str, Any]  # a row of the trials table
Records = list[dict[str, Any]]


def write_start(home: Storage, trial: str, start: Mapping[str, Any]) -> None:
    home.delete(f"trials/{trial}/{LEAVE}")  # was for the attempt before
    home.write(f"trials/{trial}/trial.json", as_json(start))


def read_start(home: Storage, trial: str) -> Row | None:
    """None where there is none, or none that can be read."""
    try:
        start: Row | None = json.loads(home.read(f"trials/{trial}/trial.json") or b"null")
    except ValueError:
        return None
    return start


def write_end(home: Storage, trial: str, row: Mapping[str, Any]) -> Records:
    """The one file that makes a trial over. Returns its records."""
    text = records_file(home, trial)
    home.write(f"trials/{trial}/end.json", with_checksum({**row, "records": hashlib.sha256(text).hexdigest()}))
    return parse_records(text)


def read_end(home: Storage, trial: str) -> tuple[Row, Records] | None:
    """None where there is none, or none that can be trusted."""
    text = home.read(f"trials/{trial}/end.json")
    if text is None:
        return None
    try:
        row = verify_checksum(text)
        records = records_file(home, trial)
        if hashlib.sha256(records).hexdigest() != row.pop("records"):
            raise ValueError("records.jsonl is not what it says")
        return row, parse_records(records)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("trial %s: end.json is damaged (%s); the trial runs again from what the store has", trial, error)
        return None


def is_running(home: Storage, trial: str) -> bool:
    """Whether it began and has no end, or an attempt after its end: what failed, or was stopped early, may run again."""
    if read_start(home, trial) is None:
        return False
    end = read_end(home, trial)
    made = [int(name.rpartition("-")[2]) for name in attempts(home, f"trials/{trial}")]
    return end is None or max(made, default=0) > int(end[0].get("attempts") or 0)


def ask(home: Storage, trial: str, what: str) -> None:
    """Asks a running trial to `stop` for good, or to `leave` for now: it writes its checkpoint and goes."""
    home.write(f"trials/{trial}/{LEAVE}", what.encode())


def forget_checkpoints(home: Storage, trial: str) -> None:
    """Of a trial that will not go on."""
    for folder in attempts(home, f"trials/{trial}"):
        drop_checkpoints(home, folder)


def checkpoint_bytes(home: Storage, trial: str) -> int:
    folders = attempts(home, f"trials/{trial}")
    files = [f"{folder}/{name}" for folder in folders for name in home.list(folder) if name.startswith("checkpoint")]
    return sum(home.size(file) for file in files)
