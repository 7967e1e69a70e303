"""The progress lines: counts, failures with reason and log, the best so far, and suspended trials."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.scheduling.progress import Progress
from trainables.storage.files import Storage


class _Scheduler:
    """As much of a scheduler, its ledger and its search as progress reads."""

    def __init__(self) -> None:
        self.ledger = self.search = self
        self.rows: list[dict[str, Any]] = []
        self.running: dict[str, Any] = {}
        self.left, self.best, self.most_at_later_looks = 0, None, 0
        self.home = Storage("runs/study")
        self.study = SimpleNamespace(objective=SimpleNamespace(metric="mlm_loss"))

    def all_rows(self) -> list[dict[str, Any]]:
        return self.rows

    def num_left(self) -> int:
        return self.left

    def winner(self) -> Any:
        return self.best

    def score(self, point: Any) -> float:
        return -0.01234

    def value(self, trial: str) -> float | None:
        return 3.5


def row(trial: str, status: str, **more: Any) -> dict[str, Any]:
    return {
        "trial": trial,
        "kind": "trial",
        "point": "taught",
        "seed": 1,
        "status": status,
        "planned": trial != "old",
        "reason": None,
        "ended": 5,
        **more,
    }


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [io.StringIO, _Terminal])
def test_a_failure_is_told_with_its_reason_its_log_and_its_last_lines(out: type[io.StringIO]) -> None:
    progress = Progress(_Scheduler(), written := out())  # type: ignore[arg-type]
    progress.on_trial(row("abc", "failed", reason="diverged: nan", last_lines=["one", "two"]), [])
    text = written.getvalue()
    assert "failed: trial taught, seed 1 (abc): diverged: nan" in text and "runs/study/trials/abc/log.txt" in text
    assert "| one" in text and "| two" in text


def test_without_a_terminal_each_end_is_a_line_and_beginnings_are_none() -> None:
    scheduler = _Scheduler()
    scheduler.running["abc"] = None
    progress = Progress(scheduler, written := io.StringIO())  # type: ignore[arg-type]
    progress.on_trial(row("abc", "running", ended=None), [])
    assert written.getvalue() == ""
    progress.on_trial(row("abc", "ended"), [])
    assert written.getvalue() == "ended: trial taught, seed 1 (abc): mlm_loss 3.5000 on dev\n"
    assert "\x1b" not in written.getvalue() and "\r" not in written.getvalue()


def test_what_the_machine_took_and_what_was_left_is_told() -> None:
    progress = Progress(_Scheduler(), written := io.StringIO())  # type: ignore[arg-type]
    progress.on_trial(row("abc", "ended", faults=2), [])
    progress.on_trial(row("def", "running", ended=None), [])
    assert "on dev; 2 earlier attempts were lost with their machine\n" in written.getvalue()
    assert (
        "suspended: trial taught, seed 1 (def) resumes at the next start, from its checkpoint\n" in written.getvalue()
    )


def test_the_line_counts_what_is_planned_and_names_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, clock = _Scheduler(), [100.0]
    monkeypatch.setattr("orchestrator.scheduling.progress.time.monotonic", lambda: clock[0])
    progress = Progress(scheduler, written := _Terminal())  # type: ignore[arg-type]
    scheduler.rows = [row("old", "ended"), row("before", "ended")]
    progress.begin(2)
    assert "2 slots; Ctrl-C ends cleanly" in written.getvalue()
    for name, status in (("a", "running"), ("a", "ended"), ("b", "failed"), ("c", "stopped"), ("old", "failed")):
        progress.on_trial(row(name, status, ended=None), [])
    scheduler.running, scheduler.left, scheduler.best = {"d": None}, 6, SimpleNamespace(name="p003")  # type: ignore[assignment]
    clock[0] = 190.0
    progress.tick()
    line = written.getvalue().rpartition("\x1b[2K")[2]
    assert line == "[01:30] 4 done · 1 running · 1 failed · best p003 -0.0123 · about 3.0 min left"
    scheduler.most_at_later_looks, clock[0] = 9, 191.0
    progress.tick()
    assert "min left, at most 9 trials more at later looks" in written.getvalue().rpartition("\x1b[2K")[2]


def test_lines_come_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, clock = _Scheduler(), [100.0]
    monkeypatch.setattr("orchestrator.scheduling.progress.time.monotonic", lambda: clock[0])
    progress = Progress(scheduler, written := io.StringIO())  # type: ignore[arg-type]
    progress.begin(1)
    for _ in range(100):
        clock[0] += 0.3
        progress.tick()
    assert written.getvalue().count(" done · ") in (2, 3)
