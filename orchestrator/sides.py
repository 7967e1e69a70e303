"""What each arm (or point) has at one reading of the tables: values by seed and data set, counts, costs. Pure; judges nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from trainables.data.scores import Rule


class Reading(NamedTuple):
    """Where the number that is compared stands in the table."""

    phase: str  # with its fan-out, phase[data]
    model: str
    metric: str
    tasks: tuple[str, ...] = ()  # the data sets over which the number is a mean; (): those that there are
    split: str = "test"
    at: float = 1.0  # progress


@dataclass(frozen=True)
class Tasks:
    """What the study says of its data sets, beside the tables."""

    each: Mapping[str, tuple[str, ...]]  # phase -> the data sets over which it fans out
    rules: Mapping[str, Rule]  # data set -> how its answers become a `score`
    glue: Mapping[str, str]  # data set -> the task of GLUE that it is


NO_TASKS = Tasks({}, {}, {})


class Counts(NamedTuple):
    """The planned trials of one arm by outcome; what is in none of the last three has not ended."""

    planned: int
    finished: int
    failed: int
    stopped: int


class Cost(NamedTuple):
    """A mean over trials, or a ratio of two; memoised phases at their recorded cost."""

    student_tokens: float  # of the claimed phase, up to the point that is judged
    flops: float  # of that, and of the trial's other phases
    device_seconds: float  # likewise


@dataclass(frozen=True)
class Side:
    """What one arm (or point) has at one reading."""

    name: str
    values: dict[int, float]  # by seed: the mean over the data sets, of seeds that have all of them
    by_task: dict[str, dict[int, float]]  # by data set and seed
    failed: set[int]  # seeds that failed before there was a value
    counts: Counts
    cost: Cost | None  # a mean over the seeds that have a value
    notes: list[str]


def sides(
    results: pd.DataFrame,
    trials: pd.DataFrame,
    names: tuple[str, ...],
    at: Reading,
    column: str,  # arm | point
    kind: str,
    num_seeds: int | None,
) -> tuple[tuple[str, ...], dict[str, Side]]:
    """The data sets (those asked for; else all that any of the arms has), and what each arm has at the reading."""
    trials, rows = (of_kind(table, names, column, kind) for table in (trials, results))
    rows = rows[is_at(rows, at)]
    rows = rows[~rows["trial"].isin(trials.loc[trials["status"] == "stopped", "trial"])]
    here = rows[(rows["progress"] - at.at).abs() <= 1e-6]
    tasks = at.tasks or tuple(sorted(set(here["task"])))
    found = {}
    for name in names:
        own, recorded = here[here[column] == name], sorted(set(rows.loc[rows[column] == name, "progress"]))
        found[name] = side = _side(name, trials[trials[column] == name], own, at.phase, tasks, num_seeds or 0)
        if not side.by_task:
            there = f"it has {', '.join(f'{x:.4g}' for x in recorded)}" if recorded else "it has none at all"
            what = f"{at.split} {at.metric} of {at.model!r} in phase {at.phase!r}"
            side.notes.append(f"{name!r} has no {what} at progress {at.at:g}; {there}")
    return tasks, found


def of_kind(table: pd.DataFrame, names: Iterable[str], column: str, kind: str) -> pd.DataFrame:
    """The planned rows of these arms (or points)."""
    return table[table["planned"].eq(True) & (table["kind"] == kind) & table[column].isin(list(names))]


def is_at(rows: pd.DataFrame, at: Reading) -> pd.Series[bool]:
    """Which rows, of results or of examples, are of the reading, whatever their progress."""
    keep = (rows["model"] == at.model) & (rows["split"] == at.split)
    if "metric" in rows:
        keep &= rows["metric"] == at.metric
    if at.tasks:
        keep &= rows["task"].isin(at.tasks)
    phases = [name for name in rows["phase"].unique() if is_of(name, at.phase)]
    return keep & rows["phase"].isin(phases)


def _side(
    name: str, trials: pd.DataFrame, rows: pd.DataFrame, phase: str, tasks: Sequence[str], num_seeds: int
) -> Side:
    found: dict[tuple[str, int], list[float]] = {}
    for task, seed, value in zip(rows["task"], rows["seed"], rows["value"], strict=True):
        found.setdefault((task, int(seed)), []).append(float(value))
    diverged = {seed for (_, seed), recorded in found.items() if not all(map(math.isfinite, recorded))}
    by_task: dict[str, dict[int, float]] = {}
    for (task, seed), recorded in found.items():
        if all(map(math.isfinite, recorded)):
            by_task.setdefault(task, {})[seed] = math.fsum(recorded) / len(recorded)
    begun = {seed for of_task in by_task.values() for seed in of_task} - diverged
    has = {seed: [of_task[seed] for task in tasks if seed in (of_task := by_task.get(task, {}))] for seed in begun}
    values = {seed: math.fsum(each) / len(tasks) for seed, each in has.items() if len(each) == len(tasks)}
    failed = ({int(seed) for seed in trials.loc[trials["status"] == "failed", "seed"]} | diverged) - values.keys()
    by = Counter(trials["status"])
    counts = Counts(max(len(trials), num_seeds), by["ended"], by["failed"], by["stopped"])
    notes = []
    if counts.stopped:
        notes.append(f"{counts.stopped} stopped trials of {name!r} are in no claim")
    if (missing := counts.planned - counts.stopped - len(failed) - len(values)) > 0:
        notes.append(f"provisional: {missing} of {counts.planned} planned seeds of {name!r} have no value yet")
    partial = begun - values.keys() - failed
    lacks = [task for task in tasks if not partial <= by_task.get(task, {}).keys()]
    if partial:
        at_seeds = ", ".join(map(str, sorted(partial)))
        notes.append(f"{name!r} has no {', '.join(lacks)} at seed {at_seeds}: no mean over fewer tasks is taken")
    used = trials[trials["seed"].isin(list(values))]
    used = with_phases_of(used, phase, tasks)
    return Side(name, values, by_task, failed, counts, _cost(used, rows, phase), notes + _on_sharing(used, phase))


def with_phases_of(trials: pd.DataFrame, phase: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Trials with their `phases` parsed, and only those that count for a number over these tasks."""
    phases = [_read_by(phase, tasks, parsed(cell)) for cell in trials["phases"]]
    return trials.assign(phases=pd.Series(phases, index=trials.index, dtype=object))


