"""A task as memory-mapped, labelled examples of any length, and batches of them. Knows no source, model or phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.config.data import TASK, Rule
from trainables.config.phase import Masking
from trainables.data.arrow import Ids, Lists, MappedTable
from trainables.data.prepared_data import PreparedData


class Partners(NamedTuple):
    """A second example for each of a batch, with which the first is mixed. `shares_N`: of the first."""

    ids_BT: Tensor
    labels_N: Tensor
    shares_N: Tensor

    def to(self, device: str) -> Partners:
        return Partners(*(tensor.to(device) for tensor in self))

    def rows(self, start: int, stop: int, length: int) -> Partners:
        return Partners(self.ids_BT[start:stop, :length], self.labels_N[start:stop], self.shares_N[start:stop])


class TaskBatch(NamedTuple):
    """Examples padded on the right to the longest of them, and their labels (int64 classes or float32 numbers)."""

    ids_BT: Tensor
    mask_BT: Tensor  # 1 where there is a token, else 0
    types_BT: Tensor | None  # of pairs: 1 in the second text, its end token included, else 0
    labels_N: Tensor
    partners: Partners | None = None

    def to(self, device: str) -> TaskBatch:
        return TaskBatch(*(part if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def rows(self, start: int, stop: int) -> TaskBatch:
        """Returns examples start … stop - 1, without columns that none of them uses."""
        mask_BT = self.mask_BT[start:stop]
        length = int(mask_BT.sum(1).max()) if len(mask_BT) else 0
        types_BT = None if self.types_BT is None else self.types_BT[start:stop, :length]
        partners = self.partners and self.partners.rows(start, stop, length)
        ids_BT, labels_N = self.ids_BT[start:stop, :length], self.labels_N[start:stop]
        return TaskBatch(ids_BT, mask_BT[:, :length], types_BT, labels_N, partners)

    @property
    def num_tokens(self) -> int:
        """The number of tokens without padding."""
        return int(self.mask_BT.sum())


class Examples:
    """Labelled examples, their tokens memory-mapped."""

    def __init__(self, path: Path, *, length: int, pad_id: int, is_pair: bool, has_parts: bool) -> None:
        table = MappedTable(path)
        self._ids, self._second = Lists(table, "ids"), table.column("second")
        self._pad_id, self._is_pair = pad_id, is_pair
        self.length = length  # tokens of the longest example that there can be
        self.lengths = self._ids.lengths
        self.labels = torch.from_numpy(table.column("label"))
        self.parts: NDArray[np.int64] | None = table.column("part").astype(np.int64) if has_parts else None

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> Ids:
        """Returns the tokens of one example, special tokens included; a view of the mapped file."""
        return self._ids[index]

    def clusters(self) -> NDArray[np.int64]:
        """Numbers the examples that share a text: of pairs the text that fewer examples have for themselves."""
        texts = [
            (ids[:second].tobytes(), ids[second:].tobytes())
            for ids, second in zip(map(self.ids, range(len(self))), self._second.tolist(), strict=True)
        ]
        numbered = [dict[bytes, int](), dict[bytes, int]()]
        each = [[seen.setdefault(pair[i], len(seen)) for pair in texts] for i, seen in enumerate(numbered)]
        is_second = self._is_pair and len(numbered[1]) < len(numbered[0])
        return np.array(each[is_second], dtype=np.int64)

    def rows(self, indices: Tensor | Sequence[int]) -> TaskBatch:
        """Reads these examples, and no others; pads them to the longest of them."""
        wanted = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[wanted]
        longest = int(lengths.max(initial=0))
        ids_BT = np.full((len(wanted), longest), self._pad_id, np.int64)
        for row, index in enumerate(wanted.tolist()):
            ids_BT[row, : lengths[row]] = self._ids[index]
        position_T = np.arange(longest)
        mask_BT = position_T < lengths[:, None]
        types_BT = mask_BT & (position_T >= self._second[wanted][:, None])
        return TaskBatch(
            torch.from_numpy(ids_BT),
            torch.from_numpy(mask_BT.astype(np.int64)),
            torch.from_numpy(types_BT.astype(np.int64)) if self._is_pair else None,
            self.labels[torch.from_numpy(wanted)],
        )


@dataclass(frozen=True)
class Task(PreparedData):
    format = TASK

    train: Examples
    dev: Examples
    test: Examples

    @staticmethod
    def open_split(path: Path, about: dict[str, Any], tokenizer: Any) -> Examples:
        return Examples(
            path,
            length=about["length"],
            pad_id=tokenizer.pad_token_id or 0,  # masked, so any token will do
            is_pair=about["task"]["is_pair"],
            has_parts=path.stem == "test" and bool(about["task"]["part_names"]),
        )

    @property
    def num_labels(self) -> int:
        return int(self.about["task"]["num_labels"])

    @property
    def is_regression(self) -> bool:
        return self.num_labels == 1

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.about["task"]["class_names"])

    @property
    def score(self) -> Rule:
        rule: Rule = self.about["task"]["score"]
        return rule

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of test, where test has several."""
        return tuple(self.about["task"]["part_names"])

    def batch(self, indices: Tensor, _: Masking | None, *, seed: int) -> TaskBatch:
        """Reads these examples of train."""
        return self.train.rows(indices)

    def examples(self, _: Masking | None, *, num: int = 2, num_tokens: int = 60) -> list[str]:
        """Decodes the beginnings of training examples, after their label in «»."""
        texts = []
        for index in range(min(num, len(self.train))):
            label = self.train.labels[index].item()
            text = " ".join(self.tokenizer.decode(self.train.ids(index)[:num_tokens]).split())
            texts.append(f"«{f'{label:g}' if self.is_regression else self.class_names[int(label)]}» {text}")
        return texts

    def summary(self) -> str:
        """Summarises the splits in one line: examples, how many of them are cut, and the most frequent class."""
        parts = []
        for split, found in self.about["splits"].items():
            more = [f"{found['truncated']:.1%} cut"] if found["truncated"] else []
            if "classes" in found:
                most = max(found["classes"], key=found["classes"].get)
                more.append(f"{found['classes'][most] / found['examples']:.0%} {most}")
            parts.append(f"{split} {found['examples']:,} examples" + (f" ({', '.join(more)})" if more else ""))
        removed = sum(self.about["removed_duplicates"].values())
        rule = self.score.replace("_", " ")
        return f"{', '.join(parts)}; scored by {rule}; {removed} near-duplicates across splits removed"
