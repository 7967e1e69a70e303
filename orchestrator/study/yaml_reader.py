"""Reads YAML 1.2 files as plain data, with the line of each key; refuses tags, anchors and duplicate keys."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from orchestrator.study.errors import StudyError


def read_yaml(file: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Returns the file's mapping, empty for an empty file, and the line of each path. Raises StudyError."""
    try:
        text = Path(file).read_bytes().decode()
    except FileNotFoundError:
        raise StudyError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise StudyError(f"{file}: is a folder; expected a YAML file, e.g. search_spaces/smoke.yaml") from None
    except UnicodeDecodeError:
        raise StudyError(f"{file}: not a text file (UTF-8 YAML is expected)") from None
    except OSError as error:
        raise StudyError(f"{file}: {error.strerror}") from None
    try:
        if (refused := _not_plain(text)) is not None:
            raise StudyError(f"{file}:{refused[0]}: {refused[1]}")
        value = _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        raise StudyError(f"{file}:{mark.line + 1 if mark else 1}: malformed YAML: {problem}") from None
    except YAMLError as error:
        raise StudyError(f"{file}: malformed YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise StudyError(f"{file}: malformed YAML: nested too deeply") from None
    if not isinstance(value, dict | None):
        raise StudyError(f"{file}:1: expected a mapping (`key: value`); found {type(value).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    return _plain(value or {}, (), lines), lines


def parse_value(text: str, override: str) -> Any:
    """Parses the value of a `--set` argument. Raises StudyError."""
    try:
        if (refused := _not_plain(text)) is not None:
            raise StudyError(f"--set {override!r}: {refused[1]}")
        return _plain(_yaml().load(text), (), {})
    except (YAMLError, RecursionError):
        raise StudyError(f"--set {override!r}: the value is not YAML") from None


def _not_plain(text: str) -> tuple[int, str] | None:
    """Returns the first line that is more than plain data, and why the line is refused. Parses the text; constructs
    nothing."""
    for event in _yaml().parse(io.StringIO(text)):
        line = event.start_mark.line + 1
        if getattr(event, "ctag", None) is not None or getattr(event, "tag", None) not in (None, "!"):
            return line, f"tag {str(event.tag)!r} refused; only plain data is read"
        if getattr(event, "anchor", None) is not None:
            return line, "anchors and aliases are refused; use profiles, arms or vary"
        if getattr(event, "value", None) == "<<":
            return line, "merge keys are refused; use profiles, arms or vary"
    return None


class _Constructor(RoundTripConstructor):  # type: ignore[misc]
    """Keeps dates as text: a study has no dates, and an impossible date would raise."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", RoundTripConstructor.construct_scalar)


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.Constructor = _Constructor
    return yaml


def _plain(value: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> Any:
    if isinstance(value, dict):
        for key in value:
            lines[(*path, str(key))] = value.lc.key(key)[0] + 1  # type: ignore[attr-defined]
        return {str(key): _plain(item, (*path, str(key)), lines) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, (*path, str(i)), lines) for i, item in enumerate(value)]
    for kind in (bool, int, float):  # ruamel's own number types keep the spelling; plain numbers do not
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else str(value)
