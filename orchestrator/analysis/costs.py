"""What trials cost: up to an evaluation, with the phases before it, and beside another arm.

A memoised phase counts at its recorded cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from orchestrator.analysis.queries import MetricQuery, TaskFacts, parsed, with_phases_of
from orchestrator.analysis.statistics import CostComparison, Decision
from orchestrator.analysis.tables import Tables
from orchestrator.study.claims import CostAxis
from trainables.config.phase_run import PhaseRun

DEARER = 1.01  # times the FLOPs of another, from which a trial counts as dearer


class Cost(NamedTuple):
    """The cost of a trial, a mean over trials, or a ratio of two."""

    student_tokens: float  # that the compared model was trained on
    flops: float
    device_seconds: float

    def on(self, axis: CostAxis) -> float:
        return float(getattr(self, axis))


@dataclass(frozen=True)
class TrialCost:
    """What one trial has spent up to an evaluation."""

    phase: Cost  # in the phase that is evaluated
    before: Mapping[str, tuple[str, Cost]]  # each phase of the trial before it -> key, and cost in full

    def total(self, without: Iterable[str] = ()) -> Cost:
        """Adds up all phases but for those with these keys."""
        left_out = set(without)
        counted = [self.phase, *(cost for key, cost in self.before.values() if key not in left_out)]
        return Cost(*(math.fsum(parts) for parts in zip(*counted, strict=True)))

    def keys(self) -> set[str]:
        return {key for key, _ in self.before.values()}


def cost_of_rows(rows: pd.DataFrame, trials: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Computes tokens, device_seconds and flops of a phase up to these rows: the largest of each phase run, added up.

    Rows of a phase that fans out over data sets may name the phase, or the branch.
    """
    cells = zip(trials["trial"], trials["phases"], strict=True)
    runs = {(trial, name) for trial, cell in cells for name in parsed(cell)}
    named = zip(rows["trial"], rows["phase"], rows["task"], strict=True)
    branches = [(trial, phase, str(PhaseRun(phase, task))) for trial, phase, task in named]
    run = [branch if (trial, branch) in runs else phase for trial, phase, branch in branches]
    spent = ["tokens", "device_seconds", "flops"]
    return rows.assign(run=run).groupby([*by, "run"])[spent].max().groupby(list(by)).sum().astype(float)


def cost_before(phases: Mapping[str, Any], query: MetricQuery, facts: TaskFacts) -> dict[str, tuple[str, Cost]]:
    """Returns key and cost of each phase before the queried one; tokens count where the queried model is trained."""
    costs = {}
    for name, done in phases.items():
        if not query.reads(name):
            is_trained = query.model in facts.trains.get(PhaseRun.parse(name).phase, ())
            tokens = float(done["tokens"]) if is_trained else 0.0
            costs[name] = str(done["key"]), Cost(tokens, float(done["flops"]), float(done["device_seconds"]))
    return costs


def trial_costs(
    trials: pd.DataFrame, rows: pd.DataFrame, query: MetricQuery, facts: TaskFacts
) -> dict[int, TrialCost]:  # fmt: skip
    """Returns, by seed, the cost of the phase up to these rows (which are cumulative), and of the phases before it."""
    found = cost_of_rows(rows, trials, ["trial"])
    spent = dict(zip(found.index, found[["tokens", "flops", "device_seconds"]].to_numpy().tolist(), strict=True))
    return {
        int(seed): TrialCost(Cost(*spent.get(trial, (0.0, 0.0, 0.0))), cost_before(phases, query, facts))
        for trial, seed, phases in zip(trials["trial"], trials["seed"], trials["phases"], strict=True)
    }


class CostPair(NamedTuple):
    """The costs of two arms at the seeds of which both have one."""

    own: dict[int, tuple[Cost, Cost]]  # by seed, of arm and against, without the phases that both share there
    full: dict[int, tuple[Cost, Cost]]  # with them
    shared: tuple[str, ...]  # the names of these

    def ratios(self) -> tuple[Cost, Cost] | None:
        """Returns the arm's mean cost over the other's: without the shared phases, and in full."""
        if not self.own:
            return None
        own, full = (_ratio(*np.mean(list(pairs.values()), axis=0).tolist()) for pairs in (self.own, self.full))
        return own, full


def _ratio(arm: Iterable[float], against: Iterable[float]) -> Cost:
    return Cost(*(a / b if b else (1.0 if a == b else math.inf) for a, b in zip(arm, against, strict=True)))


def cost_pair(arm: Mapping[int, TrialCost], against: Mapping[int, TrialCost]) -> CostPair:
    """Matches costs by seed. Shared phases are left out, since they would make the two look alike."""
    own, full, shared = dict[int, tuple[Cost, Cost]](), dict[int, tuple[Cost, Cost]](), dict[str, None]()
    for seed in sorted(arm.keys() & against.keys()):
        a, b = arm[seed], against[seed]
        both = a.keys() & b.keys()
        own[seed], full[seed] = (a.total(both), b.total(both)), (a.total(), b.total())
        shared |= dict.fromkeys(name for name, (key, _) in a.before.items() if key in both)
    return CostPair(own, full, tuple(shared))


@dataclass(frozen=True)
class CostPart:
    """The arm's cost over that of `against`, without shared phases: one part of a claim that says `less`."""

    axis: CostAxis
    found: CostComparison
    in_full: float  # the ratio with shared phases
    shared: tuple[str, ...]
    verdict: Decision


def costs(tables: Tables, trials: pd.DataFrame, query: MetricQuery) -> pd.DataFrame:
    """Returns a row per trial: tokens of the queried phase; flops and device_seconds of this phase (`own`), of the phases
    before it (`before`), and of these divided by the planned trials that share them (`shared`)."""
    everyone = tables.trials[tables.trials["planned"].eq(True) & (tables.trials["kind"] != "teacher")]
    users = Counter(done["key"] for cell in everyone["phases"] for done in parsed(cell).values())
    rows = []
    for trial in with_phases_of(trials, query.phase, query.tasks).to_dict("records"):
        row: dict[str, Any] = {"trial": trial["trial"], "tokens": 0.0}
        row |= {f"{part}_{what}": 0.0 for part in ("own", "before", "shared") for what in ("flops", "device_seconds")}
        for name, done in trial["phases"].items():
            own = query.reads(name)
            row["tokens"] += float(done["tokens"]) if own else 0.0
            for what in ("flops", "device_seconds"):
                row[f"{'own' if own else 'before'}_{what}"] += float(done[what])
                row[f"shared_{what}"] += 0.0 if own else float(done[what]) / max(1, users[done["key"]])
        rows.append(row)
    return pd.DataFrame(rows)
