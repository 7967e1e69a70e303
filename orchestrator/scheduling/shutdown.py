"""What ends a sweep before its time: a signal, `--hours`, the study's own limit, `--drain`, and `--stop` for one trial.

Whatever it is, what runs is asked to write its checkpoint and leave (or is let to its end), nothing new is started, and
the tables and the report are made from what there is. A second signal ends everything at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from orchestrator.scheduling import trial_files
from orchestrator.scheduling.scheduler import Agenda
from orchestrator.study.errors import StudyError
from trainables.storage.files import Storage
from trainables.training.stop_signals import LOOK_SECONDS

DRAIN = "drain"  # a file in the study's folder: nothing new is started
PATIENCE = 20.0  # seconds for checkpoints after a signal: whoever sent it kills after 30 (Slurm, Kubernetes) or more


@dataclass
class Ending:
    """Looked at once a turn. As a context it listens to SIGINT and SIGTERM."""

    agenda: Agenda
    hours: float | None  # since `started`
    say: Callable[[str], None]
    started: float = field(default_factory=lambda: time.monotonic())
    signal: int | None = None  # that came, if one did
    _home: Storage = field(init=False)
    _asked: float | None = None  # when what runs was asked to leave
    _told: set[str] = field(default_factory=set)
    _looked: float = -1e9
    _tried: float = -1e9
    _before: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._home = self.agenda.storage.sub(self.agenda.study.folder)

    def __enter__(self) -> Ending:
        self._home.delete(DRAIN)
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def tick(self) -> None:
        """Raises KeyboardInterrupt where what runs did not leave in time after a signal."""
        now, limit = time.monotonic(), self.agenda.study.limits.minutes
        if self.signal is not None and self._asked is None:
            name = signal.Signals(self.signal).name
            self._leave(f"{name}: what runs writes its checkpoint and leaves (once more: at once)")
        elif self.hours is not None and self._asked is None and now - self.started > 3600 * self.hours:
            self._leave(f"--hours {self.hours:g} are over: what ran was left at a checkpoint")
        elif limit and not self.agenda.closed and now - self.started > 60 * limit:
            self._close(f"the limit of {limit:g} minutes came: nothing new was started")
        if not self.agenda.closed and now - self._looked > LOOK_SECONDS[self._home.is_local]:
            self._looked = now
            with contextlib.suppress(OSError):  # the next look asks again
                if self._home.read(DRAIN) is not None:
                    self._close("drained: nothing new was started")
                    self._home.delete(DRAIN)
        if self._asked is not None and now - self._tried > LOOK_SECONDS[self._home.is_local] / 2:
            self._tried = now
            for trial in self.agenda.running.keys() - self._told:
                with contextlib.suppress(OSError):  # asked again soon; after a signal they may go without a checkpoint
                    trial_files.ask(self._home, trial, "leave")
                    self._told.add(trial)
            if self.signal is not None and now - self._asked > PATIENCE:
                raise KeyboardInterrupt

    def _leave(self, why: str) -> None:
        self._asked = time.monotonic()
        self._close(why)

    def _close(self, why: str) -> None:
        self.agenda.closed = why
        self.say(why)


@contextlib.contextmanager
def _alone(home: Storage) -> Iterator[bool | None]:
    """Whether no other driver has the study; nobody gets it meanwhile. None: elsewhere than on local storage one cannot
    know. The lock dies with its process, so nobody waits for a stale one."""
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
    """One driver to a study. Raises StudyError where there is another."""
    with _alone(home) as alone:
        if alone is False:
            raise StudyError(f"{home.uri}: another sweep of this study is running; wait for it or end it")
        yield


def request(home: Storage, *, drain: bool, stop: str | None) -> str:
    """Asks the sweep that runs to drain, or to stop one trial for good. Returns what to tell. Raises StudyError."""
    with _alone(home) as alone:
        if alone:
            raise StudyError(f"{home.uri}: no sweep of this study is running, so there is nothing to drain or stop")
    if drain:
        home.write(DRAIN, b"")
        return "asked: what runs is finished, nothing new is started"
    running = [trial for trial in home.list("trials") if trial_files.is_running(home, trial)]
    found = [trial for trial in running if stop and trial.startswith(stop)]
    if len(found) != 1:
        what = "is no running trial" if not found else f"is the beginning of {len(found)} running trials"
        raise StudyError(f"--stop {stop}: {what}; running: {', '.join(running) or 'none'}")
    trial_files.ask(home, found[0], "stop")
    return f"asked: trial {found[0]} stops at its next step"
