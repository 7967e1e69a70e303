"""TODO."""

from __future__ import annotations

from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from trainables.config.data import (
    Instructions,
)
from trainables.config.errors import DataError
from trainables.data.instructions.rows import Row, _brief, divided

MARK = "codistill-reply"  # in no template


class Rendered(NamedTuple):
    """The text of a row: what the model is given, and what it is to write."""

    prompt: str
    lead: str  # what the template has between them (an empty thought, a space), to be written as well
    reply: str


def alpaca(prompt: str, context: str = "") -> str:
    """Taori et al. 2023, in both variants, with a line's end after the last word as MiniLLM's code has it."""
    paired = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{prompt}\n\n{middle}### Response:\n"
    )


def render(row: Row, template: str, tok: Any) -> Rendered:
    """`template`: alpaca, or chat, for which the tokenizer is asked. Raises DataError if that loses the reply."""
    if template == "alpaca":
        return Rendered(alpaca(row.turns[-1].content, row.context), "", row.replies[0])
    given = [turn._asdict() for turn in row.turns]
    if row.context:
        given[-1]["content"] += f"\n\n{row.context}"
    reply, named = row.replies[0], _name_of(chat_template(tok))
    try:
        prompt: str = tok.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        # what a template writes before a reply may hold the reply's words, so another one shows where it begins
        whole, marked = (
            tok.apply_chat_template([*given, {"role": "assistant", "content": text}], tokenize=False)
            for text in (reply, MARK)
        )
    except (TemplateError, ValueError, TypeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(turn.role for turn in row.turns)
        raise DataError(f"template: {named} refuses a conversation of {roles}, assistant: {said}") from error
    valid = "expected a template that puts the reply after the prompt as it is, or `template: alpaca`"
    if not whole.startswith(prompt) or not marked.startswith(prompt):
        raise DataError(f"template: {named} does not begin a conversation with its own prompt; {valid}")
    lead, found, _ = marked[len(prompt) :].partition(MARK)
    if not found or not whole.startswith(f"{prompt}{lead}{reply}"):
        raise DataError(f"template: {named} loses the reply {_brief(reply)}; {valid}")
    return Rendered(prompt, lead, reply)


def chat_template(tok: Any) -> str:
    try:
        found: str = tok.get_chat_template()
    except ValueError:  # it has none, or several without a default
        raise DataError(
            "template: chat is the tokenizer's own, and this tokenizer has none; expected `template: alpaca`, or the "
            "tokenizer of a chat model"
        ) from None
    return found


def _name_of(template: str) -> str:
    shown = " ".join(template.split())
    return f"the tokenizer's chat template ({shown if len(shown) <= 50 else shown[:50] + ' …'})"


def training_texts(data: Instructions) -> list[str]:
    """For a tokenizer: what is read of train, template and all."""
    if data.template == "chat":
        raise DataError("template: chat needs a pretrained tokenizer that brings one; expected `template: alpaca`")
    rendered = [render(row, data.template, None) for row in divided(data).train]
    if not rendered:
        raise DataError(
            "tokenizer: there is no train to train one on; expected pretrained, or that of another data set"
        )
    return [f"{one.prompt}{one.reply}" for one in rendered]
