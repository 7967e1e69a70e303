"""Verdicts: what the tables say about the claims. Pure; knows no Ray, no files, no report.

A verdict is about new seeds on this evaluation set, not about new examples: per-example scores are not recorded yet.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from orchestrator.statistics import (
    ALPHA,
    Comparison,
    Decision,
    bounds,
    compare,
    decide,
    holm,
    lower_is_better,
    seeds_needed,
)

if TYPE_CHECKING:
    from orchestrator.study import Claim

PaperJudgement = Literal["inside", "below", "above", "not comparable"]


# --------------------------------------------------------------------------------------------------------- verdict


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
class Verdict:
    """What the results say about one claim."""

    name: str
    claim: Claim
    verdict: Decision
    parts: tuple[Comparison, ...]  # one for each `against` that shares a seed with the arm; of values that are there
    p_adjusted: float  # Holm's; of a conjunctive claim the p of the part that decided; 1 where nothing can be tested
    seeds_more: int | None  # about how many it would take; None if decided, above 1000, or seeds would not help
    counts: Mapping[str, Counts]  # by arm
    costs: Mapping[str, Cost]  # by arm
    cost_ratios: Mapping[str, Cost]  # by `against`: the arm's cost over its cost
    paper: PaperJudgement | None  # of the paper's figure, as an effect in our units, against our 95 % interval
    notes: tuple[str, ...]


class Reading(NamedTuple):
    """Where the number that is compared stands in the table."""

    phase: str  # with its fan-out, phase[data]
    model: str
    metric: str
    task: str | None = None  # None: the one there is, or the mean over all
    split: str = "test"
    at: float = 1.0  # progress


@dataclass(frozen=True)
class _Side:
    """What one arm (or point) has at one reading."""

    name: str
    values: dict[int, float]  # by seed
    failed: set[int]  # seeds that failed before there was a value
    counts: Counts
    cost: Cost | None  # a mean over the seeds that have a value
    notes: list[str]


class _Part(NamedTuple):
    """One pair of sides: what is there, and what may be decided from it."""

    comparison: Comparison | None
    p: float  # 1 where nothing can be decided
    beyond: float  # gain - margin; with failed seeds, under the values that stand for them
    notes: list[str]
    failed: bool


def judge(
    claims: Mapping[str, Claim],
    results: pd.DataFrame,
    trials: pd.DataFrame,
    *,
    default_phase: str,
    num_seeds: int | None = None,  # planned; by default those that `trials` has
) -> dict[str, Verdict]:
    """Each claim's verdict: "`arm` is better than `against` by more than `margin`", see `decide`.

    Claims of one `family` share alpha by Holm, those that cannot be tested yet included. A conjunctive claim stands
    outside: each part is tested at alpha; supported if all parts are, refuted if any is. That keeps a false `supported`
    below alpha / 2, but k parts may falsely refute with up to k * alpha / 2.
    """
    single = {name: claim.family for name, claim in claims.items() if isinstance(claim.against, str)}
    sizes = Counter(single.values())
    sides: dict[str, dict[str, _Side]] = {}
    parts: dict[str, list[_Part]] = {}
    for name, claim in claims.items():
        against = (claim.against,) if isinstance(claim.against, str) else claim.against
        at = Reading(claim.phase or default_phase, claim.model, claim.metric, claim.task, claim.split, claim.at)
        of = sides[name] = _sides(results, trials, (claim.arm, *against), at, "arm", "trial", num_seeds)
        size = sizes[claim.family] if name in single else 1
        parts[name] = [_part(of[claim.arm], of[a], at.metric, margin=claim.margin, family_size=size) for a in against]
    adjusted: dict[str, float] = {}
    for family in sizes:
        names = [name for name, of_name in single.items() if of_name == family]
        adjusted.update(zip(names, holm([parts[name][0].p for name in names]).tolist(), strict=True))
    return {name: _verdict(name, claims[name], parts[name], sides[name], adjusted.get(name)) for name in claims}


def _verdict(name: str, claim: Claim, parts: list[_Part], sides: dict[str, _Side], p: float | None) -> Verdict:
    if p is not None:
        verdict = decide(p, parts[0].beyond)
    else:
        refuting = [part.p for part in parts if decide(part.p, part.beyond) == "refuted"]
        p = min(refuting) if refuting else max(part.p for part in parts)
        verdict = "refuted" if refuting else decide(p, min(part.beyond for part in parts))
    costs = {arm: side.cost for arm, side in sides.items() if side.cost is not None}
    own = costs.get(claim.arm)
    ratios = {a: _ratio(own, cost) for a, cost in costs.items() if own is not None and a != claim.arm}
    notes = [note for part in parts for note in part.notes] + [note for side in sides.values() for note in side.notes]
    for against, ratio in ratios.items():
        if not 1 / 1.1 <= (times := getattr(ratio, claim.axis)) <= 1.1:
            notes.append(f"axis not equal: {claim.arm!r} used {times:.3g} times the {claim.axis} of {against!r}")
    if verdict != "undecided":
        notes.append("at this scale, on this evaluation set: the interval covers new seeds, not new examples")
    compared = tuple(part.comparison for part in parts if part.comparison is not None)
    return Verdict(
        name=name,
        claim=claim,
        verdict=verdict,
        parts=compared,
        p_adjusted=p,
        seeds_more=_seeds_more(parts) if verdict == "undecided" else None,
        counts={arm: side.counts for arm, side in sides.items()},
        costs=costs,
        cost_ratios=ratios,
        paper=_judge_paper(claim.paper, compared if len(parts) == 1 else ()),
        notes=tuple(dict.fromkeys(notes)),
    )


def _part(arm: _Side, against: _Side, metric: str, *, margin: float, family_size: int) -> _Part:
    how: dict[str, Any] = {"lower_is_better": lower_is_better(metric), "margin": margin, "family_size": family_size}
    found = compare(arm.values, against.values, name=against.name, **how)
    notes = _notes_on_pairs(found, arm.name, against.name)
    failed = arm.failed | against.failed
    if not failed:
        if found is None or found.p is None:
            return _Part(found, 1, 0, notes, False)
        return _Part(found, found.p, found.gain - margin, notes, False)
    lost = [f"{s.name!r} failed at seed {', '.join(map(str, sorted(s.failed)))}" for s in (arm, against) if s.failed]
    ends = bounds(metric)
    if ends is None:
        notes.append(f"{' and '.join(lost)}: {metric} has no worst value that could stand for it, so undecided")
        return _Part(found, 1, 0, notes, True)
    notes.append(f"{' and '.join(lost)}: judged with the value of {metric} that is worst for the verdict instead")
    worst, best = ends  # no metric with two ends is better when lower
    for sign, of_arm, of_against in ((1, worst, best), (-1, best, worst)):  # supported even so; refuted even so
        whole = compare(
            dict.fromkeys(failed, of_arm) | arm.values, dict.fromkeys(failed, of_against) | against.values, **how
        )
        if whole is not None and whole.p is not None and sign * (whole.gain - margin) > 0:
            return _Part(found, whole.p, whole.gain - margin, notes, True)
    return _Part(found, 1, 0, notes, True)


def _notes_on_pairs(found: Comparison | None, arm: str, against: str) -> list[str]:
    if found is None:
        return [f"no seed has a value in both {arm!r} and {against!r}"]
    if found.n == 1:
        return ["n = 1: an effect, but nothing is known about how it varies"]
    if found.sd == 0:
        return [f"all {found.n} differences are equal: without spread there is no test"]
    few = f"n = {found.n}: few pairs, the sign-flip p cannot be below {found.p_floor:g}"
    return [few] if found.n < 5 else []


def _seeds_more(parts: list[_Part]) -> int | None:
    """At the observed effect and SD, power .8, and the alpha of Holm's first step; for the part that needs most."""
    more = [1]
    for part in parts:
        if part.failed or part.comparison is None or not part.comparison.sd:
            return None
        alpha = ALPHA / part.comparison.family_size
        needed = seeds_needed(part.beyond / part.comparison.sd, alpha=alpha)
        if needed is None:
            return None
        more.append(needed - part.comparison.n)
    return max(more)


