"""Whatever dies, nothing that finished is lost: each fault done for real to a sweep with a real Ray on this machine.

docs/faults.md has the table of what was done, what was lost and how long until it went on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import Fingerprints
from orchestrator.study.load import load_study
from tests.support.sweeps import (
    RARELY,
    Bench,
    attempts,
    began_at,
    checkpoints,
    ended,
    finish,
    marked,
    run_alone,
    same_numbers,
    tables,
    tell,
    until,
    values,
    write_study,
)
from trainables.storage.files import Storage

pytestmark = [pytest.mark.slow, pytest.mark.faults]
HOST = socket.gethostname()
SLOT = "ResourceTrainable"  # how Tune names the process of a slot
OFTEN = "limits: {checkpoint_seconds: 0.3}"
ARMS = "arms: {short: {phases.distil.budget.steps: 30}, alone: {phases.distil.terms.soft.weight: 0}, taught: {}}\nseeds: 1\n"
ONE = "arms: {alone: {phases.distil.terms.soft.weight: 0}}\nseeds: 1\n"


def processes(bench: Bench, title: str) -> list[int]:
    return [pid for pid, command in marked(bench.mark).items() if command.startswith(f"ray::{title}")]


# ---------------------------------------------------------------------------------------------------------- the driver


def test_a_driver_that_is_killed_twice_loses_nothing(bench: Bench) -> None:
    """While it lives, it is the only one; after its death the next need not wait. A damaged checkpoint is passed over."""
    cut, study = bench.folder / "cut", write_study(bench.folder, steps=6_000, rest=ARMS + OFTEN)
    driver = bench.start(study, storage=str(cut))
    until(lambda: attempts(cut), driver)
    second = bench.sweep(study, storage=str(cut), expect=2)
    assert "another sweep of this study is running" in second.err and second.err.count("\n") == 1
    until(lambda: checkpoints(cut, 1) and ended(cut), driver)
    before, had = ended(cut), attempts(cut)
    saved = checkpoints(cut, 1)
    driver.kill()
    driver.wait()
    since = time.monotonic()
    assert saved - before.keys() and saved <= had.keys()

    driver = bench.start(study, storage=str(cut))
    until(lambda: checkpoints(cut, 2), driver)
    tell("kill -9 of the driver", since)
    driver.kill()
    driver.wait()
    bench.end_agents()
    again = sorted(checkpoints(cut, 2))
    between = ended(cut)
    assert before.items() <= between.items()
    folder = cut / "study" / "trials" / again[0] / "attempt-2"
    damaged = folder / json.loads((folder / "checkpoint.json").read_text())["file"]
    damaged.write_bytes(damaged.read_bytes()[:-100])

    said = bench.sweep(study, storage=str(cut))
    assert f"{sum(end['kind'] == 'trial' for end in between.values())} reused" in said.out
    after = tables(cut).trials.set_index("trial")
    assert set(after["status"]) == {"ended"} and after["planned"].all() and after.index.is_unique
    assert between.items() <= ended(cut).items()
    for trial, folders in attempts(cut).items():
        assert after.loc[trial, "attempts"] == len(folders) <= 3
        assert ended(cut)[trial]["faults"] == len(folders) - 1
    assert began_at(cut, again[0])[-1] < 6_000, "the damaged checkpoint is passed over, and the trial still ends"
    assert "skipped: checksum differs" in (cut / "study" / "trials" / again[0] / "log.txt").read_text()
    planned = Scheduler(load_study(study), Fingerprints(None), Storage(str(cut))).known()
    teachers = {row.Index for row in after.itertuples() if row.kind == "teacher"}
    assert {p.id for p in planned} | teachers == set(after.index)
    for trial in saved - before.keys():
        run_alone(load_study(study).spec(arm=after.loc[trial, "arm"], seed=0), bench.folder / f"plain-{trial}")
        assert same_numbers(cut, trial, bench.folder / f"plain-{trial}")


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


def test_sigterm_lets_the_driver_and_a_slot_write_their_checkpoints_first(bench: Bench) -> None:
    """No checkpoint is due in this study, so those that are there were written on notice."""
    study, storage = write_study(bench.folder, steps=8000, rest=ONE + RARELY), bench.folder / "runs"
    driver = bench.start(study)
    until(lambda: list(storage.glob("study/trials/*/attempt-1/records.jsonl")), driver)
    (slot,) = until(lambda: processes(bench, SLOT), driver)
    since = time.monotonic()
    os.kill(slot, signal.SIGTERM)
    until(lambda: list(storage.glob("study/trials/*/attempt-2/records.jsonl")), driver)
    tell("SIGTERM to a slot", since)
    (trial,) = attempts(storage)
    assert trial in checkpoints(storage, 1)
    since = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    said = finish(driver, 128 + signal.SIGTERM, quiet=False)  # Tune tells of the slot at length
    print(f"\n[SIGTERM to the driver: it had ended after {time.monotonic() - since:.1f} s]")
    assert "SIGTERM: running trials write a checkpoint" in said.out and "resumes at the next start" in said.out
    assert not bench.left(), "Ray outlives its driver"
    assert trial in checkpoints(storage, 2) and not ended(storage)
    bench.sweep(study)
    end = ended(storage)[trial]
    assert end["status"] == "ended" and end["attempts"] == 3 and end["faults"] == 1
    steps = began_at(storage, trial)
    assert steps[0] == 0 < steps[1] < steps[2]
    run_alone(load_study(study).spec(arm="alone", seed=0), bench.folder / "plain")
    assert same_numbers(storage, trial, bench.folder / "plain")


def test_a_trial_can_be_stopped_by_hand_and_a_sweep_drained_or_ended_by_the_clock(bench: Bench) -> None:
    study, storage = write_study(bench.folder, steps=1_000_000, rest=ARMS + RARELY), bench.folder / "runs"
    driver = bench.start(study)

    def running() -> dict[str, str]:
        begun = [json.loads(path.read_text()) for path in storage.glob("study/trials/*/trial.json")]
        return {
            r["arm"]: r["trial"] for r in begun if r["trial"] not in ended(storage) and attempts(storage)[r["trial"]]
        }

    until(lambda: {"alone", "taught"} <= running().keys(), driver)
    trial, left = running()["alone"], running()["taught"]
    assert f"trial {trial} stops" in bench.sweep(study, "--stop", trial[:8]).out
    until(lambda: trial in ended(storage), driver)
    assert (ended(storage)[trial]["status"], ended(storage)[trial]["reason"]) == ("stopped", "stopped by hand")
    assert "running trials finish" in bench.sweep(study, "--drain").out
    until(lambda: not (storage / "study" / "drain").exists(), driver)
    driver.send_signal(signal.SIGINT)
    said = finish(driver, 130)
    assert "drained: nothing new was started" in said.out and left in checkpoints(storage, 1)
    assert not bench.left()

    said = bench.sweep(study, "--hours", "0.005", expect=1)
    assert "--hours 0.005 have passed" in said.out and "Still to run: 1." in said.out
    assert "arm alone, seed 0 stopped: stopped by hand" in said.out and not bench.left()


# ---------------------------------------------------------------------------------------------------------- one worker


def test_a_trial_that_fails_is_a_row_and_a_slot_that_is_killed_is_replaced(bench: Bench) -> None:
    """NaN is the trial's own failure, and final; a lost process is the machine's, and tried again."""
    rest = "arms: {hot: {phases.distil.optimizer.lr: 1e30}, calm: {phases.distil.terms.soft.weight: 0, phases.distil.budget.steps: 12000}}\nseeds: 1\n"  # fmt: skip
    study, storage = write_study(bench.folder, rest=rest + OFTEN), bench.folder / "runs"
    driver = bench.start(study)
    until(lambda: checkpoints(storage, 1) and ended(storage), driver)
    until(lambda: len(processes(bench, SLOT)) == 1, driver)  # nothing will need the other slot any more
    since = time.monotonic()
    for pid in processes(bench, SLOT):
        os.kill(pid, signal.SIGKILL)
    until(lambda: any("attempt-2" in folders for folders in attempts(storage).values()), driver)
    tell("kill -9 of a one-worker slot", since)
    said = finish(driver, 1, quiet=False)  # Tune tells of a lost process at length
    rows = tables(storage).trials.set_index("arm")
    assert rows.loc["hot", "status"] == "failed" and rows.loc["hot", "reason"].startswith("diverged: phase distil")
    assert rows.loc["hot", "attempts"] == 1
    calm = rows.loc["calm", "trial"]
    assert rows.loc["calm", "status"] == "ended" and rows.loc["calm", "attempts"] == 2
    assert ended(storage)[calm]["faults"] == 1 and began_at(storage, calm)[-1] > 0
    log = storage / "study" / "trials" / rows.loc["hot", "trial"] / "log.txt"
    assert "diverged" in log.read_text()
    assert f"failed: trial hot, seed 0 ({rows.loc['hot', 'trial']}): diverged" in said.out
    assert str(log) in said.out and "arm hot, seed 0 failed: diverged" in said.out
    assert "1 earlier attempts were lost with their machine" in said.out


def test_a_process_that_hangs_is_ended_and_its_trial_goes_on(bench: Bench) -> None:
    """A read that never returns: what a trial looks at between its steps becomes a pipe into which nobody writes."""
    limits = "limits: {checkpoint_seconds: 0.3, hang_minutes: 0.4}"
    study, storage = write_study(bench.folder, steps=6000, rest=ONE + limits), bench.folder / "runs"
    driver = bench.start(study)
    until(lambda: checkpoints(storage, 1), driver)
    (trial,) = attempts(storage)
    pipe = storage / "study" / "trials" / trial / "leave"
    os.mkfifo(pipe)
    since = time.monotonic()
    hung = until(lambda: [p for p in pipe.parent.glob("attempt-1/hung-*.txt") if p.stat().st_size], driver)
    pipe.unlink()
    until(lambda: "attempt-2" in attempts(storage)[trial], driver)
    tell("a hang, limit 24 s", since)
    finish(driver, quiet=False)
    assert ended(storage)[trial]["attempts"] == 2 and began_at(storage, trial)[-1] > 0
    assert "stop_signals.py" in hung[0].read_text(), "it says where it hung"


def test_a_trial_that_finds_no_memory_fails_alone(bench: Bench) -> None:
    """One matrix of 69 GB, which no system promises on this machine; the plan was told that there is room."""
    wide = "{width: 131072, intermediate_size: 64, heads: 1024, family: bert, layers: 1}"
    arms = f"arms: {{wide: {{models.student: {wide}}}, taught: {{}}}}\nseeds: 1\nslot: {{memory_gb: 100000}}\n"
    study, storage = write_study(bench.folder, rest=arms), bench.folder / "runs"
    said = bench.sweep(study, expect=1)
    rows = tables(storage).trials.set_index("arm")
    assert rows.loc["wide", "status"] == "failed" and rows.loc["wide", "reason"].startswith("out of memory")
    assert rows.loc["wide", "attempts"] == 1, "a failure of its own is not tried again"
    assert rows.loc["taught", "status"] == "ended"
    assert "arm wide, seed 0 failed: out of memory" in said.out


# -------------------------------------------------------------------------------------------------------- two workers


@pytest.mark.long
def test_a_group_that_loses_a_rank_its_slot_or_its_driver_goes_on(bench: Bench) -> None:
    """Five faults to one trial on two workers; in the end it has the numbers of one worker in a plain process."""
    rest = ONE + "slot: {workers: 2}\nlimits: {checkpoint_seconds: 0.3, hang_minutes: 0.4}"
    study, storage = write_study(bench.folder, steps=8000, rest=rest), bench.folder / "runs"
    text = study.read_text().replace("dropout: 0.1", "dropout: 0")
    study.write_text(text.replace("lr: 5e-3", "lr: 2e-4"))  # at a high one float error grows until nothing is alike
    driver = bench.start(study)

    def ranks() -> list[int]:
        found = processes(bench, "RayTrainWorker")
        return found if len(found) == 2 else []

    def goes_on(attempt: int, what: str, since: float) -> None:
        until(lambda: checkpoints(storage, attempt), driver, 180)
        tell(what, since)

    until(lambda: checkpoints(storage, 1), driver, 180)
    for attempt, (number, what) in enumerate(
        ((signal.SIGTERM, "SIGTERM to a rank"), (signal.SIGKILL, "kill -9 of a rank"), (signal.SIGSTOP, "a rank that hangs, limit 24 s")), 2
    ):  # fmt: skip
        pid = max(until(ranks, driver))
        os.kill(pid, number)
        goes_on(attempt, what, time.monotonic())
    (slot,) = until(lambda: processes(bench, SLOT), driver)
    os.kill(slot, signal.SIGKILL)
    goes_on(5, "kill -9 of the slot that holds the group", time.monotonic())
    driver.kill()
    driver.wait()
    since = time.monotonic()
    driver = bench.start(study)
    goes_on(6, "kill -9 of the driver of a group", since)
    finish(driver, timeout=400, quiet=False)
    (trial,) = attempts(storage)
    end = ended(storage)[trial]
    assert end["status"] == "ended" and end["attempts"] == 6 and end["faults"] == 5
    steps = began_at(storage, trial)
    assert steps == sorted(steps) and steps[-1] > 0
    run_alone(load_study(study).spec(arm="alone", seed=0), bench.folder / "plain")
    plain = {r["progress"]: r["value"] for r in numbers(bench.folder / "plain" / "plain" / "trials" / "trial")}
    ours = {r["progress"]: r["value"] for r in numbers(storage / "study" / "trials" / trial)}
    assert plain.keys() == ours.keys() and ours == pytest.approx(plain, rel=1e-2)


def numbers(home: Path) -> list[dict[str, float]]:
    """The dev loss over the budget, from the last attempt's records."""
    last = max(home.glob("attempt-*"), key=lambda path: int(path.name[8:]))
    records = [json.loads(line) for line in (last / "records.jsonl").read_text().splitlines()]
    return [r for r in records if (r["phase"], r["split"], r["metric"]) == ("distil", "dev", "mlm_loss")]


