"""Instructions made of the standard library's docstrings, on every machine: a signature, to be described in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from trainables.data.corpus.documents import normalise
from trainables.data.sources.python_docs import Definition, definitions

PROMPT = "Describe this function."
SIGNATURE, DESCRIPTION = 120, 160  # characters at most
WORDS = (4, 24)  # of a description: fewer say too little, more are no summary
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
CODE = re.compile(r">>>|->|::|[`{}|=<>*\\]|\w\(|\.\.\.|\bself\b")  # a description in English has none of it
UNFINISHED = re.compile(r"\b(deprecated|see also|internal|todo|xxx|override|overrides|overridden|subclass|subclasses|undocumented)\b", re.IGNORECASE)  # fmt: skip


class Described(NamedTuple):
    module: str
    prompt: str
    signature: str
    description: str


def descriptions() -> list[Described]:
    """Functions whose docstring begins with a sentence of plain English; each sentence and each signature once."""
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
    """The definition with the first sentence of its docstring, if that says what a function does."""
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
    """Of the first paragraph, as one line that ends in a full stop; nothing where there is none such."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring)[0].split()).encode("utf-8", "replace").decode()
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)[0]
    if not sentence[:1].isupper() or sentence[-1] in ":,;?!":
        return ""
    return sentence if sentence.endswith(".") else f"{sentence}."
