"""Prompts and replies as memory-mapped tokens. Knows no source, model or phase."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainables.config.data import INSTRUCTIONS, Scoring
from trainables.config.errors import DataError
from trainables.config.phase import Masking
from trainables.data import tokenizer as tokenizers
from trainables.data.arrow import Ids, Lists, MappedTable
from trainables.data.instructions.packing import ExchangeBatch
from trainables.data.prepared_data import PreparedData
from trainables.data.split import SPLITS


class Around(NamedTuple):
    """The texts between which a template writes a reply."""

    prompt: str  # as a model reads it that is to reply
    before: str
    tail: str


class Exchanges:
    """The exchanges of a split, memory-mapped; there may be none."""

    def __init__(self, path: Path, *, length: int, pad_id: int) -> None:
        self._table = MappedTable(path)
        self._prompts, self._replies = Lists(self._table, "prompt"), Lists(self._table, "reply")
        self._pad_id = pad_id
        self.is_packed = True
        self.length = length  # tokens of prompt and reply at most
        self.lengths: Ids = self._prompts.lengths + self._replies.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def clusters(self) -> NDArray[np.int64] | None:
        """Returns the number of the text or group that each exchange shares with others; None for files of before."""
        has_clusters = "cluster" in self._table.schema.names and len(self._table)
        return self._table.column("cluster") if has_clusters else None

    def prompt(self, index: int) -> Ids:
        """Returns the prompt, start token and template included; a view of the mapped file, as `reply`."""
        return self._prompts[index]

    def reply(self, index: int) -> Ids:
        """Returns the reply, the end token included unless the reply was cut."""
        return self._replies[index]

    def references(self, index: int) -> tuple[str, ...]:
        """Returns the replies as they were written, of which any is right."""
        return tuple(self._table.value("references", index))

    def around(self, index: int) -> Around:
        """Returns the texts around a reply; they are stored where other tokenizers read the same exchanges."""
        return Around(*self._table.value("around", index))

    def rows(self, indices: Tensor | Sequence[int]) -> ExchangeBatch:
        """Reads these exchanges, and no others."""
        wanted = np.asarray(indices, dtype=np.int64).tolist()
        prompts, replies = (tuple(column[i] for i in wanted) for column in (self._prompts, self._replies))
        return ExchangeBatch(prompts, replies, self.length, self._pad_id, self.is_packed)

    def unpacked(self) -> Exchanges:
        """Returns the exchanges with a row for each in every batch, for models that would read a packed row as one text."""
        exchanges = copy.copy(self)
        exchanges.is_packed = False
        return exchanges


@dataclass(frozen=True)
class ExchangeSet(PreparedData):
    format = INSTRUCTIONS

    train: Exchanges  # empty, as dev, where a data set is only scored
    dev: Exchanges
    test: Exchanges

    @staticmethod
    def open_split(path: Path, about: dict[str, Any], tokenizer: Any) -> Exchanges:
        # padding is never read; a padding token would make some models warn
        return Exchanges(path, length=about["length"], pad_id=_ends(about, tokenizer)[0])

    @property
    def end_id(self) -> int:
        return self.end_ids[0]

    @property
    def is_chat(self) -> bool:
        return bool(self.about["exchanges"]["template"] == "chat")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Those of the data; in a chat also those that end the replies of the tokenizer's model."""
        return tuple(
            dict.fromkeys([*_ends(self.about, self.tokenizer), *(self.about.get("stops", ()) if self.is_chat else ())])
        )

    @property
    def scoring(self) -> Scoring:
        return Scoring.model_validate(self.about["exchanges"]["scoring"])

    @property
    def leads(self) -> tuple[str, ...]:
        """What the template has before replies, as decoded; the longest first."""
        return tuple(self.about["exchanges"]["leads"])

    @property
    def tails(self) -> tuple[str, ...]:
        """What the template has after replies, before the token that ends them, as `leads`."""
        return tuple(self.about["exchanges"].get("tails", ()))

    def text(self, reply: Sequence[int]) -> str:
        """Decodes a reply for comparison with references: without special tokens, and without the text that the template
        has around a reply (an empty thought, say), which is learnt with the reply and is no answer."""
        ids = list(reply)
        text: str = self.tokenizer.decode(
            ids[:-1] if ids[-1:] and ids[-1] in self.end_ids else ids, skip_special_tokens=True
        )
        text = text.strip()
        text = text.removeprefix(next((lead for lead in self.leads if text.startswith(lead)), "")).lstrip()
        return text.removesuffix(next((tail for tail in self.tails if text.endswith(tail)), "")).rstrip()

    def unpacked(self) -> ExchangeSet:
        return replace(self, train=self.train.unpacked(), dev=self.dev.unpacked(), test=self.test.unpacked())

    def batch(self, indices: Tensor, _: Masking | None, *, seed: int) -> ExchangeBatch:
        """Reads these exchanges of train."""
        return self.train.rows(indices)

    def examples(self, _: Masking | None, *, num: int = 2, num_tokens: int = 60) -> list[str]:
        """Decodes exchanges, the reply in «», ends included; leaves out the middle of long prompts and replies."""
        split, decode = self.train or self.test, self.tokenizer.decode

        def shown(ids: list[int], head: int, tail: int) -> str:
            parts = [ids] if len(ids) <= head + tail else [ids[:head], ids[-tail:]]
            return " … ".join(" ".join(decode(part).split()) for part in parts)

        return [
            f"{shown(split.prompt(index).tolist(), num_tokens // 6, num_tokens // 3)} "
            f"«{shown(split.reply(index).tolist(), num_tokens // 3, num_tokens // 6)}»"
            for index in range(min(num, len(split)))
        ]

    def summary(self) -> str:
        """Summarises the splits in one line: exchanges, the share of cut replies, and the rows that were left out."""
        splits = {name: self.about["splits"][name] for name in SPLITS}
        sizes = ", ".join(f"{name} {own['exchanges']:,} exchanges" for name, own in splits.items() if own["exchanges"])
        num = sum(own["exchanges"] for own in splits.values())
        cut = sum(own["truncated"] * own["exchanges"] for own in splits.values()) / num
        dropped = dict[str, int]()
        for own in splits.values():
            for reason, rows in own["dropped"].items():
                dropped[reason] = dropped.get(reason, 0) + rows
        left_out = ", ".join(f"{rows:,} with {reason}" for reason, rows in sorted(dropped.items()))
        most = max((len(self.test.references(i)) for i in range(len(self.test))), default=1)
        best = f"; scored against the best of up to {most} references" if most > 1 else ""
        removed = sum(self.about["removed_duplicates"].values())
        return (
            f"{sizes}{best}; {self.about['exchanges']['template']} template; {cut:.1%} of the replies cut at {self.length} "
            f"tokens of prompt and reply; rows left out: {left_out or 'none'}; {removed:,} duplicates across splits removed"
        )


def _ends(about: dict[str, Any], tokenizer: Any) -> list[int]:
    """Returns the tokens that end the replies of the data; before version 2 all ended with the tokenizer's own."""
    return about["exchanges"].get("ends") or [end_of(tokenizer)]


def end_of(tokenizer: Any) -> int:
    """Returns the token that ends a reply. Raises DataError where the tokenizer has none."""
    end = tokenizers.ends(tokenizer)[1]
    if end is None:
        raise DataError(
            "tokenizer: it has no token that ends a text (eos_token or sep_token), so that no reply could end; expected one "
            "whose tokenizer_config.json names it"
        )
    return end
