"""What ends a sweep early: a signal, `--hours`, the study's time limit, `--drain`, and `--stop` for one trial.

In each case running trials write a checkpoint and stop (or run to their end), nothing new is started, and the tables and
the report are made from what there is. A second signal ends everything at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

from orchestrator.scheduling import trial_files
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.study.errors import StudyError
from trainables.storage.files import Storage
from trainables.training.stop_signals import LOOK_SECONDS

DRAIN = "drain"  # a file in the study's folder: nothing new is started
PATIENCE = 20.0  # seconds for checkpoints after a signal: Slurm and Kubernetes kill after 30 s or more


@dataclass
class Ending:
    """Checks the reasons to end, once a turn of the driver. As a context it handles SIGINT and SIGTERM."""

    scheduler: Scheduler
    hours: float | None  # since `started`
    say: Callable[[str], None]
    started: float = field(default_factory=lambda: time.monotonic())
    signal: int | None = None  # that was received
    _asked: float | None = None  # when running trials were asked to leave
    _reached: set[str] = field(default_factory=set)  # trials whose request is written
    _looked: float = -1e9
    _tried: float = -1e9
    _handlers: dict[int, Any] = field(default_factory=dict)  # of before

    def __post_init__(self) -> None:
        self._home = self.scheduler.ledger.home

    def __enter__(self) -> Ending:
        self._home.delete(DRAIN)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def tick(self) -> None:
        """Raises KeyboardInterrupt where running trials do not leave in time after a signal."""
        scheduler, limit = self.scheduler, self.scheduler.study.limits.minutes
        now, look_seconds = time.monotonic(), LOOK_SECONDS[self._home.is_local]
        if self.signal is not None and self._asked is None:
            name = signal.Signals(self.signal).name
            self._leave(f"{name}: running trials write a checkpoint and stop (a second signal ends them at once)")
        elif self.hours is not None and self._asked is None and now - self.started > 3600 * self.hours:
            self._leave(f"--hours {self.hours:g} have passed: running trials were suspended at a checkpoint")
        elif limit and not scheduler.closed and now - self.started > 60 * limit:
            self._close(f"the limit of {limit:g} minutes has passed: nothing new was started")
        if not scheduler.closed and now - self._looked > look_seconds:
            self._looked = now
            with contextlib.suppress(OSError):  # the next turn reads again
                if self._home.read(DRAIN) is not None:
                    self._close("drained: nothing new was started")
                    self._home.delete(DRAIN)
        if self._asked is not None and now - self._tried > look_seconds / 2:
            self._tried = now
            for trial in scheduler.ledger.running.keys() - self._reached:
                with contextlib.suppress(
                    OSError
                ):  # written again soon; after a signal, trials may end without checkpoint
                    trial_files.ask(self._home, trial, "leave")
                    self._reached.add(trial)
            if self.signal is not None and now - self._asked > PATIENCE:
                raise KeyboardInterrupt

    def _leave(self, why: str) -> None:
        self._asked = time.monotonic()
        self._close(why)

    def _close(self, why: str) -> None:
        self.scheduler.close(why)
        self.say(why)


@contextlib.contextmanager
def _lock(home: Storage) -> Iterator[bool | None]:
    """Yields whether this process alone drives the study, and keeps others from driving meanwhile. None: storage that is not
    local has no locks. The lock ends with its process, so none is ever stale."""
    if not home.is_local:
        yield None
        return
    home.path().parent.mkdir(parents=True, exist_ok=True)
    with (home.path().parent / f".{home.path().name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def only_driver(home: Storage) -> Iterator[None]:
    """Makes this process the only driver of a study. Raises StudyError where there is another."""
    with _lock(home) as is_alone:
        if is_alone is False:
            raise StudyError(f"{home.uri}: another sweep of this study is running; wait for it or end it")
        yield


def is_driven(home: Storage) -> bool | None:
    """Returns whether a sweep of this study runs on this machine; None where the storage is not local."""
    with _lock(home) as is_alone:
        return None if is_alone is None else not is_alone


def request(home: Storage, *, drain: bool, stop: str | None) -> str:
    """Asks the running sweep to drain, or to stop one trial for good. Returns a confirmation. Raises StudyError."""
    with _lock(home) as is_alone:
        if is_alone:
            raise StudyError(f"{home.uri}: no sweep of this study is running, so there is nothing to drain or stop")
    if drain:
        home.write(DRAIN, b"")
        return "requested: running trials finish, and nothing new is started"
    trials = home.list("trials")
    is_running = trial_files.side_by_side(partial(trial_files.is_running, home), trials)
    running = [trial for trial, runs in zip(trials, is_running, strict=True) if runs]
    matching = [trial for trial in running if stop and trial.startswith(stop)]
    if len(matching) != 1:
        what = f"{len(matching)} running trials begin so" if matching else "no running trial begins so"
        raise StudyError(f"--stop {stop}: {what}; running: {', '.join(running) or 'none'}")
    trial_files.ask(home, matching[0], "stop")
    return f"requested: trial {matching[0]} stops at its next step"
