"""What would decide a claim that is undecided, at the observed effect and power .8; and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from orchestrator.analysis.claim_parts import Pair, Part
from orchestrator.analysis.statistics import Decision, detectable_in_sd, seeds_needed

MOST_TIMES = 100.0  # as many examples or replies; advice of more is useless


class MoreEvidence(NamedTuple):
    """What would decide a claim, each by itself; None where it would not."""

    seeds: int | None = None
    examples: float | None = None  # times as many as there are, in trials that run anew
    samples: float | None = None  # times as many replies to each prompt, likewise
    seeds_hours: float = 0.0  # of devices, without evaluation; 0 where costs are not recorded
    anew_hours: float = 0.0  # of all trials of the claim
    num_samples: int = 0  # replies that are drawn for each prompt

    @property
    def cheapest(self) -> Literal["seeds", "examples", "samples"] | None:
        """What takes the fewest device-hours; of the same hours, what draws the fewest new replies.

        A prompt more takes a greedy reply, beside the drawn ones; a reply more to a prompt takes itself alone.
        """
        costs: dict[Literal["seeds", "examples", "samples"], tuple[float, float]] = {}
        if self.seeds is not None:
            costs["seeds"] = self.seeds_hours, 0.0
        if self.examples is not None:
            costs["examples"] = self.anew_hours, (self.examples - 1) * (self.num_samples + 1)
        if self.samples is not None:
            costs["samples"] = self.anew_hours, (self.samples - 1) * self.num_samples
        return min(costs.items(), key=lambda item: item[1])[0] if costs else None


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
    seeds, examples, samples = (
        more if math.isfinite(more := _needed(parts, leans, needs, within=within, level=level, alpha=alpha)) else None
        for needs in (_seeds, _examples, _samples)
    )
    hours = _seconds_per_seed(pairs) / 3600
    num = max((part.spread[1] for part in parts if part.spread), default=0)
    num_samples = max((part.new_data.num_samples for part in parts if part.new_data), default=0)
    whole = None if seeds is None else int(seeds)
    return MoreEvidence(whole, examples, samples, hours * (seeds or 0), hours * num, num_samples)


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
    """Returns how many times as many examples, each with its replies."""
    return _times(part, level, part.new_data.share if part.new_data is not None else None)


def _samples(part: Part, level: float) -> float:
    """Returns how many times as many replies to each prompt."""
    return _times(part, level, part.new_data.sample_share if part.new_data is not None else None)


def _times(part: Part, level: float, share: float | None) -> float:
    """Returns how many times as much of what reduces this share of the pairs' variance."""
    sd, n = part.spread or (None, 0)
    if not sd or share is None or not part.beyond:
        return math.inf
    allowed = (part.beyond / sd / detectable_in_sd(n, alpha=level)) ** 2  # of the variance
    left = allowed - (1 - share)
    return share / left if left > 0 and 1 < share / left <= MOST_TIMES else math.inf


def _seconds_per_seed(pairs: Sequence[Pair]) -> float:
    """Returns the device seconds of one more seed of all arms of a claim."""
    arms = {values.name: values for pair in pairs for values in pair}
    means = []
    for values in arms.values():
        spent = [cost.total().device_seconds for cost in values.costs.values()]
        means.append(sum(spent) / len(spent) if spent else 0.0)
    return sum(means)
