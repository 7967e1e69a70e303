"""One attempt: what is the trial's own failure, what the machine's, and what is kept when it is asked to leave."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.trials import Lab, Listener, distillation
from trainables.runtime import trial_attempt
from trainables.runtime.outcome import Outcome
from trainables.runtime.trial_attempt import LEAVE, Job, run
from trainables.storage.files import StorageError
from trainables.training import gradients, loop, stop_signals
from trainables.training.stop_signals import StopReason

HOME = "study/trials/t"


@pytest.fixture
def go(lab: Lab) -> Callable[..., dict[str, Any]]:
    """Runs an attempt at one and the same trial."""
    spec = lab.spec(distillation(), {"phases.distil.budget.steps": 40})
    threads = torch.get_num_threads()

    def go(session: Any = None, **more: Any) -> dict[str, Any]:
        more = {"checkpoint_seconds": 1e9, **more}
        job = Job(trial="t", spec=spec.model_dump_json(), fingerprints=lab.fingerprints, storage=str(lab.root), folder="study",
                  threads=threads, device="cpu", checkpoint_at_reports=False, provenance={}, **more)  # fmt: skip
        return run(job, session or Listener())

    return go


def log(lab: Lab) -> str:
    return (lab.root / HOME / "log.txt").read_text()


class AskedAt(Listener):
    """A session during which the trial is asked to leave, at a report of the phase `distil`."""

    def __init__(self, lab: Lab, what: str) -> None:
        super().__init__()
        self.lab, self.what = lab, what

    def report(self, records: list[dict[str, Any]]) -> None:
        if {(r["phase"], r["progress"]) for r in records} == {("distil", 0.25)}:
            self.lab.storage.write(f"{HOME}/{LEAVE}", self.what.encode())
            time.sleep(1.1)  # it looks once a second


def test_a_trial_that_is_asked_to_leave_writes_its_checkpoint_and_goes_on_from_there(
    lab: Lab, go: Any, new_lab: Any
) -> None:
    end = go(AskedAt(lab, "leave"))
    assert (end.status, end.reason, end.faults) == ("left", "leave", 0)
    assert "left at step 11 of 40 (leave)" in log(lab)
    lab.storage.delete(f"{HOME}/{LEAVE}")
    end = go()
    assert (end.status, end.attempts, end.faults) == ("ended", 2, 0), "the end of a sweep is no fault of the machine"
    assert "phase distil: from step 11 of 40" in log(lab)
    ours = [r for r in lab.records("t", 2) if r["split"] != "system"]
    whole = new_lab()
    plain = whole.run(whole.spec(distillation(), {"phases.distil.budget.steps": 40}))
    theirs = [r for r in plain.records if r["split"] != "system"]
    assert [(r["phase"], r["metric"], r["step"], r["value"]) for r in ours] == [
        (r["phase"], r["metric"], r["step"], r["value"]) for r in theirs
    ]


def test_a_trial_that_is_stopped_for_good_says_so_and_is_no_fault(lab: Lab, go: Any) -> None:
    end = go(AskedAt(lab, "stop"))
    assert (end.status, end.reason) == ("stopped", "stopped by hand")
    lab.storage.delete(f"{HOME}/{LEAVE}")
    assert go().faults == 0


def test_attempts_that_were_cut_off_count_as_faults_and_those_with_an_outcome_do_not(lab: Lab, go: Any) -> None:
    lab.storage.write(f"{HOME}/attempt-1/attempt.json", b'{"node": "x"}')
    lab.storage.write(f"{HOME}/attempt-2/attempt.json", b'{"node": "x", "status": "failed"}')
    lab.storage.write(f"{HOME}/attempt-3/attempt.json", b"")  # half-written
    end = go()
    assert (end.status, end.attempts, end.faults) == ("ended", 4, 2)


def test_a_scheduler_that_ends_the_trial_is_no_fault(lab: Lab, go: Any) -> None:
    class Ends(Listener):
        def report(self, records: list[dict[str, Any]]) -> None:
            raise SystemExit

    with pytest.raises(SystemExit):
        go(Ends())
    assert json.loads((lab.root / HOME / "attempt-1" / "attempt.json").read_text())["status"] == "stopped"
    assert go().faults == 0


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "left", "storage"),
        (OSError(errno.EROFS, "Read-only file system"), "left", "storage"),
        (StorageError(errno.EACCES, "Access Denied", "bucket/trials"), "left", "storage"),
        (OSError(errno.ENOENT, "No such file"), "failed", "FileNotFoundError: [Errno 2] No such file"),
        (
            RuntimeError("[pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed"),
            "left",
            StopReason.PEER_LOST,
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "failed",
            "out of memory: Default",
        ),
        (MemoryError(), "failed", "out of memory: "),
        (torch.OutOfMemoryError("CUDA out of memory"), "failed", "out of memory: CUDA"),
        (ValueError("odd\nand long"), "failed", "ValueError: odd"),
    ],
)
def test_the_machines_faults_and_the_trials_own_are_told_apart(
    lab: Lab, go: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, reason: str
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "evaluate", fails)
    end = go()
    assert end.status == status and end.reason.startswith(reason) and "\n" not in end.reason
    assert (end.last_lines is not None) == (status == "failed")
    assert end.detail == (error.strerror if reason == "storage" else None)  # type: ignore[attr-defined]
    assert Outcome.from_json(end.to_json()) == end


def test_a_checkpoint_that_does_not_fit_is_not_written_and_the_log_says_so(lab: Lab, go: Any) -> None:
    assert go(checkpoint_seconds=0, checkpoint_bytes=1000).status == "ended"
    assert "no checkpoint at step 1: two of" in log(lab)
    lab.storage.delete(HOME)
    lab.storage.delete("phases")
    assert go(checkpoint_seconds=0, checkpoint_bytes=10_000_000).status == "ended"
    assert "no checkpoint" not in log(lab)


def test_memory_that_this_machine_refuses_halves_the_micro_batch(
    lab: Lab, go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients.run_micro_batch

    def hungry(phase: Any, active: Any, parts: Any, *more: Any, **low: int) -> Any:
        if len(parts["main"].ids_BT) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(phase, active, parts, *more, **low)

    monkeypatch.setattr(gradients, "run_micro_batch", hungry)
    assert go().status == "ended"
    assert "micro-batch halved to 2 sequences" in log(lab)


def test_a_trial_takes_no_more_of_a_shared_device_than_its_share(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(trial_attempt, "run_trial", lambda *_: {})
    monkeypatch.setattr(trial_attempt, "versions", lambda _: {})
    spec = lab.spec(distillation())
    for device, share in (("cuda", 0.25), ("cuda", 1.0), ("cpu", 0.5)):
        job = Job(trial="t", spec=spec.model_dump_json(), fingerprints=lab.fingerprints, storage=str(lab.root), folder="study",
                  threads=1, device=device, checkpoint_at_reports=False, provenance={}, device_share=share)  # fmt: skip
        assert run(job, Listener()).status == "ended"
    assert shares == [0.25]


# ------------------------------------------------------------------------------------------------- asked, and silent


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    stop_signals._terminated.clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_sigterm_asks_a_busy_process_and_ends_an_idle_one() -> None:
    stop_signals.listen()
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    stop_signals._terminated.clear()
    mine = stop_signals.Notice()
    with stop_signals.watched(mine):
        assert mine.look() is None
        signal.raise_signal(signal.SIGTERM)
        assert mine.look() == "terminated"


def test_a_file_is_looked_at_once_a_second_and_remembered(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("trainables.training.stop_signals.time.monotonic", lambda: now[0])
    mine = stop_signals.Notice(lab.storage, "leave")
    assert mine.look() is None
    lab.storage.write("leave", b"stop\n")
    now[0] = 100.5
    assert mine.look() is None
    now[0] = 101.1
    assert mine.look() == StopReason.BY_HAND
    lab.storage.delete("leave")
    assert mine.look() == StopReason.BY_HAND


SILENT = """
import sys, threading, time
from trainables.training.stop_signals import Notice; from trainables.training.stop_signals import watched
with open(sys.argv[1], "w") as stacks, watched(Notice(hang_seconds=0.5, stacks=stacks)) as notice:
    for _ in range(int(sys.argv[2])):
        time.sleep(0.1)
        notice.look()
    threading.Event().wait(20 if sys.argv[3] == "hangs" else 0.01)
print("whole")
"""


@pytest.mark.parametrize("what", ["hangs", "moves"])
def test_a_silent_process_ends_itself_and_tells_where_it_stood(tmp_path: Path, what: str) -> None:
    """In a process of its own, since it is ended. One that moves for longer than the limit is left alone."""
    file = tmp_path / "stacks.txt"
    found = subprocess.run(
        [sys.executable, "-c", SILENT, str(file), "12", what], capture_output=True, text=True, timeout=60
    )
    if what == "moves":
        assert found.returncode == 0 and found.stdout == "whole\n" and not file.read_text()
    else:
        assert found.returncode == 1 and "whole" not in found.stdout and "Thread" in file.read_text()


def test_nothing_is_left_of_the_watch(lab: Lab, go: Any) -> None:
    before = threading.active_count()
    assert go(hang_seconds=1.0).status == "ended"
    time.sleep(1.5)
    assert threading.active_count() == before and not list((lab.root / HOME).glob("attempt-1/hung-*"))
    assert trial_attempt.LEAVE not in [path.name for path in (lab.root / HOME).iterdir()]
