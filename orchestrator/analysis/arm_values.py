"""The values of each arm (or point) in the tables by seed and data set, and its evaluations on the way; with their costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from orchestrator.analysis.costs import Cost, TrialCost, cost_before, cost_of_rows, trial_costs
from orchestrator.analysis.notes import Kind, Note, note
from orchestrator.analysis.queries import MetricQuery, Records, with_phases_of
from trainables.config.phase_run import PhaseRun


@dataclass(frozen=True)
class ArmValues:
    """The values of one arm (or point)."""

    name: str
    values: Mapping[int, float]  # by seed: the mean over the data sets, of seeds that have all of them
    by_task: Mapping[str, Mapping[int, float]]  # by data set and seed
    failed: Collection[int]  # seeds that failed before they had a value, or were stopped, which no study plans
    notes: tuple[Note, ...]
    costs: Mapping[int, TrialCost] = field(default_factory=dict)  # by seed, of seeds that have a value
    # at equal cost, by seed: the progress of the evaluation, and the value on the other side of the budget
    progress: Mapping[int, float] = field(default_factory=dict)
    beyond: Mapping[int, float] = field(default_factory=dict)


def arm_values(
    records: Records, names: Sequence[str], query: MetricQuery
) -> tuple[tuple[str, ...], dict[str, ArmValues]]:
    """Returns the data sets (the queried ones; else all that any arm has), and each arm's values."""
    selected = {name: records.select_one(name, query) for name in names}
    here = {name: rows[(rows["progress"] - query.at).abs() <= 1e-6] for name, (_, rows) in selected.items()}
    query = query._replace(
        tasks=query.tasks or tuple(sorted({task for rows in here.values() for task in rows["task"]}))
    )
    arms = dict[str, ArmValues]()
    for name, (trials, rows) in selected.items():
        arms[name] = records.once(
            ("values", name, query), partial(values_in, records, name, (trials, here[name]), query)
        )
        if not arms[name].by_task:
            recorded = tuple(sorted(set(rows["progress"])))
            none = note(Kind.NO_VALUE, arm=name, query=query, recorded=recorded)
            arms[name] = replace(arms[name], notes=(*arms[name].notes, none))
    return query.tasks, arms


def values_in(
    records: Records,
    name: str,
    tables: tuple[pd.DataFrame, pd.DataFrame],
    query: MetricQuery,
    *,
    excluded: Collection[int] = (),
) -> ArmValues:
    """Returns an arm's values in these trials and rows.

    Args:
        query: with all its data sets.
        excluded: seeds that can have no value, about which the caller makes a note.
    """
    trials, rows = tables
    tasks = query.tasks
    recorded: dict[tuple[str, int], list[float]] = {}
    for task, seed, value in zip(rows["task"], rows["seed"], rows["value"], strict=True):
        recorded.setdefault((task, int(seed)), []).append(float(value))
    diverged = {seed for (_, seed), numbers in recorded.items() if not all(map(math.isfinite, numbers))}
    by_task: dict[str, dict[int, float]] = {}
    for (task, seed), numbers in recorded.items():
        if all(map(math.isfinite, numbers)):
            by_task.setdefault(task, {})[seed] = math.fsum(numbers) / len(numbers)
    begun = {seed for of_task in by_task.values() for seed in of_task} - diverged
    of_seed = {seed: [by_task[task][seed] for task in tasks if seed in by_task.get(task, {})] for seed in begun}
    values = {seed: math.fsum(each) / len(tasks) for seed, each in of_seed.items() if len(each) == len(tasks)}
    failed = (
        {int(seed) for seed in trials.loc[trials["status"].isin(["failed", "stopped"]), "seed"]} | diverged
    ) - values.keys()
    notes: list[Note] = []
    planned, stopped = max(len(trials), records.num_seeds or 0), Counter(trials["status"])["stopped"]
    if stopped:
        notes.append(note(Kind.STOPPED, arm=name, num=stopped))
    if (missing := planned - len(failed | {*excluded}) - len(values)) > 0:
        notes.append(note(Kind.PROVISIONAL, arm=name, missing=missing, planned=planned))
    if partial := begun - values.keys() - failed:
        lacking = tuple(task for task in tasks if not partial <= by_task.get(task, {}).keys())
        notes.append(note(Kind.MISSING_TASKS, arm=name, tasks=lacking, seeds=tuple(sorted(partial))))
    used = with_phases_of(trials[trials["seed"].isin(list(values))], query.phase, tasks)
    notes += _on_shared_runs(used, query)
    costs = trial_costs(used, rows, query, records.facts)
    return ArmValues(name, values, by_task, failed, tuple(notes), costs)


def _on_shared_runs(trials: pd.DataFrame, query: MetricQuery) -> list[Note]:
    """Notes which phases the seeds share: one teacher is one teacher, however many seeds learn from it."""
    keys: dict[PhaseRun, list[str]] = {}
    for phases in trials["phases"]:
        for name, done in phases.items():
            keys.setdefault(PhaseRun.parse(name), []).append(str(done["key"]))
    branches: dict[tuple[str, int, int], list[str]] = {}
    for run, of_seeds in keys.items():
        if len(set(of_seeds)) < len(of_seeds):
            items = branches.setdefault((run.phase, len(of_seeds), len(set(of_seeds))), [])
            items += [run.item] if run.item is not None else []
    return [
        note(
            Kind.SHARED_RUNS,
            phase=phase,
            num_seeds=num_seeds,
            num_runs=num_runs,
            is_compared=phase == query.phase,
            tasks=tuple(items),
        )
        for (phase, num_seeds, num_runs), items in branches.items()
    ]


class Evaluation(NamedTuple):
    """An evaluation in which each of the queried data sets was scored."""

    trial: str
    progress: float
    value: float  # the mean over the data sets; not finite where one of them is not
    cost: TrialCost


def evaluations(
    records: Records, name: str, query: MetricQuery, tasks: Sequence[str], *, only_ended: bool = False
) -> dict[int, list[Evaluation]]:
    """Returns the evaluations of an arm by seed, in order.

    Trials that have not ended have no cost of the phases before.
    """
    trials, rows = records.select([name], query)
    trials = with_phases_of(trials[trials["status"] == "ended"] if only_ended else trials, query.phase, tasks)
    rows = rows[rows["trial"].isin(set(trials["trial"])) & rows["task"].isin(list(tasks))]
    by = ["trial", "progress"]
    num_tasks = rows.groupby(by)["task"].nunique()
    spent = cost_of_rows(rows, trials, by)
    costs = dict(zip(spent.index, spent[["tokens", "flops", "device_seconds"]].to_numpy().tolist(), strict=True))
    of_task = rows.groupby([*by, "task"])["value"].agg(_mean).astype(float).reset_index()
    values = dict[tuple[str, float], list[float]]()
    for trial, progress, value in zip(of_task["trial"], of_task["progress"].tolist(), of_task["value"], strict=True):
        values.setdefault((str(trial), float(progress)), []).append(value)
    by_seed: dict[int, list[Evaluation]] = {}
    for trial in trials.to_dict("records"):
        before = cost_before(trial["phases"], query, records.facts)
        for key in sorted(key for key in values if key[0] == trial["trial"] and num_tasks[key] == len(tasks)):
            mean = math.fsum(values[key]) / len(tasks)
            evaluation = Evaluation(*key, mean, TrialCost(Cost(*costs[key]), before))
            by_seed.setdefault(int(trial["seed"]), []).append(evaluation)
    return by_seed


def _mean(values: pd.Series[float]) -> float:
    return float(np.mean(values.to_numpy(dtype=np.float64)))  # pandas' own mean skips NaN
