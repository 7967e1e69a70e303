"""A group of workers that is kept over trials: several processes run one trial at a time. The only importer of ray.train.

One `TorchTrainer.fit()` lasts as long as the group. Its workers pull jobs from a mailbox and report to it, so a trial
after the first starts at once, while a trainer per trial spends many seconds on processes and imports. What fails in a
trial is that trial's row; afterwards Ray Train makes the processes anew, since a rank may hang in a collective.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig, TorchTrainer

from trainables.attempt import Job, run
from trainables.loop import Record

HANG_SECONDS = 900.0  # no word from a group for so long: a rank hangs
RENEW_AFTER = 200  # trials: then the processes are made anew
RESTARTS = 3  # of one job whose workers were lost


def _failed(reason: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason, "attempts": RESTARTS + 1, "node": None}


class Stopped(BaseException):
    """The scheduler ended this trial; no error, and nothing that handles errors may swallow it."""


class _Mailbox:
    """Between the slot, which has the jobs, and the workers, which run them. An actor without CPUs of its own."""

    def __init__(self) -> None:
        self.number = 0  # of the current job
        self.job: str | None = None
        self.is_over = True
        self.is_stopped = False
        self.is_closed = False
        self.restarts = 0  # of the current job
        self.workers: dict[int, Any] = {}
        self.out: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.changed = asyncio.Condition()

    async def put(self, job: str) -> int:
        async with self.changed:
            self.number += 1
            self.restarts = 0
            self.job, self.is_over, self.is_stopped, self.out = job, False, False, asyncio.Queue()
            self.changed.notify_all()
        return self.number

    async def get(self, done: int, rank: int, worker: Any) -> tuple[int, str | None]:
        """The job after number `done`, or, in a group made anew, the unfinished one. None: go home."""
        self.workers[rank] = worker
        if rank == 0 and done == 0 and self.number and not self.is_over:  # its workers were lost
            self.restarts += 1
            if self.restarts > RESTARTS:
                reason = f"its workers were lost {self.restarts} times"
                await self.end(self.number, json.dumps(_failed(reason)))
        async with self.changed:
            await self.changed.wait_for(lambda: self.is_closed or (self.number > done and not self.is_over))
        return self.number, None if self.is_closed else self.job

    async def emit(self, number: int, records: str) -> bool:
        """Hands on records; says whether the trial shall stop."""
        if number == self.number:
            await self.out.put({"records": records})
        return self.is_stopped

    async def end(self, number: int, end: str | None) -> None:
        """A late rank cannot end the next job."""
        if number == self.number and not self.is_over:
            self.is_over = True
            await self.out.put({"end": end})

    async def take(self, seconds: float) -> dict[str, Any] | None:
        try:
            return await asyncio.wait_for(self.out.get(), seconds)
        except TimeoutError:
            return None

    async def stop(self) -> None:
        self.is_stopped = True

    async def close(self) -> None:
        async with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    async def all_workers(self) -> list[Any]:
        return list(self.workers.values())


# ------------------------------------------------------------------------------------------------------ in the workers


@dataclass
class _GroupSession:
    """What a trial on several ranks speaks to."""

    box: Any
    number: int
    rank: int
    world: int

    def report(self, records: list[Record]) -> None:
        is_stopped = False
        if self.rank == 0:
            is_stopped = ray.get(self.box.emit.remote(self.number, json.dumps(records)))
        if self.agree(is_stopped):
            raise Stopped

    def agree(self, value: Any) -> Any:
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, device=_device())
        return values[0]

    def total(self, values: list[float]) -> list[float]:
        if self.world == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _serve(config: dict[str, Any]) -> None:
    """A worker's life: job after job. A failed one ends the process, on every rank: peers may hang in a collective."""
    context = ray.train.get_context()
    rank, world, box = context.get_world_rank(), context.get_world_size(), config["box"]
    me = ray.get_runtime_context().current_actor
    done = 0
    while True:
        number, text = ray.get(box.get.remote(done, rank, me))
        if text is None:
            return
        try:
            end = run(Job(**json.loads(text)), _GroupSession(box, number, rank, world))
        except Stopped:
            end = {"status": "stopped", "reason": "early stopping", "attempts": 1, "node": None}
        if end["status"] == "failed":
            ray.get(box.end.remote(number, json.dumps(end)))
            raise RuntimeError(f"trial failed: {end['reason']}; the group is made anew")
        if world > 1:
            dist.barrier()
        if rank == 0:
            ray.get(box.end.remote(number, json.dumps(end)))
        if world > 1:
            dist.barrier()  # nobody asks for the next job before this one is closed
        done = number


