"""Makes the JSON schema of a study file, by which editors complete keys, show what they mean and mark what is wrong.

    python -m orchestrator.study.json_schema        # writes orchestrator/study/study.schema.json

A profile or `--set` may bring what a file leaves out, so the schema asks for no key but `kind`; `--dry-run` says what is
missing. Descriptions are the comments and docstrings of the classes in the source.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from orchestrator.study.load import KEYS
from orchestrator.study.schema import Study
from trainables.config.trial import TrialSpec
from trainables.config.value import Value

FILE = Path(__file__).with_name("study.schema.json")
PROFILES = {
    "default": {},
    "type": ["object", "null"],
    "additionalProperties": {"type": "object"},
    "description": "name -> {dotted path from the top of the file: value}; the first profile is the default",
}


def study_schema() -> dict[str, Any]:
    """Returns the schema of a study file; `$defs` has a part for each class of values, named as the class."""
    _, both = models_json_schema([(Study, "validation"), (TrialSpec, "validation")])
    parts: dict[str, Any] = both["$defs"]
    for cls in _subclasses(Value):
        if part := parts.get(cls.__name__):
            part["description"] = inspect.cleandoc(cls.__doc__ or "")
            part["required"] = [key for key in part.get("required", []) if key == "kind"]
            for key, text in field_texts(cls).items():
                part["properties"][key]["description"] = text
    for name in ("seed", "extension"):  # which no study file sets
        del parts["TrialSpec"]["properties"][name]
    keys = parts.pop("Study")["properties"] | {"profiles": PROFILES}
    keys["trial"] = {"$ref": "#/$defs/TrialSpec", "description": keys["trial"]["description"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A study of codistill",
        "type": "object",
        "additionalProperties": False,
        "properties": {key: keys[key] for key in KEYS},
        "$defs": parts,
    }


def field_texts(cls: type[BaseModel]) -> dict[str, str]:
    """Returns what each field means, by its key in a file: the comment beside or above the field, else the sentences of a
    docstring that name it; no entry for a field of which neither says anything."""
    bases = [base for base in reversed(cls.__mro__) if issubclass(base, Value) and base is not Value]
    found = {key: text for base in bases for key in cls.model_fields if (text := _sentences(base.__doc__ or "", key))}
    for base in bases:
        found |= _comments(base)
    return {field.alias or key: found[key] for key, field in cls.model_fields.items() if key in found}


def _sentences(docstring: str, key: str) -> str:
    """Returns the sentences that have the field's name in backticks; where one starts with the name and a colon, what
    follows it."""
    name = key.rstrip("_")  # of a field whose alias is a word of Python
    sentences = re.split(r"(?<=[.;])(?<!al\.)\s+", " ".join(docstring.split()))
    named = [sentence for sentence in sentences if re.search(rf"`{name}\b", sentence)]
    return re.sub(rf"^`{name}`: |[.;]$", "", " ".join(named))


def _comments(cls: type) -> dict[str, str]:
    """Returns the comments of a class's own fields: at the end of the field's last line, else in the lines above it."""
    tree, beside, alone = _read(inspect.getfile(cls))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    found = dict[str, str]()
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines, line = list[str](), node.lineno - 1
            while line in alone:
                lines.insert(0, alone[line])
                line -= 1
            if text := beside.get(node.end_lineno or node.lineno) or " ".join(lines):
                found[node.target.id] = text
    return found


@cache
def _read(file: str) -> tuple[ast.Module, dict[int, str], dict[int, str]]:
    """Returns a module's tree, and its comments by line: those beside code, and those alone in their line."""
    text = Path(file).read_text()
    beside, alone = dict[int, str](), dict[int, str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            kept = beside if token.line[: token.start[1]].strip() else alone
            kept[token.start[0]] = token.string.lstrip("# ")
    return ast.parse(text), beside, alone


def _subclasses(cls: type[BaseModel]) -> list[type[BaseModel]]:
    return [sub for child in cls.__subclasses__() for sub in (child, *_subclasses(child))]


def as_text() -> str:
    return json.dumps(study_schema(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    FILE.write_text(as_text())
    print(FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
