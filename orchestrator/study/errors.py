"""Error messages about a study: the file, the line, the path, the fault, and what is expected."""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ValidationError

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

NAMED = ("data", "models", "phases", "terms", "streams", "arms")  # mappings whose keys are names of the study's own


class StudyError(ValueError):
    """A study file or an argument is wrong; the message says what, where, and what is expected.

    `trial`: the arm or point at fault, which `message` leaves out.
    """

    def __init__(self, message: str, trial: str = "") -> None:
        super().__init__(f"{trial}: {message}" if trial else message)
        self.message = message


def redact(text: str) -> str:
    """Removes user, password, query and fragment from each URI in a text."""
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
    """Returns whether the text holds a URI with a password or a token."""
    return "://" in text and bool(_PASSWORD.search(text) or _KEY.search(text))


def set_path(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Sets a dotted path in nested mappings, in place; what has a name of the study's own on the path must exist."""
    *parents, last = path.split(".")
    mapping: Any = raw
    for i, key in enumerate([*parents, last]):
        if not isinstance(mapping, dict):
            raise StudyError(f"{path}: {'.'.join(parents[:i])} has no parts", where)
        if i == len(parents):
            mapping[last] = copy.deepcopy(value)
        elif key not in mapping and i and parents[i - 1] in NAMED and "kind" not in mapping:
            expected = f"{nearest(key, mapping)}; expected {', '.join(mapping) or 'none'}"
            raise StudyError(f"no {path!r}: there is no {key!r}{expected}", where)
        else:
            mapping = mapping.setdefault(key, {})


def dotted(value: Any, path: str = "") -> Iterator[str]:
    """Yields the dotted path of each entry of nested mappings."""
    for key, item in value.items() if isinstance(value, Mapping) else ():
        yield f"{path}{key}"
        yield from dotted(item, f"{path}{key}.")


def nearest(word: str, among: Iterable[str]) -> str:
    """Asks "did you mean" the nearest of the names; empty where none is near."""
    close = difflib.get_close_matches(word, list(among), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def line_of(lines: Lines, *path: str) -> int:
    """Returns the line of the path, or of its longest part that the file has."""
    for i in range(len(path), 0, -1):
        if path[:i] in lines:
            return lines[path[:i]]
    return 1


def explain(
    error: ValidationError, cls: type[BaseModel], place: str, *, root: str = "", lines: Lines | None = None
) -> str:
    """Describes the first error in one sentence: place, line, path, the fault, and what is expected."""
    problem = min(error.errors(include_url=False), key=lambda e: (e["type"] != "extra_forbidden", -len(e["loc"])))
    loc = tuple(str(part) for part in problem["loc"])
    path, fields = _walk(cls, loc)
    full = tuple(filter(None, (root, *path)))
    where = f"{place}:{line_of(lines, *full)}: " if lines else f"{place}: " if place else ""
    where += f"{'.'.join(full)}: " if full else ""
    if problem["type"] == "extra_forbidden":
        key = loc[-1]
        if RENAMED.get(key) in fields:
            return f"{where}{key!r} is now called {RENAMED[key]!r}"
        return f"{where}unknown key {key!r}{nearest(key, fields)}; expected {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"{where}is missing"
    if problem["type"] == "union_tag_not_found":
        return f"{where}has no `kind`, which says what it is"
    if problem["type"] in ("dict_type", "model_type", "model_attributes_type"):
        found = {list: "a list", type(None): "nothing"}.get(type(problem["input"]), repr(problem["input"]))
        return f"{where}expected one mapping (`key: value`); found {found}"
    if problem["type"] in ("list_type", "tuple_type"):
        return f"{where}expected a list; found {problem['input']!r}"
    message, given = problem["msg"].removeprefix("Value error, "), problem.get("input")
    message = message[0].lower() + message[1:]
    guess = nearest(str(given), re.findall("'([^']*)'", message)) if problem["type"] == "literal_error" else ""
    is_unknown = problem["type"] == "union_tag_invalid" and _takes_own(path)
    own = "; or a member of the file that --extension names" if is_unknown else ""
    return (
        f"{where}{message}" + (f" (got {given!r})" if isinstance(given, str | int | float | None) else "") + guess + own
    )


def _takes_own(path: tuple[str, ...]) -> bool:
    """Returns whether a user's own file can add to what stands at a path."""
    return "terms" in path or path[-2:-1] == ("metrics",)


def renamed_part(path: str, cls: type[BaseModel]) -> str | None:
    """Names the part of a dotted path below `cls` that is a field's former name, and its name now; None where there is none."""
    options: list[Any] = [cls]
    for part in path.split("."):
        fields = {f.alias or n: f for model in _models(options) for n, f in model.model_fields.items()}
        if part in fields:
            options = list(_members(fields[part].annotation))
            if any(isinstance(validator, BeforeValidator) for validator in fields[part].metadata):
                options += _values(options)  # one value may stand for the mapping, e.g. `optimizer.lr`
        elif RENAMED.get(part) in fields:
            return f"{part!r} is now called {RENAMED[part]!r}"
        else:
            options = _values(options)
    return None


def _walk(cls: Any, loc: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Splits pydantic's location: the path in the file, without names of union members, and the keys valid at its end."""
    path: list[str] = []
    fields: tuple[str, ...] = ()
    options = [cls]
    for part in loc:
        models = _models(options)
        tagged = [m for m in models if part == _tag(m) or part in _required(m)]
        if len(models) > 1 and tagged:
            options = [tagged[0]]
            continue
        if len(options) > 1 and part in ("number", "schedule", "words", "average", "one", "several"):
            continue
        path.append(part)
        field = next((f for m in models for n, f in m.model_fields.items() if part in (n, f.alias)), None)
        fields = tuple(f.alias or n for m in models[:1] for n, f in m.model_fields.items())
        mapping = next((o for o in options if typing.get_origin(o) is dict), None)
        listed = next((o for o in options if typing.get_origin(o) is tuple and part.isdigit()), None)
        inside = typing.get_args(mapping)[-1] if mapping else typing.get_args(listed)[0] if listed else Any
        options = list(_members(field.annotation if field else inside))
    return tuple(part for part in path if not part.startswith(("function-", "dict[", "tuple[", "constrained"))), fields


def _values(options: Iterable[Any]) -> list[Any]:
    """Returns the types of the values of the mappings among the options."""
    return [m for o in options if typing.get_origin(o) is dict for m in _members(typing.get_args(o)[-1])]


def _models(options: Iterable[Any]) -> list[type[BaseModel]]:
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _required(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items() if field.is_required()]


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
