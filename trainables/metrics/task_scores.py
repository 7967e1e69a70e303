"""How predictions of a task are scored, x 100: plainly, and for many resamples of the examples at once.

A rule names metrics; its `score` is their mean. Where a test set has parts (MNLI: matched, mismatched), each part is scored
by itself, and `score` is the mean over parts. What is undefined, since predictions or labels are all the same, counts 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainables.config.data import Glue, LabelledFiles, Tasks

Rule = Literal["accuracy", "f1", "accuracy_and_f1", "matthews", "pearson_and_spearman"]

METRICS: dict[Rule, tuple[str, ...]] = {
    "accuracy": ("accuracy",),
    "f1": ("f1",),  # of the second class
    "accuracy_and_f1": ("accuracy", "f1"),
    "matthews": ("matthews",),
    "pearson_and_spearman": ("pearson", "spearman"),
}
EXCHANGE_METRICS = ("lm_loss", "lm_accuracy", "rougeL", "greedy_rougeL", "unfinished")  # of prompts and replies
CELLS = 1 << 22  # numbers of one intermediate table of resamples

Floats = NDArray[np.float64]


def rule_of(task: Tasks) -> Rule:
    """GLUE's own rules (Wang et al. 2019); accuracy for other classes, correlations for other numbers."""
    if isinstance(task, Glue):
        own: dict[str, Rule] = {
            "cola": "matthews",
            "mrpc": "accuracy_and_f1",
            "qqp": "accuracy_and_f1",
            "stsb": "pearson_and_spearman",
        }
        return own.get(task.task, "accuracy")
    if isinstance(task, LabelledFiles) and task.score is not None:
        return task.score
    return "pearson_and_spearman" if task.is_regression else "accuracy"


def part_names(task: Tasks) -> tuple[str, ...]:
    """Parts of the test set that are scored one by one; none if there is but one."""
    return ("matched", "mismatched") if isinstance(task, Glue) and task.task == "mnli" else ()


def score_names(rule: Rule, parts: Sequence[str] = ()) -> tuple[str, ...]:
    """What `scores` returns, `score` first."""
    return ("score", *(f"{metric}_{part}" if part else metric for part in parts or ("",) for metric in METRICS[rule]))


def scores(
    rule: Rule,
    predictions_E: ArrayLike,
    labels_E: ArrayLike,
    parts_E: ArrayLike | None = None,
    part_names: Sequence[str] = (),
) -> dict[str, float]:
    """The rule's metrics and their mean, x 100. Predictions and labels are classes or numbers; `parts_E` count names."""
    predictions, labels = _values(rule, predictions_E), _values(rule, labels_E)
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels; each example needs one")
    found = {}
    for part, here in _parts(parts_E, len(labels)):
        for metric in METRICS[rule]:
            name = metric if parts_E is None else f"{metric}_{part_names[part] if part_names else part}"
            found[name] = 100 * PLAIN[metric](predictions[here], labels[here])
    return {"score": float(np.mean(list(found.values()))), **found}


