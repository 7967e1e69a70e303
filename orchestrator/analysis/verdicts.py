"""Verdicts: what the tables say about the claims. Pure; knows no Ray, no files, no report.

A verdict is decided over seeds. Where answers are stored by example, an interval over new seeds and new examples stands
beside it, and says whether it holds on new data as well or on this evaluation set only. Where a claim says `less`, the cost
is a part that is judged beside the quality.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from orchestrator.analysis.arm_values import (
    NO_TASKS,
    ArmValues,
    Cost,
    Counts,
    MetricQuery,
    Tasks,
    arm_values,
    cost_pair,
    equal_sides,
    is_at,
    of_kind,
    ratios,
)
from orchestrator.analysis.bootstrap import Missing, new_data, seed_of
from orchestrator.analysis.statistics import (
    ALPHA,
    Comparison,
    CostComparison,
    Decision,
    bounds,
    compare,
    compare_costs,
    decide,
    holm,
    lower_is_better,
    seeds_needed,
)
from orchestrator.analysis.timing import conditions
from orchestrator.study.schema import AXIS_WORDS, Claim, CostAxis, Figure, Slot, tasks_of

PaperJudgement = Literal["inside", "below", "above", "not comparable"]
NEW_DATA, THIS_SET, BY_COST = "on new data as well", "on this evaluation set", "by its cost"
GLUE = frozenset(("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"))  # its average; with wnli it is over 9


# --------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Verdict:
    """What the results say about one claim."""

    name: str
    claim: Claim
    verdict: Decision
    parts: tuple[Comparison, ...]  # one for each `against` that shares a seed with the arm; of values that are there
    cost_parts: tuple[CostPart, ...]  # likewise, where the claim says `less`
    p_adjusted: float  # Holm's; of a conjunctive claim the p of the part that decided; 1 where nothing can be tested
    seeds_more: int | None  # about how many it would take; None if decided, above 1000, or seeds would not help
    counts: Mapping[str, Counts]  # by arm
    costs: Mapping[str, Cost]  # by arm; at equal cost the arm's beside the first `against`
    cost_ratios: Mapping[str, Cost]  # by `against`: the arm's cost over its cost
    paper: PaperJudgement | None  # of the paper's figure, as an effect in our units, against our 95 % interval
    notes: tuple[str, ...]
    reading: MetricQuery  # with the data sets over which the values are means
    by_task: Mapping[str, tuple[Comparison, ...]]  # as `parts`, of each data set for itself; empty where there is one
    holds: str | None  # where a verdict that is decided holds: NEW_DATA or THIS_SET; BY_COST: refuted by that alone
    read_at: Mapping[str, Pair]  # by `against`, of claims at equal cost
    conditions: str | None  # under which the times were taken, of claims about time


class Pair(NamedTuple):
    """Progress by seed at which two sides were read."""

    arm: Mapping[int, float]
    against: Mapping[int, float]


@dataclass(frozen=True)
class CostPart:
    """What the arm spent, over what `against` spent, without the phases that both share."""

    axis: CostAxis
    found: CostComparison
    in_full: float  # the ratio with those phases
    shared: tuple[str, ...]
    verdict: Decision


@dataclass(frozen=True)
class _Part:
    """One pair of sides: what is there, and what may be decided from it. Of their quality, or of their costs."""

    comparison: Comparison | None  # of their quality
    p: float  # 1 where nothing can be decided
    beyond: float  # gain - margin; with failed seeds, under the values that stand for them
    notes: list[str]
    failed: bool
    by_task: dict[str, Comparison] = field(default_factory=dict)
    cost: CostPart | None = None

    @property
    def spread(self) -> tuple[float | None, int, int] | None:
        """SD, pairs, and claims in the family; None where nothing is compared."""
        if self.cost is not None:
            return self.cost.found.log_sd, self.cost.found.n, 1
        return None if (c := self.comparison) is None else (c.sd, c.n, c.family_size)


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
    slot: Slot | None = None,  # where the trials ran
) -> dict[str, Verdict]:
    """Each claim's verdict: "`arm` is better than `against` by more than `margin`", see `decide`.

    Claims of one `family` share alpha by Holm, those that cannot be tested yet included. A conjunctive claim (several
    `against`, or `less`) stands outside: each part is tested at alpha; supported if all parts are, refuted if any is. That keeps a false `supported`
    below alpha / 2, but k parts may falsely refute with up to k * alpha / 2.
    """
    single = {n: claim.family for n, claim in claims.items() if isinstance(claim.against, str) and not claim.less}
    sizes = Counter(single.values())
    readings: dict[str, MetricQuery] = {}
    pairs: dict[str, list[tuple[ArmValues, ArmValues]]] = {}
    parts: dict[str, list[_Part]] = {}
    for name, claim in claims.items():
        readings[name], pairs[name] = _pairs(claim, results, trials, default_phase, num_seeds, tasks)
        at = readings[name]
        answers = _examples(examples, _asked(claim, at), "arm", "trial")
        how: dict[str, Any] = {"margin": claim.margin, "family_size": sizes[claim.family] if name in single else 1}
        parts[name] = [_part(name, *pair, at, answers, tasks, **how) for pair in pairs[name]]
        for part, pair in zip(parts[name], pairs[name], strict=True):
            part.notes.extend(_with_later_looks(*pair, at, claim.margin))
        if claim.less is not None:
            parts[name] += [_cost_part(*pair, claim.less) for pair in pairs[name]]
    adjusted: dict[str, float] = {}
    for family in sizes:
        names = [name for name, of_name in single.items() if of_name == family]
        adjusted.update(zip(names, holm([parts[name][0].p for name in names]).tolist(), strict=True))
    timed = {
        name: conditions(trials, (claim.arm, *claim.rivals), readings[name].phase, slot)
        for name, claim in claims.items()
        if claim.is_of_time
    }
    return {
        name: _verdict(
            name, claims[name], readings[name], parts[name], pairs[name], adjusted.get(name), tasks, timed.get(name)
        )
        for name in claims
    }


def _pairs(
    claim: Claim, results: pd.DataFrame, trials: pd.DataFrame, default_phase: str, num_seeds: int | None, tasks: Tasks
) -> tuple[MetricQuery, list[tuple[ArmValues, ArmValues]]]:
    """Where the claim is read, with its data sets; and the arm beside each `against` there."""
    phase = claim.phase or default_phase
    averaged = tasks_of(claim, tasks.each.get(phase, ()))
    plain = MetricQuery(phase, claim.model, claim.metric, averaged, claim.split)
    if claim.at == "equal":
        at, pairs = plain._replace(equal=claim.axis), list[tuple[ArmValues, ArmValues]]()
        for against in claim.rivals:
            both = {claim.arm: at, against: at._replace(model=claim.against_model or claim.model)}
            averaged, of = equal_sides(results, trials, both, claim.axis, num_seeds, tasks.trains)
            pairs.append((of[claim.arm], of[against]))
        return at._replace(tasks=averaged), pairs
    at = plain._replace(at=claim.at)
    averaged, of = arm_values(results, trials, (claim.arm, *claim.rivals), at, "arm", "trial", num_seeds, tasks.trains)
    if claim.against_model not in (None, claim.model):
        rival = at._replace(model=claim.against_model)
        of |= arm_values(results, trials, claim.rivals, rival, "arm", "trial", num_seeds, tasks.trains)[1]
    return at._replace(tasks=averaged), [(of[claim.arm], of[against]) for against in claim.rivals]


def _asked(claim: Claim, at: MetricQuery) -> dict[tuple[str, ...], MetricQuery]:
    """Whose answers to examples are compared, and where they stand."""
    return {(claim.arm,): at, claim.rivals: at._replace(model=claim.against_model or claim.model)}


def _verdict(
    name: str, claim: Claim, at: MetricQuery, parts: list[_Part], pairs: list[tuple[ArmValues, ArmValues]], p: float | None,
    tasks: Tasks, timed: str | None,
) -> Verdict:  # fmt: skip
    refuting = [part for part in parts if decide(part.p, part.beyond) == "refuted"]
    if p is not None:
        verdict = decide(p, parts[0].beyond)
    else:
        p = min(part.p for part in refuting) if refuting else max(part.p for part in parts)
        verdict = "refuted" if refuting else decide(p, min(part.beyond for part in parts))
    of = {side.name: side for pair in reversed(pairs) for side in pair}
    costs = {arm: side.cost for arm, side in of.items() if side.cost is not None}
    spent = {b.name: found for a, b in pairs if (found := ratios(a, b)) is not None}
    notes = [note for part in parts for note in part.notes] + [n for pair in pairs for side in pair for n in side.notes]
    for against, (times, whole, shared) in spent.items() if claim.less is None else ():
        if not 1 / 1.1 <= (x := getattr(times, claim.axis)) <= 1.1:
            notes.append(f"axis not equal: {claim.arm!r} used {x:.3g} times the {claim.axis} of {against!r}")
        if shared and any(abs(a - b) > 0.005 for a, b in zip(times, whole, strict=True)):
            notes.append(
                f"cost beside {against!r} is without {', '.join(shared)}, which both start from; with it "
                + ", ".join(
                    f"\N{MULTIPLICATION SIGN}{getattr(whole, axis):.3g} {words}" for axis, words in AXIS_WORDS.items()
                )
            )
    if len(at.tasks) > 1:
        notes.append(f"mean over {', '.join(at.tasks)}, inside each seed")
    other = _another_average(claim, at.tasks, tasks)
    notes += [other] if other else []
    quality = parts[: len(pairs)]
    holds = None
    if verdict == "supported":
        holds = NEW_DATA if all(_holds(part) for part in quality) else THIS_SET
    elif verdict == "refuted":
        decisive = [part for part in quality if any(part is one for one in refuting)]
        holds = BY_COST if not decisive else NEW_DATA if any(_holds(part) for part in decisive) else THIS_SET
    if holds is not None:
        notes.append(_where(holds, quality, claim.margin))
    notes += _on_margin(claim, verdict, quality)
    notes += [timed] if timed else []
    compared = tuple(part.comparison for part in parts if part.comparison is not None)
    by_task = {task: tuple(part.by_task[task] for part in parts if task in part.by_task) for task in at.tasks}
    return Verdict(
        name=name,
        claim=claim,
        verdict=verdict,
        parts=compared,
        cost_parts=tuple(part.cost for part in parts if part.cost is not None),
        p_adjusted=p,
        seeds_more=_seeds_more(parts) if verdict == "undecided" else None,
        counts={arm: side.counts for arm, side in of.items()},
        costs=costs,
        cost_ratios={against: times for against, (times, _, _) in spent.items()},
        paper=_judge_paper(claim, compared if len(pairs) == 1 and not other else ()),
        notes=tuple(dict.fromkeys(notes)),
        reading=at,
        by_task=by_task if len(by_task) > 1 else {},
        holds=holds,
        read_at={b.name: Pair(a.progress, b.progress) for a, b in pairs} if at.equal else {},
        conditions=timed,
    )


def _holds(part: _Part) -> bool:
    return part.comparison is not None and part.comparison.holds_on_new_data()


def _on_margin(claim: Claim, verdict: Decision, quality: Sequence[_Part]) -> list[str]:
    """What a verdict against a margin says, and what not."""
    most = f"{abs(claim.margin):g}"
    if claim.margin < 0 and verdict == "supported":
        return [f"not worse by {most} or more: whether {claim.arm!r} is better is another claim, without a margin"]
    if claim.margin < 0 and verdict == "undecided":
        return [f"undecided whether {claim.arm!r} is worse by more than {most}"]
    worse = verdict == "refuted" and any(decide(part.p, part.beyond) == "refuted" for part in quality)
    if claim.margin < 0 and worse:
        return [f"refuted as {claim.arm!r} is worse by more than {most}"]
    if claim.margin > 0 and verdict == "refuted":
        return [f"the gain is below {most}; {claim.arm!r} may still be better, by less"]
    return []


def _where(holds: str, parts: Sequence[_Part], margin: float) -> str:
    from_what = f"the margin {margin:g}".replace("-", "\N{MINUS SIGN}") if margin else "0"
    if holds == BY_COST:
        return f"at this scale, refuted {BY_COST} alone: that part does not hang on the examples"
    if holds == NEW_DATA:
        return f"at this scale, {NEW_DATA}: the interval over new seeds and new examples excludes {from_what} too"
    if any(part.comparison is not None and part.comparison.new_data is not None for part in parts):
        return (
            f"at this scale, {THIS_SET}: over new seeds the interval excludes {from_what}, over new seeds and new examples "
            "it does not"
        )
    return f"at this scale, {THIS_SET}: the interval covers new seeds, not new examples"


def _another_average(claim: Claim, averaged: Sequence[str], tasks: Tasks) -> str | None:
    """Why an average is not the paper's: it is over other tasks than the figure says, or over some of GLUE's."""
    glue = sorted(tasks.glue[name] for name in averaged if name in tasks.glue)
    theirs = claim.paper.over if isinstance(claim.paper, Figure) else "glue"
    if theirs == "glue":
        is_theirs = len(glue) == len(averaged) and set(glue) - {"wnli"} == GLUE
    else:
        is_theirs = len(glue) == len(averaged) and glue == sorted(theirs)
    if is_theirs or (not isinstance(claim.paper, Figure) and (len(averaged) < 2 or not glue)):
        return None
    over = "GLUE's 8 tasks (9 with WNLI)" if theirs == "glue" else f"GLUE's {', '.join(theirs)}"
    return f"the average is not comparable with the papers': it is over {', '.join(averaged)}, theirs over {over}"


def _examples(
    examples: pd.DataFrame | None, readings: Mapping[tuple[str, ...], MetricQuery], column: str, kind: str
) -> _Examples:
    """`readings`: where to read the answers of these arms (or points)."""
    at = next(iter(readings.values()))
    if at.at != 1 or at.equal is not None or at.split != "test":
        return _Examples(None, "they are stored for test at the end of a phase only")
    if examples is None or examples.empty:
        return _Examples(None, "none are stored")
    found = [of_kind(examples, names, column, kind) for names in readings]
    rows = pd.concat([rows[is_at(rows, at)] for rows, at in zip(found, readings.values(), strict=True)])
    return _Examples(rows.assign(side=rows[column].astype(str)), "")


def _part(
    claim: str, arm: ArmValues, against: ArmValues, at: MetricQuery, answers: _Examples, tasks: Tasks, *, margin: float, family_size: int
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


def _with_later_looks(arm: ArmValues, against: ArmValues, at: MetricQuery, margin: float) -> list[str]:
    """At equal cost the dearer side is read too early, by less than a look: what it would be by reading it too late."""
    if all(progress == 1 for side in (arm, against) for progress in side.progress.values()):
        return []
    found = compare(arm.later, against.later, lower_is_better=lower_is_better(at.metric), margin=margin)
    if found is None or found.interval is None or found.p is None:
        return []
    low, high = found.interval
    numbers = f"{found.effect:+.3g} [{low:+.3g}, {high:+.3g}]".replace("-", "\N{MINUS SIGN}")
    return [
        f"looks are coarse: one look further on, beyond what is equal, {arm.name!r} \N{MINUS SIGN} {against.name!r} is "
        f"{numbers}, {decide(found.p, found.gain - margin)} without Holm"
    ]


def _on_new_data(
    claim: str, found: Comparison, by_task: dict[str, Comparison], pair: tuple[ArmValues, ArmValues], at: MetricQuery, answers: _Examples,
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


def _cost_part(arm: ArmValues, against: ArmValues, axis: CostAxis) -> _Part:
    """Whether the arm took less of the axis than `against`, each without the phases that both have at that seed."""
    spent = cost_pair(arm, against)
    own, full = (
        [{seed: float(getattr(pair[i], axis)) for seed, pair in pairs.items()} for i in (0, 1)]
        for pairs in (spent.own, spent.full)
    )
    found, whole = (compare_costs(*costs, name=against.name) for costs in (own, full))
    words, failed = AXIS_WORDS[axis], bool(arm.failed | against.failed)
    if found is None or whole is None:
        return _Part(None, 1, 0, [f"no seed has {words} recorded of both {arm.name!r} and {against.name!r}"], failed)
    notes, p = [], 1.0 if found.p is None else found.p
    if found.log_sd == 0:
        if axis == "device_seconds":
            notes.append(f"all {found.n} ratios of {words} are equal: without spread there is no test")
        elif found.ratio != 1:  # counted, not measured: a seed more would have the same
            p = 0.0
            notes.append(f"{words} are counted: their ratio is the same at each of {found.n} seeds, and needs no test")
    if failed:
        p = 1.0
        notes.append(f"a seed failed, and what it would have taken of {words} is not known: that part is undecided")
    verdict = decide(p, found.log_gain)
    times = f"\N{MULTIPLICATION SIGN}{found.ratio:.3g}"
    times += " [{:.3g}, {:.3g}]".format(*found.interval) if found.interval else ""
    left_out = (
        f"without {', '.join(spent.shared)}, which both start from"
        if spent.shared
        else "which start from no phase in common"
    )
    notes.append(
        f"{words} of {arm.name!r}: {times} that of {against.name!r} ({verdict}; geometric mean over "
        f"{found.n} seed{'s' if found.n > 1 else ''}, {left_out}); \N{MULTIPLICATION SIGN}{whole.ratio:.3g} in full"
    )
    return _Part(None, p, found.log_gain, notes, failed, cost=CostPart(axis, found, whole.ratio, spent.shared, verdict))


def _seeds_more(parts: list[_Part]) -> int | None:
    """At the observed effect and SD, power .8, and the alpha of Holm's first step; for the part that needs most."""
    more = [1]
    for part in parts:
        if part.cost is not None and part.cost.verdict != "undecided":
            continue
        sd, n, family_size = part.spread or (None, 0, 1)
        if part.failed or not sd:
            return None
        needed = seeds_needed(part.beyond / sd, alpha=ALPHA / family_size)
        if needed is None:
            return None
        more.append(needed - n)
    return max(more)


def _judge_paper(claim: Claim, parts: tuple[Comparison, ...]) -> PaperJudgement | None:
    if claim.paper is None:
        return None
    if (figure := claim.figure) is None or not parts or parts[0].interval is None:
        return "not comparable"
    low, high = parts[0].interval
    return "below" if figure < low else "above" if figure > high else "inside"


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
    reading: MetricQuery,
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
    averaged, of = arm_values(results, trials, names, reading, "point", "confirm", num_seeds, tasks.trains)
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
