"""Instructions made of the standard library's docstrings, on every machine: describe a signature in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from trainables.config.data import PythonInstructions
from trainables.data.instructions.rows import Row, Rows, Turn
from trainables.data.near_duplicates import normalise
from trainables.data.sources.files import Places
from trainables.data.sources.python_docs import Definition, definitions, paragraphs
from trainables.data.split import Sources

PROMPT = "Describe this function."
SIGNATURE, DESCRIPTION = 120, 160  # characters at most
WORDS = (4, 24)  # of a description, at least and at most
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
CODE = re.compile(r">>>|->|::|[`{}|=<>*\\]|\w\(|\.\.\.|\bself\b")  # a description in English has none of it
UNFINISHED = re.compile(r"\b(deprecated|see also|internal|todo|xxx|override|overrides|overridden|subclass|subclasses|undocumented)\b", re.IGNORECASE)  # fmt: skip


class Described(NamedTuple):
    module: str
    prompt: str
    signature: str
    description: str


def load(_: PythonInstructions, __: Places) -> Sources[Rows]:
    return Sources(
        tuple(Row((Turn("user", one.prompt),), one.signature, (one.description,), one.module) for one in descriptions())
    )


def descriptions() -> list[Described]:
    """Returns functions whose docstring begins with a sentence of plain English; each sentence and signature once."""
    said, seen, found = set[str](), set[str](), []
    for definition in definitions():
        for one in _described(definition):
            if normalise(one.description) in said or one.signature in seen:
                continue
            said.add(normalise(one.description))
            seen.add(one.signature)
            found.append(one)
    return found


def _described(definition: Definition) -> Iterator[Described]:
    """Yields a function with the first sentence of its docstring, if the sentence says what the function does."""
    if definition.signature is None:
        return
    arguments = definition.signature.partition("(")[2]
    signature = f"{definition.name.removeprefix(f'{definition.module}.')}({arguments}"
    description = _first_sentence(definition.docstring)
    num_words = len(WORD.findall(description))
    is_plain = not CODE.search(description) and not UNFINISHED.search(description)
    if is_plain and WORDS[0] <= num_words <= WORDS[1] and max(len(signature) - SIGNATURE, len(description) - DESCRIPTION) <= 0:  # fmt: skip
        yield Described(definition.module, PROMPT, signature, description)


def _first_sentence(docstring: str) -> str:
    """Returns the first sentence as one line that ends in a full stop; "" where the docstring begins otherwise."""
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", next(paragraphs(docstring), ""))[0]
    if not sentence[:1].isupper() or sentence[-1] in ":,;?!":
        return ""
    return sentence if sentence.endswith(".") else f"{sentence}."
