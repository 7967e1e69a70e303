"""Tune's view of the scheduler, without a Tune: trials that wait, and storage that does not answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial

from orchestrator.scheduling import tune_runner
from trainables.storage.files import StorageError


class _Scheduler:
    """As much of a scheduler as is used once trials have been handed out."""

    def __init__(self) -> None:
        self.closed: str | None = None
        self.is_broken = False
        self.requeued: list[str] = []
        self.disabled_reasons: list[str] = []
        self.fault: Exception | None = None

    def next(self) -> None:
        if self.fault is not None:
            raise self.fault

    def nothing_follows(self) -> bool:
        return False

    def requeue(self, trial: str) -> None:
        self.requeued.append(trial)

    def close(self, why: str, *, is_broken: bool = False) -> None:
        self.closed, self.is_broken = self.closed or why, self.is_broken or is_broken


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def source(said: list[str]) -> Any:
    """Two slots of which Tune's `t0` has begun a trial of ours, and `t1` waits for a machine."""
    source = tune_runner.TrialSource(_Scheduler(), {}, 2, said.append)  # type: ignore[arg-type]
    source.active = {"t0": "ours-0", "t1": "ours-1"}
    source.on_trial_result("t0", {"records": "[]", "begun": True})
    return source


def test_a_trial_that_waits_for_a_machine_does_not_begin_after_the_close(source: Any) -> None:
    source.scheduler.closed = "drained"
    assert not source.only_waits()  # t0 still runs
    source.on_trial_result("t0", {"records": "[]", "begun": True})  # its process was lost, and the trial resumes
    assert source.active == {"t0": "ours-0", "t1": "ours-1"}
    source.on_trial_result("t1", {"records": "[]", "begun": True})
    assert source.active == {"t0": "ours-0"} and source.scheduler.requeued == ["ours-1"]
    assert source.is_unwanted("t1", {"begun": True}) and not source.is_unwanted("t0", {"begun": True})


def test_where_every_trial_that_is_left_waits_the_sweep_ends(source: Any) -> None:
    watch = tune_runner.Watch(source, lambda: None)
    del source.active["t0"]
    watch.on_step_end(0, [])
    source.scheduler.closed = "--hours 1 have passed"
    with pytest.raises(tune_runner.LeaveTune):
        watch.on_step_end(1, [])
    source.requeue_waiting()
    assert source.scheduler.requeued == ["ours-1"] and not source.active


def test_a_trial_that_tune_gave_up_without_a_callback_starts_again(source: Any, said: list[str]) -> None:
    trials = [
        SimpleNamespace(trial_id="t1", status=Trial.RUNNING),
        SimpleNamespace(trial_id="t0", status=Trial.RUNNING),
    ]
    watch = tune_runner.Watch(source, lambda: None)
    watch.on_step_end(0, trials)
    assert not said
    trials[0].status = Trial.ERROR
    watch.on_step_end(1, trials)
    watch.on_step_end(2, trials)
    assert source.scheduler.requeued == ["ours-1"] and source.active == {"t0": "ours-0"}
    assert len(said) == 1 and "ours-1" in said[0]


def test_a_slot_that_is_unfit_stays_occupied_until_nothing_else_runs(source: Any, said: list[str]) -> None:
    fault = {"records": "[]", "fault": "host: why"}
    source.on_trial_result("t1", fault)
    assert source.scheduler.requeued == ["ours-1"] and said == ["slot disabled: host: why"]
    assert source.suggest("t2") is None, "the slot counts as used"
    assert not source.is_unwanted("t1", fault) and not source.scheduler.is_broken
    del source.active["t0"]
    source.is_finished = True
    assert source.is_unwanted("t1", fault)


def test_storage_that_cannot_be_read_ends_the_sweep_and_not_the_driver(source: Any) -> None:
    source.active.clear()
    source.scheduler.fault = StorageError(5, "SlowDown", "bucket/phases")
    assert source.suggest("t2") == tune_runner.Searcher.FINISHED
    assert source.scheduler.is_broken and "(SlowDown)" in source.scheduler.closed
