"""Pairs, intervals and verdicts: what the results say about the claims. Pure; knows no Ray, no files, no report.

The random unit is the training seed. An *effect* is arm minus against in the metric's own units; a *gain* is the effect
with the sign that makes better positive. A verdict is about new seeds on this evaluation set, not about new examples.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

if TYPE_CHECKING:
    from orchestrator.study import Claim

Interval = tuple[float, float]
Decision = Literal["supported", "refuted", "undecided"]
PaperJudgement = Literal["inside", "below", "above", "not comparable"]

ALPHA = 0.05  # two-sided, of a whole family
MOST_SEEDS = 1000  # beyond it "how many more seeds" is no advice
EXACT_UP_TO = 16  # pairs: 2^16 sign patterns are still listed one by one

# The last word of a metric's name -> lower is better, and the metric's range where it has two ends.
_KINDS: dict[str, tuple[bool, Interval | None]] = {
    "loss": (True, None),
    "perplexity": (True, None),
    "accuracy": (False, (0.0, 100.0)),
    "f1": (False, (0.0, 100.0)),
    "rougeL": (False, (0.0, 100.0)),
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
        return _KINDS[metric.rpartition("_")[2]]
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
    above 0, `refuted` says that the gain is below the margin; the arm may still be the better one, by less.
    """
    if p > alpha or beyond == 0:
        return "undecided"
    return "supported" if beyond > 0 else "refuted"


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

    @property
    def gain(self) -> float:
        """The effect, positive where the arm is better."""
        return -self.effect if self.lower_is_better else self.effect


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


# --------------------------------------------------------------------------------------------------------- verdict


class Counts(NamedTuple):
    """The planned trials of one arm by outcome; what is in none of the last three has not ended."""

    planned: int
    finished: int
    failed: int
    stopped: int


class Cost(NamedTuple):
    """A mean over trials, or a ratio of two; memoised phases at their recorded cost."""

    student_tokens: float  # of the claimed phase, up to the point that is judged
    flops: float  # of that, and of the trial's other phases
    device_seconds: float  # likewise


@dataclass(frozen=True)
class Verdict:
    """What the results say about one claim."""

    name: str
    claim: Claim
    verdict: Decision
    parts: tuple[Comparison, ...]  # one for each `against` that shares a seed with the arm; of values that are there
    p_adjusted: float  # Holm's; of a conjunctive claim the p of the part that decided; 1 where nothing can be tested
    seeds_more: int | None  # about how many it would take; None if decided, above 1000, or seeds would not help
    counts: Mapping[str, Counts]  # by arm
    costs: Mapping[str, Cost]  # by arm
    cost_ratios: Mapping[str, Cost]  # by `against`: the arm's cost over its cost
    paper: PaperJudgement | None  # of the paper's figure, as an effect in our units, against our 95 % interval
    notes: tuple[str, ...]


class Reading(NamedTuple):
    """Where the number that is compared stands in the table."""

    phase: str  # with its fan-out, phase[data]
    model: str
    metric: str
    task: str | None = None  # None: the one there is, or the mean over all
    split: str = "test"
    at: float = 1.0  # progress


@dataclass(frozen=True)
class _Side:
    """What one arm (or point) has at one reading."""

    name: str
    values: dict[int, float]  # by seed
    failed: set[int]  # seeds that failed before there was a value
    counts: Counts
    cost: Cost | None  # a mean over the seeds that have a value
    notes: list[str]


class _Part(NamedTuple):
    """One pair of sides: what is there, and what may be decided from it."""

    comparison: Comparison | None
    p: float  # 1 where nothing can be decided
    beyond: float  # gain - margin; with failed seeds, under the values that stand for them
    notes: list[str]
    failed: bool


