"""Runs a trial on several processes of this machine that speak gloo."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.trials import Lab, Ran
from trainables.config.trial import TrialSpec
from trainables.runtime.trial import run_trial
from trainables.runtime.worker_group import _GroupSession
from trainables.storage.files import Storage
from trainables.training import loop
from trainables.training.state import Environment, Suspended
from trainables.training.stop_signals import Notice, _terminated


class _Silent(_GroupSession):
    """Ranks that agree and add up as those of a group do, with nobody who listens."""

    def report(self, records: list[dict[str, Any]]) -> None:
        self.agree(len(records))


def _rank(
    rank: int, world: int, port: int, root: str, spec: str, fingerprints: dict[str, str], micro: int | None, scene: str
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    storage = Storage(root)
    notice = Notice(storage if rank == 0 else None, "leave")  # as in an attempt: only rank 0 looks at files
    if scene == "sigterm of rank 1" and rank == 1:
        _terminated.set()
    if scene == "little memory":
        _have_little_memory(rank)
    at = Environment(storage=storage, folder="study/trials/t/attempt-1", trial="t", micro_batch=micro, notice=notice)
    try:
        run_trial(TrialSpec.model_validate_json(spec), fingerprints, at, _Silent(None, 1, rank, world))
    except Suspended as left:
        storage.write(f"left-{rank}", left.asked.encode())
    dist.destroy_process_group()


def _have_little_memory(rank: int) -> None:
    """Rank 1 has room for two sequences; what a device would do to find out is done on this machine."""
    plain = loop._run

    def hungry(phase: Any, live: Any, parts: Any, *more: Any) -> Any:
        if rank == 1 and len(parts["main"].ids_BT) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(phase, live, parts, *more)

    begin = loop.begin

    def fitted(run: Any, instance: Any) -> Any:
        phase = begin(run, instance)
        loop._fit_micro(phase)
        run.at.storage.write(f"micro-{rank}-{instance}", str(phase.micro).encode())
        return phase

    loop._run, loop.begin = hungry, fitted


def run_on_ranks(lab: Lab, spec: TrialSpec, world: int, micro: int | None = None, scene: str = "") -> Ran:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world, port, str(lab.root), spec.model_dump_json(), dict(lab.fingerprints), micro, scene)
    mp.start_processes(_rank, arguments, nprocs=world, start_method="spawn")
    return Ran(lab, spec, lab.records(), {})
