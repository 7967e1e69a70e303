"""Paired differences: intervals, tests, power. Pure functions of numbers, independent of tables, claims and reports.

The random unit is the training seed. An *effect* is arm minus against in the metric's own units; a *gain* is the effect
with the sign that makes better positive.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

Interval = tuple[float, float]

ALPHA = 0.05  # two-sided, of a whole family
MIN_PAIRS = 3  # fewer decide nothing
MAX_SEEDS = 1000  # advice of more seeds than this is useless
PERMUTATIONS = 200  # of the scores of a search's points
SIGN_FLIPS = 20_000  # sign patterns of a test; all of them up to 14 pairs


class Decision(StrEnum):
    SUPPORTED = "supported"
    REFUTED = "refuted"
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"


class PairedT(NamedTuple):
    """Student's t over the last axis; each entry has the shape of the other axes."""

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    half: NDArray[np.float64]  # half the width of the interval
    p: NDArray[np.float64]  # two-sided; 1 where the values do not vary, as their spread is then unknown

    def interval(self) -> Interval:
        return float(self.mean - self.half), float(self.mean + self.half)


def paired_t(differences: ArrayLike, *, null: float = 0.0, confidence: float = 1 - ALPHA) -> PairedT:
    """Tests one sample (n,) or many (..., n) against `null`; n >= 2."""
    x = np.asarray(differences, dtype=np.float64)
    n = x.shape[-1]
    mean, sd = x.mean(-1), x.std(-1, ddof=1)
    sd = np.where(sd <= 1e-12 * np.abs(x).max(-1), 0.0, sd)  # rounding alone is no spread
    error = sd / math.sqrt(n)
    t = np.divide(mean - null, error, out=np.zeros_like(mean), where=sd > 0)
    return PairedT(mean, sd, stats.t.ppf((1 + confidence) / 2, n - 1) * error, student_p(t, n))


