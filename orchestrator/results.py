"""Records and ends of trials -> the two tables. Everything here is derived from plain files and can be made again.

`results`: one row per number. `trials`: one row per trial. Both schemas are fixed; others build on them.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.messages import StudyError, has_secret, redact
from trainables.store import Storage, attempts

RESULTS = pa.schema(
    [
        ("study", pa.string()),
        ("trial", pa.string()),
        ("point", pa.string()),  # the arm's name, or p000 … of the search
        ("arm", pa.string()),  # null for a searched point
        ("seed", pa.int64()),
        ("kind", pa.string()),  # trial | tune | teacher | confirm
        ("planned", pa.bool_()),
        ("model", pa.string()),
        ("phase", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),  # train | dev | test | system
        ("metric", pa.string()),
        ("step", pa.int64()),  # optimizer steps of the phase
        ("progress", pa.float64()),  # fraction of its budget
        ("tokens", pa.int64()),  # non-padding input tokens of the phase over all ranks
        ("seconds", pa.float64()),  # wall time of the phase over attempts, without evaluation
        ("device_seconds", pa.float64()),
        ("flops", pa.float64()),
        ("t", pa.int64()),  # UTC, ms
        ("value", pa.float64()),
    ]
)
TRIALS = pa.schema(
    [
        ("trial", pa.string()),
        ("study", pa.string()),
        ("point", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("kind", pa.string()),
        ("planned", pa.bool_()),
        ("params", pa.string()),  # json
        ("status", pa.string()),  # running | ended | stopped | failed
        ("reason", pa.string()),
        ("attempts", pa.int64()),
        ("node", pa.string()),
        ("started", pa.int64()),
        ("ended", pa.int64()),
        ("phases", pa.string()),  # json: phase -> key, reused, flops, seconds, device_seconds, tokens
        ("upstream_flops", pa.float64()),
        ("upstream_seconds", pa.float64()),
        ("peak_memory", pa.float64()),
    ]
)
RECORD = (
    "model",
    "phase",
    "task",
    "split",
    "metric",
    "step",
    "progress",
    "tokens",
    "seconds",
    "device_seconds",
    "flops",
    "t",
    "value",
)


@dataclass(frozen=True)
class Tables:
    results: pd.DataFrame
    trials: pd.DataFrame


def open_storage(uri: str) -> Storage:
    """The storage that a person named, as a place that slots find from wherever they run. Raises StudyError where there
    is no such kind, or no way to it; and where the URI holds a secret: slots, their logs and Ray's files carry it."""
    if has_secret(uri):
        kind = re.sub(r"\W", "_", uri.partition("://")[0]).upper()
        raise StudyError(
            f"--storage {redact(uri)}: a URI that slots and logs carry takes no password; give it in the environment, "
            f"as FSSPEC_{kind}_PASSWORD (FSSPEC_<PROTOCOL>_<ARGUMENT>), or in the service's own way (AWS_SECRET_ACCESS_KEY)"
        )
    storage = Storage(uri if "://" in uri else os.path.abspath(uri))
    try:
        storage.list()
    except (ValueError, ImportError, OSError) as error:
        reason = redact(str(error).strip().splitlines()[0])
        raise StudyError(f"--storage {redact(uri)}: cannot be read ({reason}); give a folder or URI that can") from None
    return storage


def read_records(storage: Storage, trial: str) -> list[dict[str, Any]]:
    """What the trial's last attempt has written; an attempt begins with what the one before it had kept."""
    return parse_records(records_file(storage, trial))


def records_file(storage: Storage, trial: str) -> bytes:
    for attempt in reversed(attempts(storage, f"trials/{trial}")):
        text = storage.read(f"{attempt}/records.jsonl")
        if text is not None:
            return text
    return b""


def parse_records(text: bytes) -> list[dict[str, Any]]:
    """Whole lines only: the last one may have been cut off by a kill."""
    return [json.loads(line) for line in text.split(b"\n")[:-1] if line]


def tables(study: str, trials: Iterable[Mapping[str, Any]], records: Mapping[str, list[dict[str, Any]]]) -> Tables:
    """`trials`: rows of the trials table; `records`: by trial id."""
    trial_rows = [
        {"study": study, **row, "params": json.dumps(row["params"]), "phases": json.dumps(row["phases"])}
        for row in trials
    ]
    result_rows = []
    for row in trial_rows:
        whose = {key: row[key] for key in ("study", "trial", "point", "arm", "seed", "kind", "planned")}
        result_rows += [{**whose, **{key: record[key] for key in RECORD}} for record in records.get(row["trial"], ())]
    return Tables(_frame(result_rows, RESULTS), _frame(trial_rows, TRIALS))


def _frame(rows: list[dict[str, Any]], schema: pa.Schema) -> pd.DataFrame:
    named = [{name: row.get(name) for name in schema.names} for row in rows]
    frame: pd.DataFrame = pa.Table.from_pylist(named, schema=schema).to_pandas()
    return frame


def write(tables: Tables, storage: Storage, folder: str) -> None:
    for name, frame, schema in (("results", tables.results, RESULTS), ("trials", tables.trials, TRIALS)):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), buffer, compression="zstd")
        storage.write(f"{folder}/{name}.parquet", buffer.getvalue())


def read(storage: Storage, folder: str) -> Tables | None:
    frames = []
    for name in ("results", "trials"):
        content = storage.read(f"{folder}/{name}.parquet")
        if content is None:
            return None
        frames.append(pq.read_table(io.BytesIO(content)).to_pandas())
    return Tables(*frames)
