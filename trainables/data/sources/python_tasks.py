"""Two tasks made of the standard library's docstrings, on every machine: which part of the library a text is about, and
whether a text describes a signature. What python_docs has for pretraining has these texts too, without the labels.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from trainables.data.classification.labelled import SPLITS, Labelled, Sources
from trainables.data.corpus.documents import all_shingles, normalise, repeats
from trainables.data.sources.python_docs import Definition, definitions

# Top-level modules by what they are for: only such as Python 3.11, 3.12 and 3.13 all have.
TOPICS = {
    "concurrency": "asyncio concurrent multiprocessing threading queue sched subprocess selectors signal contextvars",
    "internet": "http urllib smtplib imaplib poplib ftplib xmlrpc wsgiref webbrowser html ipaddress socket socketserver ssl"
    " netrc",
    "mail": "email mailbox mimetypes quopri base64",
    "testing": "unittest doctest pdb bdb trace profile cProfile pstats timeit traceback tracemalloc logging warnings cmd",
    "numbers": "_pydecimal decimal fractions statistics random numbers datetime _pydatetime calendar colorsys uuid hmac"
    " secrets heapq bisect graphlib",
    "files": "os pathlib shutil tarfile zipfile gzip bz2 lzma tempfile glob fileinput filecmp _pyio io stat posixpath ntpath"
    " genericpath fnmatch shelve dbm linecache zipimport",
    "language": "ast inspect dis tokenize importlib pkgutil types typing symtable compileall py_compile runpy modulefinder"
    " pyclbr code codeop enum dataclasses abc contextlib functools weakref copy ctypes site sysconfig pydoc collections"
    " _collections_abc opcode pickletools",
    "formats": "xml json csv plistlib configparser re string textwrap difflib argparse optparse getopt pprint reprlib gettext"
    " locale codecs pickle struct shlex",
}
HELD_OUT = 0.12  # of the examples, for each of dev and test
WORDS = re.compile(r"[A-Za-z]{3,}")
TOPIC_WORDS, DESCRIPTION_WORDS = 8, 4  # at least so many: fewer say too little
SIGNATURE, DESCRIPTION = 200, 300  # characters at most

_One = TypeVar("_One")


def topic() -> Sources:
    """Paragraphs of docstrings and their class. A docstring is in one split as a whole, whatever its length."""
    class_of = {module: number for number, modules in enumerate(TOPICS.values()) for module in modules.split()}
    names = sorted((module.strip("_") for module in class_of if len(module) > 1), key=len, reverse=True)
    names_of_modules = re.compile(
        rf"\b({'|'.join(names)})\b", re.IGNORECASE
    )  # would tell the class: masked in every text
    by_class: dict[int, list[_Paragraphs]] = defaultdict(list)
    seen = set[str]()
    for definition in definitions():
        number = class_of.get(definition.module.partition(".")[0])
        if number is None:
            continue
        texts = []
        for paragraph in _paragraphs(definition.docstring):
            text = names_of_modules.sub("module", paragraph)
            if ">>>" in text or len(WORDS.findall(text)) < TOPIC_WORDS or normalise(text) in seen:
                continue
            seen.add(normalise(text))
            texts.append(text)
        if texts:
            by_class[number].append(_Paragraphs(number, texts))
    splits: dict[str, list[_Paragraphs]] = {name: [] for name in SPLITS}
    for found in by_class.values():  # each class in proportion
        for name, some in _cut(found, key=lambda one: one.texts[0], size=lambda one: len(one.texts)).items():
            splits[name] += some
    rows = {name: [(text, one.number) for one in some for text in one.texts] for name, some in splits.items()}
    kept, removed = _without_repeats(rows, text=lambda row: row[0])
    return Sources(
        **{name: _table([t for t, _ in r], None, [n for _, n in r]) for name, r in kept.items()}, removed=removed
    )


class _Paragraphs(NamedTuple):
    number: int  # of the class
    texts: list[str]


class _Function(NamedTuple):
    module: str
    name: str  # without its class
    signature: str
    description: str


def signature() -> Sources:
    """Functions with their own description (1), and each again with that of another function (0).

    A description too stands once with either label, so that neither text tells anything alone. The other function is of any
    module: with descriptions of the same module only, small models learn nothing. A module is in one split as a whole.
    """
    by_module: dict[str, list[_Function]] = defaultdict(list)
    seen = set[str]()
    for definition in definitions():
        for function in _functions(definition):
            if normalise(function.description) not in seen:
                seen.add(normalise(function.description))
                by_module[function.module].append(function)
    splits = _cut(list(by_module.values()), key=lambda module: module[0].module, size=len)
    rows = {name: [function for module in some for function in module] for name, some in splits.items()}
    kept, removed = _without_repeats(rows, text=lambda function: function.description)
    return Sources(**{name: _pairs(functions) for name, functions in kept.items()}, removed=2 * removed)


def _functions(definition: Definition) -> Iterator[_Function]:
    """Once for each of its first two paragraphs that says enough and does not give the signature itself away."""
    if definition.signature is None:
        return
    name, _, arguments = definition.signature.partition("(")
    qualified = definition.name.removeprefix(f"{definition.module}.")
    shown = f"{_split_words(qualified.replace('.', ' . '))} ({arguments}"[:SIGNATURE]
    for paragraph in islice(_paragraphs(definition.docstring), 2):
        description = " ".join(re.split(r"(?<=[.!?])\s+", paragraph)[:2])[:DESCRIPTION]
        says_enough = len(WORDS.findall(description)) >= DESCRIPTION_WORDS
        if says_enough and f"{name}(" not in description and ">>>" not in description:
            yield _Function(definition.module, name, shown, description)


def _split_words(name: str) -> str:
    """`HTTPConnection.get_response` -> `HTTP Connection.get response`: words of which a description may speak."""
    return " ".join(re.sub(r"([a-z0-9])(?=[A-Z])|([A-Z])(?=[A-Z][a-z])", r"\1\2 ", name).replace("_", " ").split())


def _pairs(functions: Sequence[_Function]) -> Labelled:
    """Each in turn with its own description and with that of the next in a ring of all, in the order of their hashes."""
    ring = sorted(functions, key=lambda function: _hash(f"{function.signature} {function.description}"))
    for i in range(len(ring)):  # another `close` may well do what is described: the one after it comes first
        following, after = (i + 1) % len(ring), (i + 2) % len(ring)
        if ring[i].name == ring[following].name:
            ring[following], ring[after] = ring[after], ring[following]
    rows = [
        row
        for function, other in zip(ring, [*ring[1:], *ring[:1]], strict=True)
        for row in ((function.signature, function.description, 1), (function.signature, other.description, 0))
    ]
    return _table([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def _cut(items: Sequence[_One], *, key: Callable[[_One], str], size: Callable[[_One], int]) -> dict[str, list[_One]]:
    """Whole items go to dev, then to test, by the hash of their key, until each has its share; the rest is train."""
    split_of = ["train"] * len(items)
    rest = iter(sorted(range(len(items)), key=lambda i: _hash(key(items[i]))))
    total = sum(map(size, items))
    for name in ("dev", "test"):
        missing = HELD_OUT * total
        while missing > 0 and (index := next(rest, None)) is not None:
            split_of[index] = name
            missing -= size(items[index])
    return {name: [item for item, at in zip(items, split_of, strict=True) if at == name] for name in SPLITS}


def _without_repeats(rows: dict[str, list[_One]], *, text: Callable[[_One], str]) -> tuple[dict[str, list[_One]], int]:
    """Rows whose text is nearly in another split leave train, then dev. How many left."""
    kept, removed = {"test": rows["test"]}, 0
    held_out = all_shingles([text(row) for row in rows["test"]])
    for name in ("dev", "train"):
        there = repeats([text(row) for row in rows[name]], held_out)
        kept[name] = [row for row, is_there in zip(rows[name], there, strict=True) if not is_there]
        removed += int(there.sum())
        held_out = np.union1d(held_out, all_shingles([text(row) for row in kept[name]]))
    return kept, removed


def _paragraphs(docstring: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", docstring):
        text = " ".join(paragraph.split())
        if text:
            yield text.encode("utf-8", "replace").decode()  # a lone surrogate is legal in a literal, not in UTF-8


def _table(first: list[str], second: list[str] | None, labels: list[int]) -> Labelled:
    return Labelled(tuple(first), None if second is None else tuple(second), np.array(labels, np.int64))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
