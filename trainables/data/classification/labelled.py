"""Labelled examples: reads labels, and splits the examples. Knows no source and no tokenizer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainables.config.errors import DataError
from trainables.data.split import SPLITS, Sources, Split, Table, hash_texts, smallest_hashes

CUT, MOST = 0.1, 1000  # share of the examples of train, and their number at most, for each missing one of dev and test

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Labelled:
    """Texts or pairs of texts; labels are classes (int64) or numbers (float32)."""

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    labels: NDArray[Any]
    parts: NDArray[np.int64] | None = None  # which part of a test set that has several

    def __len__(self) -> int:
        return len(self.first)

    def pick(self, rows: NDArray[Any]) -> Labelled:
        """Returns the examples of these indices, or of a mask."""
        chosen = np.arange(len(self))[rows]
        first, second = (None if t is None else tuple(t[i] for i in chosen) for t in (self.first, self.second))
        assert first is not None
        return Labelled(first, second, self.labels[chosen], None if self.parts is None else self.parts[chosen])


def labelled(
    table: Table, texts: Sequence[str], label: str, *, classes: Sequence[str | int] | None, what: str
) -> Labelled:
    """Makes examples of one or two columns of texts and a column of labels. Raises DataError where a row has no text.

    `classes` None: labels are numbers. `what` names the split in messages.
    """
    where, labels = f"{what}: {table.where}", table.columns[label]
    columns = [[text or "" for text in table.columns[name]] for name in texts]
    for row, together in enumerate(zip(*columns, strict=True), 1):
        if not any(text and not text.isspace() for text in together):
            raise DataError(f"{where}: row {row} has no text; remove it")
    values = _numbers(labels, where) if classes is None else _classes(labels, classes, where)
    return Labelled(tuple(columns[0]), tuple(columns[1]) if len(columns) > 1 else None, values)


def _classes(labels: Sequence[Any], classes: Sequence[str | int], where: str) -> NDArray[np.int64]:
    index = {str(name): i for i, name in enumerate(classes)}
    numbers = [_as_number(name) for name in classes]
    unique = ((number, i) for i, number in enumerate(numbers) if number is not None and numbers.count(number) == 1)
    by_number: dict[float | None, int] = dict(unique)
    values = [index.get(_as_text(label), by_number.get(_as_number(label), -1)) for label in labels]
    if -1 in values:
        row = values.index(-1)
        says = "no label" if labels[row] is None else f"label {labels[row]!r}"
        hidden = ", which stands for a hidden one" if labels[row] == -1 else ""
        raise DataError(f"{where}: row {row + 1} has {says}{hidden}; expected {', '.join(index)}")
    return np.array(values, np.int64)


def _as_text(label: Any) -> str:
    """Returns a label as text, whatever type its file gave it: true, 1 and 1.0 are `true`, `1` and `1`."""
    if isinstance(label, bool):
        return str(label).lower()
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _as_number(label: Any) -> float | None:
    """Returns the number that a label stands for: in CSV all labels are texts, as `1.0` or `True`."""
    if isinstance(label, str) and label.lower() in ("true", "false"):
        return float(label.lower() == "true")
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def _numbers(labels: Sequence[Any], where: str) -> NDArray[np.float32]:
    values = np.empty(len(labels), np.float32)
    for row, label in enumerate(labels):
        try:
            values[row] = label
        except (TypeError, ValueError):
            values[row] = math.nan
        if not np.isfinite(values[row]):
            says = "no label" if label is None else f"label {label!r}"
            raise DataError(f"{where}: row {row + 1} has {says}; expected numbers, or list the labels in `classes`")
    return values


def joined(tables: Sequence[Labelled], *, as_parts: bool = False) -> Labelled:
    """Concatenates tables; `as_parts`: each becomes a part that is scored by itself."""
    sizes = [len(table) for table in tables]
    return Labelled(
        tuple(chain.from_iterable(table.first for table in tables)),
        None if tables[0].second is None else tuple(chain.from_iterable(table.second or () for table in tables)),
        np.concatenate([table.labels for table in tables]),
        np.repeat(np.arange(len(tables)), sizes) if as_parts else None,
    )


# -------------------------------------------------------------------------------------------------------------- splits


def divide(sources: Sources[Labelled], *, examples: int | None, evaluate: int | None) -> Split[Labelled]:
    """Cuts from train the splits that the source lacks, a tenth each, at most 1,000, each class in proportion.

    The examples that are cut, and `examples` of train and `evaluate` of dev and test where there are more, are those with
    the smallest hashes of their texts. No text of test is in dev or train, none of dev in train; a test set that the source
    has stays whole.
    """
    assert sources.train is not None
    train, held_out = sources.train, np.empty(0, np.uint64)
    missing = max(1, min(MOST, int(len(train) * CUT)))
    before, kept = {"train": len(train) + sources.removed}, dict[str, Labelled]()
    for name in ("test", "dev"):
        own: Labelled | None = getattr(sources, name)
        if own is None:
            chosen = _smallest(train, missing)
            own, train = train.pick(chosen), train.pick(~chosen)
            before["train"] -= len(own)
        before[name] = len(own)
        kept[name] = own.pick(~np.isin(_hashes(own), held_out))
        held_out = np.concatenate([held_out, _hashes(kept[name])])
        train = train.pick(~np.isin(_hashes(train), held_out))
    kept["train"] = train
    for name in SPLITS:
        if not len(kept[name]):
            raise DataError(
                f"{name}: no example is left of {before[name]}; give at least one that is in no other split"
            )
    removed = {name: before[name] - len(kept[name]) for name in SPLITS}
    train, dev, test = (_at_most(kept[name], examples if name == "train" else evaluate) for name in SPLITS)
    return Split(train, dev, test, removed)


def _at_most(table: Labelled, num: int | None) -> Labelled:
    return table if num is None or num >= len(table) else table.pick(_smallest(table, num))


def _smallest(table: Labelled, num: int) -> NDArray[np.bool_]:
    """Marks the `num` examples with the smallest hashes: of each class and part as many as is its share."""
    strata = table.labels if table.labels.dtype == np.int64 else np.zeros(len(table), np.int64)
    if table.parts is not None:
        strata = strata + (int(strata.max(initial=0)) + 1) * table.parts
    return smallest_hashes(_hashes(table), min(num, len(table)), strata=strata)


def _hashes(table: Labelled) -> Hashes:
    """Hashes each text, or pair of texts, without case and spaces."""
    columns = [column for column in (table.first, table.second) if column is not None]
    plain = ("\x1f".join(" ".join(text.lower().split()) for text in texts) for texts in zip(*columns, strict=True))
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in plain)
    return np.frombuffer(digests, np.uint64)


def hash_of(table: Labelled | None) -> str | None:
    """Hashes texts, labels and parts, in their order."""
    if table is None:
        return None
    hashed = hash_texts(table.first, table.second or ())
    hashed.update(table.labels.tobytes())
    hashed.update(b"" if table.parts is None else table.parts.tobytes())
    return hashed.hexdigest()
