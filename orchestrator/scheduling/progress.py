"""What a person sees while a sweep runs: done, running, failed with reason and log, best so far, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from orchestrator.scheduling.scheduler import Agenda


class Progress:
    """One line that is rewritten on a terminal, or a line now and then elsewhere."""

    def __init__(self, agenda: Agenda, storage: str, out: TextIO | None = None) -> None:
        self.agenda, self.storage = agenda, storage
        self.out = out or sys.stdout
        self.started = time.monotonic()
        self.last = 0.0
        self.slots = 1
        self.finished_before = 0
        self.every = 1.0 if self.out.isatty() else 15.0

    def begin(self, num_slots: int) -> None:
        self.slots = num_slots
        self.started = time.monotonic()
        self.finished_before = self._count("ended", "stopped", "failed")
        self.say(f"{num_slots} slots; Ctrl-C ends cleanly")

    def on_trial(self, row: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        if row["status"] == "failed" and row["ended"]:
            log = f"{self.storage}/{self.agenda.study.folder}/trials/{row['trial']}/log.txt"
            self.say(f"failed: {_name(row)}: {row['reason']}\n        {log}")
            for line in row.get("last_lines") or ():
                self.say(f"        | {line}")
        elif row["status"] == "running" and row["trial"] not in self.agenda.running:
            self.say(f"left: {_name(row)} goes on at the next start, from its checkpoint")
        elif row["status"] in ("ended", "stopped") and row["ended"] and not self.out.isatty():
            lost = f"; {row['faults']} attempts before were lost to the machine" if row.get("faults") else ""
            self.say(f"{row['status']}: {_name(row)}{self._result(row)}{lost}")

    def tick(self) -> None:
        if time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            line = self._line()
            self.out.write(f"\r\x1b[2K{line}" if self.out.isatty() else f"{line}\n")
            self.out.flush()

    def done(self) -> None:
        if self.out.isatty():
            self.out.write("\r\x1b[2K")
        self.say(self._line())

    def _line(self) -> str:
        running, failed = len(self.agenda.running), self._count("failed")
        finished = self._count("ended", "stopped", "failed")
        elapsed = time.monotonic() - self.started
        parts = [
            f"[{int(elapsed) // 60:02d}:{int(elapsed) % 60:02d}] {finished} done",
            f"{running} running",
            f"{failed} failed",
        ]
        winner = self.agenda.winner()
        if winner is not None:
            parts.append(f"best {winner.name} {self.agenda.score(winner):+.4f}")
        left = self.agenda.num_left()
        new = finished - self.finished_before
        if new > 2 and left:
            parts.append(f"about {elapsed / new * left / 60:.1f} min left")
        return " · ".join(parts)

    def _count(self, *states: str) -> int:
        return sum(row["status"] in states for trial, row in self.agenda.rows.items() if self.agenda.is_planned(trial))

    def _result(self, row: Mapping[str, Any]) -> str:
        value = self.agenda.value(row["trial"])
        return (
            ""
            if value is None or row["kind"] == "teacher"
            else f": {self.agenda.study.objective.metric} {value:.4f} on dev"
        )

    def say(self, text: str) -> None:
        self.out.write(f"{chr(13) + chr(27) + '[2K' if self.out.isatty() else ''}{text}\n")
        self.out.flush()


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['kind']} {row['point']}, seed {row['seed']} ({row['trial']})"
