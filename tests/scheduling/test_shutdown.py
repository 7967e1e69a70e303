"""What ends a sweep early: limits, signals and requests, each seen by the driver at its next turn."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.scheduling import shutdown, trial_files
from orchestrator.scheduling.shutdown import Ending, only_driver, request
from orchestrator.study.errors import StudyError
from trainables.storage.files import Storage


class _Scheduler:
    """As much of a scheduler and its ledger as is read."""

    def __init__(self, root: Path, minutes: float | None = None) -> None:
        self.ledger, self.home = self, Storage(str(root)).sub("study")
        self.study = SimpleNamespace(limits=SimpleNamespace(minutes=minutes))
        self.closed: str | None = None
        self.running: dict[str, Any] = {}

    def close(self, why: str) -> None:
        self.closed = why


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("orchestrator.scheduling.shutdown.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Ending, _Scheduler, list[str]]]:
    def make(*, hours: float | None = None, minutes: float | None = None) -> tuple[Ending, _Scheduler, list[str]]:
        scheduler, said = _Scheduler(tmp_path, minutes), list[str]()
        return Ending(scheduler, hours, said.append), scheduler, said  # type: ignore[arg-type]

    return make


def asked(scheduler: _Scheduler, trial: str) -> bytes | None:
    return scheduler.home.read(f"trials/{trial}/leave")


def test_the_limit_closes_the_scheduler_once_and_lets_what_runs_end(make: Any, clock: list[float]) -> None:
    it, scheduler, said = make(minutes=2)
    scheduler.running = {"abc": None}
    clock[0] = 119.0
    it.tick()
    assert scheduler.closed is None
    for clock[0] in (121.0, 150.0):
        it.tick()
    assert scheduler.closed == "the limit of 2 minutes has passed: nothing new was started"
    assert said == [scheduler.closed] and asked(scheduler, "abc") is None


def test_after_the_hours_what_runs_is_asked_to_leave(make: Any, clock: list[float]) -> None:
    it, scheduler, said = make(hours=0.5)
    scheduler.running = {"abc": None}
    clock[0] = 1799.0
    it.tick()
    assert scheduler.closed is None and asked(scheduler, "abc") is None
    clock[0] = 1801.0
    it.tick()
    assert "--hours 0.5 have passed" in scheduler.closed and asked(scheduler, "abc") == b"leave"
    clock[0] = 9000.0
    it.tick()  # no hurry: nobody kills
    assert len(said) == 1 and it.signal is None


def test_storage_that_does_not_answer_is_asked_again(
    make: Any, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    it, scheduler, _ = make(hours=0.5)
    scheduler.running = {"abc": None}

    def away(*_: Any) -> None:
        raise OSError("away")

    with monkeypatch.context() as broken:
        for name in ("read", "write", "delete"):
            broken.setattr(Storage, name, away)
        for clock[0] in (10.0, 1801.0, 1810.0):
            it.tick()
    assert scheduler.closed and asked(scheduler, "abc") is None
    clock[0] = 1820.0
    it.tick()
    assert asked(scheduler, "abc") == b"leave"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_all_to_leave_and_waits_only_so_long(make: Any, clock: list[float], number: int) -> None:
    it, scheduler, _ = make()
    scheduler.running = {"abc": None, "def": None}
    before = signal.getsignal(number)
    with it:
        os.kill(os.getpid(), number)
        assert scheduler.closed is None, "a handler only notes it"
        it.tick()
        assert (
            scheduler.closed and asked(scheduler, "abc") == asked(scheduler, "def") == b"leave" and it.signal == number
        )
        clock[0] = shutdown.PATIENCE - 1
        it.tick()
        clock[0] = shutdown.PATIENCE + 1
        with pytest.raises(KeyboardInterrupt):
            it.tick()
        with pytest.raises(KeyboardInterrupt):  # a second signal: at once
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_drain_is_asked_for_while_a_driver_lives_and_forgotten_by_the_next(make: Any, tmp_path: Path, clock: list[float]) -> None:  # fmt: skip
    it, scheduler, _ = make()
    home = Storage(str(tmp_path / "study"))
    with only_driver(home), it:
        it.tick()
        assert "finish" in request(home, drain=True, stop=None)
        clock[0] = 5.0
        it.tick()
        assert scheduler.closed == "drained: nothing new was started"
    with pytest.raises(StudyError, match="no sweep of this study is running"):
        request(home, drain=True, stop=None)
    again, scheduler, _ = make()
    with again:
        again.tick()
    assert scheduler.closed is None


def test_a_stop_names_one_running_trial(tmp_path: Path) -> None:
    home = Storage(str(tmp_path / "study"))
    for trial in ("abc1", "abc2", "over"):
        trial_files.write_start(home, trial, {"trial": trial})
    trial_files.write_end(home, "over", {"trial": "over", "status": "ended", "attempts": 1})
    home.write("trials/over/attempt-1/attempt.json", b"{}")
    with only_driver(home):
        with pytest.raises(StudyError, match="--stop over: no running trial begins so; running: abc1, abc2"):
            request(home, drain=False, stop="over")
        with pytest.raises(StudyError, match="2 running trials begin so"):
            request(home, drain=False, stop="abc")
        assert "trial abc2 stops" in request(home, drain=False, stop="abc2")
        home.write("trials/over/attempt-2/attempt.json", b"{}")  # it failed, and is tried again
        assert "trial over stops" in request(home, drain=False, stop="over")
    assert home.read("trials/abc2/leave") == b"stop"
    trial_files.write_start(home, "abc2", {"trial": "abc2"})
    assert home.read("trials/abc2/leave") is None, "what was asked of the attempt before does not bind the next"


def test_an_attempt_that_the_sweep_itself_cut_off_is_not_lost(tmp_path: Path) -> None:
    """A second Ctrl-C, or a step that took longer than the sweep waits, leaves an attempt without a status."""
    home = Storage(str(tmp_path / "study"))
    for trial, is_asked in (("asked", True), ("lost", False)):
        trial_files.write_start(home, trial, {"trial": trial})
        home.write(f"trials/{trial}/attempt-1/attempt.json", b'{"node": "x"}')
        if is_asked:
            trial_files.ask(home, trial, "leave")
        trial_files.write_start(home, trial, {"trial": trial})
    assert b'"status": "left"' in (home.read("trials/asked/attempt-1/attempt.json") or b"")
    assert b'"status"' not in (home.read("trials/lost/attempt-1/attempt.json") or b"")


def test_there_is_one_driver_to_a_study(tmp_path: Path) -> None:
    home = Storage(str(tmp_path / "study"))
    with (
        only_driver(home),
        pytest.raises(StudyError, match="another sweep of this study is running"),
        only_driver(home),
    ):
        pass
    with only_driver(home):
        pass
