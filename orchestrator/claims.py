"""Verdicts: what the tables say about the claims. Pure; knows no Ray, no files, no report.

A verdict is decided over seeds. Where answers are stored by example, an interval over new seeds and new examples stands
beside it, and says whether it holds on new data as well or on this evaluation set only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from orchestrator.bootstrap import Missing, new_data, seed_of
from orchestrator.sides import NO_TASKS, Cost, Counts, Reading, Side, Tasks, is_at, of_kind, ratio, sides
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
from orchestrator.study import Claim, tasks_of

PaperJudgement = Literal["inside", "below", "above", "not comparable"]
NEW_DATA, THIS_SET = "on new data as well", "on this evaluation set"
GLUE = frozenset(("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"))  # its average; with wnli it is over 9


# --------------------------------------------------------------------------------------------------------- verdict


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
    reading: Reading  # with the data sets over which the values are means
    by_task: Mapping[str, tuple[Comparison, ...]]  # as `parts`, of each data set for itself; empty where there is one
    holds: str | None  # where a verdict that is decided holds: NEW_DATA or THIS_SET


@dataclass(frozen=True)
class _Part:
    """One pair of sides: what is there, and what may be decided from it."""

    comparison: Comparison | None
    p: float  # 1 where nothing can be decided
    beyond: float  # gain - margin; with failed seeds, under the values that stand for them
    notes: list[str]
    failed: bool
    by_task: dict[str, Comparison] = field(default_factory=dict)


class _Examples(NamedTuple):
    """The answers of one reading, with the column `side`; `why`: there can be no interval over examples."""

    rows: pd.DataFrame | None
    why: str


def judge(
    claims: Mapping[str, Claim],
    results: pd.DataFrame,
    trials: pd.DataFrame,
    *,
    default_phase: str,
    num_seeds: int | None = None,  # planned; by default those that `trials` has
    examples: pd.DataFrame | None = None,
    tasks: Tasks = NO_TASKS,
) -> dict[str, Verdict]:
    """Each claim's verdict: "`arm` is better than `against` by more than `margin`", see `decide`.

    Claims of one `family` share alpha by Holm, those that cannot be tested yet included. A conjunctive claim stands
    outside: each part is tested at alpha; supported if all parts are, refuted if any is. That keeps a false `supported`
    below alpha / 2, but k parts may falsely refute with up to k * alpha / 2.
    """
    single = {name: claim.family for name, claim in claims.items() if isinstance(claim.against, str)}
    sizes = Counter(single.values())
    readings: dict[str, Reading] = {}
    found: dict[str, dict[str, Side]] = {}
    parts: dict[str, list[_Part]] = {}
    for name, claim in claims.items():
        against = (claim.against,) if isinstance(claim.against, str) else claim.against
        phase = claim.phase or default_phase
        averaged = tasks_of(claim, tasks.each.get(phase, ()))
        at = Reading(phase, claim.model, claim.metric, averaged, claim.split, claim.at)
        rival = at._replace(model=claim.against_model or claim.model)
        averaged, of = sides(results, trials, (claim.arm, *against), at, "arm", "trial", num_seeds)
        if rival != at:
            of |= sides(results, trials, against, rival, "arm", "trial", num_seeds)[1]
        readings[name], found[name] = at._replace(tasks=averaged), of
        answers = _examples(examples, {(claim.arm,): at, against: rival}, "arm", "trial")
        how: dict[str, Any] = {"margin": claim.margin, "family_size": sizes[claim.family] if name in single else 1}
        parts[name] = [_part(name, of[claim.arm], of[a], readings[name], answers, tasks, **how) for a in against]
    adjusted: dict[str, float] = {}
    for family in sizes:
        names = [name for name, of_name in single.items() if of_name == family]
        adjusted.update(zip(names, holm([parts[name][0].p for name in names]).tolist(), strict=True))
    return {
        name: _verdict(name, claims[name], readings[name], parts[name], found[name], adjusted.get(name), tasks)
        for name in claims
    }


def _verdict(
    name: str, claim: Claim, at: Reading, parts: list[_Part], of: dict[str, Side], p: float | None, tasks: Tasks
) -> Verdict:
    refuting = [part for part in parts if decide(part.p, part.beyond) == "refuted"]
    if p is not None:
        verdict = decide(p, parts[0].beyond)
    else:
        p = min(part.p for part in refuting) if refuting else max(part.p for part in parts)
        verdict = "refuted" if refuting else decide(p, min(part.beyond for part in parts))
    costs = {arm: side.cost for arm, side in of.items() if side.cost is not None}
    own = costs.get(claim.arm)
    ratios = {a: ratio(own, cost) for a, cost in costs.items() if own is not None and a != claim.arm}
    notes = [note for part in parts for note in part.notes] + [note for side in of.values() for note in side.notes]
    for against, times in ratios.items():
        if not 1 / 1.1 <= (x := getattr(times, claim.axis)) <= 1.1:
            notes.append(f"axis not equal: {claim.arm!r} used {x:.3g} times the {claim.axis} of {against!r}")
    if len(at.tasks) > 1:
        notes.append(f"mean over {', '.join(at.tasks)}, inside each seed")
    partial = _part_of_glue(at.tasks, tasks)
    notes += [partial] if partial else []
    holds = None
    if verdict == "supported":
        holds = NEW_DATA if all(_holds(part) for part in parts) else THIS_SET
    elif verdict == "refuted":
        holds = NEW_DATA if any(_holds(part) for part in refuting or parts) else THIS_SET
    if holds is not None:
        notes.append(_where(holds, parts, claim.margin))
    compared = tuple(part.comparison for part in parts if part.comparison is not None)
    by_task = {task: tuple(part.by_task[task] for part in parts if task in part.by_task) for task in at.tasks}
    return Verdict(
        name=name,
        claim=claim,
        verdict=verdict,
        parts=compared,
        p_adjusted=p,
        seeds_more=_seeds_more(parts) if verdict == "undecided" else None,
        counts={arm: side.counts for arm, side in of.items()},
        costs=costs,
        cost_ratios=ratios,
        paper=_judge_paper(claim.paper, compared if len(parts) == 1 and not partial else ()),
        notes=tuple(dict.fromkeys(notes)),
        reading=at,
        by_task=by_task if len(by_task) > 1 else {},
        holds=holds,
    )


def _holds(part: _Part) -> bool:
    return part.comparison is not None and part.comparison.holds_on_new_data()


def _where(holds: str, parts: Sequence[_Part], margin: float) -> str:
    from_what = f"the margin {margin:g}" if margin else "0"
    if holds == NEW_DATA:
        return f"at this scale, {NEW_DATA}: the interval over new seeds and new examples excludes {from_what} too"
    if any(part.comparison is not None and part.comparison.new_data is not None for part in parts):
        return (
            f"at this scale, {THIS_SET}: over new seeds the interval excludes {from_what}, over new seeds and new examples "
            "it does not"
        )
    return f"at this scale, {THIS_SET}: the interval covers new seeds, not new examples"


def _part_of_glue(averaged: Sequence[str], tasks: Tasks) -> str | None:
    """Why an average is none of the papers', if it is one over some of GLUE's tasks."""
    glue = [tasks.glue[name] for name in averaged if name in tasks.glue]
    if len(averaged) < 2 or not glue or (len(glue) == len(averaged) and set(glue) - {"wnli"} == GLUE):
        return None
    return (
        f"the average is not comparable with the papers': it is over {', '.join(averaged)}, theirs over GLUE's 8 tasks "
        "(9 with WNLI)"
    )


def _examples(
    examples: pd.DataFrame | None, readings: Mapping[tuple[str, ...], Reading], column: str, kind: str
) -> _Examples:
    """`readings`: where to read the answers of these arms (or points)."""
    at = next(iter(readings.values()))
    if at.at != 1 or at.split != "test":
        return _Examples(None, "they are stored for test at the end of a phase only")
    if examples is None or examples.empty:
        return _Examples(None, "none are stored")
    found = [of_kind(examples, names, column, kind) for names in readings]
    rows = pd.concat([rows[is_at(rows, at)] for rows, at in zip(found, readings.values(), strict=True)])
    return _Examples(rows.assign(side=rows[column].astype(str)), "")


def _part(
    claim: str, arm: Side, against: Side, at: Reading, answers: _Examples, tasks: Tasks, *, margin: float, family_size: int
) -> _Part:  # fmt: skip
    metric = at.metric
    how: dict[str, Any] = {"lower_is_better": lower_is_better(metric), "margin": margin, "family_size": family_size}
    found = compare(arm.values, against.values, name=against.name, **how)
    by_task = {
        task: one
        for task in at.tasks
        if (one := compare(arm.by_task.get(task, {}), against.by_task.get(task, {}), name=against.name, **how))
    }
    notes = _notes_on_pairs(found, arm.name, against.name)
    failed = arm.failed | against.failed
    if found is not None:
        found, by_task, more = _on_new_data(claim, found, by_task, (arm, against), at, answers, tasks)
        notes += more
    if not failed:
        if found is None or found.p is None:
            return _Part(found, 1, 0, notes, False, by_task)
        return _Part(found, found.p, found.gain - margin, notes, False, by_task)
    lost = [f"{s.name!r} failed at seed {', '.join(map(str, sorted(s.failed)))}" for s in (arm, against) if s.failed]
    ends = bounds(metric)
    if ends is None:
        notes.append(f"{' and '.join(lost)}: {metric} has no worst value that could stand for it, so undecided")
        return _Part(found, 1, 0, notes, True, by_task)
    notes.append(f"{' and '.join(lost)}: judged with the value of {metric} that is worst for the verdict instead")
    worst, best = ends  # no metric with two ends is better when lower
    for sign, of_arm, of_against in ((1, worst, best), (-1, best, worst)):  # supported even so; refuted even so
        whole = compare(
            dict.fromkeys(failed, of_arm) | arm.values, dict.fromkeys(failed, of_against) | against.values, **how
        )
        if whole is not None and whole.p is not None and sign * (whole.gain - margin) > 0:
            return _Part(found, whole.p, whole.gain - margin, notes, True, by_task)
    return _Part(found, 1, 0, notes, True, by_task)


def _on_new_data(
    claim: str, found: Comparison, by_task: dict[str, Comparison], pair: tuple[Side, Side], at: Reading, answers: _Examples,
    tasks: Tasks,
) -> tuple[Comparison, dict[str, Comparison], list[str]]:  # fmt: skip
    """The comparisons with their intervals over new seeds and new examples, and what is to be said of that."""
    arm, against = pair
    recorded = {t: np.array([[side.by_task[t][s] for s in found.seeds] for side in pair]) for t in at.tasks}
    try:
        if answers.rows is None:
            raise Missing(answers.why)
        if arm.failed | against.failed:
            raise Missing("a seed failed, and has no answers")
        names, seed = (arm.name, against.name), seed_of(claim, against.name)
        drawn = new_data(answers.rows, names, found.seeds, recorded, at.metric, tasks.rules, seed=seed)
    except Missing as why:
        return found, by_task, [f"no interval over new examples: {why}"]
    if found.n == 1:
        low, high = (f"{end:+.3g}".replace("-", "\N{MINUS SIGN}") for end in drawn.mean)
        only = f"of these two runs alone, on new examples: 95 % interval [{low}, {high}]"
        return found, by_task, [f"{only}; it says nothing about other seeds"]
    of_each = dict(zip(recorded, drawn.each, strict=True))
    each = {t: replace(one, new_data=of_each[t]) if one.seeds == found.seeds else one for t, one in by_task.items()}
    return replace(found, new_data=drawn.mean), each, []


def _notes_on_pairs(found: Comparison | None, arm: str, against: str) -> list[str]:
    if found is None:
        return [f"no seed has a value in both {arm!r} and {against!r}"]
    if found.n == 1:
        return ["n = 1: an effect of two runs; without a second seed nothing is known about how it varies"]
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
    examples: pd.DataFrame | None = None,
    tasks: Tasks = NO_TASKS,
) -> Confirmation:
    """Whether the winner is better than the baseline over the `confirm` trials, at alpha .05 for this one pair.

    Of several candidates take `holm` over their `comparison.p`.
    """
    names = (winner_point, baseline_point)
    averaged, of = sides(results, trials, names, reading, "point", "confirm", num_seeds)
    at = reading._replace(tasks=averaged)
    answers = _examples(examples, {names: reading}, "point", "confirm")
    winner, baseline = of[winner_point], of[baseline_point]
    part = _part("confirm", winner, baseline, at, answers, tasks, margin=0.0, family_size=1)
    shrinkage = None
    if part.comparison is not None and search_difference is not None:
        shrinkage = search_difference - part.comparison.effect
    return Confirmation(
        decide(part.p, part.beyond),
        part.comparison,
        shrinkage,
        {point: side.counts for point, side in of.items()},
        tuple(dict.fromkeys(part.notes + [note for side in of.values() for note in side.notes])),
    )
