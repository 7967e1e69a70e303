"""A task as memory-mapped, labelled examples of any length, and batches of them. Knows no source, model or phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from trainables.config.value import random_stream
from trainables.data import tokenizer
from trainables.metrics.task_scores import Rule

WINDOW = 50  # batches within which examples are sorted by length


class TaskBatch(NamedTuple):
    """Examples padded on the right to the longest of them, and their labels (int64 classes or float32 numbers)."""

    ids_BT: Tensor
    mask_BT: Tensor  # 1 where there is a token, else 0
    types_BT: Tensor | None  # of pairs: 1 in the second text, its end token included, else 0
    labels_N: Tensor

    def to(self, device: str) -> TaskBatch:
        types_BT = None if self.types_BT is None else self.types_BT.to(device)
        return TaskBatch(self.ids_BT.to(device), self.mask_BT.to(device), types_BT, self.labels_N.to(device))

    def rows(self, start: int, stop: int) -> TaskBatch:
        """Examples start … stop - 1, without columns that none of them uses."""
        mask_BT = self.mask_BT[start:stop]
        length = int(mask_BT.sum(1).max()) if len(mask_BT) else 0
        types_BT = None if self.types_BT is None else self.types_BT[start:stop, :length]
        return TaskBatch(self.ids_BT[start:stop, :length], mask_BT[:, :length], types_BT, self.labels_N[start:stop])

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int(self.mask_BT.sum())


class Examples:
    """Labelled examples, their tokens memory-mapped."""

    def __init__(self, path: Path, *, length: int, pad_id: int, is_pair: bool, has_parts: bool) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        blocks = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ids = [block.column("ids").values.to_numpy() for block in blocks]  # views of the map
        self._offsets = [block.column("ids").offsets.to_numpy() for block in blocks]
        self._starts = np.cumsum([0, *(len(block) for block in blocks)])
        self._second = _joined([block.column("second") for block in blocks])
        self._pad_id, self._is_pair = pad_id, is_pair
        self.length = length  # of the longest that there can be
        self.lengths: NDArray[np.int32] = np.concatenate([np.diff(offsets) for offsets in self._offsets])
        self.labels = torch.from_numpy(_joined([block.column("label") for block in blocks]))
        parts = _joined([block.column("part") for block in blocks])
        self.parts: NDArray[np.int64] | None = parts.astype(np.int64) if has_parts else None  # of Task.part_names

    def __len__(self) -> int:
        return int(self._starts[-1])

    def ids(self, index: int) -> NDArray[np.int32]:
        """The tokens of one example, special ones included; a view of the mapped file."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        at = index - self._starts[block]
        start, stop = self._offsets[block][at : at + 2]
        ids: NDArray[np.int32] = self._ids[block][start:stop]
        return ids

    def rows(self, indices: Tensor | Sequence[int]) -> TaskBatch:
        """These examples, padded to the longest of them; only they are read."""
        wanted = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[wanted]
        longest = int(lengths.max(initial=0))
        ids_BT = np.full((len(wanted), longest), self._pad_id, np.int64)
        for row, index in enumerate(wanted.tolist()):
            ids_BT[row, : lengths[row]] = self.ids(index)
        place_T = np.arange(longest)
        mask_BT = place_T < lengths[:, None]
        types_BT = mask_BT & (place_T >= self._second[wanted][:, None])
        return TaskBatch(
            torch.from_numpy(ids_BT),
            torch.from_numpy(mask_BT.astype(np.int64)),
            torch.from_numpy(types_BT.astype(np.int64)) if self._is_pair else None,
            self.labels[torch.from_numpy(wanted)],
        )


def _joined(columns: Sequence[Any]) -> NDArray[Any]:
    return np.concatenate([column.to_numpy() for column in columns])


@dataclass(frozen=True)
class Task:
    fingerprint: str
    train: Examples
    dev: Examples
    test: Examples
    tokenizer: Any
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_id: int | None
    tokenizer_identity: str
    num_labels: int  # 1: a number is predicted
    class_names: tuple[str, ...]
    score: Rule
    part_names: tuple[str, ...]  # of test, where it has several
    about: dict[str, Any]  # counts by split, duplicates removed, share of examples that were cut, checksums

    @property
    def is_regression(self) -> bool:
        return self.num_labels == 1


def _task_in(home: Path, fingerprint: str, about: dict[str, Any]) -> Task:
    tok = tokenizer.open_tokenizer(str(home / "tokenizer"))
    task = about["task"]

    def examples(split: str) -> Examples:
        return Examples(
            home / f"{split}.arrow",
            length=about["length"],
            pad_id=tok.pad_token_id or 0,  # masked, so any token will do
            is_pair=task["is_pair"],
            has_parts=split == "test" and bool(task["part_names"]),
        )

    return Task(
        fingerprint=fingerprint,
        train=examples("train"),
        dev=examples("dev"),
        test=examples("test"),
        tokenizer=tok,
        vocab_size=about["vocab_size"],
        special_ids=tokenizer.special_ids(tok),
        mask_id=tok.mask_token_id,
        tokenizer_identity=about["tokenizer_identity"],
        num_labels=task["num_labels"],
        class_names=tuple(task["class_names"]),
        score=task["score"],
        part_names=tuple(task["part_names"]),
        about=about,
    )


def task_indices(lengths: ArrayLike, batch: int, step: int, *, seed: int, stream: str) -> Tensor:
    """Examples [batch] of global step `step`: of similar length, as far as chance is kept. A pure function.

    The epochs' permutations lie end to end, so that each example is read once an epoch. Within an epoch, runs of 50
    batches are sorted by length and cut where steps begin; then the batches change places. A step that two epochs share
    stays as it was drawn.
    """
    key = np.ascontiguousarray(lengths, dtype=np.int32).tobytes()
    num, first, last = len(key) // 4, step * batch, (step + 1) * batch
    return torch.cat(
        [
            _epoch(key, batch, seed, stream, epoch)[max(0, first - epoch * num) : last - epoch * num]
            for epoch in range(first // num, (last - 1) // num + 1)
        ]
    )


@lru_cache(maxsize=4)
def _epoch(lengths: bytes, batch: int, seed: int, stream: str, epoch: int) -> Tensor:
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


def task_evaluation(examples: Examples, *, batch: int) -> Iterator[tuple[Tensor, TaskBatch]]:
    """(indices, examples) by rising length; `results[indices] = …` puts what comes of them back in order."""
    order = torch.from_numpy(np.argsort(examples.lengths, kind="stable"))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        yield indices, examples.rows(indices)


def folds(num_examples: int, num: int) -> Tensor:
    """The fold 0 … num - 1 of each example, of sizes that differ by one at most; the same for every seed."""
    order = torch.randperm(num_examples, generator=_generator("folds"))
    return order % num
