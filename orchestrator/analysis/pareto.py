"""Quality beside cost: which recipes no other beats on both, and the cheapest arm that is good enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.analysis.curves import by_seed, ended, measured_of, objective_reading, planned
from orchestrator.analysis.notes import Note
from orchestrator.analysis.statistics import ALPHA, MIN_PAIRS, paired_t
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.timing import conditions
from orchestrator.study.objectives import COST_WORDS, TIMES, Measured
from orchestrator.study.schema import Study


@dataclass(frozen=True)
class ArmPoint:
    """An arm on both axes: its values of the first objective's metric on test, and its costs, by seed."""

    name: str
    quality: Mapping[int, float]
    costs: Mapping[int, float]
    has_lost: bool = False  # a seed that failed or was stopped

    @property
    def mean_quality(self) -> float:
        return math.fsum(self.quality.values()) / len(self.quality)

    @property
    def mean_cost(self) -> float:
        return math.fsum(self.costs.values()) / len(self.costs)


@dataclass(frozen=True)
class GoodEnoughArm:
    """The answer to `good_enough`."""

    name: str | None  # the cheapest arm that is shown to be no worse than the best by `within`
    best: str  # by its mean
    p: Mapping[str, float]  # of each arm, adjusted over the arms: that another is better by `within` or more


def cost_of(study: Study) -> Measured:
    """Returns the cost beside which quality is shown: that of `good_enough`, the first that is an objective, or FLOPs."""
    first = study.objective
    named = [
        *([study.good_enough.cost] if study.good_enough else []),
        *(o.metric for o in study.objectives if o.is_cost),
    ]
    return Measured(phase=first.phase, model=first.model, metric=[*named, "flops"][0])


def arm_points(study: Study, tables: Tables) -> list[ArmPoint]:
    """Returns the arms of which a seed has both a quality and a cost."""
    cost, query, trials, found = cost_of(study), objective_reading(study, "test"), planned(tables.trials), []
    for arm in study.arms:
        own = ended(tables, "trial", arm)
        quality, spent = by_seed(tables, query, own), measured_of(study, tables, cost, own)
        seeds = dict(zip(own["trial"], own["seed"], strict=True))
        costs = {int(seeds[trial]): value for trial, value in spent.items()}
        if quality.keys() & costs.keys():
            of_arm = trials[(trials["kind"] == "trial") & (trials["arm"] == arm)]
            found.append(ArmPoint(arm, quality, costs, bool(of_arm["status"].isin(["failed", "stopped"]).any())))
    return found


def non_dominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Tells of each point whether no other is at least as low on every axis, and lower on one."""
    finite = [all(map(math.isfinite, point)) for point in points]

    def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    others = [point for point, is_known in zip(points, finite, strict=True) if is_known]
    return [
        is_known and not any(dominates(other, point) for other in others)
        for point, is_known in zip(points, finite, strict=True)
    ]


def no_worse_p(quality: Mapping[str, Mapping[int, float]], within: float, *, lower_is_better: bool) -> dict[str, float]:
    """Returns of each arm the p of "another arm is better by `within` or more", adjusted over the arms.

    An arm is tested against each other one by a one-sided paired t test, and its p is the largest: it must be close to all
    (an intersection-union test). Holm's steps over the arms then hold the chance that any arm is wrongly called good
    enough at the level; the best arm never is, so k arms count as k - 1 (Shaffer, 1986).
    """
    plain = {
        arm: max((_one_sided(own, quality[o], within, lower_is_better) for o in quality if o != arm), default=1.0)
        for arm, own in quality.items()
    }
    adjusted, least, k = dict[str, float](), 0.0, len(quality)
    for rank, arm in enumerate(sorted(plain, key=plain.__getitem__)):
        least = max(least, min(1.0, plain[arm] * max(1, min(k - 1, k - rank))))
        adjusted[arm] = least
    return adjusted


def _one_sided(own: Mapping[int, float], other: Mapping[int, float], within: float, lower_is_better: bool) -> float:
    """Returns the p of "the other is better by `within` or more"; 1 below three pairs, and without spread."""
    sign = -1.0 if lower_is_better else 1.0
    gains = [sign * (own[seed] - other[seed]) for seed in sorted(own.keys() & other.keys())]
    if len(gains) < MIN_PAIRS:
        return 1.0
    test = paired_t(gains, null=-within)
    half = float(test.p) / 2
    return 1.0 if test.sd == 0 else half if test.mean > -within else 1 - half


def cheapest_good_enough(arms: Sequence[ArmPoint], within: float, *, lower_is_better: bool) -> GoodEnoughArm | None:
    """Names the cheapest arm that is no worse than the best by `within`; None below two arms.

    The chance that the named arm is worse than the best by `within` or more is at most 5 %. An arm that lost a seed is not
    named: what it lost may be what makes it worse.
    """
    if len(arms) < 2:
        return None
    sign = 1.0 if lower_is_better else -1.0
    p = no_worse_p({arm.name: arm.quality for arm in arms}, within, lower_is_better=lower_is_better)
    shown = [arm for arm in arms if p[arm.name] <= ALPHA and not arm.has_lost]
    cheapest = min(shown, key=lambda arm: (arm.mean_cost, sign * arm.mean_quality), default=None)
    best = min(arms, key=lambda arm: sign * arm.mean_quality)
    return GoodEnoughArm(None if cheapest is None else cheapest.name, best.name, p)


def good_enough(study: Study, tables: Tables) -> GoodEnoughArm | Note | None:
    """Answers the study's `good_enough`: None where it does not ask, or where fewer than two arms have ended; a note where
    trials shared a device, so that their times cannot be compared."""
    if study.good_enough is None:
        return None
    if study.good_enough.cost in TIMES:
        measured = conditions(tables.trials, study.arms, study.objective.phase, study.slot)
        if measured is not None and measured.about["is_shared"]:
            return measured
    lower = study.objective.mode == "min"
    return cheapest_good_enough(arm_points(study, tables), study.good_enough.within, lower_is_better=lower)


def cost_words(study: Study) -> str:
    cost = cost_of(study)
    return COST_WORDS[cost.metric] + (", earlier phases included" if cost.spent else "")