# --------------------------------------------------------------------------------------------------------- in the slot


@dataclass
class Group:
    """Workers of one slot. `run` yields a trial's messages: records, and at last its end."""

    workers: int
    cpus: float
    gpus: float
    folder: str  # where Ray Train keeps its own state
    served: int = 0
    _box: Any = None
    _thread: threading.Thread | None = None
    _problem: list[str] = field(default_factory=list)

    def start(self) -> None:
        self._box = ray.remote(num_cpus=0)(_Mailbox).remote()
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        resources = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        trainer = TorchTrainer(
            _serve,
            train_loop_config={"box": self._box},
            torch_config=TorchConfig(backend="nccl" if self.gpus else "gloo", timeout_s=int(HANG_SECONDS)),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.workers, use_gpu=bool(self.gpus), resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                storage_path=self.folder,
                name=f"group-{os.getpid()}-{time.time_ns()}",
                failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=2),
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:
            self._problem.append(f"{type(error).__name__}: {error}".splitlines()[0])

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def run(self, job: Job, *, hang_seconds: float = HANG_SECONDS) -> Generator[dict[str, Any], None, None]:
        """Runs a trial. Leaving the iteration early stops the trial on all ranks before the next one can begin."""
        ray.get(self._box.put.remote(json.dumps(asdict(job))))
        heard, kills, is_over = time.monotonic(), 0, False
        try:
            while not is_over:
                message = ray.get(self._box.take.remote(1.0))
                if message is not None:
                    heard = time.monotonic()
                    is_over = "end" in message
                    yield message
                elif not self.is_alive:
                    is_over = True
                    yield {"end": json.dumps(_failed(f"its workers could not be started: {''.join(self._problem)}"))}
                elif time.monotonic() - heard > hang_seconds:
                    kills += 1
                    if kills > RESTARTS:
                        is_over = True
                        yield {"end": json.dumps(_failed(f"no word for {hang_seconds:g} s, {kills} times"))}
                        return
                    heard = time.monotonic()
                    self._kill()
        finally:
            self.served += 1
            if not is_over:
                self._stop(hang_seconds)

    def _kill(self) -> None:
        """Ends the processes; Ray Train makes them anew, and they take up the unfinished job from its checkpoint."""
        for worker in ray.get(self._box.all_workers.remote()):
            ray.kill(worker)

    def _stop(self, seconds: float) -> None:
        """The workers see the flag at their next report, and leave together."""
        ray.get(self._box.stop.remote())
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            message = ray.get(self._box.take.remote(1.0))
            if message is not None and "end" in message:
                return
        self._kill()

    def close(self) -> None:
        """Lets the workers go home, and waits for them."""
        if self._thread is not None:
            ray.get(self._box.close.remote())
            self._thread.join(timedelta(seconds=30).total_seconds())
            ray.kill(self._box)


_GROUP: Group | None = None  # lives as long as the process of the slot


def close() -> None:
    """Lets the slot's group go, if there is one."""
    global _GROUP
    if _GROUP is not None:
        _GROUP.close()
        _GROUP = None


def group(workers: int, cpus: float, gpus: float, folder: str) -> Group:
    """The slot's group, made at the first trial and again after a while."""
    global _GROUP
    if _GROUP is not None and (not _GROUP.is_alive or _GROUP.served >= RENEW_AFTER):
        close()
    if _GROUP is None:
        _GROUP = Group(workers, cpus, gpus, folder)
        _GROUP.start()
    return _GROUP
