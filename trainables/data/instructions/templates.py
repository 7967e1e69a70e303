"""From rows to text: prompt and reply as a template renders them. Knows no token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import Any, NamedTuple

from trainables.config.errors import DataError
from trainables.data.instructions.rows import Row, Turn, brief
from trainables.data.tokenizer import chat_template

MARK = "codistill-reply"  # in no template
THOUGHT_END = "</think>"
# Templates may leave these out without a loss of words, and a key is known by any of the names that transformers gives it.
LABELS = {"name", "tool_call_id"}
REASONING = ("reasoning_content", "reasoning", "thinking")
# Templates that print the date would give other ids every day: for them it is always the day that Llama 3's template names.
DAY = date(2024, 7, 26)
DATE_CODES = ("%d", "%m", "%b", "%B", "%Y", "%y", "%a", "%A", "%H", "%M", "%S", "%j")
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('{code}', '{DAY.strftime(code)}')" for code in DATE_CODES)
    + " }}{% endmacro %}"
)


class Rendered(NamedTuple):
    """The text of a row."""

    prompt: str  # as a model reads it that is to reply
    whole: str  # prompt and reply, as the model learns them
    reply: (
        str  # the reply alone as the template writes it, with which replies are compared; "" for a bare call of tools
    )
    lead: str = (
        ""  # what the template writes between a prompt and a reply (an empty thought, a space); learnt, not compared
    )
    tail: str = ""  # what the template writes after a reply
    before: str = ""  # all that stands before a reply, `lead` included


def alpaca(prompt: str, context: str = "") -> str:
    """Fills in Alpaca's template (Taori et al. 2023) in both variants, with a line's end after the last word as MiniLLM's code has it."""
    paired = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{prompt}\n\n{middle}### Response:\n"
    )


def render(row: Row, template: str, tok: Any) -> Rendered:
    """Renders a row by `template`: alpaca, or chat, the tokenizer's own.

    Raises DataError, with the place of the row, where the template fails, has no place for a key of a message, or loses the
    reply.
    """
    if template == "alpaca":
        prompt = alpaca(row.turns[-1].content, row.context)
        return Rendered(prompt, prompt + row.replies[0], row.replies[0], before=prompt)
    try:
        return _chat(row, tok)
    except DataError as error:
        raise DataError(f"{row.place}: {error}" if row.place else str(error)) from error


def _chat(row: Row, tok: Any) -> Rendered:
    source = chat_template(tok, row.tools)
    named = _name_of(source)
    reply = row.answer or Turn("assistant", row.replies[0])
    _check_keys((*row.turns, reply), row, source, named)
    given = [turn.message for turn in row.turns]
    if row.context:
        given[-1]["content"] += f"\n\n{row.context}"
    how: dict[str, Any] = {"tokenize": False, "tools": row.tools}
    how["chat_template"] = FIXED_DATE + source if "strftime_now" in source else source
    try:
        prompt, closed = (
            str(tok.apply_chat_template(given, add_generation_prompt=asks, **how)) for asks in (True, False)
        )
        # a reply's words may also stand in the prompt, so that a marked reply shows where the reply is
        marked, whole = (
            str(tok.apply_chat_template([*given, turn.message], **how)) for turn in (Turn("assistant", MARK), reply)
        )
    except Exception as error:  # a template is a program of others, and may fail as any program
        said = " ".join(str(error).split())[:200] or type(error).__name__
        roles = ", ".join(turn.role for turn in (*row.turns, reply))
        raise DataError(f"template: {named} refuses a conversation of {roles}: {said}") from error
    expected = "expected a template that puts the reply after the prompt as it is, or `template: alpaca`"
    begun = shared(prompt, closed)
    if not whole.startswith(prompt[:begun]):
        raise DataError(f"template: {named} does not begin a conversation with its own prompt; {expected}")
    lead, found, tail = marked[shared(prompt, marked) :].partition(MARK)
    written, answer = whole[shared(prompt, whole) :], reply.said.strip()
    if answer not in written:  # some templates leave thoughts out, or lay them out otherwise
        answer = answer.rpartition(THOUGHT_END)[2].strip()
    if not found or answer not in whole[begun:]:
        raise DataError(f"template: {named} loses the reply {brief(reply.said)}; {expected}")
    for number, turn in enumerate(row.turns, 1):
        others = [*given[: number - 1], *given[number:], reply.message]
        is_usual = turn.role in ("user", "assistant") and turn.said.strip() in whole
        if not is_usual and _renders_alike(tok, others, whole, how):
            raise DataError(
                f"message {number}: {named} leaves out a message of {turn.role!r}; expected a template that reads that role, or "
                f"rows without it"
            )
    for turn in (*row.turns, reply):
        if isinstance(turn.content, list) and repr(turn.content) in whole:
            raise DataError(f"template: {named} takes no content in parts; expected texts")
    return Rendered(prompt, whole, answer, lead, tail, marked.partition(MARK)[0])


def _renders_alike(tok: Any, messages: Sequence[Any], text: str, how: dict[str, Any]) -> bool:
    try:
        return bool(tok.apply_chat_template(messages, **how) == text)
    except Exception:  # it needs the message that these lack
        return False


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Counts the elements with which both sequences begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _check_keys(turns: tuple[Turn, ...], row: Row, source: str, named: str) -> None:
    """Raises DataError for a key of a message, or tools, that the template does not read and would drop."""

    def is_read(key: str) -> bool:
        names = REASONING if key in REASONING else (key,)
        return key in LABELS or any(re.search(rf"\b{re.escape(name)}\b", source) for name in names)

    for number, turn in enumerate(turns, 1):
        if unread := [key for key in turn.more or () if not is_read(key)]:
            raise DataError(
                f"message {number}: {named} has no place for {unread[0]!r}; expected a template that reads it, or "
                f"messages without it"
            )
    if row.tools and not is_read("tools"):
        raise DataError(f"{named} has no place for 'tools'; expected a template that reads them, or rows without them")


def _name_of(template: str) -> str:
    shown = " ".join(template.split())
    return f"the tokenizer's chat template ({shown if len(shown) <= 50 else shown[:50] + ' …'})"