def judge(
    claims: Mapping[str, Claim],
    results: pd.DataFrame,
    trials: pd.DataFrame,
    *,
    default_phase: str,
    num_seeds: int | None = None,  # planned; by default those that `trials` has
) -> dict[str, Verdict]:
    """Each claim's verdict: "`arm` is better than `against` by more than `margin`", see `decide`.

    Claims of one `family` share alpha by Holm, those that cannot be tested yet included. A conjunctive claim stands
    outside: each part is tested at alpha; supported if all parts are, refuted if any is. That keeps a false `supported`
    below alpha / 2, but k parts may falsely refute with up to k * alpha / 2.
    """
    single = {name: claim.family for name, claim in claims.items() if isinstance(claim.against, str)}
    sizes = Counter(single.values())
    sides: dict[str, dict[str, _Side]] = {}
    parts: dict[str, list[_Part]] = {}
    for name, claim in claims.items():
        against = (claim.against,) if isinstance(claim.against, str) else claim.against
        at = Reading(claim.phase or default_phase, claim.model, claim.metric, claim.task, claim.split, claim.at)
        of = sides[name] = _sides(results, trials, (claim.arm, *against), at, "arm", "trial", num_seeds)
        size = sizes[claim.family] if name in single else 1
        parts[name] = [_part(of[claim.arm], of[a], at.metric, margin=claim.margin, family_size=size) for a in against]
    adjusted: dict[str, float] = {}
    for family in sizes:
        names = [name for name, of_name in single.items() if of_name == family]
        adjusted.update(zip(names, holm([parts[name][0].p for name in names]).tolist(), strict=True))
    return {name: _verdict(name, claims[name], parts[name], sides[name], adjusted.get(name)) for name in claims}


def _verdict(name: str, claim: Claim, parts: list[_Part], sides: dict[str, _Side], p: float | None) -> Verdict:
    if p is not None:
        verdict = decide(p, parts[0].beyond)
    else:
        refuting = [part.p for part in parts if decide(part.p, part.beyond) == "refuted"]
        p = min(refuting) if refuting else max(part.p for part in parts)
        verdict = "refuted" if refuting else decide(p, min(part.beyond for part in parts))
    costs = {arm: side.cost for arm, side in sides.items() if side.cost is not None}
    own = costs.get(claim.arm)
    ratios = {a: _ratio(own, cost) for a, cost in costs.items() if own is not None and a != claim.arm}
    notes = [note for part in parts for note in part.notes] + [note for side in sides.values() for note in side.notes]
    for against, ratio in ratios.items():
        if not 1 / 1.1 <= (times := getattr(ratio, claim.axis)) <= 1.1:
            notes.append(f"axis not equal: {claim.arm!r} used {times:.3g} times the {claim.axis} of {against!r}")
    if verdict != "undecided":
        notes.append("at this scale, on this evaluation set: the interval covers new seeds, not new examples")
    compared = tuple(part.comparison for part in parts if part.comparison is not None)
    return Verdict(
        name=name,
        claim=claim,
        verdict=verdict,
        parts=compared,
        p_adjusted=p,
        seeds_more=_seeds_more(parts) if verdict == "undecided" else None,
        counts={arm: side.counts for arm, side in sides.items()},
        costs=costs,
        cost_ratios=ratios,
        paper=_judge_paper(claim.paper, compared if len(parts) == 1 else ()),
        notes=tuple(dict.fromkeys(notes)),
    )


def _part(arm: _Side, against: _Side, metric: str, *, margin: float, family_size: int) -> _Part:
    how: dict[str, Any] = {"lower_is_better": lower_is_better(metric), "margin": margin, "family_size": family_size}
    found = compare(arm.values, against.values, name=against.name, **how)
    notes = _notes_on_pairs(found, arm.name, against.name)
    failed = arm.failed | against.failed
    if not failed:
        if found is None or found.p is None:
            return _Part(found, 1, 0, notes, False)
        return _Part(found, found.p, found.gain - margin, notes, False)
    lost = [f"{s.name!r} failed at seed {', '.join(map(str, sorted(s.failed)))}" for s in (arm, against) if s.failed]
    ends = bounds(metric)
    if ends is None:
        notes.append(f"{' and '.join(lost)}: {metric} has no worst value that could stand for it, so undecided")
        return _Part(found, 1, 0, notes, True)
    notes.append(f"{' and '.join(lost)}: judged with the value of {metric} that is worst for the verdict instead")
    worst, best = ends  # no metric with two ends is better when lower
    for sign, of_arm, of_against in ((1, worst, best), (-1, best, worst)):  # supported even so; refuted even so
        whole = compare(
            dict.fromkeys(failed, of_arm) | arm.values, dict.fromkeys(failed, of_against) | against.values, **how
        )
        if whole is not None and whole.p is not None and sign * (whole.gain - margin) > 0:
            return _Part(found, whole.p, whole.gain - margin, notes, True)
    return _Part(found, 1, 0, notes, True)