def student_p(t: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Returns the two-sided p of Student's t over n values."""
    p: NDArray[np.float64] = 2 * stats.t.sf(np.abs(t), n - 1)
    return p


def holm(p: Sequence[float], claims: Sequence[float] | None = None) -> list[float]:
    """Adjusts the p-values of one family.

    Args:
        claims: of each claim the largest of its p-values, where claims have several null hypotheses of which at most one is
            true: a p-value counts as often as claims are not below it (Shaffer, 1986). By default each p is of one claim,
            which gives Holm (1979).
    """
    adjusted, least = dict[float, float](), 0.0
    for value in sorted(p):
        adjusted[value] = least = max(least, min(1.0, value * sum(largest >= value for largest in claims or p)))
    return [adjusted[value] for value in p]


def decide(p: float, beyond: float) -> Decision:
    """Decides by the sign of `beyond` (gain minus margin) where p <= ALPHA.

    Both directions are one two-sided test of H0: gain = margin, so each wrong direction has at most alpha / 2. With a
    margin above 0, `refuted` says that the gain is below the margin; the arm may still be better, by less. With a margin
    below 0, `supported` says that the arm is no worse by more than the margin; it need not be better.
    """
    if p > ALPHA or beyond == 0:
        return Decision.UNDECIDED
    return Decision.SUPPORTED if beyond > 0 else Decision.REFUTED


def t_quantile(freedom: float, alpha: float = ALPHA) -> float:
    """Returns the two-sided quantile of Student's t."""
    return float(stats.t.ppf(1 - alpha / 2, freedom))


def sign_flip_p(differences: ArrayLike) -> float:
    """Returns the two-sided p of the mean under flips of each sign: exact up to 14 pairs, else of seeded draws; n >= 2."""
    x, rng = np.asarray(differences, dtype=np.float64), np.random.default_rng(0)
    scaled = x / (np.abs(x).max() or 1.0)

    def total(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        rounded: NDArray[np.float64] = np.round(values.sum(axis), 10)  # ties must not depend on the order of additions
        return rounded

    flips = stats.permutation_test((scaled,), total, permutation_type="samples", n_resamples=SIGN_FLIPS, rng=rng)
    return float(flips.pvalue)


def equivalence_p(differences: ArrayLike, within: float) -> float:
    """Returns the p of two one-sided t tests that the mean lies within ±`within` (Schuirmann, 1987); 1 without spread."""
    x = np.asarray(differences, dtype=np.float64)
    if paired_t(x).sd == 0:
        return 1.0
    above, below = (
        stats.ttest_1samp(x, -within, alternative="greater"),
        stats.ttest_1samp(x, within, alternative="less"),
    )
    return float(max(above.pvalue, below.pvalue))


def sign_test(beyond: Sequence[float], num_lost: int) -> tuple[float, float]:
    """Returns the two-sided p of the signs, and the sign of most; lost pairs count against either side."""
    above, below = (sum(sign * x > 0 for x in beyond) for sign in (1, -1))
    p = 2 * stats.binom.sf(max(above, below) - 1, len(beyond) + num_lost, 0.5)
    return min(1.0, float(p)), float(np.sign(above - below))


def _welch(a: NDArray[np.float64], b: NDArray[np.float64]) -> Interval | None:
    if a.var() + b.var() <= 1e-24 * max(np.abs(a).max(), np.abs(b).max()) ** 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about one arm without spread
        low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - ALPHA)
    return float(low), float(high)


def _can_correlate(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return bool(len(a) >= 3 and np.ptp(a) > 0 and np.ptp(b) > 0)


class RankCorrelation(NamedTuple):
    rho: float | None  # None below 3 pairs, and where either score does not vary
    n: int


def rank_correlation(rung: Sequence[float], end: Sequence[float]) -> RankCorrelation:
    """Spearman's rank correlation of the scores at a rung with those of the same trials at the end."""
    a, b = np.asarray(rung, dtype=np.float64), np.asarray(end, dtype=np.float64)
    return RankCorrelation(float(stats.spearmanr(a, b).statistic) if _can_correlate(a, b) else None, len(a))


def sd_interval(sd: float, n: int, confidence: float = 1 - ALPHA) -> Interval:
    """Returns the interval of the SD of a population of which n values have this SD; n >= 2, Gaussian."""
    tail = (1 - confidence) / 2
    low, high = (sd * math.sqrt((n - 1) / float(stats.chi2.ppf(p, n - 1))) for p in (1 - tail, tail))
    return low, high


class Chance(NamedTuple):
    """The 95th percentiles of importances where nothing matters."""

    each: Mapping[str, float]
    largest: float  # of the factor that looks most important


def importance_by_chance(
    importances: Callable[[Sequence[float]], Mapping[str, float]], scores: Sequence[float], *, num: int = PERMUTATIONS
) -> Chance:
    """Permutes the scores of the points, so that no factor matters, and computes the importance of each factor anew."""
    rng = np.random.default_rng(0)
    drawn = [importances(rng.permutation(scores).tolist()) for _ in range(num)]
    each = {name: float(np.quantile([found[name] for found in drawn], 1 - ALPHA)) for name in drawn[0]}
    return Chance(each, float(np.quantile([max(found.values()) for found in drawn], 1 - ALPHA)))


def _power(n: int, effect_in_sd: float, alpha: float) -> float:
    """Returns the chance of a significant result in the right direction at a two-sided alpha."""
    from statsmodels.stats.power import TTestPower  # imported here, as the import takes seconds

    return float(TTestPower().power(effect_in_sd, n, alpha / 2, alternative="larger"))


def detectable_in_sd(n: int, *, alpha: float = ALPHA, power: float = 0.8) -> float:
    """Returns the effect that n pairs find with this power, in SDs of the paired differences; infinite below 2 pairs."""
    if n < 2:
        return math.inf
    high = 1.0
    while _power(n, high, alpha) < power:
        high *= 2
    return float(brentq(lambda effect: _power(n, effect, alpha) - power, 0.0, high))


def seeds_needed(effect_in_sd: float, *, alpha: float = ALPHA, power: float = 0.8) -> int | None:
    """Returns the fewest pairs that find this effect with this power; None above 1000."""
    counts, effect = range(2, MAX_SEEDS + 1), abs(effect_in_sd)
    first = bisect_left(counts, power, key=lambda n: _power(n, effect, alpha)) if effect > 0 else len(counts)
    return counts[first] if first < len(counts) else None


def censored_median(reached: Sequence[float], num_never: int) -> float | None:
    """Returns the median, where unreached times count as later than all others; None where the middle is unreached.

    Trials are censored at the end of their own schedules, which depends on how fast they are. So Kaplan and Meier's
    estimate would be biased: it would name a median where the slowest of five got there and four never did.
    """
    times = sorted(reached) + [math.inf] * num_never
    middle = (times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2 if times else math.inf
    return middle if math.isfinite(middle) else None


# ------------------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Comparison:
    """Two arms over the seeds that both have. Intervals are of the effect; None where n or the spread allows none."""

    against: str
    seeds: tuple[int, ...]
    arm_values: tuple[float, ...]
    against_values: tuple[float, ...]
    differences: tuple[float, ...]  # arm - against, in the metric's units
    lower_is_better: bool
    margin: float  # a gain
    family_size: int  # comparisons
    n: int
    mean_arm: float
    mean_against: float
    effect: float
    sd: float | None = None  # of the differences
    interval: Interval | None = None  # 95 %, t, unadjusted
    simultaneous: Interval | None = None  # Bonferroni over the family
    p: float | None = None  # t, two-sided, of gain = margin; 1 where the differences are all equal
    p_floor: float = 1.0  # the least possible `p_signflip`
    correlation: float | None = None  # of the pairs
    welch: Interval | None = None  # 95 %, unpaired
    new_data: Interval | None = None  # Bonferroni over the family, over new seeds and new examples; see `new_data`

    @property
    def gain(self) -> float:
        """The effect, positive where the arm is better."""
        return -self.effect if self.lower_is_better else self.effect

    @property
    def p_signflip(self) -> float | None:
        """The sign-flip p of the same hypothesis. It decides nothing, and takes up to a second from 12 pairs on."""
        null = -self.margin if self.lower_is_better else self.margin
        return sign_flip_p(np.array(self.differences) - null) if self.n > 1 else None

    def holds_on_new_data(self, within: float | None = None) -> bool:
        """Returns whether the interval over new seeds and examples lies within ±`within`, if given; else beyond the
        margin, on the side of the effect."""
        if self.new_data is None:
            return False
        low, high = sorted(-end if self.lower_is_better else end for end in self.new_data)
        if within is not None:
            return -within < low and high < within
        return low > self.margin if self.gain > self.margin else high < self.margin


class Pivot(NamedTuple):
    """The one seed without which a comparison is decided otherwise."""

    seed: int
    p: float  # without it


def pivot_of(found: Comparison) -> Pivot | None:
    """Finds the seed; None where there is none or are several, as then the spread decides, and no single seed."""
    if found.p is None or found.n <= MIN_PAIRS:
        return None
    d, null = np.array(found.differences), -found.margin if found.lower_is_better else found.margin
    others = np.array([np.delete(d, i) for i in range(found.n)])
    tests = paired_t(others, null=null)
    whole = decide(found.p, found.gain - found.margin)
    beyond = (null - tests.mean) if found.lower_is_better else (tests.mean - null)
    changed = [i for i in range(found.n) if decide(float(tests.p[i]), float(beyond[i])) != whole]
    return Pivot(found.seeds[changed[0]], float(tests.p[changed[0]])) if len(changed) == 1 else None


def compare(
    arm: Mapping[int, float],
    against: Mapping[int, float],
    *,
    lower_is_better: bool,
    margin: float = 0.0,
    family_size: int = 1,
    alpha: float | None = None,  # of the simultaneous interval; by default Bonferroni's
    name: str = "against",
) -> Comparison | None:
    """Compares two arms' values paired by seed. One pair gives the effect alone; no pair gives None."""
    seeds = tuple(sorted(arm.keys() & against.keys()))
    n = len(seeds)
    if n == 0:
        return None
    a, b = (np.array([float(side[seed]) for seed in seeds]) for side in (arm, against))
    d = a - b
    plain = Comparison(
        against=name,
        seeds=seeds,
        arm_values=tuple(a.tolist()),
        against_values=tuple(b.tolist()),
        differences=tuple(d.tolist()),
        lower_is_better=lower_is_better,
        margin=margin,
        family_size=family_size,
        n=n,
        mean_arm=float(a.mean()),
        mean_against=float(b.mean()),
        effect=float(d.mean()),
    )
    if n == 1:
        return plain
    null = -margin if lower_is_better else margin
    test = paired_t(d, null=null)
    vary = bool(test.sd > 0)
    return replace(
        plain,
        sd=float(test.sd),
        interval=test.interval() if vary else None,
        simultaneous=paired_t(d, confidence=1 - (alpha or ALPHA / family_size)).interval() if vary else None,
        p=float(test.p),
        p_floor=2.0 ** (1 - n),
        correlation=float(np.corrcoef(a, b)[0, 1]) if _can_correlate(a, b) else None,
        welch=_welch(a, b),
    )


@dataclass(frozen=True)
class CostComparison:
    """The ratio of two arms' costs, over the seeds that both have. Interval and p are Student's t on its logarithm."""

    against: str
    seeds: tuple[int, ...]
    arm_values: tuple[float, ...]
    against_values: tuple[float, ...]
    n: int
    ratio: float  # arm over against, geometric mean
    log_sd: float | None = None  # 0 where each seed has the same ratio
    interval: Interval | None = None  # 95 %
    p: float | None = None  # two-sided, of ratio = 1; 1 where the ratio does not vary

    @property
    def log_gain(self) -> float:
        """Positive where the arm is cheaper."""
        return -math.log(self.ratio)


def compare_costs(arm: Mapping[int, float], against: Mapping[int, float], *, name: str) -> CostComparison | None:
    """Compares two arms' costs paired by seed; None without a pair, or where a cost is 0."""
    seeds = tuple(sorted(arm.keys() & against.keys()))
    a, b = (tuple(float(side[seed]) for seed in seeds) for side in (arm, against))
    if not seeds or min(*a, *b) <= 0:
        return None
    logs = np.log(a) - np.log(b)
    plain = CostComparison(name, seeds, a, b, len(seeds), math.exp(logs.mean()))
    if len(seeds) == 1:
        return plain
    test = paired_t(logs)
    low, high = np.exp(test.interval()).tolist()
    return replace(plain, log_sd=float(test.sd), interval=(low, high) if test.sd > 0 else None, p=float(test.p))


class RunNoise(NamedTuple):
    """The noise of one run, beside what all runs of its seed have in common."""

    sd: float  # NaN where it is not known
    df: int  # degrees of freedom

    def error(self, n: int = 1) -> float:
        """Returns the standard error of the difference of two means over the same n seeds."""
        return self.sd * math.sqrt(2 / n)

    def clear(self, n: int = 1, *, alpha: float = ALPHA / 2) -> float:
        """Returns the least difference of two such means that is beyond noise, one-sided; NaN where noise is not known."""
        return float(stats.t.ppf(1 - alpha, self.df)) * self.error(n) if self.df else math.nan


def run_noise(groups: Iterable[ArrayLike]) -> RunNoise:
    """Pools the residuals of groups (run, seed), from which the means of each run and of each seed are taken away."""
    squares, df = 0.0, 0
    for group in groups:
        x = np.asarray(group, dtype=np.float64)
        residuals = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
        squares += float((residuals**2).sum())
        df += (x.shape[0] - 1) * (x.shape[1] - 1)
    return RunNoise(math.sqrt(squares / df) if df else math.nan, df)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of the finite values and the half width of its 95 % t interval; NaN below one and two values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return (finite[0] if finite else math.nan), math.nan
    test = paired_t(finite)
    return float(test.mean), float(test.half)
