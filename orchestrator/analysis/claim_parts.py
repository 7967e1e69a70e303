"""The parts of a claim: queries the values of its arms, and compares them pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from orchestrator.analysis.arm_values import ArmValues, arm_values
from orchestrator.analysis.costs import CostPart, cost_pair
from orchestrator.analysis.equal_cost import equal_cost_values
from orchestrator.analysis.looks import level_of, over_looks
from orchestrator.analysis.new_data import Missing, NewData, Runs, StoredAnswers
from orchestrator.analysis.notes import Kind, Note, note
from orchestrator.analysis.queries import MetricQuery, Records, TaskFacts
from orchestrator.analysis.scaling import Answer
from orchestrator.analysis.statistics import (
    ALPHA,
    MIN_PAIRS,
    Comparison,
    Decision,
    compare,
    compare_costs,
    decide,
    equivalence_p,
    pivot_of,
    sign_test,
)
from orchestrator.study.claims import Claim, CostAxis
from orchestrator.study.schema import tasks_of
from trainables.metrics.known import metric_named

Pair = tuple[ArmValues, ArmValues]  # arm, against


@dataclass(frozen=True)
class Part:
    """One pair of arms: what there is, and what may be decided from it. About their quality, or about their costs."""

    p: float  # 1 where nothing can be decided
    beyond: float  # gain - margin; where seeds failed, its sign
    notes: tuple[Note, ...]
    failed: bool
    comparison: Comparison | None = None  # of the quality
    by_task: Mapping[str, Comparison] = field(default_factory=dict)
    cost: CostPart | None = None
    answer: Answer | None = None  # of a claim about scaling
    p_equivalent: float = 1.0  # that the gain is within the claim's ±`within`
    new_data: NewData | None = None  # where answers are stored

    @property
    def decision(self) -> Decision:
        return decide(self.p, self.beyond)

    @property
    def spread(self) -> tuple[float | None, int] | None:
        """SD, and number of pairs; None where nothing is compared."""
        if self.answer is not None:
            return self.answer.spread
        if self.cost is not None:
            return self.cost.found.log_sd, self.cost.found.n
        return None if (c := self.comparison) is None else (c.sd, c.n)

    def over(self, looks: Sequence[int]) -> Part:
        """Returns the part with what its p's are worth over all planned looks."""
        p, p_equivalent = (over_looks(p, looks) for p in (self.p, self.p_equivalent))
        cost = self.cost and replace(self.cost, verdict=decide(p, self.beyond))
        return replace(self, p=p, p_equivalent=p_equivalent, cost=cost)

    def undecidable(self) -> Part:
        """Returns the part as it is where its conditions allow no decision."""
        cost = self.cost and replace(self.cost, verdict=Decision.UNDECIDED)
        return replace(self, p=1.0, beyond=0.0, p_equivalent=1.0, cost=cost)

    @property
    def holds_on_new_data(self) -> bool:
        return self.comparison is not None and self.comparison.holds_on_new_data()


# ----------------------------------------------------------------------------------------------------------- query


def query_claim(claim: Claim, records: Records, default_phase: str) -> tuple[MetricQuery, list[Pair]]:
    """Returns what the claim compares, with its data sets, and the arm beside each `against`."""
    phase = claim.phase or default_phase
    query = MetricQuery(
        phase, claim.model, claim.metric, tasks_of(claim, records.facts.each.get(phase, ())), claim.split
    )
    rival_model = claim.against_model or claim.model
    if claim.at == "equal":
        query, tasks, pairs = query._replace(equal=claim.axis), query.tasks, list[Pair]()
        for against in claim.rivals:
            both = {claim.arm: query, against: query._replace(model=rival_model)}
            tasks, arms = equal_cost_values(records, both, claim.axis)
            pairs.append((arms[claim.arm], arms[against]))
        return query._replace(tasks=tasks), pairs
    query = query._replace(at=claim.at)
    tasks, arms = arm_values(records, (claim.arm, *claim.rivals), query)
    if rival_model != claim.model:
        arms |= arm_values(records, claim.rivals, query._replace(model=rival_model))[1]
    return query._replace(tasks=tasks), [(arms[claim.arm], arms[against]) for against in claim.rivals]


