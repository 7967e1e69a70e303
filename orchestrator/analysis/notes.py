"""What qualifies a verdict, as values. `reporting.notes` has the words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any


class Scope(StrEnum):
    """To what a verdict generalises, at this scale."""

    NEW_DATA = auto()  # to new seeds and new examples
    THIS_SET = auto()  # to new seeds on this evaluation set
    BY_COST = auto()  # refuted by the cost alone, which does not depend on the examples


class Kind(StrEnum):
    # the values of an arm
    NO_VALUE = auto()  # arm, query, recorded (progress of evaluations)
    STOPPED = auto()  # arm, num
    PROVISIONAL = auto()  # arm, missing, planned
    MISSING_TASKS = auto()  # arm, tasks, seeds
    SHARED_RUNS = auto()  # phase, num_seeds, num_runs, is_compared (or a phase before), tasks (of these branches)
    EVALUATED_EARLY = auto()  # arm, axis, progress (of each seed), unused (fraction of the budget)
    TOO_LATE = auto()  # arm, axis, seeds, progress (of the first evaluation), ratio (of its cost to the budget)
    # a pair of arms
    NO_PAIR = auto()  # arm, against
    SINGLE_PAIR = auto()
    EQUAL_DIFFERENCES = auto()  # n
    TOO_FEW_PAIRS = auto()  # n, least
    FEW_PAIRS = auto()  # n, p_floor
    PIVOT = auto()  # against, seed, p (without this seed), whole (the p of all)
    FAILED_SEEDS = auto()  # failed (arm, seeds)
    NEXT_EVALUATION = auto()  # arm, against, effect, interval, decision: at the next evaluation; is_alike (both sides)
    SINGLE_SEED_INTERVAL = auto()  # interval
    # why there is no interval over new examples
    NOT_STORED = auto()
    NOT_AT_END = auto()
    FAILED_SEED = auto()
    NOT_BY_EXAMPLE = auto()  # metric, task
    SEVERAL_RUNS = auto()  # arm, seed
    RUN_NOT_STORED = auto()  # task, arm, seed
    OTHER_EXAMPLES = auto()  # task, arm, seed
    OTHER_VALUE = auto()  # task
    NO_CLUSTERS = auto()  # task
    FEW_CLUSTERS = auto()  # task, num, least
    UNEVEN_CLUSTERS = auto()  # task, num, effective, least
    FEW_SEEDS = auto()  # num, least
    # costs
    NO_COST = auto()  # arm, against, axis
    EQUAL_COST_RATIOS = auto()  # axis, n
    COUNTED_COST_RATIOS = auto()  # axis, n; counted, so that another seed would have the same ratio
    FAILED_COST = auto()  # axis
    COST_RATIO = auto()  # arm, part (a CostPart)
    UNEQUAL_COST = auto()  # arm, against, axis, ratio
    SHARED_COST = auto()  # against, phases, in_full (ratios with these phases)
    CONDITIONS = (
        auto()
    )  # side_by_side, is_shared (the device), nodes, slot, phase, num_runs, num_elsewhere: see `timing.conditions`
    # a curve
    LOST_RUNS = auto()  # num
    NO_CURVE = auto()  # what: the axis along which too little varies
    NOT_REACHED = auto()  # what, helps (throughout, or never)
    OUTSIDE = auto()  # bound, low, high (of what was measured)
    # the verdict
    MEAN_OVER = auto()  # tasks
    OTHER_AVERAGE = auto()  # tasks, papers
    ON_DEV = auto()
    GENERALISES = auto()  # scope, margin, has_interval (over new examples), within (of what is equivalent)
    AGAINST_MARGIN = auto()  # arm, margin, verdict


@dataclass(frozen=True)
class Note:
    kind: Kind
    fields: tuple[tuple[str, Any], ...]

    @property
    def about(self) -> dict[str, Any]:
        return dict(self.fields)


def note(kind: Kind, **about: Any) -> Note:
    return Note(kind, tuple(about.items()))
