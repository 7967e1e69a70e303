"""What prepared data of every format have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from trainables.config.data import Format, Scoring
from trainables.config.phase import Masking
from trainables.data import tokenizer as tokenizers
from trainables.data.order import bucketed_indices, by_length, shuffled_indices
from trainables.data.split import SPLITS


@dataclass(frozen=True)
class PreparedData:
    """A data set as token ids in memory-mapped files; each format adds its splits and how they are read."""

    format: ClassVar[Format]

    fingerprint: str
    about: dict[str, Any]  # of about.json: counts by split, duplicates removed, checksums
    tokenizer: Any
    train: Any
    dev: Any
    test: Any

    @classmethod
    def open(cls, home: Path, fingerprint: str, about: dict[str, Any]) -> Self:
        """Opens a folder of this machine."""
        tokenizer = tokenizers.open_tokenizer(str(home / "tokenizer"))
        splits = (cls.open_split(home / f"{name}.arrow", about, tokenizer) for name in SPLITS)
        return cls(fingerprint, about, tokenizer, *splits)

    @staticmethod
    def open_split(path: Path, about: dict[str, Any], tokenizer: Any) -> Any:
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that there can be."""
        return int(self.about["length"])

    @property
    def vocab_size(self) -> int:
        return int(self.about["vocab_size"])

    @property
    def tokenizer_identity(self) -> str:
        return str(self.about["tokenizer_identity"])

    @property
    def mask_id(self) -> int | None:
        mask_id: int | None = self.tokenizer.mask_token_id
        return mask_id

    @property
    def end_id(self) -> int | None:
        """The token that ends a text."""
        return tokenizers.ends(self.tokenizer)[1]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, or a reply: any of them, the most usual first."""
        return () if self.end_id is None else (self.end_id,)

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template writes all tokens."""
        return False

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are never masked and never drawn."""
        return tokenizers.special_ids(self.tokenizer)

    @property
    def num_labels(self) -> int | None:
        """Outputs of a model's head on these data; None for a language model."""
        return None

    @property
    def scoring(self) -> Scoring | None:
        """How replies are drawn to be scored; None where there are no prompts."""
        return None

    def dev_batches(self, corruption: Masking | None, rows: int) -> Iterator[tuple[Tensor, Any]]:
        """Yields (indices, examples) of dev by rising length, as evaluations read them."""
        return by_length(self.dev, rows)

    def step_indices(self, rows: Tensor | None, batch: int, step: int, *, seed: int, stream: str) -> Tensor:
        """Returns the examples of a step, of `rows` of train (None: of all); of similar length, where lengths differ."""
        lengths = self.train.lengths
        if lengths is None:
            num = len(self.train if rows is None else rows)
            indices = shuffled_indices(num, batch, step, seed=seed, stream=stream)
        else:
            lengths = lengths if rows is None else lengths[rows]
            indices = bucketed_indices(lengths, batch, step, seed=seed, stream=stream)
        return indices if rows is None else rows[indices]

    def unpacked(self) -> Self:
        """Returns the data with a row for each example in every batch; only exchanges are packed otherwise."""
        return self
