"""A cluster's file, looked at before it costs money: `make cluster` starts machines only where nothing is amiss.

    python -m orchestrator.cluster.check_config cluster.yaml

Exit 0: nothing is amiss; 2: what is, a line each. Ray looks at the file's own keys; this looks at what Ray takes without a
word: values that are still to be filled in, paths that are not there, a Ray that whoever reaches it can use, and machines
that anybody can reach or that could start others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.study.errors import StudyError, line_of
from orchestrator.study.yaml_reader import read_yaml

TO_FILL_IN = "FILL-IN"
OF_A_MACHINE = {  # what each kind of machine on AWS must say, and what Ray does where it says nothing
    "ImageId": "Ray would take an image of 2022",
    "SecurityGroupIds": "Ray would open port 22 to every address",
    "IamInstanceProfile": "without one a worker cannot write the storage, and the head gets one of Ray's own",
}
Path_ = tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m orchestrator.cluster.check_config cluster.yaml", file=sys.stderr)
        return 2
    try:
        value, lines = read_yaml(argv[0])
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = list(problems(value, Path.home()))
    for at, what in found:
        print(f"error: {argv[0]}:{line_of(lines, *at)}: {'.'.join(at)}: {what}", file=sys.stderr)
    return 2 if found else 0


def problems(value: Mapping[str, Any], home: Path) -> Iterator[tuple[Path_, str]]:
    """(path in the file, what is amiss). Relative paths start where the command is given, as Ray has it."""
    yield from _to_fill_in(value, ())
    for remote, local in (value.get("file_mounts") or {}).items():
        if not (path := _local(local, home)).exists():
            hint = ": ray get-auth-token --generate && chmod 600 ~/.ray/auth_token" if path.name == "auth_token" else ""
            yield ("file_mounts", remote), f"{local} is not here{hint}"
        elif path.name == "auth_token" and path.stat().st_mode & 0o077:
            yield ("file_mounts", remote), f"others can read {local}: chmod 600 {local}"
    yield from _open_to_others(value)
    provider = value.get("provider") or {}
    if provider.get("type") == "aws":
        yield from _on_aws(value)


def _local(path: str, home: Path) -> Path:
    return home / path[2:] if path.startswith("~/") else Path(path)


def _to_fill_in(value: Any, at: Path_) -> Iterator[tuple[Path_, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _to_fill_in(item, (*at, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _to_fill_in(item, (*at, str(number)))
    elif value is None or (isinstance(value, str) and TO_FILL_IN in value):
        yield at, "is still to be filled in (docs/cluster.md)"


def _open_to_others(value: Mapping[str, Any]) -> Iterator[tuple[Path_, str]]:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = value.get(key) or []
        starts = [command for command in commands if "ray start" in command]
        if not starts:
            yield (key,), "starts no Ray; Ray's own commands would start one without a token"
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                yield (key,), "must say `export RAY_AUTH_MODE=token;` before `ray start`: else it may run open"
            if "--head" in command and "--dashboard-host=127.0.0.1" not in command:
                yield (key,), "must say --dashboard-host=127.0.0.1; `ray dashboard` reaches it there"


def _on_aws(value: Mapping[str, Any]) -> Iterator[tuple[Path_, str]]:
    for key in ("max_workers", "idle_timeout_minutes"):
        if not isinstance(value.get(key), int) or value[key] < 1:
            yield (key,), "must be a number from 1 on: what a forgotten cluster costs has this bound"
    head, profiles = value.get("head_node_type"), {}
    for name, kind in (value.get("available_node_types") or {}).items():
        at, config = ("available_node_types", name, "node_config"), kind.get("node_config") or {}
        for key, why in OF_A_MACHINE.items():
            if not config.get(key):
                yield (*at, key), f"is missing: {why}"
        if (config.get("MetadataOptions") or {}).get("HttpTokens") != "required":
            yield (*at, "MetadataOptions"), "must say HttpTokens: required: else whatever runs there can be made to give its keys away"  # fmt: skip
        profiles[name] = config.get("IamInstanceProfile")
    for name, profile in profiles.items():
        if name != head and profile and profile == profiles.get(head):
            yield ("available_node_types", name, "node_config", "IamInstanceProfile"), "is the head's: a worker could start machines"  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
