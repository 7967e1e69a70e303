"""The process group of the workers of one trial. Its store listens at one address and nowhere else.

torch's own stores (`env://`, `tcp://`) listen at every address of the machine, whatever MASTER_ADDR says, and accept any
sender. Here rank 0 opens the socket itself, so that no other process can take the port in between.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist

_sockets: dict[int, socket.socket] = {}  # by port: opened, and not yet handed to a store


def listen(host: str) -> int:
    """Opens a free port at this address, for the store of rank 0 in this process."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.create_server((host, 0), family=family)
    port: int = opened.getsockname()[1]
    _sockets[port] = opened
    return port


def join(rank: int, world: int, host: str, port: int, *, backend: str, timeout: timedelta) -> None:
    """Makes the default process group; returns when all ranks are there. Rank 0 is where `listen` gave the port."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        world,
        is_master=rank == 0,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=_sockets.pop(port).detach() if rank == 0 else None,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
