"""Finds which fields of the values in trainables/config/ the source reads, by a small inference of types.

The type of an expression is the set of our classes that its annotation names, containers looked through; a variable has
the types of all that is assigned to it. Reads inside validators do not count: a field that is only checked is dead.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache

from tests.support.source_tree import classes, functions, sources

Types = frozenset[str]
NONE: Types = frozenset()
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def aliases() -> dict[str, Types]:
    """Returns what each name in an annotation stands for: classes for themselves, `A = B | C` for both."""
    found = {node.name: frozenset({node.name}) for _, node in classes()}
    for _ in range(3):  # aliases of aliases
        for tree in sources().values():
            for node in tree.body:
                is_alias = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                if is_alias and (types := _named(node.value, found)):
                    found[node.targets[0].id] = types
    return found


def _named(node: ast.AST | None, known: dict[str, Types]) -> Types:
    """Returns the classes that an annotation names; texts in it are annotations, too."""
    found = NONE
    for part in ast.walk(node) if node is not None else ():
        if isinstance(part, ast.Name):
            found |= known.get(part.id, NONE)
        elif isinstance(part, ast.Attribute):
            found |= known.get(part.attr, NONE)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
            found |= known.get(part.value, NONE)
    return found


@cache
def members() -> dict[str, dict[str, Types]]:
    """Returns class -> attribute -> types: annotated fields, what methods return, what `self.x = …` was given."""
    found: dict[str, dict[str, Types]] = defaultdict(dict)
    for _, node in classes():
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                found[node.name][part.target.id] = _named(part.annotation, aliases())
            elif isinstance(part, Function):
                found[node.name][part.name] = _named(part.returns, aliases())
                arguments = {a.arg: a.annotation for a in (*part.args.args, *part.args.kwonlyargs)}
                for inner in ast.walk(part):
                    if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                        types = _named(arguments.get(inner.attr), aliases())
                        found[node.name].setdefault(inner.attr, types)  # whatever it is set on: mostly self
    return found


@cache
def bases() -> dict[str, tuple[str, ...]]:
    """Returns class -> itself and all classes above it that are ours."""
    direct = {node.name: [b.id for b in node.bases if isinstance(b, ast.Name)] for _, node in classes()}

    def up(name: str) -> tuple[str, ...]:
        return (name, *(one for base in direct.get(name, ()) for one in up(base)))

    return {name: up(name) for name in direct}


@cache
def returns() -> dict[str, Types]:
    found: dict[str, Types] = defaultdict(frozenset)
    for _, node in functions():
        found[node.name] |= _named(node.returns, aliases())
    return found


@cache
def owners(types: Types, attribute: str) -> frozenset[str]:
    """Returns the classes among some types, their bases and subclasses, that define an attribute."""
    family = {up for name in types for up in bases().get(name, (name,))}
    family |= {name for name, above in bases().items() if types & set(above)}
    return frozenset(name for name in family if attribute in members().get(name, ()))


@cache
def values_called(name: str) -> Types:
    """Returns what an argument without a type stands for: `term` for all classes of trainables/config/terms.py, and so on."""
    modules = {f"trainables.config.{name}", f"trainables.config.{name}s"}
    return frozenset(node.name for module, node in classes() if module in modules)


@cache
def tuples() -> dict[str, Types]:
    """Returns the name of each tuple at the top of a module -> the texts in it."""
    return {
        node.targets[0].id: frozenset(part.value for part in node.value.elts if isinstance(part, ast.Constant))
        for tree in sources().values()
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Tuple)
    }


class _Scope(ast.NodeVisitor):
    """Infers types in one function, its inner ones included; collects reads as (class or None, attribute)."""

    def __init__(self, variables: dict[str, Types], texts: frozenset[str]) -> None:
        self.variables = variables
        self.texts = texts  # what `getattr(x, name)` may read: the texts in the tuples that the module uses
        self.reads = set[tuple[str | None, str]]()

    def type_of(self, node: ast.AST | None) -> Types:
        match node:
            case ast.Name():
                return self.variables.get(node.id, NONE)
            case ast.Attribute():
                base = self.type_of(node.value)
                return frozenset().union(*(members()[name][node.attr] for name in owners(base, node.attr)))
            case ast.Call():
                if isinstance(node.func, ast.Name):
                    called = aliases().get(node.func.id, NONE) | returns().get(node.func.id, NONE)
                    passes_on = node.func.id in ("next", "iter", "list", "tuple", "sorted", "dict", "set", "replace", "zip", "enumerate", "reversed", "min", "max")  # fmt: skip
                    inner = frozenset().union(*map(self.type_of, node.args)) if passes_on else NONE
                    return called | inner
                if isinstance(node.func, ast.Attribute):
                    of_container = node.func.attr in ("values", "items", "get", "pop", "model_copy", "setdefault", "of")
                    own = self.type_of(node.func) or returns().get(node.func.attr, NONE)
                    return own | (self.type_of(node.func.value) if of_container else NONE)
                return NONE
            case ast.Constant() | None:
                return NONE
            case ast.Compare() | ast.Lambda():
                return NONE
            case ast.DictComp():
                return self.type_of(node.value)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self.type_of(node.elt)
            case ast.Subscript():
                return self.type_of(node.value)
            case _:
                return frozenset().union(*map(self.type_of, ast.iter_child_nodes(node)))

    def bind(self, target: ast.AST, types: Types) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and types:
                self.variables[node.id] = self.variables.get(node.id, NONE) | types

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                    is_untyped = argument.annotation is None or ast.unparse(argument.annotation) == "Any"
                    types = values_called(argument.arg) if is_untyped else _named(argument.annotation, aliases())
                    self.bind(ast.Name(argument.arg), types)
            case ast.Assign():
                for target in node.targets:
                    self.bind(target, self.type_of(node.value))
            case ast.AnnAssign():
                self.bind(node.target, _named(node.annotation, aliases()) | self.type_of(node.value))
            case ast.NamedExpr():
                self.bind(node.target, self.type_of(node.value))
            case ast.For() | ast.comprehension():
                self.bind(node.target, self.type_of(node.iter))
            case ast.MatchAs() if node.name and isinstance(node.pattern, ast.MatchClass):
                self.bind(ast.Name(node.name), _named(node.pattern.cls, aliases()))
            case ast.MatchClass():
                for name in _named(node.cls, aliases()):
                    self.reads |= {(owner, key) for key in node.kwd_attrs for owner in owners(frozenset({name}), key)}
            case ast.Call() if ast.unparse(node.func) == "isinstance":
                self.bind(node.args[0], _named(node.args[1], aliases()))
            case ast.Call() if ast.unparse(node.func) == "getattr":
                name = node.args[1]
                names = frozenset({str(name.value)}) if isinstance(name, ast.Constant) else self.texts
                types = self.type_of(node.args[0])
                self.reads |= {(owner, text) for text in names for owner in owners(types, text)}
            case ast.Attribute() if isinstance(node.ctx, ast.Load):
                found = owners(self.type_of(node.value), node.attr)
                self.reads |= {(name, node.attr) for name in found or {None}}
        self.generic_visit(node)


def reads() -> set[tuple[str | None, str]]:
    """Returns (class, attribute) of every read outside of validators; None for the class where it is not known."""
    found = set[tuple[str | None, str]]()
    for tree in sources().values():
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        texts = frozenset().union(*(names for name, names in tuples().items() if name in used))
        for top in tree.body:
            of_class = [(top.name, part) for part in top.body] if isinstance(top, ast.ClassDef) else [(None, top)]
            for owner, part in of_class:
                if isinstance(part, Function) and any("validator" in ast.unparse(d) for d in part.decorator_list):
                    continue
                scope = _Scope({"self": frozenset({owner}), "cls": frozenset({owner})} if owner else {}, texts)
                for _ in range(3):  # until what is assigned late is known early
                    scope.reads.clear()
                    scope.visit(part)
                found |= scope.reads
    return found


def dead_fields() -> list[str]:
    """Lists fields that nothing reads. A read off something unknown counts where one class alone has such a name."""
    read = reads()
    having = defaultdict(set)
    for name, attributes in members().items():
        for attribute in attributes:
            having[attribute].add(name)
    found = []
    for module, node in classes():
        if not module.startswith("trainables.config"):
            continue
        for part in node.body:
            if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
                continue
            name = part.target.id
            known = (node.name, name) in read or ((None, name) in read and len(having[name]) == 1)
            if not known and name not in ("kind", "model_config"):
                found.append(f"{node.name}.{name}")
    return found
