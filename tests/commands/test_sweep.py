"""The command itself: whole sweeps with a real Ray on this machine, and what it says without one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from orchestrator import sweep
from orchestrator.analysis import tables as tables_
from orchestrator.study.load import load_study
from tests.support.studies import run_trials
from tests.support.sweeps import (
    ROOT,
    SMOKE,
    Bench,
    Said,
    attempts,
    ended,
    run_alone,
    same_numbers,
    tables,
    values,
    write_study,
)

slow = pytest.mark.slow


# ------------------------------------------------------------------------------------------------------- a whole sweep


@dataclass(frozen=True)
class Swept:
    bench: Bench
    said: Said
    storage: Path

    @property
    def tables(self) -> tables_.Tables:
        return tables(self.storage, "smoke")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    bench = Bench(tmp_path_factory.mktemp("smoke"))
    try:
        said = bench.sweep(SMOKE)
        assert not bench.left(), "processes are left behind"
        yield Swept(bench, said, bench.folder / "runs")
    finally:
        bench.close()


@slow
def test_the_smoke_study_runs_from_the_file_to_the_report(smoke: Swept) -> None:
    home = smoke.storage / "smoke"
    for name in ("study.yaml", "provenance.json", "results.parquet", "trials.parquet", "report.html", "report.md"):
        assert (home / name).stat().st_size > 100, name
    trials = smoke.tables.trials
    assert trials["planned"].all() and set(trials["status"]) <= {"ended", "stopped"}
    counts = Counter(zip(trials["kind"], trials["arm"].fillna(""), strict=True))
    assert counts["trial", "alone"] == counts["trial", "taught"] == 2
    assert counts["trial", ""] == 6 and counts["confirm", ""] == 2 and counts["confirm", "alone"] == 6
    points = trials[trials["arm"].isna() & (trials["kind"] == "trial")]
    assert sorted(points["point"]) == [f"p{i:03d}" for i in range(6)]
    assert (points["status"] == "ended").sum() >= min(3, 6)
    assert (trials["ended"] >= trials["started"]).all() and (trials["peak_memory"] > 0).sum() >= len(trials) - 3
    markdown = (home / "report.md").read_text()
    assert "Does the machinery work" in markdown and re.search("supported|refuted|undecided", markdown)
    assert "report.html" in smoke.said.out and "Ctrl-C" in smoke.said.out
    for trial in trials["trial"]:
        assert (home / "trials" / trial / "log.txt").read_text().count("attempt 1 of trial") == 1
    assert not list(home.glob("trials/*/attempt-*/checkpoint*")), "optimizer state goes when a phase ends"


@slow
def test_the_table_holds_each_number_once(smoke: Swept) -> None:
    frame = smoke.tables.results
    keys = ["trial", "phase", "model", "task", "split", "metric", "step"]
    assert not frame.duplicated(keys).any()
    ended = smoke.tables.trials.query("status == 'ended' and kind != 'teacher'")["trial"]
    last = frame[(frame["phase"] == "distil") & (frame["progress"] == 1.0) & (frame["metric"] == "mlm_loss")]
    assert Counter(last["trial"]) == {trial: 2 for trial in ended}  # dev and test
    for _, rows in frame.groupby(["trial", "phase", "model", "metric", "split"]):
        assert rows["step"].is_monotonic_increasing and rows["flops"].is_monotonic_increasing


@slow
def test_mlflow_has_one_parent_and_a_nested_run_for_each_trial_with_the_same_numbers(smoke: Swept) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{smoke.bench.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("smoke")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if run.data.tags.get("kind") == "study"]
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    nested = {run.data.tags["trial"]: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id}  # fmt: skip
    trials = smoke.tables.trials.set_index("trial")
    assert len(nested) == len(runs) - 1 and set(nested) == set(trials.index)
    status = {"ended": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    for trial, run in nested.items():
        assert run.info.status == status[trials.loc[trial, "status"]]
        assert (
            run.data.tags["status"] == trials.loc[trial, "status"]
            and run.data.tags["kind"] == trials.loc[trial, "kind"]
        )
        rows = smoke.tables.results.query("trial == @trial").sort_values("step")
        names = rows["phase"] + "/" + rows["model"] + "/" + rows["task"] + "/" + rows["split"] + "/" + rows["metric"]
        assert set(run.data.metrics) == {re.sub(r"[^\w.\- :/]", "_", name) for name in names}
        final = rows.assign(name=names)[~rows["split"].eq("system")].groupby("name")["value"].last()
        for name, value in final.items():
            assert run.data.metrics[name] == value, name
        if len(final):
            assert "distil/student/corpus/test/mlm_loss" in run.data.metrics or trials.loc[trial, "kind"] == "teacher"
    artifacts = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert {"report.html", "report.md", "results.parquet", "trials.parquet"} <= artifacts


@slow
@pytest.mark.browser
def test_the_report_opens_in_a_browser_without_a_complaint(smoke: Swept, tmp_path: Path) -> None:
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if binary is None:
        pytest.skip("no chromium: give its path as CHROMIUM")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    picture = tmp_path / "first.png"
    run = subprocess.run([binary, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
                          f"--screenshot={picture}", (smoke.storage / "smoke" / "report.html").as_uri()],
                         capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    assert "CONSOLE" not in run.stderr and picture.stat().st_size > 5000


@slow
def test_the_same_command_again_trains_nothing(smoke: Swept) -> None:
    before, numbers, ends = (
        attempts(smoke.storage, "smoke"),
        values(smoke.storage, "smoke"),
        ended(smoke.storage, "smoke"),
    )
    rows = smoke.tables.trials
    said = smoke.bench.sweep(SMOKE)
    assert attempts(smoke.storage, "smoke") == before and ended(smoke.storage, "smoke") == ends
    assert values(smoke.storage, "smoke") == numbers
    pd.testing.assert_frame_equal(smoke.tables.trials, rows)
    assert "Ctrl-C" not in said.out, "Ray was started for nothing"
    assert "0 to run" in said.out and "nothing to train" in said.out
    assert not list((smoke.storage / "smoke").glob("study-*.yaml"))


@slow
def test_the_winner_is_exported_as_an_ordinary_folder(smoke: Swept, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    command = [sys.executable, "-m", "orchestrator.export", str(SMOKE), "--storage", str(smoke.storage), "--to", str(tmp_path / "best")]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    net, tokenizer = (auto.from_pretrained(tmp_path / "best") for auto in (AutoModelForMaskedLM, AutoTokenizer))
    ids = tokenizer("the value of an expression", return_tensors="pt")["input_ids"]
    assert net(input_ids=ids).logits.shape == (*ids.shape, len(tokenizer))


# --------------------------------------------------------------------------------------------- equal specs, equal numbers


@slow
def test_a_trial_in_a_reused_slot_gives_the_numbers_of_a_plain_process(bench: Bench) -> None:
    """One slot, so that its process is used again. The sweep names its storage by a relative path."""
    arms = "a: {}, b: {phases.distil.batch: 4}, c: {phases.distil.terms.soft.weight: 0}"
    study = write_study(
        bench.folder, rest=f"arms: {{{arms}}}\nseeds: 1\nslot: {{cpus: {len(os.sched_getaffinity(0))}}}"
    )
    storage = bench.folder / "runs"
    bench.sweep(study.name, storage="runs", cwd=bench.folder)
    assert {path.name for path in storage.iterdir() if path.is_dir()} == {"data", "phases", "study"}
    begun = tables(storage).trials.query("kind == 'trial'").sort_values("started")["arm"].tolist()
    assert begun == ["a", "b", "c"]
    found = load_study(study)
    for arm in ("c", "b", "a"):  # nothing is shared with the sweep but the data
        plain = bench.folder / f"plain-{arm}"
        run_alone(found.spec(arm=arm, seed=0), plain, threads=len(os.sched_getaffinity(0)))
        trial = tables(storage).trials.query("arm == @arm")["trial"].item()
        assert same_numbers(storage, trial, plain)


# ---------------------------------------------------------------------------------------------- the command, without Ray


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command with one slot in this process: trials are run by trial_attempt.run, as a slot runs them."""

    def run_here(started: sweep.Sweep) -> None:
        run_trials(started.scheduler)

    class NoMirror:
        problem, uri = None, "http://127.0.0.1:5000"

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def put(self, *_: Any) -> None: ...
        def finish(self, *_: Any, **__: Any) -> None: ...
        def close(self, *_: Any) -> int:
            return 0

    monkeypatch.setattr(sweep, "run", run_here)
    monkeypatch.setattr("orchestrator.mlflow_sync.Mirror", NoMirror)

    def command(study: Path, *arguments: str, expect: int = 0) -> Said:
        capsys.readouterr()
        code = sweep.main([str(study), "--storage", str(tmp_path / "runs"), *arguments])
        said = Said(code, *capsys.readouterr())
        assert code == expect, said.out + said.err
        return said

    return command


