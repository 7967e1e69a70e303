"""Whatever dies, nothing that finished is lost: each fault done for real to a sweep with a real Ray on this machine.

docs/faults.md has the table of what was done, what was lost and how long until it went on.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from collections import Counter
from pathlib import Path

import pytest
from sweeping import (
    Bench,
    attempts,
    ended,
    finish,
    marked,
    run_alone,
    same_numbers,
    tables,
    until,
    values,
    write_study,
)

from orchestrator.agenda import Agenda
from orchestrator.plan import Identity
from orchestrator.study_file import load_study
from trainables.store import Storage

pytestmark = [pytest.mark.slow, pytest.mark.faults]


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
