"""What each arm (or point) has at one reading of the tables: values by seed and data set, counts, costs. Pure; judges nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from orchestrator.study.schema import AXIS_WORDS, CostAxis
from trainables.metrics.task_scores import Rule


class MetricQuery(NamedTuple):
    """Where the number that is compared stands in the table."""

    phase: str  # with its fan-out, phase[data]
    model: str
    metric: str
    tasks: tuple[str, ...] = ()  # the data sets over which the number is a mean; (): those that there are
    split: str = "test"
    at: float = 1.0  # progress
    equal: CostAxis | None = None  # instead: where two sides have spent equally of it


@dataclass(frozen=True)
class Tasks:
    """What the study says of its data sets and phases, beside the tables."""

    each: Mapping[str, tuple[str, ...]]  # phase -> the data sets over which it fans out
    rules: Mapping[str, Rule]  # data set -> how its answers become a `score`
    glue: Mapping[str, str]  # data set -> the task of GLUE that it is
    trains: Mapping[str, Collection[str]] = field(default_factory=dict)  # phase -> the models that it trains


NO_TASKS = Tasks({}, {}, {})


class Counts(NamedTuple):
    """The planned trials of one arm by outcome; what is in none of the last three has not ended."""

    planned: int
    finished: int
    failed: int
    stopped: int


class Cost(NamedTuple):
    """A mean over trials, or a ratio of two; memoised phases at their recorded cost."""

    student_tokens: (
        float  # that the claimed model was trained on: in the claimed phase up to the point that is judged, and before
    )
    flops: float  # of the claimed phase up to there, and of the trial's phases before it, the teacher's included
    device_seconds: float  # likewise


@dataclass(frozen=True)
class TrialCost:
    """What one trial has spent up to a look."""

    claimed: Cost  # of the claimed phase
    others: Mapping[str, tuple[str, Cost]]  # each phase of the trial before it -> its key, and its cost in full

    def total(self, without: Iterable[str] = ()) -> Cost:
        """With the other phases, but for those of these keys."""
        left_out = set(without)
        counted = [self.claimed, *(cost for key, cost in self.others.values() if key not in left_out)]
        return Cost(*(math.fsum(parts) for parts in zip(*counted, strict=True)))

    def keys(self) -> set[str]:
        return {key for key, _ in self.others.values()}


class Evaluation(NamedTuple):
    """An evaluation of the claimed phase, in which each of the data sets was scored."""

    trial: str
    progress: float
    value: float  # the mean over the data sets; no number where one of them has none
    bill: TrialCost


@dataclass(frozen=True)
class ArmValues:
    """What one arm (or point) has at one reading."""

    name: str
    values: dict[int, float]  # by seed: the mean over the data sets, of seeds that have all of them
    by_task: dict[str, dict[int, float]]  # by data set and seed
    failed: set[int]  # seeds that failed before there was a value
    counts: Counts
    cost: Cost | None  # a mean over the seeds that have a value
    notes: list[str]
    bills: Mapping[int, TrialCost] = field(default_factory=dict)  # by seed, of seeds that have a value
    progress: Mapping[int, float] = field(default_factory=dict)  # by seed, where it was read at equal cost
    later: Mapping[int, float] = field(
        default_factory=dict
    )  # by seed, the value one look further on, where there is one


def arm_values(
    results: pd.DataFrame,
    trials: pd.DataFrame,
    names: tuple[str, ...],
    at: MetricQuery,
    column: str,  # arm | point
    kind: str,
    num_seeds: int | None,
    trains: Mapping[str, Collection[str]],
) -> tuple[tuple[str, ...], dict[str, ArmValues]]:
    """The data sets (those asked for; else all that any of the arms has), and what each arm has at the reading."""
    trials, rows = _rows(results, trials, names, at, column, kind)
    here = rows[(rows["progress"] - at.at).abs() <= 1e-6]
    tasks = at.tasks or tuple(sorted(set(here["task"])))
    found = {}
    for name in names:
        own, recorded = here[here[column] == name], sorted(set(rows.loc[rows[column] == name, "progress"]))
        found[name] = side = _side(name, trials[trials[column] == name], own, at, tasks, num_seeds or 0, trains)
        if not side.by_task:
            there = f"it has {', '.join(f'{x:.4g}' for x in recorded)}" if recorded else "it has none at all"
            what = f"{at.split} {at.metric} of {at.model!r} in phase {at.phase!r}"
            side.notes.append(f"{name!r} has no {what} at progress {at.at:g}; {there}")
    return tasks, found


def equal_sides(
    results: pd.DataFrame, trials: pd.DataFrame, readings: Mapping[str, MetricQuery], axis: CostAxis, num_seeds: int | None,
    trains: Mapping[str, Collection[str]],
) -> tuple[tuple[str, ...], dict[str, ArmValues]]:  # fmt: skip
    """As `sides`, for two arms that are read at equal cost (`readings`: of each; they differ in the model at most).

    At each seed both may spend what the cheaper of them took in all; each is read at its last look within that. So the
    cheaper one is read at its end, and the dearer one on its way. A seed that did not come to its end in both has no value.
    """
    at = next(iter(readings.values()))
    read = {name: _rows(results, trials, (name,), of, "arm", "trial") for name, of in readings.items()}
    tasks = at.tasks or tuple(sorted({task for _, rows in read.values() for task in rows["task"]}))
    seen = {name: _looks(*read[name], of, tasks, trains, only_ended=True) for name, of in readings.items()}
    ends = [{s: looks[-1] for s, looks in of.items() if looks[-1].progress == 1} for of in seen.values()]
    budgets = {s: min(_spent(of[s], axis) for of in ends) for s in sorted(set.intersection(*map(set, ends)))}
    found = {}
    for (name, (own, rows)), has_end in zip(read.items(), ends, strict=True):
        chosen, late, after = dict[int, Evaluation](), dict[int, Evaluation](), dict[int, Evaluation]()
        for seed, budget in budgets.items():
            looks = seen[name][seed]
            within = [look for look in looks if _spent(look, axis) <= budget * (1 + 1e-9)]
            if within:
                chosen[seed], after[seed] = within[-1], looks[min(len(within), len(looks) - 1)]
            else:
                late[seed] = looks[0]
        at_look = {(look.trial, look.progress) for look in chosen.values()}
        partial = set(
            own.loc[(own["status"] == "ended") & ~own["seed"].isin(list(has_end)), "trial"]
        )  # `_side` says so
        here = [
            (trial, progress) in at_look or (trial in partial and progress == 1)
            for trial, progress in zip(rows["trial"], rows["progress"], strict=True)
        ]
        side = _side(
            name, own, rows[np.array(here, dtype=bool)], readings[name], tasks, num_seeds or 0, trains,
            {*late, *has_end} - {*chosen},
        )  # fmt: skip
        side.notes.extend(_on_equal_cost(name, chosen, late, budgets, axis))
        later = {seed: look.value for seed, look in after.items() if math.isfinite(look.value) and seed in side.values}
        found[name] = replace(side, progress={seed: look.progress for seed, look in chosen.items()}, later=later)
    return tasks, found


def _spent(look: Evaluation, axis: CostAxis) -> float:
    return float(getattr(look.bill.total(), axis))


def _on_equal_cost(
    name: str,
    chosen: Mapping[int, Evaluation],
    late: Mapping[int, Evaluation],
    budgets: Mapping[int, float],
    axis: CostAxis,
) -> list[str]:
    """Where a side was read, if not at its end: in mid-schedule, and by looks that do not come when the budget ends."""
    words, notes = AXIS_WORDS[axis], []
    if any(look.progress < 1 for look in chosen.values()):
        at = [look.progress for look in chosen.values()]
        where = f"{np.mean(at):.2f} of its own schedule"
        where += f" (mean of {min(at):g} to {max(at):g} over {len(at)} seeds)" if min(at) < max(at) else ""
        unused = []  # of what the budget leaves for the claimed phase
        for seed, look in chosen.items():
            spent, claimed = _spent(look, axis), float(getattr(look.bill.claimed, axis))
            room = budgets[seed] - (spent - claimed)
            unused.append(max(0.0, (budgets[seed] - spent) / room) if room > 0 else 0.0)
        notes.append(
            f"at equal {words} {name!r} is read at {where}, where its learning rate has not ended: a schedule that ended there "
            f"might do better; that look leaves {100 * np.mean(unused):.0f} % of its {words} unused"
        )
    if late:
        first = np.mean(
            [_spent(look, axis) / budgets[seed] if budgets[seed] else math.inf for seed, look in late.items()]
        )
        earliest = min(look.progress for look in late.values())
        notes.append(
            f"{name!r} has no value at seed {', '.join(map(str, sorted(late)))}: its first look, at {earliest:g} of its schedule, "
            f"came after {first:.3g} times the {words} that the other took in all"
        )
    return notes


def looks_of(
    results: pd.DataFrame, trials: pd.DataFrame, name: str, at: MetricQuery, tasks: Sequence[str]
) -> dict[int, list[Evaluation]]:
    """The looks of an arm by seed, in order; of trials that have not ended, without the cost of their other phases, and of
    all without the tokens of these."""
    return _looks(*_rows(results, trials, (name,), at, "arm", "trial"), at, tasks, {}, only_ended=False)


def _looks(
    trials: pd.DataFrame, rows: pd.DataFrame, at: MetricQuery, tasks: Sequence[str],
    trains: Mapping[str, Collection[str]], *, only_ended: bool,
) -> dict[int, list[Evaluation]]:  # fmt: skip
    trials = with_phases_of(trials[trials["status"] == "ended"] if only_ended else trials, at.phase, tasks)
    rows = rows[rows["trial"].isin(set(trials["trial"])) & rows["task"].isin(list(tasks))]
    by = ["trial", "progress"]
    whole = rows.groupby(by)["task"].nunique()
    spent = spent_on(rows, trials, by)
    costs = dict(zip(spent.index, spent[["tokens", "flops", "device_seconds"]].to_numpy().tolist(), strict=True))
    values = dict[tuple[str, float], list[float]]()
    of_task = rows.groupby([*by, "task"])["value"].agg(_mean).astype(float).reset_index()
    for trial, progress, found in zip(
        of_task["trial"], of_task["progress"].astype(float).tolist(), of_task["value"], strict=True
    ):
        values.setdefault((str(trial), progress), []).append(found)
    found_of: dict[int, list[Evaluation]] = {}
    for trial in trials.to_dict("records"):
        others = _others(trial["phases"], at, trains)
        for key in sorted(key for key in values if key[0] == trial["trial"] and whole[key] == len(tasks)):
            look = Evaluation(*key, math.fsum(values[key]) / len(tasks), TrialCost(Cost(*costs[key]), others))
            found_of.setdefault(int(trial["seed"]), []).append(look)
    return found_of


def _mean(values: pd.Series[float]) -> float:
    return float(np.mean(values.to_numpy(dtype=np.float64)))  # pandas' own leaves out what is no number


def _rows(
    results: pd.DataFrame, trials: pd.DataFrame, names: Iterable[str], at: MetricQuery, column: str, kind: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The planned trials of these arms (or points), and what those of them recorded that were not stopped."""
    names = list(names)
    trials, rows = (of_kind(table, names, column, kind) for table in (trials, results))
    rows = rows[is_at(rows, at)]
    rows = rows[~rows["trial"].isin(trials.loc[trials["status"] == "stopped", "trial"])]
    return trials, rows.assign(progress=rows["progress"].round(6))


