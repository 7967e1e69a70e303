"""Claims about scaling: where the gain from a teacher turns into harm, and whether a law foretells a size.

A curve is fitted to the mean losses of all configurations (an arm at the end of a phase), and again without each seed in
turn, from the optimum on. Runs of one seed share teachers, trunks and the order of the data, so that the seed is the unit: a
number that the curve gives has Student's interval over the seeds' pseudo-values (Tukey's jackknife). A gain is linear in its
coefficients, where that is exact; where it crosses 0 is found by inverting its tests (Fieller, 1954).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares, nnls
from scipy.special import huber

from orchestrator.analysis.arm_values import ArmValues, arm_values
from orchestrator.analysis.notes import Kind, Note, note
from orchestrator.analysis.queries import MetricQuery, Records, parsed
from orchestrator.analysis.statistics import MIN_PAIRS, Interval, PairedT, equivalence_p, paired_t
from orchestrator.study.claims import Crossing, Foretelling
from orchestrator.study.scaling_grid import Grid
from orchestrator.study.schema import tasks_of
from trainables.config.phase_run import PhaseRun, Start

Floats = NDArray[np.float64]

HUBER = 0.01  # of a log residual: a loss that is off by more than 1 % counts less
EXPONENTS = np.geomspace(0.05, 2, 8)  # each pair of them is a start of the law's fit,
FOLLOWED = 8  # of which the best are followed to an optimum
LOW, HIGH = np.array([-20.0, -20, -20, -4, -4]), np.array([5.0, 5, 5, 1.5, 1.5])  # of the law's logarithms
STEPS = 2000  # of a curve between its least and its largest measured value


class Estimate(NamedTuple):
    """A number that a curve gives, beside the number that it is judged by."""

    name: str
    beside: str
    value: float | None  # None: not reached within what was measured
    interval: Interval  # 95 %; an end that was not reached is 0, or infinite
    against: float
    ratio: Interval  # 95 %, of value over against
    n: int  # seeds
    unit: str = ""


class Line(NamedTuple):
    """A fitted line with half of its 95 % interval, measured points, or both."""

    name: str
    x: Sequence[float] = ()
    y: Sequence[float] = ()
    half: Sequence[float] = ()
    points: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Curve:
    x_name: str
    y_name: str
    lines: Sequence[Line]
    coefficients: Mapping[str, tuple[float, Interval]]  # with their 95 % intervals


class Answer(NamedTuple):
    """An estimate, and what it decides."""

    estimate: Estimate | None = None
    p: float = 1.0  # two-sided, of equality with the claim's bound
    beyond: float = 0.0  # positive where the claim holds
    spread: tuple[float | None, int] | None = None  # SD of the seeds' pseudo-values, and their number


class Judged(NamedTuple):
    query: MetricQuery
    answers: Sequence[Answer]
    notes: tuple[Note, ...]
    failed: bool
    curve: Curve | None = None


class _Found(NamedTuple):
    answers: Sequence[Answer]
    notes: Sequence[Note] = ()
    curve: Curve | None = None


@dataclass(frozen=True)
class _Measured:
    """Configurations K at seeds S. Costs are of the student alone, from its first phase on."""

    names: Sequence[tuple[str, str]]  # arm and phase
    loss_KS: Floats
    tokens_K: Floats
    flops_K: Floats
    parameters_K: Floats  # NaN where not recorded


def judge_scaling(claim: Crossing | Foretelling, grid: Grid, records: Records) -> Judged:
    """Fits the claim's curve, and decides what can be decided by it. A run that failed leaves all undecided."""
    tasks = tasks_of(claim, records.facts.each.get(claim.phase, ()))
    query = MetricQuery(claim.phase, claim.model, claim.metric, tasks, claim.split)
    arms = tuple(grid.trained) if isinstance(claim, Crossing) else grid.alone
    students = {
        (arm, phase): values
        for phase in claim.phases
        for arm, values in arm_values(records, arms, query._replace(phase=phase))[1].items()
    }
    teachers = {arm: _of_teacher(arm, grid, records, query) for arm in grid.teacher if arm in arms}
    every = [*students.values(), *teachers.values()]
    seeds = sorted(set.intersection(*(set(values.values) for values in every)))
    notes = [each for values in every for each in values.notes]
    if lost := sum(bool(values.failed) for values in every):
        notes.append(note(Kind.LOST_RUNS, num=lost))
    if len(seeds) < MIN_PAIRS:
        notes.append(note(Kind.TOO_FEW_PAIRS, n=len(seeds), least=MIN_PAIRS))
    if lost or len(seeds) < MIN_PAIRS:
        return Judged(query, [Answer()], tuple(dict.fromkeys(notes)), bool(lost))
    measured = _measure(students, grid, records, model=claim.model, seeds=seeds)
    if isinstance(claim, Crossing):
        teacher_S = {arm: [values.values[seed] for seed in seeds] for arm, values in teachers.items()}
        found = _crossing(claim, grid, measured, teacher_S)
    else:
        found = _foretell(claim, measured)
    return Judged(query, found.answers, tuple(dict.fromkeys([*notes, *found.notes])), False, found.curve)


