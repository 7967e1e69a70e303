"""Instructions from tables: prompts with replies, or conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from trainables.config.data import InstructionFiles, InstructionHub
from trainables.config.errors import DataError
from trainables.data.instructions.rows import Row, Rows, Turn, brief
from trainables.data.sources.files import Places, Wanted, read
from trainables.data.split import Sources, Table

ROLES = "{role, content}"
NO_PROMPT, NO_REPLY = "an empty prompt", "an empty reply"  # reasons for which a row is dropped


def load(data: InstructionFiles | InstructionHub, places: Places) -> Sources[Rows]:
    columns = data.columns
    named = {"messages": columns.messages} if columns.messages is not None else columns.model_dump()
    fields = {column: f"columns.{name}" for name, column in named.items() if column is not None}
    texts = (columns.prompt,) if columns.messages is None else ()
    others = [column for column in fields if column not in texts]
    if data.split_by is not None:
        fields, others = {data.split_by: "split_by", **fields}, [*others, data.split_by]
    splits, dropped = dict[str, Rows](), dict[str, dict[str, int]]()
    for name, place in places:
        counts: Counter[str] = Counter()
        tables = read(place, Wanted(texts, tuple(others), fields), what=name)
        splits[name] = tuple(row for table in tables for row in _rows(data, table, name, counts))
        dropped[name] = dict(counts)
    return Sources(splits.get("train"), splits.get("dev"), splits.get("test"), dropped=dropped)


def _rows(data: InstructionFiles | InstructionHub, table: Table, split: str, dropped: Counter[str]) -> Iterator[Row]:
    """Yields the rows of a table that have prompt and reply; counts the others in `dropped`."""
    names, columns = data.columns, table.columns
    for i in range(len(next(iter(columns.values())))):
        where = f"{split}: {table.where}: row {i + 1}"
        if names.messages is not None:
            turns, replies = _conversation(columns[names.messages][i], f"{where}: {names.messages!r}")
            context = ""
        else:
            turns = (Turn("user", columns[names.prompt][i] or ""),)
            context = "" if names.context is None else _text(columns[names.context][i], f"{where}: {names.context!r}")
            replies = _replies(columns[names.response][i], f"{where}: {names.response!r}")
        group = None
        if data.split_by is not None:
            if (value := columns[data.split_by][i]) is None:
                raise DataError(
                    f"{where} has no {data.split_by!r}, by which rows are split; fill it in, or leave it out"
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
        raise DataError(f"{where} is {brief(value)}; expected a text, or nothing")
    return value or ""


def _replies(value: Any, where: str) -> tuple[str, ...]:
    """Returns the replies that are not blank, without the spaces around them."""
    replies = value if isinstance(value, list) else [value]
    if not all(reply is None or isinstance(reply, str) for reply in replies):
        raise DataError(f"{where} is {brief(value)}; expected a text, or a list of texts of which any is right")
    return tuple(reply.strip() for reply in replies if reply and not reply.isspace())


def _conversation(value: Any, where: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Returns (the turns before the last reply, the last reply if it is not blank)."""
    expected = f"expected a list of {ROLES}, of which the last one has the role assistant and is the reply"
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{where} is {brief(value)}; {expected}")
    turns = []
    for number, turn in enumerate(value, 1):
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or not role or not (content is None or isinstance(content, str)):
            raise DataError(f"{where}: message {number} is {brief(turn)}, no {ROLES} of texts; {expected}")
        turns.append(Turn(role, content or ""))
    if len(turns) < 2 or turns[-1].role != "assistant":
        says = (
            f"ends with {turns[-1].role!r}" if len(turns) > 1 else f"has {len(turns)} of the 2 messages that it needs"
        )
        raise DataError(f"{where} {says}; {expected}")
    return tuple(turns[:-1]), _replies(turns[-1].content, where)
