"""Starts Ray on this machine, where nobody else can reach Ray, or joins a running Ray; counts the slots.

A Ray runs code for everyone who reaches its ports. A Ray that we start listens on loopback only and requires a token that
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
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster.machine import num_cores
from orchestrator.cluster.ray_internals import (
    hide_command_line,
    listen_on_loopback,
    reload_authentication,
    requires_token,
)
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Slot

RAY_ENVIRONMENT = {  # unless the user sets a variable
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own files are the record
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # nobody reads Tune's snapshots
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # our own handler ends the sweep
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # only searched points have an objective
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a lost slot is reported in one line, without a traceback
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "90",  # stopped ranks leave together; after the default of 2 s their slot is lost
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a study start at the working directory of the command
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # with the default of 2 s a lost worker is noticed late
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MALLOC_ARENA_MAX": "1",  # one heap: with a heap per thread a slot keeps 1.8 GB of earlier trials instead of 1.35 GB
}
ROUNDING = 1e-6  # Ray counts in ten-thousandths
SOCKET_FOLDER_BYTES = 39  # Linux takes 107 for the path of a socket, of which Ray needs 68
JOIN_SECONDS = 180.0  # for the machines that a cluster always has

_before: dict[str, str | None] = {}  # the environment before `start_ray`, restored by `stop_ray`


class NotStarted(Exception):
    """Ray did not start on this machine, through no fault of a file or an argument."""


def start_ray(address: str | None, slot: Slot, storage: str | None = None) -> int:
    """Starts Ray on this machine, or joins the Ray at `address`; returns the number of slots, with those that the cluster's
    autoscaler may add. A slot of several workers has one more process, which hardly computes and takes no core.

    Raises StudyError where no Ray answers, where a Ray of ours would listen beyond loopback, and where other machines cannot
    reach `storage`; NotStarted where Ray does not start here.
    """
    os.environ.update({key: value for key, value in RAY_ENVIRONMENT.items() if key not in os.environ})
    logging.getLogger("ray").setLevel(logging.ERROR)
    hide_command_line()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if slot.workers > 1:
        options["runtime_env"] = {"worker_process_setup_hook": _set_address}
    if address is None:
        _start_here(options, with_state_api=slot.workers > 1)
        return num_slots(ray.nodes(), slot)
    _set_mode(address)
    _join(address, options)
    scaling = autoscaler_config()
    nodes = wait_for_workers(scaling)
    check_shared(storage, len(nodes), scaling is not None)
    num = num_slots(nodes if scaling is None else when_all_are_there(nodes, scaling, slot), slot)
    _set(TUNE_MAX_PENDING_TRIALS_PG=str(max(1, num)))  # with Tune's default of 1, machines start one after the other
    return num


def stop_ray() -> None:
    """Leaves Ray, or ends the Ray that was started here, and restores the environment."""
    ray.shutdown()
    for key, value in _before.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    _before.clear()


def num_slots(nodes: Iterable[Mapping[str, Any]], slot: Slot) -> int:
    """Counts the slots that fit on the living nodes, given as by `ray.nodes()`.

    A worker stays on one node and, with less than a whole device, on one device: 0.6 of a device fits once on each of two
    devices, and the rests make no third. The workers of a slot may lie on several nodes.
    """
    per_device = int(1 / slot.gpus + ROUNDING) if slot.gpus else 0
    places = 0
    for node in nodes:
        if node["Alive"]:
            resources = node["Resources"]
            by_cpus = int(resources.get("CPU", 0) / slot.cpus + ROUNDING)
            places += min(by_cpus, int(resources.get("GPU", 0)) * per_device) if slot.gpus else by_cpus
    return places // slot.workers


def _set_address() -> None:
    """Tells Ray Train's clean-up which Ray of the machine is meant; with several it would free nothing, or a wrong group."""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def _set(**values: str) -> None:
    for key, value in values.items():
        _before.setdefault(key, os.environ.get(key))
        os.environ[key] = value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -------------------------------------------------------------------------------------------------------- on this machine


def _start_here(options: Mapping[str, Any], *, with_state_api: bool) -> None:
    """Starts Ray on loopback with a token of its own. Without the state API, which the dashboard serves, the workers of a
    stopped group are never freed."""
    _stay_on_loopback()
    _keep_socket_paths_short()
    here = {"num_cpus": num_cores(), "include_dashboard": with_state_api, "dashboard_host": "127.0.0.1"}
    try:
        ray.init(address="local", **here, **options)
    except Exception as error:  # Ray's errors have no common base
        stop_ray()
        raise NotStarted(f"Ray did not start ({_first_line(error)}); no trial was started") from error


def _keep_socket_paths_short() -> None:
    """Gives Ray, for its session, the folder for temporary files, or /tmp where the paths of its sockets would be too long."""
    folder = os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    _set(RAY_TMPDIR=folder if len(os.fsencode(folder)) <= SOCKET_FOLDER_BYTES else "/tmp")


