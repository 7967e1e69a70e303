"""Intervals for new seeds *and* new examples: both are drawn again, crossed. Knows the table of examples, and no claim.

Each of the resamples draws pairs of seeds and examples with replacement, the same examples for both arms, and computes the
score anew (the pigeonhole bootstrap, Owen 2007). With few seeds the percentiles of a bootstrap are too narrow: of 5 seeds
they hold 83 % where all spread is between seeds. So the seeds' part is widened by t(n-1)/z * sqrt(n/(n-1)), which
makes it as wide as Student's t (Hesterberg's expanded percentiles, 2015, for the factor that needs them): 94 % there. It
is more than 95 %, up to 99 %, where the spread is that of one seed on one example, which a crossed resample counts thrice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from orchestrator.analysis.statistics import ALPHA, Interval, bootstrap_widening
from trainables.config.value import random_stream
from trainables.metrics.task_scores import METRICS, Rule, resampled_scores

RESAMPLES = 2000
CHUNK = 1_000_000  # weights that are held at once; more are slower, as they leave the caches
_ENDS = (100 * ALPHA / 2, 100 * (1 - ALPHA / 2))


How = Rule | Literal["loss", "mean"]  # how examples become a number; `loss`: their sum over that of the counts


class Answers(NamedTuple):
    """One data set as both arms (A = 2: arm, against) answered it: S pairs of seeds, E examples, all the same."""

    rule: How
    parts_E: NDArray[np.int64]  # of the data set; each is resampled for itself
    labels_E: NDArray[np.float64]
    values_ASE: NDArray[np.float64]  # predictions; of the rule `loss` losses
    counts_ASE: NDArray[np.float64]  # supervised positions


class Resampled(NamedTuple):
    """95 % intervals of arm - against."""

    mean: Interval  # over the data sets
    each: tuple[Interval, ...]


def score(answers: Answers) -> NDArray[np.float64]:
    """[A, S] of all examples as they are."""
    scored_AS: NDArray[np.float64] = _scores(answers, np.ones((1, len(answers.parts_E))))[..., 0]
    return scored_AS


def crossed(data: Sequence[Answers], *, seed: int, num: int = RESAMPLES) -> Resampled:
    """Intervals over new seeds and new examples; of one pair of seeds over new examples alone."""
    S = data[0].values_ASE.shape[1]
    rng = np.random.default_rng([seed, 0])
    drawn_RS = rng.multinomial(S, np.full(S, 1 / S), size=num) / S
    resampled_TR = np.stack(
        [_resampled(answers, drawn_RS, np.random.default_rng([seed, i])) for i, answers in enumerate(data, 1)]
    )
    return Resampled(_interval(resampled_TR.mean(0)), tuple(_interval(values_R) for values_R in resampled_TR))


def _resampled(answers: Answers, drawn_RS: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:  # [R]
    S = drawn_RS.shape[1]
    chunks = [_scores(answers, weights_RE) for weights_RE in _weights(rng, answers.parts_E, len(drawn_RS))]
    arm_SR, against_SR = np.concatenate(chunks, axis=-1)
    differences_RS = (arm_SR - against_SR).T
    mean_R: NDArray[np.float64] = differences_RS.mean(1)
    if S == 1:
        return mean_R
    values_R: NDArray[np.float64] = mean_R + bootstrap_widening(S) * ((drawn_RS * differences_RS).sum(1) - mean_R)
    return values_R


def _weights(rng: np.random.Generator, parts_E: NDArray[np.int64], num: int) -> Iterator[NDArray[np.float64]]:
    """How often each example is drawn, a row for each resample; in pieces."""
    E = len(parts_E)
    members = [np.flatnonzero(parts_E == part) for part in np.unique(parts_E)]
    rows = max(1, CHUNK // E)
    for first in range(0, num, rows):
        R = min(rows, num - first)
        weights_RE = np.empty((R, E))
        for inside in members:
            n = len(inside)
            drawn = rng.integers(0, n, (R, n)) + n * np.arange(R)[:, None]
            weights_RE[:, inside] = np.bincount(drawn.ravel(), minlength=R * n).reshape(R, n)
        yield weights_RE


def _scores(answers: Answers, weights_RE: NDArray[np.float64]) -> NDArray[np.float64]:
    """[A, S, R]."""
    values, counts = answers.values_ASE, answers.counts_ASE
    if answers.rule == "loss":
        loss_ASR: NDArray[np.float64] = (values @ weights_RE.T) / (counts @ weights_RE.T)
        return loss_ASR
    if answers.rule == "mean":
        mean_ASR: NDArray[np.float64] = (values @ weights_RE.T) / weights_RE.sum(1)
        return mean_ASR
    parts_E = answers.parts_E if answers.parts_E.any() else None
    scored = [
        [resampled_scores(answers.rule, run_E, answers.labels_E, parts_E, weights_RE) for run_E in arm_SE]
        for arm_SE in values
    ]
    return np.array(scored)


def _interval(values_R: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values_R, _ENDS)
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------- the table


class Missing(Exception):
    """Why there is no interval over examples, in words that follow a colon."""


def new_data(
    examples: pd.DataFrame,
    sides: Sequence[str],  # arm, against
    seeds: Sequence[int],
    recorded: Mapping[str, NDArray[np.float64]],  # [A, S] by data set, as the results have them
    metric: str,
    rules: Mapping[str, Rule],  # of the `score` of each data set
    *,
    seed: int,
) -> Resampled:
    """The intervals of one comparison. `examples`: of one reading, with the column `side`. Raises Missing."""
    if examples.empty:
        raise Missing("none are stored")
    return crossed(
        [
            _answers(examples[examples["task"] == task], sides, seeds, found_AS, _rule(metric, task, rules), task)
            for task, found_AS in recorded.items()
        ],
        seed=seed,
    )


def seed_of(*name: str) -> int:
    """The same claim draws the same resamples, whatever stands beside it."""
    return random_stream(0, "new data", *name)


def _rule(metric: str, task: str, rules: Mapping[str, Rule]) -> How:
    if metric.endswith("_loss"):
        return "loss"
    if metric == "rougeL":  # of each reply by itself
        return "mean"
    if metric == "score" and task in rules:
        return rules[task]
    for rule in get_args(Rule):
        if METRICS[rule] == (metric,):
            return rule  # type: ignore[no-any-return]
    raise Missing(f"{metric} of {task} is not scored by example")


def _answers(
    rows: pd.DataFrame, sides: Sequence[str], seeds: Sequence[int], recorded_AS: NDArray[np.float64], rule: How, task: str
) -> Answers:  # fmt: skip
    cells = [[rows[(rows["side"] == side) & (rows["seed"] == seed)] for seed in seeds] for side in sides]
    cells = [[cell.sort_values(["part", "example"], kind="stable") for cell in of_arm] for of_arm in cells]
    first = cells[0][0]
    if first.duplicated(["part", "example"]).any():
        raise Missing(f"{sides[0]!r} has several runs of seed {seeds[0]}")
    for side, of_arm in zip(sides, cells, strict=True):
        for seed, cell in zip(seeds, of_arm, strict=True):
            if cell.empty:
                raise Missing(f"those of {task} are not stored for {side!r} at seed {seed}")
            keys = ("part", "example") if rule in ("loss", "mean") else ("part", "example", "label")
            if not all(np.array_equal(cell[key].to_numpy(), first[key].to_numpy()) for key in keys):
                raise Missing(f"{side!r} at seed {seed} was not scored on the same examples of {task}")

    def array(column: str) -> NDArray[np.float64]:
        return np.array([[cell[column].to_numpy(dtype=np.float64) for cell in of_arm] for of_arm in cells])

    answers = Answers(
        rule,
        first["part"].to_numpy(dtype=np.int64),
        first["label"].to_numpy(dtype=np.float64),
        array("loss" if rule == "loss" else "prediction"),
        array("count"),
    )
    if not np.allclose(score(answers), recorded_AS, rtol=1e-3, atol=1e-3):  # what is resampled must be what is judged
        raise Missing(f"those stored of {task} do not give the value that was recorded")
    return answers
