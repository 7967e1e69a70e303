"""Validates cluster.yaml before launching paid machines; `make cluster` calls this first.

    python -m orchestrator.cluster.check_config cluster.yaml

Exit 0: the file is sound; 2: it is not, with a line per error. Ray checks the keys of the file. This module checks what Ray
accepts silently: placeholders, missing paths, a Ray without a token, and machines that are open to everyone or that may
start other machines.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cluster.machine import start
from orchestrator.study.errors import StudyError, line_of
from orchestrator.study.yaml_reader import read_yaml

PLACEHOLDER = "FILL-IN"
AWS_FIELDS = {  # required for each kind of machine, and what happens without the field
    "ImageId": "Ray would take an image of 2022",
    "SecurityGroupIds": "Ray would open port 22 to every address",
    "IamInstanceProfile": "a worker without a profile cannot write the storage, and the head gets a profile made by Ray",
}
Problems = Iterator[tuple[tuple[str, ...], str]]  # (path in the file, what is wrong there)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster.check_config", description="Validates the file of a cluster."
    )
    parser.add_argument("file", metavar="cluster.yaml", type=os.path.expanduser)
    file = parser.parse_args(argv).file
    try:
        config, lines = read_yaml(file)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = list(problems(config, Path.home()))
    for path, problem in found:
        print(f"error: {file}:{line_of(lines, *path)}: {'.'.join(path)}: {problem}", file=sys.stderr)
    return 2 if found else 0


def problems(config: Mapping[str, Any], home: Path) -> Problems:
    """Lists the faults of a cluster file. Relative paths start at the working directory, as in Ray."""
    yield from _placeholders(config, ())
    for remote, local in (config.get("file_mounts") or {}).items():
        path = home / local[2:] if local.startswith("~/") else Path(local)
        if not path.exists():
            hint = ": ray get-auth-token --generate && chmod 600 ~/.ray/auth_token" if path.name == "auth_token" else ""
            yield ("file_mounts", remote), f"{local} does not exist{hint}"
        elif path.name == "auth_token" and path.stat().st_mode & 0o077:
            yield ("file_mounts", remote), f"other users can read {local}: chmod 600 {local}"
    yield from _open_ray(config)
    if (config.get("provider") or {}).get("type") == "aws":
        yield from _aws(config)


def _placeholders(value: Any, path: tuple[str, ...]) -> Problems:
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _placeholders(item, (*path, str(key)))
    elif value is None or (isinstance(value, str) and PLACEHOLDER in value):
        yield path, "is still to be filled in (docs/cluster.md)"


def _open_ray(config: Mapping[str, Any]) -> Problems:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(key) or [] if "ray start" in command]
        if not starts:
            yield (key,), "starts no Ray; Ray's own commands would start one without a token"
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                yield (key,), "expected `export RAY_AUTH_MODE=token;` before `ray start`, or Ray may ask for no token"
            if "--head" in command and "--dashboard-host=127.0.0.1" not in command:
                yield (key,), "expected --dashboard-host=127.0.0.1; `ray dashboard` reaches the dashboard there"


def _aws(config: Mapping[str, Any]) -> Problems:
    for key in ("max_workers", "idle_timeout_minutes"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            yield (key,), "expected a number from 1 on, which bounds the cost of a forgotten cluster"
    kinds = config.get("available_node_types") or {}
    nodes = {name: kind.get("node_config") or {} for name, kind in kinds.items()}
    head = config.get("head_node_type")
    for name, node in nodes.items():
        path = ("available_node_types", name, "node_config")
        for key, reason in AWS_FIELDS.items():
            if not node.get(key):
                yield (*path, key), f"is missing: {reason}"
        if (node.get("MetadataOptions") or {}).get("HttpTokens") != "required":
            yield (*path, "MetadataOptions"), "expected HttpTokens: required, against theft of the machine's keys"
        profile = node.get("IamInstanceProfile")
        if name != head and profile and profile == nodes.get(head, {}).get("IamInstanceProfile"):
            yield (*path, "IamInstanceProfile"), "is the head's: a worker could start machines"


if __name__ == "__main__":
    start(main)