def _of_teacher(arm: str, grid: Grid, records: Records, query: MetricQuery) -> ArmValues:
    teacher, start = grid.teacher[arm]
    at = query._replace(phase=start.run.phase, model=teacher, at=start.fraction)
    return arm_values(records, (arm,), at)[1][arm]


def _measure(
    students: Mapping[tuple[str, str], ArmValues], grid: Grid, records: Records, *, model: str, seeds: Sequence[int]
) -> _Measured:
    arms = {arm for arm, _ in students}
    trials, rows = records.planned(records.trials, arms), records.planned(records.results, arms)
    cells = zip(trials["arm"], trials["seed"], trials["phases"], strict=True)
    phases = {(arm, int(seed)): parsed(cell) for arm, seed, cell in cells}
    rows = rows[(rows["metric"] == "parameters") & (rows["split"] == "system") & (rows["model"] == model)]
    sizes = dict(zip(rows["arm"], rows["value"].astype(float), strict=True))
    spent_KSC = np.array([
        [_spent(grid.trained[arm][phase], phases[arm, seed]) for seed in seeds] for arm, phase in students
    ])  # fmt: skip
    tokens_K, flops_K = spent_KSC.mean(1).T
    loss_KS = np.array([[values.values[seed] for seed in seeds] for values in students.values()])
    parameters_K = np.array([sizes.get(arm, math.nan) for arm, _ in students])
    return _Measured(list(students), loss_KS, tokens_K, flops_K, parameters_K)


