"""Planned looks: what a p at one of several looks is worth over all of them, and what such a plan finds.

All looks have one level for the p of Student's t, as in Pocock (1977). The level is that of paths of pairs drawn with a
fixed seed: t at few pairs is no normal variable, for which such levels are tabulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.analysis.statistics import ALPHA, student_p

PATHS, PATHS_OF_POWER = 300_000, 30_000


def over_looks(p: float, looks: Sequence[int]) -> float:
    """Returns the chance that the p at some look is at most `p` where nothing differs: `p` itself for one look.

    Tests at the level alpha of this value err with alpha over all looks together.
    """
    if len(looks) < 2:
        return p
    least = _least_p(tuple(looks))
    share = (1 + float(np.searchsorted(least, p, side="right"))) / (1 + len(least))
    return min(1.0, max(p, min(share, len(looks) * p)))  # Bonferroni's bound, where paths are rare


def level_of(looks: Sequence[int], alpha: float = ALPHA) -> float:
    """Returns the level of each look, so that all together err with alpha."""
    return alpha if len(looks) < 2 else float(np.quantile(_least_p(tuple(looks)), alpha))


class Expected(NamedTuple):
    power: tuple[float, ...]  # by look: the chance that the effect has been found there or before
    mean_n: float  # seeds until the claim is decided, or the looks end


@cache
def expected(looks: tuple[int, ...], effect_in_sd: float, alpha: float = ALPHA) -> Expected:
    """Returns what a plan finds of an effect, in SDs of the paired differences."""
    level = level_of(looks, alpha)
    crossed_LR = np.array([(p_R <= level, t_R > 0) for p_R, t_R in _paths(looks, PATHS_OF_POWER, effect_in_sd)])
    first_R = np.where(crossed_LR[:, 0].any(0), crossed_LR[:, 0].argmax(0), len(looks))
    is_right_R = crossed_LR[np.minimum(first_R, len(looks) - 1), 1, np.arange(PATHS_OF_POWER)]
    power = tuple(float(((first_R <= i) & is_right_R).mean()) for i in range(len(looks)))
    return Expected(power, float(np.array([*looks, looks[-1]])[first_R].mean()))


@cache
def _least_p(looks: tuple[int, ...]) -> NDArray[np.float64]:
    """Returns the least p of each path over the looks, sorted."""
    least: NDArray[np.float64] = np.sort(np.minimum.reduce([p_R for p_R, _ in _paths(looks, PATHS, 0.0)]))
    return least


def _paths(looks: Sequence[int], num: int, effect: float) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Draws paths of unit normal pairs; returns (two-sided p, t) of each at each look.

    Between looks the mean and the squares about it suffice: both are drawn, not the pairs.
    """
    rng, n, found = np.random.default_rng(0), 0, []
    mean_R, squares_R = np.zeros(num), np.zeros(num)
    for look in looks:
        new = look - n
        other_R = rng.normal(effect, new**-0.5, num)
        squares_R = squares_R + 2 * rng.gamma((new - 1) / 2, size=num) + (other_R - mean_R) ** 2 * n * new / look
        mean_R, n = mean_R + (other_R - mean_R) * new / look, look
        t_R = mean_R / np.sqrt(squares_R / (n - 1) / n)
        found.append((student_p(t_R, n), t_R))
    return found
