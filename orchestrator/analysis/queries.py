"""Where a number is in the tables, and which rows of the tables belong to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import pandas as pd

from orchestrator.study.claims import CostAxis
from orchestrator.study.objectives import MODEL_COSTS, Measured
from orchestrator.study.scaling_grid import Grid
from orchestrator.study.schema import Study, tasks_of
from trainables.config.phase_run import PhaseRun
from trainables.metrics.known import metric_named
from trainables.metrics.metric import Metric

T = TypeVar("T")


class MetricQuery(NamedTuple):
    """Which number is compared."""

    phase: str  # with all its branches, phase[data]
    model: str
    metric: str
    tasks: tuple[str, ...] = ()  # the data sets over which the number is a mean; (): all recorded ones
    split: str = "test"
    at: float = 1.0  # progress
    equal: CostAxis | None = None  # compare at equal cost on this axis, instead of at equal progress

    def matches(self, rows: pd.DataFrame) -> pd.Series[bool]:
        """Selects rows of the results or of the examples, at any progress."""
        keep = (rows["model"] == self.model) & (rows["split"] == self.split)
        if "metric" in rows:
            keep &= rows["metric"] == self.metric
        if self.tasks:
            keep &= rows["task"].isin(self.tasks)
        return keep & rows["phase"].isin([name for name in rows["phase"].unique() if self.reads(name)])

    def reads(self, phase_run: str) -> bool:
        """Returns whether a phase run, as tables name it, is one of this phase."""
        return PhaseRun.parse(phase_run).phase == self.phase


def where_measured(study: Study, what: Measured, split: str = "dev", at: float = 1.0) -> MetricQuery:
    """Returns where the tables have an objective or a constraint; a cost of a model is no number of a split."""
    split = "system" if what.metric in MODEL_COSTS else split
    return MetricQuery(what.phase, what.model, what.metric, tasks_of(what, study.each_of(what.phase)), split, at)


@dataclass(frozen=True)
class TaskFacts:
    """What the study, and not the tables, says about data sets and phases."""

    each: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # phase -> the data sets over which it fans out
    scores: Mapping[str, Metric] = field(default_factory=dict)  # data set -> its own `score`
    glue: Mapping[str, str] = field(default_factory=dict)  # data set -> its task of GLUE
    trains: Mapping[str, Collection[str]] = field(default_factory=dict)  # phase -> the models that it trains
    grids: Mapping[str, Grid] = field(default_factory=dict)  # claim about scaling -> what it reads

    def metric(self, name: str, task: str) -> Metric:
        """Returns the data set's own metric of this name, else the general one."""
        own = self.scores.get(task)
        return own if own is not None and own.name == name else metric_named(name)


@dataclass(frozen=True)
class Records:
    """The tables, restricted to planned trials of one kind, which `column` groups."""

    results: pd.DataFrame
    trials: pd.DataFrame
    facts: TaskFacts = TaskFacts()
    num_seeds: int | None = None  # planned; by default as many as there are trials
    column: Literal["arm", "point"] = "arm"
    kind: Literal["trial", "confirm"] = "trial"
    _found: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Any, find: Callable[[], T]) -> T:
        """Returns what `find` does, which is called once, however many claims ask."""
        if key not in self._found:
            self._found[key] = find()
        found: T = self._found[key]
        return found

    def planned(self, table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
        return table[table["planned"].eq(True) & (table["kind"] == self.kind) & table[self.column].isin(list(names))]

    def select(self, names: Iterable[str], query: MetricQuery) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Returns the trials of these arms (or points), and the queried results of those that were not stopped."""
        names = list(names)
        trials, rows = self.planned(self.trials, names), self.planned(self.results, names)
        rows = rows[query.matches(rows)]
        rows = rows[~rows["trial"].isin(trials.loc[trials["status"] == "stopped", "trial"])]
        return trials, rows.assign(progress=rows["progress"].round(6))

    def select_one(self, name: str, query: MetricQuery) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Selects as `select` does, for one arm (or point) at any progress."""
        return self.once((name, query._replace(at=1.0)), lambda: self.select([name], query))


def parsed(cell: Any) -> dict[str, Any]:
    """Parses a JSON object of the trials table; empty where there is none."""
    value = json.loads(cell) if isinstance(cell, str) and cell else cell
    return value if isinstance(value, dict) else {}


def with_phases_of(trials: pd.DataFrame, phase: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Parses the trials' `phases`, and keeps only those on which a number of this phase over these tasks depends."""
    phases = [_phases_behind(phase, tasks, parsed(cell)) for cell in trials["phases"]]
    return trials.assign(phases=pd.Series(phases, index=trials.index, dtype=object))


def spent(study: Study, axis: CostAxis, query: MetricQuery, phases: Mapping[str, Any]) -> float:
    """Adds up what a trial spent on the queried phase and on those before it, which count at their recorded cost.

    Tokens count where the queried model is trained.
    """
    column = "tokens" if axis == "student_tokens" else axis
    counted = _phases_behind(query.phase, query.tasks, phases).items()
    return math.fsum(
        float(done[column])
        for name, done in counted
        if column != "tokens" or query.model in study.trains(PhaseRun.parse(name).phase)
    )


def _phases_behind(phase: str, tasks: Sequence[str], phases: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the phases that ran after this one, and branches for data sets of this phase that are not in `tasks`."""
    runs = {name: PhaseRun.parse(name) for name in phases}  # in the order in which they ran
    own = [i for i, run in enumerate(runs.values()) if run.phase == phase]
    other_items = {run.item for run in runs.values() if run.phase == phase} - {*tasks, None}
    until = list(runs)[: max(own, default=len(runs)) + 1]
    return {name: phases[name] for name in until if runs[name].item not in other_items}
