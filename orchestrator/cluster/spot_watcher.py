"""Watches a spot machine: on its termination notice, drains its Ray node and tells its trials to checkpoint and leave.

    python -m orchestrator.cluster.spot_watcher

Runs beside Ray on every worker of cluster.yaml and asks EC2's metadata service every few seconds whether this machine is
about to be terminated. On a notice, Ray places nothing new here, and the processes of trials get SIGTERM: each writes its
checkpoint at once and its trial resumes elsewhere (trainables/training/stop_signals.py). Ends at once on other machines.

EC2's rebalance recommendations are ignored: they name no time, often nothing follows, and a checkpoint takes far less than
the two minutes of the notice.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from orchestrator.cluster.machine import start

ENDPOINT = "http://169.254.169.254"  # or AWS_EC2_METADATA_SERVICE_ENDPOINT, as in AWS' own tools
ANSWER_SECONDS = 2.0  # the service is on the machine itself
TRIES = 3  # at the start, before the service counts as absent
NOTICE_SECONDS = 120.0  # promised by AWS

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would answer for its own machine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster.spot_watcher", description="Leaves a spot machine before its termination."
    )
    parser.add_argument("--address", default="auto", metavar="HOST:PORT", help="of Ray (default: the local Ray)")
    parser.add_argument("--node", metavar="ID", help="of this machine in Ray (default: the node with its address)")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between requests (default 5)")
    parser.add_argument("--lock", type=Path, default=Path.home() / "preemption.lock", metavar="FILE", help="held while running")  # fmt: skip
    given = parser.parse_args(argv)
    with given.lock.open("a") as lock:
        try:  # a second `ray up` runs this command again, and the first watcher keeps running
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("this machine is watched already; nothing was started")
            return 0
        endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ENDPOINT
        if (reason := why_not(endpoint, given.every)) is not None:
            print(f"{reason}: no termination notice can come")
            return 0
        print("a spot machine: waiting for the termination notice", flush=True)
        from orchestrator.cluster.spot_node import leave  # Ray is needed only here

        return leave(given.address, given.node, wait(endpoint, given.every))


# ------------------------------------------------------------------------------------------------------ the notice


def read(endpoint: str, path: str) -> str | None:
    """Reads an entry of the metadata service; None where there is none. Raises OSError where the service does not answer."""
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
    """Returns why this machine can get no notice; None where it can."""
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
            return None if kind == "spot" else f"no spot machine ({kind or 'unknown kind'})"
    raise AssertionError


def wait(endpoint: str, every: float) -> float:
    """Waits for the notice; returns the time of termination in seconds since 1970."""
    is_silent = False
    while True:
        try:
            notice = read(endpoint, "spot/instance-action")
            is_silent = False
        except OSError as error:
            notice = None
            if not is_silent:
                print(f"{endpoint} does not answer ({error}); trying again", file=sys.stderr, flush=True)
            is_silent = True
        if notice is not None:
            return taken_at(notice, time.time())
        time.sleep(every)


def taken_at(notice: str, now: float) -> float:
    """Parses `{"action": "terminate", "time": "2026-11-26T08:22:00Z"}`; any other text counts as a notice from now."""
    try:
        moment = datetime.fromisoformat(json.loads(notice)["time"])
    except (ValueError, KeyError, TypeError):
        return now + NOTICE_SECONDS
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


if __name__ == "__main__":
    start(main)
