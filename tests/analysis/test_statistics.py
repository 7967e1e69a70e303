"""Statistics that come from libraries: equal, to 1e-12, to the formulas written out here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from orchestrator.analysis.statistics import (
    compare,
    detectable_in_sd,
    holm,
    rank_correlation,
    seeds_needed,
    sign_flip_p,
)

CASES = range(60)
Floats = NDArray[np.float64]


def holm_by_hand(p: Floats) -> Floats:
    """Holm (1979), over the last axis."""
    order = np.argsort(p, axis=-1, kind="stable")
    steps = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(steps, axis=-1)), -1)
    return adjusted


def power_by_hand(n: int, effect: float, alpha: float) -> float:
    """The noncentral t's mass beyond the critical value on the right side."""
    return float(stats.nct.sf(stats.t.ppf(1 - alpha / 2, n - 1), n - 1, effect * math.sqrt(n)))


def differences(case: int, most: int) -> Floats:
    """Of even cases rounded, so that sums of flipped signs tie."""
    draw = np.random.default_rng(case)
    d = draw.normal(0.4, 1, int(draw.integers(2, most)))
    return np.round(d, 1) if case % 2 else d


@pytest.mark.parametrize("case", range(10))  # few, since statsmodels collects garbage at each call
def test_holm_is_by_hand(case: int) -> None:
    draw = np.random.default_rng(case)
    p = draw.random(int(draw.integers(1, 12))) ** 3
    p[-1] = p[0]
    assert holm(p.tolist()) == pytest.approx(holm_by_hand(p).tolist(), rel=1e-12, abs=0)


@pytest.mark.parametrize("case", CASES)
def test_sign_flips_are_by_hand(case: int) -> None:
    d = differences(case, 11)
    patterns = np.array(list(itertools.product((-1, 1), repeat=len(d))))
    least = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    assert sign_flip_p(d) == pytest.approx(np.mean(np.abs(patterns @ d) >= least), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_welch_and_the_rank_correlation_are_by_hand(case: int) -> None:
    draw, a = np.random.default_rng(case), differences(case, 30)
    b, n = draw.normal(0, 2, len(a)), len(a)
    found = compare(dict(enumerate(a)), dict(enumerate(b)), lower_is_better=False)
    va, vb = a.var(ddof=1) / n, b.var(ddof=1) / n
    half = stats.t.ppf(0.975, (va + vb) ** 2 * (n - 1) / (va**2 + vb**2)) * math.sqrt(va + vb)
    effect = a.mean() - b.mean()
    assert found is not None and found.welch == pytest.approx((effect - half, effect + half), rel=1e-12, abs=1e-12)
    rho = float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1]) if n >= 3 else None
    assert rank_correlation(a.tolist(), b.tolist()) == (
        None if rho is None else pytest.approx(rho, rel=1e-12, abs=1e-12),
        n,
    )


@pytest.mark.parametrize("case", range(20))
def test_power_and_the_number_of_seeds_are_by_hand(case: int) -> None:
    draw = np.random.default_rng(case)
    n, effect, alpha = int(draw.integers(2, 40)), float(draw.uniform(0.1, 3)), 0.05 / int(draw.integers(1, 9))
    high = float(brentq(lambda x: power_by_hand(n, x, alpha) - 0.8, 0.0, 200.0))
    assert detectable_in_sd(n, alpha=alpha) == pytest.approx(high, rel=1e-11)
    needed = next((m for m in range(2, 1001) if power_by_hand(m, effect, alpha) >= 0.8), None)
    assert seeds_needed(-effect, alpha=alpha) == needed
