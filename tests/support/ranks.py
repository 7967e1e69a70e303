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
from trainables.runtime.worker_group import GroupSession
from trainables.storage.files import Storage
from trainables.training import gradients, loop
from trainables.training.state import Environment, Suspended
from trainables.training.stop_signals import Notice, _terminated


class _Silent(GroupSession):
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
    plain = gradients.run_micro_batch

    def hungry(phase: Any, active: Any, parts: Any, *more: Any, **low: int) -> Any:
        if rank == 1 and len(parts["main"].ids_BT) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(phase, active, parts, *more, **low)

    begin = loop.begin

    def fitted(run: Any, instance: Any) -> Any:
        phase = begin(run, instance)
        gradients.fit_micro_batch(phase)
        run.environment.storage.write(f"micro-{rank}-{instance}", str(phase.micro).encode())
        return phase

    gradients.run_micro_batch, loop.begin = hungry, fitted


def run_on_ranks(lab: Lab, spec: TrialSpec, world: int, micro: int | None = None, scene: str = "") -> Ran:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world, port, str(lab.root), spec.model_dump_json(), dict(lab.fingerprints), micro, scene)
    mp.start_processes(_rank, arguments, nprocs=world, start_method="spawn")
    return Ran(lab, spec, lab.records(), {})
