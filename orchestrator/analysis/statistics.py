"""Paired differences: intervals, tests, power. Pure functions of numbers; know no table, no claim and no report.

The random unit is the training seed. An *effect* is arm minus against in the metric's own units; a *gain* is the effect
with the sign that makes better positive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

Interval = tuple[float, float]
Decision = Literal["supported", "refuted", "undecided"]

ALPHA = 0.05  # two-sided, of a whole family
MOST_SEEDS = 1000  # beyond it "how many more seeds" is no advice
EXACT_UP_TO = 16  # pairs: 2^16 sign patterns are still listed one by one

# The last word of a metric's name, before the part of a test set (MNLI's matched, mismatched) -> lower is better, and the metric's range where it has two ends.
_KINDS: dict[str, tuple[bool, Interval | None]] = {
    "loss": (True, None),
    "perplexity": (True, None),
    "accuracy": (False, (0.0, 100.0)),
    "f1": (False, (0.0, 100.0)),
    "rougeL": (False, (0.0, 100.0)),
    "unfinished": (True, (0.0, 100.0)),  # replies that never ended
    "agreement": (False, (0.0, 100.0)),  # with another model, on the likeliest token
    "kl": (True, None),  # from another model
    "score": (False, (-100.0, 100.0)),  # of a task by its own protocol; of some a correlation
    "matthews": (False, (-100.0, 100.0)),
    "pearson": (False, (-100.0, 100.0)),
    "spearman": (False, (-100.0, 100.0)),
}


def lower_is_better(metric: str) -> bool:
    """The metric's direction, by the last word of its name: a closed rule, so that none is guessed."""
    return _kind(metric)[0]


def bounds(metric: str) -> Interval | None:
    """The worst and best end of the metric's range, or None where it has no such two ends."""
    return _kind(metric)[1]


def _kind(metric: str) -> tuple[bool, Interval | None]:
    try:
        return _KINDS[metric.removesuffix("_matched").removesuffix("_mismatched").rpartition("_")[2]]
    except KeyError:
        valid = ", ".join(f"{word}, *_{word}" for word in _KINDS)
        raise ValueError(f"whether a lower {metric!r} is better is not known; known metrics: {valid}") from None


# ------------------------------------------------------------------------------------------------------ statistics


class PairedT(NamedTuple):
    """Student's t over the last axis; each entry has the shape that is left."""

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    half: NDArray[np.float64]  # of the interval
    t: NDArray[np.float64]
    p: NDArray[np.float64]  # two-sided; 1 where the values do not vary, as then nothing is known about their spread


def paired_t(differences: ArrayLike, *, null: float = 0.0, confidence: float = 1 - ALPHA) -> PairedT:
    """The one t-test of this module, for one sample (n,) or many (..., n); n >= 2."""
    x = np.asarray(differences, dtype=np.float64)
    n = x.shape[-1]
    mean, sd = x.mean(-1), x.std(-1, ddof=1)
    sd = np.where(sd <= 1e-12 * np.abs(x).max(-1), 0.0, sd)  # rounding alone is no spread
    error = sd / math.sqrt(n)
    t = np.divide(mean - null, error, out=np.zeros_like(mean), where=sd > 0)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * error
    return PairedT(mean, sd, half, t, 2 * stats.t.sf(np.abs(t), n - 1))


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values over the last axis."""
    raw = np.asarray(p, dtype=np.float64)
    order = np.argsort(raw, axis=-1, kind="stable")
    steps = np.take_along_axis(raw, order, -1) * np.arange(raw.shape[-1], 0, -1)
    adjusted = np.empty_like(raw)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(steps, axis=-1)), -1)
    return adjusted


def decide(p: float, beyond: float, *, alpha: float = ALPHA) -> Decision:
    """`supported` or `refuted` by the sign of `beyond` (gain minus margin) where p <= alpha, else `undecided`.

    Both are one two-sided test of H0: gain = margin, so each wrong direction has at most alpha / 2. With a margin
    above 0, `refuted` says that the gain is below the margin; the arm may still be the better one, by less. With one below
    0, `supported` says that it is no worse by more than that; it need not be better.
    """
    if p > alpha or beyond == 0:
        return "undecided"
    return "supported" if beyond > 0 else "refuted"


def bootstrap_widening(n: int) -> float:
    """By how much deviations of the bootstrap's means of n values fall short of Student's interval; n >= 2."""
    return float(stats.t.ppf(1 - ALPHA / 2, n - 1) / stats.norm.ppf(1 - ALPHA / 2)) * math.sqrt(n / (n - 1))


def sign_flip_p(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Two-sided p of the mean under flips of each sign: all 2^n up to n = 16, else 20,000 seeded draws."""
    x = np.asarray(differences, dtype=np.float64)
    least = abs(x.sum()) - 1e-12 * np.abs(x).sum()  # ties, however they are rounded, count
    if len(x) <= EXACT_UP_TO:
        sums = x[:1]  # the other half of the patterns mirrors these
        for value in x[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= least))
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(20_000, len(x)))
    return float((1 + np.count_nonzero(np.abs(signs @ x) >= least)) / (1 + len(signs)))


