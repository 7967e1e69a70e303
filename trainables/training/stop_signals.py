"""Requests to stop a trial, read between two steps, and the time limit on a step.

The sweep requests a stop by a file beside the trial, the machine by SIGTERM to the process. A process that makes no step
for too long (a collective whose peer is gone, a file system that does not answer) writes its stacks to a file and exits;
the trial then resumes elsewhere from its checkpoint.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Any

from trainables.storage.files import Storage

LEAVE = "leave"  # the file of a request, beside the trial's attempts; holds `stop` (for good) or `leave` (for now)
LOOK_SECONDS = {True: 1.0, False: 10.0}  # between two reads of that file, by whether the storage is local


class StopReason(StrEnum):
    """Why a trial stops before its end."""

    EARLY = "early stopping"  # for good: the scheduler of the search
    BY_HAND = "stopped by hand"  # for good: --stop
    LEAVE = "leave"  # for now: the sweep ends
    TERMINATED = "terminated"  # for now: the process or its node ends
    PEER_LOST = "another rank was lost"  # for now
    STORAGE = "storage"  # for now: the storage cannot be written


_terminated = threading.Event()
_busy = threading.Event()


def listen() -> None:
    """Makes SIGTERM let a running trial write its checkpoint first. Must be called in the main thread."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: Any) -> None:
    _terminated.set()
    if not _busy.is_set():
        sys.exit(1)


@dataclass
class Notice:
    """The stop requests and the time limit of one trial. `look` is called after each step."""

    storage: Storage | None = None  # None: no file is read
    name: str = ""  # of the file
    hang_seconds: float = 900.0
    stacks: IO[str] | None = None
    _looked: float = -1e9
    _armed: float = -1e9
    _asked: StopReason | None = None

    def look(self) -> StopReason | None:
        """Returns the request to stop, if there is one, and restarts the time limit. Reads the file once a second."""
        now = time.monotonic()
        if self.stacks is not None and now - self._armed > self.hang_seconds / 20:
            self._armed = now
            faulthandler.dump_traceback_later(self.hang_seconds, exit=True, file=self.stacks)
        storage = self.storage
        if self._asked is None and storage is not None and now - self._looked > LOOK_SECONDS[storage.is_local]:
            self._looked = now
            with suppress(OSError):  # the next look reads again, and the next write reports the fault
                if (text := storage.read(self.name)) is not None:
                    self._asked = StopReason.BY_HAND if text.strip() == b"stop" else StopReason.LEAVE
        return self._asked or (StopReason.TERMINATED if _terminated.is_set() else None)


@contextmanager
def watched(notice: Notice) -> Iterator[Notice]:
    """Marks this process as busy with a trial, under the trial's time limit, while the block runs."""
    _busy.set()
    try:
        notice.look()
        yield notice
    finally:
        _busy.clear()
        if notice.stacks is not None:
            faulthandler.cancel_dump_traceback_later()
