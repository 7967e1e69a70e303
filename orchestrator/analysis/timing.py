"""Times: under which conditions they were taken, and when an arm first has what another one ends with. Pure; judges nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from orchestrator.analysis.arm_values import Evaluation, MetricQuery, is_of, looks_of, of_kind, parsed
from orchestrator.analysis.statistics import censored_median, lower_is_better
from orchestrator.study.schema import Slot

_Span = tuple[str | None, float, float]  # node, start, end of a trial

# ------------------------------------------------------------------------------------------------------ conditions


def conditions(trials: pd.DataFrame, arms: Iterable[str], phase: str, slot: Slot | None) -> str | None:
    """What ran beside the trials that trained this phase of these arms, on the same node; None before any has.

    As far as starts and ends of trials tell: one that was interrupted counts as running until it ended.
    """
    have = of_kind(trials, arms, "arm", "trial")
    keys = {done["key"] for cell in have["phases"] for name, done in parsed(cell).items() if is_of(name, phase)}
    if not keys:
        return None
    known = [
        (row["node"], row["started"], math.inf if pd.isna(row["ended"]) else row["ended"], _trained(row["phases"]))
        for row in trials.to_dict("records")
        if not pd.isna(row["started"])
    ]
    makers = [(node, start, end) for node, start, end, own in known if own & keys]
    most = max((_side_by_side(maker, [span[:3] for span in known]) for maker in makers), default=0)
    nodes = {str(node) for node, _, _ in makers}
    texts = []
    if makers:
        where = f"on {len(nodes)} nodes" if len(nodes) > 1 else f"on one node ({min(nodes)})"
        texts.append(f"one trial at a time to a node, {where}" if most == 1 else _beside(most, where, slot))
    if slot is not None:
        workers = f"{slot.workers} worker{'s' if slot.workers > 1 else ''} with {slot.cpus:g} CPU{'s' if slot.cpus != 1 else ''}"
        texts.append(f"a slot was {workers} and {f'{slot.gpus:g} GPU' if slot.gpus else 'no GPU'} each")
    elsewhere = keys - {key for *_, own in known for key in own}
    if elsewhere:
        texts.append(
            f"{len(elsewhere)} of {len(keys)} runs of phase {phase!r} were stored before, by trials that are not in these "
            "tables: under which conditions is not known"
        )
    return f"conditions of the times: {'; '.join(texts)}"


def _trained(cell: object) -> set[str]:
    """Keys of the phases that a trial trained itself."""
    return {done["key"] for done in parsed(cell).values() if not done["reused"]}


def _beside(most: int, where: str, slot: Slot | None) -> str:
    text = f"up to {most} trials side by side on a node, {where}"
    if slot is not None and slot.gpus == 1:
        return f"{text}, each with GPUs of its own"
    shared = "GPUs" if slot is not None and slot.gpus else "processors and memory"
    return f"{text}, which shared its {shared}: a claim about time asks for one slot to a device"


def _side_by_side(maker: _Span, spans: Sequence[_Span]) -> int:
    """The most trials, this one included, that ran at one moment of it; one whose node is not known yet may be there."""
    node, start, end = maker
    beside = [(s, e) for n, s, e in spans if (n == node or pd.isna(n)) and s < end and e > start] or [(start, end)]
    moments = [max(start, s) for s, _ in beside]
    return max(sum(s <= moment < e for s, e in beside) for moment in moments) or 1


# --------------------------------------------------------------------------------------------- time to equal quality


@dataclass(frozen=True)
class Reached:
    """When each seed of an arm first had what `against` has at its end: device seconds, without the phases both share."""

    against: str
    seconds: Mapping[int, float]  # up to the look at which it had it; or to the last look, where it never had
    reached: frozenset[int]
    took: Mapping[int, float]  # `against`, up to its end
    median: float | None  # None: half of the seeds never had it
    ratio: float | None  # likewise, of seconds over what `against` took at the same seed
    left_out: tuple[int, ...]  # seeds at which `against` has ended, and the arm has no look yet


def time_to_equal_quality(
    results: pd.DataFrame, trials: pd.DataFrame, arm: str, against: str, at: MetricQuery, rival: MetricQuery
) -> Reached | None:
    """`at`, `rival`: where the two are read, with their data sets. None where `against` has not ended at any seed."""
    mine, theirs = looks_of(results, trials, arm, at, at.tasks), looks_of(results, trials, against, rival, at.tasks)
    ends = {
        seed: looks[-1] for seed, looks in theirs.items() if looks[-1].progress == 1 and math.isfinite(looks[-1].value)
    }
    sign = -1 if lower_is_better(at.metric) else 1
    seconds, took, reached = dict[int, float](), dict[int, float](), set[int]()
    for seed in sorted(ends.keys() & mine.keys()):
        end, looks = ends[seed], mine[seed]
        first = next(
            (look for look in looks if sign * (look.value - end.value) >= 0), None
        )  # no number reaches nothing
        if first is not None:
            reached.add(seed)
        shared = looks[-1].bill.keys() & end.bill.keys()
        seconds[seed], took[seed] = (_seconds(look, shared) for look in (first or looks[-1], end))
    if not ends:
        return None
    ratios = {seed: seconds[seed] / took[seed] for seed in seconds if took[seed] > 0}
    never = len(seconds) - len(reached)
    medians = [censored_median([x for seed, x in of.items() if seed in reached], never) for of in (seconds, ratios)]
    left_out = tuple(sorted(ends.keys() - mine.keys()))
    return Reached(against, seconds, frozenset(reached), took, medians[0], medians[1], left_out)


def _seconds(look: Evaluation, shared: set[str]) -> float:
    return look.bill.total(shared).device_seconds
