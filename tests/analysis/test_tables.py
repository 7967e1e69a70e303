"""Records of trials become two tables with fixed schemas, and come back from Parquet as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from orchestrator.analysis import tables
from trainables.storage.files import Storage

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
    assert tables.parse_records(whole + whole[:20]) == [RECORD]
    assert tables.parse_records(b"") == []


def test_the_records_of_the_furthest_attempt_count(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for attempt, value in ((2, 2.0), (10, 10.0), (9, 9.0)):
        record = {**RECORD, "value": value}
        storage.write(f"trials/abc/attempt-{attempt}/records.jsonl", json.dumps(record).encode() + b"\n")
    storage.write("trials/abc/attempt-11/attempt.json", b"{}")  # it died before it wrote a number
    assert [record["value"] for record in tables.parse_records(tables.records_file(storage, "abc"))] == [10.0]
    assert tables.parse_records(tables.records_file(storage, "unknown")) == []


def test_tables_have_the_columns_that_others_build_on_and_survive_parquet(tmp_path: Path) -> None:
    made = tables.tables("study", [ROW, {**ROW, "trial": "def", "arm": None}], {"abc": [RECORD, RECORD]})
    assert list(made.results.columns) == tables.RESULTS.names and list(made.trials.columns) == tables.TRIALS.names
    assert made.results["value"].tolist() == [3.25, 3.25] and made.results["arm"].tolist() == ["alone", "alone"]
    assert json.loads(made.trials["params"][0]) == ROW["params"] and made.trials["arm"].isna().tolist() == [False, True]
    storage = Storage(str(tmp_path))
    tables.write(made, storage)
    again = tables.read(storage)
    assert again is not None
    pd.testing.assert_frame_equal(again.results, made.results)
    pd.testing.assert_frame_equal(again.trials, made.trials)


def test_empty_tables_have_their_columns_too(tmp_path: Path) -> None:
    made = tables.tables("study", [], {})
    tables.write(made, Storage(str(tmp_path)))
    for name, schema in tables.TABLES.items():  # by pandas alone, lists of numbers too
        assert list(pd.read_parquet(tmp_path / f"{name}.parquet").columns) == schema.names
    assert made.results.empty and list(made.trials.columns) == tables.TRIALS.names
    assert tables.read(Storage(str(tmp_path / "nowhere"))) is None


def test_a_record_without_a_field_is_refused() -> None:
    with pytest.raises(KeyError):
        tables.tables("study", [ROW], {"abc": [{"value": 1.0}]})


# -------------------------------------------------------------------------------------------------------- examples


def answers(key: str) -> pd.DataFrame | None:
    """Two of test and one of dev, of a phase that has any."""
    if key == "old":
        return None
    about = {
        "model": "student",
        "task": "rte",
        "part": [0, 1, 0],
        "split": ["test", "test", "dev"],
        "example": [3, 4, 3],
    }
    return pd.DataFrame({**about, "label": [1.0, np.nan, 1.0], "prediction": 1.0, "loss": len(key) / 2, "count": 1})


def of(trial: str, **more: Any) -> dict[str, Any]:
    return {**ROW, "trial": trial, "phases": {"finetune[rte]": {"key": "k"}, "teach": {"key": "old"}}, **more}


def test_examples_of_compared_trials_are_a_table_of_their_own(tmp_path: Path) -> None:
    searched = {"arm": None, "point": "p001"}
    trials = [of("a"), of("b", seed=2), of("winner", kind="confirm", **searched), of("point", **searched)]
    trials += [of("teacher", kind="teacher"), of("tune", kind="tune"), of("gone", planned=False)]
    made = tables.tables("study", trials, {}, answers)
    assert list(made.examples.columns) == tables.EXAMPLES.names
    assert made.examples["trial"].tolist() == ["a", "a", "b", "b", "winner", "winner"]
    assert set(made.examples["split"]) == {"test"} and set(made.examples["phase"]) == {"finetune[rte]"}
    assert made.examples["arm"].isna().tolist() == [False] * 4 + [True] * 2
    assert made.examples["example"].tolist() == [3, 4] * 3 and made.examples["label"].isna().sum() == 3
    assert made.examples["seed"].tolist() == [1, 1, 2, 2, 1, 1] and made.examples["loss"].tolist() == [0.5] * 6
    storage = Storage(str(tmp_path))
    tables.write(made, storage)
    again = tables.read(storage)
    assert again is not None
    pd.testing.assert_frame_equal(again.examples, made.examples)
    assert str(again.examples["arm"].dtype) == "category"


def test_a_phase_that_trials_share_is_read_once() -> None:
    asked: list[str] = []

    def once(key: str) -> pd.DataFrame | None:
        asked.append(key)
        return answers(key)

    tables.tables("study", [of("a"), of("b")], {}, once)
    assert asked == ["k", "old"]


def test_tables_of_before_there_were_examples_are_read_without(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tables.write(tables.tables("study", [ROW], {}), storage)
    storage.delete("examples.parquet")
    again = tables.read(storage)
    assert again is not None
    assert again.examples.empty and list(again.examples.columns) == tables.EXAMPLES.names


def test_a_million_rows_stay_compact(tmp_path: Path) -> None:
    num = 20_000
    draw = np.random.default_rng(0)
    columns = {"label": draw.integers(0, 2, num).astype(float), "prediction": 1.0, "loss": draw.random(num), "count": 1}
    frame = pd.DataFrame(
        {"model": "student", "task": "qqp", "split": "test", "part": 0, "example": range(num), **columns}
    )
    made = tables.tables("study", [of(str(i), seed=i) for i in range(5)], {}, lambda key: frame if key == "k" else None)
    assert len(made.examples) == 5 * num
    assert made.examples.memory_usage(deep=True).sum() < 80 * len(made.examples)  # bytes
    storage = Storage(str(tmp_path))
    tables.write(made, storage)
    assert storage.size("examples.parquet") < 20 * len(made.examples)