def test_a_group_serves_one_trial_after_the_other_also_after_a_failure_and_a_stop(bench: Bench) -> None:
    """A failed trial, points that are stopped early, and a sweep that ends: no group is left, none is lost in between."""
    rest = """\
arms: {hot: {phases.distil.optimizer.lr: 1e30}, alone: {phases.distil.terms.soft.weight: 0}}
seeds: 1
vary: {phases.distil.optimizer.lr: {float: [1e-4, 1e-2], log: true}}
search: {sampler: random, points: 5, stop_early: {kind: asha, first: 0.5, reduction: 2}}
slot: {workers: 2}
"""
    study, storage = write_study(bench.folder, steps=200, rest=rest), bench.folder / "runs"
    said = bench.sweep(study, expect=1, timeout=400)
    rows = tables(storage).trials
    assert Counter(rows["status"])["failed"] == 1 and "arm hot, seed 0 failed: diverged" in said.out
    points = rows[rows["arm"].isna() & (rows["kind"] == "trial")]
    assert len(points) == 5 and set(points["status"]) <= {"ended", "stopped"}
    groups = re.findall(r"attempt \d+ of trial", "".join(p.read_text() for p in storage.glob("study/trials/*/log.txt")))
    assert len(groups) == rows["attempts"].sum()
    assert not bench.left() and not (storage / "study" / "groups").exists()