def _around(test: PairedT) -> Interval:
    return float(test.mean - test.half), float(test.mean + test.half)


def _welch(a: NDArray[np.float64], b: NDArray[np.float64]) -> Interval | None:
    va, vb, n = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b), len(a)
    if va + vb <= 1e-24 * max(np.abs(a).max(), np.abs(b).max()) ** 2:
        return None
    half = stats.t.ppf(1 - ALPHA / 2, (va + vb) ** 2 * (n - 1) / (va**2 + vb**2)) * math.sqrt(va + vb)
    effect = a.mean() - b.mean()
    return float(effect - half), float(effect + half)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


class RankCorrelation(NamedTuple):
    rho: float | None  # None below 3 pairs, and where one side does not vary
    n: int


def rank_correlation(rung: Sequence[float], end: Sequence[float]) -> RankCorrelation:
    """Spearman's rank correlation of the scores at a rung with those of the same trials at the end."""
    a, b = np.asarray(rung, dtype=np.float64), np.asarray(end, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} scores at the rung but {len(b)} at the end")
    return RankCorrelation(_correlation(stats.rankdata(a), stats.rankdata(b)), len(a))


def _power(n: int, effect_in_sd: float, alpha: float) -> float:
    # of the right side only: to be significant on the wrong one is no success
    return float(stats.nct.sf(stats.t.ppf(1 - alpha / 2, n - 1), n - 1, effect_in_sd * math.sqrt(n)))


def detectable_effect(n: int, sd: float, *, alpha: float = ALPHA, power: float = 0.8) -> float:
    """The effect that n pairs whose differences have this SD find with this power; infinite below 2 pairs."""
    if n < 2:
        return math.inf
    high = 1.0
    while _power(n, high, alpha) < power:
        high *= 2
    return sd * float(brentq(lambda effect: _power(n, effect, alpha) - power, 0.0, high))


def detectable_in_sd(n: int, *, alpha: float = ALPHA, power: float = 0.8) -> float:
    """`detectable_effect` in units of the SD of the paired differences, for a plan that does not know it yet."""
    return detectable_effect(n, 1.0, alpha=alpha, power=power)


def seeds_needed(effect_in_sd: float, *, alpha: float = ALPHA, power: float = 0.8) -> int | None:
    """The fewest pairs that find this effect with this power; None above 1000."""
    effect, low, high = abs(effect_in_sd), 1, MOST_SEEDS
    if not effect > 0 or _power(high, effect, alpha) < power:
        return None
    while high - low > 1:  # low is too few, high is enough
        middle = (low + high) // 2
        low, high = (low, middle) if _power(middle, effect, alpha) >= power else (middle, high)
    return high


