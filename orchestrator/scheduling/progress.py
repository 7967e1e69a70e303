"""The progress lines of a sweep: trials done, running and failed (with reason and log), the best so far, time left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from orchestrator.scheduling.scheduler import Scheduler
from trainables.runtime.outcome import Status

FINISHED = (Status.ENDED, Status.STOPPED, Status.FAILED)
CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """One line that is rewritten on a terminal, or a line every 15 seconds elsewhere."""

    def __init__(self, scheduler: Scheduler, out: TextIO | None = None) -> None:
        self.scheduler = scheduler
        self.out = out or sys.stdout
        self.is_terminal = self.out.isatty()
        self.started, self.last = time.monotonic(), 0.0
        self.finished_before = 0
        self.statuses: dict[str, str] = {}  # of planned trials

    def begin(self, num_slots: int) -> None:
        self.statuses = {row["trial"]: row["status"] for row in self.scheduler.ledger.all_rows() if row["planned"]}
        self.started = time.monotonic()
        self.finished_before = self._num_finished(Counter(self.statuses.values()))
        self.say(f"{num_slots} slots; Ctrl-C ends cleanly")

    def on_trial(self, row: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        ledger = self.scheduler.ledger
        if row["planned"]:
            self.statuses[row["trial"]] = row["status"]
        name = f"{row['kind']} {row['point']}, seed {row['seed']} ({row['trial']})"
        if row["status"] == Status.FAILED and row["ended"]:
            lines = [f"failed: {name}: {row['reason']}", f"        {ledger.home.uri}/trials/{row['trial']}/log.txt"]
            self.say("\n".join([*lines, *(f"        | {line}" for line in row.get("last_lines") or ())]))
        elif row["status"] == Status.RUNNING and row["trial"] not in ledger.running:
            self.say(f"suspended: {name} resumes at the next start, from its checkpoint")
        elif row["status"] in FINISHED and row["ended"] and not self.is_terminal:
            value = None if row["kind"] == "teacher" else ledger.value(row["trial"])
            result = "" if value is None else f": {ledger.study.objective.metric} {value:.4f} on dev"
            lost = f"; {row['faults']} earlier attempts were lost with their machine" if row.get("faults") else ""
            self.say(f"{row['status']}: {name}{result}{lost}")

    def tick(self) -> None:
        if time.monotonic() - self.last >= (1.0 if self.is_terminal else 15.0):
            self.last = time.monotonic()
            line = self._line()
            self.out.write(f"{CLEAR_LINE}{line}" if self.is_terminal else f"{line}\n")
            self.out.flush()

    def done(self) -> None:
        self.say(self._line())

    def say(self, text: str) -> None:
        self.out.write(f"{CLEAR_LINE if self.is_terminal else ''}{text}\n")
        self.out.flush()

    def _line(self) -> str:
        counts = Counter(self.statuses.values())
        finished, elapsed = self._num_finished(counts), time.monotonic() - self.started
        parts = [
            f"[{int(elapsed) // 60:02d}:{int(elapsed) % 60:02d}] {finished} done",
            f"{len(self.scheduler.ledger.running)} running",
            f"{counts[Status.FAILED]} failed",
        ]
        search = self.scheduler.search
        if search is not None and (winner := search.winner()) is not None:
            parts.append(f"best {winner.name} {search.score(winner):+.4f}")
        left, new = self.scheduler.num_left(), finished - self.finished_before
        if new > 2 and left:
            more = self.scheduler.most_at_later_looks
            later = f", at most {more} trials more at later looks" if more else ""
            parts.append(f"about {elapsed / new * left / 60:.1f} min left{later}")
        return " · ".join(parts)

    def _num_finished(self, counts: Mapping[str, int]) -> int:
        return sum(counts[status] for status in FINISHED)
