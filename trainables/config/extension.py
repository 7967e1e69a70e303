"""A user's own file: typed values that bring their functions, beside the closed lists.

The file is Python that runs with the user's rights. It comes from the command line alone (`--extension`), and travels to slots
as an argument of the driver: neither a study nor a storage makes code run. One file is installed in a process, for good.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.abc import SourceLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from trainables.config.value import Value

MODULE = "codistill_extension"  # the name under which the file is imported
MEMBERS = "MEMBERS"  # what the file calls the list of its values


class ExtensionError(ValueError):
    """The file cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Extension:
    """A file by its name and text."""

    file: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


_installed: list[Extension] = []  # one at most
_examples: dict[str, Value] = {}  # kind -> an example of each of its members


class _Source(SourceLoader):
    """Imports a text; Python's own loader reads files, which other machines lack."""

    def __init__(self, extension: Extension) -> None:
        self._extension = extension

    def get_filename(self, fullname: str) -> str:
        return self._extension.file

    def get_data(self, path: str) -> bytes:
        return self._extension.text.encode()


def installed() -> Extension | None:
    return _installed[0] if _installed else None


def examples(base: type | None = None) -> dict[str, Any]:
    """Returns, by kind, the example of each member of the installed file; only those of a base where one is given."""
    return {kind: value for kind, value in _examples.items() if base is None or isinstance(value, base)}


def install(extension: Extension, *, taken: frozenset[str]) -> None:
    """Runs the file and registers its members. Raises ExtensionError where it cannot be used.

    `taken`: the kinds of the closed lists, which no member may have.
    """
    if _installed == [extension]:
        return
    if _installed:
        raise ExtensionError(f"{extension.file}: {_installed[0].file} is installed in this process; expected one file")
    spec = spec_from_loader(MODULE, _Source(extension))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[MODULE] = module  # by which pydantic finds the types of fields
    try:
        spec.loader.exec_module(module)
        found = _members(extension.file, getattr(module, MEMBERS, None), taken)
    except BaseException as error:
        del sys.modules[MODULE]
        if isinstance(error, ExtensionError) or not isinstance(error, Exception):
            raise
        line = getattr(error, "lineno", None) or _line_of(error, extension.file)
        reason = (str(getattr(error, "msg", error)).splitlines() or [""])[0]
        raise ExtensionError(f"{extension.file}:{line or 1}: {type(error).__name__}: {reason}") from None
    _installed.append(extension)
    _examples.update(found)


def _line_of(error: BaseException, file: str) -> int | None:
    trace, line = error.__traceback__, None
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
        trace = trace.tb_next
    return line


def _members(file: str, listed: Any, taken: frozenset[str]) -> dict[str, Value]:
    if not isinstance(listed, list | tuple) or not listed:
        raise ExtensionError(f"{file}: has no members; expected {MEMBERS} = [an example of each of its values]")
    found = dict[str, Value]()
    for value in listed:
        kind = getattr(value, "kind", None)
        if not isinstance(value, Value) or not isinstance(kind, str) or type(value).__module__ != MODULE:
            raise ExtensionError(
                f"{file}: {MEMBERS} has {value!r}; expected values of the file's own classes with a `kind`"
            )
        if kind in taken or kind in found:
            raise ExtensionError(f"{file}: the name {kind!r} exists already; expected one of its own")
        found[kind] = value
    return found


def uses_members(value: Any) -> bool:
    """Returns whether a member of the installed file is anywhere in a value."""
    if isinstance(value, Value):
        own = type(value) in {type(example) for example in examples().values()}
        return own or any(uses_members(getattr(value, name)) for name in type(value).model_fields)
    return any(uses_members(item) for item in _items(value))


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


@dataclass(frozen=True)
class OrOwn:
    """Lets a closed union take members of the installed file, too, that derive from `base`."""

    base: type

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def read(value: Any, closed: core_schema.ValidatorFunctionWrapHandler) -> Any:
            kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
            example = examples(self.base).get(kind) if isinstance(kind, str) else None
            return closed(value) if example is None else type(example).model_validate(value)

        def write(value: Any, closed: Any, info: core_schema.SerializationInfo) -> Any:
            if isinstance(value, Value) and type(value).__module__ == MODULE:
                return value.model_dump(mode=info.mode)
            return closed(value)

        writer = core_schema.wrap_serializer_function_ser_schema(write, info_arg=True)
        return core_schema.no_info_wrap_validator_function(read, handler(source), serialization=writer)