# ------------------------------------------------------------------------------------------------- a slot that is not fit


@pytest.fixture
def other_machines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the first so many processes that are looked at before they run trials have another version of a package."""

    def make(num: int) -> None:
        claims = [str(bench.folder / f"other-{number}") for number in range(num)]
        (bench.folder / "sitecustomize.py").write_text(f"""\
import functools, importlib.metadata, os, sys
told = importlib.metadata.version
@functools.cache
def is_other():
    for claim in {claims!r}:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            pass
    return False
def version(name):
    asks = sys._getframe(1).f_globals.get("__name__") == "trainables.runtime.preflight" and name == "peft"
    return "0.0.1" if asks and is_other() else told(name)
if any("default_worker.py" in word for word in sys.orig_argv):  # no driver
    importlib.metadata.version = version
""")
        monkeypatch.setenv("PYTHONPATH", str(bench.folder))

    return make


NOT_FIT = re.compile(rf"{re.escape(HOST)}: peft 0\.0\.1 \(the driver has \d\S*\); expected the driver's versions")


def test_a_slot_that_is_not_fit_is_named_and_its_trial_runs_in_another(
    bench: Bench, other_machines: Callable[[int], None]
) -> None:
    other_machines(1)
    rest = """\
arms: {alone: {phases.distil.terms.soft.weight: 0}, taught: {}}
seeds: 1
vary: {phases.distil.optimizer.lr: {float: [1e-4, 1e-2], log: true}}
search: {sampler: random, points: 4, stop_early: {kind: asha, first: 0.5, reduction: 2}}
"""
    study, storage = write_study(bench.folder, steps=60, rest=rest), bench.folder / "runs"
    said = bench.sweep(study)
    assert len(re.findall(rf"slot disabled: {NOT_FIT.pattern}", said.out)) == 1
    assert f"disabled: 1 slot on {HOST}: peft 0.0.1" in said.out
    assert "failed: " not in said.out and "left: " not in said.out
    rows = tables(storage).trials
    assert set(rows["status"]) <= {"ended", "stopped"} and rows["planned"].all() and len(rows) >= 6
    assert set(rows[rows["arm"].notna()]["attempts"]) == {1}  # a stopped point may be spared, and then has two
    assert not any(end.get("faults") for end in ended(storage).values())
    assert not bench.left() and not (storage / "study" / "driver").exists()


def test_where_no_slot_is_fit_the_sweep_says_so_and_goes_on_when_one_is(
    bench: Bench, other_machines: Callable[[int], None]
) -> None:
    other_machines(2)
    study, storage = write_study(bench.folder), bench.folder / "runs"
    said = bench.sweep(study, expect=1)
    assert len(re.findall(rf"slot disabled: {NOT_FIT.pattern}", said.out)) == 2
    assert f"no slot is usable: {HOST}: peft 0.0.1" in said.out and "no finished trial is lost" in said.out
    assert not any(attempts(storage).values()) and not bench.left()
    bench.sweep(study)  # the third process and those after it are as the driver's
    rows = tables(storage).trials
    assert set(rows["status"]) == {"ended"} and set(rows["attempts"]) == {1}


def test_a_group_of_which_one_machine_is_not_fit_runs_nothing(
    bench: Bench, other_machines: Callable[[int], None]
) -> None:
    other_machines(1)
    study, storage = write_study(bench.folder, rest=ONE + "slot: {workers: 2}"), bench.folder / "runs"
    said = bench.sweep(study, expect=1)
    assert len(re.findall(rf"no slot is usable: {NOT_FIT.pattern}", said.out)) == 1
    assert not any(attempts(storage).values()) and not bench.left()


# ---------------------------------------------------------------------------------------------------------- the ground


def test_rays_node_that_dies_ends_the_sweep_with_a_word(bench: Bench) -> None:
    study, storage = write_study(bench.folder, steps=20_000, rest=ONE + OFTEN), bench.folder / "runs"
    driver = bench.start(study)
    until(lambda: checkpoints(storage, 1), driver)
    (raylet,) = [pid for pid, command in marked(bench.mark).items() if "raylet/raylet" in command]
    since = time.monotonic()
    os.kill(raylet, signal.SIGKILL)
    out, err = driver.communicate(timeout=180)
    tell("kill -9 of Ray's node daemon: the driver had ended", since)
    assert driver.returncode == 1 and "no finished trial is lost" in out + err
    bench.end_agents()
    with contextlib.suppress(AssertionError):
        bench.end_agents()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_sweep_with_a_word_and_loses_nothing(bench: Bench, small_disk: Path) -> None:
    study = write_study(bench.folder, steps=1500, rest=ARMS + OFTEN)
    driver = bench.start(study, storage=str(small_disk))
    until(lambda: ended(small_disk) and checkpoints(small_disk, 1), driver)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as file:
        while True:
            file.write(b"0" * 65536)
            file.flush()
    out, err = driver.communicate(timeout=180)
    assert driver.returncode == 1 and "Traceback" not in out + err, out + err
    assert "No space left on device" in out + err and "no finished trial is lost" in out + err
    before = ended(small_disk)
    again = bench.sweep(study, storage=str(small_disk), expect=2)
    assert "cannot be written (No space left on device)" in again.err and again.err.count("\n") == 1
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    again = bench.sweep(study, storage=str(small_disk), expect=2)
    assert "cannot be written (Read-only file system)" in again.err and again.err.count("\n") == 1
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    bench.sweep(study, storage=str(small_disk))
    after = ended(small_disk)
    assert before.items() <= after.items() and {end["status"] for end in after.values()} == {"ended"}
    assert len(tables(small_disk).trials.query("kind == 'trial'")) == 3


def test_damaged_files_are_noticed_and_made_anew(bench: Bench) -> None:
    """An end whose number was changed, one that was cut off, and a shared phase whose weights were changed."""
    study, storage = write_study(bench.folder, steps=60), bench.folder / "runs"
    bench.sweep(study)
    before, whole = values(storage), ended(storage)
    trials = tables(storage).trials.query("kind == 'trial'").set_index("arm")["trial"]
    flipped, cut = (storage / "study" / "trials" / trials[arm] / "end.json" for arm in ("taught", "short"))
    flipped.write_text(flipped.read_text().replace('"attempts": 1', '"attempts": 7'))
    cut.write_text(cut.read_text()[:80])
    for phase in json.loads((storage / "study" / "trials" / trials["taught"] / "trial.json").read_text())[
        "keys"
    ].values():
        for weights in (storage / "phases" / phase).glob("*.safetensors"):
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        marker = storage / "phases" / phase / "phase.json"
        if phase in {p["key"] for p in whole[trials["taught"]]["phases"].values() if p["key"] != phase}:
            continue
        marker.write_text(marker.read_text()[:200])
    said = bench.sweep(study)
    assert "1 reused, 2 to run" in said.out
    assert values(storage) == before, "the same numbers again"
    assert set(tables(storage).trials["status"]) == {"ended"} and ended(storage).keys() == whole.keys()
    assert list((storage / "phases").glob("*/corrupt-*.json")), "what is damaged is set aside, not deleted"


# -------------------------------------------------------------------------------------------------------------- MLflow


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.long
def test_mlflow_may_be_away_at_the_start_in_the_middle_and_to_the_end(bench: Bench) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    study, storage = write_study(bench.folder, steps=2000), bench.folder / "runs"
    where = ("--tracking-uri", f"http://user:secret@127.0.0.1:{port}")
    said = bench.sweep(study, *where, expect=2)
    assert (
        "MLflow does not answer" in said.err and "--tracking-later" in said.err and "secret" not in said.out + said.err
    )
    assert not ended(storage)
    said = bench.sweep(study, *where, "--tracking-later")
    assert "records wait; run the same command again to catch up" in said.out and "secret" not in said.out + said.err
    with mlflow_server(bench.folder, port):
        said = bench.sweep(study, *where)
        assert "nothing to train" in said.out and "did not answer" not in said.out
        stored(port, storage)
        driver = bench.start(study, *where, "--set", "seeds=4", "--set", "trial.phases.distil.budget.steps=2001")
        until(lambda: len(ended(storage)) > 6, driver)
    time.sleep(2)
    assert driver.poll() is None, "the server was away for so short that nothing was shown"
    with mlflow_server(bench.folder, port):
        finish(driver)
        runs, numbers = stored(port, storage)
        bench.sweep(study, *where, "--set", "seeds=4", "--set", "trial.phases.distil.budget.steps=2001")
        assert stored(port, storage) == (runs, numbers), "nothing doubled"


def stored(port: int, storage: Path) -> tuple[int, int]:
    """Nested runs and points that the server has: as many as the tables."""
    from mlflow import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{port}")
    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if run.data.tags.get("kind") == "study"]
    nested = {run.data.tags["trial"]: run for run in runs if "trial" in run.data.tags and run not in parents}
    found = tables(storage)
    assert len(parents) == 1 and len(nested) == len(runs) - 1 and nested.keys() == set(found.trials["trial"])
    points = sum(
        len(client.get_metric_history(run.info.run_id, name)) for run in nested.values() for name in run.data.metrics
    )
    assert points == len(found.results)
    return len(nested), points