def _stay_on_loopback() -> None:
    """Makes all processes of Ray, and the sockets of workers, listen on loopback and require a new token.

    Ray derives from a node's address where its processes listen: on every address of the machine, unless the node's address
    is loopback. `_node_ip_address="127.0.0.1"` does not achieve that, since Ray replaces it by the machine's own address.
    """
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    _set(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),  # in no file and in no command line: only children inherit the token
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        AUTOSCALER_METRIC_PORT="0",  # any free port, so that two sweeps on a machine do not collide
        DASHBOARD_METRIC_PORT="0",
        GLOO_SOCKET_IFNAME=loopback,
        NCCL_SOCKET_IFNAME=loopback,
    )
    listen_on_loopback()
    reload_authentication()
    here = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(here).is_loopback or not requires_token():
        raise StudyError(
            f"Ray {ray.__version__} would listen at {here}, or without a token, and was not started; install Ray 2.60"
        )


# -------------------------------------------------------------------------------------------------------------- a cluster


def _set_mode(address: str) -> None:
    """Sets whether Ray uses a token, unless the user did: a forgotten file in a home directory must not decide silently."""
    if os.environ.get("RAY_AUTH_MODE"):
        return
    mode = "token" if has_token(os.environ, Path.home()) else "disabled"
    if mode == "disabled":
        print(
            f"warning: no token for the Ray at {address}: everyone who reaches its ports can run code there (docs/security.md)",
            file=sys.stderr,
        )
    _set(RAY_AUTH_MODE=mode)
    reload_authentication()


def has_token(environment: Mapping[str, str], home: Path) -> bool:
    """Returns whether a token is in one of the three places where Ray looks for one."""
    if environment.get("RAY_AUTH_TOKEN"):
        return True
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    with suppress(OSError):
        return bool((Path(path) if path else home / ".ray" / "auth_token").read_text().strip())
    return False


def _join(address: str, options: Mapping[str, Any]) -> None:
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ray.exceptions.AuthenticationError, ValueError) as error:
        raise StudyError(
            f"--address {address}: no Ray answers ({_first_line(error)}); Ray must run there, and if that Ray requires a token, "
            f"set RAY_AUTH_MODE=token and the token here too (mode here: {os.environ['RAY_AUTH_MODE']})"
        ) from None


def autoscaler_config() -> dict[str, Any] | None:
    """Reads the autoscaler's configuration that `ray up` left on the head; None without one, and on other machines."""
    if ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]") != ray.util.get_node_ip_address():
        return None
    path = Path.home() / "ray_bootstrap_config.yaml"
    try:
        config = json.loads(path.read_text()) if _monitor_reads(path) else None  # JSON, despite its name
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _monitor_reads(path: Path) -> bool:
    """Returns whether this Ray's own monitor was started with the file, which may be left over from an earlier cluster."""
    address, option = f"--gcs-address={ray.get_runtime_context().gcs_address}", "--autoscaling-config="
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            arguments = (process / "cmdline").read_text(errors="replace").split("\0")
            files = [Path(a.removeprefix(option)).expanduser() for a in arguments if a.startswith(option)]
            if address in arguments and path in files:
                return True
    return False


def wait_for_workers(scaling: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Waits until the machines that the cluster always has are there, as `ray up` does not; returns the living nodes."""
    kinds = (scaling or {}).get("available_node_types", {}).values()
    promised = sum(int(kind.get("min_workers") or 0) for kind in kinds)
    deadline, is_announced = time.monotonic() + JOIN_SECONDS, False
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        present = sum(not _is_head(node) for node in nodes)
        if present >= promised:
            return nodes
        if time.monotonic() > deadline:
            print(f"continuing with {present} of the cluster's {promised} machines", flush=True)
            return nodes
        if not is_announced:
            is_announced = True
            print(f"waiting for the cluster's machines: {present} of {promised} are there", flush=True)
        time.sleep(1)


def when_all_are_there(
    nodes: Iterable[Mapping[str, Any]], scaling: Mapping[str, Any], slot: Slot
) -> list[Mapping[str, Any]]:
    """Returns the head and the machines that the autoscaler may run at once, those with most slots first; the living
    nodes where the configuration does not list resources (machines that a file lists)."""
    kinds = [kind for name, kind in scaling["available_node_types"].items() if name != scaling.get("head_node_type")]
    possible = [
        {"Alive": True, "Resources": kind["resources"]}
        for kind in kinds
        if kind.get("resources")
        for _ in range(int(kind.get("max_workers") or 0))
    ]
    if not possible:
        return list(nodes)
    worker = slot.model_copy(update={"workers": 1})
    possible.sort(key=lambda node: -num_slots([node], worker))
    return [node for node in nodes if _is_head(node)] + possible[: int(scaling.get("max_workers") or 0)]


def _is_head(node: Mapping[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def check_shared(storage: str | None, num_nodes: int, scales: bool) -> None:
    """Raises StudyError where trials would write to folders of their own machines: a relative path is local."""
    if storage is None or "://" in storage or os.path.isabs(storage) or (num_nodes < 2 and not scales):
        return
    what = f"{num_nodes} machines" if num_nodes > 1 else "machines that come and go"
    raise StudyError(
        f"--storage {storage}: a folder of this machine, and the cluster has {what}; give a URI (s3://bucket/runs) or the "
        "absolute path of a folder that all machines share"
    )
