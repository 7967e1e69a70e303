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


class _Agenda:
    """As much of an agenda as is looked at."""

    def __init__(self, root: Path, minutes: float | None = None) -> None:
        self.storage = Storage(str(root))
        self.study = SimpleNamespace(folder="study", limits=SimpleNamespace(minutes=minutes))
        self.closed: str | None = None
        self.running: dict[str, Any] = {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("orchestrator.scheduling.shutdown.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Ending, _Agenda, list[str]]]:
    def make(*, hours: float | None = None, minutes: float | None = None) -> tuple[Ending, _Agenda, list[str]]:
        agenda, said = _Agenda(tmp_path, minutes), list[str]()
        return Ending(agenda, hours, said.append), agenda, said  # type: ignore[arg-type]

    return make


def asked(agenda: _Agenda, trial: str) -> bytes | None:
    return agenda.storage.read(f"study/trials/{trial}/leave")


def test_the_limit_closes_the_agenda_once_and_lets_what_runs_end(make: Any, clock: list[float]) -> None:
    it, agenda, said = make(minutes=2)
    agenda.running = {"abc": None}
    clock[0] = 119.0
    it.tick()
    assert agenda.closed is None
    for clock[0] in (121.0, 150.0):
        it.tick()
    assert agenda.closed == "the limit of 2 minutes came: nothing new was started"
    assert said == [agenda.closed] and asked(agenda, "abc") is None


def test_after_the_hours_what_runs_is_asked_to_leave(make: Any, clock: list[float]) -> None:
    it, agenda, said = make(hours=0.5)
    agenda.running = {"abc": None}
    clock[0] = 1799.0
    it.tick()
    assert agenda.closed is None and asked(agenda, "abc") is None
    clock[0] = 1801.0
    it.tick()
    assert "--hours 0.5 are over" in agenda.closed and asked(agenda, "abc") == b"leave"
    clock[0] = 9000.0
    it.tick()  # no hurry: nobody kills
    assert len(said) == 1 and it.signal is None


def test_storage_that_does_not_answer_is_asked_again(
    make: Any, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    it, agenda, _ = make(hours=0.5)
    agenda.running = {"abc": None}

    def away(*_: Any) -> None:
        raise OSError("away")

    with monkeypatch.context() as broken:
        for name in ("read", "write", "delete"):
            broken.setattr(Storage, name, away)
        for clock[0] in (10.0, 1801.0, 1810.0):
            it.tick()
    assert agenda.closed and asked(agenda, "abc") is None
    clock[0] = 1820.0
    it.tick()
    assert asked(agenda, "abc") == b"leave"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_all_to_leave_and_waits_only_so_long(make: Any, clock: list[float], number: int) -> None:
    it, agenda, _ = make()
    agenda.running = {"abc": None, "def": None}
    before = signal.getsignal(number)
    with it:
        os.kill(os.getpid(), number)
        assert agenda.closed is None, "a handler only notes it"
        it.tick()
        assert agenda.closed and asked(agenda, "abc") == asked(agenda, "def") == b"leave" and it.signal == number
        clock[0] = shutdown.PATIENCE - 1
        it.tick()
        clock[0] = shutdown.PATIENCE + 1
        with pytest.raises(KeyboardInterrupt):
            it.tick()
        with pytest.raises(KeyboardInterrupt):  # a second signal: at once
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_drain_is_asked_for_while_a_driver_lives_and_forgotten_by_the_next(make: Any, tmp_path: Path, clock: list[float]) -> None:  # fmt: skip
    it, agenda, _ = make()
    home = Storage(str(tmp_path / "study"))
    with only_driver(home), it:
        it.tick()
        assert "finished" in request(home, drain=True, stop=None)
        clock[0] = 5.0
        it.tick()
        assert agenda.closed == "drained: nothing new was started"
    with pytest.raises(StudyError, match="no sweep of this study is running"):
        request(home, drain=True, stop=None)
    again, agenda, _ = make()
    with again:
        again.tick()
    assert agenda.closed is None


def test_a_stop_names_one_running_trial(tmp_path: Path) -> None:
    home = Storage(str(tmp_path / "study"))
    for trial in ("abc1", "abc2", "over"):
        trial_files.write_start(home, trial, {"trial": trial})
    trial_files.write_end(home, "over", {"trial": "over", "status": "ended", "attempts": 1})
    home.write("trials/over/attempt-1/attempt.json", b"{}")
    with only_driver(home):
        with pytest.raises(StudyError, match="--stop over: is no running trial; running: abc1, abc2"):
            request(home, drain=False, stop="over")
        with pytest.raises(StudyError, match="the beginning of 2 running trials"):
            request(home, drain=False, stop="abc")
        assert "trial abc2 stops" in request(home, drain=False, stop="abc2")
        home.write("trials/over/attempt-2/attempt.json", b"{}")  # it failed, and is tried again
        assert "trial over stops" in request(home, drain=False, stop="over")
    assert home.read("trials/abc2/leave") == b"stop"
    trial_files.write_start(home, "abc2", {"trial": "abc2"})
    assert home.read("trials/abc2/leave") is None, "what was asked of the attempt before does not bind the next"


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
