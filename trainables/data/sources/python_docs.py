"""The embedded corpus: the language reference and the standard library's docstrings, as this Python carries them."""

from __future__ import annotations

import ast
import gc
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from trainables.config.data import PythonDocs
from trainables.config.errors import DataError
from trainables.data.sources.files import Places
from trainables.data.split import Sources

# Not English (encodings: tables; topics are read by import), tests, or what distributions package apart or later
# dropped: the corpus should be the same on every machine with the same Python.
LEFT_OUT = {"encodings", "pydoc_data", "test", "tests", "tkinter", "turtle.py", "turtledemo", "idlelib", "lib2to3"}
LEFT_OUT |= {"ensurepip", "distutils", "site-packages", "dist-packages", "sitecustomize.py", "usercustomize.py"}
# of headings: a tenth of the tokens, and no English
UNDERLINE = re.compile(r"^[ \t]*([^\w\s])\1{2,}[ \t]*\n", re.MULTILINE)


class Definition(NamedTuple):
    """A module, a class or a function with a docstring."""

    module: str  # as it is imported
    name: str  # qualified
    docstring: str  # as inspect.cleandoc leaves it
    signature: str | None  # of a function: `name(arguments)`


def load(_: PythonDocs, __: Places) -> Sources[tuple[str, ...]]:
    return Sources(tuple(documents()))


def documents() -> list[str]:
    """Returns a document for each topic of the reference, then one for each module that has docstrings."""
    from pydoc_data.topics import topics  # 0.7 MB of strings: only when asked for

    modules = []
    for _, own in groupby(definitions(), key=lambda definition: definition.module):
        text = "".join(f"{definition.name}\n{definition.docstring}\n\n" for definition in own)
        modules.append(_without_surrogates(UNDERLINE.sub("", text).strip()))
    return [UNDERLINE.sub("", topics[name]).strip() for name in sorted(topics)] + modules


@lru_cache(maxsize=1)
def definitions() -> tuple[Definition, ...]:
    """Returns the definitions of the standard library, in the order of its files."""
    root = Path(sysconfig.get_path("stdlib"))
    collecting = gc.isenabled()
    gc.disable()  # it would walk over all of torch for every few files: three times slower
    try:
        found = tuple(definition for path in _sources(root) for definition in _module(path, root))
    finally:
        if collecting:
            gc.enable()
    if not found:
        raise DataError(f"python_docs: no source files of the standard library in {root}; use kind: files instead")
    return found


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - LEFT_OUT)
        for name in sorted(set(files) - LEFT_OUT):
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "_test")):
                yield Path(folder, name)


def _module(path: Path, root: Path) -> list[Definition]:
    """Returns the definitions of a module; none if the file is not Python."""
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources are not ours
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples that end in .py
            return []
    return list(_definitions(tree, name, name))


def _definitions(node: ast.AST, name: str, module: str) -> Iterator[Definition]:
    """Yields definitions with a docstring, outer ones first; none inside functions."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        signature = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"{node.name}({ast.unparse(node.args)})"
        if doc := ast.get_docstring(node):
            yield Definition(module, name, doc, signature)
        if signature is not None:
            return
    for field in ("body", "orelse", "handlers", "finalbody"):  # definitions also stand under `if` and `try`
        inner = getattr(node, field, None)
        for child in inner if isinstance(inner, list) else ():
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _definitions(child, f"{name}.{child.name}" if named else name, module)


def paragraphs(docstring: str) -> Iterator[str]:
    """Yields each paragraph as one line."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if text := " ".join(paragraph.split()):
            yield _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is legal in a literal, not in UTF-8
