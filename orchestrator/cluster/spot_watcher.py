"""A spot machine's last two minutes: its notice is read, its node drained, its trials told to leave at their checkpoints.

    python -m orchestrator.cluster.spot_watcher

Runs beside Ray on every worker of cluster.yaml, and asks EC2's metadata service every few seconds whether this machine
is to be taken away. Then Ray places nothing new here, and the processes of trials get SIGTERM: each writes its
checkpoint at once and its trial goes on elsewhere (trainables/notice.py). On a machine that is no spot machine it ends.

The other signal, a rebalance recommendation, is not heeded: it gives no time, often nothing comes of it, and a
checkpoint is written in far less than the two minutes; to leave for it would cost a machine that mostly stays.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._private.state import GlobalState
from ray._raylet import GcsClient, GcsClientOptions  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util import get_node_ip_address

ENDPOINT = "http://169.254.169.254"  # or what AWS_EC2_METADATA_SERVICE_ENDPOINT says, as in AWS' own tools
ANSWER_SECONDS = 2.0  # the service is on the machine itself
TRIES = 3  # at the start, before it is said that there is no such service
NOTICE_SECONDS = 120.0  # what AWS promises
LATE_SECONDS = 30.0  # tried for, where the time is over by this machine's clock
SLOT, RANK = "ResourceTrainable", "RayTrainWorker"  # how Ray calls the actors of slots, and of the ranks of groups

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would tell of its own machine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.cluster.spot_watcher", description="Leaves a spot machine in time.")  # fmt: skip
    parser.add_argument("--address", default="auto", metavar="HOST:PORT", help="of Ray (default: the one that runs here)")  # fmt: skip
    parser.add_argument("--node", metavar="ID", help="of this machine in Ray (default: the one with its address)")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between looks (default 5)")
    parser.add_argument("--lock", type=Path, default=Path.home() / "preemption.lock", metavar="FILE", help="held while it runs")  # fmt: skip
    arguments = parser.parse_args(argv)
    with arguments.lock.open("a") as lock:
        try:  # `ray up` gives its commands again, and the first one goes on, whichever Ray runs here then
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("this machine is watched already; nothing was started")
            return 0
        endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ENDPOINT
        if (why := why_not(endpoint, arguments.every)) is not None:
            print(f"{why}: there is no notice to wait for")
            return 0
        print("a spot machine: waiting for the notice that it is taken away", flush=True)
        taken = wait(endpoint, arguments.every)
        return leave(arguments.address, arguments.node, taken)


# ------------------------------------------------------------------------------------------------------ what EC2 says


def read(endpoint: str, path: str) -> str | None:
    """What the metadata service says; None where it has no such thing. Raises OSError where it does not answer."""
    try:
        token = _ask(endpoint, "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
        return _ask(endpoint, f"meta-data/{path}", {"X-aws-ec2-metadata-token": token})
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    except HTTPException as error:
        raise OSError(f"no HTTP: {error!r}") from error


def _ask(endpoint: str, path: str, headers: Mapping[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(f"{endpoint.rstrip('/')}/latest/{path}", headers=dict(headers), method=method)
    with _direct.open(request, timeout=ANSWER_SECONDS) as answer:
        return str(answer.read(4096).decode(errors="replace")).strip()


def why_not(endpoint: str, every: float) -> str | None:
    """Why no notice can come to this machine; None where it can."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return "AWS_EC2_METADATA_DISABLED is set"
    for left in reversed(range(TRIES)):
        try:
            kind = read(endpoint, "instance-life-cycle")
        except OSError as error:
            if not left:
                return f"no metadata service answers at {endpoint} ({error})"
            time.sleep(every)
        else:
            return None if kind == "spot" else f"no spot machine ({kind or 'its kind is not told'})"
    raise AssertionError


def wait(endpoint: str, every: float) -> float:
    """Returns once there is a notice: when the machine is taken away, in seconds since 1970."""
    is_silent = False
    while True:
        try:
            notice = read(endpoint, "spot/instance-action")
            is_silent = False
        except OSError as error:
            notice = None
            if not is_silent:
                print(f"{endpoint} does not answer ({error}); it is asked again", file=sys.stderr, flush=True)
            is_silent = True
        if notice is not None:
            return taken_at(notice, time.time())
        time.sleep(every)


