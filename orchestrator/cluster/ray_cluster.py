"""Ray: started on this machine, where nobody else reaches it, or joined; and how many slots there are.

A Ray runs code for whoever reaches its ports. One that we start listens on loopback only and asks for a token that
lives as long as the sweep. docs/security.md lists what listens; a test compares the list with the machine.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Slot

CHATTER = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own files are the record
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # nobody reads Tune's snapshots
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the sweep
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # only searched points have an objective
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a slot that is lost is told in a line, not in a traceback
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "90",  # ranks that are stopped leave together; after 2 s their slot would be lost
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path of a study starts where its command was given
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # with the default of 2 s a lost worker is noticed late
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MALLOC_ARENA_MAX": "1",  # a heap for each thread keeps what earlier trials took: 1.8 GB in a slot, instead of 1.35
}
ROUNDING = 1e-6  # Ray counts in ten-thousandths
JOIN_SECONDS = 180.0  # for machines to join that a cluster always has

_before: dict[str, str | None] = {}  # what the environment was, for `stop_ray`


class NotStarted(Exception):
    """Ray did not come up on this machine: no file and no argument is to blame."""


def start_ray(address: str | None, slot: Slot, storage: str | None = None) -> int:
    """Starts Ray on this machine, or joins the one at `address`; returns how many slots there are, or could be once its
    autoscaler has started what it may.

    A slot of several workers is a process of its own beside them; it hardly computes and takes no core. Raises StudyError
    where nothing answers, where a Ray of ours would listen beyond loopback, and where `storage` is a folder of this
    machine that others would not find; NotStarted where Ray does not come up here.
    """
    os.environ.update({key: value for key, value in CHATTER.items() if key not in os.environ})
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray would keep the whole command line, and with it a password in --tracking-uri, where its dashboard shows it
    ray._private.utils.get_entrypoint_name = lambda: "python -m orchestrator.sweep"
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if slot.workers > 1:
        common["runtime_env"] = {"worker_process_setup_hook": _set_address}
    if address is None:
        _stay_here()
        num_cpus = len(os.sched_getaffinity(0))
        # the dashboard serves the state API, without which a stopped group of workers is never freed
        here = {"num_cpus": num_cpus, "include_dashboard": slot.workers > 1, "dashboard_host": "127.0.0.1"}
        try:
            ray.init(address="local", **here, **common)
        except Exception as error:  # what Ray raises has no common kind
            stop_ray()
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NotStarted(
                f"Ray did not start ({why}), as where a machine is too busy; nothing new was begun"
            ) from error
    else:
        _say_the_mode(address)
        _join(address, common)
        scaling = _autoscaler()
        nodes = _wait_for_workers(scaling)
        check_shared(storage, len(nodes), scaling is not None)
        there = nodes if scaling is None else when_all_are_there(nodes, scaling, slot)
        num = num_slots(there, slot)
        # with Tune's own, 1, slots and machines come one after the other
        _set(TUNE_MAX_PENDING_TRIALS_PG=str(max(1, num)))
        return num
    return num_slots(ray.nodes(), slot)


def stop_ray() -> None:
    """Leaves Ray, or ends the one that was started; the environment is as it was before."""
    ray.shutdown()
    for key, value in _before.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    _before.clear()


def num_slots(nodes: Iterable[Mapping[str, Any]], slot: Slot) -> int:
    """How many slots fit on the living nodes, as `ray.nodes()` tells of them.

    A worker stays on one node and, below a whole one, on one device: 0.6 of a device fits once on each, and what is
    left of two devices is no third. The workers of a slot may lie on several nodes.
    """
    per_device = int(1 / slot.gpus + ROUNDING) if slot.gpus else 0
    places = 0
    for node in nodes:
        if node["Alive"]:
            have = node["Resources"]
            by_cpus = int(have.get("CPU", 0) / slot.cpus + ROUNDING)
            places += min(by_cpus, int(have.get("GPU", 0)) * per_device) if slot.gpus else by_cpus
    return places // slot.workers


def _set_address() -> None:
    """Ray Train's cleaner asks for "the" Ray of a machine; with several there it would free nothing, or the wrong one."""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


# -------------------------------------------------------------------------------------------------------- on this machine


def _stay_here() -> None:
    """From here on Ray's processes, and what the workers open, listen on loopback and ask for a token of our own.

    Ray decides from a node's address where its processes listen: on every address of the machine, unless that is
    loopback. It takes the machine's own address, and `_node_ip_address="127.0.0.1"` to mean that one; the switch below,
    whose name tells of two systems on which it is off, is what makes it take loopback.
    """
    from ray._private import ray_constants
    from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]

    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    _set(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),  # known to this process and its children; in no file, in no command line
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        AUTOSCALER_METRIC_PORT="0",  # any free one, so that two sweeps on a machine do not meet
        DASHBOARD_METRIC_PORT="0",
        GLOO_SOCKET_IFNAME=loopback,
        NCCL_SOCKET_IFNAME=loopback,
    )
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray was imported
    _read_mode_and_token()
    here = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(here).is_loopback or get_authentication_mode() != AuthenticationMode.TOKEN:
        raise StudyError(
            f"Ray {ray.__version__} would listen at {here}, or without a token: it is not started; install Ray 2.60"
        )


