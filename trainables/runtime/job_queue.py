"""The queue between a slot, which has the jobs, and its workers, which run them. An actor; imports nothing heavy."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from trainables.runtime.outcome import STOPPED_EARLY, lost

RESTARTS = 3  # of one job whose workers were lost


class Mailbox:
    """Hands a slot's jobs to its workers and their messages back. An actor without CPUs of its own."""

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
        self.num_emitted = self.num_reported = 0
        self.changed = asyncio.Condition()

    async def put(self, job: str) -> int:
        async with self.changed:
            self.number += 1
            self.losses = self.num_emitted = self.num_reported = 0
            self.job, self.is_over, self.is_stopped = job, False, False
            self.out.clear()
            if self.fault is not None:
                self.out.append({"fault": self.fault})
            self.changed.notify_all()
        return self.number

    async def refuse(self, fault: str) -> None:
        """Gives no job from now on: a machine of the group is unfit."""
        self.fault = fault
        await self._send({"fault": fault})

    async def get(self, done: int, rank: int, worker: Any) -> tuple[int, str | None]:
        """Returns the job after number `done`, or, in a group that was restarted, the unfinished one. None: end the
        process."""
        self.workers[rank] = worker
        if rank == 0 and done == 0 and self.given == self.number and not self.is_over:  # the workers were lost
            self.losses += 1
            if self.is_stopped:
                await self.end(self.number, STOPPED_EARLY.to_json())
            elif self.losses > RESTARTS:
                await self.end(self.number, lost(f"its workers were lost {self.losses} times", self.losses).to_json())
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
        """Passes records on and waits until the slot has reported them. Returns whether the trial is to stop."""
        async with self.changed:
            if number != self.number:
                return True
            self.num_emitted += 1
            mine = self.num_emitted
            self.out.append({"records": records})
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self.num_reported >= mine or self.is_stopped or number != self.number)
        return self.is_stopped

    async def end(self, number: int, end: str) -> None:
        """Ends the job of that number; a late rank cannot end the next job."""
        if number == self.number and not self.is_over:
            self.is_over = True
            await self._send({"end": end})

    async def take(self, seconds: float) -> dict[str, Any] | None:
        """Returns the next message, or None after a while. The caller has dealt with the message before."""
        async with self.changed:
            self.num_reported = self.num_emitted - sum("records" in message for message in self.out)
            self.changed.notify_all()
            try:
                await asyncio.wait_for(self.changed.wait_for(lambda: self.out), seconds)
            except TimeoutError:
                return None
            return self.out.popleft()

    async def stop(self) -> None:
        self.is_stopped = True
        await self._send()

    async def close(self) -> None:
        self.is_closed = True
        await self._send()

    async def _send(self, *messages: dict[str, Any]) -> None:
        async with self.changed:
            self.out.extend(messages)
            self.changed.notify_all()

    async def all_workers(self) -> list[Any]:
        return list(self.workers.values())
