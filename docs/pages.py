"""Collects the pages of the documentation site in site/pages: those of docs/, and those that are made from the source.

python -m docs.pages && mkdocs build --strict -f docs/mkdocs.yml        # what `make docs` does
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from ruamel.yaml import YAML

from orchestrator import command
from orchestrator.command import COMMANDS, overview
from orchestrator.study.json_schema import study_schema

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site" / "pages"
MADE = ("reference.md", "commands.md", "systems.md", "source.md")
COPIED = {"CONTRIBUTING.md": "contributing.md", "benchmarks/RESULTS.md": "measurements.md"}
RARE = Path(__file__).with_name("keys.yaml")  # examples of keys that no shipped study uses
Schema = dict[str, Any]


def main() -> int:
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(
        ROOT / "docs", SITE, ignore=shutil.ignore_patterns("*.py", "mkdocs.yml", "keys.yaml", "__pycache__")
    )
    for file, page in COPIED.items():
        (SITE / page).write_text(re.sub(r"\]\((?:docs|benchmarks)/(?:RESULTS\.md)?", "](", (ROOT / file).read_text()))
    for page, text in made().items():
        (SITE / page).write_text(text)
    return 0


def made() -> dict[str, str]:
    """Returns the pages that are made from the source."""
    return dict(zip(MADE, (Reference().page(), commands(), systems(), source()), strict=True))


# ------------------------------------------------------------------------------------------------------ the study file


class Reference:
    """The keys of a study file, class by class: type, default, meaning, and an example."""

    def __init__(self) -> None:
        schema = study_schema()
        self.parts: dict[str, Schema] = {"Study": schema, **schema["$defs"]}
        self.found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for study in studies():
            self.collect(study, schema, "Study")
            for path, value in changes(study):
                nested = value
                for key in reversed(path.removeprefix("trial.").split(".")):
                    nested = {key: nested}
                self.collect(nested, self.parts["TrialSpec"], "TrialSpec")
        for part, keys in YAML(typ="safe").load(RARE).items():
            self.collect(keys, self.parts[part], part)

    def collect(self, value: Any, schema: Schema, part: str) -> None:
        """Collects the values of all keys in a part of a file."""
        schema, part = self.resolved(schema, part)
        for member in schema.get("oneOf", schema.get("anyOf", ())):
            if self.fits(value, member):
                self.collect(value, member, part)
                return
        for key, item in value.items() if isinstance(value, dict) else ():
            if key in schema.get("properties", {}):
                self.found[part, key].append(flow(item))
                self.collect(item, schema["properties"][key], part)
            else:
                self.collect(item, of_names(schema), part)
        for item in value if isinstance(value, list) else ():
            self.collect(item, schema.get("items", {}), part)

    def fits(self, value: Any, schema: Schema) -> bool:
        """Whether a value is meant for this member of a union: by its kind, else by its keys."""
        schema, _ = self.resolved(schema, "")
        if members := schema.get("oneOf", schema.get("anyOf")):
            return any(self.fits(value, member) for member in members)
        if not isinstance(value, dict) or schema.get("type") != "object":
            return (schema.get("type") == "object") == isinstance(value, dict)
        if "properties" not in schema:
            return all(self.fits(item, of_names(schema)) for item in value.values())
        keys = schema["properties"]
        return value.keys() <= keys.keys() and value.get("kind") in (None, keys.get("kind", {}).get("const"))

    def resolved(self, schema: Schema, part: str) -> tuple[Schema, str]:
        name = schema["$ref"].rpartition("/")[2] if "$ref" in schema else part
        return (self.parts[name] if "$ref" in schema else schema), name

    def example(self, part: str, key: str) -> str | None:
        """The most frequent value of the studies; else that of a key of this name and type elsewhere; else the default."""
        schema = self.parts[part]["properties"][key]
        default = flow(schema["default"]) if schema.get("default") is not None else None
        elsewhere = [
            text
            for (other, name), texts in self.found.items()
            if name == key and self.type_of(self.parts[other]["properties"][key]) == self.type_of(schema)
            for text in texts
        ]
        for texts in (self.found[part, key], elsewhere):
            if texts:
                return min(texts, key=lambda text: (text in ("null", default, "{}"), -texts.count(text), len(text)))
        return default

    def type_of(self, schema: Schema) -> str:
        """A type in words, with links to the classes that it names."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            part = self.parts[name]
            return f"[{self.title(name)}](#{name.lower()})" if "properties" in part else self.type_of(part)
        if members := schema.get("oneOf", schema.get("anyOf")):
            return " or ".join(dict.fromkeys(self.type_of(member) for member in members))
        if "const" in schema or "enum" in schema:
            return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
        match schema.get("type"):
            case "array" if "prefixItems" in schema:
                return f"[{', '.join(self.type_of(item) for item in schema['prefixItems'])}]"
            case "array":
                return f"list of {self.type_of(schema.get('items', {}))}"
            case "object" if "properties" not in schema:
                return f"name → {self.type_of(of_names(schema))}"
            case "string":
                return "name" if "pattern" in schema else "text"
            case "integer" | "number" | "boolean" as kind:
                return {"integer": "whole number", "number": "number", "boolean": "`true` or `false`"}[kind] + bounds(
                    schema
                )
            case "null":
                return "`null`"
        return "any value"

    def title(self, part: str) -> str:
        kind = self.parts[part]["properties"].get("kind", {})
        return str(kind.get("const") or part)

    def rows(self, part: str) -> Iterator[tuple[str, str, str, str, str]]:
        """Yields key, type, default, meaning and example; empty where there is none."""
        for key, schema in self.parts[part]["properties"].items():
            if key != "kind" or "enum" in schema:
                default = flow(schema["default"]) if "default" in schema else ""
                yield key, self.type_of(schema), default, schema.get("description", ""), self.example(part, key) or ""

    def order(self) -> list[str]:
        """The classes, each after the first that names it."""
        found, todo = list[str](), ["Study"]
        while todo:
            if (part := todo.pop(0)) not in found and "properties" in self.parts[part]:
                found.append(part)
                keys = self.parts[part]["properties"]
                todo[:0] = dict.fromkeys(re.findall(r"#/\$defs/(\w+)", json.dumps([keys[key] for key in keys])))
        return found

    def page(self) -> str:
        lines = [
            "# Reference of the study file",
            "Made from the classes in the source. The same text is in the JSON schema by which editors complete a study "
            "(`# yaml-language-server: $schema=…` in its first line). A default of `null` means: as the last column but one "
            "says. `dotted.paths` of arms, `vary`, `tune` and profiles name these keys.",
        ]
        for part in self.order():
            schema = self.parts[part]
            title = {"Study": "The file", "TrialSpec": "trial"}.get(part, self.title(part))
            about = "" if part == "Study" else schema.get("description", "").replace("\n", "\n\n")
            lines += [f"## {title} {{#{part.lower()}}}", about]
            if rows := list(self.rows(part)):
                lines.append("| key | type | default | meaning | example |\n|---|---|---|---|---|\n" + "\n".join(
                    f"| `{key}` | {cell(kind)} | {code(default) or 'required'} | {cell(text)} | {code(example)} |"
                    for key, kind, default, text, example in rows
                ))  # fmt: skip
        return "\n\n".join(lines) + "\n"


