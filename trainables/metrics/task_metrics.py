"""Metrics of predicted classes and of predicted numbers, x 100. A value that is undefined, as nothing varies, is 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainables.metrics.metric import Clusters, Examples, Floats, Metric, of_sums, ratio

Classes = NDArray[np.int64]
CHUNK = 1_000_000  # weights in memory at once; more would leave the caches, and be slower
_task_metric = partial(Metric, better="higher", needs=("label", "prediction"), by_part=True)


def _classes(examples: Examples) -> tuple[Classes, Classes]:
    return examples.prediction_E.astype(np.int64), examples.label_E.astype(np.int64)


def _of_classes(name: str, **options: Any) -> Callable[[Examples], float]:
    """Wraps a function of sklearn.metrics."""

    def value(examples: Examples) -> float:
        from sklearn import metrics  # imported here, as the import takes a second

        predictions, labels = _classes(examples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn warns about a single class
            return 100 * float(getattr(metrics, name)(labels, predictions, **options))

    return value


def _of_numbers(name: str) -> Callable[[Examples], float]:
    """Wraps a correlation of scipy.stats."""

    def value(examples: Examples) -> float:
        from scipy import stats

        if np.ptp(examples.prediction_E) == 0 or np.ptp(examples.label_E) == 0:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns about nearly constant predictions, common early in training
            return 100 * float(getattr(stats, name)(examples.prediction_E, examples.label_E).statistic)

    return value


def _right(examples: Examples) -> Sequence[ArrayLike]:
    predictions, labels = _classes(examples)
    return predictions == labels, np.ones(len(labels))


def _percent(right_C: Floats, total_C: Floats) -> Floats:
    return 100 * ratio(right_C, total_C)


def _hits(examples: Examples) -> Sequence[ArrayLike]:
    predictions, labels = _classes(examples)
    return (predictions == 1) & (labels == 1), predictions != labels


def _f1(hits_C: Floats, wrong_C: Floats) -> Floats:
    return 100 * ratio(2 * hits_C, 2 * hits_C + wrong_C)


def _confusion(examples: Examples) -> Sequence[ArrayLike]:
    """Returns right answers, examples, and those of each class: first as predicted, then as labelled."""
    predictions, labels = _classes(examples)
    classes = range(int(max(predictions.max(), labels.max())) + 1)
    return *_right(examples), *(found == c for found in (predictions, labels) for c in classes)


def _matthews(right_C: Floats, total_C: Floats, *counts: Floats) -> Floats:
    """Computes Matthews' correlation for any number of classes (Gorodkin 2004)."""
    predicted, true = np.split(np.array(counts), 2)
    covariance_C = right_C * total_C - (predicted * true).sum(0)
    spread_C = (total_C**2 - (predicted**2).sum(0)) * (total_C**2 - (true**2).sum(0))
    return 100 * ratio(covariance_C, np.sqrt(spread_C))


def _correlations(examples: Examples, clusters_E: Clusters, *, ranked: bool) -> Floats:
    """Ranks the values anew without each cluster."""
    left_out_C, found = np.arange(int(clusters_E.max()) + 2), []
    for some in np.array_split(left_out_C, -(-len(left_out_C) * len(clusters_E) // CHUNK)):
        weights_RE = (clusters_E != some[:, None]).astype(np.float64)
        values = examples.prediction_E, examples.label_E
        x, y = (_ranks(v_E, weights_RE) if ranked else v_E for v_E in values)
        found.append(_correlation(x, y, weights_RE))
    return np.concatenate(found)


def _correlation(x: Floats, y: Floats, weights_RE: Floats) -> Floats:
    """Computes Pearson's correlation; x and y are [E], or [R, E] where each subset R of the examples has its own."""
    share_RE = weights_RE / weights_RE.sum(1, keepdims=True)
    x_RE, y_RE = (v - (share_RE * v).sum(1, keepdims=True) for v in (x, y))
    spread_R = np.sqrt((share_RE * x_RE**2).sum(1) * (share_RE * y_RE**2).sum(1))
    # rounding would leave a constant a little spread
    varies_R = _varies(x, weights_RE) & _varies(y, weights_RE)
    return np.where(varies_R, 100 * ratio((share_RE * x_RE * y_RE).sum(1), spread_R), 0.0)


def _varies(values: Floats, weights_RE: Floats) -> NDArray[np.bool_]:
    drawn = weights_RE > 0
    varies_R: NDArray[np.bool_] = np.where(drawn, values, -np.inf).max(1) > np.where(drawn, values, np.inf).min(1)
    return varies_R


def _ranks(values_E: Floats, weights_RE: Floats) -> Floats:
    """Returns [R, E]: the mean rank of each example in each subset."""
    distinct_U, which_E = np.unique(values_E, return_inverse=True)
    order_E = np.argsort(which_E, kind="stable")
    first_U = np.searchsorted(which_E[order_E], np.arange(len(distinct_U)))
    counts_RU = np.add.reduceat(weights_RE[:, order_E], first_U, axis=1)
    ranks_RE: Floats = (np.cumsum(counts_RU, axis=1) - (counts_RU - 1) / 2)[:, which_E]
    return ranks_RE


_SHARE, _CORRELATION = (0.0, 100.0), (-100.0, 100.0)
ACCURACY = _task_metric(
    "accuracy",
    "right answers, %",
    bounds=_SHARE,
    value=_of_classes("accuracy_score"),
    left_out=of_sums(_right, _percent),
)
F1 = _task_metric(
    "f1",
    "F1 of the second class, x 100",
    bounds=_SHARE,
    value=_of_classes("f1_score", zero_division=0),
    left_out=of_sums(_hits, _f1),
)
MATTHEWS = _task_metric(
    "matthews", "Matthews' correlation, x 100", bounds=_CORRELATION, value=_of_classes("matthews_corrcoef"),
    left_out=of_sums(_confusion, _matthews),
)  # fmt: skip
PEARSON = _task_metric(
    "pearson",
    "Pearson's correlation, x 100",
    bounds=_CORRELATION,
    value=_of_numbers("pearsonr"),
    left_out=partial(_correlations, ranked=False),
)
SPEARMAN = _task_metric(
    "spearman", "Spearman's rank correlation, x 100", bounds=_CORRELATION, value=_of_numbers("spearmanr"),
    left_out=partial(_correlations, ranked=True),
)  # fmt: skip
