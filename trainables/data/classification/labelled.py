"""Labelled examples: what a label may be, and how three splits come about. Knows no source and no tokenizer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainables.config.errors import DataError

SPLITS = ("train", "dev", "test")
CUT, MOST = 0.1, 1000  # of the examples of train, and at most so many, for each of dev and test that is not there

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
        """These examples: indices, or a truth value for each."""
        chosen = np.arange(len(self))[rows]
        first, second = (None if t is None else tuple(t[i] for i in chosen) for t in (self.first, self.second))
        assert first is not None
        return Labelled(first, second, self.labels[chosen], None if self.parts is None else self.parts[chosen])


@dataclass(frozen=True)
class Sources:
    """Examples as a source has them; None where it has no such split."""

    train: Labelled
    dev: Labelled | None = None
    test: Labelled | None = None
    removed: int = 0  # examples that the source left out since another split has nearly the same text


@dataclass(frozen=True)
class Divided:
    train: Labelled
    dev: Labelled
    test: Labelled
    removed: dict[str, int]  # split -> examples left out because another split has the same text


def labelled(
    columns: Sequence[Sequence[str | None]],
    labels: Sequence[Any],
    *,
    classes: Sequence[str | int] | None,
    where: str,
) -> Labelled:
    """One or two columns of texts, as they are read, and their labels; `classes` None: labels are numbers.

    `where` names split and file in messages.
    """
    texts = [[text or "" for text in column] for column in columns]
    for row, together in enumerate(zip(*texts, strict=True), 1):
        if not any(text and not text.isspace() for text in together):
            raise DataError(f"{where}: row {row} has no text; remove it")
    found = _numbers(labels, where) if classes is None else _classes(labels, classes, where)
    return Labelled(tuple(texts[0]), tuple(texts[1]) if len(texts) > 1 else None, found)


def _classes(labels: Sequence[Any], classes: Sequence[str | int], where: str) -> NDArray[np.int64]:
    index = {str(name): i for i, name in enumerate(classes)}
    found = [index.get(_as_text(label), -1) for label in labels]
    if -1 in found:
        row = found.index(-1)
        says = "no label" if labels[row] is None else f"label {labels[row]!r}"
        hidden = ", which stands for a hidden one" if labels[row] == -1 else ""
        raise DataError(f"{where}: row {row + 1} has {says}{hidden}; expected {', '.join(index)}")
    return np.array(found, np.int64)


def _as_text(label: Any) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _numbers(labels: Sequence[Any], where: str) -> NDArray[np.float32]:
    found = np.empty(len(labels), np.float32)
    for row, label in enumerate(labels):
        try:
            found[row] = label
        except (TypeError, ValueError):
            found[row] = math.nan
        if not np.isfinite(found[row]):
            says = "no label" if label is None else f"label {label!r}"
            raise DataError(f"{where}: row {row + 1} has {says}; expected numbers, or list the labels in `classes`")
    return found


def joined(tables: Sequence[Labelled], *, as_parts: bool = False) -> Labelled:
    """One after the other; each a part of its own, if so asked."""
    sizes = [len(table) for table in tables]
    return Labelled(
        tuple(chain.from_iterable(table.first for table in tables)),
        None if tables[0].second is None else tuple(chain.from_iterable(table.second or () for table in tables)),
        np.concatenate([table.labels for table in tables]),
        np.repeat(np.arange(len(tables)), sizes) if as_parts else None,
    )


# -------------------------------------------------------------------------------------------------------------- splits


def divide(sources: Sources, *, examples: int | None, evaluate: int | None) -> Divided:
    """Cuts from train what the source does not have, a tenth each, at most 1,000, each class in proportion.

    By the hash of the text, so that the order of the source does not count. What is cut, and `examples` of train and
    `evaluate` of dev and test where there are more, are those with the smallest hashes. No text of test is in dev or train,
    none of dev in train; a test set that the source has stays whole.
    """
    train, dev, test = sources.train, sources.dev, sources.test
    hashes, missing = _hashes(train), max(1, min(MOST, int(len(train) * CUT)))
    before = {"train": len(train) + sources.removed, "dev": len(dev or ()), "test": len(test or ())}
    if test is None:
        chosen = _smallest(train, hashes, missing)
        test, train, hashes = train.pick(chosen), train.pick(~chosen), hashes[~chosen]
        before["train"] -= len(test)
        before["test"] = len(test)
    in_test = _hashes(test)
    kept = ~np.isin(hashes, in_test)
    train, hashes = train.pick(kept), hashes[kept]
    if dev is None:
        chosen = _smallest(train, hashes, missing)
        dev, train, hashes = train.pick(chosen), train.pick(~chosen), hashes[~chosen]
        before["train"] -= len(dev)
        before["dev"] = len(dev)
    else:
        dev = dev.pick(~np.isin(_hashes(dev), in_test))
    train = train.pick(~np.isin(hashes, _hashes(dev)))
    removed = {name: before[name] - len(now) for name, now in zip(SPLITS, (train, dev, test), strict=True)}
    for name, now in zip(SPLITS, (train, dev, test), strict=True):
        if not len(now):
            raise DataError(
                f"{name}: no example is left of {before[name]}; give at least one that is in no other split"
            )
    return Divided(_at_most(train, examples), _at_most(dev, evaluate), _at_most(test, evaluate), removed)


def _at_most(table: Labelled, num: int | None) -> Labelled:
    return table if num is None or num >= len(table) else table.pick(_smallest(table, _hashes(table), num))


def _smallest(table: Labelled, hashes: Hashes, num: int) -> NDArray[np.bool_]:
    """Which are the `num` examples with the smallest hashes: so many of each class and part as are its share."""
    strata = table.labels if table.labels.dtype == np.int64 else np.zeros(len(table), np.int64)
    if table.parts is not None:
        strata = strata + (int(strata.max(initial=0)) + 1) * table.parts
    sizes = np.bincount(strata)
    exact = sizes * min(num, len(table)) / len(table)
    quota = np.floor(exact).astype(np.int64)
    largest = np.argsort(quota - exact, kind="stable")  # what is lost to rounding goes to the largest remainders
    quota[largest[: min(num, len(table)) - int(quota.sum())]] += 1
    order = np.lexsort((hashes, strata))
    rank = np.empty(len(table), np.int64)
    rank[order] = np.arange(len(table)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen: NDArray[np.bool_] = rank < quota[strata]
    return chosen


def _hashes(table: Labelled) -> Hashes:
    """Of the text, but for case and spaces."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in _plain(table))
    return np.frombuffer(digests, np.uint64)


def _plain(table: Labelled) -> Iterator[str]:
    columns = [column for column in (table.first, table.second) if column is not None]
    for texts in zip(*columns, strict=True):
        yield "\x1f".join(" ".join(text.lower().split()) for text in texts)


def hash_of(table: Labelled | None) -> str | None:
    """Of texts, labels and parts, in their order."""
    if table is None:
        return None
    hashed = hashlib.sha256()
    for column in (table.first, table.second or ()):
        for text in column:
            encoded = text.encode()
            hashed.update(len(encoded).to_bytes(8, "big"))  # "a", "b" is not "ab"
            hashed.update(encoded)
    hashed.update(table.labels.tobytes())
    hashed.update(b"" if table.parts is None else table.parts.tobytes())
    return hashed.hexdigest()
