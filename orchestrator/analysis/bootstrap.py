"""Intervals over new seeds and new examples.

The difference of two arms is drawn anew over seeds, and over clusters of examples: examples of one document or text are
drawn together, the same for both arms, and the metric is computed anew. Both parts are widened by t(n-1)/z * sqrt(n/(n-1)),
which makes the percentiles of a bootstrap as wide as Student's t (Hesterberg's expanded percentiles, 2015). What varies with
the pair of seed and example is in both parts; it is counted once (the two-way variance V1 + V2 - V12 of Cameron, Gelbach
and Miller, 2011). Below 30 clusters there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from orchestrator.analysis.notes import Kind, note
from orchestrator.analysis.queries import TaskFacts
from orchestrator.analysis.statistics import ALPHA, Interval, bootstrap_widening
from trainables.config.value import random_stream
from trainables.metrics.metric import Examples, Floats, Metric

RESAMPLES = 2000
CHUNK = 1_000_000  # weights in memory at once; more would leave the caches, and be slower
MIN_CLUSTERS = 30  # below them no correction makes the interval cover


class Answers(NamedTuple):
    """The answers of both arms to the E examples of one data set, which are the same in all runs."""

    metric: Metric  # with `resample`
    runs: Sequence[Sequence[Examples]]  # of each arm (arm, against), of each seed
    clusters_E: NDArray[np.int64] | None = None  # by default each example is one

    @property
    def part_E(self) -> NDArray[np.int64]:
        return self.runs[0][0].part_E

    def numbered(self) -> NDArray[np.int64]:
        """Returns [E]: the number of each example's cluster, from 0; parts share no cluster."""
        clusters_E = np.arange(len(self.part_E)) if self.clusters_E is None else self.clusters_E
        numbers_E: NDArray[np.int64] = np.unique(np.stack([self.part_E, clusters_E]), axis=1, return_inverse=True)[1]
        return numbers_E.ravel()

    def scores(self, weights_RE: Floats) -> Floats:
        """Returns the metric [A, S, R] of each arm A and seed S in each resample R."""
        assert self.metric.resample is not None
        return np.array([[self.metric.resample(run, weights_RE) for run in arm] for arm in self.runs])

    def score(self) -> Floats:
        """Returns the metric [A, S] of all examples as they are."""
        scored_AS: Floats = self.scores(np.ones((1, len(self.part_E))))[..., 0]
        return scored_AS


class Resampled(NamedTuple):
    """Intervals of arm - against."""

    mean: Interval  # over the data sets
    each: tuple[Interval, ...]
    share: float | None = None  # of the variance over seeds, of the mean: what varies with the example as well


def crossed(data: Sequence[Answers], *, seed: int, alpha: float = ALPHA, num: int = RESAMPLES) -> Resampled:
    """Computes intervals over new seeds and new examples; of one pair of seeds over new examples alone."""
    S = len(data[0].runs[0])
    drawn_RS = np.random.default_rng([seed, 0]).multinomial(S, np.full(S, 1 / S), size=num) / S
    plain_TS = np.stack([np.subtract(*answers.score()) for answers in data])
    resampled_TSR = np.stack(
        [_resampled(answers, np.random.default_rng([seed, i]), num) for i, answers in enumerate(data, 1)]
    )
    clusters_T = [int(answers.numbered().max()) + 1 for answers in data]

    def interval(d_S: Floats, d_SR: Floats, num_clusters: int) -> Interval:
        by_example_R = (d_SR.mean(0) - d_S.mean()) * bootstrap_widening(num_clusters, alpha)
        wider = bootstrap_widening(S, alpha) if S > 1 else 1.0
        by_seed_R = (drawn_RS @ d_S - d_S.mean()) * wider
        parts = float(by_example_R.var()), float(by_seed_R.var())
        rest_SR = d_SR - d_S[:, None]
        in_both = float((rest_SR - rest_SR.mean(0)).var(1).mean()) / max(1, S - 1)
        narrower = math.sqrt(max(sum(parts) - in_both, *parts) / sum(parts)) if sum(parts) else 1.0
        low, high = np.quantile(d_S.mean() + narrower * (by_example_R + by_seed_R), (alpha / 2, 1 - alpha / 2))
        return float(low), float(high)

    mean = interval(plain_TS.mean(0), resampled_TSR.mean(0), min(clusters_T))
    return Resampled(mean, tuple(map(interval, plain_TS, resampled_TSR, clusters_T)), _share(plain_TS, resampled_TSR))


def _share(plain_TS: Floats, resampled_TSR: Floats) -> float | None:
    """The variance of one seed's difference over examples, but for what all seeds share, beside its variance over seeds."""
    d_S, rest_SR = plain_TS.mean(0), resampled_TSR.mean(0) - plain_TS.mean(0)[:, None]
    S = len(d_S)
    if S < 2 or not d_S.var():
        return None
    by_example = float((rest_SR - rest_SR.mean(0)).var(1).mean()) * S / (S - 1)
    return min(1.0, by_example / float(d_S.var(ddof=1)))