def _judge_paper(paper: str | float | None, parts: tuple[Comparison, ...]) -> PaperJudgement | None:
    if paper is None:
        return None
    if isinstance(paper, str) or not parts or parts[0].interval is None:
        return "not comparable"
    low, high = parts[0].interval
    return "below" if paper < low else "above" if paper > high else "inside"


# ------------------------------------------------------------------------------------------------------ the tables


def _sides(
    results: pd.DataFrame,
    trials: pd.DataFrame,
    names: tuple[str, ...],
    at: Reading,
    column: str,
    kind: str,
    num_seeds: int | None,
) -> dict[str, _Side]:
    """What each arm (or point) has at the reading, over the tasks that any of them has."""

    def planned(table: pd.DataFrame) -> pd.DataFrame:
        return table[table["planned"].eq(True) & (table["kind"] == kind) & table[column].isin(names)]

    trials, rows = planned(trials), planned(results)
    for key in ("model", "metric", "split", "task"):
        if (wanted := getattr(at, key)) is not None:
            rows = rows[rows[key] == wanted]
    rows = rows[np.array([_is_of(phase, at.phase) for phase in rows["phase"]], dtype=bool)]
    rows = rows[~rows["trial"].isin(trials.loc[trials["status"] == "stopped", "trial"])]
    here = rows[(rows["progress"] - at.at).abs() <= 1e-6]
    tasks = sorted(set(here["task"]))
    sides = {}
    for name in names:
        own, recorded = here[here[column] == name], sorted(set(rows.loc[rows[column] == name, "progress"]))
        sides[name] = _side(name, trials[trials[column] == name], own, at, tasks, num_seeds or 0)
        if not sides[name].values:
            there = f"it has {', '.join(f'{x:.4g}' for x in recorded)}" if recorded else "it has none at all"
            what = f"{at.split} {at.metric} of {at.model!r} in phase {at.phase!r}"
            sides[name].notes.append(f"{name!r} has no {what} at progress {at.at:g}; {there}")
    return sides