def _spent(trained: Sequence[Start], phases: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Adds up tokens and FLOPs of these parts of a trial's phases."""
    done = [
        (start.fraction * each["tokens"], start.fraction * each["flops"])
        for start in trained
        for name, each in phases.items()
        if PhaseRun.parse(name).phase == start.run.phase
    ]
    return math.fsum(tokens for tokens, _ in done), math.fsum(flops for _, flops in done)


def _pseudo_values(of: Callable[[Sequence[int]], Floats], n: int) -> Floats:
    """Returns [..., n]: the seeds' pseudo-values, whose mean is the estimate [...] from all seeds."""
    everyone = list(range(n))
    without = np.stack([of([seed for seed in everyone if seed != left_out]) for left_out in everyone], -1)
    pseudo: Floats = of(everyone)[..., None] + (n - 1) * (without.mean(-1, keepdims=True) - without)
    return pseudo


# ---------------------------------------------------------------------------------------------------------- crossing


def _crossing(claim: Crossing, grid: Grid, measured: _Measured, teacher_S: Mapping[str, Sequence[float]]) -> _Found:
    """Fits gain = b0 + b1 s + b2 s^2 + b3 o by least squares: s the logarithm of r and o that of the student's tokens; or s
    that of the FLOPs and o that of the teacher's loss. The curve is read at the mean of o."""
    at = {name: k for k, name in enumerate(measured.names)}
    pairs = [(at[name], at[grid.alone_of[name[0]], name[1]]) for name in measured.names if name[0] in teacher_S]
    taught_K, alone_K = (np.array(side) for side in zip(*pairs, strict=True))
    student_KS, alone_KS = measured.loss_KS[taught_K], measured.loss_KS[alone_K]
    teacher_KS = np.array([teacher_S[measured.names[k][0]] for k in taught_K])
    tokens_K, flops_K = np.log(measured.tokens_K[taught_K]), np.log(measured.flops_K[alone_K])

    def axes(seeds: Sequence[int]) -> tuple[Floats, Floats]:
        teacher_K = np.log(teacher_KS[:, seeds].mean(1))
        if claim.crossing == "compute":
            return flops_K, teacher_K
        return teacher_K - np.log(alone_KS[:, seeds].mean(1)), tokens_K

    n = student_KS.shape[1]
    s_K, o_K = axes(range(n))
    low, high, middle, mean = s_K.min(), s_K.max(), s_K.mean(), o_K.mean()
    if np.linalg.matrix_rank(_powers(s_K - middle)) < 3:
        return _Found([Answer()], [note(Kind.NO_CURVE, what=claim.crossing)])

    def fit(seeds: Sequence[int]) -> Floats:
        s_K, o_K = axes(seeds)
        x_KB = np.column_stack([_powers(s_K - middle), o_K - mean])
        gain_K = (alone_KS - student_KS)[:, seeds].mean(1)
        coefficients: Floats = np.linalg.lstsq(x_KB, gain_K)[0]
        return coefficients

    pseudo_BS = _pseudo_values(fit, n)
    s_G = np.linspace(low, high, STEPS)
    curve = paired_t(_powers(s_G - middle) @ pseudo_BS[:3])
    where, interval = _falls(s_G, curve.mean, curve.half)
    estimate = Estimate(
        "r*" if claim.crossing == "r" else "C*", "the bound", where, interval, claim.bound,
        (interval[0] / claim.bound, interval[1] / claim.bound), n, "" if claim.crossing == "r" else "FLOPs",
    )  # fmt: skip
    wanted = math.log(claim.bound)
    s = min(max(wanted, low), high) - middle
    test, slope = paired_t(_powers(s) @ pseudo_BS[:3]), pseudo_BS[1].mean() + 2 * s * pseudo_BS[2].mean()
    helps, notes = bool(test.mean > 0), list[Note]()
    if where is None:
        notes.append(note(Kind.NOT_REACHED, what=estimate.name, helps=bool(curve.mean[-1] > 0)))
    # beyond what was measured only one of the two sides can be shown; and a gain that rises falls later
    is_open = wanted < low if not helps else wanted > high
    if is_open or not (helps or slope < 0):
        notes += [note(Kind.OUTSIDE, bound=claim.bound, low=math.exp(low), high=math.exp(high))] if is_open else []
        answer = Answer(estimate)
    else:
        answer = Answer(estimate, float(test.p), float(test.mean if claim.above else -test.mean), (float(test.sd), n))
    gain_K = (alone_KS - student_KS).mean(1) - pseudo_BS[3].mean() * (o_K - mean)
    points = dict[str, list[tuple[float, float]]]()
    for k, s_k, gain in zip(taught_K, s_K, gain_K, strict=True):
        points.setdefault(measured.names[k][1], []).append((math.exp(s_k), float(gain)))
    lines = [Line(phase, points=of_phase) for phase, of_phase in points.items()]
    lines += [] if where is None else [Line(estimate.name, points=[(where, 0.0)])]
    return _Found([answer], notes, _drawn_gain(claim, s_G, curve, lines, coefficients=_coefficients(pseudo_BS)))


def _drawn_gain(
    claim: Crossing,
    s_G: Floats,
    curve: PairedT,
    points: Sequence[Line],
    *,
    coefficients: Sequence[tuple[float, Interval]],
) -> Curve:
    some_G = np.linspace(0, len(s_G) - 1, 60).astype(int)
    x, y, half = (values_G[some_G].tolist() for values_G in (np.exp(s_G), curve.mean, curve.half))
    lines = [Line("fit", x, y, half), Line("no gain", x, [0.0] * len(x)), *points]
    x_name, other = ("teacher's loss / student's alone", "log tokens")
    if claim.crossing == "compute":
        x_name, other = ("FLOPs of the student alone", "log teacher's loss")
    along = f"log {claim.crossing}"
    names = (f"gain at the mean {along}", f"slope in {along}", f"curvature in {along}", f"slope in {other}")
    return Curve(x_name, f"gain in {claim.metric}", lines, dict(zip(names, coefficients, strict=True)))


def _powers(s: Floats | float) -> Floats:
    """Returns [..., 3]: 1, s and its square."""
    return np.stack([np.ones_like(s), s, np.square(s)], -1)


def _coefficients(pseudo_BS: Floats) -> list[tuple[float, Interval]]:
    t = paired_t(pseudo_BS)
    return [(mean, (mean - half, mean + half)) for mean, half in zip(t.mean.tolist(), t.half.tolist(), strict=True)]


def _falls(s_G: Floats, mean_G: Floats, half_G: Floats) -> tuple[float | None, Interval]:
    """Returns where exp(s) falls through 0, and the values that no test rejects: after the last point before it that is
    shown to be above 0, and before the first point after it that is shown to be below 0."""
    falls = np.flatnonzero((mean_G[:-1] > 0) & (mean_G[1:] <= 0))
    last = int(falls[-1]) if len(falls) else len(s_G) - 1 if mean_G[-1] > 0 else -1
    above = [s for s in np.flatnonzero(mean_G > half_G) if s <= last]
    below = [s for s in np.flatnonzero(mean_G < -half_G) if s > last]
    interval = (math.exp(s_G[above[-1]]) if above else 0.0, math.exp(s_G[below[0]]) if below else math.inf)
    return (math.exp(s_G[last : last + 2].mean()) if len(falls) else None), interval


# --------------------------------------------------------------------------------------------------------- foretelling


def law(theta: Floats, sizes: Floats, tokens: Floats) -> Floats:
    """Computes the loss E + A / N^alpha + B / D^beta (Hoffmann et al., 2022).

    Args:
        theta: the logarithms of E, A, B, alpha and beta.
        sizes, tokens: the logarithms of N and D, each less its mean over the study, so that A and B are losses.
    """
    loss: Floats = np.exp(_terms(theta, sizes, tokens)).sum(0)
    return loss


def _terms(theta: Floats, sizes: Floats, tokens: Floats) -> Floats:
    e, a, b, alpha, beta = theta
    return np.stack([np.full_like(sizes, e), a - np.exp(alpha) * sizes, b - np.exp(beta) * tokens])


def fit_law(sizes: Floats, tokens: Floats, losses: Floats, start: Floats | None = None) -> Floats:
    """Fits the law to log losses with Huber's loss: from the best of 64 starts, or from one, as the refits do."""

    def residuals(theta: Floats) -> Floats:
        off: Floats = np.log(law(theta, sizes, tokens) / losses)
        return off

    def jacobian(theta: Floats) -> Floats:
        terms = np.exp(_terms(theta, sizes, tokens))
        e, a, b = terms / terms.sum(0)
        return np.column_stack([e, a, b, -np.exp(theta[3]) * sizes * a, -np.exp(theta[4]) * tokens * b])

    def fitted(theta: Floats) -> OptimizeResult:
        inside = np.clip(theta, LOW + 1e-6, HIGH - 1e-6)
        return least_squares(residuals, inside, jacobian, bounds=(LOW, HIGH), loss="huber", f_scale=HUBER)

    def cost(theta: Floats) -> float:
        return float(huber(HUBER, residuals(theta)).sum())

    starts = [start] if start is not None else sorted(_starts(sizes, tokens, losses), key=cost)[:FOLLOWED]
    best: Floats = min((fitted(theta) for theta in starts), key=lambda fit: float(fit.cost)).x
    return best


def _starts(sizes: Floats, tokens: Floats, losses: Floats) -> Iterator[Floats]:
    """Yields, for each pair of exponents, the other coefficients by non-negative least squares."""
    for alpha, beta in itertools.product(EXPONENTS, EXPONENTS):
        columns = np.column_stack([np.ones_like(sizes), np.exp(-alpha * sizes), np.exp(-beta * tokens)])
        coefficients = np.maximum(nnls(columns, losses)[0], 1e-3 * losses.mean())
        yield np.log([*coefficients, alpha, beta])


def _foretell(claim: Foretelling, measured: _Measured) -> _Found:
    """Fits the law without one arm, and compares the losses that it gives for this arm with the measured ones."""
    if not np.isfinite(measured.parameters_K).all():
        return _Found([Answer()], [note(Kind.NO_CURVE, what="size")])
    n_K, d_K = np.log(measured.parameters_K), np.log(measured.tokens_K)
    sizes_K, tokens_K = n_K - n_K.mean(), d_K - d_K.mean()
    wanted = claim.foretells.hold_out
    held_out = measured.names[int(n_K.argmax())][0] if wanted == "largest" else wanted
    is_out_K = np.array([arm == held_out for arm, _ in measured.names])
    n, seen_K = measured.loss_KS.shape[1], ~is_out_K

    def fit(seeds: Sequence[int], start: Floats | None) -> Floats:
        return fit_law(sizes_K[seen_K], tokens_K[seen_K], measured.loss_KS[seen_K][:, seeds].mean(1), start)

    optimum = fit(range(n), None)

    def numbers(seeds: Sequence[int]) -> Floats:
        """Returns the coefficients, the foretold log losses, and how far these are off."""
        theta = optimum if len(seeds) == n else fit(seeds, optimum)
        foretold = np.log(law(theta, sizes_K[is_out_K], tokens_K[is_out_K]))
        return np.concatenate([theta, foretold, foretold - np.log(measured.loss_KS[is_out_K][:, seeds].mean(1))])

    pseudo = _pseudo_values(numbers, n)
    num = int(is_out_K.sum())
    foretold, off = pseudo[5 : 5 + num], pseudo[5 + num :]
    names = [name for name, is_out in zip(measured.names, is_out_K, strict=True) if is_out]
    losses = measured.loss_KS[is_out_K].mean(1).tolist()
    answers = [
        _within(
            Estimate(f"{held_out} {phase}, foretold", "measured", math.exp(f.mean()), _ends(f), loss, _ends(e), n),
            e,
            claim,
        )
        for (_, phase), f, e, loss in zip(names, foretold, off, losses, strict=True)
    ]
    x_G = np.linspace(sizes_K.min(), sizes_K.max(), 40)
    lines, held = list[Line](), list[tuple[float, float]]()
    for phase in dict.fromkeys(phase for _, phase in measured.names):
        of_phase = [k for k, name in enumerate(measured.names) if name[1] == phase]
        points = [(float(measured.parameters_K[k]), float(measured.loss_KS[k].mean())) for k in of_phase]
        held += [point for k, point in zip(of_phase, points, strict=True) if is_out_K[k]]
        y_G = law(optimum, x_G, np.full_like(x_G, tokens_K[of_phase].mean()))
        seen = [point for k, point in zip(of_phase, points, strict=True) if seen_K[k]]
        lines.append(Line(phase, np.exp(x_G + n_K.mean()).tolist(), y_G.tolist(), points=seen))
    lines.append(Line(f"{held_out}, held out", points=held))
    logs = _coefficients(pseudo[:5])
    names_of = ("E", "A at the mean log N", "B at the mean log D", "alpha", "beta")
    coefficients = {
        name: (math.exp(value), (math.exp(ends[0]), math.exp(ends[1])))
        for name, (value, ends) in zip(names_of, logs, strict=True)
    }
    return _Found(answers, (), Curve("parameters", claim.metric, lines, coefficients))


def _ends(log_S: Floats) -> Interval:
    low, high = np.exp(paired_t(log_S).interval()).tolist()
    return low, high


def _within(estimate: Estimate, off_S: Floats, claim: Foretelling) -> Answer:
    """Decides by two one-sided tests whether a log error lies within the bound, each at half of alpha; or beyond it."""
    bound, error = math.log1p(claim.error_below), float(off_S.mean())
    if abs(error) < bound:
        p = min(1.0, 2 * equivalence_p(off_S, bound))
    else:
        p = float(paired_t(off_S, null=math.copysign(bound, error)).p)
    return Answer(estimate, p, bound - abs(error), (float(off_S.std(ddof=1)), len(off_S)))
