"""Columns of tables from data files and from the hub. Knows no split rule and no tokenizer."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow import csv as pacsv

from trainables.config.errors import DataError
from trainables.data.split import SPLITS, Table
from trainables.storage.files import is_local, matching, open_place
from trainables.storage.hub import looked_in, why_not

JSON = (".jsonl", ".json")  # an object a line, or one array of objects
TABLES = (".parquet", *JSON, ".csv")
SUFFIXES = (*TABLES, ".txt")
BLOCK = 1 << 26  # bytes; a row of CSV must fit into one block


class File(NamedTuple):
    """A file that exists. `state` changes when the file does."""

    uri: str
    state: str


class HubSplit(NamedTuple):
    """A split of a data set of the hub."""

    name: str
    config: str | None
    revision: str
    split: str


Place = tuple[File, ...] | HubSplit
Places = tuple[tuple[str, Place], ...]  # split -> the files, or the split of the hub, that hold it


class Wanted(NamedTuple):
    """The columns to read: `texts` hold strings, `others` anything; `fields` of a study name them, in messages."""

    texts: tuple[str, ...]
    others: tuple[str, ...]
    fields: Mapping[str, str]
    optional: tuple[str, ...] = ()  # columns of anything, read where they are there


def find_files(data: Any, suffixes: tuple[str, ...] = SUFFIXES) -> Places:
    """Finds the files of each split that a data set names."""
    named = {name: uri for name in SPLITS if (uri := getattr(data, name)) is not None}
    return tuple((name, find(uri, name, suffixes)) for name, uri in named.items())


def find_tables(data: Any) -> Places:
    return find_files(data, TABLES)


def find_hub(data: Any) -> Places:
    """Names the split of the hub for each split that a data set names."""
    named = {name: split for name in SPLITS if (split := getattr(data, name)) is not None}
    return tuple((name, HubSplit(data.name, data.config, data.revision, split)) for name, split in named.items())


def find(uri: str, what: str, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[File, ...]:
    """Returns the files that a path, glob or URI names, sorted; `what` names the field in messages."""
    try:
        fs, path = open_place(uri)
        if is_local(uri):
            paths = {place: place for place in matching(path)}
        else:
            places = [path] if fs.isfile(path) else sorted(fs.glob(path)) if re.search(r"[*?\[]", path) else []
            paths = {place: fs.unstrip_protocol(place) for place in places}
        # the very path keeps how the user wrote it
        files = tuple(
            File(uri if name == uri else name, str(fs.ukey(place)))
            for place, name in paths.items()
            if not fs.isdir(place)
        )
    except (ImportError, ValueError, OSError) as error:  # no such protocol, its package missing, no access
        raise DataError(f"{what}: cannot look into {uri!r}: {error}") from error
    if not files:
        is_folder = f"it is a folder; name its files, as {repr(uri)[1:-1].rstrip('/')}/*.parquet"
        raise DataError(f"{what}: no file matches {uri!r}: {is_folder if fs.isdir(path) else looked_in(uri)}")
    for file in files:
        if not file.uri.endswith(suffixes):
            raise DataError(
                f"{what}: cannot tell the format of {file.uri!r}; expected one of the suffixes {', '.join(suffixes)}"
            )
    return files


def column_names(file: File, *, what: str) -> tuple[str, ...]:
    """Returns the columns of a file, of JSON those of its first row; of a .txt file `text`. Raises DataError."""
    if file.uri.endswith(".txt"):
        return ("text",)
    if file.uri.endswith(JSON):
        return tuple(next(_objects(file.uri, what), ("", {}))[1])
    fs, path = open_place(file.uri)
    try:
        return tuple(pads.dataset(path, filesystem=fs, format=_format(file.uri, ())).schema.names)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(file.uri, what, error) from error


def read(place: Place, wanted: Wanted, *, what: str) -> Iterator[Table]:
    """Yields a table for each file, or for the split of the hub; in a CSV file all columns hold strings."""
    if isinstance(place, HubSplit):
        yield _read_hub(place, wanted, what)
        return
    for file in place:
        yield Table(repr(file.uri), _columns_of(file.uri, wanted, what))


def read_documents(place: Place, text: str, *, what: str) -> list[str]:
    """Returns one document per row of column `text` (of a .txt file per block between blank lines), without empty ones."""
    tables = read(place, Wanted((text,), (), {text: "columns.text"}), what=what)
    kept = [document for table in tables for document in table.columns[text] if document and not document.isspace()]
    if not kept:
        raise DataError(f"{what}: no text in it; give at least one document that is not blank")
    return kept


def _read_hub(place: HubSplit, wanted: Wanted, what: str) -> Table:
    import datasets  # here, since it takes a second and most studies need no hub
    from datasets.exceptions import DatasetsError

    name, config, revision, split = place
    try:
        rows = datasets.load_dataset(name, config, revision=revision, split=split)
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:  # no such split, config or data set; no network
        where = f"{name!r}" + (f", config {config!r}" if config else "") + f" at {revision!r}"
        reason = why_not(name, "data set", error)
        raise DataError(f"{what}: cannot load split {split!r} of hub data set {where}: {reason}") from error
    _check_columns(wanted, rows.features.arrow_schema, name, what)
    columns = _present(wanted, rows.column_names)
    return Table(f"split {split!r} of {name!r}", {column: rows.data.column(column).to_pylist() for column in columns})


def _columns_of(uri: str, wanted: Wanted, what: str) -> dict[str, list[Any]]:
    if uri.endswith(JSON):
        return _columns_of_json(uri, wanted, what)
    fs, path = open_place(uri)
    try:
        if uri.endswith(".txt"):
            return {wanted.texts[0]: list(re.split(r"\n\s*\n", fs.read_text(path, encoding="utf-8-sig")))}
        rows = pads.dataset(path, filesystem=fs, format=_format(uri, (*wanted.texts, *wanted.others, *wanted.optional)))
        _check_columns(wanted, rows.schema, uri, what)
        return dict(rows.to_table(columns=_present(wanted, rows.schema.names)).to_pydict())
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(uri, what, error) from error


def _columns_of_json(uri: str, wanted: Wanted, what: str) -> dict[str, list[Any]]:
    """Reads by Python's own reader: Arrow's takes a date in a text for a time, and rejects columns that nobody wants."""
    columns: dict[str, list[Any]] = {column: [] for column in (*wanted.texts, *wanted.others, *wanted.optional)}
    names: dict[str, None] = {}
    for where, row in _objects(uri, what):
        names |= dict.fromkeys(row)
        for column, values in columns.items():
            value = row.get(column)
            if column in wanted.texts and not (value is None or isinstance(value, str)):
                which = f"{what}: {where} of {uri!r}: column {column!r}"
                raise _no_strings(which, type(value).__name__, wanted.fields.get(column))
            values.append(value)
    if not names:
        raise DataError(
            f"{what}: {uri!r} has no rows; give at least one object with {' and '.join(map(repr, columns))}"
        )
    for column in (*wanted.texts, *wanted.others):
        _check_is_there(column, tuple(names), uri, what, field=wanted.fields.get(column))
    return columns


def _present(wanted: Wanted, names: Sequence[str]) -> list[str]:
    """Returns the columns to read of a table that has these; each once."""
    optional = (column for column in wanted.optional if column in names)
    return list(dict.fromkeys((*wanted.texts, *wanted.others, *optional)))


def _objects(uri: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (line or row, object) of a JSON file."""
    fs, path = open_place(uri)
    number = 0
    try:
        with fs.open(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                if line.lstrip()[:1] != "[":
                    each: Iterable[tuple[str, Any]] = [(f"line {number}", _parsed(line.rstrip()))]
                else:  # a list is no row, so this is the array of all of them
                    each = ((f"row {i}", row) for i, row in enumerate(_parsed(line + file.read()), 1))
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


def _parsed(text: str) -> Any:
    """Parses JSON. Half of a surrogate pair, which no encoding can hold, becomes U+FFFD."""
    try:
        if re.search(r"\\u[dD][89a-fA-F]", text):
            whole = json.dumps(json.loads(text), ensure_ascii=False)
            text = whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; objects within objects without end
        raise json.JSONDecodeError(str(error), text, 0) from error


def _unreadable(uri: str, what: str, error: Exception) -> DataError:
    first_line = str(error).strip().split("\n")[0]
    return DataError(f"{what}: cannot read {uri!r} as its suffix says: {first_line}")


def _format(uri: str, columns: Sequence[str]) -> Any:
    if uri.endswith(".parquet"):
        return "parquet"
    return pads.CsvFileFormat(
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        read_options=pacsv.ReadOptions(block_size=BLOCK),
        convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),  # "1984" is text here
    )


def _check_columns(wanted: Wanted, schema: Any, where: str, what: str) -> None:
    for column in dict.fromkeys((*wanted.texts, *wanted.others)):
        field = wanted.fields.get(column)
        _check_is_there(column, schema.names, where, what, field=field)
        kind, is_text = schema.field(column).type, column in wanted.texts
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        if is_text and not any(
            test(values) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        ):
            raise _no_strings(f"{what}: column {column!r} of {where!r}", kind, field)


def _check_is_there(column: str, names: Sequence[str], where: str, what: str, *, field: str | None) -> None:
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; set {field} to one of them"
        there = f"{what}: no column {column!r} in {where!r}; there is {', '.join(names)}"
        raise DataError(there + (hint if field else ""))


def _no_strings(which: str, kind: Any, field: str | None) -> DataError:
    must = f"{field} must name one of strings" if field else "it must hold strings"
    return DataError(f"{which} holds {kind}; {must}")
