"""Documents from data files and from the hub, as lists of text. Knows no split rule and no tokenizer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.json as pajson
from pyarrow import csv as pacsv

from trainables.data import DataError
from trainables.spec import Hub

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".txt")  # .json too holds one object a line
BLOCK = 1 << 26  # bytes; a JSON line must fit into one block


class Place(NamedTuple):
    """A file that was found. `state` changes when the file does."""

    uri: str
    state: str


def find(uri: str, what: str) -> tuple[Place, ...]:
    """The files that a path, glob or URI names, sorted; `what` names the field in messages."""
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        paths = [path] if fs.isfile(path) else sorted(fs.glob(path)) if re.search(r"[*?\[]", path) else []
        found = tuple(Place(fs.unstrip_protocol(p), str(fs.ukey(p))) for p in paths if not fs.isdir(p))
    except (ImportError, ValueError, OSError) as error:  # no such protocol, its package missing, no access
        raise DataError(f"{what}: cannot look into {uri!r}: {error}") from error
    if not found:
        hint = f"it is a folder; name its files, as {uri.rstrip('/')}/*.parquet" if fs.isdir(path) else "check the path"
        raise DataError(f"{what}: no file matches {uri!r}: {hint}")
    for place in found:
        if not place.uri.endswith(SUFFIXES):
            raise DataError(f"{what}: cannot tell the format of {place.uri!r}; valid suffixes: {', '.join(SUFFIXES)}")
    return found


def read(places: Iterable[Place], *, text: str, what: str) -> list[str]:
    """One document per row of column `text`; in .txt one per block between blank lines."""
    return some_text((document for place in places for document in _read(place.uri, text, what)), what)


def read_hub(data: Hub, split: str, *, what: str) -> list[str]:
    """One document per row of a split of a hub data set."""
    import datasets  # here, since it takes a second and most studies need no hub
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(data.name, data.config, revision=data.revision, split=split)
    except (
        DatasetsError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # unknown split or config, no such set, no network
        where = f"{data.name!r}" + (f", config {data.config!r}" if data.config else "") + f" at {data.revision!r}"
        raise DataError(f"{what}: cannot load split {split!r} of hub data set {where}: {_first_line(error)}") from error
    text = data.columns.text
    _check_column(text, rows.features.arrow_schema, data.name, what)
    return some_text(rows.data.column(text).to_pylist(), what)


def some_text(documents: Iterable[str | None], what: str) -> list[str]:
    """Without empty documents; it is an error if nothing is left."""
    kept = [document for document in documents if document and not document.isspace()]
    if not kept:
        raise DataError(f"{what}: no text in it; give at least one document that is not blank")
    return kept


def _read(uri: str, text: str, what: str) -> list[str | None]:
    fs, path = fsspec.core.url_to_fs(uri)
    try:
        if uri.endswith(".txt"):
            return list(re.split(r"\n\s*\n", fs.read_text(path, encoding="utf-8")))
        rows = pads.dataset(path, filesystem=fs, format=_format(uri, text))
        _check_column(text, rows.schema, uri, what)
        documents: list[str | None] = rows.to_table(columns=[text]).column(0).to_pylist()
        return documents
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{what}: cannot read {uri!r} as its suffix says: {_first_line(error)}") from error


def _format(uri: str, text: str) -> Any:
    if uri.endswith(".parquet"):
        return "parquet"
    if uri.endswith(".csv"):
        return pads.CsvFileFormat(
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            read_options=pacsv.ReadOptions(block_size=BLOCK),
            convert_options=pacsv.ConvertOptions(column_types={text: pa.string()}),  # "1984" is text here
        )
    return pads.JsonFileFormat(read_options=pajson.ReadOptions(block_size=BLOCK))


def _check_column(text: str, schema: Any, where: str, what: str) -> None:
    if text not in schema.names:
        near = difflib.get_close_matches(text, schema.names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; set columns.text to one of them"
        raise DataError(f"{what}: no column {text!r} in {where!r}; there is {', '.join(schema.names)}{hint}")
    kind = schema.field(text).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{what}: column {text!r} of {where!r} holds {kind}; columns.text must name one of strings")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