def of_kind(table: pd.DataFrame, names: Iterable[str], column: str, kind: str) -> pd.DataFrame:
    """The planned rows of these arms (or points)."""
    return table[table["planned"].eq(True) & (table["kind"] == kind) & table[column].isin(list(names))]


def is_at(rows: pd.DataFrame, at: MetricQuery) -> pd.Series[bool]:
    """Which rows, of results or of examples, are of the reading, whatever their progress."""
    keep = (rows["model"] == at.model) & (rows["split"] == at.split)
    if "metric" in rows:
        keep &= rows["metric"] == at.metric
    if at.tasks:
        keep &= rows["task"].isin(at.tasks)
    phases = [name for name in rows["phase"].unique() if is_of(name, at.phase)]
    return keep & rows["phase"].isin(phases)


def _side(
    name: str, trials: pd.DataFrame, rows: pd.DataFrame, at: MetricQuery, tasks: Sequence[str], num_seeds: int,
    trains: Mapping[str, Collection[str]], without: Collection[int] = (),
) -> ArmValues:  # fmt: skip
    """`without`: seeds that can have no value, as is said elsewhere."""
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
    if (missing := counts.planned - counts.stopped - len(failed | {*without}) - len(values)) > 0:
        notes.append(f"provisional: {missing} of {counts.planned} planned seeds of {name!r} have no value yet")
    partial = begun - values.keys() - failed
    lacks = [task for task in tasks if not partial <= by_task.get(task, {}).keys()]
    if partial:
        at_seeds = ", ".join(map(str, sorted(partial)))
        notes.append(f"{name!r} has no {', '.join(lacks)} at seed {at_seeds}: no mean over fewer tasks is taken")
    used = trials[trials["seed"].isin(list(values))]
    used = with_phases_of(used, at.phase, tasks)
    bills = _bills(used, rows, at, trains)
    cost = Cost(*np.mean([bill.total() for bill in bills.values()], axis=0).tolist()) if bills else None
    return ArmValues(name, values, by_task, failed, counts, cost, notes + _on_sharing(used, at.phase), bills)


