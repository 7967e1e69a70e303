"""Intervals over new seeds and new examples: resamples both, crossed.

Each resample draws pairs of seeds and examples with replacement, the same examples for both arms, and computes the
metric anew (the pigeonhole bootstrap, Owen 2007). With few seeds the percentiles of a bootstrap are too narrow: of 5
seeds they cover 83 % where all spread is between seeds. So the seeds' part is widened by t(n-1)/z * sqrt(n/(n-1)),
which makes it as wide as Student's t (Hesterberg's expanded percentiles, 2015, for the factor that needs them): 94 %
there. Coverage is above 95 %, up to 99 %, where the spread is that of one seed on one example, which a crossed resample
counts thrice.
"""

from __future__ import annotations

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
_PERCENTILES = (100 * ALPHA / 2, 100 * (1 - ALPHA / 2))


class Answers(NamedTuple):
    """The answers of both arms to the E examples of one data set, which are the same in all runs."""

    metric: Metric  # with `resample`
    runs: Sequence[Sequence[Examples]]  # of each arm (arm, against), of each seed

    @property
    def part_E(self) -> NDArray[np.int64]:
        return self.runs[0][0].part_E

    def scores(self, weights_RE: Floats) -> Floats:
        """Returns the metric [A, S, R] of each arm A and seed S in each resample R."""
        assert self.metric.resample is not None
        return np.array([[self.metric.resample(run, weights_RE) for run in arm] for arm in self.runs])

    def score(self) -> Floats:
        """Returns the metric [A, S] of all examples as they are."""
        scored_AS: Floats = self.scores(np.ones((1, len(self.part_E))))[..., 0]
        return scored_AS


class Resampled(NamedTuple):
    """95 % intervals of arm - against."""

    mean: Interval  # over the data sets
    each: tuple[Interval, ...]


def crossed(data: Sequence[Answers], *, seed: int, num: int = RESAMPLES) -> Resampled:
    """Computes intervals over new seeds and new examples; of one pair of seeds over new examples alone."""
    S = len(data[0].runs[0])
    rng = np.random.default_rng([seed, 0])
    drawn_RS = rng.multinomial(S, np.full(S, 1 / S), size=num) / S
    resampled_TR = np.stack(
        [_resampled(answers, drawn_RS, np.random.default_rng([seed, i])) for i, answers in enumerate(data, 1)]
    )
    return Resampled(_interval(resampled_TR.mean(0)), tuple(_interval(values_R) for values_R in resampled_TR))


def _resampled(answers: Answers, drawn_RS: Floats, rng: np.random.Generator) -> Floats:
    """Returns [R]: the difference of the arms' means in each resample."""
    S = drawn_RS.shape[1]
    chunks = [answers.scores(weights_RE) for weights_RE in _weights(rng, answers.part_E, len(drawn_RS))]
    arm_SR, against_SR = np.concatenate(chunks, axis=-1)
    differences_RS = (arm_SR - against_SR).T
    mean_R: Floats = differences_RS.mean(1)
    if S == 1:
        return mean_R
    values_R: Floats = mean_R + bootstrap_widening(S) * ((drawn_RS * differences_RS).sum(1) - mean_R)
    return values_R


def _weights(rng: np.random.Generator, part_E: NDArray[np.int64], num: int) -> Iterator[Floats]:
    """Yields chunks [R, E] of how often each example is drawn; each part of a test set is resampled by itself."""
    E = len(part_E)
    members = [np.flatnonzero(part_E == part) for part in np.unique(part_E)]
    rows = max(1, CHUNK // E)
    for first in range(0, num, rows):
        R = min(rows, num - first)
        weights_RE = np.empty((R, E))
        for inside in members:
            n = len(inside)
            drawn = rng.integers(0, n, (R, n)) + n * np.arange(R)[:, None]
            weights_RE[:, inside] = np.bincount(drawn.ravel(), minlength=R * n).reshape(R, n)
        yield weights_RE


def _interval(values_R: Floats) -> Interval:
    low, high = np.percentile(values_R, _PERCENTILES)
    return float(low), float(high)


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


def interval_of(examples: pd.DataFrame, runs: Runs, metric: str, facts: TaskFacts, *, seed: int) -> Resampled:
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
        data.append(answers)
    return crossed(data, seed=seed)


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
    return Answers(metric, [[_examples(cells[arm, seed]) for seed in runs.seeds] for arm in runs.arms])


def _examples(cell: pd.DataFrame) -> Examples:
    columns = (cell[column].to_numpy(dtype=np.float64) for column in ("label", "prediction", "loss", "count"))
    return Examples(cell["part"].to_numpy(dtype=np.int64), *columns)
