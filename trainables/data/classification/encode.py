"""From the labelled examples of a task to token files. Knows no model, batch or step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainables.config.data import Glue, LabelledFiles, PythonTask, SameTokenizer, Tasks
from trainables.data import tokenizer
from trainables.data.classification.labelled import SPLITS, Divided, Labelled, Sources, divide, hash_of
from trainables.data.sources import glue, labelled_files, python_tasks
from trainables.metrics.task_scores import part_names, rule_of

ENCODE = 1  # raised whenever the same examples would be split or encoded otherwise
CHUNK = 4_000  # examples that are encoded together


def load_task(task: Tasks) -> Sources:
    """Reads the sources; what was read stays in memory as long as the files stay as they are."""
    found: Any = None
    if isinstance(task, Glue):
        found = glue.find(task)
    elif isinstance(task, LabelledFiles):
        found = labelled_files.find(task)
    # only what says where the examples are, and what their labels mean, belongs to the key
    source = task.model_copy(
        update={"tokenizer": SameTokenizer(), "length": 128, "examples": None, "evaluate": None}
        | ({"score": None} if isinstance(task, LabelledFiles) else {})
    )
    return _load(source, tuple(found.items()) if found is not None else ())


@lru_cache(maxsize=4)
def _load(source: Tasks, found: tuple[tuple[str, Any], ...]) -> Sources:
    match source:
        case Glue():
            return glue.load(source, dict(found))
        case LabelledFiles():
            return labelled_files.load(source, dict(found))
        case PythonTask(task="topic"):
            return python_tasks.topic()
        case PythonTask():
            return python_tasks.signature()


def class_names(task: Tasks) -> tuple[str, ...]:
    """As they are shown; none of a regression."""
    match task:
        case Glue():
            return glue.CLASSES[task.task]
        case LabelledFiles():
            return tuple(map(str, task.classes or ()))
        case PythonTask(task="topic"):
            return tuple(python_tasks.TOPICS)
        case PythonTask():
            return ("another", "described")


def divided(task: Tasks) -> Divided:
    """The examples of a task, split and cut to the wanted number."""
    return divide(load_task(task), examples=task.examples, evaluate=task.evaluate)


def task_fields(task: Tasks) -> dict[str, Any]:
    """What a fingerprint is made of, but for the tokenizer: the text and whatever else changes a number."""
    sources = load_task(task)
    return {
        "encode": ENCODE,
        "length": task.length,
        "examples": task.examples,
        "evaluate": task.evaluate,
        "num_labels": task.num_labels,
        "score": rule_of(task),
        **{name: hash_of(getattr(sources, name)) for name in SPLITS},
    }


def training_texts(task: Tasks) -> list[str]:
    """For a tokenizer."""
    train = divided(task).train
    return [*train.first, *(train.second or ())]


def write_task(task: Tasks, tok: Any, home: Path) -> dict[str, Any]:
    """Fills a folder; returns what about.json tells of it."""
    splits = divided(task)
    tok.save_pretrained(str(home / "tokenizer"))
    counts = {name: _write(getattr(splits, name), tok, task.length, home / f"{name}.arrow") for name in SPLITS}
    names = class_names(task)
    for name in SPLITS if names else ():
        by_class = np.bincount(getattr(splits, name).labels, minlength=len(names)).tolist()
        counts[name]["classes"] = dict(zip(names, by_class, strict=True))
    return {
        "encode": ENCODE,
        "length": task.length,
        "splits": counts,
        "removed_duplicates": splits.removed,
        "tokenizer_identity": tokenizer.identity(tok),
        "vocab_size": tokenizer.num_ids(tok),
        "task": {
            "num_labels": task.num_labels,
            "class_names": names,
            "score": rule_of(task),
            "part_names": part_names(task),
            "is_pair": splits.train.second is not None,
        },
    }


def _write(table: Labelled, tok: Any, length: int, path: Path) -> dict[str, Any]:
    label = pa.float32() if table.labels.dtype == np.float32 else pa.int64()
    columns = [("ids", pa.list_(pa.int32())), ("second", pa.int32()), ("label", label), ("part", pa.int8())]
    num_tokens, num_cut = 0, 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema(columns)) as writer:
        for start in range(0, len(table), CHUNK):
            some = table.pick(np.arange(start, min(start + CHUNK, len(table))))
            encoded = list(_encode(some, tok, length))
            parts = np.zeros(len(some), np.int8) if some.parts is None else some.parts.astype(np.int8)
            ids = pa.array([ids for ids, _, _ in encoded], pa.list_(pa.int32()))
            second = pa.array([second for _, second, _ in encoded], pa.int32())
            writer.write_batch(
                pa.record_batch([ids, second, pa.array(some.labels, label), pa.array(parts)], schema=pa.schema(columns))
            )
            num_tokens += sum(len(ids) for ids, _, _ in encoded)
            num_cut += sum(is_cut for _, _, is_cut in encoded)
    return {"examples": len(table), "tokens": num_tokens, "truncated": num_cut / len(table)}


def _encode(table: Labelled, tok: Any, length: int) -> Iterator[tuple[NDArray[np.int32], int, bool]]:
    """(ids, where the second text begins, whether something was cut) of each example.

    A start token, if the tokenizer has one, then each text with an end token after it, as a corpus is packed and as BERT
    reads pairs. What is too long is cut at its end: the longer text first.
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
    """How much is kept of one text or two: the longer one is cut until both are as long, then both (`longest_first`)."""
    if sum(sizes) <= room:
        return sizes
    if len(sizes) == 1:
        return [room]
    shorter = min(*sizes, room // 2)
    return [shorter, room - shorter] if sizes[0] <= sizes[1] else [room - shorter, shorter]
