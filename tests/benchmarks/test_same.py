"""Tests the comparison of two storages on small tables."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import same
from orchestrator.analysis.tables import EXAMPLES, RESULTS, TRIALS


def trial(name: str, kind: str, seed: int, **fields: Any) -> dict[str, Any]:
    defaults = {"study": "tiny", "trial": name, "kind": kind, "seed": seed, "arm": None, "params": {}}
    return {**defaults, "planned": True, "upstream_flops": 5.0, **fields}


TRIALS_OF = [
    trial("a0", "trial", 0, arm="alone", point="alone", params={"lr": 0.1}),
    trial("t0", "teacher", 0, point="teach"),
    trial("t1", "teacher", 0, point="teach"),  # the same phase, recorded again
    trial("u0", "tune", 1000, arm="alone", point="alone", params={"lr": 0.1}),
    trial("u1", "tune", 1000, arm="alone", point="alone", params={"lr": 0.2}),
    trial("p0", "trial", 1000, point="p000", params={"lr": 0.15}),
    trial("t2", "teacher", 1000, point="teach"),  # of the search
]


def storage(folder: Path, prefix: str = "") -> Path:
    """Writes one study; `prefix` changes every trial's id."""
    home = folder / "tiny"
    home.mkdir(parents=True)
    trials = [{**row, "trial": prefix + row["trial"], "params": json.dumps(row["params"])} for row in TRIALS_OF]
    results, examples = [], []
    for row in trials:
        names = ("study", "trial", "point", "arm", "seed", "kind", "planned")
        whose = {name: row.get(name) for name in names}
        phase = "teach" if row["kind"] == "teacher" else "distil"
        place = {"model": "m", "phase": phase, "task": "corpus", "step": 8, "progress": 1.0, "tokens": 64, "flops": 1e9}
        seed = row["seed"] + (0.25 if row["params"] == '{"lr": 0.2}' else 0)
        for metric, split, value in (("mlm_loss", "dev", 2 + seed), ("latency_ms", "system", 1.0)):
            results.append({**whose, **place, "metric": metric, "split": split, "value": value / 3, "seconds": 1.0})
        if row["kind"] == "trial" and row["arm"]:
            for example in range(2):
                answer = {"part": 0, "example": example, "loss": example / 7, "count": 3}
                examples.append({**whose, **place, "split": "test", **answer})
    for name, schema, rows in (
        ("results", RESULTS, results),
        ("trials", TRIALS, trials),
        ("examples", EXAMPLES, examples),
    ):
        frame = pd.DataFrame(rows)
        frame.reindex(columns=schema.names).to_parquet(home / f"{name}.parquet")
    return folder


def change(folder: Path, table: str, edit: Any) -> None:
    path = folder / "tiny" / f"{table}.parquet"
    edit(pd.read_parquet(path)).to_parquet(path)


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["same", *map(str, args)])
    return same.main()


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    return storage(tmp_path / "old"), storage(tmp_path / "new", prefix="other-")


def test_equal_numbers_in_another_order_under_other_ids(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(both[1], "results", lambda frame: frame.sample(frac=1, random_state=0))
    assert run(monkeypatch, *both) == 0
    # results: 6 keys (two teachers record one) x 3 columns; trials: 6; examples: 2 x 4
    assert capsys.readouterr().out == "tiny: 32 numbers compared, 32 equal, 0 differ\n"


def test_one_digit_off_is_named_with_its_key_and_both_values(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(frame: pd.DataFrame) -> pd.DataFrame:
        row = frame[(frame["kind"] == "tune") & (frame["metric"] == "mlm_loss")].index[1]
        frame.loc[row, "value"] += 1e-13
        return frame

    change(both[1], "results", edit)
    assert run(monkeypatch, *both) == 1
    out = capsys.readouterr().out
    assert "32 numbers compared, 31 equal, 1 differ\n" in out
    assert 'kind=tune arm=alone seed=1000 params={"lr": 0.2} phase=distil model=m' in out
    assert f"old {1002.25 / 3!r}, new {1002.25 / 3 + 1e-13!r}" in out
    assert run(monkeypatch, *both, "--rtol", "1e-12") == 0


@pytest.mark.parametrize("table", ["results", "examples"])
def test_rows_of_an_arm_that_one_storage_lacks_are_a_difference(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], table: str
) -> None:
    change(both[0], table, lambda frame: frame[frame["arm"] != "alone"])
    assert run(monkeypatch, *both) == 1
    assert "only in new, first kind=" in capsys.readouterr().out


def test_a_study_that_one_storage_lacks_is_a_difference(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(both[0] / "tiny", both[0] / "more")
    assert run(monkeypatch, *both) == 1
    assert f"more: not in {both[1]}\n" in capsys.readouterr().out


def test_times_may_differ(both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    change(
        both[1],
        "results",
        lambda frame: frame.assign(
            seconds=2.0, t=99, value=frame["value"].where(frame["metric"] != "latency_ms", frame["value"] * 1.5)
        ),
    )
    assert run(monkeypatch, *both) == 0


def test_points_and_their_shared_phases_are_compared_where_both_drew_them(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for table in ("results", "trials"):
        change(both[1], table, lambda frame: frame[~frame["trial"].isin(["other-p0", "other-t2"])])
    assert run(monkeypatch, *both) == 0
    assert "of search points that only old drew, not compared" in capsys.readouterr().out


def test_a_shared_phase_that_one_of_its_trials_records_otherwise_is_a_difference(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(
        both[1], "results", lambda frame: frame.assign(flops=frame["flops"].where(frame["trial"] != "other-t1", 2e9))
    )
    assert run(monkeypatch, *both) == 1


def test_a_folder_without_studies_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, tmp_path, tmp_path)
    assert "expected a folder with <study>/results.parquet" in capsys.readouterr().err