# --------------------------------------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class ClaimContext:
    """What the pairs of one claim (or confirmation) have in common."""

    query: MetricQuery  # with its data sets
    examples: StoredAnswers | None
    facts: TaskFacts
    margin: float = 0.0
    within: float | None = None
    against_model: str | None = None  # where it is not the query's
    family_size: int = 1  # comparisons of all claims of the family
    looks: tuple[int, ...] = ()  # planned

    @property
    def alpha(self) -> float:
        """The error of an interval that holds for all comparisons of the family, and at all looks."""
        return level_of(self.looks, ALPHA / self.family_size)

    def compare(self, arm: Mapping[int, float], against: Mapping[int, float], name: str) -> Comparison | None:
        lower = metric_named(self.query.metric).lower_is_better
        return compare(
            arm,
            against,
            lower_is_better=lower,
            margin=self.margin,
            family_size=self.family_size,
            alpha=self.alpha,
            name=name,
        )


def compare_quality(context: ClaimContext, arm: ArmValues, against: ArmValues) -> Part:
    """Compares the values of two arms over seeds and, where answers are stored, over new examples."""
    comparison = context.compare(arm.values, against.values, against.name)
    notes = _on_pairs(comparison, arm.name, against.name)
    by_task: dict[str, Comparison] = {}
    new_data = None
    for task in context.query.tasks if len(context.query.tasks) > 1 else ():
        of_task = context.compare(arm.by_task.get(task, {}), against.by_task.get(task, {}), against.name)
        by_task |= {} if of_task is None else {task: of_task}
    if comparison is not None:
        comparison, by_task, new_data, more = _over_examples(context, comparison, by_task, (arm, against))
        notes += more
    failed = {seed for values in (arm, against) for seed in values.failed}
    if failed:
        lost = tuple((values.name, tuple(sorted(values.failed))) for values in (arm, against) if values.failed)
        notes.append(note(Kind.FAILED_SEEDS, failed=lost))
    if context.query.equal is None:
        test = _test(context, (arm.values, against.values), failed)
    else:  # both sides of the budget must agree
        readings = ((arm.values, against.beyond), (arm.beyond, against.values))
        tests = [_test(context, reading, failed) for reading in readings]
        is_alike = tests[0].beyond * tests[1].beyond > 0
        p_equivalent = max(test.p_equivalent for test in tests)
        test = max(tests)._replace(p_equivalent=p_equivalent) if is_alike else _Test(1.0, 0.0, p_equivalent)
        notes += _on_beyond(context, arm, against, is_alike=is_alike)
    p, beyond, p_equivalent = test
    return Part(
        p, beyond, tuple(notes), bool(failed), comparison, by_task, p_equivalent=p_equivalent, new_data=new_data
    )


class _Test(NamedTuple):
    p: float
    beyond: float  # gain - margin, or its sign
    p_equivalent: float = 1.0


def _test(context: ClaimContext, pair: tuple[Mapping[int, float], Mapping[int, float]], failed: set[int]) -> _Test:
    """Tests by Student's t; where seeds failed, by a sign test that counts these seeds against the verdict."""
    found = context.compare(pair[0], pair[1], "against")
    if failed:
        gains = [] if found is None else [-d if found.lower_is_better else d for d in found.differences]
        return _Test(*sign_test([gain - context.margin for gain in gains], len(failed)))
    if found is None or found.p is None or found.n < MIN_PAIRS:
        return _Test(1.0, 0.0)
    equivalent = 1.0 if context.within is None else equivalence_p(found.differences, context.within)
    return _Test(found.p, found.gain - context.margin, equivalent)