def censored_median(reached: Sequence[float], num_never: int) -> float | None:
    """The median, where those that never had it count as later than all that have; None where the middle is among them.

    Each is watched to the end of its own schedule, and who stops earlier is not alike to who goes on: Kaplan and Meier's
    estimate would name a median where the slowest of five got there and four never did.
    """
    times = sorted(reached) + [math.inf] * num_never
    middle = (times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2 if times else math.inf
    return middle if math.isfinite(middle) else None


# ------------------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Comparison:
    """Two arms over the seeds that both have. Intervals hold the effect; None where n or the spread allows none."""

    against: str
    seeds: tuple[int, ...]
    arm_values: tuple[float, ...]
    against_values: tuple[float, ...]
    differences: tuple[float, ...]  # arm - against, in the metric's units
    lower_is_better: bool
    margin: float  # a gain
    family_size: int
    n: int
    mean_arm: float
    mean_against: float
    effect: float
    sd: float | None = None  # of the differences
    interval: Interval | None = None  # 95 %, t, unadjusted
    simultaneous: Interval | None = None  # Bonferroni over the family
    p: float | None = None  # t, two-sided, of gain = margin; 1 where the differences are all equal
    p_signflip: float | None = None  # of the same hypothesis; printed, never decides
    p_floor: float = 1.0  # the least that p_signflip can be
    correlation: float | None = None  # of the pairs; what pairing gains
    welch: Interval | None = None  # as if not paired
    bca: Interval | None = None  # from n = 20; under-covers below
    new_data: Interval | None = None  # 95 %, over new seeds and new examples; see `bootstrap`

    @property
    def gain(self) -> float:
        """The effect, positive where the arm is better."""
        return -self.effect if self.lower_is_better else self.effect

    def holds_on_new_data(self) -> bool:
        """Whether the interval over seeds and examples leaves the margin on the effect's own side."""
        if self.new_data is None:
            return False
        low, high = sorted(-end if self.lower_is_better else end for end in self.new_data)
        return low > self.margin if self.gain > self.margin else high < self.margin


def compare(
    arm: Mapping[int, float],
    against: Mapping[int, float],
    *,
    lower_is_better: bool,
    margin: float = 0.0,
    family_size: int = 1,
    name: str = "against",
) -> Comparison | None:
    """Pairs two arms' values by seed. With one pair only the effect is known; None without a pair."""
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
    bca = None
    if vary and n >= 20:
        bca = stats.bootstrap((d,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    return replace(
        plain,
        sd=float(test.sd),
        interval=_around(test) if vary else None,
        simultaneous=_around(paired_t(d, confidence=1 - ALPHA / family_size)) if vary else None,
        p=float(test.p),
        p_signflip=sign_flip_p(d - null),
        p_floor=2.0 ** (1 - n),
        correlation=_correlation(a, b),
        welch=_welch(a, b),
        bca=None if bca is None else (float(bca.low), float(bca.high)),
    )


@dataclass(frozen=True)
class CostComparison:
    """What two arms spent, over the seeds that both have: a ratio. Intervals and p are Student's t on its logarithm."""

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
    """Pairs two arms' costs by seed; None without a pair, or where one of them cost nothing."""
    seeds = tuple(sorted(arm.keys() & against.keys()))
    a, b = (tuple(float(side[seed]) for seed in seeds) for side in (arm, against))
    if not seeds or min(*a, *b) <= 0:
        return None
    logs = np.log(a) - np.log(b)
    plain = CostComparison(name, seeds, a, b, len(seeds), math.exp(logs.mean()))
    if len(seeds) == 1:
        return plain
    test = paired_t(logs)
    low, high = np.exp(_around(test)).tolist()
    return replace(plain, log_sd=float(test.sd), interval=(low, high) if test.sd > 0 else None, p=float(test.p))
