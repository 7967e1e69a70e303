"""The Ray node of a machine that is about to be terminated: drains the node, and tells its trials to leave."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ray.util import get_node_ip_address

from orchestrator.cluster.ray_internals import (
    RANK,
    SLOT,
    DrainNodeReason,
    GcsClient,
    GcsClientOptions,
    GlobalState,
    canonicalize_bootstrap_address_or_die,
)

LATE_SECONDS = 30.0  # spent trying where the time is over by the local clock


@dataclass
class RayNode:
    """One node, through the cluster's head. Joins as no driver: a driver's job would start processes here."""

    address: str
    node: str
    state: GlobalState = field(default_factory=GlobalState)

    @classmethod
    def join(cls, address: str, node: str | None) -> RayNode:
        """Raises LookupError unless exactly one living node has this machine's address."""
        address = canonicalize_bootstrap_address_or_die(address) if address == "auto" else address
        joined = cls(address, node or "")
        options = GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        joined.state._initialize_global_state(options)
        if node is None:
            here = get_node_ip_address(address)
            living = [row for row in joined.state.node_table() if row["Alive"]]
            ids = [row["NodeID"] for row in living if row["NodeManagerAddress"] == here]
            if len(ids) != 1:
                raise LookupError(f"{len(ids)} nodes of the Ray at {address} have the address {here}")
            joined.node = ids[0]
        return joined

    def drain(self, taken: float) -> None:
        """Lets Ray place nothing new here; running work continues, and the node ends once all work has left."""
        accepted, why = GcsClient(address=self.address).drain_node(
            self.node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot notice", int(1000 * taken)
        )
        if not accepted:
            raise LookupError(f"Ray would not drain node {self.node}: {why}")

    def is_alive(self) -> bool:
        return any(row["NodeID"] == self.node and row["Alive"] for row in self.state.node_table())

    def processes(self) -> dict[str, set[int]]:
        """Returns kind of actor -> process ids of trials on this node."""
        pids: dict[str, set[int]] = {SLOT: set(), RANK: set()}
        for actor in self.state.actor_table(None, actor_state_name="ALIVE").values():
            kind = actor["ActorClassName"].rpartition(".")[2]
            if actor["Address"]["NodeID"] == self.node and kind in pids:
                pids[kind].add(actor["Pid"])
        return pids


def leave(address: str, node: str | None, taken: float) -> int:
    """Drains the node and signals its trials, those that are just starting included, until the node has ended or the
    machine is terminated. Returns 1 where Ray was not reached."""
    moment = datetime.fromtimestamp(taken, UTC).isoformat(timespec="seconds")
    print(f"spot notice: this machine is terminated at {moment}", flush=True)
    if taken <= time.time():  # a clock that is ahead, or a notice read late: the machine still runs
        taken = time.time() + LATE_SECONDS
    ray: RayNode | None = None
    asked: set[int] = set()
    while time.time() < taken:
        try:
            if ray is None:
                joined = RayNode.join(address, node)
                joined.drain(taken)
                ray = joined
                print(f"node {ray.node} is drained", flush=True)
            asked |= tell(ray.processes(), asked)
            if not ray.is_alive():
                print(f"node {ray.node} has ended; {len(asked)} processes of trials were asked to stop", flush=True)
                return 0
        except Exception as error:  # Ray's errors have no common base
            print(f"{(str(error) or repr(error)).splitlines()[0]}; trying again", file=sys.stderr, flush=True)
        time.sleep(0.5)
    if ray is None:
        print("deadline passed; Ray unreachable, trials not notified", file=sys.stderr, flush=True)
        return 1
    print(f"deadline passed; {len(asked)} processes of trials were asked to stop", flush=True)
    return 0


def tell(processes: Mapping[str, set[int]], asked: set[int]) -> set[int]:
    """Sends SIGTERM to processes not yet asked; returns them. Ranks come first: a slot without a trial of its own ends at
    once, and with it its group."""
    now = processes[RANK] - asked or (set() if processes[RANK] else processes[SLOT] - asked)
    for pid in now:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return now
