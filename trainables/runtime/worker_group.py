"""A group of workers that is kept over trials: several processes run one trial at a time. The only importer of ray.train.

One `TorchTrainer.fit()` lasts as long as the group. Its workers take jobs from a mailbox and report to it, so a trial
after the first starts at once, while a trainer per trial spends many seconds on processes and imports. A failure is a
trial's outcome; afterwards Ray Train restarts the processes, since a rank may hang in a collective.

Of Ray Train's interface for developers this uses `Backend.on_start` and `WorkerGroup.execute`; nothing private.
"""

from __future__ import annotations

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

from trainables.config.session import Record
from trainables.runtime import process_group
from trainables.runtime.job_queue import Mailbox
from trainables.runtime.outcome import STOPPED_EARLY, Status, lost
from trainables.runtime.preflight import Expected, fault
from trainables.runtime.trial_attempt import Job, run
from trainables.training.state import Stopped
from trainables.training.stop_signals import StopReason, listen

RENEW_AFTER = 200  # trials: then the processes are restarted
STOP_SECONDS = 60.0  # that ranks have to leave a trial


# ------------------------------------------------------------------------------------------------------ in the workers


@dataclass
class GroupSession:
    """The session of a trial on several ranks."""

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

    def gather(self, value: Any) -> list[Any]:
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _serve(config: dict[str, Any]) -> None:
    """Runs job after job in a worker. A failed job ends the process, on every rank: peers may hang in a collective."""
    context = ray.train.get_context()
    rank, world, box = context.get_world_rank(), context.get_world_size(), config["box"]
    me = ray.get_runtime_context().current_actor
    done = 0
    while True:
        number, text = ray.get(box.get.remote(done, rank, me))
        if text is None:
            return
        try:
            outcome = run(Job(**json.loads(text)), GroupSession(box, number, rank, world))
        except Stopped:
            outcome = STOPPED_EARLY
        if outcome.is_suspended and outcome.reason in (StopReason.TERMINATED, StopReason.PEER_LOST):
            raise RuntimeError(f"{outcome.reason}; the group is restarted, and resumes the trial")
        is_fault = outcome.status == Status.FAILED or (outcome.is_suspended and outcome.reason == StopReason.STORAGE)
        if is_fault:
            ray.get(box.end.remote(number, outcome.to_json()))
            raise RuntimeError(f"trial {outcome.status}: {outcome.reason}; the group is restarted")
        if world > 1:
            dist.barrier()
        if rank == 0:
            ray.get(box.end.remote(number, outcome.to_json()))
        if world > 1:
            dist.barrier()  # no rank asks for the next job before this one is closed
        done = number


def _open_store() -> tuple[str, int]:
    host = ray.util.get_node_ip_address()  # loopback, where the sweep has started Ray
    return host, process_group.listen(host)


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's backend with a store on one address, and with SIGTERM handled: a trial's thread cannot set handlers."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        faults = [fault for fault in worker_group.execute(_fault, backend_config.expected) if fault is not None]
        if faults:  # and no process group, which might never form
            ray.get(backend_config.box.refuse.remote("; ".join(sorted(set(faults)))))
            return
        host, port = worker_group.execute_single(0, _open_store)  # Ray's own would listen at every address
        world, limit = len(worker_group), timedelta(seconds=backend_config.timeout_s)
        options = {"backend": backend_config.backend, "timeout": limit}
        ray.get(
            [
                worker_group.execute_single_async(i, process_group.join, i, world, host, port, **options)
                for i in range(world)
            ]
        )
        worker_group.execute(listen)


def _fault(expected: Expected) -> str | None:
    return fault(expected, str(ray.train.torch.get_device()))


@dataclass
class _Torch(TorchConfig):  # type: ignore[misc]
    expected: Expected | None = None
    box: Any = None

    @property
    def backend_cls(self) -> type:
        return _Backend


# --------------------------------------------------------------------------------------------------------- in the slot


@dataclass
class Group:
    """The workers of one slot. `run` yields a trial's messages: begun, then records, at last its end; or a fault."""

    workers: int
    cpus: float
    gpus: float
    folder: str  # where Ray Train keeps its own state
    expected: Expected
    served: int = 0
    _box: Any = None
    _thread: threading.Thread | None = None
    _problem: list[str] = field(default_factory=list)

    def start(self) -> None:
        self._box = ray.remote(num_cpus=0)(Mailbox).remote()
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        resources = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        trainer = TorchTrainer(
            _serve,
            train_loop_config={"box": self._box},
            torch_config=_Torch(
                backend="nccl" if self.gpus == 1 else "gloo",  # NCCL refuses ranks that share a GPU
                expected=self.expected,
                box=self._box,
            ),
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

    def run(self, job: Job) -> Generator[dict[str, Any], None, None]:
        """Runs a trial. Leaving the iteration early stops the trial on all ranks before the next one can begin."""
        ray.get(self._box.put.remote(json.dumps(asdict(job))))
        is_over = False
        try:
            while not is_over:
                message = ray.get(self._box.take.remote(1.0))
                if message is None and not self.is_alive:
                    why = f"its workers could not be started: {''.join(self._problem)}"
                    message = {"end": lost(why, 0).to_json()}
                if message is not None:
                    is_over = "end" in message or "fault" in message
                    yield message
        finally:
            self.served += 1
            if not is_over:
                self._stop()

    def _stop(self) -> None:
        """Lets the ranks, which wait in `report`, leave the trial together; kills those that do not."""
        ray.get(self._box.stop.remote())
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            message = ray.get(self._box.take.remote(1.0))
            if message is not None and "end" in message:
                return
        for worker in ray.get(self._box.all_workers.remote()):
            ray.kill(worker)

    def close(self) -> None:
        """Ends the workers, and waits for them."""
        if self._thread is not None:
            ray.get(self._box.close.remote())
            self._thread.join(timedelta(seconds=30).total_seconds())
            ray.kill(self._box)


_GROUP: Group | None = None  # lives as long as the process of the slot


def close() -> None:
    """Closes the slot's group, if there is one."""
    global _GROUP
    if _GROUP is not None:
        _GROUP.close()
        _GROUP = None


def group(workers: int, cpus: float, gpus: float, *, folder: str, expected: Expected) -> Group:
    """Returns the slot's group, made at the first trial and again after `RENEW_AFTER` trials."""
    global _GROUP
    if _GROUP is not None and (not _GROUP.is_alive or _GROUP.served >= RENEW_AFTER):
        close()
    if _GROUP is None:
        _GROUP = Group(workers, cpus, gpus, folder, expected)
        _GROUP.start()
    return _GROUP