def _set(**values: str) -> None:
    for key, value in values.items():
        _before.setdefault(key, os.environ.get(key))
        os.environ[key] = value


def _read_mode_and_token() -> None:
    """Ray reads both when it is imported; what is set later has to be told."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


# -------------------------------------------------------------------------------------------------------------- a cluster


def _join(address: str, common: Mapping[str, Any]) -> None:
    try:
        ray.init(address=address, **common)
    except (ConnectionError, ray.exceptions.AuthenticationError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StudyError(
            f"--address {address}: no Ray answers ({reason}); it must run there, and where it asks for a token, "
            f"RAY_AUTH_MODE=token and the token must be set here too (mode here: {os.environ['RAY_AUTH_MODE']})"
        ) from None


def _autoscaler() -> dict[str, Any] | None:
    """What the cluster's autoscaler was told, as `ray up` left it on the head; None where this is no head, or has none."""
    if ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]") != ray.util.get_node_ip_address():
        return None
    path = Path.home() / "ray_bootstrap_config.yaml"
    try:
        found = json.loads(path.read_text()) if _monitor_reads(path) else None  # JSON, whatever its name
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _monitor_reads(path: Path) -> bool:
    """Whether this Ray's own monitor was started with that file: one may lie there from an earlier cluster."""
    address, told = f"--gcs-address={ray.get_runtime_context().gcs_address}", "--autoscaling-config="
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            given = (process / "cmdline").read_text(errors="replace").split("\0")
            files = [Path(one.removeprefix(told)).expanduser() for one in given if one.startswith(told)]
            if address in given and path in files:
                return True
    return False


def _wait_for_workers(scaling: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The living nodes, when as many are there as the cluster always has: `ray up` does not wait for them."""
    kinds = (scaling or {}).get("available_node_types", {}).values()
    promised = sum(int(kind.get("min_workers") or 0) for kind in kinds)
    until, said = time.monotonic() + JOIN_SECONDS, False
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        there = sum(not _is_head(node) for node in nodes)
        if there >= promised or time.monotonic() > until:
            if there < promised:
                print(f"going on with {there} of the cluster's {promised} machines", flush=True)
            return nodes
        if not said:
            said = True
            print(f"waiting for the cluster's machines: {there} of {promised} are there", flush=True)
        time.sleep(1)


def when_all_are_there(
    nodes: Iterable[Mapping[str, Any]], scaling: Mapping[str, Any], slot: Slot
) -> list[Mapping[str, Any]]:
    """The head, and the machines that the autoscaler may hold at once, those with most slots first; where it is not told
    what its machines have (those that one has already), the living ones."""
    kinds = [kind for name, kind in scaling["available_node_types"].items() if name != scaling.get("head_node_type")]
    could = [
        {"Alive": True, "Resources": kind["resources"]}
        for kind in kinds
        if kind.get("resources")
        for _ in range(int(kind.get("max_workers") or 0))
    ]
    if not could:
        return list(nodes)
    alone = slot.model_copy(update={"workers": 1})
    could.sort(key=lambda node: -num_slots([node], alone))
    return [node for node in nodes if _is_head(node)] + could[: int(scaling.get("max_workers") or 0)]


def _is_head(node: Mapping[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def check_shared(storage: str | None, num_nodes: int, scales: bool) -> None:
    """Raises StudyError where trials would write to folders of their own machines: a relative path is of this one."""
    if storage is None or "://" in storage or os.path.isabs(storage) or (num_nodes < 2 and not scales):
        return
    what = f"{num_nodes} machines" if num_nodes > 1 else "machines that come and go"
    raise StudyError(
        f"--storage {storage}: a folder of this machine, and the cluster has {what}; give a URI (s3://bucket/runs) or the "
        "whole path of a folder that all of them share"
    )


def _say_the_mode(address: str) -> None:
    """Whether a token is asked for is never left to what lies in a home directory: where the user set no mode, it is set."""
    if os.environ.get("RAY_AUTH_MODE"):
        return
    mode = "token" if has_token(os.environ, Path.home()) else "disabled"
    if mode == "disabled":
        print(
            f"warning: no token for the Ray at {address}: whoever reaches its ports can run code there (docs/security.md)",
            file=sys.stderr,
        )
    _set(RAY_AUTH_MODE=mode)
    _read_mode_and_token()


def has_token(environment: Mapping[str, str], home: Path) -> bool:
    """Whether there is a token in one of the three places where Ray looks for one."""
    if environment.get("RAY_AUTH_TOKEN"):
        return True
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path) if path else home / ".ray" / "auth_token"
    try:
        return bool(file.read_text().strip())
    except OSError:
        return False