def with_phases_of(trials: pd.DataFrame, phase: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Trials with their `phases` parsed, and only those that count for a number over these tasks."""
    phases = [_read_by(phase, tasks, parsed(cell)) for cell in trials["phases"]]
    return trials.assign(phases=pd.Series(phases, index=trials.index, dtype=object))


def _read_by(phase: str, tasks: Sequence[str], phases: Mapping[str, Any]) -> dict[str, Any]:
    """Without what came after the claimed phase (they stand in the order in which they ran), and without the branches of
    those tasks that it fans out over, and the claim does not name."""
    names = list(phases)
    claimed = [i for i, name in enumerate(names) if is_of(name, phase)]
    others = {item_of(names[i]) for i in claimed} - {*tasks, ""}
    return {name: phases[name] for name in names[: max(claimed, default=len(names)) + 1] if item_of(name) not in others}


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


def _bills(
    trials: pd.DataFrame, rows: pd.DataFrame, at: MetricQuery, trains: Mapping[str, Collection[str]]
) -> dict[int, TrialCost]:
    """By seed: the phase up to these rows (which are cumulative), and the phases before it in full."""
    spent = spent_on(rows, trials, ["trial"]).reindex(trials["trial"], fill_value=0.0)
    found = {}
    for trial in trials.to_dict("records"):
        own = spent.loc[trial["trial"]]
        claimed = Cost(float(own["tokens"]), float(own["flops"]), float(own["device_seconds"]))
        found[int(trial["seed"])] = TrialCost(claimed, _others(trial["phases"], at, trains))
    return found


def _others(
    phases: Mapping[str, Any], at: MetricQuery, trains: Mapping[str, Collection[str]]
) -> dict[str, tuple[str, Cost]]:
    """A memoised phase counts at its recorded cost, its tokens where it trains the model that is read."""
    found = {}
    for name, done in phases.items():
        if not is_of(name, at.phase):
            is_trained = at.model in trains.get(name.partition("[")[0], ())
            tokens = float(done["tokens"]) if is_trained else 0.0
            found[name] = str(done["key"]), Cost(tokens, float(done["flops"]), float(done["device_seconds"]))
    return found


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


class CostPair(NamedTuple):
    """What two sides have spent, at the seeds that both have a bill of."""

    own: dict[int, tuple[Cost, Cost]]  # by seed, of arm and against, without the phases that both start from there
    full: dict[int, tuple[Cost, Cost]]  # with them
    shared: tuple[str, ...]  # the names of these


def cost_pair(arm: ArmValues, against: ArmValues) -> CostPair:
    """What each has spent of its own, so that what both start from does not make them look alike."""
    own, full, shared = dict[int, tuple[Cost, Cost]](), dict[int, tuple[Cost, Cost]](), dict[str, None]()
    for seed in sorted(arm.bills.keys() & against.bills.keys()):
        a, b = arm.bills[seed], against.bills[seed]
        both = a.keys() & b.keys()
        own[seed], full[seed] = (a.total(both), b.total(both)), (a.total(), b.total())
        shared |= dict.fromkeys(name for name, (key, _) in a.others.items() if key in both)
    return CostPair(own, full, tuple(shared))


def ratios(arm: ArmValues, against: ArmValues) -> tuple[Cost, Cost, tuple[str, ...]] | None:
    """The arm's mean cost over the other's: of their own, and in full; and the phases that both start from."""
    found = cost_pair(arm, against)
    if not found.own:
        return None
    own, full = (_ratio(*np.mean(np.array(list(pairs.values())), axis=0).tolist()) for pairs in (found.own, found.full))
    return own, full, found.shared


def _ratio(arm: Iterable[float], against: Iterable[float]) -> Cost:
    return Cost(*(a / b if b else (1.0 if a == b else math.inf) for a, b in zip(arm, against, strict=True)))
