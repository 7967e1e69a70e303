"""Prompts with their replies: from sources to rows by split, and from rows to text. Knows no token."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from trainables.config.data import (
    InstructionFiles,
    InstructionHub,
    Instructions,
    PythonInstructions,
    SameTokenizer,
    Scoring,
)
from trainables.config.errors import DataError
from trainables.data.sources import files, python_instructions

INSTRUCT = 2  # raised whenever the same rows would be split or put into a template otherwise


SPLITS = ("train", "dev", "test")


CUT, MOST = 0.08, 500  # of the rows of train, and at most about so many, for each of dev and test that is not there


ROLES = "{role, content}"


NO_PROMPT, NO_REPLY = "an empty prompt", "an empty reply"  # reasons for which a row is dropped


class Turn(NamedTuple):
    role: str
    content: str


class Row(NamedTuple):
    """A prompt, which a conversation may precede, and its replies: the first is learnt, any will do where it is scored."""

    turns: tuple[Turn, ...]  # the last one is the prompt
    context: str  # what the prompt speaks of; may be empty
    replies: tuple[str, ...]
    group: str | None = None  # rows of a group are never in two splits; None: those of one prompt are a group

    @property
    def text(self) -> str:
        """What the model is given, but for case and spaces."""
        said = (*(turn.content for turn in self.turns), self.context)
        return "\0".join(" ".join(text.lower().split()) for text in said)


@dataclass(frozen=True)
class Sources:
    """Rows as a source has them; None where it names no such split."""

    train: tuple[Row, ...] | None
    dev: tuple[Row, ...] | None
    test: tuple[Row, ...] | None
    dropped: Mapping[str, Mapping[str, int]]  # split -> reason -> rows without a prompt or a reply


@dataclass(frozen=True)
class Divided:
    """Rows by split. Of a source without `train` only test is there."""

    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]
    dropped: Mapping[str, Mapping[str, int]]
    removed: dict[str, int]  # split -> rows left out because another split has the same text, or the same group


def load_instructions(data: Instructions) -> Sources:
    """Reads the sources; what was read stays in memory as long as the files stay as they are."""
    if not isinstance(data, PythonInstructions) and data.columns.messages is not None and data.template != "chat":
        raise DataError(
            "columns.messages: conversations have turns, which only `template: chat`, the tokenizer's own, can tell apart"
        )
    found: dict[str, tuple[files.Place, ...]] = {}
    if isinstance(data, InstructionFiles):
        named = {name: uri for name in SPLITS if (uri := getattr(data, name)) is not None}
        found = {name: files.find(uri, name, files.TABLES) for name, uri in named.items()}
    # only what says where the rows are belongs to the key
    rest = {"template": "alpaca", "length": 512, "prompt_length": 256, "examples": None, "evaluate": None}
    source = data.model_copy(update={"tokenizer": SameTokenizer(), "scoring": Scoring(), **rest})
    return _load(source, tuple(found.items()))


@lru_cache(maxsize=4)
def _load(source: Instructions, found: tuple[tuple[str, tuple[files.Place, ...]], ...]) -> Sources:
    if isinstance(source, PythonInstructions):
        rows = [
            Row((Turn("user", one.prompt),), one.signature, (one.description,), one.module)
            for one in python_instructions.descriptions()
        ]
        return Sources(tuple(rows), None, None, {})
    splits, dropped = dict[str, tuple[Row, ...]](), dict[str, dict[str, int]]()
    for name, tables in _tables(source, dict(found)):
        counts: Counter[str] = Counter()
        splits[name] = tuple(row for table in tables for row in _rows(source, table, name, counts))
        dropped[name] = dict(counts)
    return Sources(splits.get("train"), splits.get("dev"), splits.get("test"), dropped)


def _tables(
    source: InstructionFiles | InstructionHub, found: Mapping[str, tuple[files.Place, ...]]
) -> Iterator[tuple[str, Iterable[files.Table]]]:
    """Each split that the source names, and what its files hold of the columns that are asked for."""
    columns = source.columns
    named = {"messages": columns.messages} if columns.messages is not None else columns.model_dump()
    fields = {column: f"columns.{name}" for name, column in named.items() if column is not None}
    texts = [columns.prompt] if columns.messages is None else []
    others = [column for column in fields if column not in texts]
    if source.split_by is not None:
        fields, others = {source.split_by: "split_by", **fields}, [*others, source.split_by]
    for name in SPLITS:
        if (split := getattr(source, name)) is None:
            continue
        if isinstance(source, InstructionFiles):
            yield name, files.read_tables(found[name], texts, others, fields=fields, what=name)
        else:
            where = (source.name, source.config, source.revision, split)
            yield name, [files.read_hub_table(*where, texts, others, fields=fields, what=name)]


def _rows(
    source: InstructionFiles | InstructionHub, table: files.Table, split: str, dropped: Counter[str]
) -> Iterator[Row]:
    """The rows of a table that have prompt and reply; the others are counted."""
    names, found = source.columns, table.columns
    num = len(next(iter(found.values())))
    for i in range(num):
        at = f"{split}: {table.where}: row {i + 1}"
        if names.messages is not None:
            turns, replies = _conversation(found[names.messages][i], f"{at}: {names.messages!r}")
            context = ""
        else:
            turns = (Turn("user", found[names.prompt][i] or ""),)
            context = "" if names.context is None else _text(found[names.context][i], f"{at}: {names.context!r}")
            replies = _replies(found[names.response][i], f"{at}: {names.response!r}")
        group = None
        if source.split_by is not None:
            if (value := found[source.split_by][i]) is None:
                raise DataError(
                    f"{at} has no {source.split_by!r}, by which rows are split; fill it in, or leave it out"
                )
            group = str(value)
        if not turns[-1].content.strip():
            dropped[NO_PROMPT] += 1
        elif not replies:
            dropped[NO_REPLY] += 1
        else:
            yield Row(turns, context if context.strip() else "", replies, group)


def _text(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where} is {_brief(value)}; expected a text, or nothing")
    return value or ""


def _replies(value: Any, where: str) -> tuple[str, ...]:
    """Those that are not blank, without the spaces around them."""
    replies = value if isinstance(value, list) else [value]
    if not all(reply is None or isinstance(reply, str) for reply in replies):
        raise DataError(f"{where} is {_brief(value)}; expected a text, or a list of texts of which any will do")
    return tuple(reply.strip() for reply in replies if reply and not reply.isspace())


def _conversation(value: Any, where: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """(what comes before the last reply, that reply if it is not blank)."""
    valid = f"expected a list of {ROLES}, of which the last one has the role assistant and is the reply"
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{where} is {_brief(value)}; {valid}")
    turns = []
    for number, turn in enumerate(value, 1):
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or not role or not (content is None or isinstance(content, str)):
            raise DataError(f"{where}: message {number} is {_brief(turn)}, no {ROLES} of texts; {valid}")
        turns.append(Turn(role, content or ""))
    if len(turns) < 2 or turns[-1].role != "assistant":
        says = (
            f"ends with {turns[-1].role!r}" if len(turns) > 1 else f"has {len(turns)} of the 2 messages that it needs"
        )
        raise DataError(f"{where} {says}; {valid}")
    return tuple(turns[:-1]), _replies(turns[-1].content, where)


def _brief(value: Any) -> str:
    shown = repr(value)
    return (
        f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:60] + ' …'}" if value is not None else "empty"
    )


def divided(data: Instructions) -> Divided:
    """The rows of a data set, by split."""
    return divide(load_instructions(data))


def divide(sources: Sources) -> Divided:
    """Cuts from train what the source does not name, 8 % each, at most about 500.

    Whole groups go, in the order of a hash of what they have in common, so that the order of the source does not count.
    No text of test is in dev or train, none of dev in train; a test set that the source names stays whole.
    """
    if sources.train is None:
        test = sources.test or ()
        if not test:
            raise nothing_left("test", sources.dropped.get("test", {}))
        return Divided((), (), test, sources.dropped, dict.fromkeys(SPLITS, 0))
    if not sources.train:
        raise nothing_left("train", sources.dropped.get("train", {}))
    cut = _cut(sources.train, [name for name in ("dev", "test") if getattr(sources, name) is None])
    before = {name: cut[name] if (own := getattr(sources, name)) is None or name == "train" else own for name in SPLITS}
    kept, held_out = {"test": before["test"]}, set(map(_marks, before["test"]))
    for name in ("dev", "train"):
        seen = {mark for marks in held_out for mark in marks}
        kept[name] = tuple(row for row in before[name] if not seen.intersection(_marks(row)))
        held_out |= set(map(_marks, kept[name]))
    removed = {name: len(before[name]) - len(kept[name]) for name in SPLITS}
    for name in SPLITS:
        if not kept[name]:
            raise nothing_left(
                name,
                sources.dropped.get(name, {}),
                {"a text that another split has as well": removed[name]},
                hint=f"give {name} rows that are in no other split",
            )
    return Divided(kept["train"], kept["dev"], kept["test"], sources.dropped, removed)


def _cut(rows: Sequence[Row], missing: Sequence[str]) -> dict[str, tuple[Row, ...]]:
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_group(row), []).append(index)
    split_of = ["train"] * len(rows)
    rest = iter(sorted(groups, key=lambda group: hashlib.sha256(group.encode()).hexdigest()))
    for name in missing:
        wanted = max(1, min(MOST, int(CUT * len(rows))))
        while wanted > 0 and (group := next(rest, None)) is not None:
            for index in groups[group]:
                split_of[index] = name
            wanted -= len(groups[group])
    cut = {name: tuple(row for row, at in zip(rows, split_of, strict=True) if at == name) for name in SPLITS}
    if empty := [name for name in ("train", *missing) if not cut[name]]:
        what = "prompts" if rows[0].group is None else "values of split_by"
        raise DataError(
            f"{empty[0]}: no row is left, since the {len(rows):,} rows of train have only {len(groups)} different {what}; "
            f"give more, name a source for dev and for test, or split by another column"
        )
    return cut


def _group(row: Row) -> str:
    return " ".join(row.turns[-1].content.lower().split()) if row.group is None else row.group


def _marks(row: Row) -> tuple[tuple[str, str], ...]:
    """What no other split may have."""
    text = ("text", row.text)
    return (text,) if row.group is None else (text, ("group", row.group))


def nothing_left(split: str, *counts: Mapping[str, int], hint: str = "") -> DataError:
    """`counts`: reason -> rows that were left out for it."""
    parts = [f"{num:,} with {reason}" for some in counts for reason, num in some.items() if num]
    advice = hint or "name other columns, or give rows that have a prompt and a reply"
    return DataError(f"{split}: no row is left ({', '.join(parts) or 'there was none'}); {advice}")


def instruction_fields(data: Instructions) -> dict[str, Any]:
    """What a fingerprint is made of, but for the tokenizer: the text and whatever else changes a number."""
    sources = load_instructions(data)
    return {
        "instruct": INSTRUCT,
        **data.model_dump(
            mode="json", include={"template", "length", "prompt_length", "examples", "evaluate", "scoring"}
        ),
        **{name: _hash_of(getattr(sources, name)) for name in SPLITS},
    }


def _hash_of(rows: tuple[Row, ...] | None) -> str | None:
    if rows is None:
        return None
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(json.dumps(row).encode() + b"\n")
    return hashed.hexdigest()
