"""Batches of exchanges: several in a row, or each in a row of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int32]


class PackedBatch(NamedTuple):
    """Exchanges end to end in rows, padded at the end of each.

    `position_ids_BT` begin at 0 with each exchange and with the padding. Given as `position_ids`, with no attention mask and no
    cache, they tell transformers where a sequence begins, so that its tokens attend to nothing before.
    """

    ids_BT: Tensor
    position_ids_BT: Tensor
    positions_N: Tensor  # b*T + t of the position before each token of a reply, exchange by exchange
    labels_N: Tensor  # the tokens of the replies
    example_ids_N: Tensor  # the exchange, by its place in the batch, of each label
    starts_E: Tensor  # b*T + t of the first token of each exchange
    lengths_E: Tensor  # tokens of each exchange
    num_tokens: int  # without padding

    def by_exchange(self) -> tuple[Tensor, Tensor]:
        """Returns where the tokens of each exchange are, [E, longest], as b*T + t, and the mask of those places."""
        order_T = torch.arange(int(self.lengths_E.max()), device=self.starts_E.device)
        mask_ET = order_T < self.lengths_E[:, None]
        return torch.where(mask_ET, self.starts_E[:, None] + order_T, 0), mask_ET


@dataclass(frozen=True)
class ExchangeBatch:
    """The exchanges of a step, or some of them."""

    prompts: tuple[Ids, ...]
    replies: tuple[Ids, ...]
    length: int  # tokens of a packed row at most, unless one exchange alone is longer
    pad_id: int
    is_packed: bool = True  # else each has a row of its own

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, start: int, stop: int) -> ExchangeBatch:
        """Returns exchanges start … stop - 1."""
        return replace(self, prompts=self.prompts[start:stop], replies=self.replies[start:stop])

    def with_replies(self, replies: Sequence[Ids]) -> ExchangeBatch:
        """Returns the same prompts with other replies."""
        if len(replies) != len(self):
            raise ValueError(f"{len(replies)} replies to {len(self)} prompts")
        return replace(self, replies=tuple(replies))

    @property
    def num_tokens(self) -> int:
        """The number of tokens without padding."""
        return sum(map(len, self.prompts)) + sum(map(len, self.replies))

    @property
    def labels_N(self) -> Tensor:
        """All tokens of the replies, exchange by exchange."""
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *self.replies]).astype(np.int64))

    def to(self, device: str) -> PackedBatch:
        """Packs the exchanges into rows, first-fit-decreasing, or puts each into its own row."""
        sizes = [len(prompt) + len(reply) for prompt, reply in zip(self.prompts, self.replies, strict=True)]
        rows = first_fit(sizes, self.length) if self.is_packed else [[i] for i in range(len(sizes))]
        width = max((sum(sizes[i] for i in row) for row in rows), default=0)
        ids_BT = np.full((len(rows), width), self.pad_id, np.int64)
        position_ids_BT = np.zeros((len(rows), width), np.int64)
        positions, starts = [np.empty(0, np.int64)] * len(self), np.zeros(len(self), np.int64)
        for b, row in enumerate(rows):
            at = 0
            for i in row:
                first, end = at + len(self.prompts[i]), at + sizes[i]
                ids_BT[b, at:first], ids_BT[b, first:end] = self.prompts[i], self.replies[i]
                position_ids_BT[b, at:end] = np.arange(sizes[i])
                starts[i] = b * width + at
                positions[i] = b * width + np.arange(first - 1, end - 1)
                at = end
            position_ids_BT[b, at:] = np.arange(width - at)
        positions_N = np.concatenate([np.empty(0, np.int64), *positions])
        example_ids_N = np.repeat(np.arange(len(self)), [len(reply) for reply in self.replies])
        lengths = np.array(sizes, np.int64)
        ids, places, before, owners, starts_E, lengths_E = (
            torch.from_numpy(array).to(device)
            for array in (ids_BT, position_ids_BT, positions_N, example_ids_N, starts, lengths)
        )
        return PackedBatch(ids, places, before, self.labels_N.to(device), owners, starts_E, lengths_E, self.num_tokens)


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Returns the indices of `sizes` by row of `length`: the longest first, each into the first row that has room for it.

    A size above `length` (a reply that a model made) makes every row as long as itself.
    """
    length = max([length, *sizes])
    rows, room = list[list[int]](), list[int]()
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, free in enumerate(room) if free >= sizes[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(i)
        room[row] -= sizes[i]
    return rows
