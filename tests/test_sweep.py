"""The command itself, with a real Ray on this machine: whole sweeps, and sweeps that are cut off in the middle.

Every process that a test starts carries a mark in its environment; none with that mark may be left when the test ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import Listener, wordy_documents

from orchestrator import results, sweep
from orchestrator.agenda import Agenda
from orchestrator.plan import Identity
from orchestrator.study_file import load_study
from trainables import attempt
from trainables.spec import TrialSpec
from trainables.store import Storage

slow = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "search_spaces" / "smoke.yaml"
MARK = "CODISTILL_TEST_MARK"


# ------------------------------------------------------------------------------------------------------------ processes


def marked(mark: str) -> dict[int, str]:
    """Living processes with this mark: pid -> command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                ours = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                if ours and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":  # a zombie is none
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")[:150]
            except OSError:  # it has ended, or is another user's
                continue
    return found


def is_agent(command_line: str) -> bool:
    return "Agent" in command_line or "/dashboard/" in command_line or "/autoscaler/" in command_line


@dataclass
class Bench:
    """A folder, and the processes that were started in it."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, study: Path | str, *arguments: str, storage: str | None = None, cwd: Path = ROOT) -> subprocess.Popen[str]:  # fmt: skip
        runs = storage or str(self.folder / "runs")
        command = [sys.executable, "-m", "orchestrator.sweep", str(study), "--storage", runs,
                   "--tracking-uri", f"sqlite:///{self.folder}/mlflow.db", *arguments]  # fmt: skip
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)  # fmt: skip
        self.started.append(process)
        return process

    def sweep(self, study: Path | str, *arguments: str, expect: int = 0, timeout: float = 240, **more: Any) -> Said:
        return finish(self.start(study, *arguments, **more), expect, timeout)

    def left(self, patience: float = 20) -> dict[int, str]:
        """What still lives a little after its driver."""
        until = time.monotonic() + patience
        while (found := marked(self.mark)) and time.monotonic() < until:
            time.sleep(0.2)
        return found

    def end_agents(self) -> None:
        """After a kill nothing that trains may live on; Ray's agents, which serve nobody now, take up to a minute."""
        until = time.monotonic() + 20
        while any(not is_agent(line) for line in marked(self.mark).values()) and time.monotonic() < until:
            time.sleep(0.2)
        found = marked(self.mark)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        alive = {pid: line for pid, line in found.items() if not is_agent(line)}
        assert not alive, f"these outlive their driver: {alive}"

    def close(self) -> None:
        found = self.left()
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.kill()
            process.communicate()
        assert not found, f"left behind: {found}"


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def finish(process: subprocess.Popen[str], expect: int = 0, timeout: float = 240, quiet: bool = True) -> Said:
    out, err = process.communicate(timeout=timeout)
    said = Said(process.returncode, out, err)
    assert process.returncode == expect, f"exit {process.returncode}\n{out[-4000:]}\n{err[-4000:]}"
    assert not quiet or "Traceback" not in out + err, err[-4000:]
    return said


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def until(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, f"it ended: {process.communicate()}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
    return found


# -------------------------------------------------------------------------------------------------------------- studies


STUDY = """\
question: Does the machinery hold?
trial:
  data: {{kind: files, train: {corpus}, tokenizer: {{kind: wordpiece, size: 160}}, length: 32, evaluate: 16}}
  models:
    teacher: {{family: bert, layers: 1, width: 16, heads: 2, dropout: 0.1}}
    student: {{family: bert, layers: 1, width: 16, heads: 2, dropout: 0.1}}
  phases:
    teach:
      train: {{teacher: full}}
      budget: {{steps: 20}}
      batch: 8
      optimizer: {{lr: 5e-3}}
      terms: {{teacher_hard: {{kind: cross_entropy, of: teacher}}}}
    distil:
      train: {{student: full}}
      budget: {{steps: {steps}}}
      batch: 8
      optimizer: {{lr: 5e-3}}
      terms:
        student_hard: {{kind: cross_entropy, of: student}}
        soft: {{kind: forward_kl, from: teacher, to: student, weight: 1, tau_squared: false}}
objective: {{phase: distil, model: student, metric: mlm_loss, mode: min}}
{rest}
"""
ARMS = (
    "arms: {short: {phases.distil.budget.steps: 30}, alone: {phases.distil.terms.soft.weight: 0}, taught: {}}\nseeds: 1"
)


def write_study(folder: Path, *, steps: int = 30, rest: str = ARMS, name: str = "study") -> Path:
    corpus, file = folder / "corpus.txt", folder / f"{name}.yaml"
    corpus.write_text("\n\n".join(wordy_documents(160, seed=1)))
    file.write_text(STUDY.format(corpus=corpus, steps=steps, rest=rest))
    return file


def tables(storage: Path, study: str = "study") -> results.Tables:
    found = results.read(Storage(str(storage)), study)
    assert found is not None
    return found


def values(storage: Path, study: str = "study") -> dict[tuple[Any, ...], float]:
    """Every number that the specs determine; times and memory are the machine's."""
    frame = tables(storage, study).results
    frame = frame[frame["split"] != "system"]
    keys = ["trial", "phase", "model", "task", "split", "metric", "step", "progress", "tokens", "flops"]
    return {tuple(row[key] for key in keys): row["value"] for row in frame.to_dict("records")}


def attempts(storage: Path, study: str = "study") -> dict[str, list[str]]:
    trials = storage / study / "trials"
    return {t.name: sorted(a.name for a in t.glob("attempt-*")) for t in trials.iterdir()} if trials.is_dir() else {}


def ended(storage: Path, study: str = "study") -> dict[str, dict[str, Any]]:
    return {file.parent.name: json.loads(file.read_text()) for file in (storage / study / "trials").glob("*/end.json")}


# ------------------------------------------------------------------------------------------------------- a whole sweep


@dataclass(frozen=True)
class Swept:
    bench: Bench
    said: Said
    storage: Path

    @property
    def tables(self) -> results.Tables:
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
    assert counts["trial", ""] == 6 and counts["confirm", ""] == counts["confirm", "alone"] == 2
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
def test_a_trial_gives_the_same_numbers_in_a_slot_that_had_others_before_as_in_a_plain_process(bench: Bench) -> None:
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


def same_numbers(storage: Path, trial: str, plain: Path) -> bool:
    """Whether a trial of a sweep and an attempt in a plain process agree bit for bit."""
    keys = ("phase", "model", "task", "split", "metric", "step", "progress", "tokens", "flops")
    ours = tables(storage).results.query("trial == @trial").to_dict("records")
    theirs = results.read_records(Storage(str(plain / "plain")), "trial")
    one, two = (
        {tuple(r[k] for k in keys): r["value"] for r in rows if r["split"] != "system"} for rows in (ours, theirs)
    )
    assert len(one) > 10 and one.keys() == two.keys()
    return one == two


def run_alone(spec: TrialSpec, storage: Path, *, threads: int = 1) -> dict[str, Any]:
    """An attempt in this process, without Ray."""
    identity, spec = Identity(str(storage / "data")), spec.pruned()
    job = attempt.Job(trial="trial", spec=spec.model_dump_json(), fingerprints=identity.of(spec), storage=str(storage), folder="plain",
                      threads=threads, device="cpu", checkpoint_at_reports=False, provenance={})  # fmt: skip
    before = torch.get_num_threads()
    end = attempt.run(job, Listener())
    torch.set_num_threads(before)
    assert end["status"] == "ended", end
    return end


# --------------------------------------------------------------------------------------------------------------- faults


@slow
@pytest.mark.faults
def test_a_driver_that_is_killed_loses_nothing(bench: Bench) -> None:
    """Trials so long that there is a checkpoint (each 20 s) when the driver dies. While it lives, it is the only one."""
    cut = bench.folder / "cut"
    spec = load_study(write_study(bench.folder, steps=200)).spec(arm="alone", seed=0)
    steps = round(22 / run_alone(spec, bench.folder / "timing")["phases"]["distil"]["seconds"] * 200)
    study = write_study(bench.folder, steps=steps)
    driver = bench.start(study, storage=str(cut))

    def checkpoints() -> list[Path]:
        return list(cut.glob("study/trials/*/attempt-1/checkpoint.json"))

    until(lambda: attempts(cut), driver)
    second = bench.sweep(study, storage=str(cut), expect=2)
    assert "another sweep of this study is running" in second.err and second.err.count("\n") == 1
    until(lambda: checkpoints() and ended(cut), driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    bench.end_agents()
    before = ended(cut)
    had = attempts(cut)
    running = set(had) - set(before)
    saved = {path.parent.parent.name for path in checkpoints()}
    assert before and saved and saved <= running
    said = bench.sweep(study, storage=str(cut))
    assert f"{sum(end['kind'] == 'trial' for end in before.values())} reused" in said.out
    after = tables(cut).trials.set_index("trial")
    assert set(after["status"]) == {"ended"} and after["planned"].all() and after.index.is_unique
    for trial, folders in attempts(cut).items():
        assert len(folders) == len(had.get(trial, [])) + (trial not in before), (
            "one attempt more, but for what had ended"
        )
        assert after.loc[trial, "attempts"] == len(folders)
    for trial in saved:
        log = (cut / "study" / "trials" / trial / "log.txt").read_text()
        found = re.search(rf"phase distil: from step (\d+) of {steps}", log)
        assert found and int(found[1]) > 0, "it began anew"
    assert before.items() <= ended(cut).items()
    planned = Agenda(load_study(study), Identity(None), Storage(str(cut))).known()
    assert {p.id for p in planned} | {row.Index for row in after.itertuples() if row.kind == "teacher"} == set(
        after.index
    )
    trial = min(saved)
    run_alone(load_study(study).spec(arm=after.loc[trial, "arm"], seed=0), bench.folder / "plain")
    assert same_numbers(cut, trial, bench.folder / "plain")


@slow
@pytest.mark.faults
def test_ctrl_c_ends_cleanly_and_an_edited_study_reuses_what_is_there(bench: Bench) -> None:
    study, storage = write_study(bench.folder, steps=1500), bench.folder / "runs"
    driver = bench.start(study)
    until(lambda: ended(storage) and len(attempts(storage)) > len(ended(storage)), driver)
    driver.send_signal(signal.SIGINT)
    said = finish(driver, 130)
    assert "interrupted" in said.out and "To go on: python -m orchestrator.sweep" in said.out
    assert not bench.left(), "Ray outlives its driver"
    before = ended(storage)
    assert (storage / "study" / "report.html").exists() and before
    numbers, folders = values(storage), attempts(storage)
    command = said.out.split("To go on: python -m orchestrator.sweep ")[1].split("\n")[0]
    said = finish(bench.start(study, *shlex.split(command)[1:], "--seeds", "2"))
    assert "+1 seed" in said.out
    after = ended(storage)
    assert {end["status"] for end in after.values()} == {"ended"} and before.items() <= after.items()
    assert all(attempts(storage)[trial] == folders[trial] for trial in before)
    assert {key: value for key, value in numbers.items() if key[0] in before}.items() <= values(storage).items()
    rows = tables(storage).trials
    rows = rows[rows["kind"] == "trial"]
    assert Counter(zip(rows["arm"], rows["seed"], strict=True)) == {
        (a, s): 1 for a in ("short", "alone", "taught") for s in (0, 1)
    }


@slow
@pytest.mark.faults
def test_a_trial_that_fails_is_a_row_and_the_sweep_goes_on(bench: Bench) -> None:
    """Also: a process that is lost is replaced, and its trial runs again."""
    rest = "arms: {hot: {phases.distil.optimizer.lr: 1e30}, calm: {phases.distil.terms.soft.weight: 0, phases.distil.budget.steps: 3000}}\nseeds: 1"  # fmt: skip
    study, storage = write_study(bench.folder, rest=rest), bench.folder / "runs"
    driver = bench.start(study)

    def is_calm() -> bool:
        begun = [
            storage / "study" / "trials" / trial / "trial.json"
            for trial, folders in attempts(storage).items()
            if folders
        ]
        return "calm" in {json.loads(file.read_text())["arm"] for file in begun}

    until(lambda: is_calm() and ended(storage), driver)
    slots = [pid for pid, command in marked(bench.mark).items() if command.startswith("ray::ImplicitFunc")]
    assert slots
    for pid in slots:
        os.kill(pid, signal.SIGKILL)
    said = finish(driver, 1, quiet=False)  # Tune tells of a lost process at length
    rows = tables(storage).trials.set_index("arm")
    assert rows.loc["hot", "status"] == "failed" and rows.loc["hot", "reason"].startswith("diverged: phase distil")
    assert rows.loc["calm", "status"] == "ended" and rows.loc["calm", "attempts"] == 2
    log = storage / "study" / "trials" / rows.loc["hot", "trial"] / "log.txt"
    assert "diverged" in log.read_text()
    assert f"failed: trial hot, seed 0 ({rows.loc['hot', 'trial']}): diverged" in said.out
    assert str(log) in said.out and "arm hot lacks seed 0: diverged" in said.out


# ---------------------------------------------------------------------------------------------- the command, without Ray


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command with one slot in this process: trials are run by attempt.run, as a slot runs them."""

    def run_here(agenda: Agenda, *_: Any) -> None:
        def one() -> bool:
            planned = agenda.next()
            if planned is None:
                return False
            agenda.start(planned, 1)
            job = attempt.Job(trial=planned.id, spec=planned.spec.model_dump_json(), fingerprints=agenda.identity.of(planned.spec),
                              storage=agenda.storage.uri, folder=agenda.study.folder, threads=1, device="cpu",
                              checkpoint_at_reports=False, provenance={})  # fmt: skip
            agenda.end(planned.id, attempt.run(job, Listener()), 2)
            return True

        while one():
            pass

    class NoMirror:
        problem = None

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def put(self, *_: Any) -> None: ...
        def finish(self, *_: Any) -> None: ...
        def close(self, *_: Any) -> int:
            return 0

    monkeypatch.setattr(sweep, "_run", run_here)
    monkeypatch.setattr("orchestrator.tracking.Mirror", NoMirror)

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
    assert "arm hot lacks seed 0: diverged" in said.out and str(log) in said.out and "diverged" in log.read_text()
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

    monkeypatch.setattr(sweep, "_run", interrupted)
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

    monkeypatch.setattr("orchestrator.overview.print_plan", interrupted)
    command(write_study(tmp_path), expect=130)
