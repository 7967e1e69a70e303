"""Instructions from tables: prompts with replies, or conversations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from trainables.config.data import InstructionFiles, InstructionHub
from trainables.config.errors import DataError
from trainables.data.instructions.rows import Row, Rows, Turn, brief, leave_out
from trainables.data.sources.files import Places, Wanted, read
from trainables.data.split import Sources, Table

ROLES = "{role, content}"
TOOLS, SYSTEM = (
    "tools",
    "system",
)  # columns that conversations may have; the second only where they are of ShareGPT's form
# who speaks in ShareGPT's form, {from, value}, as transformers calls the role; `CALL` is the assistant with a call of tools
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
SPEAKERS |= {role: role for role in ("system", "user", "assistant", "tool")}
CALL = "function_call"
CALLS = ("tool_calls", "function_call")  # keys of a message that call tools: its content may be empty
NO_PROMPT, NO_REPLY = "an empty prompt", "an empty reply"  # reasons for which a row is dropped


class LeftOut(NamedTuple):
    """Rows that are not used: how many for which reason, and conversations that cannot be read."""

    counts: Counter[str]
    refused: list[DataError]


def load(data: InstructionFiles | InstructionHub, places: Places) -> Sources[Rows]:
    columns = data.columns
    named = {"messages": columns.messages} if columns.messages is not None else columns.model_dump()
    fields = {column: f"columns.{name}" for name, column in named.items() if column is not None}
    texts = (columns.prompt,) if columns.messages is None else ()
    others = [column for column in fields if column not in texts]
    if data.split_by is not None:
        fields, others = {data.split_by: "split_by", **fields}, [*others, data.split_by]
    optional = tuple(c for c in (TOOLS, SYSTEM) if c not in fields) if columns.messages is not None else ()
    splits, dropped = dict[str, Rows](), dict[str, dict[str, int]]()
    for name, place in places:
        out = LeftOut(Counter(), [])
        tables = read(place, Wanted(texts, tuple(others), fields, optional), what=name)
        rows = (row for table in tables for row in _rows(data, table, name, out))
        splits[name] = tuple(_each_reply(rows) if data.turns == "all" else rows)
        leave_out(out.refused, len(splits[name]) + sum(out.counts.values()) + len(out.refused), out.counts)
        dropped[name] = dict(out.counts)
    return Sources(splits.get("train"), splits.get("dev"), splits.get("test"), dropped=dropped)


def _rows(data: InstructionFiles | InstructionHub, table: Table, split: str, out: LeftOut) -> Iterator[Row]:
    """Yields the rows of a table that have prompt and reply; counts the others in `out`."""
    names, columns = data.columns, table.columns
    for i in range(len(next(iter(columns.values())))):
        where = f"{split}: {table.where}: row {i + 1}"
        context, answer, tools = "", None, None
        if names.messages is not None:
            try:
                system = columns[SYSTEM][i] if SYSTEM in columns else None
                *turns, answer = _conversation(columns[names.messages][i], system, f"{where}: {names.messages!r}")
                tools = _tools(columns[TOOLS][i], f"{where}: {TOOLS!r}") if TOOLS in columns else None
            except DataError as error:
                out.refused.append(error)
                continue
            replies = _replies(answer.said, where) or (("",) if _is_call(answer) else ())
            answer = _more_than_text(answer)
        else:
            turns = [Turn("user", columns[names.prompt][i] or "")]
            context = "" if names.context is None else _text(columns[names.context][i], f"{where}: {names.context!r}")
            replies = _replies(columns[names.response][i], f"{where}: {names.response!r}")
        group = None
        if data.split_by is not None:
            if (value := columns[data.split_by][i]) is None:
                raise DataError(
                    f"{where} has no {data.split_by!r}, by which rows are split; fill it in, or leave it out"
                )
            group = str(value)
        if not turns[-1].said.strip():
            out.counts[NO_PROMPT] += 1
        elif not replies:
            out.counts[NO_REPLY] += 1
        else:
            yield Row(tuple(turns), context if context.strip() else "", replies, group, answer, tools, where)


def _each_reply(rows: Iterable[Row]) -> Iterator[Row]:
    """Yields a row for each message of the assistant, with the messages before it as the prompt: what a model reads that is to
    reply there, where templates leave out earlier thoughts too. Rows of one conversation are a group, and a cluster."""
    for row in rows:
        whole = row._replace(group=row.split_by)
        for at, turn in enumerate(row.turns):
            said = turn.said.strip()
            if turn.role == "assistant" and at and row.turns[at - 1].said.strip() and (said or _is_call(turn)):
                yield whole._replace(turns=row.turns[:at], replies=(said,), answer=_more_than_text(turn))
        yield whole


def _is_call(turn: Turn) -> bool:
    return any(key in CALLS for key in turn.more or ())


def _more_than_text(turn: Turn) -> Turn | None:
    """Returns the message of a reply where it is more than a text, as a row keeps it."""
    return turn if turn.more or isinstance(turn.content, list) else None


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


def _conversation(value: Any, system: Any, where: str) -> list[Turn]:
    """Returns the messages, of which the last one is the assistant's, its text without the spaces around it. In ShareGPT's form
    `system` is the row's own column: the first message, unless there is one."""
    expected = f"expected a list of {ROLES}, of which the last one has the role assistant and is the reply"
    value = _from_json(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{where} is {brief(value)}; {expected}")
    turns, is_sharegpt = [], any("from" in turn and "role" not in turn for turn in value)
    if is_sharegpt:
        value = [_of_sharegpt(turn, f"{where}: message {number}") for number, turn in enumerate(value, 1)]
        if _text(system, f"{where}: {SYSTEM!r}").strip() and value[0]["role"] != "system":
            value = [{"role": "system", "content": system}, *value]
    for number, message in enumerate(value, 1):
        more = {key: each for key, each in message.items() if each not in (None, "", [], {})}  # as tables fill up rows
        role, content = more.pop("role", None), more.pop("content", None)
        is_call = any(key in more for key in CALLS)
        is_text = content is None if is_call or "content" in message else False
        if not isinstance(role, str) or not (is_text or isinstance(content, str | list)):
            raise DataError(f"{where}: message {number} is {brief(message)}, no {ROLES} of texts; {expected}")
        if isinstance(content, list):
            content = [_part(part, f"{where}: message {number}") for part in content]
        turns.append(Turn(role, content if content is not None or is_call else "", more or None))
    if len(turns) < 2 or turns[-1].role != "assistant":
        says = (
            f"ends with {turns[-1].role!r}" if len(turns) > 1 else f"has {len(turns)} of the 2 messages that it needs"
        )
        raise DataError(f"{where} {says}; {expected}")
    last = turns[-1]
    return [*turns[:-1], last._replace(content=last.content.strip()) if isinstance(last.content, str) else last]


def _of_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a message {from, value} as {role, content}. Raises DataError where it is none, or for an unknown speaker."""
    more = {key: each for key, each in message.items() if key not in ("from", "value")}
    speaker, said = message.get("from"), message.get("value")
    if speaker == CALL:
        calls = _from_json(said)
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, dict) and "name" in call for call in calls):
            raise DataError(f"{where}: 'value' of {CALL!r} is {brief(said)}; expected JSON with name and arguments")
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls], **more}
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None or "value" not in message:
        what = f"'from' is {brief(speaker)}" if role is None else "has no 'value'"
        raise DataError(f"{where}: {what}; expected {{from, value}}, from one of {', '.join([*SPEAKERS, CALL])}")
    return {"role": role, "content": said, **more}


def _part(part: Any, where: str) -> dict[str, Any]:
    """Returns a part of a content, without the keys that a table has filled up. Raises DataError unless it is a text."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else None
        raise DataError(f"{where} has a part {brief(kind or part)} in its content; expected {{type: text, text}}")
    return {key: value for key, value in part.items() if value is not None}


def _tools(value: Any, where: str) -> list[Any] | None:
    """Returns schemas of tools."""
    tools = _from_json(value)
    if tools and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where} is {brief(value)}; expected a list of objects that describe tools, or nothing")
    return tools or None


def _from_json(value: Any) -> Any:
    """Returns what a text of JSON holds, since tables hold nested values so; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        return value
