"""Metrics of predicted classes and of predicted numbers, x 100. A value that is undefined, as nothing varies, is 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainables.metrics.metric import Examples, Floats, Metric, ratio

Classes = NDArray[np.int64]
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


def _accuracy(examples: Examples, weights_RE: Floats) -> Floats:
    predictions, labels = _classes(examples)
    accuracy_R: Floats = 100 * (weights_RE @ (predictions == labels) / weights_RE.sum(1))
    return accuracy_R


def _f1(examples: Examples, weights_RE: Floats) -> Floats:
    predictions, labels = _classes(examples)
    hits_R = weights_RE @ ((predictions == 1) & (labels == 1))
    return 100 * ratio(2 * hits_R, 2 * hits_R + weights_RE @ (predictions != labels))


def _matthews(examples: Examples, weights_RE: Floats) -> Floats:
    """Gorodkin (2004), for any number of classes C."""
    predictions, labels = _classes(examples)
    total_R, right_R = weights_RE.sum(1), weights_RE @ (predictions == labels)
    one_hot_CC = np.eye(int(max(predictions.max(), labels.max())) + 1)
    predicted_RC, true_RC = weights_RE @ one_hot_CC[predictions], weights_RE @ one_hot_CC[labels]
    covariance_R = right_R * total_R - (predicted_RC * true_RC).sum(1)
    spread_R = (total_R**2 - (predicted_RC**2).sum(1)) * (total_R**2 - (true_RC**2).sum(1))
    return 100 * ratio(covariance_R, np.sqrt(spread_R))


def _pearson(examples: Examples, weights_RE: Floats) -> Floats:
    return _correlation(examples.prediction_E, examples.label_E, weights_RE)


def _spearman(examples: Examples, weights_RE: Floats) -> Floats:
    """Ranks the values anew in each resample."""
    predicted_RE, true_RE = (_ranks(values_E, weights_RE) for values_E in (examples.prediction_E, examples.label_E))
    return _correlation(predicted_RE, true_RE, weights_RE)


def _correlation(x: Floats, y: Floats, weights_RE: Floats) -> Floats:
    """x and y are [E], or [R, E] where each resample has its own."""
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
    """Returns [R, E]: the mean rank of each example in each resample."""
    distinct_U, which_E = np.unique(values_E, return_inverse=True)
    order_E = np.argsort(which_E, kind="stable")
    first_U = np.searchsorted(which_E[order_E], np.arange(len(distinct_U)))
    counts_RU = np.add.reduceat(weights_RE[:, order_E], first_U, axis=1)
    ranks_RE: Floats = (np.cumsum(counts_RU, axis=1) - (counts_RU - 1) / 2)[:, which_E]
    return ranks_RE


_SHARE, _CORRELATION = (0.0, 100.0), (-100.0, 100.0)
ACCURACY = _task_metric(
    "accuracy", "right answers, %", bounds=_SHARE, value=_of_classes("accuracy_score"), resample=_accuracy
)
F1 = _task_metric(
    "f1", "F1 of the second class, x 100", bounds=_SHARE, value=_of_classes("f1_score", zero_division=0), resample=_f1
)
MATTHEWS = _task_metric(
    "matthews", "Matthews' correlation, x 100", bounds=_CORRELATION, value=_of_classes("matthews_corrcoef"),
    resample=_matthews,
)  # fmt: skip
PEARSON = _task_metric(
    "pearson", "Pearson's correlation, x 100", bounds=_CORRELATION, value=_of_numbers("pearsonr"), resample=_pearson
)
SPEARMAN = _task_metric(
    "spearman", "Spearman's rank correlation, x 100", bounds=_CORRELATION, value=_of_numbers("spearmanr"),
    resample=_spearman,
)  # fmt: skip
