"""How data without given splits are split: whole groups by a hash of what they have in common.

The hash decides, so that neither the order of a source nor a seed counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPLITS = ("train", "dev", "test")
T = TypeVar("T")


class Table(NamedTuple):
    """Columns of one table by name."""

    where: str  # in messages
    columns: dict[str, list[Any]]


@dataclass(frozen=True)
class Sources(Generic[T]):
    """The examples of a data set by split, as its source has them; None where the source has no such split."""

    train: T | None
    dev: T | None = None
    test: T | None = None
    class_names: tuple[str, ...] = ()
    removed: int = 0  # examples that the source left out because another split has nearly the same text
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # split -> reason -> rows left out


@dataclass(frozen=True)
class Split(Generic[T]):
    """The examples of a data set by split; no split has a text of another."""

    train: T
    dev: T
    test: T
    removed: dict[str, int]  # split -> examples left out because another split has the same text
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    is_shared: bool = False  # whether other tokenizers read the same examples


def sha256_hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_texts(*columns: Sequence[str]) -> hashlib._Hash:
    """Hashes the texts of the columns, in their order. Returns the hash object, which takes more."""
    hashed = hashlib.sha256()
    for column in columns:
        for text in column:
            encoded = text.encode()
            hashed.update(len(encoded).to_bytes(8, "big"))  # "a", "b" is not "ab"
            hashed.update(encoded)
    return hashed


def smallest_hashes(
    hashes: Sequence[Any] | NDArray[Any], wanted: float, *, sizes: ArrayLike = 1, strata: NDArray[Any] | None = None
) -> NDArray[np.bool_]:
    """Marks the groups with the smallest hashes until their sizes add up to `wanted`.

    `strata`: class of each group; every class gives as many as is its share of `wanted`, and what rounding loses goes to
    the largest remainders.
    """
    keys, total = np.asarray(hashes), math.ceil(wanted)
    strata = np.zeros(len(keys), np.int64) if strata is None else strata
    counts = np.bincount(strata)
    exact = counts * total / max(1, len(keys))
    quota = np.floor(exact)
    quota[np.argsort(quota - exact, kind="stable")[: int(total - quota.sum())]] += 1
    order = np.lexsort((keys, strata))
    size = np.broadcast_to(np.asarray(sizes), len(keys))[order]
    before = np.cumsum(size) - size
    first = (np.cumsum(counts) - counts)[strata[order]]
    chosen = np.empty(len(keys), bool)
    chosen[order] = before - before[first] < quota[strata[order]]
    return chosen


def split_groups(
    groups: Sequence[T], held_out: Mapping[str, float], *, key: Callable[[T], str], size: Callable[[T], int]
) -> dict[str, list[T]]:
    """Splits groups by the hash of their key: the `held_out` splits take groups in the order of the hashes, one split after
    the other, until each has its size; the rest is train. Each split keeps the order of the groups."""
    split_of = np.full(len(groups), "train")
    hashes, sizes = np.array([sha256_hex(key(group)) for group in groups]), np.array([size(group) for group in groups])
    for name, wanted in held_out.items():
        rest = np.flatnonzero(split_of == "train")
        split_of[rest[smallest_hashes(hashes[rest], wanted, sizes=sizes[rest])]] = name
    return {name: [group for group, own in zip(groups, split_of, strict=True) if own == name] for name in SPLITS}
