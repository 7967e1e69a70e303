"""What every metric keeps: a direction, a range, and values without some of the examples that agree with the plain value. Runs over the closed list, and
would run unchanged over a metric from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
from scipy import stats

from trainables.metrics.known import METRICS, metric_named
from trainables.metrics.metric import Examples, Metric
from trainables.metrics.replies import NAMED_BY_DATA
from trainables.metrics.rouge import rouge_l
from trainables.metrics.task_scores import RULES, score_metric

# `score` has a value only as the mean of a data set's own metrics
SCORES = [replace(score_metric(rule), name=f"score[{rule}]") for rule in RULES]
COMPUTED = [metric for metric in (*METRICS, *SCORES) if metric.value is not None]

Reference = Callable[[Examples], float]
CLASSES: Mapping[str, Reference] = {
    "accuracy": lambda e: 100 * sklearn.metrics.accuracy_score(e.label_E, e.prediction_E),
    "f1": lambda e: 100 * sklearn.metrics.f1_score(e.label_E, e.prediction_E),
    "matthews": lambda e: 100 * sklearn.metrics.matthews_corrcoef(e.label_E, e.prediction_E),
}
NUMBERS: Mapping[str, Reference] = {
    "pearson": lambda e: 100 * stats.pearsonr(e.prediction_E, e.label_E).statistic,
    "spearman": lambda e: 100 * stats.spearmanr(e.prediction_E, e.label_E).statistic,
}
REFERENCES: Mapping[str, Reference] = {
    **CLASSES,
    **NUMBERS,
    **{
        f"score[{rule}]": lambda e, names=tuple(m.name for m in metrics): np.mean(
            [({**CLASSES, **NUMBERS})[name](e) for name in names]
        )
        for rule, metrics in RULES.items()
    },
    **dict.fromkeys(("mlm_loss", "lm_loss", "task_loss"), lambda e: e.loss_E.sum() / e.count_E.sum()),
    "rougeL": lambda e: np.mean(e.prediction_E),
    **{metric.name: lambda e, name=metric.name: np.mean(e.scores[name]) for metric in NAMED_BY_DATA},
}


def some_examples(metric: Metric, num: int = 60, seed: int = 0) -> Examples:
    """Answers that are better than chance, with ties."""
    draw = np.random.default_rng(seed)
    if metric.name in NUMBERS or "pearson" in metric.name:
        labels = draw.integers(0, 11, num) / 2
        predictions = (labels + draw.normal(size=num)).round(1)
    elif metric.name == "rougeL":
        labels, words = np.full(num, np.nan), ["the", "map", "of", "a", "far", "sun"]
        texts = [" ".join(draw.choice(words, 5)) for _ in range(2 * num)]
        predictions = np.array(
            [rouge_l(text, [reference]) for text, reference in zip(texts[::2], texts[1::2], strict=True)]
        )
    else:
        labels = draw.integers(0, 2, num).astype(float)
        predictions = np.where(draw.random(num) < 0.7, labels, 1 - labels)
    counts = draw.integers(1, 6, num).astype(float)
    scores = {other.name: draw.integers(0, 101, num).astype(float) for other in NAMED_BY_DATA}
    return Examples(np.zeros(num, np.int64), labels, predictions, draw.gamma(2.0, 1.0, num) * counts, counts, scores)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_has_words_a_direction_and_a_range(metric: Metric) -> None:
    assert metric.words and metric.better in ("lower", "higher")
    assert metric.lower_is_better == (metric.better == "lower")
    if metric.bounds is None:
        assert metric.worst_and_best is None
    else:
        low, high = metric.bounds
        assert low < high and metric.worst_and_best == ((high, low) if metric.lower_is_better else (low, high))
    assert (metric.value is None) == (metric.left_out is None) == (not metric.needs)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_found_by_the_names_in_tables_and_by_no_other(metric: Metric) -> None:
    named = [f"teacher_{metric.name}", f"teacher_original_{metric.name}"] if metric.beside_model else [metric.name]
    named += [f"{metric.name}_matched", f"{metric.name}_mismatched"] if metric.by_part else []
    for name in named:
        assert metric_named(name) is metric
        assert [other for other in METRICS if other.is_recorded_as(name)] == [metric]
    for name in (f"_{metric.name}", f"{metric.name}_other", f"my{metric.name}", f"{metric.name}_"):
        assert not metric.is_recorded_as(name)


@pytest.mark.parametrize("metric", COMPUTED, ids=lambda metric: metric.name)
def test_the_value_is_the_librarys_and_lies_in_the_range(metric: Metric) -> None:
    for seed in range(5):
        examples = some_examples(metric, seed=seed)
        value = metric.value(examples)  # type: ignore[misc]
        assert value == pytest.approx(REFERENCES[metric.name](examples), rel=1e-12)
        assert metric.bounds is None or metric.bounds[0] <= value <= metric.bounds[1]


@pytest.mark.parametrize("metric", COMPUTED, ids=lambda metric: metric.name)
@pytest.mark.parametrize("num_clusters", [37, 9])
def test_a_value_without_a_cluster_is_that_of_the_others(metric: Metric, num_clusters: int) -> None:
    examples = some_examples(metric, 37)
    clusters = np.random.default_rng(1).permutation(np.arange(37) % num_clusters)
    values = metric.left_out(examples, clusters)  # type: ignore[misc]
    assert values.shape == (num_clusters + 1,)
    for cluster, value in enumerate(values):  # the last is of all examples
        assert value == pytest.approx(metric.value(examples.only(clusters != cluster)), rel=1e-12)  # type: ignore[misc]


@pytest.mark.parametrize("metric", COMPUTED, ids=lambda metric: metric.name)
def test_a_metric_reads_the_columns_that_it_needs(metric: Metric) -> None:
    examples = some_examples(metric)
    blank: dict[str, object] = {} if "scores" in metric.needs else {"scores": {}}
    blank |= {f"{c}_E": np.empty(0) for c in ("label", "prediction", "loss", "count") if c not in metric.needs}
    assert metric.value(replace(examples, **blank)) == metric.value(examples)  # type: ignore


def test_names_are_unique_and_an_unknown_one_is_refused_with_those_known() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for unknown in ("bleu4", "lossy", "tokens", "kl", "agreement", "loss"):
        with pytest.raises(
            ValueError, match=rf"unknown metric '{unknown}'; known metrics: mlm_loss, .*rougeL.*MODEL_kl"
        ):
            metric_named(unknown)