def taken_at(notice: str, now: float) -> float:
    """From `{"action": "terminate", "time": "2026-11-26T08:22:00Z"}`. A notice that cannot be read is one, too."""
    try:
        at = datetime.fromisoformat(json.loads(notice)["time"])
    except (ValueError, KeyError, TypeError):
        return now + NOTICE_SECONDS
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


# ------------------------------------------------------------------------------------------------------ what Ray is told


@dataclass
class _Ray:
    """What is asked of the cluster's head about one node. No driver: a job of its own would start processes here."""

    address: str
    node: str
    state: GlobalState = field(default_factory=GlobalState)

    @classmethod
    def join(cls, address: str, node: str | None) -> _Ray:
        """Raises LookupError where none or several of Ray's nodes have this machine's address."""
        address = canonicalize_bootstrap_address_or_die(address) if address == "auto" else address
        found = cls(address, node or "")
        found.state._initialize_global_state(
            GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        if node is None:
            here = get_node_ip_address(address)
            ids = [row["NodeID"] for row in found.state.node_table() if row["Alive"] and row["NodeManagerAddress"] == here]  # fmt: skip
            if len(ids) != 1:
                raise LookupError(f"{len(ids)} nodes of the Ray at {address} have the address {here}")
            found.node = ids[0]
        return found

    def drain(self, taken: float) -> None:
        """From now on nothing is placed here; what runs goes on, and once it has left, Ray's node ends by itself."""
        accepted, why = GcsClient(address=self.address).drain_node(
            self.node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot notice", int(1000 * taken)
        )
        if not accepted:
            raise LookupError(f"Ray would not drain node {self.node}: {why}")

    def is_alive(self) -> bool:
        return any(row["NodeID"] == self.node and row["Alive"] for row in self.state.node_table())

    def processes(self) -> dict[str, set[int]]:
        """Of trials, on this node: the kind of actor -> process ids."""
        found: dict[str, set[int]] = {SLOT: set(), RANK: set()}
        for actor in self.state.actor_table(None, actor_state_name="ALIVE").values():
            kind = actor["ActorClassName"].rpartition(".")[2]
            if actor["Address"]["NodeID"] == self.node and kind in found:
                found[kind].add(actor["Pid"])
        return found


def leave(address: str, node: str | None, taken: float) -> int:
    """Drains the node and tells its trials, also those that were just being started, until Ray's node has ended or time
    is over; what a group leaves behind can keep the node until then. Returns 1 where Ray was not reached."""
    at = datetime.fromtimestamp(taken, UTC).isoformat(timespec="seconds")
    print(f"spot notice: this machine is taken away at {at}", flush=True)
    if taken <= time.time():  # a clock that is ahead, or a notice that was read late: the machine is still there
        taken = time.time() + LATE_SECONDS
    ray: _Ray | None = None
    told: set[int] = set()
    while time.time() < taken:
        try:
            if ray is None:
                joined = _Ray.join(address, node)
                joined.drain(taken)
                ray = joined
                print(f"node {ray.node} is drained", flush=True)
            told |= tell(ray.processes(), told)
            if not ray.is_alive():
                print(f"node {ray.node} has ended; {len(told)} processes of trials were told to leave", flush=True)
                return 0
        except Exception as error:  # what Ray raises has no common kind
            print(f"{(str(error) or repr(error)).splitlines()[0]}; it is tried again", file=sys.stderr, flush=True)
        time.sleep(0.5)
    if ray is None:
        print("the time is over, and Ray was not reached: nobody was told to leave", file=sys.stderr, flush=True)
        return 1
    print(f"the time is over; {len(told)} processes of trials were told to leave", flush=True)
    return 0


def tell(processes: Mapping[str, set[int]], told: set[int]) -> set[int]:
    """SIGTERM to those not told yet, and whom. Ranks first: a slot without a trial of its own goes at once, and with it
    its group."""
    now = processes[RANK] - told or (set() if processes[RANK] else processes[SLOT] - told)
    for pid in now:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return now


if __name__ == "__main__":
    sys.exit(main())