def studies() -> Iterator[Any]:
    """Yields the shipped studies, and those in the README and in docs/, also where only a part is printed."""
    yaml = YAML(typ="safe")
    for file in sorted((ROOT / "search_spaces").glob("*.yaml")):
        yield yaml.load(file)
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```yaml\n(.*?)```", file.read_text(), re.DOTALL):
            value = yaml.load(block)
            yield value if value.keys() & {"trial", "vary", "arms", "slot"} else {"trial": value}


def changes(study: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) for all that arms, profiles and choices put into the trial."""
    for paths in [*(study.get("arms") or {}).values(), *(study.get("profiles") or {}).values()]:
        yield from (paths or {}).items()
    for path, axis in (study.get("vary") or {}).items():
        choices = axis.get("choice", {})
        for value in choices.values() if isinstance(choices, dict) else choices:
            yield path, value


def of_names(schema: Schema) -> Schema:
    """The schema of the values of a mapping whose keys are names."""
    found = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), {})
    return found if isinstance(found, dict) else {}


def bounds(schema: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return f" {' and '.join(found)}" if found else ""


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(flow(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("||", "∥").replace("|", "\\|")


def code(text: str) -> str:
    short = text if len(text) <= 90 else f"{text[:88]} …"
    return f"`{cell(short)}`" if text else ""


# ------------------------------------------------------------------------------------------------ commands and systems


def commands() -> str:
    """Returns the help of each command."""
    lines = ["# Commands", f"```\n{overview()}\n```"]
    for name, known in COMMANDS.items():
        lines += [
            f"## {name}",
            f"{known.about.capitalize()}.",
            f"    codistill {known.example}",
            f"```\n{help_of(name)}```",
        ]
    return "\n\n".join(lines) + "\n"


def help_of(name: str) -> str:
    wide, output = mock.patch.dict("os.environ", COLUMNS="100"), contextlib.redirect_stdout(io.StringIO())
    with wide, output as out, contextlib.suppress(SystemExit):
        command.main([name, "--help"])
    return out.getvalue()


def systems() -> str:
    """Returns what the shipped studies say of themselves in their first lines, and what was measured with them."""
    table, sections = "| study | question | cost |\n|---|---|---|", list[str]()
    for file in sorted((ROOT / "search_spaces").glob("*.yaml")):
        header = re.match(r"(?:# .*\n)+", file.read_text())
        text = re.sub(r"\n# {2,}", " ", header[0] if header else "")
        about = dict(re.findall(r"^# ([A-Z][a-z]+) +(.*)$", text, re.MULTILINE))
        table += f"\n| [{file.stem}](#{file.stem}) | {cell(about['Question'])} | {cell(about['Cost'])} |"
        lines = [f"**{key}**: {about[key]}" for key in ("Paper", "Differs") if key in about]
        if found := verdicts(file.stem):
            lines.append(
                "**Our verdicts**, at the scale that [measurements](measurements.md) gives: " + "; ".join(found)
            )
        sections += [f"## {file.stem} {{#{file.stem}}}", f"    codistill run search_spaces/{file.name}", *lines]
    return "\n\n".join(["# Studies that are shipped", table, *sections]) + "\n"


def verdicts(study: str) -> list[str]:
    """Returns claim and verdict of each row `study: claim | … | verdict` in the tables of benchmarks/RESULTS.md."""
    rows = re.findall(rf"^\| {study}: (.+) \|$", (ROOT / "benchmarks" / "RESULTS.md").read_text(), re.MULTILINE)
    return [f"{cells[0]} - {cells[-1]}" for cells in (row.split(" | ") for row in rows)]


# -------------------------------------------------------------------------------------------------------------- source


def source() -> str:
    """Returns the docstrings of all modules, and of their public functions and classes with signatures."""
    lines = ["# Modules", "What each module is, and its public functions and classes."]
    for file in sorted(file for top in ("orchestrator", "trainables") for file in (ROOT / top).rglob("*.py")):
        tree = ast.parse(file.read_text())
        if not (about := ast.get_docstring(tree)):
            continue
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        lines += [f"## {name}", text_of(about)]
        for node in tree.body:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if is_public and (text := ast.get_docstring(node)):
                signature = ast.unparse(node).partition(":\n")[0].splitlines()[-1]
                lines += [f"`{signature.removeprefix('def ')}`", f":   {text_of(text)}"]
    return "\n\n".join(lines) + "\n"


def text_of(docstring: str) -> str:
    """A docstring as text: on one line, with what Markdown would read escaped outside of backticks."""
    parts = re.split(r"(`[^`]*`)", " ".join(docstring.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<*_\[\]|{}])", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
