"""Records of trials become two tables with fixed schemas, and come back from Parquet as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from orchestrator import results
from trainables.store import Storage

RECORD: dict[str, Any] = {
    "model": "student", "phase": "distil", "task": "corpus", "split": "dev", "metric": "mlm_loss", "step": 4, "progress": 0.5,
    "tokens": 64, "seconds": 1.5, "device_seconds": 3.0, "flops": 1e9, "t": 1_700_000_000_000, "value": 3.25,
}  # fmt: skip
ROW: dict[str, Any] = {
    "trial": "abc", "point": "alone", "arm": "alone", "seed": 1, "kind": "trial", "planned": True, "params": {"sizes": "big", "lr": 0.1},
    "status": "ended", "reason": None, "attempts": 1, "node": "here", "started": 1, "ended": 2, "phases": {"distil": {"key": "k"}},
    "upstream_flops": 0.0, "upstream_seconds": 0.0, "peak_memory": 1e6, "last_lines": ["not in the schema"],
}  # fmt: skip


def test_the_last_line_may_be_cut_off_by_a_kill() -> None:
    whole = json.dumps(RECORD).encode() + b"\n"
    assert results.parse_records(whole + whole[:20]) == [RECORD]
    assert results.parse_records(b"") == []


def test_the_records_of_the_furthest_attempt_count(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for attempt, value in ((2, 2.0), (10, 10.0), (9, 9.0)):
        record = {**RECORD, "value": value}
        storage.write(f"trials/abc/attempt-{attempt}/records.jsonl", json.dumps(record).encode() + b"\n")
    storage.write("trials/abc/attempt-11/attempt.json", b"{}")  # it died before it wrote a number
    assert [record["value"] for record in results.read_records(storage, "abc")] == [10.0]
    assert results.read_records(storage, "unknown") == []


def test_tables_have_the_columns_that_others_build_on_and_survive_parquet(tmp_path: Path) -> None:
    made = results.tables("study", [ROW, {**ROW, "trial": "def", "arm": None}], {"abc": [RECORD, RECORD]})
    assert list(made.results.columns) == results.RESULTS.names and list(made.trials.columns) == results.TRIALS.names
    assert made.results["value"].tolist() == [3.25, 3.25] and made.results["arm"].tolist() == ["alone", "alone"]
    assert json.loads(made.trials["params"][0]) == ROW["params"] and made.trials["arm"].isna().tolist() == [False, True]
    storage = Storage(str(tmp_path))
    results.write(made, storage, "")
    again = results.read(storage, "")
    assert again is not None
    pd.testing.assert_frame_equal(again.results, made.results)
    pd.testing.assert_frame_equal(again.trials, made.trials)


def test_empty_tables_have_their_columns_too(tmp_path: Path) -> None:
    made = results.tables("study", [], {})
    assert made.results.empty and list(made.trials.columns) == results.TRIALS.names
    assert results.read(Storage(str(tmp_path)), "nowhere") is None


def test_a_record_without_a_field_is_refused() -> None:
    with pytest.raises(KeyError):
        results.tables("study", [ROW], {"abc": [{"value": 1.0}]})
