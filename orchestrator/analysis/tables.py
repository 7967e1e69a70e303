"""The three tables, built from the records and ends of trials, which remain in plain files.

`results`: one row per number. `trials`: one row per trial. `examples`: one row per answer to an example of test, of the
trials that a claim or a confirmation compares. The schemas are fixed; users build on them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from trainables.storage.files import Storage, attempts

RESULTS = pa.schema(
    [
        ("study", pa.string()),
        ("trial", pa.string()),
        ("point", pa.string()),  # the arm's name (of a confirmation, with how it ran), or p000 … of the search
        ("arm", pa.string()),  # null for a searched point
        ("seed", pa.int64()),
        ("kind", pa.string()),  # trial | tune | teacher | confirm
        ("planned", pa.bool_()),
        ("model", pa.string()),
        ("phase", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),  # train | dev | test | system
        ("metric", pa.string()),
        ("step", pa.int64()),  # optimizer steps of the phase
        ("progress", pa.float64()),  # fraction of its budget
        ("tokens", pa.int64()),  # non-padding input tokens of the phase over all ranks
        ("seconds", pa.float64()),  # wall time of the phase over attempts, without evaluation
        ("device_seconds", pa.float64()),
        ("flops", pa.float64()),
        ("t", pa.int64()),  # UTC, ms
        ("value", pa.float64()),
    ]
)
TRIALS = pa.schema(
    [
        ("trial", pa.string()),
        ("study", pa.string()),
        ("point", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("kind", pa.string()),
        ("planned", pa.bool_()),
        ("params", pa.string()),  # json
        ("status", pa.string()),  # running | ended | stopped | failed
        ("reason", pa.string()),
        ("attempts", pa.int64()),
        ("node", pa.string()),
        ("started", pa.int64()),
        ("ended", pa.int64()),
        ("phases", pa.string()),  # json: phase -> key, reused, flops, seconds, device_seconds, tokens
        ("upstream_flops", pa.float64()),
        ("upstream_seconds", pa.float64()),
        ("peak_memory", pa.float64()),
    ]
)
_WORD = pa.dictionary(pa.int32(), pa.string())  # a million rows have few distinct strings
EXAMPLES = pa.schema(
    [
        ("trial", _WORD),
        ("point", _WORD),
        ("arm", _WORD),
        ("seed", pa.int64()),
        ("kind", _WORD),  # trial (of an arm) | confirm
        ("planned", pa.bool_()),
        ("model", _WORD),
        ("phase", _WORD),  # with its branch, phase[data]
        ("task", _WORD),  # the data set
        ("split", _WORD),  # test
        ("part", pa.int64()),  # of a test set that has several; else 0
        ("example", pa.int64()),
        ("label", pa.float64()),  # class or number; null where the data are a corpus, as `prediction`
        ("prediction", pa.float64()),
        ("loss", pa.float64()),  # nats (squared error for numbers), summed over the example's supervised positions
        ("count", pa.int64()),  # of these positions; 1 for a task
        ("cluster", pa.int64()),  # examples of one document or text have one; null where that is unknown
        ("scores", _WORD),  # of replies: JSON, by the metrics that the data set names; else null
        ("samples", pa.list_(pa.float32())),  # the score of each drawn reply; null where none is drawn
    ]
)
RECORD = RESULTS.names[RESULTS.names.index("model") :]  # the columns of one record, all of which it must have


def no_examples() -> pd.DataFrame:
    return _compact(EXAMPLES.empty_table())


TABLES = {"results": RESULTS, "trials": TRIALS, "examples": EXAMPLES}


@dataclass(frozen=True)
class Tables:
    results: pd.DataFrame
    trials: pd.DataFrame
    examples: pd.DataFrame = field(default_factory=no_examples)


def records_file(storage: Storage, trial: str) -> bytes:
    """Reads the records of a trial's last attempt, which begin with those kept from the attempt before."""
    for attempt in reversed(attempts(storage, f"trials/{trial}")):
        text = storage.read(f"{attempt}/records.jsonl")
        if text is not None:
            return text
    return b""


def parse_records(text: bytes) -> list[dict[str, Any]]:
    """Parses whole lines only, since a kill may have cut off the last one."""
    return [json.loads(line) for line in text.split(b"\n")[:-1] if line]


