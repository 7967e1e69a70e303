"""From rows to text: prompt and reply as a template renders them. Knows no token."""

from __future__ import annotations

from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from trainables.config.errors import DataError
from trainables.data.instructions.rows import Row, brief
from trainables.data.tokenizer import chat_template

MARK = "codistill-reply"  # in no template


class Rendered(NamedTuple):
    """The text of a row: the prompt that a model reads, and what it learns to write."""

    prompt: str
    lead: str  # text of the template between prompt and reply (an empty thought, a space), which is learnt too
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
    """Renders a row by `template`: alpaca, or chat, the tokenizer's own. Raises DataError where the reply is lost."""
    if template == "alpaca":
        return Rendered(alpaca(row.turns[-1].content, row.context), "", row.replies[0])
    given = [turn._asdict() for turn in row.turns]
    if row.context:
        given[-1]["content"] += f"\n\n{row.context}"
    reply, named = row.replies[0], _name_of(chat_template(tok))
    try:
        prompt: str = tok.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        # the text before a reply may have the words of the reply, so that a marked reply shows where the reply begins
        whole, marked = (
            tok.apply_chat_template([*given, {"role": "assistant", "content": text}], tokenize=False)
            for text in (reply, MARK)
        )
    except (TemplateError, ValueError, TypeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(turn.role for turn in row.turns)
        raise DataError(f"template: {named} refuses a conversation of {roles}, assistant: {said}") from error
    expected = "expected a template that puts the reply after the prompt as it is, or `template: alpaca`"
    if not whole.startswith(prompt) or not marked.startswith(prompt):
        raise DataError(f"template: {named} does not begin a conversation with its own prompt; {expected}")
    lead, found, _ = marked[len(prompt) :].partition(MARK)
    if not found or not whole.startswith(f"{prompt}{lead}{reply}"):
        raise DataError(f"template: {named} loses the reply {brief(reply)}; {expected}")
    return Rendered(prompt, lead, reply)


def _name_of(template: str) -> str:
    shown = " ".join(template.split())
    return f"the tokenizer's chat template ({shown if len(shown) <= 50 else shown[:50] + ' …'})"