def _read_by(phase: str, tasks: Sequence[str], phases: Mapping[str, Any]) -> dict[str, Any]:
    """Without the branches of those tasks that the claimed phase fans out over, and the claim does not name."""
    others = {item_of(name) for name in phases if is_of(name, phase)} - {*tasks, ""}
    return {name: done for name, done in phases.items() if item_of(name) not in others}


def _on_sharing(trials: pd.DataFrame, phase: str) -> list[str]:
    """Which phases the seeds have in common: one teacher is one teacher, however many seeds learn from it."""
    keys: dict[str, list[str]] = {}
    for phases in trials["phases"]:
        for name, done in phases.items():
            keys.setdefault(name, []).append(str(done["key"]))
    notes: dict[tuple[str, str], list[str]] = {}  # of what, and what it means -> the branches of which it is true
    for name, found in keys.items():
        base, runs, whom = name.partition("[")[0], len(set(found)), "run" if is_of(name, phase) else "teacher"
        if runs == 1 < len(found):
            note = f"all {len(found)} seeds share one phase {base!r}", f"the verdict holds for this one {whom}"
        elif runs < len(found):
            note = f"{len(found)} seeds share {runs} of phase {base!r}", f"the verdict holds for these {whom}s"
        else:
            continue
        notes.setdefault(note, []).extend(filter(None, [item_of(name)]))
    return [f"{of}{' on ' if items else ''}{', '.join(items)}: {what}" for (of, what), items in notes.items()]


def _cost(trials: pd.DataFrame, rows: pd.DataFrame, phase: str) -> Cost | None:
    """Mean over trials of the phase up to these rows (which are cumulative) and of the other phases in full."""
    costs = []
    spent = spent_on(rows, trials, ["trial"]).reindex(trials["trial"], fill_value=0.0)
    for trial in trials.to_dict("records"):
        own = spent.loc[trial["trial"]]
        others = [cost for name, cost in trial["phases"].items() if not is_of(name, phase)]
        flops, seconds = (sum(float(cost[what]) for cost in others) for what in ("flops", "device_seconds"))
        costs.append((own["tokens"], own["flops"] + flops, own["device_seconds"] + seconds))
    return Cost(*np.mean(costs, axis=0).tolist()) if costs else None


def spent_on(rows: pd.DataFrame, trials: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Tokens, device_seconds and flops of a phase up to these rows: those of its streams once, those of its branches added.

    Rows of a phase that fans out over data sets may call it by its name, or by that of the branch.
    """
    branches = {(trial, name) for trial, cell in zip(trials["trial"], trials["phases"], strict=True)
                for name in parsed(cell) if "[" in name}  # fmt: skip
    named = zip(rows["trial"], rows["phase"], rows["task"], strict=True)
    instance = [
        f"{phase}[{task}]" if (trial, f"{phase}[{task}]") in branches else phase for trial, phase, task in named
    ]
    spent = ["tokens", "device_seconds", "flops"]
    of_each = rows.assign(instance=instance).groupby([*by, "instance"])[spent].max()
    return of_each.groupby(list(by)).sum().astype(float)


def parsed(cell: Any) -> dict[str, Any]:
    """A JSON object of the trials table; empty where there is none."""
    value = json.loads(cell) if isinstance(cell, str) and cell else cell
    return value if isinstance(value, dict) else {}


def is_of(name: str, phase: str) -> bool:
    return name == phase or name.startswith(f"{phase}[")


def item_of(name: str) -> str:
    """The data set of a branch, phase[data]; empty where the phase does not fan out."""
    return name.partition("[")[2].removesuffix("]")


def ratio(arm: Cost, against: Cost) -> Cost:
    return Cost(*(a / b if b else (1.0 if a == b else math.inf) for a, b in zip(arm, against, strict=True)))
