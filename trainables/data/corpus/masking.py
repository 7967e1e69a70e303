"""Which tokens of a batch are supervised, and what the models see there. Pure functions of ids and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainables.config.phase import Masking


class MaskedBatch(NamedTuple):
    """Ids that models read, and the supervised positions (indices b*T + t, rising) with their labels."""

    ids_BT: Tensor
    positions_N: Tensor
    labels_N: Tensor

    def to(self, device: str) -> MaskedBatch:
        return MaskedBatch(*(tensor.to(device) for tensor in self))

    def rows(self, start: int, stop: int) -> MaskedBatch:
        """Returns rows start … stop - 1, with positions counted from the first of them."""
        length = self.ids_BT.shape[1]
        edges = torch.tensor([start * length, stop * length])
        first, last = torch.searchsorted(self.positions_N, edges).tolist()
        return MaskedBatch(
            self.ids_BT[start:stop], self.positions_N[first:last] - start * length, self.labels_N[first:last]
        )

    @property
    def num_tokens(self) -> int:
        """Sequences are packed: there is no padding."""
        return self.ids_BT.numel()


def mask_batch(
    ids_BT: Tensor, *, masking: Masking, vocab_size: int, mask_id: int, special_ids: Sequence[int], seed: int
) -> MaskedBatch:
    """Corrupts round(probability * T) non-special tokens of each row, at least one, or as many as the row has.

    Takes the whole global batch: ranks and micro-batches then take slices (`MaskedBatch.rows`), so that no draw depends
    on how the batch is divided.
    """
    num_rows, length = ids_BT.shape
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(special_ids, dtype=torch.long)
    num_chosen = max(1, round(masking.probability * length))
    scores_BT = torch.rand(num_rows, length, generator=generator).masked_fill_(torch.isin(ids_BT, special), 2.0)
    chosen_BK = scores_BT.topk(num_chosen, largest=False).indices.sort().values
    eligible_BK = scores_BT.gather(1, chosen_BK) < 2.0
    labels_BK = ids_BT.gather(1, chosen_BK)

    fate_BK = torch.rand(num_rows, num_chosen, generator=generator)
    drawable = torch.ones(vocab_size, dtype=torch.bool).index_fill_(0, special, False).nonzero().flatten()
    drawn_BK = drawable[torch.randint(len(drawable), (num_rows, num_chosen), generator=generator)]
    seen_BK = torch.where(fate_BK < masking.mask + masking.random, drawn_BK, labels_BK)
    seen_BK = seen_BK.masked_fill(fate_BK < masking.mask, mask_id)
    seen_BK = torch.where(eligible_BK, seen_BK, labels_BK)

    positions_BK = chosen_BK + length * torch.arange(num_rows)[:, None]
    return MaskedBatch(ids_BT.scatter(1, chosen_BK, seen_BK), positions_BK[eligible_BK], labels_BK[eligible_BK])


def next_token_batch(ids_BT: Tensor) -> MaskedBatch:
    """Takes each token but the first as the label of the position before it."""
    num_rows, length = ids_BT.shape
    positions_BT = torch.arange(num_rows * length).view(num_rows, length)[:, :-1]
    return MaskedBatch(ids_BT, positions_BT.flatten(), ids_BT[:, 1:].flatten())
