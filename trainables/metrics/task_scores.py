"""Scores of tasks. A rule names metrics, and `score` is their mean, x 100.

Where a test set has parts (MNLI: matched, mismatched), each part is scored by itself, and `score` is the mean over parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from trainables.config.data import Rule
from trainables.metrics.metric import Clusters, Examples, Floats, Metric
from trainables.metrics.task_metrics import ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN

RULES: Mapping[Rule, tuple[Metric, ...]] = {
    "accuracy": (ACCURACY,),
    "f1": (F1,),
    "accuracy_and_f1": (ACCURACY, F1),
    "matthews": (MATTHEWS,),
    "pearson_and_spearman": (PEARSON, SPEARMAN),
}
SCORE = Metric("score", "mean of the task's own metrics, x 100", "higher", (-100.0, 100.0))


def score_metric(rule: Rule) -> Metric:
    """Returns `score` as a data set of this rule computes it from examples."""
    metrics = RULES[rule]

    def value(examples: Examples) -> float:
        return float(np.mean([m.value(part) for part, _ in examples.parts() for m in metrics if m.value]))

    def left_out(examples: Examples, clusters_E: Clusters) -> Floats:
        parts, changed_C, whole = list(examples.parts()), np.zeros(int(clusters_E.max()) + 2), list[float]()
        for part, here_E in parts:
            own_C, number_E = np.unique(clusters_E[here_E], return_inverse=True)
            for values_C in (m.left_out(part, number_E) for m in metrics if m.left_out):
                whole.append(float(values_C[-1]))
                changed_C[own_C] += values_C[:-1] - values_C[-1]
        left_out_C: Floats = np.mean(whole) + changed_C / len(whole)
        return left_out_C

    return replace(SCORE, needs=("label", "prediction"), value=value, left_out=left_out)


def score_names(rule: Rule, parts: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the names that `scores` records, `score` first."""
    return (SCORE.name, *(f"{m.name}_{part}" if part else m.name for part in parts or ("",) for m in RULES[rule]))


def scores(
    rule: Rule,
    predictions_E: ArrayLike,
    labels_E: ArrayLike,
    parts_E: ArrayLike | None = None,
    *,
    part_names: Sequence[str] = (),
) -> dict[str, float]:
    """Computes the rule's metrics and their mean, x 100, from predicted classes or numbers.

    `parts_E` holds the number of each example's part of the test set.
    """
    predictions, labels = np.asarray(predictions_E, dtype=np.float64), np.asarray(labels_E, dtype=np.float64)
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels; each example needs one")
    numbers = np.zeros(len(labels), np.int64) if parts_E is None else np.asarray(parts_E, dtype=np.int64)
    found: dict[str, float] = {}
    for part, _ in Examples(numbers, labels, predictions, np.empty(0), np.empty(0)).parts():
        number = int(part.part_E[0])
        suffix = "" if parts_E is None else f"_{part_names[number] if part_names else number}"
        found |= {f"{m.name}{suffix}": m.value(part) for m in RULES[rule] if m.value}
    return {SCORE.name: float(np.mean(list(found.values()))), **found}
