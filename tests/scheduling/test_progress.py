"""What a person sees meanwhile: counts, failures with reason and log, the best so far, and what was left."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.scheduling.progress import Progress


class _Agenda:
    """As much of an agenda as is looked at."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.running: dict[str, Any] = {}
        self.left, self.best = 0, None
        objective = SimpleNamespace(metric="mlm_loss")
        self.study = SimpleNamespace(folder="study", objective=objective)

    def is_planned(self, trial: str) -> bool:
        return trial != "old"

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
        "reason": None,
        "ended": 5,
        **more,
    }


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [io.StringIO, _Terminal])
def test_a_failure_is_told_with_its_reason_its_log_and_its_last_lines(out: type[io.StringIO]) -> None:
    progress = Progress(_Agenda(), "runs", written := out())  # type: ignore[arg-type]
    progress.on_trial(row("abc", "failed", reason="diverged: nan", last_lines=["one", "two"]), [])
    text = written.getvalue()
    assert "failed: trial taught, seed 1 (abc): diverged: nan" in text and "runs/study/trials/abc/log.txt" in text
    assert "| one" in text and "| two" in text


def test_without_a_terminal_each_end_is_a_line_and_beginnings_are_none() -> None:
    agenda = _Agenda()
    agenda.running["abc"] = None
    progress = Progress(agenda, "runs", written := io.StringIO())  # type: ignore[arg-type]
    progress.on_trial(row("abc", "running", ended=None), [])
    assert written.getvalue() == ""
    progress.on_trial(row("abc", "ended"), [])
    assert written.getvalue() == "ended: trial taught, seed 1 (abc): mlm_loss 3.5000 on dev\n"
    assert "\x1b" not in written.getvalue() and "\r" not in written.getvalue()


def test_what_the_machine_took_and_what_was_left_is_told() -> None:
    progress = Progress(_Agenda(), "runs", written := io.StringIO())  # type: ignore[arg-type]
    progress.on_trial(row("abc", "ended", faults=2), [])
    progress.on_trial(row("def", "running", ended=None), [])
    assert "on dev; 2 attempts before were lost to the machine\n" in written.getvalue()
    assert "left: trial taught, seed 1 (def) goes on at the next start, from its checkpoint\n" in written.getvalue()


def test_the_line_counts_what_is_planned_and_names_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    agenda, clock = _Agenda(), [100.0]
    monkeypatch.setattr("orchestrator.scheduling.progress.time.monotonic", lambda: clock[0])
    progress = Progress(agenda, "runs", written := _Terminal())  # type: ignore[arg-type]
    agenda.rows = {"old": row("old", "ended"), "before": row("before", "ended")}
    progress.begin(2)
    assert "2 slots; Ctrl-C ends cleanly" in written.getvalue()
    agenda.rows |= {
        name: row(name, status)
        for name, status in (("a", "ended"), ("b", "failed"), ("c", "stopped"), ("d", "running"))
    }
    agenda.running, agenda.left, agenda.best = {"d": None}, 6, SimpleNamespace(name="p003")  # type: ignore[assignment]
    clock[0] = 190.0
    progress.tick()
    line = written.getvalue().rpartition("\x1b[2K")[2]
    assert line == "[01:30] 4 done · 1 running · 1 failed · best p003 -0.0123 · about 3.0 min left"


def test_lines_come_now_and_then_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agenda, clock = _Agenda(), [100.0]
    monkeypatch.setattr("orchestrator.scheduling.progress.time.monotonic", lambda: clock[0])
    progress = Progress(agenda, str(tmp_path), written := io.StringIO())  # type: ignore[arg-type]
    progress.begin(1)
    for _ in range(100):
        clock[0] += 0.3
        progress.tick()
    assert written.getvalue().count(" done · ") in (2, 3)
