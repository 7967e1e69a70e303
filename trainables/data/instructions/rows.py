"""Rows of prompts with their replies, and how the rows are split. Knows no source and no token."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainables.config.errors import DataError
from trainables.data.split import SPLITS, Sources, Split, split_groups

CUT, MOST = (
    0.08,
    500,
)  # share of the rows of train, and about their number at most, for each missing one of dev and test
MOST_REFUSED = 0.01  # share of a source's rows that may be left out because they cannot be read or rendered


class Turn(NamedTuple):
    """A message of a conversation."""

    role: str
    content: Any  # a text, or a list of parts {type: text, text}; None in a call of tools
    more: Mapping[str, Any] | None = (
        None  # further keys that a chat template may read: tool_calls, reasoning_content, …
    )

    @property
    def message(self) -> dict[str, Any]:
        """The message as `apply_chat_template` takes it."""
        return {"role": self.role, "content": self.content, **(self.more or {})}

    @property
    def said(self) -> str:
        """The text of the content."""
        return "".join(part["text"] for part in self.content) if isinstance(self.content, list) else self.content or ""


class Row(NamedTuple):
    """A prompt, which a conversation may precede, and its replies: the first is learnt, any is right where it is scored."""

    turns: tuple[Turn, ...]  # the last one is the prompt
    context: str  # that the prompt refers to; may be empty
    replies: tuple[str, ...]
    group: str | None = None  # rows of a group are never in two splits; None: rows of one prompt are a group
    answer: Turn | None = None  # the message of the reply where it is more than a text; a bare call replies with ""
    tools: Sequence[Any] | None = None  # schemas that a chat template may read
    place: str = ""  # file and row, for messages; rows are equal wherever they lie

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and self[:-1] == other[:-1]

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def text(self) -> str:
        """What the model reads, without case and spaces."""
        return self._plain(self.context)

    @property
    def split_by(self) -> str:
        """What rows of a group have in common: what is asked in all turns, whatever its context."""
        return self._plain() if self.group is None else self.group

    @property
    def cluster(self) -> int:
        """Numbers what rows that are not independent share: a group; else the context; else how the conversation begins."""
        begins = next((turn.said for turn in self.turns if turn.role != "system"), "")
        shared = self.group if self.group is not None else " ".join((self.context or begins).lower().split())
        return int(hashlib.sha256(shared.encode()).hexdigest()[:12], 16)  # which a float holds, too

    def _plain(self, *others: str) -> str:
        more = [turn.more for turn in self.turns if turn.more] + list(self.tools or ())
        texts = (*(turn.said for turn in self.turns), *others, *(json.dumps(each, default=str) for each in more))
        return "\0".join(" ".join(text.lower().split()) for text in texts if text)

    @property
    def marks(self) -> set[tuple[str, str]]:
        """What no other split may have."""
        return {("text", self.text)} | ({("group", self.group)} if self.group is not None else set())


Rows = tuple[Row, ...]


def divide(sources: Sources[Rows]) -> Split[Rows]:
    """Cuts from train the splits that the source does not name, 8 % each, at most about 500 rows.

    Whole groups leave train, in the order of a hash of their group. No text of test is in dev or train, none of dev in
    train; a test set that the source names stays whole. Of a source without `train` only test is there.
    """
    if sources.train is None:
        if not sources.test:
            raise nothing_left("test", sources.dropped.get("test", {}))
        return Split((), (), sources.test, dict.fromkeys(SPLITS, 0), sources.dropped)
    if not sources.train:
        raise nothing_left("train", sources.dropped.get("train", {}))
    named = {name: own for name in ("dev", "test") if (own := getattr(sources, name)) is not None}
    before = _cut(sources.train, [name for name in ("dev", "test") if name not in named]) | named
    kept, seen = {"test": before["test"]}, {mark for row in before["test"] for mark in row.marks}
    for name in ("dev", "train"):
        kept[name] = tuple(row for row in before[name] if not seen & row.marks)
        seen |= {mark for row in kept[name] for mark in row.marks}
    removed = {name: len(before[name]) - len(kept[name]) for name in SPLITS}
    for name in SPLITS:
        if not kept[name]:
            counts = sources.dropped.get(name, {}), {"a text that another split has as well": removed[name]}
            raise nothing_left(name, *counts, hint=f"give {name} rows that are in no other split")
    return Split(kept["train"], kept["dev"], kept["test"], removed, sources.dropped)


def _cut(rows: Rows, missing: Sequence[str]) -> dict[str, Rows]:
    keys = [row.split_by for row in rows]
    if rows[0].group is None and len(set(keys)) <= len(
        missing
    ):  # one question about many texts: the texts tell rows apart
        keys = [row.text for row in rows]
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    held_out = dict.fromkeys(missing, max(1, min(MOST, int(CUT * len(rows)))))
    splits = split_groups(list(groups.items()), held_out, key=lambda group: group[0], size=lambda group: len(group[1]))
    cut = {
        name: tuple(rows[index] for index in sorted(index for _, indices in some for index in indices))
        for name, some in splits.items()
    }
    if empty := [name for name in ("train", *missing) if not cut[name]]:
        what = "prompts" if rows[0].group is None else "values of split_by"
        raise DataError(
            f"{empty[0]}: no row is left, since the {len(rows):,} rows of train have only {len(groups)} different {what}; "
            f"give more, name a source for dev and for test, or split by another column"
        )
    return cut


def nothing_left(split: str, *counts: Mapping[str, int], hint: str = "") -> DataError:
    """Returns the error for an empty split. `counts`: reason -> rows that were left out for it."""
    parts = [f"{num:,} with {reason}" for some in counts for reason, num in some.items() if num]
    advice = hint or "name other columns, or give rows that have a prompt and a reply"
    return DataError(f"{split}: no row is left ({', '.join(parts) or 'there was none'}); {advice}")


def leave_out(refused: Sequence[DataError], num_rows: int, dropped: Counter[str]) -> None:
    """Counts refused conversations, of a source with `num_rows`, as rows left out.

    Raises the first refusal where there are more than 1 %.
    """
    if len(refused) > MOST_REFUSED * num_rows:
        others = f" (and {len(refused) - 1:,} more of {num_rows:,} rows)" if len(refused) > 1 else ""
        raise DataError(f"{refused[0]}{others}")
    if refused:
        dropped[f"a conversation that cannot be used, as {refused[0]}"] += len(refused)


def brief(value: object) -> str:
    """Shows the type and the beginning of a value, for messages."""
    if value is None:
        return "empty"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:60] + ' …'}"