def _notes_on_pairs(found: Comparison | None, arm: str, against: str) -> list[str]:
    if found is None:
        return [f"no seed has a value in both {arm!r} and {against!r}"]
    if found.n == 1:
        return ["n = 1: an effect, but nothing is known about how it varies"]
    if found.sd == 0:
        return [f"all {found.n} differences are equal: without spread there is no test"]
    few = f"n = {found.n}: few pairs, the sign-flip p cannot be below {found.p_floor:g}"
    return [few] if found.n < 5 else []


def _seeds_more(parts: list[_Part]) -> int | None:
    """At the observed effect and SD, power .8, and the alpha of Holm's first step; for the part that needs most."""
    more = [1]
    for part in parts:
        if part.failed or part.comparison is None or not part.comparison.sd:
            return None
        alpha = ALPHA / part.comparison.family_size
        needed = seeds_needed(part.beyond / part.comparison.sd, alpha=alpha)
        if needed is None:
            return None
        more.append(needed - part.comparison.n)
    return max(more)


def _judge_paper(paper: str | float | None, parts: tuple[Comparison, ...]) -> PaperJudgement | None:
    if paper is None:
        return None
    if isinstance(paper, str) or not parts or parts[0].interval is None:
        return "not comparable"
    low, high = parts[0].interval
    return "below" if paper < low else "above" if paper > high else "inside"


# ------------------------------------------------------------------------------------------------------ the tables


def _sides(
    results: pd.DataFrame,
    trials: pd.DataFrame,
    names: tuple[str, ...],
    at: Reading,
    column: str,
    kind: str,
    num_seeds: int | None,
) -> dict[str, _Side]:
    """What each arm (or point) has at the reading, over the tasks that any of them has."""

    def planned(table: pd.DataFrame) -> pd.DataFrame:
        return table[table["planned"].eq(True) & (table["kind"] == kind) & table[column].isin(names)]

    trials, rows = planned(trials), planned(results)
    for key in ("model", "metric", "split", "task"):
        if (wanted := getattr(at, key)) is not None:
            rows = rows[rows[key] == wanted]
    rows = rows[np.array([_is_of(phase, at.phase) for phase in rows["phase"]], dtype=bool)]
    rows = rows[~rows["trial"].isin(trials.loc[trials["status"] == "stopped", "trial"])]
    here = rows[(rows["progress"] - at.at).abs() <= 1e-6]
    tasks = sorted(set(here["task"]))
    sides = {}
    for name in names:
        own, recorded = here[here[column] == name], sorted(set(rows.loc[rows[column] == name, "progress"]))
        sides[name] = _side(name, trials[trials[column] == name], own, at, tasks, num_seeds or 0)
        if not sides[name].values:
            there = f"it has {', '.join(f'{x:.4g}' for x in recorded)}" if recorded else "it has none at all"
            what = f"{at.split} {at.metric} of {at.model!r} in phase {at.phase!r}"
            sides[name].notes.append(f"{name!r} has no {what} at progress {at.at:g}; {there}")
    return sides


def _side(name: str, trials: pd.DataFrame, rows: pd.DataFrame, at: Reading, tasks: list[str], num_seeds: int) -> _Side:
    values: dict[int, float] = {}
    diverged = set()
    for seed in map(int, rows["seed"].unique()):
        of_seed = rows[rows["seed"] == seed]
        if not np.isfinite(of_seed["value"].to_numpy(dtype=float)).all():
            diverged.add(seed)
        elif set(of_seed["task"]) == set(tasks):  # a mean over fewer tasks would be another quantity
            values[seed] = float(of_seed.groupby("task")["value"].mean().mean())
    failed = ({int(seed) for seed in trials.loc[trials["status"] == "failed", "seed"]} | diverged) - values.keys()
    by = Counter(trials["status"])
    counts = Counts(max(len(trials), num_seeds), by["ended"], by["failed"], by["stopped"])
    notes = [f"a mean over the tasks {', '.join(tasks)}"] if len(tasks) > 1 else []
    if counts.stopped:
        notes.append(f"{counts.stopped} stopped trials of {name!r} are in no claim")
    if (missing := counts.planned - counts.stopped - len(failed) - len(values)) > 0:
        notes.append(f"provisional: {missing} of {counts.planned} planned seeds of {name!r} have no value yet")
    used = trials[trials["seed"].isin(list(values))]
    notes += _notes_on_sharing(used, at.phase)
    return _Side(name, values, failed, counts, _cost(used, rows, at.phase), notes)


