"""Tune's view of the agenda, without a Tune: what becomes of trials that wait, and of storage that does not answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial

from orchestrator.scheduling import tune_runner
from trainables.storage.files import StorageError


class _Agenda:
    """As much of an agenda as is asked once trials have been handed out."""

    def __init__(self) -> None:
        self.closed: str | None = None
        self.broken = False
        self.taken_back: list[str] = []
        self.unused: list[str] = []
        self.fault: Exception | None = None

    def next(self) -> None:
        if self.fault is not None:
            raise self.fault

    def nothing_follows(self) -> bool:
        return False

    def take_back(self, trial: str) -> None:
        self.taken_back.append(trial)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def source(said: list[str]) -> Any:
    """Two slots of which Tune's `t0` has begun a trial of ours, and `t1` waits for a machine."""
    found = tune_runner._Source(_Agenda(), {}, 2, said.append)  # type: ignore[arg-type]
    found.live = {"t0": "ours-0", "t1": "ours-1"}
    found.on_trial_result("t0", {"records": "[]", "begun": True})
    return found


def test_what_waits_for_a_machine_does_not_begin_once_nothing_new_is_to_start(source: Any) -> None:
    source.agenda.closed = "drained"
    assert not source.only_waits()  # t0 still runs
    source.on_trial_result("t0", {"records": "[]", "begun": True})  # its process was lost, and it goes on
    assert source.live == {"t0": "ours-0", "t1": "ours-1"}
    source.on_trial_result("t1", {"records": "[]", "begun": True})
    assert source.live == {"t0": "ours-0"} and source.agenda.taken_back == ["ours-1"]
    assert source.is_unwanted("t1", {"begun": True}) and not source.is_unwanted("t0", {"begun": True})


def test_where_all_that_is_left_waits_the_sweep_ends(source: Any) -> None:
    watch = tune_runner._Watch(source, lambda: None)
    del source.live["t0"]
    watch.on_step_end(0, [])
    source.agenda.closed = "--hours 1 are over"
    with pytest.raises(KeyboardInterrupt):
        watch.on_step_end(1, [])
    source.leave_what_waits()
    assert source.agenda.taken_back == ["ours-1"] and not source.live


def test_a_trial_that_tune_gave_up_without_a_word_starts_again(source: Any, said: list[str]) -> None:
    trials = [SimpleNamespace(trial_id="t1", status=Trial.ERROR), SimpleNamespace(trial_id="t0", status=Trial.RUNNING)]
    watch = tune_runner._Watch(source, lambda: None)
    watch.on_step_end(0, trials)
    watch.on_step_end(1, trials)
    assert source.agenda.taken_back == ["ours-1"] and source.live == {"t0": "ours-0"}
    assert len(said) == 1 and "ours-1" in said[0]


def test_storage_that_cannot_be_read_ends_the_sweep_and_not_the_driver(source: Any) -> None:
    source.live.clear()
    source.agenda.fault = StorageError(5, "SlowDown", "bucket/phases")
    assert source.suggest("t2") == tune_runner.Searcher.FINISHED
    assert source.agenda.broken and "(SlowDown)" in source.agenda.closed


def test_slots_of_any_machine_have_the_time_that_ranks_need_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster they have their machine's environment, not the driver's, but for what Tune hands on."""

    class Reached(Exception):
        pass

    def never(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {"AWS_SECRET_ACCESS_KEY"})
    monkeypatch.setattr(tune_runner, "_Source", never)
    study = SimpleNamespace(search=None)
    with pytest.raises(Reached):
        tune_runner.run_agenda(SimpleNamespace(study=study), 1, provenance={}, on_tick=never, say=never)  # type: ignore[arg-type]
    assert set(class_cache.ENV_VARS_TO_PROPAGATE) == {"TUNE_FUNCTION_THREAD_TIMEOUT_S"}
