"""Choices where the truth is known: rates tuned by the race, and winners of a search confirmed, as a report judges them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.choices import SD, confirmed, rate_search, rounds, tuned_rates
from benchmarks.error_rates import ROWS, tuned
from orchestrator.analysis.race import choose, contenders
from orchestrator.analysis.statistics import ALPHA, run_noise

COSTS = {1e-3: 0.14, 1e-2: 0.0, 1e-1: 0.14}  # one SD of a paired difference


def disagreements(costs: dict[float, float], *, seeds: int, num: int = 400) -> tuple[float, float]:
    """The share of studies in which two equal arms take rates that differ in cost, and the trials of one arm."""
    rng = np.random.default_rng(0)
    found = [tuned_rates(rng, costs, seeds=seeds) for _ in range(num)]
    differ = [costs[rates["a"]] != costs[rates["alone"]] for rates, _ in found]
    return float(np.mean(differ)), float(np.mean([trials / 2 for _, trials in found]))


def test_equal_arms_take_the_same_rate_more_often_by_several_seeds() -> None:
    """.39 of studies by one run each, .15 by up to three seeds, .09 by up to five; a race takes fewer trials than the grid."""
    one, three, five = (disagreements(COSTS, seeds=seeds) for seeds in (1, 3, 5))
    assert one[0] == pytest.approx(0.39, abs=0.06) and one[1] == 3
    assert three[0] == pytest.approx(0.16, abs=0.05) and 6 < three[1] < 8.5
    assert five[0] == pytest.approx(0.11, abs=0.05) and five[1] < 12
    at_an_edge = {1e-3: 0.0, 1e-2: 0.14, 1e-1: 0.28}
    assert disagreements(at_an_edge, seeds=3)[0] < 0.5 * disagreements(at_an_edge, seeds=1)[0]


def test_fewer_verdicts_are_false_where_rates_were_tuned_on_three_seeds() -> None:
    """Judged at n = 10: 34 % by one tuning seed, 16 % by three."""
    rng = np.random.default_rng(1)
    share = np.mean([tuned(rng, seeds=3, n=10, costs=(1, 0, 1)) for _ in range(60)])
    assert 0.05 <= share <= 0.24


def test_the_race_drops_what_is_clearly_worse_and_chooses_the_best_mean() -> None:
    scores = {1.0: {0: 5.0, 1: 6.01}, 2.0: {0: 3.0, 1: 4.0}, 4.0: {0: 3.01, 1: 3.99}}
    assert contenders(scores) == [2.0, 4.0] and choose(scores, 2.0) == 2.0
    assert contenders({value: {0: by_seed[0]} for value, by_seed in scores.items()}) == [1.0, 2.0, 4.0]
    assert choose({**scores, 4.0: {0: 1.0}}, 2.0) == 2.0, "it failed at a seed, or was dropped"
    assert choose({1.0: {0: 1.0}, 2.0: {0: 1.0}, 4.0: {0: 1.0}}, 2.0) == 2.0, "of equal means the middle"
    assert choose({1.0: {}, 2.0: {}}, 2.0) is None and contenders({1.0: {}, 2.0: {}}) == []


def test_the_noise_of_a_run_is_without_what_runs_and_seeds_have_in_common() -> None:
    rng = np.random.default_rng(0)
    groups = [
        5 * rng.normal(size=(3, 1)) + 7 * rng.normal(size=(1, 4)) + 0.5 * rng.normal(size=(3, 4)) for _ in range(200)
    ]
    found = run_noise(groups)
    assert (found.sd, found.df) == (pytest.approx(0.5, rel=0.05), 1200)
    assert found.error(4) == pytest.approx(found.sd / 2**0.5) and found.clear(4) == pytest.approx(
        1.96 * found.error(4), rel=0.01
    )
    assert np.isnan(run_noise([]).clear())


def test_a_search_over_the_rate_alone_recommends_no_arm_that_is_no_better() -> None:
    """Against the baseline's fixed rate nine in ten winners are supported; against the baseline at their rate 2 %."""
    rng = np.random.default_rng(2)
    found = np.array([rate_search(rng, (4 * SD, 0.0, 0.0)) for _ in range(40)])
    assert found[:, 0].mean() > 0.8 and found[:, 1].mean() <= ALPHA


def test_ten_rounds_of_confirmation_are_counted() -> None:
    rng = np.random.default_rng(3)
    assert sum(rounds(rng, num=10) for _ in range(6)) <= 1
    alone = 3 + 0.1 * rng.normal(size=5)
    losses = {"p000": alone - 0.1 + np.array([-0.04, 0.06, 0.0, 0.05, -0.07]), "alone": alone}
    found = [confirmed(losses, earlier=earlier) for earlier in (0, 1, 9)]
    assert [(c.num_rounds, c.verdict) for c in found] == [(1, "supported"), (2, "supported"), (10, "undecided")]
    assert [c.level for c in found] == pytest.approx([ALPHA, ALPHA / 2, ALPHA / 90])
    levels = [ALPHA, *(ALPHA / (k * (k - 1)) for k in range(2, 10_000))]
    assert sum(levels) / 2 <= ALPHA, "each is two-sided, and falsely supported by half"


def test_equal_cost_is_judged_only_where_equal_steps_is_supported() -> None:
    rng = np.random.default_rng(4)
    alone, noise = 3 + 0.1 * rng.normal(size=5), np.array([-0.01, 0.02, 0.0, -0.02, 0.01])
    other = 0 * noise
    cases = {(0.2, 0.1): ("supported", "supported"), (0.2, -0.1): ("supported", "refuted"), (0.2, 0.0): ("supported", "undecided"),
             (0.0, 0.1): ("undecided", "undecided"), (-0.2, 0.1): ("refuted", "refuted")}  # fmt: skip
    for (at_steps, at_cost), verdicts in cases.items():
        losses = {"p0": alone - at_steps + noise, "alone": alone, "longer": alone - at_steps + at_cost + other}
        found = confirmed(losses, at_cost="longer")
        assert (found.at_steps, found.verdict) == verdicts, (at_steps, at_cost)
    better_than_one = {"p0": alone - 0.2 + noise, "alone": alone, "alone at settings of p0": alone - 0.2 + other}
    assert confirmed(better_than_one).verdict == "undecided", "each rival must be beaten"


def test_the_rows_of_choices_are_in_the_table() -> None:
    names = [name for name in ROWS if name.startswith(("tuned on", "winner:"))]
    assert len(names) == 21