def _over_examples(
    context: ClaimContext, comparison: Comparison, by_task: dict[str, Comparison], pair: Pair
) -> tuple[Comparison, dict[str, Comparison], NewData | None, list[Note]]:
    """Adds the intervals over new seeds and new examples."""
    arm, against = pair
    seeds, query = comparison.seeds, context.query
    recorded = {t: np.array([[v.by_task[t][seed] for seed in seeds] for v in pair]) for t in query.tasks}
    try:
        if query.at != 1 or query.equal is not None or query.split != "test":
            raise Missing(Kind.NOT_AT_END)
        if context.examples is None:
            raise Missing(Kind.NOT_STORED)
        if arm.failed or against.failed:
            raise Missing(Kind.FAILED_SEED)
        queries = query, query._replace(model=context.against_model or query.model)
        runs = Runs((arm.name, against.name), queries, seeds, recorded)
        drawn = context.examples.intervals(runs, context.facts, alpha=context.alpha)
    except Missing as missing:
        return comparison, by_task, None, [missing.note]
    if comparison.n == 1:
        return comparison, by_task, drawn, [note(Kind.SINGLE_SEED_INTERVAL, interval=drawn.mean)]
    each = {
        task: replace(by_task[task], new_data=interval)
        for task, interval in zip(recorded, drawn.each, strict=True)
        if task in by_task and by_task[task].seeds == seeds
    }
    return replace(comparison, new_data=drawn.mean), by_task | each, drawn, []


def _on_pairs(comparison: Comparison | None, arm: str, against: str) -> list[Note]:
    if comparison is None:
        return [note(Kind.NO_PAIR, arm=arm, against=against)]
    if comparison.n == 1:
        return [note(Kind.SINGLE_PAIR)]
    if comparison.n < MIN_PAIRS:
        return [note(Kind.TOO_FEW_PAIRS, n=comparison.n, least=MIN_PAIRS)]
    if comparison.sd == 0:
        return [note(Kind.EQUAL_DIFFERENCES, n=comparison.n)]
    notes = [note(Kind.FEW_PAIRS, n=comparison.n, p_floor=comparison.p_floor)] if comparison.n < 5 else []
    if (pivot := pivot_of(comparison)) is not None:
        notes.append(note(Kind.PIVOT, against=against, seed=pivot.seed, p=pivot.p, whole=comparison.p))
    return notes


def _on_beyond(context: ClaimContext, arm: ArmValues, against: ArmValues, *, is_alike: bool) -> list[Note]:
    found = context.compare(arm.beyond, against.beyond, against.name)
    if (arm.beyond, against.beyond) == (arm.values, against.values) or found is None or found.interval is None:
        return []
    decision = decide(found.p or 1.0, found.gain - context.margin)
    about = {"effect": found.effect, "interval": found.interval, "decision": decision, "is_alike": is_alike}
    return [note(Kind.NEXT_EVALUATION, arm=arm.name, against=against.name, **about)]


def compare_cost(arm: ArmValues, against: ArmValues, axis: CostAxis) -> Part:
    """Compares what two arms spent on an axis, without the phases that both share at a seed."""
    spent, failed = cost_pair(arm.costs, against.costs), bool(arm.failed or against.failed)
    found, in_full = (
        compare_costs(*({seed: pair[i].on(axis) for seed, pair in pairs.items()} for i in (0, 1)), name=against.name)
        for pairs in (spent.own, spent.full)
    )
    if found is None or in_full is None:
        return Part(1, 0, (note(Kind.NO_COST, arm=arm.name, against=against.name, axis=axis),), failed)
    p, notes, is_counted = (
        1.0 if found.p is None or found.n < MIN_PAIRS else found.p,
        list[Note](),
        axis != "device_seconds",
    )
    if found.log_sd == 0 and not (is_counted and found.ratio == 1):
        p = 0.0 if is_counted else p
        notes.append(note(Kind.COUNTED_COST_RATIOS if is_counted else Kind.EQUAL_COST_RATIOS, axis=axis, n=found.n))
    if failed:
        p = 1.0
        notes.append(note(Kind.FAILED_COST, axis=axis))
    part = CostPart(axis, found, in_full.ratio, spent.shared, decide(p, found.log_gain))
    return Part(p, found.log_gain, (*notes, note(Kind.COST_RATIO, arm=arm.name, part=part)), failed, cost=part)