def resampled_scores(
    rule: Rule, predictions_E: ArrayLike, labels_E: ArrayLike, parts_E: ArrayLike | None, weights_RE: ArrayLike
) -> Floats:
    """`score` [R] of each resample, in which example e stands weights_RE[r, e] times; ranks are taken anew in each.

    Each resample needs an example of each part.
    """
    predictions, labels, weights = _values(rule, predictions_E), _values(rule, labels_E), np.asarray(weights_RE)
    rows = max(1, CELLS // max(1, len(labels)))
    chunks = []
    for start in range(0, len(weights), rows):
        chunk = weights[start : start + rows].astype(np.float64)
        values = [
            values_R
            for _, here in _parts(parts_E, len(labels))
            for values_R in _resampled(METRICS[rule], predictions[here], labels[here], chunk[:, here])
        ]
        chunks.append(100 * np.mean(values, axis=0))
    return np.concatenate(chunks) if chunks else np.empty(0)


def _values(rule: Rule, values_E: ArrayLike) -> NDArray[Any]:
    return np.asarray(values_E).astype(np.float64 if rule == "pearson_and_spearman" else np.int64)


def _parts(parts_E: ArrayLike | None, num: int) -> Iterator[tuple[int, Any]]:
    """(number, which examples) of each part."""
    if parts_E is None:
        yield 0, slice(0, num)
        return
    parts = np.asarray(parts_E)
    for part in np.unique(parts).tolist():
        yield part, parts == part


# ------------------------------------------------------------------------------------------------- plainly, one by one


def _accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from sklearn.metrics import accuracy_score  # here and below, since it takes a second

    return float(accuracy_score(labels, predictions))


def _f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def _matthews(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one class only: 0
        return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from scipy.stats import pearsonr

    return _unless_constant(pearsonr, predictions, labels)


def _spearman(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from scipy.stats import spearmanr

    return _unless_constant(spearmanr, predictions, labels)


def _unless_constant(correlation: Callable[..., Any], predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nearly constant ones, as predictions are at first
        return float(correlation(predictions, labels).statistic)


PLAIN: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


# ----------------------------------------------------------------------------------------------- all resamples at once


def _resampled(
    metrics: Sequence[str], predictions: NDArray[Any], labels: NDArray[Any], weights_RE: Floats
) -> Iterator[Floats]:
    """Each metric [R]."""
    if "pearson" in metrics:
        yield _weighted_pearson(predictions, labels, weights_RE)
        yield _weighted_pearson(
            _weighted_ranks(predictions, weights_RE), _weighted_ranks(labels, weights_RE), weights_RE
        )
        return
    total_R, right_R = weights_RE.sum(1), weights_RE @ (predictions == labels)
    for metric in metrics:
        if metric == "accuracy":
            yield right_R / total_R
        elif metric == "f1":
            hits_R = weights_RE @ ((predictions == 1) & (labels == 1))
            yield _ratio(2 * hits_R, 2 * hits_R + total_R - right_R)
        elif metric == "matthews":  # Gorodkin (2004), for any number of classes
            each_C = np.eye(int(max(predictions.max(), labels.max())) + 1)
            guessed_RC, true_RC = weights_RE @ each_C[predictions], weights_RE @ each_C[labels]
            above_R = right_R * total_R - (guessed_RC * true_RC).sum(1)
            spread_R = (total_R**2 - (guessed_RC**2).sum(1)) * (total_R**2 - (true_RC**2).sum(1))
            yield _ratio(above_R, np.sqrt(spread_R))


def _weighted_pearson(x: Floats, y: Floats, weights_RE: Floats) -> Floats:
    """x and y are [E], or [R, E] where each resample has its own."""
    share_RE = weights_RE / weights_RE.sum(1, keepdims=True)
    x_RE, y_RE = (v - (share_RE * v).sum(1, keepdims=True) for v in (x, y))
    spread_R = np.sqrt((share_RE * x_RE**2).sum(1) * (share_RE * y_RE**2).sum(1))
    varies_R = _varies(x, weights_RE) & _varies(y, weights_RE)  # rounding would leave a little spread to a constant
    return np.where(varies_R, _ratio((share_RE * x_RE * y_RE).sum(1), spread_R), 0.0)


def _varies(values: Floats, weights_RE: Floats) -> NDArray[np.bool_]:
    least_R = np.where(weights_RE > 0, values, np.inf).min(1)
    most_R = np.where(weights_RE > 0, values, -np.inf).max(1)
    varies: NDArray[np.bool_] = most_R > least_R
    return varies


def _weighted_ranks(values: NDArray[Any], weights_RE: Floats) -> Floats:
    """[R, E]: the mean rank that an example has in each resample."""
    order_E = np.argsort(values, kind="stable")
    ordered = values[order_E]
    is_first = np.append(True, ordered[1:] != ordered[:-1])
    counts_RU = np.add.reduceat(weights_RE[:, order_E], np.flatnonzero(is_first), axis=1)  # of each distinct value
    ranks_RU = np.cumsum(counts_RU, axis=1) - (counts_RU - 1) / 2
    which_E = np.empty(len(values), np.int64)
    which_E[order_E] = np.cumsum(is_first) - 1
    ranks: Floats = ranks_RU[:, which_E]
    return ranks


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)
