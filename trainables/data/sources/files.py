"""Documents and columns from data files and from the hub. Knows no split rule and no tokenizer."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow import csv as pacsv

from trainables.config.data import Hub
from trainables.config.errors import DataError
from trainables.storage.hub import why_not

JSON = (".jsonl", ".json")  # an object a line, or one array of objects
TABLES = (".parquet", *JSON, ".csv")
SUFFIXES = (*TABLES, ".txt")
BLOCK = 1 << 26  # bytes; a row of CSV must fit into one block


class Place(NamedTuple):
    """A file that was found. `state` changes when the file does."""

    uri: str
    state: str


class Columns(NamedTuple):
    """Columns of one table, as lists."""

    where: str  # in messages
    texts: list[list[str | None]]
    labels: list[Any]


class Table(NamedTuple):
    """Columns of one table by name."""

    where: str  # in messages
    columns: dict[str, list[Any]]


def find(uri: str, what: str, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[Place, ...]:
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
        if not place.uri.endswith(suffixes):
            raise DataError(f"{what}: cannot tell the format of {place.uri!r}; valid suffixes: {', '.join(suffixes)}")
    return found


def read(places: Iterable[Place], *, text: str, what: str) -> list[str]:
    """One document per row of column `text`; in .txt one per block between blank lines."""
    return some_text((document for place in places for document in _read(place.uri, text, what)), what)


def read_columns(
    places: Iterable[Place], texts: Sequence[str], label: str, *, fields: Mapping[str, str], what: str
) -> Iterator[Columns]:
    """Columns of texts and one of labels, file by file; in a CSV file labels are text. `fields` of a spec name columns."""
    for table in read_tables(places, texts, (label,), fields=fields, what=what):
        yield _columns(table, texts, label)


def read_tables(
    places: Iterable[Place], texts: Sequence[str], others: Sequence[str], *, fields: Mapping[str, str], what: str
) -> Iterator[Table]:
    """Columns that hold strings, and others that hold anything, file by file; in a CSV file all hold strings."""
    for place in places:
        yield Table(repr(place.uri), _columns_of(place.uri, texts, others, fields, what))


def read_hub(data: Hub, split: str, *, what: str) -> list[str]:
    """One document per row of a split of a hub data set."""
    rows = _hub_rows(data.name, data.config, data.revision, split, what)
    text = data.columns.text
    _check_column(text, rows.features.arrow_schema, data.name, what)
    return some_text(rows.data.column(text).to_pylist(), what)


def read_hub_columns(
    name: str, config: str | None, revision: str, split: str, texts: Sequence[str], label: str, *, what: str
) -> Columns:
    """Columns of texts and one of labels of a split of a hub data set."""
    return _columns(read_hub_table(name, config, revision, split, texts, (label,), fields={}, what=what), texts, label)


def _columns(table: Table, texts: Sequence[str], label: str) -> Columns:
    return Columns(table.where, [table.columns[text] for text in texts], table.columns[label])


def read_hub_table(
    name: str,
    config: str | None,
    revision: str,
    split: str,
    texts: Sequence[str],
    others: Sequence[str],
    *,
    fields: Mapping[str, str],
    what: str,
) -> Table:
    """The same of a split of a hub data set."""
    rows, wanted = _hub_rows(name, config, revision, split, what), tuple(dict.fromkeys((*texts, *others)))
    for column in wanted:
        _check_column(column, rows.features.arrow_schema, name, what, fields.get(column), is_text=column in texts)
    return Table(f"split {split!r} of {name!r}", {column: rows.data.column(column).to_pylist() for column in wanted})


def _hub_rows(name: str, config: str | None, revision: str, split: str, what: str) -> Any:
    """A split of a hub data set."""
    import datasets  # here, since it takes a second and most studies need no hub
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(name, config, revision=revision, split=split)
    except (
        DatasetsError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # unknown split or config, no such set, no network
        where = f"{name!r}" + (f", config {config!r}" if config else "") + f" at {revision!r}"
        reason = why_not(name, "data set", error)
        raise DataError(f"{what}: cannot load split {split!r} of hub data set {where}: {reason}") from error


def some_text(documents: Iterable[str | None], what: str) -> list[str]:
    """Without empty documents; it is an error if nothing is left."""
    kept = [document for document in documents if document and not document.isspace()]
    if not kept:
        raise DataError(f"{what}: no text in it; give at least one document that is not blank")
    return kept


def _read(uri: str, text: str, what: str) -> list[str | None]:
    if not uri.endswith(".txt"):
        return _columns_of(uri, (text,), (), {text: "columns.text"}, what)[text]
    fs, path = fsspec.core.url_to_fs(uri)
    try:
        return list(re.split(r"\n\s*\n", fs.read_text(path, encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise _unreadable(uri, what, error) from error


def _columns_of(
    uri: str, texts: Sequence[str], others: Sequence[str], fields: Mapping[str, str], what: str
) -> dict[str, list[Any]]:
    """Columns of a file, of which `texts` are strings."""
    columns = list(dict.fromkeys((*texts, *others)))
    if uri.endswith(JSON):
        return _columns_of_json(uri, columns, texts, fields, what)
    fs, path = fsspec.core.url_to_fs(uri)
    try:
        rows = pads.dataset(path, filesystem=fs, format=_format(uri, columns))
        for column in columns:
            _check_column(column, rows.schema, uri, what, fields.get(column), is_text=column in texts)
        return dict(rows.to_table(columns=columns).to_pydict())
    except pa.ArrowException as error:
        raise _unreadable(uri, what, error) from error


def _columns_of_json(
    uri: str, columns: Sequence[str], texts: Sequence[str], fields: Mapping[str, str], what: str
) -> dict[str, list[Any]]:
    """By Python's own reader: Arrow's takes a date in a text for a time, and has a say on columns that nobody asked for."""
    found: dict[str, list[Any]] = {column: [] for column in columns}
    there: dict[str, None] = {}
    for where, row in _objects(uri, what):
        there |= dict.fromkeys(row)
        for column, values in found.items():
            value = row.get(column)
            if column in texts and not (value is None or isinstance(value, str)):
                at = f"{what}: {where} of {uri!r}: column {column!r}"
                raise _no_strings(at, type(value).__name__, fields.get(column))
            values.append(value)
    if not there:
        raise DataError(
            f"{what}: {uri!r} has no rows; give at least one object with {' and '.join(map(repr, columns))}"
        )
    for column in columns:
        _check_is_there(column, tuple(there), uri, what, fields.get(column))
    return found


def _objects(uri: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it stands, and the object."""
    fs, path = fsspec.core.url_to_fs(uri)
    number = 0
    try:
        with fs.open(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                if not line.lstrip().startswith("["):
                    each: Iterable[tuple[str, Any]] = [(f"line {number}", json.loads(line.rstrip()))]
                else:  # a list is no row, so this is the array of all of them
                    each = ((f"row {i}", row) for i, row in enumerate(json.loads(line + file.read()), 1))
                for where, row in each:
                    if not isinstance(row, dict):
                        raise DataError(
                            f"{what}: {where} of {uri!r} is {type(row).__name__}; expected an object with a value for each "
                            f"column, on a line by itself or in one array of all"
                        )
                    yield where, row
    except json.JSONDecodeError as error:
        place = f"line {number + error.lineno - 1}, column {error.colno}: {error.msg}"
        raise _unreadable(uri, what, ValueError(place)) from error
    except UnicodeDecodeError as error:
        raise _unreadable(uri, what, ValueError(f"after line {number}: {error}")) from error


def _unreadable(uri: str, what: str, error: Exception) -> DataError:
    return DataError(f"{what}: cannot read {uri!r} as its suffix says: {_first_line(error)}")


def _format(uri: str, columns: Sequence[str]) -> Any:
    if uri.endswith(".parquet"):
        return "parquet"
    return pads.CsvFileFormat(
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        read_options=pacsv.ReadOptions(block_size=BLOCK),
        convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),  # "1984" is text here
    )


def _check_column(
    column: str, schema: Any, where: str, what: str, field: str | None = "columns.text", *, is_text: bool = True
) -> None:
    """`field`: what in a spec names the column, if anything does."""
    _check_is_there(column, schema.names, where, what, field)
    kind = schema.field(column).type
    if is_text and not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise _no_strings(f"{what}: column {column!r} of {where!r}", kind, field)


def _check_is_there(column: str, names: Sequence[str], where: str, what: str, field: str | None) -> None:
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; set {field} to one of them"
        there = f"{what}: no column {column!r} in {where!r}; there is {', '.join(names)}"
        raise DataError(there + (hint if field else ""))


def _no_strings(at: str, kind: Any, field: str | None) -> DataError:
    return DataError(f"{at} holds {kind}; {f'{field} must name one of strings' if field else 'it must hold strings'}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
