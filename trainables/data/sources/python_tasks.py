"""Two tasks made of the standard library's docstrings, on every machine: the part of the library that a text is about, and
whether a text describes a signature. The corpus `python_docs` has these texts too, without the labels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from trainables.config.data import PythonTask
from trainables.data.classification.labelled import Labelled
from trainables.data.near_duplicates import all_shingles, normalise, repeats
from trainables.data.sources.files import Places
from trainables.data.sources.python_docs import Definition, definitions, paragraphs
from trainables.data.split import SPLITS, Sources, sha256_hex, split_groups

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
TOPIC_WORDS, DESCRIPTION_WORDS = 8, 4  # words of a text at least
SIGNATURE, DESCRIPTION = 200, 300  # characters at most

_One = TypeVar("_One")


def load(data: PythonTask, _: Places) -> Sources[Labelled]:
    return topic() if data.task == "topic" else signature()


def topic() -> Sources[Labelled]:
    """Makes examples of paragraphs of docstrings and their class. A docstring is in one split as a whole."""
    class_of = {module: number for number, modules in enumerate(TOPICS.values()) for module in modules.split()}
    names = sorted((module.strip("_") for module in class_of if len(module) > 1), key=len, reverse=True)
    # names of modules would tell the class: they are masked in every text
    names_of_modules = re.compile(rf"\b({'|'.join(names)})\b", re.IGNORECASE)
    by_class: dict[int, list[_Paragraphs]] = defaultdict(list)
    seen = set[str]()
    for definition in definitions():
        number = class_of.get(definition.module.partition(".")[0])
        if number is None:
            continue
        texts = []
        for paragraph in paragraphs(definition.docstring):
            text = names_of_modules.sub("module", paragraph)
            if ">>>" in text or len(WORDS.findall(text)) < TOPIC_WORDS or normalise(text) in seen:
                continue
            seen.add(normalise(text))
            texts.append(text)
        if texts:
            by_class[number].append(_Paragraphs(number, texts))
    splits: dict[str, list[_Paragraphs]] = {name: [] for name in SPLITS}
    for docstrings in by_class.values():  # each class in proportion
        held_out = dict.fromkeys(("dev", "test"), HELD_OUT * sum(len(docstring.texts) for docstring in docstrings))
        cut = split_groups(docstrings, held_out, key=lambda one: one.texts[0], size=lambda one: len(one.texts))
        for name, some in cut.items():
            splits[name] += some
    rows = {name: [(text, one.number) for one in some for text in one.texts] for name, some in splits.items()}
    kept, removed = _without_repeats(rows, text=lambda row: row[0])
    tables: dict[str, Any] = {name: _table([t for t, _ in r], None, [n for _, n in r]) for name, r in kept.items()}
    return Sources(**tables, class_names=tuple(TOPICS), removed=removed)


class _Paragraphs(NamedTuple):
    number: int  # of the class
    texts: list[str]


class _Function(NamedTuple):
    module: str
    name: str  # without its class
    signature: str
    description: str


def signature() -> Sources[Labelled]:
    """Makes examples of functions with their own description (1), and of each with that of another function (0).

    A description, too, has each label once, so that neither text alone tells the label. The other function is of any
    module: with descriptions of the same module only, small models learn nothing. A module is in one split as a whole.
    """
    by_module: dict[str, list[_Function]] = defaultdict(list)
    seen = set[str]()
    for definition in definitions():
        for function in _functions(definition):
            if normalise(function.description) not in seen:
                seen.add(normalise(function.description))
                by_module[function.module].append(function)
    held_out = dict.fromkeys(("dev", "test"), HELD_OUT * sum(map(len, by_module.values())))
    splits = split_groups(list(by_module.values()), held_out, key=lambda module: module[0].module, size=len)
    rows = {name: [function for module in some for function in module] for name, some in splits.items()}
    kept, removed = _without_repeats(rows, text=lambda function: function.description)
    tables: dict[str, Any] = {name: _pairs(functions) for name, functions in kept.items()}
    return Sources(**tables, class_names=("another", "described"), removed=2 * removed)


def _functions(definition: Definition) -> Iterator[_Function]:
    """Yields the function with each of its first two paragraphs that is long enough and does not show the signature."""
    if definition.signature is None:
        return
    name, _, arguments = definition.signature.partition("(")
    qualified = definition.name.removeprefix(f"{definition.module}.")
    shown = f"{_split_words(qualified.replace('.', ' . '))} ({arguments}"[:SIGNATURE]
    for paragraph in islice(paragraphs(definition.docstring), 2):
        description = " ".join(re.split(r"(?<=[.!?])\s+", paragraph)[:2])[:DESCRIPTION]
        says_enough = len(WORDS.findall(description)) >= DESCRIPTION_WORDS
        if says_enough and f"{name}(" not in description and ">>>" not in description:
            yield _Function(definition.module, name, shown, description)


def _split_words(name: str) -> str:
    """Splits a name into words: `HTTPConnection.get_response` -> `HTTP Connection.get response`."""
    return " ".join(re.sub(r"([a-z0-9])(?=[A-Z])|([A-Z])(?=[A-Z][a-z])", r"\1\2 ", name).replace("_", " ").split())


def _pairs(functions: Sequence[_Function]) -> Labelled:
    """Pairs each function with its own description and with that of the next in a ring, in the order of their hashes."""
    ring = sorted(functions, key=lambda function: sha256_hex(f"{function.signature} {function.description}"))
    for i in range(
        len(ring)
    ):  # another `close` may fit the description of the first: the function after it comes first
        following, after = (i + 1) % len(ring), (i + 2) % len(ring)
        if ring[i].name == ring[following].name:
            ring[following], ring[after] = ring[after], ring[following]
    rows = [
        row
        for function, other in zip(ring, [*ring[1:], *ring[:1]], strict=True)
        for row in ((function.signature, function.description, 1), (function.signature, other.description, 0))
    ]
    return _table([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def _without_repeats(rows: dict[str, list[_One]], *, text: Callable[[_One], str]) -> tuple[dict[str, list[_One]], int]:
    """Removes rows whose text is nearly in another split from dev, then from train. Returns (rows, number of removed rows)."""
    kept, removed = {"test": rows["test"]}, 0
    held_out = all_shingles([text(row) for row in rows["test"]])
    for name in ("dev", "train"):
        there = repeats([text(row) for row in rows[name]], held_out)
        kept[name] = [row for row, is_there in zip(rows[name], there, strict=True) if not is_there]
        removed += int(there.sum())
        held_out = np.union1d(held_out, all_shingles([text(row) for row in kept[name]]))
    return kept, removed


def _table(first: list[str], second: list[str] | None, labels: list[int]) -> Labelled:
    return Labelled(tuple(first), None if second is None else tuple(second), np.array(labels, np.int64))
