"""Scores of tasks: against scikit-learn and scipy, against counting by hand, and without each cluster against the others."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from trainables.config.data import Glue, LabelledFiles, PythonTask, Rule
from trainables.metrics.metric import Examples, Floats
from trainables.metrics.task_scores import score_metric, score_names, scores

RULES: tuple[Rule, ...] = get_args(Rule)


def some_examples(rule: Rule, num: int = 60, seed: int = 0) -> tuple[Any, Any]:
    """(predictions, labels) that agree somewhat, with ties."""
    draw = np.random.default_rng(seed)
    if rule == "pearson_and_spearman":
        labels = draw.integers(0, 11, num) / 2
        return (labels + draw.normal(size=num)).round(1), labels.astype(np.float32)
    num_classes = 3 if rule in ("accuracy", "matthews") else 2
    labels = draw.integers(0, num_classes, num)
    return np.where(draw.random(num) < 0.6, labels, draw.integers(0, num_classes, num)), labels


def scores_without_each(rule: Rule, predictions: Any, labels: Any, parts: Any, clusters: Any) -> Floats:
    numbers = np.zeros(len(labels), np.int64) if parts is None else parts
    columns = (np.asarray(labels, dtype=float), np.asarray(predictions, dtype=float), np.empty(0), np.empty(0))
    left_out = score_metric(rule).left_out
    assert left_out is not None
    return left_out(Examples(numbers, *columns), np.asarray(clusters))


def test_scores_are_those_of_the_protocol() -> None:
    predictions, labels = [1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]  # 2 hits, 1 false alarm, 1 miss
    assert scores("accuracy", predictions, labels) == pytest.approx({"score": 400 / 6, "accuracy": 400 / 6})
    assert scores("accuracy_and_f1", predictions, labels)["score"] == pytest.approx((400 / 6 + 200 / 3) / 2)
    assert scores("f1", [1, 1, 1, 0], [1, 0, 0, 0])["score"] == pytest.approx(50)
    assert scores("matthews", predictions, labels)["score"] == pytest.approx(100 * (2 * 2 - 1) / 9)
    mean = scores("pearson_and_spearman", [1, 2, 3, 40], [1, 2, 3, 4])
    assert mean["spearman"] == pytest.approx(100) and mean["score"] == pytest.approx((100 + mean["pearson"]) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_the_libraries(seed: int) -> None:
    x, y = some_examples("pearson_and_spearman", seed=seed)
    found = scores("pearson_and_spearman", x, y)
    assert found["pearson"] == pytest.approx(100 * stats.pearsonr(x, y).statistic, rel=1e-6)
    assert found["spearman"] == pytest.approx(100 * stats.spearmanr(x, y).statistic, rel=1e-9)
    x, y = some_examples("matthews", seed=seed)
    assert scores("matthews", x, y)["score"] == pytest.approx(100 * metrics.matthews_corrcoef(y, x))


def test_parts_are_scored_one_by_one_and_count_alike() -> None:
    found = scores("accuracy", [0, 1, 2, 2], [0, 0, 2, 1], [0, 1, 0, 0], part_names=("matched", "mismatched"))
    assert found == pytest.approx({"accuracy_matched": 200 / 3, "accuracy_mismatched": 0, "score": 100 / 3})
    assert set(found) == set(score_names("accuracy", ("matched", "mismatched")))


@pytest.mark.parametrize("rule", RULES)
def test_names_are_those_of_the_scores(rule: Rule) -> None:
    assert tuple(scores(rule, *some_examples(rule))) == score_names(rule)


def test_each_task_has_its_rule() -> None:
    glue = {name: Glue(kind="glue", task=name).rule for name in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli")}
    assert list(glue.values()) == [
        "matthews",
        "accuracy",
        "accuracy_and_f1",
        "accuracy_and_f1",
        "pearson_and_spearman",
        "accuracy",
    ]
    assert Glue(kind="glue", task="mnli").part_names == ("matched", "mismatched")
    assert PythonTask(kind="python_task", task="topic").rule == "accuracy"
    assert LabelledFiles(kind="labelled_files", train="a.csv").rule == "pearson_and_spearman"
    assert LabelledFiles(kind="labelled_files", train="a.csv", classes=("a", "b"), score="f1").rule == "f1"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("constant", ["predictions", "labels", "both"])
def test_what_is_undefined_is_nothing_and_warns_nobody(rule: Rule, constant: str) -> None:
    predictions, labels = some_examples(rule)
    if constant in ("predictions", "both"):
        predictions = np.zeros_like(predictions) if rule != "pearson_and_spearman" else np.full(len(labels), 0.1)
    if constant in ("labels", "both"):
        labels = np.zeros_like(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(rule, predictions, labels)
        *without, again = scores_without_each(rule, predictions, labels, None, np.arange(len(labels)) % 5)
    assert again == pytest.approx(found["score"]) and len(without) == 5
    for metric in ("matthews", "pearson", "spearman"):
        assert found.get(metric, 0) == 0
    if constant == "both":
        assert found.get("accuracy", 0) in (0, 100) and found.get("f1", 0) == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("in_parts", [False, True])
def test_without_a_cluster_the_score_is_that_of_the_others(rule: Rule, in_parts: bool) -> None:
    predictions, labels = some_examples(rule, 37)
    parts = np.arange(37) % 2 if in_parts else None
    clusters = np.arange(37) // 4 * 2 + (0 if parts is None else parts)  # no cluster is in two parts
    clusters = np.unique(clusters, return_inverse=True)[1]
    found = scores_without_each(rule, predictions, labels, parts, clusters)
    for cluster, value in enumerate(found):
        others = clusters != cluster
        expected = scores(rule, predictions[others], labels[others], None if parts is None else parts[others])
        assert value == pytest.approx(expected["score"], abs=1e-9)
    assert found[-1] == pytest.approx(scores(rule, predictions, labels, parts)["score"])


def test_each_example_needs_its_prediction() -> None:
    with pytest.raises(ValueError, match="2 predictions for 3 labels"):
        scores("accuracy", [0, 1], [0, 1, 1])
