"""The interval over new seeds and new examples: against drawing again by hand, and over simulated data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from orchestrator.analysis.bootstrap import Answers, Missing, crossed, new_data, score, seed_of
from trainables.metrics.task_scores import scores


def answers(rule: Any = "accuracy", *, seeds: int = 3, parts: tuple[int, ...] = (40,), seed: int = 0) -> Answers:
    """The arm is right more often, and closer to the numbers, than what it is compared with."""
    draw, num = np.random.default_rng(seed), sum(parts)
    parts_E = np.repeat(np.arange(len(parts)), parts)
    if rule in ("loss", "mean", "pearson_and_spearman"):
        labels = draw.integers(0, 11, num) / 2
        values = np.abs(labels + draw.normal(0, [[[0.5]], [[1.0]]], (2, seeds, num)))
    else:
        labels = draw.integers(0, 2, num)
        right = draw.random((2, seeds, num)) < np.array([0.8, 0.6])[:, None, None]
        values = np.where(right, labels, 1 - labels)
    return Answers(
        rule, parts_E, labels.astype(float), values.astype(float), draw.integers(1, 5, values.shape).astype(float)
    )


def plainly(found: Answers, run: tuple[int, int], drawn_E: np.ndarray) -> float:
    """The score of one run on examples that are written out as often as they were drawn."""
    values, counts = found.values_ASE[run][drawn_E], found.counts_ASE[run][drawn_E]
    if found.rule == "loss":
        return float(values.sum() / counts.sum())
    if found.rule == "mean":
        return float(values.mean())
    parts = found.parts_E[drawn_E]
    return scores(found.rule, values, found.labels_E[drawn_E], parts if parts.any() else None)["score"]


@pytest.mark.parametrize("seeds", [1, 4])
def test_a_resample_is_what_writing_it_out_gives(seeds: int) -> None:
    rules = ("accuracy", "accuracy_and_f1", "matthews", "pearson_and_spearman", "loss", "mean")
    data = [answers(rule, seeds=seeds, parts=(25, 15) if i == 0 else (30,), seed=i) for i, rule in enumerate(rules)]
    R = 40
    drawn_RS = np.random.default_rng([9, 0]).multinomial(seeds, np.full(seeds, 1 / seeds), size=R)
    wider = 1.0 if seeds == 1 else stats.t.ppf(0.975, seeds - 1) / stats.norm.ppf(0.975) * np.sqrt(seeds / (seeds - 1))
    values = np.zeros((len(data), R))
    for t, found in enumerate(data):
        draw = np.random.default_rng([9, t + 1])
        members = [np.flatnonzero(found.parts_E == part) for part in np.unique(found.parts_E)]
        of_part = [
            inside[draw.integers(0, len(inside), (R, len(inside)))] for inside in members
        ]  # as many of each part
        for r, drawn_E in enumerate(np.concatenate(of_part, axis=1)):
            d_S = np.array([plainly(found, (0, s), drawn_E) - plainly(found, (1, s), drawn_E) for s in range(seeds)])
            again = np.repeat(d_S, drawn_RS[r]).mean()
            values[t, r] = d_S.mean() + wider * (again - d_S.mean())
    found = crossed(data, seed=9, num=R)
    assert found.mean == pytest.approx(tuple(np.percentile(values.mean(0), [2.5, 97.5])))
    for t, interval in enumerate(found.each):
        assert interval == pytest.approx(tuple(np.percentile(values[t], [2.5, 97.5])))


def test_large_data_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [answers("loss")]
    whole = crossed(data, seed=1)
    monkeypatch.setattr("orchestrator.analysis.bootstrap.CHUNK", 7 * 40 + 1)
    assert crossed(data, seed=1).mean == pytest.approx(whole.mean, rel=1e-12)


def _losses(d_SE: np.ndarray) -> Answers:
    """Losses of two arms that differ by d_SE."""
    S, E = d_SE.shape
    return Answers(
        "loss", np.zeros(E, np.int64), np.full(E, np.nan), np.stack([d_SE, np.zeros((S, E))]), np.ones((2, S, E))
    )


@pytest.mark.parametrize(
    ("between_seeds", "between_examples", "rest", "least"),
    [(1.0, 0.0, 0.1, 0.91), (0.3, 6.0, 1.0, 0.92), (1.0, 6.0, 2.0, 0.93), (0.3, 1.0, 12.0, 0.95)],
)
def test_it_covers_the_true_difference_whatever_the_spread_comes_from(
    between_seeds: float, between_examples: float, rest: float, least: float
) -> None:
    rng, n, E, replications = np.random.default_rng(4), 5, 40, 400
    hits = seeds_alone = 0
    for i in range(replications):
        d = 0.2 + between_seeds * rng.normal(size=(n, 1)) + between_examples * rng.normal(size=(1, E))
        d = d + rest * rng.normal(size=(n, E))
        low, high = crossed([_losses(d)], seed=i, num=300).mean
        hits += low <= 0.2 <= high
        alone = stats.ttest_1samp(d.mean(1), 0.0).confidence_interval(0.95)
        seeds_alone += alone.low <= 0.2 <= alone.high
    assert hits / replications >= least
    if between_examples > 5:  # why there is this interval at all
        assert seeds_alone / replications < 0.87


def test_where_examples_do_not_matter_it_is_as_wide_as_students() -> None:
    d_S = np.random.default_rng(0).normal(size=12)
    low, high = crossed([_losses(np.repeat(d_S[:, None], 30, axis=1))], seed=0).mean
    expected = stats.ttest_1samp(d_S, 0.0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.12 * (expected.high - expected.low))


# ------------------------------------------------------------------------------------------------------- the table


def table(found: Answers, task: str = "rte") -> pd.DataFrame:
    rows = []
    for a, side in enumerate(("good", "alone")):
        for s in range(found.values_ASE.shape[1]):
            values = found.values_ASE[a, s]
            columns = {
                "part": found.parts_E,
                "example": np.arange(len(values)),
                "label": found.labels_E,
                "prediction": values,
            }
            rows.append(pd.DataFrame({"side": side, "seed": 7 + s, "task": task, "loss": 0.5, "count": 1, **columns}))
    return pd.concat(rows[::-1]).sample(frac=1, random_state=0)


def drawn(rows: pd.DataFrame, found: Answers, metric: str = "score", **more: Any) -> Any:
    how: dict[str, Any] = {"recorded": {"rte": score(found)}, "rules": {"rte": "accuracy"}, **more}
    return new_data(rows, ("good", "alone"), (7, 8, 9), how["recorded"], metric, how["rules"], seed=3)


def test_rows_in_any_order_give_the_arrays() -> None:
    found = answers(parts=(20, 20))
    assert drawn(table(found), found) == crossed([found], seed=3)
    assert drawn(table(found), found, "task_loss", recorded={"rte": np.full((2, 3), 0.5)}).mean == (0.0, 0.0)


@pytest.mark.parametrize(
    ("what", "said"),
    [("none", "none are stored"), ("seed", "not stored for 'alone' at seed 9"), ("other", "same examples of rte"),
     ("label", "same examples of rte"), ("twice", "several runs"), ("value", "not give the value that was recorded")],
)  # fmt: skip
def test_what_cannot_be_compared_says_why(what: str, said: str) -> None:
    found = answers()
    rows, recorded = table(found), {"rte": score(found)}
    last = (rows["side"] == "alone") & (rows["seed"] == 9)
    match what:
        case "none":
            rows = rows.head(0)
        case "seed":
            rows = rows[~last]
        case "other":
            rows.loc[last, "example"] += 1
        case "label":
            rows.loc[last, "label"] = 1 - rows.loc[last, "label"]
        case "twice":
            rows = pd.concat([rows, rows])
        case "value":
            recorded = {"rte": score(found) + 1.0}
    with pytest.raises(Missing, match=said):
        drawn(rows, found, recorded=recorded)


def test_a_metric_that_is_no_score_of_examples_says_so() -> None:
    found = answers()
    for metric, rules in (("mlm_accuracy", {}), ("score", {}), ("spearman", {"rte": "pearson_and_spearman"})):
        with pytest.raises(Missing, match=f"{metric} of rte is not scored by example"):
            drawn(table(found), found, metric, rules=rules)
    assert drawn(table(found), found, "accuracy", rules={"rte": "accuracy_and_f1"}).mean[0] < 40


def test_replies_are_scored_each_by_itself_and_have_no_label() -> None:
    found = answers("mean")
    rows = table(found, "ask").assign(label=None)
    how = {"recorded": {"ask": score(found)}, "rules": {}}
    assert score(found) == pytest.approx(found.values_ASE.mean(-1))
    assert drawn(rows, found, "rougeL", **how) == crossed([found], seed=3)
    for metric in ("greedy_rougeL", "unfinished", "lm_accuracy"):  # of which no example has one
        with pytest.raises(Missing, match=f"{metric} of ask is not scored by example"):
            drawn(rows, found, metric, **how)


def test_a_claim_draws_the_same_whatever_stands_beside_it() -> None:
    assert seed_of("a", "b") == seed_of("a", "b") != seed_of("b", "a")
