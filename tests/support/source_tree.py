"""Reads the source as syntax trees: modules, packages, and which imports which. Nothing is imported by it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP = ("orchestrator", "trainables")


@cache
def files() -> dict[str, Path]:
    """Returns module name -> file of all that is neither a test nor a benchmark."""
    found: dict[str, Path] = {}
    for path in sorted(file for top in TOP for file in (ROOT / top).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert name not in found, f"{path} is hidden by {found[name]}"
        found[name] = path
    return found


@cache
def sources() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(), str(path)) for name, path in files().items()}


@cache
def packages() -> frozenset[str]:
    """Returns every folder with modules, as a dotted name; the two top ones have no __init__.py."""
    return frozenset(name for module in files() for name in parents(module)) | frozenset(
        name for name, path in files().items() if path.name == "__init__.py"
    )


def parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


@cache
def imported(module: str) -> frozenset[str]:
    """Returns every module that one imports, wherever the statement stands; `from a import b` names both a and a.b."""
    found = set[str]()
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def own(module: str) -> set[str]:
    """Returns those of our modules that a module imports, without the packages that they lie in."""
    found = imported(module) & sources().keys() - {module}
    return {name for name in found if files()[name].name != "__init__.py" or not within(found - {name}, name)}


def within(names: Iterable[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


@cache
def reaches(module: str) -> frozenset[str]:
    """Returns all of our modules that importing one brings along."""
    found, todo = set[str](), [module]
    while todo:
        for name in imported(todo.pop()) & sources().keys():
            if name not in found:
                found.add(name)
                todo.append(name)
    return frozenset(found)


def importers(package: str) -> set[str]:
    return {module for module in sources() if within(imported(module), package)}


def room(module: str) -> str:
    """Returns the room of a module: the second part of its name, or its top package where it lies directly in that."""
    name = ".".join(module.split(".")[:2])
    return name if name in packages() else module.split(".")[0]


def drawing() -> set[tuple[str, str]]:
    """Returns which room imports which, without the arrows that a longer way stands for."""
    graph: dict[str, set[str]] = {room(module): set() for module in sources()}
    for module in sources():
        graph[room(module)] |= {room(name) for name in own(module)} - {room(module)}

    def below(start: str) -> set[str]:
        found, todo = set[str](), [*graph[start]]
        while todo:
            name = todo.pop()
            todo += graph[name] - found
            found.add(name)
        return found

    return {(a, b) for a in graph for b in graph[a] if not any(b in below(c) for c in graph[a] - {b})}


def cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Returns a circle of a graph, its first node repeated at the end; empty where there is none."""
    done = set[str]()
    for start in graph:
        path: list[str] = []
        stack: list[tuple[str, Iterator[str]]] = [] if start in done else [(start, iter(graph[start]))]
        while stack:
            node, following = stack[-1]
            if not path or path[-1] != node:
                path.append(node)
            after = next((name for name in following if name not in done), None)
            if after is None:
                done.add(node)
                path.pop()
                stack.pop()
            elif after in path:
                return [*path[path.index(after) :], after]
            else:
                stack.append((after, iter(graph.get(after, ()))))
    return []


def calls() -> Iterator[tuple[str, str, dict[str, ast.expr], int]]:
    """Yields (module, dotted name of what is called, keywords, line)."""
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield module, ast.unparse(node.func), {str(k.arg): k.value for k in node.keywords}, node.lineno


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield module, node
