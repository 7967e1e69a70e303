"""From the labelled examples of a task to files of tokens. Knows no model, batch or step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainables.config.data import Tasks
from trainables.data import tokenizer
from trainables.data.arrow import write_table
from trainables.data.classification.labelled import Labelled, divide, hash_of
from trainables.data.sources.read import read_source
from trainables.data.split import SPLITS, Sources, Split

ENCODE = 1  # raised whenever the same examples would be split or encoded otherwise
CHUNK = 4_000  # examples that are encoded together


def text_fields(task: Tasks) -> dict[str, Any]:
    sources: Sources[Labelled] = read_source(task)
    return {
        "encode": ENCODE,
        "length": task.length,
        "examples": task.examples,
        "evaluate": task.evaluate,
        "num_labels": task.num_labels,
        "score": task.rule,
        **{name: hash_of(getattr(sources, name)) for name in SPLITS},
    }


fields = text_fields


def split(task: Tasks) -> Split[Labelled]:
    return divide(read_source(task), examples=task.examples, evaluate=task.evaluate)


def training_texts(_: Tasks, splits: Split[Labelled]) -> Sequence[str]:
    return [*splits.train.first, *(splits.train.second or ())]


def write(task: Tasks, splits: Split[Labelled], tok: Any, home: Path) -> dict[str, Any]:
    counts = {name: _write(getattr(splits, name), tok, task.length, home / f"{name}.arrow") for name in SPLITS}
    names = read_source(task).class_names
    for name in SPLITS if names else ():
        by_class = np.bincount(getattr(splits, name).labels, minlength=len(names)).tolist()
        counts[name]["classes"] = dict(zip(names, by_class, strict=True))
    facts = {
        "num_labels": task.num_labels,
        "class_names": names,
        "score": task.rule,
        "part_names": task.part_names,
        "is_pair": splits.train.second is not None,
    }
    return {"encode": ENCODE, "splits": counts, "task": facts}


def _write(table: Labelled, tok: Any, length: int, path: Path) -> dict[str, Any]:
    label = pa.float32() if table.labels.dtype == np.float32 else pa.int64()
    schema = pa.schema([("ids", pa.list_(pa.int32())), ("second", pa.int32()), ("label", label), ("part", pa.int8())])
    num_tokens, num_cut = 0, 0

    def blocks() -> Iterator[list[Any]]:
        nonlocal num_tokens, num_cut
        for start in range(0, len(table), CHUNK):
            some = table.pick(np.arange(start, min(start + CHUNK, len(table))))
            ids, seconds, is_cut = (list(column) for column in zip(*_encode(some, tok, length), strict=True))
            parts = np.zeros(len(some), np.int8) if some.parts is None else some.parts.astype(np.int8)
            num_tokens, num_cut = num_tokens + sum(map(len, ids)), num_cut + sum(is_cut)
            yield [ids, seconds, some.labels, parts]

    write_table(path, schema, blocks())
    return {"examples": len(table), "tokens": num_tokens, "truncated": num_cut / len(table)}


def _encode(table: Labelled, tok: Any, length: int) -> Iterator[tuple[NDArray[np.int32], int, bool]]:
    """Yields (ids, index at which the second text begins, whether a text was cut) for each example.

    A start token, if the tokenizer has one, then each text with an end token after it, as a corpus is packed and as BERT
    reads pairs. Examples that are too long are cut at the end of a text: of the longer one first.
    """
    start, end = tokenizer.ends(tok)
    head, tail = ([] if special is None else [special] for special in (start, end))
    columns = [tokenizer.encode(tok, texts) for texts in (table.first, table.second) if texts is not None]
    room = length - len(head) - len(tail) * len(columns)
    for texts in zip(*columns, strict=True):
        sizes = [len(ids) for ids in texts]
        kept = _fit(sizes, room)
        first, *second = ([*ids[:num], *tail] for ids, num in zip(texts, kept, strict=True))
        first = [*head, *first]
        yield np.array([*first, *chain(*second)], np.int32), len(first), kept != sizes


def _fit(sizes: list[int], room: int) -> list[int]:
    """Returns how many tokens of one or two texts are kept: the longer is cut until both are equally long, then both."""
    if sum(sizes) <= room:
        return sizes
    if len(sizes) == 1:
        return [room]
    shorter = min(*sizes, room // 2)
    return [shorter, room - shorter] if sizes[0] <= sizes[1] else [room - shorter, shorter]