def _side(name: str, trials: pd.DataFrame, rows: pd.DataFrame, at: Reading, tasks: list[str], num_seeds: int) -> _Side:
    values: dict[int, float] = {}
    diverged = set()
    for seed in map(int, rows["seed"].unique()):
        of_seed = rows[rows["seed"] == seed]
        if not np.isfinite(of_seed["value"].to_numpy(dtype=float)).all():
            diverged.add(seed)
        elif set(of_seed["task"]) == set(tasks):  # a mean over fewer tasks would be another quantity
            values[seed] = float(of_seed.groupby("task")["value"].mean().mean())
    failed = ({int(seed) for seed in trials.loc[trials["status"] == "failed", "seed"]} | diverged) - values.keys()
    by = Counter(trials["status"])
    counts = Counts(max(len(trials), num_seeds), by["ended"], by["failed"], by["stopped"])
    notes = [f"a mean over the tasks {', '.join(tasks)}"] if len(tasks) > 1 else []
    if counts.stopped:
        notes.append(f"{counts.stopped} stopped trials of {name!r} are in no claim")
    if (missing := counts.planned - counts.stopped - len(failed) - len(values)) > 0:
        notes.append(f"provisional: {missing} of {counts.planned} planned seeds of {name!r} have no value yet")
    used = trials[trials["seed"].isin(list(values))]
    notes += _notes_on_sharing(used, at.phase)
    return _Side(name, values, failed, counts, _cost(used, rows, at.phase), notes)


def _notes_on_sharing(trials: pd.DataFrame, phase: str) -> list[str]:
    """Which phases the seeds have in common: one teacher is one teacher, however many seeds learn from it."""
    keys: dict[str, list[str]] = {}
    for cell in trials["phases"]:
        for name, done in _phases(cell).items():
            keys.setdefault(name, []).append(str(done["key"]))
    notes = []
    for name, found in keys.items():
        runs, whom = len(set(found)), "run" if _is_of(name, phase) else "teacher"
        if runs == 1 < len(found):
            notes.append(f"all {len(found)} seeds share one phase {name!r}: the verdict holds for this one {whom}")
        elif runs < len(found):
            notes.append(f"{len(found)} seeds share {runs} of phase {name!r}: the verdict holds for these {whom}s")
    return notes


def _cost(trials: pd.DataFrame, rows: pd.DataFrame, phase: str) -> Cost | None:
    """Mean over trials of the phase up to these rows (which are cumulative) and of the other phases in full."""
    costs = []
    for trial in trials.to_dict("records"):
        own = rows[rows["trial"] == trial["trial"]]
        spent = own.groupby("phase")[["tokens", "flops", "device_seconds"]].max().sum().astype(float)
        others = [cost for name, cost in _phases(trial["phases"]).items() if not _is_of(name, phase)]
        flops, seconds = (sum(float(cost[what]) for cost in others) for what in ("flops", "device_seconds"))
        costs.append((spent["tokens"], spent["flops"] + flops, spent["device_seconds"] + seconds))
    return Cost(*np.mean(costs, axis=0).tolist()) if costs else None


def _ratio(arm: Cost, against: Cost) -> Cost:
    return Cost(*(a / b if b else (1.0 if a == b else math.inf) for a, b in zip(arm, against, strict=True)))


def _phases(cell: Any) -> dict[str, dict[str, Any]]:
    """The `phases` of a trial, a JSON object; empty before the first has ended."""
    found = json.loads(cell) if isinstance(cell, str) and cell else cell
    return found if isinstance(found, dict) else {}


def _is_of(name: str, phase: str) -> bool:
    return name == phase or name.startswith(f"{phase}[")


# --------------------------------------------------------------------------------------------------------- confirm


@dataclass(frozen=True)
class Confirmation:
    """The search's winner against the baseline, on fresh seeds."""

    verdict: Decision
    comparison: Comparison | None
    shrinkage: float | None  # the search's own difference minus the confirmed effect, in the metric's units
    counts: Mapping[str, Counts]  # by point
    notes: tuple[str, ...]


def confirm_verdict(
    results: pd.DataFrame,
    trials: pd.DataFrame,
    winner_point: str,
    baseline_point: str,
    reading: Reading,
    *,
    search_difference: float | None = None,  # winner - baseline on dev, optimistic: the winner was chosen by it
    num_seeds: int | None = None,
) -> Confirmation:
    """Whether the winner is better than the baseline over the `confirm` trials, at alpha .05 for this one pair.

    Of several candidates take `holm` over their `comparison.p`.
    """
    sides = _sides(results, trials, (winner_point, baseline_point), reading, "point", "confirm", num_seeds)
    part = _part(sides[winner_point], sides[baseline_point], reading.metric, margin=0.0, family_size=1)
    shrinkage = None
    if part.comparison is not None and search_difference is not None:
        shrinkage = search_difference - part.comparison.effect
    return Confirmation(
        decide(part.p, part.beyond),
        part.comparison,
        shrinkage,
        {point: side.counts for point, side in sides.items()},
        tuple(dict.fromkeys(part.notes + [note for side in sides.values() for note in side.notes])),
    )
