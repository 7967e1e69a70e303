"""What is wrong with a study, said once and well: the file, the line, the path, and what would be valid."""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError

Lines = Mapping[tuple[str, ...], int]  # path in the file -> line

RENAMED = {  # fields of a study as earlier versions called them
    "inner": "intermediate_size",
    "decay": "weight_decay",
    "floor": "min_lr_ratio",
    "clip": "max_grad_norm",
    "recompute": "gradient_checkpointing",
    "each": "for_each_dataset",
    "keep": "save_at",
    "scored_on": "eval_only",
    "leave_out": "held_out",
}


class StudyError(ValueError):
    """A file or an argument that cannot be run; the message says what, where, and what would be valid."""


def redact(text: str) -> str:
    """A URI, or a message with some in it, without user, password, query and fragment."""
    text = re.sub(r"(://[^\s/?#@:]+(?:(?::\d+)?/[^\s?#@]*)?)[?#]\S*", r"\1?***", text)  # no user: an @ is the query's
    text = re.sub(r"://.*@([^\s?#]*)([?#]\S*)?", lambda m: f"://***@{m[1]}{'?***' if m[2] else ''}", text)
    return re.sub(r"(?<=\S)[?#][^\s?#]*=\S*", "?***", text)  # a message may name the path alone


_PASSWORD = re.compile(
    r"://(?:[^/\s@:]*:(?!\d*/)[^\s@]*@|(?<=http://|ttps://)[^/\s@]+@)"
)  # not host:port/path@revision
_KEY = re.compile(
    r"[?&][^=&\s]*(?:token|secret|passw|signature|credential|api_?key|access_?key)[^=&\s]*=[^&\s]", re.IGNORECASE
)


def has_secret(text: str) -> bool:
    """Whether there is a URI in it with a password or a token."""
    return "://" in text and bool(_PASSWORD.search(text) or _KEY.search(text))


def set_path(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Sets a dotted path in nested mappings, in place. Names on the way must exist or be optional mappings."""
    *parents, last = path.split(".")
    at: Any = raw
    for i, key in enumerate(parents):
        if not isinstance(at, dict):
            raise StudyError(f"{where}: {path}: {'.'.join(parents[:i])} has no parts")
        if key not in at:
            if i and parents[i - 1] in ("models", "phases", "terms", "arms"):
                raise StudyError(
                    f"{where}: no {path!r}: there is no {key!r}{nearest(key, at)}; expected {', '.join(at)}"
                )
            at[key] = {}
        at = at[key]
    if not isinstance(at, dict):
        raise StudyError(f"{where}: {path}: {'.'.join(parents)} has no parts")
    at[last] = copy.deepcopy(value)


def nearest(word: str, among: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(among), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def line_of(lines: Lines, *path: str) -> int:
    """The line of a path, or of the nearest part of it that the file has."""
    for i in range(len(path), 0, -1):
        if path[:i] in lines:
            return lines[path[:i]]
    return 1


def without_place(error: StudyError) -> str:
    """The message without the name of the arm or point before it."""
    return str(error).split(": ", 1)[-1]


def explain(error: ValidationError, cls: type[BaseModel], file: str, root: str, lines: Lines) -> str:
    """The first error as one sentence: file, line, path, what is wrong, what would be valid."""
    errors = error.errors(include_url=False)
    problem = min(errors, key=lambda e: (e["type"] != "extra_forbidden", -len(e["loc"])))
    loc = tuple(str(part) for part in problem["loc"])
    path, fields = _walk(cls, loc)
    full = tuple(filter(None, (root, *path)))
    at = f"{file}:{line_of(lines, *full)}: " if lines else f"{file}: "
    where = f"{'.'.join(full)}: " if full else ""
    if problem["type"] == "extra_forbidden":
        key = loc[-1]
        if RENAMED.get(key) in fields:
            return f"{at}{where}{key!r} is now called {RENAMED[key]!r}"
        return f"{at}{where}unknown key {key!r}{nearest(key, fields)}; expected {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"{at}{where}is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = problem.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{at}{where}{message}{shown}"


def _walk(cls: Any, loc: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Pydantic's location without the names of union members, and the keys that are valid where it ends."""
    path: list[str] = []
    current: Any = cls
    fields: tuple[str, ...] = ()
    for part in loc:
        options = list(_members(current))
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        by_tag = [
            m
            for m in models
            if part in (_tag(m), *(f.alias or n for n, f in m.model_fields.items() if f.is_required()))
        ]
        if len(models) > 1 and by_tag:
            current = by_tag[0]
            continue
        if len(options) > 1 and part in ("number", "schedule", "words", "average"):
            continue
        path.append(part)
        field = next((f for m in models for n, f in m.model_fields.items() if part in (n, f.alias)), None)
        fields = tuple(f.alias or n for m in models[:1] for n, f in m.model_fields.items())
        if field is not None:
            current = field.annotation
        else:
            mapping = next((o for o in options if typing.get_origin(o) in (dict, tuple)), None)
            current = (
                typing.get_args(mapping)[-1] if mapping is not None and typing.get_origin(mapping) is dict else Any
            )
    return tuple(part for part in path if not part.startswith(("function-", "dict[", "tuple[", "constrained"))), fields


def _members(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind and typing.get_origin(kind.annotation) is Literal else None