def tables(
    study: str,
    trials: Iterable[Mapping[str, Any]],
    records: Mapping[str, list[dict[str, Any]]],
    answers: Callable[[str], pd.DataFrame | None] | None = None,
) -> Tables:
    """Builds the tables.

    Args:
        trials: rows of the trials table.
        records: by trial id.
        answers: returns the answers to examples of a phase by its key; None where the phase has none.
    """
    rows = list(trials)
    trial_rows = [
        {"study": study, **row, "params": json.dumps(row["params"]), "phases": json.dumps(row["phases"])}
        for row in rows
    ]
    result_rows = []
    for row in trial_rows:
        of_trial = {key: row[key] for key in RESULTS.names if key not in RECORD}
        result_rows += [of_trial | {key: record[key] for key in RECORD} for record in records.get(row["trial"], ())]
    examples = no_examples() if answers is None else _examples(rows, answers)
    return Tables(_frame(result_rows, RESULTS), _frame(trial_rows, TRIALS), examples)


def _frame(rows: list[dict[str, Any]], schema: pa.Schema) -> pd.DataFrame:
    frame: pd.DataFrame = pa.Table.from_pylist(rows, schema=schema).to_pandas()  # ignores other keys
    return frame


def _examples(trials: Iterable[Mapping[str, Any]], answers: Callable[[str], pd.DataFrame | None]) -> pd.DataFrame:
    """Collects the answers of planned trials of arms and confirmations; the many searched points are compared by records."""
    parts, read = [EXAMPLES.empty_table()], dict[str, pa.Table | None]()
    own = [field for field in EXAMPLES if field.name in ("model", "task", "split", "part", *EXAMPLES.names[11:])]
    for trial in trials:
        if not trial["planned"] or not (trial["kind"] == "confirm" or (trial["kind"] == "trial" and trial["arm"])):
            continue
        for phase, done in trial["phases"].items():
            key = done["key"]
            if key not in read:
                read[key] = _answers_of(key, answers, pa.schema(own))
            if (table := read[key]) is None:
                continue
            about = {**trial, "phase": phase}
            columns = [
                table[field.name] if field in own else _constant(about[field.name], len(table), field.type)
                for field in EXAMPLES
            ]
            parts.append(pa.Table.from_arrays(columns, schema=EXAMPLES))
    return _compact(pa.concat_tables(parts).unify_dictionaries())


def _compact(table: pa.Table) -> pd.DataFrame:
    """Converts a table, whose lists stay Arrow's: a million lists are not as many objects."""
    frame: pd.DataFrame = table.to_pandas(
        types_mapper=lambda kind: pd.ArrowDtype(kind) if pa.types.is_list(kind) else None
    )
    return frame


def _answers_of(key: str, answers: Callable[[str], pd.DataFrame | None], schema: pa.Schema) -> pa.Table | None:
    found = answers(key)
    if found is None or not (found["split"] == "test").any():
        return None
    late = {name: None for name in ("cluster", "scores", "samples") if name not in found}  # which older storages lack
    found = found.assign(**late)
    return pa.Table.from_pandas(found[found["split"] == "test"], schema=schema, preserve_index=False)


def _constant(value: Any, length: int, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_dictionary(kind):
        return pa.repeat(pa.scalar(value, kind), length)
    indices = pa.repeat(pa.scalar(None if value is None else 0, pa.int32()), length)
    return pa.DictionaryArray.from_arrays(indices, pa.array([] if value is None else [value], pa.string()))


def write(tables: Tables, home: Storage) -> None:
    """Writes the tables into a study's folder."""
    for name, schema in TABLES.items():
        buffer = io.BytesIO()
        table = pa.Table.from_pandas(getattr(tables, name), schema=schema, preserve_index=False)
        # without pandas' notes on types, of which it cannot read back that of lists
        pq.write_table(table.replace_schema_metadata(None), buffer, compression="zstd")
        home.write(f"{name}.parquet", buffer.getvalue())


def read(home: Storage, names: Iterable[str] = TABLES) -> Tables | None:
    """Reads the tables of a study's folder; None where there are none. Older tables have no examples.

    `names`: results and trials are enough for numbers over seeds, and small.
    """
    frames = {}
    for name in names:
        content = home.read(f"{name}.parquet")
        if content is not None:
            frames[name] = _compact(pq.read_table(io.BytesIO(content)))
        elif name != "examples":
            return None
    return Tables(**frames)