def test_a_dry_run_writes_nothing(tmp_path: Path, command: Callable[..., Said]) -> None:
    said = command(write_study(tmp_path), "--dry-run")
    assert "3 arms x 1 seeds" in said.out and not (tmp_path / "runs").exists()


def test_fresh_renames_the_study_and_keeps_the_phases(tmp_path: Path, command: Callable[..., Said]) -> None:
    study, storage = write_study(tmp_path), tmp_path / "runs"
    command(study)
    before = values(storage)
    trained = {path: path.stat().st_mtime_ns for path in (storage / "phases").glob("*/phase.json")}
    said = command(study, "--fresh")
    aside = [path.name for path in storage.iterdir() if path.name.startswith("study-")]
    assert len(aside) == 1 and f"the folder study is now {aside[0]}" in said.out
    assert attempts(storage, aside[0]).keys() > attempts(storage).keys() and {
        k: v for k, v in before.items() if k in values(storage)
    } == values(storage)
    rows = tables(storage).trials
    assert set(rows["kind"]) == {"trial"} and set(rows["status"]) == {"ended"}
    flops = {phase["flops"] for cell in rows["phases"] for phase in json.loads(cell).values()}
    assert 0 not in flops, "a phase that is there counts at its recorded cost"
    assert {path: path.stat().st_mtime_ns for path in (storage / "phases").glob("*/phase.json")} == trained


