"""A data set as packed, memory-mapped sequences of tokens. Knows no source, mask or step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trainables.data import tokenizer
from trainables.storage import prepared_folders


class Sequences:
    """Packed sequences of one length, memory-mapped."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        ids = [reader.get_batch(i).column("ids") for i in range(reader.num_record_batches)]
        self.length: int = reader.schema.field("ids").type.list_size
        self._blocks = [block.flatten().to_numpy().reshape(-1, self.length) for block in ids]  # views of the map
        self._starts = np.cumsum([0, *(len(block) for block in self._blocks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Tensor | Sequence[int]) -> Tensor:
        """ids_BT (int64) of these sequences; only they are read."""
        wanted = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(wanted), self.length), np.int64)
        block_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for block in np.unique(block_of):
            here = block_of == block
            out[here] = self._blocks[block][wanted[here] - self._starts[block]]
        return torch.from_numpy(out)


@dataclass(frozen=True)
class Corpus:
    fingerprint: str
    train: Sequences
    dev: Sequences
    test: Sequences
    tokenizer: Any
    vocab_size: int
    special_ids: tuple[int, ...]  # never masked, never drawn
    mask_id: int | None
    tokenizer_identity: str
    about: dict[str, Any]  # counts by split, duplicates removed, checksums


def open_corpus(folder: str, fingerprint: str) -> Corpus:
    """A prepared corpus; one in remote storage is copied to this machine's cache first."""
    home = prepared_folders.fetch(folder, fingerprint)
    return corpus_in(home, fingerprint, prepared_folders.read_about(home))


def corpus_in(home: Path, fingerprint: str, about: dict[str, Any]) -> Corpus:
    """The corpus in a folder of this machine, of which `about` is told."""
    tok = tokenizer.open_tokenizer(str(home / "tokenizer"))
    return Corpus(
        fingerprint=fingerprint,
        train=Sequences(home / "train.arrow"),
        dev=Sequences(home / "dev.arrow"),
        test=Sequences(home / "test.arrow"),
        tokenizer=tok,
        vocab_size=about["vocab_size"],
        special_ids=tokenizer.special_ids(tok),
        mask_id=tok.mask_token_id,
        tokenizer_identity=about["tokenizer_identity"],
        about=about,
    )
