"""The race between the values of a grid: which are clearly worse, and which is chosen. Pure functions of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from orchestrator.analysis.statistics import run_noise

K = TypeVar("K")
Scores = Mapping[float, Mapping[int, float]]  # value -> seed -> score, where lower is better
CLEARLY_WORSE = 0.1  # one-sided; chosen by simulation: a stricter level costs a trial more per arm, and errs as often


def whole(scores: Mapping[K, Mapping[int, float]]) -> dict[K, list[float]]:
    """Returns the scores by seed of the values that have all seeds; the others were dropped, or failed."""
    seeds = sorted({seed for each in scores.values() for seed in each})
    return {value: [each[s] for s in seeds] for value, each in scores.items() if seeds and len(each) == len(seeds)}


def contenders(scores: Scores) -> list[float]:
    """Returns the values that are not clearly worse than the best: whose gap may be noise, or all at one seed."""
    runs = whole(scores)
    noise = run_noise([[*runs.values()]] if runs else [])
    if not noise.df:
        return list(runs)
    n = len(next(iter(runs.values())))
    means = {value: math.fsum(each) / n for value, each in runs.items()}
    limit = noise.clear(n, alpha=CLEARLY_WORSE)
    return [value for value, mean in means.items() if mean - min(means.values()) <= limit]


def choose(scores: Scores, middle: float) -> float | None:
    """Chooses the best mean over all seeds; of equal means the value nearest the middle of the grid. None: all failed.

    A value in the middle is not preferred within noise: where the best rate lies at an edge, two equal arms would disagree
    more often than by the best mean of a single seed.
    """
    means = {value: math.fsum(each) / len(each) for value, each in whole(scores).items()}
    return min(means, key=lambda value: (means[value], abs(math.log(value / middle)), value), default=None)