def _notes_on_sharing(trials: pd.DataFrame, phase: str) -> list[str]:
    """Which phases the seeds have in common: one teacher is one teacher, however many seeds learn from it."""
    keys: dict[str, list[str]] = {}
    for cell in trials["phases"]:
        for name, done in _phases(cell).items():
            keys.setdefault(name, []).append(str(done["key"]))
    notes = []
    for name, found in keys.items():
        runs, whom = len(set(found)), "run" if _is_of(name, phase) else "teacher"
        if runs == 1 < len(found):
            notes.append(f"all {len(found)} seeds share one phase {name!r}: the verdict holds for this one {whom}")
        elif runs < len(found):
            notes.append(f"{len(found)} seeds share {runs} of phase {name!r}: the verdict holds for these {whom}s")
    return notes


def _cost(trials: pd.DataFrame, rows: pd.DataFrame, phase: str) -> Cost | None:
    """Mean over trials of the phase up to these rows (which are cumulative) and of the other phases in full."""
    costs = []
    for trial in trials.to_dict("records"):
        own = rows[rows["trial"] == trial["trial"]]
        spent = own.groupby("phase")[["tokens", "flops", "device_seconds"]].max().sum().astype(float)
        others = [cost for name, cost in _phases(trial["phases"]).items() if not _is_of(name, phase)]
        flops, seconds = (sum(float(cost[what]) for cost in others) for what in ("flops", "device_seconds"))
        costs.append((spent["tokens"], spent["flops"] + flops, spent["device_seconds"] + seconds))
    return Cost(*np.mean(costs, axis=0).tolist()) if costs else None


def _ratio(arm: Cost, against: Cost) -> Cost:
    return Cost(*(a / b if b else (1.0 if a == b else math.inf) for a, b in zip(arm, against, strict=True)))


def _phases(cell: Any) -> dict[str, dict[str, Any]]:
    """The `phases` of a trial, a JSON object; empty before the first has ended."""
    found = json.loads(cell) if isinstance(cell, str) and cell else cell
    return found if isinstance(found, dict) else {}


def _is_of(name: str, phase: str) -> bool:
    return name == phase or name.startswith(f"{phase}[")


# --------------------------------------------------------------------------------------------------------- confirm


@dataclass(frozen=True)
class Confirmation:
    """The search's winner against the baseline, on fresh seeds."""

    verdict: Decision
    comparison: Comparison | None
    shrinkage: float | None  # the search's own difference minus the confirmed effect, in the metric's units
    counts: Mapping[str, Counts]  # by point
    notes: tuple[str, ...]


def confirm_verdict(
    results: pd.DataFrame,
    trials: pd.DataFrame,
    winner_point: str,
    baseline_point: str,
    reading: Reading,
    *,
    search_difference: float | None = None,  # winner - baseline on dev, optimistic: the winner was chosen by it
    num_seeds: int | None = None,
) -> Confirmation:
    """Whether the winner is better than the baseline over the `confirm` trials, at alpha .05 for this one pair.

    Of several candidates take `holm` over their `comparison.p`.
    """
    sides = _sides(results, trials, (winner_point, baseline_point), reading, "point", "confirm", num_seeds)
    part = _part(sides[winner_point], sides[baseline_point], reading.metric, margin=0.0, family_size=1)
    shrinkage = None
    if part.comparison is not None and search_difference is not None:
        shrinkage = search_difference - part.comparison.effect
    return Confirmation(
        decide(part.p, part.beyond),
        part.comparison,
        shrinkage,
        {point: side.counts for point, side in sides.items()},
        tuple(dict.fromkeys(part.notes + [note for side in sides.values() for note in side.notes])),
    )
