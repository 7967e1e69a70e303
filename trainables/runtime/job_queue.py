"""Between a slot, which has the jobs, and its workers, which run them. An actor of its own; imports nothing heavy."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any

RESTARTS = 3  # of one job whose workers were lost
EARLY = "early stopping"  # the reason of a trial that the scheduler stopped
STOPPED = {"status": "stopped", "reason": EARLY, "attempts": 1, "node": None}


def failed(reason: str, faults: int) -> dict[str, Any]:
    """The end of a job whose workers cannot tell it themselves."""
    return {"status": "failed", "reason": reason, "attempts": faults, "faults": faults, "node": None}


class Mailbox:
    """Between the slot, which has the jobs, and the workers, which run them. An actor without CPUs of its own."""

    def __init__(self) -> None:
        self.number = 0  # of the current job
        self.job: str | None = None
        self.is_over = True
        self.is_stopped = False
        self.is_closed = False
        self.fault: str | None = None  # of a machine of the group: then no job is given
        self.given = 0  # the job that rank 0 has, or had when it was lost
        self.losses = 0  # of workers in the current job
        self.workers: dict[int, Any] = {}
        self.out: deque[dict[str, Any]] = deque()
        self.num_emitted = self.num_heard = 0
        self.changed = asyncio.Condition()

    async def put(self, job: str) -> int:
        async with self.changed:
            self.number += 1
            self.losses = self.num_emitted = self.num_heard = 0
            self.job, self.is_over, self.is_stopped = job, False, False
            self.out.clear()
            if self.fault is not None:
                self.out.append({"fault": self.fault})
            self.changed.notify_all()
        return self.number

    async def refuse(self, fault: str) -> None:
        """From now on no job is given: a machine of the group is not fit for it."""
        async with self.changed:
            self.fault = fault
            self.out.append({"fault": fault})
            self.changed.notify_all()

    async def get(self, done: int, rank: int, worker: Any) -> tuple[int, str | None]:
        """The job after number `done`, or, in a group made anew, the unfinished one. None: go home."""
        self.workers[rank] = worker
        if rank == 0 and done == 0 and self.given == self.number and not self.is_over:  # its workers were lost
            self.losses += 1
            if self.is_stopped:
                await self.end(self.number, json.dumps(STOPPED))
            elif self.losses > RESTARTS:
                await self.end(
                    self.number, json.dumps(failed(f"its workers were lost {self.losses} times", self.losses))
                )
        async with self.changed:
            await self.changed.wait_for(
                lambda: self.is_closed or (self.number > done and not self.is_over and self.fault is None)
            )
            if rank == 0:
                self.given = self.number
                if not self.is_closed:
                    self.out.append({"begun": str(self.number)})
                    self.changed.notify_all()
        return self.number, None if self.is_closed else self.job

    async def emit(self, number: int, records: str) -> bool:
        """Hands on records, and waits until the slot has heard what shall become of the trial: whether it shall stop."""
        async with self.changed:
            if number != self.number:
                return True
            self.num_emitted += 1
            mine = self.num_emitted
            self.out.append({"records": records})
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self.num_heard >= mine or self.is_stopped or number != self.number)
        return self.is_stopped

    async def end(self, number: int, end: str) -> None:
        """A late rank cannot end the next job."""
        async with self.changed:
            if number == self.number and not self.is_over:
                self.is_over = True
                self.out.append({"end": end})
                self.changed.notify_all()

    async def take(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None after a while. Whoever asks has done with the one before."""
        async with self.changed:
            self.num_heard = self.num_emitted - sum("records" in message for message in self.out)
            self.changed.notify_all()
            try:
                await asyncio.wait_for(self.changed.wait_for(lambda: self.out), seconds)
            except TimeoutError:
                return None
            return self.out.popleft()

    async def stop(self) -> None:
        async with self.changed:
            self.is_stopped = True
            self.changed.notify_all()

    async def close(self) -> None:
        async with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    async def all_workers(self) -> list[Any]:
        return list(self.workers.values())
