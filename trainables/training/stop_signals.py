"""Between two steps: whether the trial is asked to leave, and the proof to a time limit that it still moves.

Who runs the sweep asks by a file beside the trial; the machine asks by SIGTERM to the process (a node that will go).
Whoever is silent for too long, in a collective whose peer is gone or on a file system that does not answer, is ended from
inside: what it was doing goes to a file, the process goes, and the trial goes on elsewhere from its checkpoint.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from trainables.storage.files import Storage

LEAVE = "leave"  # the file beside the trial's attempts; its content is `stop` (for good) or `leave` (for now)
Ask = Literal["stop", "leave", "terminated"]  # for good | for now: the sweep ends | for now: this process or node ends
LOOK_SECONDS = {True: 1.0, False: 10.0}  # between looks at the file, on local storage or not: each is a request there

_terminated = threading.Event()
_busy = threading.Event()


def listen() -> None:
    """From now on SIGTERM lets a running trial write its checkpoint first. Belongs into the process' main thread."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: Any) -> None:
    _terminated.set()
    if not _busy.is_set():
        sys.exit(1)


@dataclass
class Notice:
    """A trial's own. `look` is called after each step, and wherever else time passes."""

    storage: Storage | None = None  # None: nobody asks by a file
    name: str = ""  # of the file
    hang_seconds: float = 900.0
    stacks: IO[str] | None = None
    _looked: float = -1e9
    _armed: float = -1e9
    _asked: Ask | None = field(default=None)

    def look(self) -> Ask | None:
        """What is asked, if anything. Costs a comparison but once a second."""
        now = time.monotonic()
        if self.stacks is not None and now - self._armed > self.hang_seconds / 20:
            self._armed = now
            faulthandler.dump_traceback_later(self.hang_seconds, exit=True, file=self.stacks)
        if (
            self._asked is None
            and self.storage is not None
            and now - self._looked > LOOK_SECONDS[self.storage.is_local]
        ):
            self._looked = now
            text = None
            with suppress(OSError):  # it is asked again soon, and whatever is to be written will tell
                text = self.storage.read(self.name)
            if text is not None:
                self._asked = "stop" if text.strip() == b"stop" else "leave"
        return self._asked or ("terminated" if _terminated.is_set() else None)


@contextmanager
def watched(notice: Notice) -> Iterator[Notice]:
    """While the block runs, this process is busy with a trial, and ended if it is silent for too long."""
    _busy.set()
    try:
        notice.look()
        yield notice
    finally:
        _busy.clear()
        if notice.stacks is not None:
            faulthandler.cancel_dump_traceback_later()
