"""The order in which examples are read: shuffled, shuffled within runs of similar length, or by rising length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from trainables.config.value import random_stream

WINDOW = 50  # batches within which examples are sorted by length


def shuffled_indices(num: int, batch: int, step: int, *, seed: int, stream: str) -> Tensor:
    """Returns the examples [batch] of global step `step`, of the epochs' permutations laid end to end. A pure function."""
    epochs = range(step * batch // num, ((step + 1) * batch - 1) // num + 1)
    order = torch.cat([_permutation(num, random_stream(seed, "order", stream, epoch)) for epoch in epochs])
    start = step * batch - epochs[0] * num
    return order[start : start + batch]


@lru_cache(maxsize=4)
def _permutation(num: int, seed: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))


def bucketed_indices(lengths: ArrayLike, batch: int, step: int, *, seed: int, stream: str) -> Tensor:
    """Returns the examples [batch] of global step `step`, of similar length. A pure function.

    The epochs' permutations lie end to end, so that each example is read once an epoch. Within an epoch, runs of 50
    batches are sorted by length and cut where steps begin; then the batches change places. A step that two epochs share
    stays as it was drawn.
    """
    key = np.ascontiguousarray(lengths, dtype=np.int32).tobytes()
    num, first, last = len(key) // 4, step * batch, (step + 1) * batch
    return torch.cat(
        [
            _epoch(key, batch, seed, stream, epoch=epoch)[max(0, first - epoch * num) : last - epoch * num]
            for epoch in range(first // num, (last - 1) // num + 1)
        ]
    )


@lru_cache(maxsize=4)
def _epoch(lengths: bytes, batch: int, seed: int, stream: str, *, epoch: int) -> Tensor:
    length_E = torch.frombuffer(bytearray(lengths), dtype=torch.int32)
    num = len(length_E)
    order_E = torch.randperm(num, generator=_generator(seed, "order", stream, epoch))
    head = -epoch * num % batch  # ends the step that the epoch before began
    num_batches = (num - head) // batch
    if num_batches < 1:
        return order_E
    body_E = order_E[head : head + num_batches * batch]
    runs = [body_E[start : start + WINDOW * batch] for start in range(0, len(body_E), WINDOW * batch)]
    runs = [run[length_E[run].sort(stable=True).indices] for run in runs]
    batches_NB = torch.cat(runs).view(num_batches, batch)
    batches_NB = batches_NB[torch.randperm(num_batches, generator=_generator(seed, "batches", stream, epoch))]
    return torch.cat([order_E[:head], batches_NB.flatten(), order_E[head + num_batches * batch :]])


def _generator(*purpose: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(random_stream(*purpose))


class _Split(Protocol):
    @property
    def lengths(self) -> NDArray[np.int32]: ...
    def rows(self, indices: Tensor | Sequence[int]) -> Any: ...


def by_length(split: _Split, batch: int) -> Iterator[tuple[Tensor, Any]]:
    """Yields (indices, their examples) by rising length; `results[indices] = ...` restores the order of the split."""
    order = torch.from_numpy(np.argsort(split.lengths, kind="stable"))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        yield indices, split.rows(indices)


def folds(num_examples: int, num: int) -> Tensor:
    """Returns the fold 0 ... num - 1 of each example, of sizes that differ by one at most; the same for every seed."""
    order = torch.randperm(num_examples, generator=_generator("folds"))
    return order % num


def sample_rows(num_rows: int, num: int | None) -> NDArray[np.int64]:
    """Returns `num` rows spread at random, in their order, always the same ones; None: all rows."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)).numpy()
    chosen: NDArray[np.int64] = np.sort(order[:num])
    return chosen
