"""A corpus as packed, memory-mapped sequences of tokens, and batches of them. Knows no source, model or step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.config.data import CORPUS
from trainables.config.errors import DataError
from trainables.config.phase import Masking
from trainables.config.value import random_stream
from trainables.data.arrow import MappedTable
from trainables.data.corpus.masking import MaskedBatch, mask_batch, next_token_batch
from trainables.data.prepared_data import PreparedData

EVALUATION_SEED = random_stream("evaluation masks")  # one for all: models, arms, steps, seeds


class Sequences:
    """Packed sequences of one length, memory-mapped."""

    lengths = None  # all the same

    def __init__(self, path: Path) -> None:
        table = MappedTable(path)
        self.length: int = table.schema.field("ids").type.list_size
        self._blocks = [block.column("ids").flatten().to_numpy().reshape(-1, self.length) for block in table.blocks]
        self._starts = table.starts
        has_documents = "document" in table.schema.names  # which files of before do not have
        self.documents: NDArray[np.int64] | None = table.column("document").astype(np.int64) if has_documents else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Reads ids_BT (int64) of these sequences, and no others."""
        wanted = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(wanted), self.length), np.int64)
        block_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for block in np.unique(block_of):
            here = block_of == block
            out[here] = self._blocks[block][wanted[here] - self._starts[block]]
        return torch.from_numpy(out)


@dataclass(frozen=True)
class Corpus(PreparedData):
    format = CORPUS

    train: Sequences
    dev: Sequences
    test: Sequences

    @staticmethod
    def open_split(path: Path, about: dict[str, Any], tokenizer: Any) -> Sequences:
        return Sequences(path)

    def batch(self, indices: Tensor, corruption: Masking | None, *, seed: int) -> MaskedBatch:
        """Reads these sequences of train; `seed`: of the masks."""
        return self.corrupt(self.train.rows(indices), corruption, seed=seed)

    def corrupt(self, ids_BT: Tensor, masking: Masking | None, *, seed: int) -> MaskedBatch:
        """Masks sequences, or takes the next token as label."""
        if masking is None:
            return next_token_batch(ids_BT)
        if self.mask_id is None:
            raise DataError("the tokenizer has no mask token; use `corruption: null` or a tokenizer that has one")
        vocabulary: dict[str, Any] = {"vocab_size": self.vocab_size, "special_ids": self.special_ids}
        return mask_batch(ids_BT, masking=masking, mask_id=self.mask_id, seed=seed, **vocabulary)

    def evaluation_batches(
        self, split: Literal["dev", "test"], masking: Masking | None, *, batch: int
    ) -> Iterator[MaskedBatch]:
        """Yields a split in order, `batch` sequences at a time. Masks are drawn for the whole split at once."""
        sequences: Sequences = getattr(self, split)
        whole = self.corrupt(sequences.rows(range(len(sequences))), masking, seed=EVALUATION_SEED)
        for start in range(0, len(sequences), batch):
            yield whole.rows(start, min(start + batch, len(sequences)))

    def dev_batches(self, corruption: Masking | None, rows: int) -> Iterator[tuple[Tensor, MaskedBatch]]:
        """Yields (indices, sequences) of dev in order, masked as evaluations mask them."""
        for i, batch in enumerate(self.evaluation_batches("dev", corruption, batch=rows)):
            yield torch.arange(i * rows, i * rows + len(batch.ids_BT)), batch

    def examples(self, masking: Masking | None, *, num: int = 2, num_tokens: int = 60) -> list[str]:
        """Decodes the beginnings of training sequences; a masked token is shown as «word→[MASK]»."""
        ids_BT = self.train.rows(range(min(num, len(self.train))))
        seen = self.corrupt(ids_BT, masking, seed=EVALUATION_SEED)
        is_masked = torch.zeros(ids_BT.numel(), dtype=torch.bool)
        if masking is not None:
            is_masked[seen.positions_N] = True
        rows = zip(ids_BT, seen.ids_BT, is_masked.view_as(ids_BT), strict=True)
        return [self._marked(*(row[:num_tokens].tolist() for row in tensors)) for tensors in rows]

    def _marked(self, ids_T: list[int], seen_T: list[int], is_masked_T: list[bool]) -> str:
        decode = self.tokenizer.decode
        parts, run = list[str](), list[int]()
        for token, seen, is_masked in zip(ids_T, seen_T, is_masked_T, strict=True):
            if not is_masked:
                run.append(token)
                continue
            parts += [decode(run), f"«{decode([token]).strip()}→{decode([seen]).strip()}»"]
            run = []
        return " ".join(" ".join([*parts, decode(run)]).split())

    def summary(self) -> str:
        """Summarises the splits in one line."""
        counts = ", ".join(
            f"{split} {found['documents']:,} documents / {found['sequences']:,} sequences"
            for split, found in self.about["splits"].items()
        )
        removed = sum(self.about["removed_duplicates"].values())
        return f"{counts}; {removed} near-duplicates across splits removed"
