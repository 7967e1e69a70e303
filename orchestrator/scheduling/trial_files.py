"""The driver's files of a trial: how the trial began, how it ended, and the request to stop it.

`trial.json` is written before a trial runs, `end.json` after it. An end is checked against its checksum, and the records
against theirs; where one of them is damaged the trial runs again, and finds its phases in the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from orchestrator.analysis.tables import parse_records, records_file
from trainables.runtime.outcome import Status
from trainables.storage.checkpoints import drop_checkpoints
from trainables.storage.files import Storage, as_json, attempts, verify_checksum, with_checksum
from trainables.training.stop_signals import LEAVE

log = logging.getLogger("codistill")
Row = dict[str, Any]  # a row of the trials table
Records = list[dict[str, Any]]
READERS = 32  # requests at a time: object storage takes about as long for one as for many
T = TypeVar("T")


def side_by_side(read: Callable[[str], T], trials: Iterable[str]) -> Iterator[T]:
    """Reads of many trials at a time; yields the results in the order of the trials."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(read, trials)


def read_all(home: Storage) -> dict[str, tuple[Row, Records | None]]:
    """Reads each trial that has begun: its row, and its records once it has ended."""
    trials = home.list("trials")
    rows = side_by_side(partial(_read, home), trials)
    return {trial: row for trial, row in zip(trials, rows, strict=True) if row is not None}


def _read(home: Storage, trial: str) -> tuple[Row, Records | None] | None:
    end = read_end(home, trial)
    if end is not None:
        return end
    start = read_start(home, trial)
    return None if start is None else (start, None)


def write_start(home: Storage, trial: str, start: Mapping[str, Any]) -> None:
    request = f"trials/{trial}/{LEAVE}"
    if home.read(request) is not None:
        _note_left(home, trial)
        home.delete(request)
    home.write(f"trials/{trial}/trial.json", as_json(start))


def _note_left(home: Storage, trial: str) -> None:
    """Gives the last attempt, which was asked to leave, a status if the sweep ended it before it had one."""
    for folder in attempts(home, f"trials/{trial}")[-1:]:
        name = f"{folder}/attempt.json"
        with suppress(ValueError):  # half-written
            about = json.loads(home.read(name) or b"")
            home.write(name, as_json({"status": Status.SUSPENDED, **about}))


def read_start(home: Storage, trial: str) -> Row | None:
    """Reads `trial.json`; None where it is missing or damaged."""
    try:
        start: Row | None = json.loads(home.read(f"trials/{trial}/trial.json") or b"null")
    except ValueError:
        return None
    return start


def write_end(home: Storage, trial: str, row: Mapping[str, Any]) -> Records:
    """Writes the file that ends a trial. Returns the trial's records."""
    text = records_file(home, trial)
    home.write(f"trials/{trial}/end.json", with_checksum({**row, "records": hashlib.sha256(text).hexdigest()}))
    return parse_records(text)


def read_end(home: Storage, trial: str) -> tuple[Row, Records] | None:
    """Reads `end.json` and the records; None where the end is missing or one of them is damaged."""
    text = home.read(f"trials/{trial}/end.json")
    if text is None:
        return None
    try:
        row = verify_checksum(text)
        checksum = row.pop("records")
        # the last attempt is nearly always the one of the end, which saves a listing
        records = home.read(f"trials/{trial}/attempt-{row.get('attempts')}/records.jsonl") or b""
        if hashlib.sha256(records).hexdigest() != checksum:
            records = records_file(home, trial)
        if hashlib.sha256(records).hexdigest() != checksum:
            raise ValueError("records.jsonl differs from its checksum")
        return row, parse_records(records)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("trial %s: end.json is damaged (%s); the trial runs again from the stored phases", trial, error)
        return None


def is_running(home: Storage, trial: str) -> bool:
    """Returns whether a trial has begun and has no end, or has begun an attempt after its end (a retry, or an audit)."""
    if read_start(home, trial) is None:
        return False
    end = read_end(home, trial)
    made = [int(name.rpartition("-")[2]) for name in attempts(home, f"trials/{trial}")]
    return end is None or max(made, default=0) > int(end[0].get("attempts") or 0)


def ask(home: Storage, trial: str, what: str) -> None:
    """Requests that a running trial writes its checkpoint and stops: for good (`stop`), or for now (`leave`)."""
    home.write(f"trials/{trial}/{LEAVE}", what.encode())


def forget_checkpoints(home: Storage, trial: str) -> None:
    """Deletes the checkpoints of a trial that will not resume."""
    for folder in attempts(home, f"trials/{trial}"):
        drop_checkpoints(home, folder)


def checkpoint_bytes(home: Storage, trial: str) -> int:
    folders = attempts(home, f"trials/{trial}")
    files = [f"{folder}/{name}" for folder in folders for name in home.list(folder) if name.startswith("checkpoint")]
    return sum(home.size(file) for file in files)