def test_a_failed_arm_is_told_with_its_log_and_may_be_tried_again(tmp_path: Path, command: Callable[..., Said]) -> None:
    rest = "arms: {hot: {phases.distil.optimizer.lr: 1e30}, calm: {phases.distil.terms.soft.weight: 0}}\nseeds: 1"
    study, storage = write_study(tmp_path, rest=rest), tmp_path / "runs"
    said = command(study, expect=1)
    rows = tables(storage).trials.set_index("arm")
    log = storage / "study" / "trials" / rows.loc["hot", "trial"] / "log.txt"
    assert "arm hot, seed 0 failed: diverged" in said.out and str(log) in said.out and "diverged" in log.read_text()
    assert attempts(storage)[rows.loc["hot", "trial"]] == ["attempt-1"]
    command(study, expect=1)
    assert attempts(storage)[rows.loc["hot", "trial"]] == ["attempt-1"]
    command(study, "--retry-failed", expect=1)
    assert attempts(storage)[rows.loc["hot", "trial"]] == ["attempt-1", "attempt-2"]
    said = command(study, "--set", "arms.hot.phases.distil.optimizer.lr=1e-3")
    assert "1 reused, 1 to run" in said.out and "1 set aside" in said.out
    rows = tables(storage).trials
    assert Counter(rows["planned"]) == {True: 2, False: 1} and set(rows[rows["planned"]]["status"]) == {"ended"}
    assert len(list((storage / "study").glob("study-*.yaml"))) == 1


def test_where_nothing_ended_the_command_says_so_by_its_exit(tmp_path: Path, command: Callable[..., Said]) -> None:
    rest = "arms: {hot: {phases.distil.optimizer.lr: 1e30}}\nseeds: 1"
    command(write_study(tmp_path, rest=rest), expect=1)
    assert (tmp_path / "runs" / "study" / "report.html").exists()


def test_what_to_type_to_go_on_is_quoted(tmp_path: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    folder = tmp_path / "my studies"
    folder.mkdir()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", interrupted)
    study = write_study(folder)
    said = command(study, "--set", "question=it's", "--seeds", "2", expect=130)
    words = shlex.split(said.out.split("To go on: python -m orchestrator.sweep ")[1].splitlines()[0])
    assert (
        words[0] == str(study)
        and words[words.index("--set") + 1] == "question=it's"
        and words[words.index("--seeds") + 1] == "2"
    )


def test_ctrl_c_while_the_plan_is_made_leaves_no_traceback(
    tmp_path: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.planning.preview.print_plan", interrupted)
    command(write_study(tmp_path), expect=130)


def test_what_shows_mlflows_runs_is_told_for_the_store_that_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep.shown_by(f"sqlite:///{tmp_path}/runs/mlflow.db") == "python -m orchestrator.command ui"
    assert sweep.shown_by("sqlite:////a b/mlflow.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"
    assert sweep.shown_by("http://me:secret@host:5000") == "http://***@host:5000"


# -------------------------------------------------------------------------------------------------------- the exit code


def row(status: str, *, arm: str | None = "taught", kind: str = "trial", planned: bool = True) -> dict[str, Any]:
    return {"status": status, "arm": arm, "kind": kind, "planned": planned}


@pytest.mark.parametrize(
    ("rows", "changes", "code"),
    [
        ([row("ended")], {}, 0),
        ([row("ended"), row("failed", arm=None)], {}, 0),  # a point may fail
        ([row("ended"), row("failed")], {}, 1),
        ([row("ended"), row("stopped")], {}, 1),
        ([row("ended"), row("failed", planned=False)], {}, 0),
        ([row("ended"), row("failed", kind="tune")], {}, 0),
        ([row("failed", arm=None)], {}, 1),  # no trial ended
        ([row("ended", kind="teacher")], {}, 1),
        ([row("ended", planned=False)], {}, 1),
        ([], {"is_closed": True}, 0),  # a limit
        ([row("ended")], {"is_closed": True, "is_broken": True}, 1),
        ([row("failed")], {"signal_number": 2, "is_closed": True}, 130),
        ([], {"signal_number": 15, "is_closed": True}, 143),
    ],
)
def test_the_exit_code(rows: list[dict[str, Any]], changes: dict[str, Any], code: int) -> None:
    assert sweep.exit_code(rows, **{"signal_number": None, "is_closed": False, "is_broken": False} | changes) == code