def _resampled(answers: Answers, rng: np.random.Generator, num: int) -> Floats:
    """Returns [S, R]: the difference of the arms at each seed in each resample of clusters."""
    chunks = [answers.scores(weights_RE) for weights_RE in _weights(rng, answers, num)]
    arm_SR, against_SR = np.concatenate(chunks, axis=-1)
    difference_SR: Floats = arm_SR - against_SR
    return difference_SR


def _weights(rng: np.random.Generator, answers: Answers, num: int) -> Iterator[Floats]:
    """Yields chunks [R, E] of how often each example is drawn, with its cluster; each part of a test set by itself."""
    number_E, part_E = answers.numbered(), answers.part_E
    C = int(number_E.max()) + 1
    members = [np.unique(number_E[part_E == part]) for part in np.unique(part_E)]
    rows = max(1, CHUNK // len(part_E))
    for first in range(0, num, rows):
        R = min(rows, num - first)
        weights_RC = np.empty((R, C))
        for inside in members:
            n = len(inside)
            drawn = rng.integers(0, n, (R, n)) + n * np.arange(R)[:, None]
            weights_RC[:, inside] = np.bincount(drawn.ravel(), minlength=R * n).reshape(R, n)
        yield weights_RC[:, number_E]


# ------------------------------------------------------------------------------------------------------- the table


class Missing(Exception):
    """There is no interval over examples; `note` says why."""

    def __init__(self, why: Kind, **about: str | int) -> None:
        self.note = note(why, **about)
        super().__init__(str(self.note))


class Runs(NamedTuple):
    """The runs whose answers are compared."""

    arms: tuple[str, str]  # arm, against
    seeds: Sequence[int]
    recorded: Mapping[str, Floats]  # data set -> the metric [A, S] in the results


def interval_of(
    examples: pd.DataFrame, runs: Runs, metric: str, facts: TaskFacts, *, seed: int, alpha: float = ALPHA
) -> Resampled:
    """Computes the intervals of one comparison. Raises Missing.

    `examples` are those of one query, with the column `arm_name`.
    """
    if examples.empty:
        raise Missing(Kind.NOT_STORED)
    data = []
    for task, recorded_AS in runs.recorded.items():
        if (own := facts.metric(metric, task)).resample is None or own.name != metric:
            raise Missing(Kind.NOT_BY_EXAMPLE, metric=metric, task=task)
        answers = _answers(examples[examples["task"] == task], runs, own, task)
        # the resampled metric must be the judged one
        if not np.allclose(answers.score(), recorded_AS, rtol=1e-3, atol=1e-3):
            raise Missing(Kind.OTHER_VALUE, task=task)
        if (num := len(np.unique(answers.numbered()))) < MIN_CLUSTERS:
            raise Missing(Kind.FEW_CLUSTERS, task=task, num=num, least=MIN_CLUSTERS)
        data.append(answers)
    return crossed(data, seed=seed, alpha=alpha)


def seed_of(*name: str) -> int:
    """Returns the seed of a claim's resamples, which does not depend on the other claims."""
    return random_stream(0, "new data", *name)


def _answers(rows: pd.DataFrame, runs: Runs, metric: Metric, task: str) -> Answers:
    cells = {
        (arm, seed): rows[(rows["arm_name"] == arm) & (rows["seed"] == seed)].sort_values(
            ["part", "example"], kind="stable"
        )
        for arm in runs.arms
        for seed in runs.seeds
    }
    first = next(iter(cells.values()))
    if first.duplicated(["part", "example"]).any():
        raise Missing(Kind.SEVERAL_RUNS, arm=runs.arms[0], seed=runs.seeds[0])
    keys = ("part", "example", "label") if "label" in metric.needs else ("part", "example")
    for (arm, seed), cell in cells.items():
        if cell.empty:
            raise Missing(Kind.RUN_NOT_STORED, task=task, arm=arm, seed=seed)
        if not all(np.array_equal(cell[key].to_numpy(), first[key].to_numpy()) for key in keys):
            raise Missing(Kind.OTHER_EXAMPLES, task=task, arm=arm, seed=seed)
    if "cluster" not in first or first["cluster"].isna().any():
        raise Missing(Kind.NO_CLUSTERS, task=task)
    of_arms = [[_examples(cells[arm, seed]) for seed in runs.seeds] for arm in runs.arms]
    return Answers(metric, of_arms, first["cluster"].to_numpy(dtype=np.int64))


def _examples(cell: pd.DataFrame) -> Examples:
    columns = (cell[column].to_numpy(dtype=np.float64) for column in ("label", "prediction", "loss", "count"))
    return Examples(cell["part"].to_numpy(dtype=np.int64), *columns)
