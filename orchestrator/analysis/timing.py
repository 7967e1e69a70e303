"""Times: the conditions of their measurement, and the time until one arm reaches the final score of another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from orchestrator.analysis.arm_values import Evaluation, evaluations
from orchestrator.analysis.notes import Kind, Note, note
from orchestrator.analysis.queries import MetricQuery, Records, parsed
from orchestrator.analysis.statistics import censored_median
from orchestrator.study.schema import Slot
from trainables.config.phase_run import PhaseRun
from trainables.metrics.known import metric_named

_Span = tuple[str | None, float, float]  # node, start, end of a trial


def conditions(trials: pd.DataFrame, arms: Iterable[str], phase: str, slot: Slot | None) -> Note | None:
    """Returns what ran on the same nodes beside the trials that trained this phase of these arms; None before any has.

    Only starts and ends of trials are known, so an interrupted trial counts as running until it ended.
    """
    cells = Records(trials, trials).planned(trials, arms)["phases"]
    keys = {done["key"] for cell in cells for name, done in parsed(cell).items() if PhaseRun.parse(name).phase == phase}
    if not keys:
        return None
    known = [
        ((row["node"], row["started"], math.inf if pd.isna(row["ended"]) else row["ended"]), _trained(row["phases"]))
        for row in trials.to_dict("records")
        if not pd.isna(row["started"])
    ]
    spans = [span for span, _ in known]
    measured = [span for span, trained in known if trained & keys]
    side_by_side = max((_side_by_side(span, spans) for span in measured), default=0)
    return note(
        Kind.CONDITIONS,
        side_by_side=side_by_side,
        is_shared=side_by_side > 1 and (slot is None or slot.gpus < 1),
        nodes=tuple(sorted({str(node) for node, *_ in measured})),
        slot=slot,
        phase=phase,
        num_runs=len(keys),
        num_elsewhere=len(keys - {key for _, trained in known for key in trained}),
    )


def _trained(cell: object) -> set[str]:
    """Returns the keys of the phases that a trial trained itself."""
    return {done["key"] for done in parsed(cell).values() if not done["reused"]}


def _side_by_side(measured: _Span, spans: Sequence[_Span]) -> int:
    """Returns the most trials on the node at one moment of the measured one, which is counted; a trial whose node is
    unknown may be there."""
    node, start, end = measured
    beside = [(s, e) for n, s, e in spans if (n == node or pd.isna(n)) and s < end and e > start] or [(start, end)]
    moments = [max(start, s) for s, _ in beside]
    return max(sum(s <= moment < e for s, e in beside) for moment in moments) or 1


@dataclass(frozen=True)
class ReachTime:
    """Device time until each seed of an arm first reached the final score of `against`, without shared phases."""

    against: str
    seconds: Mapping[int, float]  # up to the first evaluation that is as good, or to the last one where none is
    reached: frozenset[int]
    took: Mapping[int, float]  # `against`, up to its end
    median: float | None  # None where half of the seeds never reached it
    ratio: float | None  # likewise, of seconds over what `against` took at the same seed
    left_out: tuple[int, ...]  # seeds at which `against` has ended, and the arm has no evaluation yet


def time_to_equal_quality(
    results: pd.DataFrame, trials: pd.DataFrame, arms: tuple[str, str], queries: tuple[MetricQuery, MetricQuery]
) -> ReachTime | None:
    """Compares an arm with `against` by queries that name their data sets; None where `against` has ended at no seed."""
    records = Records(results, trials)
    mine, theirs = (evaluations(records, arm, query, query.tasks) for arm, query in zip(arms, queries, strict=True))
    ends = {s: each[-1] for s, each in theirs.items() if each[-1].progress == 1 and math.isfinite(each[-1].value)}
    if not ends:
        return None
    sign = -1 if metric_named(queries[0].metric).lower_is_better else 1
    seconds, took, reached = dict[int, float](), dict[int, float](), set[int]()
    for seed in sorted(ends.keys() & mine.keys()):
        end, each = ends[seed], mine[seed]
        as_good = [evaluation for evaluation in each if sign * (evaluation.value - end.value) >= 0]  # NaN never is
        reached |= {seed} if as_good else set()
        shared = each[-1].cost.keys() & end.cost.keys()
        seconds[seed], took[seed] = (_seconds(e, shared) for e in ((as_good or each[-1:])[0], end))
    ratios = {seed: seconds[seed] / took[seed] for seed in seconds if took[seed] > 0}
    never = len(seconds) - len(reached)
    medians = [censored_median([x for seed, x in of.items() if seed in reached], never) for of in (seconds, ratios)]
    left_out = tuple(sorted(ends.keys() - mine.keys()))
    return ReachTime(arms[1], seconds, frozenset(reached), took, medians[0], medians[1], left_out)


def _seconds(evaluation: Evaluation, shared: set[str]) -> float:
    return evaluation.cost.total(shared).device_seconds
