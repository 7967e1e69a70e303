"""What would decide a claim that is undecided, at the observed effect and power .8; and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from orchestrator.analysis.claim_parts import Pair, Part
from orchestrator.analysis.statistics import Decision, detectable_in_sd, seeds_needed

MOST_EXAMPLES = 100.0  # times as many; advice of more is useless


class MoreEvidence(NamedTuple):
    """What would decide a claim, each by itself; None where it would not."""

    seeds: int | None = None
    examples: float | None = None  # times as many as there are, in trials that run anew
    seeds_hours: float = 0.0  # of devices; 0 where costs are not recorded
    examples_hours: float = 0.0

    @property
    def is_by_examples(self) -> bool:
        """Whether more examples are cheaper than more seeds."""
        return self.examples is not None and (self.seeds is None or self.examples_hours < self.seeds_hours)


def more_evidence(
    pairs: Sequence[Pair], parts: Sequence[Part], leans: Decision, *, within: float | None, level: float, alpha: float
) -> MoreEvidence:
    """Advises on the part that needs most to support, or least to refute; or on equivalence, where the claim allows it and
    that takes less.

    Args:
        alpha: of the next claim that Holm decides, over all looks.
        level: the same at one look.
    """
    if any(part.failed for part in parts):
        return MoreEvidence()
    seeds, examples = (
        more if math.isfinite(more := _needed(parts, leans, needs, within=within, level=level, alpha=alpha)) else None
        for needs in (_seeds, _examples)
    )
    hours = _seconds_per_seed(pairs) / 3600
    num = max((part.spread[1] for part in parts if part.spread), default=0)
    return MoreEvidence(None if seeds is None else int(seeds), examples, hours * (seeds or 0), hours * num)


_Needs = Callable[[Part, float], float]


def _needed(
    parts: Sequence[Part], leans: Decision, needs: _Needs, *, within: float | None, level: float, alpha: float
) -> float:
    if leans == Decision.SUPPORTED:
        more = max((needs(part, level) for part in parts if part.p > alpha), default=1.0)
    else:
        more = min((needs(part, level / len(parts)) for part in parts if part.beyond < 0), default=math.inf)
    if within and parts[0].p_equivalent < 1 and (room := within - abs(parts[0].beyond)) > 0:
        more = min(more, needs(replace(parts[0], beyond=room), 2 * level))  # one-sided
    return more


def _seeds(part: Part, level: float) -> float:
    """Seeds beyond those that there are."""
    sd, n = part.spread or (None, 0)
    needed = seeds_needed(part.beyond / sd, alpha=level) if sd else None
    return math.inf if needed is None else max(1, needed - n)


def _examples(part: Part, level: float) -> float:
    """Returns how many times as many examples: they reduce the share of the pairs' variance that varies with the
    example."""
    sd, n = part.spread or (None, 0)
    share = part.comparison.example_share if part.comparison is not None else None
    if not sd or share is None or not part.beyond:
        return math.inf
    allowed = (part.beyond / sd / detectable_in_sd(n, alpha=level)) ** 2  # of the variance
    left = allowed - (1 - share)
    return share / left if left > 0 and 1 < share / left <= MOST_EXAMPLES else math.inf


def _seconds_per_seed(pairs: Sequence[Pair]) -> float:
    """Returns the device seconds of one more seed of all arms of a claim."""
    arms = {values.name: values for pair in pairs for values in pair}
    means = []
    for values in arms.values():
        spent = [cost.total().device_seconds for cost in values.costs.values()]
        means.append(sum(spent) / len(spent) if spent else 0.0)
    return sum(means)
