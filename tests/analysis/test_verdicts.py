"""Statistics against scipy, brute force and simulation; verdicts against tables made by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy import stats

from orchestrator.analysis.arm_values import arm_values
from orchestrator.analysis.costs import Cost
from orchestrator.analysis.notes import Kind, Scope
from orchestrator.analysis.queries import MetricQuery, Records, TaskFacts
from orchestrator.analysis.statistics import (
    compare,
    decide,
    detectable_in_sd,
    holm,
    paired_t,
    rank_correlation,
    seeds_needed,
    sign_flip_p,
)
from orchestrator.analysis.verdicts import Verdict, confirm_verdict, judge
from orchestrator.reporting.notes import note_text
from orchestrator.scheduling.objective import measured
from orchestrator.study.claims import Claim
from orchestrator.study.schema import Study
from trainables.metrics.known import metric_named
from trainables.metrics.task_scores import score_metric

ROW = {
    "study": "s", "kind": "trial", "planned": True, "model": "student", "phase": "distil", "task": "corpus",
    "split": "test", "metric": "mlm_loss", "step": 400, "progress": 1.0, "tokens": 1000, "seconds": 8.0,
    "device_seconds": 8.0, "flops": 50.0, "t": 0,
}  # fmt: skip
RNG = np.random.default_rng(7)
NOISE = np.array([0.01, -0.012, 0.004, -0.003, 0.009, -0.008, 0.002, -0.002])


def tables(
    values: Mapping[str, Mapping[int, float]],
    *,
    failed: Mapping[str, tuple[int, ...]] | None = None,
    stopped: Mapping[str, tuple[int, ...]] | None = None,
    shared_teacher: bool = False,
    flops: Mapping[str, float] | None = None,
    **row: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One record and one trial for each arm and seed; failed seeds have a trial only."""
    rows, trials = [], []
    for arm, by_seed in values.items():
        cost = (flops or {}).get(arm, 50.0)
        status = {seed: "ended" for seed in by_seed}
        status |= dict.fromkeys((failed or {}).get(arm, ()), "failed")
        status |= dict.fromkeys((stopped or {}).get(arm, ()), "stopped")
        for seed, value in by_seed.items():
            common = {"trial": f"{arm}{seed}", "point": arm, "arm": arm, "seed": seed, "value": value}
            rows.append(ROW | common | {"flops": cost} | row)
        for seed, what in status.items():
            teach = {"key": f"teach{0 if shared_teacher else seed}", "reused": False, "flops": 30.0, "seconds": 4.0}
            own = {"key": f"{arm}{seed}", "reused": False, "flops": cost, "seconds": 8.0}
            phases = {"teach": teach | {"device_seconds": 4.0, "tokens": 500}}
            phases |= {"distil": own | {"device_seconds": 8.0, "tokens": 1000}}
            trials.append(
                {"trial": f"{arm}{seed}", "study": "s", "point": arm, "arm": arm, "seed": seed, "planned": True}
                | {"kind": row.get("kind", "trial"), "status": what, "reason": "nan" if what == "failed" else None}
                | {"phases": json.dumps(phases), "upstream_flops": 30.0, "upstream_seconds": 4.0}
            )
    return pd.DataFrame(rows), pd.DataFrame(trials)


def claim(arm: str = "good", against: str | tuple[str, ...] = "alone", **fields: Any) -> Claim:
    return Claim(arm=arm, against=against, **{"model": "student", "metric": "mlm_loss", **fields})


def verdict_of(results: pd.DataFrame, trials: pd.DataFrame, of: Any = None, **more: Any) -> Verdict:
    return judge({"c": of or claim()}, results, trials, default_phase="distil", **more)["c"]


def cost(
    results: pd.DataFrame, trials: pd.DataFrame, arm: str = "good", facts: TaskFacts | None = None, **query: Any
) -> Cost:
    """The mean cost of a trial."""
    at = MetricQuery(**{"phase": "distil", "model": "student", "metric": "mlm_loss", **query})
    found = arm_values(Records(results, trials, facts or TaskFacts()), (arm,), at)[1][arm]
    return Cost(*np.mean([each.total() for each in found.costs.values()], axis=0).tolist())


def around(mean: float, n: int = 5, *, spread: float = 1.0, base: float = 3.0) -> tuple[dict[int, float], ...]:
    """Two arms whose differences have about this mean and a small spread."""
    shared = base + 0.1 * np.arange(n)
    return dict(enumerate(shared + mean + spread * np.resize(NOISE, n))), dict(enumerate(shared))


def said(verdict: Verdict, text: str) -> bool:
    return any(text in note_text(note) for note in verdict.notes)


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("n", [2, 5, 25])
def test_the_paired_test_is_scipys(n: int) -> None:
    a, b = RNG.normal(1, 1, n), RNG.normal(0.5, 1, n)
    c = compare(dict(enumerate(a)), dict(enumerate(b)), lower_is_better=False, family_size=4)
    expected = stats.ttest_rel(a, b)
    assert c is not None
    assert c.p == pytest.approx(expected.pvalue)
    assert c.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert c.simultaneous == pytest.approx(tuple(expected.confidence_interval(1 - 0.05 / 4)))
    assert c.welch == pytest.approx(tuple(stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)))
    assert c.effect == pytest.approx(np.mean(a - b))
    assert c.sd == pytest.approx(np.std(a - b, ddof=1))
    assert c.correlation == (None if n == 2 else pytest.approx(stats.pearsonr(a, b).statistic))


@pytest.mark.parametrize("lower", [True, False])
def test_the_margin_is_a_gain_in_the_metrics_direction(lower: bool) -> None:
    a, b = RNG.normal(0, 1, 8), RNG.normal(0, 1, 8)
    c = compare(dict(enumerate(a)), dict(enumerate(b)), lower_is_better=lower, margin=0.3)
    assert c is not None
    assert c.p == pytest.approx(stats.ttest_1samp(b - a if lower else a - b, 0.3).pvalue)
    assert c.gain == pytest.approx(np.mean(b - a if lower else a - b))


def test_only_common_seeds_are_paired() -> None:
    c = compare({3: 1.0, 1: 2.0, 9: 5.0}, {1: 1.5, 3: 1.0, 4: 0.0}, lower_is_better=True)
    assert c is not None
    assert c.seeds == (1, 3)
    assert c.differences == (0.5, 0.0)
    assert compare({1: 1.0}, {2: 1.0}, lower_is_better=True) is None
    one = compare({1: 1.0}, {1: 3.0}, lower_is_better=True)
    assert one is not None
    assert (one.n, one.effect, one.gain, one.interval, one.p, one.p_floor) == (1, -2.0, 2.0, None, None, 1.0)


def test_equal_differences_are_no_evidence() -> None:
    c = compare({0: 1.1, 1: 2.1, 2: 3.1}, {0: 1.0, 1: 2.0, 2: 3.0}, lower_is_better=True)
    assert c is not None
    assert (c.sd, c.p, c.interval) == (0.0, 1.0, None)


def test_holm_is_what_a_hand_computes() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_a_claim_counts_until_each_of_its_hypotheses_is_rejected() -> None:
    """Of two hypotheses that exclude each other one may be true, until both are rejected."""
    assert holm([0.3, 0.001, 0.03], [0.3, 0.03]) == pytest.approx([0.3, 0.002, 0.06])
    assert holm([0.0001, 0.001, 0.03], [0.001, 0.03]) == pytest.approx([0.0002, 0.002, 0.03])


def test_a_verdict_needs_five_per_cent_and_a_side() -> None:
    assert [decide(p, 0.1) for p in (0.0, 0.05, 0.0501, 1.0)] == ["supported", "supported", "undecided", "undecided"]
    assert [decide(0.05, beyond) for beyond in (-0.1, 0.0)] == ["refuted", "undecided"]


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_sign_flip_p_is_that_of_all_patterns(n: int) -> None:
    d = np.round(RNG.normal(0.5, 1, n), 1)  # rounded: ties do happen
    patterns = np.array(list(itertools.product((-1, 1), repeat=n)))
    expected = np.mean(np.abs(patterns @ d) >= abs(d.sum()) - 1e-9)
    assert sign_flip_p(d) == pytest.approx(expected)
    assert sign_flip_p(np.arange(1.0, n + 1)) == 2.0 ** (1 - n)


def test_the_sign_flip_p_of_many_is_drawn_and_repeats() -> None:
    d = RNG.normal(0.4, 1, 17)
    exact = np.mean(np.abs(np.array(list(itertools.product((-1, 1), repeat=16))) @ d[:16] + d[16]) >= abs(d.sum()))
    assert sign_flip_p(d) == pytest.approx(exact, abs=6 * math.sqrt(exact * (1 - exact) / 20_000))
    assert sign_flip_p(d) == sign_flip_p(d)


def test_the_rank_correlation_is_spearmans() -> None:
    a, b = np.round(RNG.normal(size=12), 1), np.round(RNG.normal(size=12), 1)
    assert rank_correlation(a, b) == (pytest.approx(stats.spearmanr(a, b).statistic), 12)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) == (None, 2)
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == (None, 3)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_the_detectable_effect_has_power_of_four_fifths(n: int) -> None:
    effect = detectable_in_sd(n)
    z = np.random.default_rng(n).normal(effect, 1, (40_000, n))
    test = paired_t(z)
    assert np.mean((test.p <= 0.05) & (test.mean > 0)) == pytest.approx(0.8, abs=0.008)
    assert seeds_needed(effect * 1.0001) == n


def test_the_plans_figures_are_those_of_the_tables() -> None:
    assert seeds_needed(0.5) == 34  # Cohen's tables: paired t, d = .5, two-sided .05, power .8
    assert seeds_needed(-1.0) == 10
    assert seeds_needed(0.05) is None
    assert seeds_needed(0.0) is None
    assert detectable_in_sd(5) == pytest.approx(1.68, abs=0.01)
    assert detectable_in_sd(1) == math.inf


def test_every_direction_is_known_or_refused() -> None:
    assert all(
        metric_named(m).lower_is_better for m in ("mlm_loss", "lm_loss", "task_loss", "unfinished", "teacher_kl")
    )
    higher = ("mlm_accuracy", "matthews", "f1", "rougeL", "pearson", "spearman", "accuracy", "accuracy_matched")
    assert not any(metric_named(m).lower_is_better for m in (*higher, "teacher_original_agreement"))


# ------------------------------------------------------------------------------------------------------ simulation


def holm_by_hand(p: np.ndarray) -> np.ndarray:
    """Holm (1979), over the last axis."""
    order = np.argsort(p, axis=-1, kind="stable")
    steps = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(steps, axis=-1)), -1)
    return adjusted


REPLICATIONS = 40_000


@pytest.mark.parametrize("n", [5, 10, 20])
def test_the_interval_covers_as_it_says(n: int) -> None:
    d = np.random.default_rng(n).normal(0.3, 1, (REPLICATIONS, n))
    test = paired_t(d)
    assert np.mean(np.abs(test.mean - 0.3) <= test.half) == pytest.approx(0.95, abs=0.01)
    for row, mean, half, p in zip(d[:200], test.mean, test.half, test.p, strict=False):
        c = compare(dict(enumerate(row)), dict.fromkeys(range(n), 0.0), lower_is_better=True)
        assert c is not None
        assert c.interval == pytest.approx((mean - half, mean + half))
        assert c.p == pytest.approx(p)


@pytest.mark.parametrize(("n", "reported"), [(5, 0.881), (10, 0.896)])
def test_the_interval_of_skewed_differences_covers_less_as_the_protocol_reports(n: int, reported: float) -> None:
    test = paired_t(np.random.default_rng(n).exponential(1, (REPLICATIONS, n)))
    coverage = np.mean(np.abs(test.mean - 1) <= test.half)
    assert 0.86 <= coverage <= 0.91
    assert coverage == pytest.approx(reported, abs=0.006)


@pytest.mark.parametrize("baseline", ["own", "shared"])
def test_a_family_errs_no_more_often_than_it_says(baseline: str) -> None:
    rng, n, m = np.random.default_rng(11), 5, 4
    alone = rng.normal(size=(REPLICATIONS, m if baseline == "own" else 1, n))
    d = rng.normal(size=(REPLICATIONS, m, n)) - alone
    test = paired_t(d)
    wrong = holm_by_hand(test.p) <= 0.05  # which is `holm` of each row: see test_statistics
    three_errors = 3 * math.sqrt(0.05 * 0.95 / REPLICATIONS)
    assert np.mean(wrong.any(1)) <= 0.05 + three_errors
    three_errors = 3 * math.sqrt(0.025 * 0.975 / REPLICATIONS)
    for side in (test.mean > 0, test.mean < 0):
        assert np.mean((wrong & side).any(1)) <= 0.025 + three_errors  # in the family
        assert np.mean((test.p <= 0.05) & side) <= 0.025 + three_errors  # of one claim


def test_judge_says_what_the_simulated_core_says() -> None:
    rng, names = np.random.default_rng(3), ("a", "b", "c", "d")
    seen = set()
    for _ in range(12):
        alone = rng.normal(3, 0.1, 5)
        arms = {arm: alone + rng.normal(shift, 0.1, 5) for arm, shift in zip(names, (-0.3, 0, 0.3, 0.1), strict=True)}
        test = paired_t([alone - arms[arm] for arm in names])
        expected = [decide(p, g) for p, g in zip(holm_by_hand(test.p), test.mean, strict=True)]
        values = {arm: dict(enumerate(v)) for arm, v in (arms | {"alone": alone}).items()}
        verdicts = judge({arm: claim(arm) for arm in names}, *tables(values), default_phase="distil")
        assert [verdicts[arm].verdict for arm in names] == expected
        assert [verdicts[arm].p_adjusted for arm in names] == pytest.approx(holm_by_hand(test.p).tolist())
        seen |= set(expected)
    assert seen == {"supported", "refuted", "undecided"}


# -------------------------------------------------------------------------------------------------------- verdicts


def test_a_claim_may_compare_two_models() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone})
    bigger, _ = tables({"alone": {seed: value - 1 for seed, value in alone.items()}}, model="big")
    both = pd.concat([results, bigger])
    assert verdict_of(both, trials).verdict == "supported"
    verdict = verdict_of(both, trials, claim(against_model="big"))
    assert verdict.verdict == "refuted" and verdict.parts[0].effect == pytest.approx(0.9, abs=0.05)


def test_a_lower_loss_supports_and_a_higher_one_refutes() -> None:
    good, alone = around(-0.1)
    verdict = verdict_of(*tables({"good": good, "alone": alone}))
    assert verdict.verdict == "supported"
    assert verdict.seeds_more is None
    assert said(verdict, "on this evaluation set")
    assert [part.against for part in verdict.parts] == ["alone"]
    good, alone = around(+0.1)
    assert verdict_of(*tables({"good": good, "alone": alone})).verdict == "refuted"


def test_a_gain_below_the_margin_refutes_and_near_it_is_undecided() -> None:
    good, alone = around(-0.1)
    found = tables({"good": good, "alone": alone})
    assert verdict_of(*found, claim(margin=0.05)).verdict == "supported"
    assert verdict_of(*found, claim(margin=0.2)).verdict == "refuted"
    assert verdict_of(*found, claim(margin=0.1)).verdict == "undecided"


def test_an_undecided_claim_says_how_many_more_seeds() -> None:
    good, alone = around(-0.003)
    verdict = verdict_of(*tables({"good": good, "alone": alone}))
    c = verdict.parts[0]
    assert verdict.verdict == "undecided"
    assert c.sd is not None
    needed = seeds_needed(c.effect / c.sd)
    assert needed is not None
    assert verdict.seeds_more == needed - 5
    z = np.random.default_rng(0).normal(c.effect, c.sd, (20_000, needed))
    assert np.mean(paired_t(z).p <= 0.05) == pytest.approx(0.8, abs=0.03)
    family = {name: claim() for name in ("a", "b", "c", "d")}
    of_four = judge(family, *tables({"good": good, "alone": alone}), default_phase="distil")["a"]
    assert of_four.seeds_more == (seeds_needed(c.effect / c.sd, alpha=0.05 / 4) or 0) - 5
    good, alone = around(-NOISE[:5].mean() + 1e-5)
    assert verdict_of(*tables({"good": good, "alone": alone})).seeds_more is None


@pytest.mark.parametrize("metric", ["mlm_loss", "mlm_accuracy"])
@pytest.mark.parametrize("effect", [-0.1, 0.003, 0.1])
def test_swapping_the_arms_mirrors_the_verdict(metric: str, effect: float) -> None:
    good, alone = around(effect)
    found = tables({"good": good, "alone": alone}, metric=metric)
    one, other = (verdict_of(*found, claim(*pair, metric=metric)) for pair in (("good", "alone"), ("alone", "good")))
    mirror = {"supported": "refuted", "refuted": "supported", "undecided": "undecided"}
    assert other.verdict == mirror[one.verdict]
    assert other.p_adjusted == one.p_adjusted
    assert other.seeds_more == one.seeds_more
    assert other.parts[0].effect == pytest.approx(-one.parts[0].effect)


def test_holm_counts_each_family_for_itself() -> None:
    good, alone = around(-0.009)
    other, _ = around(0.001)
    found = tables({"good": good, "other": other, "alone": alone})
    claims = {"a": claim("good"), "b": claim("other"), "c": claim("other"), "d": claim("good", family="second")}
    verdicts = judge(claims, *found, default_phase="distil")
    raw = verdicts["a"].parts[0].p
    assert raw is not None
    assert verdicts["a"].p_adjusted == pytest.approx(3 * raw)
    assert verdicts["d"].p_adjusted == pytest.approx(raw)
    assert verdicts["a"].parts[0].family_size == 3


def test_a_claim_of_several_parts_needs_each_and_is_one_of_its_family() -> None:
    good, alone = around(-0.1)
    worse, same = around(+0.1, spread=-0.5)[0], around(-0.098, spread=0.5)[0]
    found = tables({"good": good, "alone": alone, "worse": worse, "same": same})
    claims = {
        "both": claim("good", ("alone", "worse")),
        "not_both": claim("good", ("alone", "same")),
        "lost_one": claim("alone", ("worse", "good")),
        "single": claim("good", "alone"),
    }
    verdicts = judge(claims, *found, default_phase="distil")
    assert [verdicts[name].verdict for name in claims] == ["supported", "undecided", "refuted", "supported"]
    assert [part.against for part in verdicts["both"].parts] == ["alone", "worse"]
    raw = {name: [part.p or 0 for part in verdict.parts] for name, verdict in verdicts.items()}
    (lost,) = (p for p, part in zip(raw["lost_one"], verdicts["lost_one"].parts, strict=True) if part.gain < 0)
    of_claims = [max(raw["both"]), max(raw["not_both"]), 2 * lost, raw["single"][0]]
    assert [verdicts[name].p_adjusted for name in claims] == pytest.approx(holm(of_claims))
    assert verdicts["single"].parts[0].family_size == 7  # comparisons
    assert verdicts["not_both"].seeds_more is not None


def test_a_list_of_one_is_one() -> None:
    assert claim(against=["alone"]) == claim(against="alone")  # type: ignore[arg-type]
    for wrong in ([], ["alone", "alone"]):
        with pytest.raises(ValidationError, match="expected one or several arms, each once"):
            claim(against=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"less": "flops"}, {"against": ["alone", "longer"]}], ids=str)
def test_no_wording_of_a_family_raises_its_error(fields: dict[str, Any]) -> None:
    """Five claims at 4 seeds, all arms alike but for 49.9 instead of 50 FLOPs, which any claim may call less."""
    claims = {f"c{i}": claim(f"arm{i}", **{"against": "alone", **fields}) for i in range(5)}
    rng, num, false, without_holm = np.random.default_rng(5), 12, 0, 0
    for _ in range(num):
        values = {
            arm: dict(enumerate(rng.normal(3, 0.1, 4)))
            for arm in (*(c.arm for c in claims.values()), "alone", "longer")
        }
        found = tables(values, flops={of.arm: 49.9 for of in claims.values()})
        judged = judge(claims, *found, default_phase="distil").values()
        false += any(v.verdict != "undecided" for v in judged)
        without_holm += any((part.p or 1) <= 0.05 for v in judged for part in v.parts)
    assert without_holm >= 2 and false <= 1


def test_an_untestable_claim_still_counts_in_its_family() -> None:
    good, alone = around(-0.1)
    claims = {"a": claim(), "b": claim("good", "missing")}
    verdicts = judge(claims, *tables({"good": good, "alone": alone}), default_phase="distil")
    assert verdicts["a"].p_adjusted == pytest.approx(2 * (verdicts["a"].parts[0].p or 0))
    assert (verdicts["b"].verdict, verdicts["b"].parts, verdicts["b"].p_adjusted) == ("undecided", (), 1.0)
    assert said(verdicts["b"], "'missing' has no test mlm_loss of 'student' in phase 'distil' at progress 1")


def test_a_verdict_that_hangs_on_one_seed_names_it() -> None:
    """Skewed differences err on one side: an outlier makes a verdict, or hides one."""
    alone = dict.fromkeys(range(8), 3.0)
    d = {seed: -0.1 - 0.001 * seed for seed in alone}
    hidden = verdict_of(*tables({"good": {s: 3.0 + d[s] + 0.5 * (s == 5) for s in alone}, "alone": alone}))
    assert hidden.verdict == "undecided" and said(hidden, "hangs on one seed: beside 'alone' p is ")
    assert said(hidden, "without seed 5 (both before Holm)")
    clear = verdict_of(*tables({"good": {s: 3.0 + d[s] for s in alone}, "alone": alone}))
    assert clear.verdict == "supported" and not said(clear, "hangs on one seed")
    noise = dict(enumerate(3.0 + np.array([-0.3, 0.2, 0.1, -0.2, 0.25, -0.15, 0.05, 0.1])))
    assert not said(verdict_of(*tables({"good": noise, "alone": alone})), "hangs on one seed")
    higher = {"metric": "mlm_accuracy"}
    up = tables({"good": {s: 3.0 - d[s] - 0.5 * (s == 5) for s in alone}, "alone": alone}, **higher)
    assert said(verdict_of(*up, claim(**higher)), "without seed 5 (both before Holm)")


# ------------------------------------------------------------------------------------------------------- equivalent


def test_a_difference_that_is_shown_to_be_small_is_equivalent() -> None:
    good, alone = around(0.0, 8)
    found = tables({"good": good, "alone": alone})
    verdict = verdict_of(*found, claim(within=0.02))
    d = [good[seed] - alone[seed] for seed in range(8)]
    sides = [stats.ttest_1samp(d, end, alternative=side).pvalue for end, side in ((-0.02, "greater"), (0.02, "less"))]
    assert verdict.verdict == "equivalent" and verdict.p_adjusted == pytest.approx(max(sides))
    assert verdict.claim.stated() == "good is better than alone (equivalent within ±0.02)"
    assert verdict_of(*found, claim(within=0.003)).verdict == "undecided"
    assert verdict_of(*found, claim()).verdict == "undecided"
    better, alone = around(-0.1, 8)
    assert verdict_of(*tables({"good": better, "alone": alone}), claim(within=0.5)).verdict == "supported"
    results, trials = found
    assert verdict_of(results, trials, claim(within=0.2), examples=answered(results)).holds == Scope.NEW_DATA
    wide = verdict_of(results, trials, claim(within=0.02), examples=answered(results, spread=2.0))
    assert wide.holds == Scope.THIS_SET and said(wide, "excludes differences of 0.02 or more")


def test_within_is_of_one_comparison() -> None:
    for fields in ({"margin": -0.1}, {"less": "flops"}, {"against": ("alone", "other")}):
        with pytest.raises(ValidationError, match="`within` is of one comparison"):
            claim(within=0.1, **fields)
    for within in (0, -0.1):
        with pytest.raises(ValidationError, match="within"):
            claim(within=within)


@pytest.mark.parametrize("true", [0.0, 0.2])
def test_what_may_be_equivalent_raises_no_error(true: float) -> None:
    """Of three claims all are alike, or one differs by just what is still called different."""
    rng, claims, false, num = np.random.default_rng(3), {f"a{i}": claim(f"a{i}", within=0.2) for i in range(3)}, 0, 15
    for _ in range(num):
        arms = {name: dict(enumerate(rng.normal(3 - true * (name == "a0"), 0.1, 8))) for name in (*claims, "alone")}
        judged = judge(claims, *tables(arms), default_phase="distil")
        false += any(
            v.verdict not in ("undecided", "supported" if true and n == "a0" else "equivalent")
            for n, v in judged.items()
        )
    assert false <= 2


# --------------------------------------------------------------------------------------------------- missing seeds


def test_one_failed_seed_of_eight_leaves_a_claim_undecided() -> None:
    good, alone = around(-0.1, 8)
    for side in ("good", "alone"):
        values = {"good": dict(good), "alone": dict(alone)}
        del values[side][3]
        verdict = verdict_of(*tables(values, failed={side: (3,)}))
        assert verdict.verdict == "undecided"
        assert verdict.seeds_more is None
        assert verdict.parts[0].n == 7
        assert verdict.p_adjusted == pytest.approx(stats.binomtest(7, 8).pvalue)
        assert said(verdict, f"'{side}' failed at seed 3: judged by a sign test over all seeds")


@pytest.mark.parametrize("side", ["good", "alone"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("metric", ["mlm_accuracy", "mlm_loss"])
def test_a_failed_seed_counts_as_worst_for_the_verdict(side: str, sign: int, metric: str) -> None:
    of, gain = claim(metric=metric), sign * (-1 if metric == "mlm_loss" else 1)

    def outcome(n: int, lost: tuple[int, ...], how: str) -> Verdict:
        good, alone = around(0.2 * gain, n)  # some 20 SDs
        values = {"good": good, "alone": alone}
        values[side] = {seed: value for seed, value in values[side].items() if seed not in lost}
        return verdict_of(*tables(values, **{how: {side: lost}}, metric=metric), of)

    wanted = "supported" if sign > 0 else "refuted"
    decided, weak = outcome(10, (1,), "failed"), outcome(10, (1, 2), "failed")
    assert (decided.verdict, weak.verdict) == (wanted, "undecided")
    assert said(decided, "worst for the verdict")
    assert decided.p_adjusted == pytest.approx(stats.binomtest(9, 10).pvalue)
    assert outcome(10, (1,), "stopped").verdict == wanted and outcome(10, (1, 2), "stopped").verdict == "undecided"


@pytest.mark.parametrize("num_stopped", [2, 4])
def test_stopping_an_arms_worst_seeds_supports_nothing(num_stopped: int) -> None:
    """Without a difference; it once made 22 and 44 % of claims supported at 10 seeds."""
    rng, supported, num = np.random.default_rng(num_stopped), 0, 40
    for _ in range(num):
        good, alone = rng.normal(3, 0.1, 10), rng.normal(3, 0.1, 10)
        stopped = tuple(int(seed) for seed in np.argsort(alone - good)[:num_stopped])
        kept = {seed: value for seed, value in enumerate(good) if seed not in stopped}
        found = tables({"good": kept, "alone": dict(enumerate(alone))}, stopped={"good": stopped})
        supported += verdict_of(*found).verdict == "supported"
    assert supported <= 2


def test_a_value_that_is_no_number_is_a_failed_seed() -> None:
    good, alone = around(-0.1)
    for bad in (math.nan, math.inf):
        verdict = verdict_of(*tables({"good": good | {2: bad}, "alone": alone}))
        assert verdict.verdict == "undecided"
        assert verdict.parts[0].n == 4
        assert said(verdict, "failed at seed 2")


def test_a_seed_that_failed_after_the_point_that_is_judged_has_its_value() -> None:
    good, alone = around(-0.1)
    verdict = verdict_of(*tables({"good": good, "alone": alone}, failed={"good": (2,)}, progress=0.5), claim(at=0.5))
    assert (verdict.verdict, verdict.parts[0].n) == ("supported", 5)


def test_a_stopped_trial_has_no_value_and_counts_as_failed() -> None:
    good, alone = around(-0.1)
    verdict = verdict_of(*tables({"good": good | {2: 99.0}, "alone": alone}, stopped={"good": (2,)}))
    assert verdict.parts[0].seeds == (0, 1, 3, 4)
    assert said(verdict, "1 stopped trials of 'good' count as failed") and verdict.verdict == "undecided"


def test_few_or_absent_seeds_are_undecided_and_say_so() -> None:
    good, alone = around(-0.1, 5)
    one = verdict_of(*tables({"good": {0: good[0]}, "alone": alone}))
    assert (one.verdict, one.parts[0].n, one.p_adjusted) == ("undecided", 1, 1.0)
    assert said(one, "n = 1:")
    two = verdict_of(*tables({"good": {0: good[0], 1: good[1]}, "alone": alone}), looks=(5,))
    assert said(two, "n = 2: provisional; 3 pairs or more decide") and two.verdict == "undecided"
    assert said(two, "provisional: 3 of 5 planned seeds of 'good'")
    late = verdict_of(*tables({"good": good, "alone": alone}), claim(at=0.25))
    assert late.verdict == "undecided"
    assert said(late, "at progress 0.25; it has 1")
    empty = tables({"good": good, "alone": alone})
    assert verdict_of(empty[0].head(0), empty[1].head(0)).verdict == "undecided"


# ----------------------------------------------------------------------------------------------------- the reading


def test_only_the_planned_trials_of_the_arm_at_the_reading_are_read() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone})
    decoys = [
        {"planned": False}, {"arm": None}, {"kind": "tune"}, {"kind": "confirm"}, {"model": "teacher"},
        {"phase": "teach"}, {"split": "dev"}, {"metric": "mlm_accuracy"}, {"progress": 0.5}, {"phase": "distillery"},
    ]  # fmt: skip
    noise = [results.assign(value=1e6, **decoy) for decoy in decoys]
    of = claim()
    assert verdict_of(pd.concat([results, *noise]), trials, of) == verdict_of(results, trials, of)


def test_several_tasks_are_averaged_inside_a_seed_and_named() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone})
    second = results.assign(task="wiki", value=results["value"] + 1)
    verdict = verdict_of(pd.concat([results, second]), trials)
    assert verdict.parts[0].arm_values == pytest.approx([v + 0.5 for v in good.values()])
    assert said(verdict, "corpus, wiki")
    assert verdict_of(pd.concat([results, second]), trials, claim(task="corpus")).parts[0].arm_values == pytest.approx(
        list(good.values())
    )
    lacking = second[~((second["arm"] == "good") & (second["seed"] == 4))]
    assert verdict_of(pd.concat([results, lacking]), trials).parts[0].seeds == (0, 1, 2, 3)


def test_a_fanned_out_phase_is_one_reading_and_one_cost() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone}, phase="distil[cola]", task="cola")
    both = pd.concat([results, results.assign(phase="distil[rte]", task="rte", tokens=500)])
    assert said(verdict_of(both, trials), "cola, rte")
    assert cost(both, trials).student_tokens == 1500


def test_repeats_within_a_seed_are_averaged_not_counted() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone})
    again = results.assign(value=results["value"] + 0.02)
    verdict = verdict_of(pd.concat([results, again]), trials)
    assert verdict.parts[0].n == 5
    assert verdict.parts[0].arm_values == pytest.approx([v + 0.01 for v in good.values()])


def test_costs_count_memoised_phases_and_the_axis_is_held_to_ten_per_cent() -> None:
    good, alone = around(-0.1)
    found = tables({"good": good, "alone": alone}, flops={"good": 99.0, "alone": 50.0})
    verdict = verdict_of(*found, claim(axis="flops"))
    assert cost(*found) == (1000, 129.0, 12.0)
    assert verdict.cost_ratios["alone"].flops == pytest.approx(99 / 50), "what both start from is no difference"
    assert said(verdict, "axis not equal: 'good' used 1.98 times the FLOPs of 'alone'")
    assert said(
        verdict, "excludes shared phases (teach); including them: ×1 student tokens, ×1.61 FLOPs, ×1 device time"
    )
    assert not said(verdict_of(*found, claim()), "axis")
    near = tables({"good": good, "alone": alone}, flops={"good": 54.0, "alone": 50.0})
    assert not said(verdict_of(*near, claim(axis="flops")), "axis")


def test_tokens_are_those_of_all_phases_that_train_the_model() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone})
    warmed = trials["phases"].str.replace('"teach"', '"warm[corpus]"').str.replace('"teach', '"warm')
    trials["phases"] = trials["phases"].where(trials["arm"] != "good", warmed)
    facts = TaskFacts(trains={"teach": ("teacher",), "warm": ("student",), "distil": ("student",)})
    verdict = verdict_of(results, trials, tasks=facts)
    tokens = [cost(results, trials, arm, facts=facts).student_tokens for arm in ("good", "alone")]
    assert tokens == [1500, 1000]
    assert said(verdict, "axis not equal: 'good' used 1.5 times the student tokens of 'alone'")


def test_one_teacher_for_all_seeds_is_named_as_such() -> None:
    good, alone = around(-0.1)
    values = {"good": good, "alone": alone}
    assert said(verdict_of(*tables(values, shared_teacher=True)), "for this one teacher")
    assert not said(verdict_of(*tables(values)), "teacher")
    results, trials = tables(values)
    trials["phases"] = trials["phases"].str.replace("teach4", "teach0")
    assert said(verdict_of(results, trials), "5 seeds share 4 runs of phase 'teach'")


def test_the_papers_figure_is_judged_apart() -> None:
    good, alone = around(-0.1)
    found = tables({"good": good, "alone": alone})
    judged = [verdict_of(*found, claim(paper=paper)).paper for paper in (-0.1, -0.5, 0.5, "+1.44 GLUE", None)]
    assert judged == ["inside", "below", "above", "not comparable", None]
    assert verdict_of(*found, claim(against=("alone", "other"), paper=-0.1)).paper == "not comparable"
    single = tables({"good": {0: 1.0}, "alone": alone})
    assert verdict_of(*single, claim(paper=-0.1)).paper == "not comparable"


# ------------------------------------------------------------------------------------------------------- new data


def answered(results: pd.DataFrame, num: int = 200, *, spread: float = 0.05, seed: int = 0) -> pd.DataFrame:
    """Losses of examples whose mean is the value that the results have; what is hard is hard for both arms of a seed, but
    for differences of this spread, which are those of the examples and not of the seeds."""
    draw, rows = np.random.default_rng(seed), []
    hard, gap = draw.gamma(2.0, 1.0, num), spread * draw.normal(size=num)
    for row in results.to_dict("records"):
        loss = hard + gap * (row["arm"] == "good") + 0.01 * draw.normal(size=num)
        loss = loss + row["value"] - loss.mean()
        about = {
            k: row[k] for k in ("trial", "point", "arm", "seed", "kind", "planned", "model", "phase", "task", "split")
        }
        columns = {
            "part": 0,
            "example": range(num),
            "label": np.nan,
            "prediction": np.nan,
            "loss": 3 * loss,
            "count": 3,
            "cluster": range(num),
        }
        rows.append(pd.DataFrame({**about, **columns}))
    return pd.concat(rows)


def test_a_verdict_that_new_examples_would_not_change_says_so() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone})
    verdict = verdict_of(results, trials, examples=answered(results))
    new, seeds = verdict.parts[0].new_data, verdict.parts[0].interval
    assert (verdict.verdict, verdict.holds) == ("supported", Scope.NEW_DATA)
    assert new is not None and seeds is not None and new[0] < verdict.parts[0].effect < new[1] < 0
    assert said(verdict, "on new data as well") and not said(verdict, "no interval over new examples")
    assert verdict == verdict_of(results, trials, examples=answered(results).sample(frac=1, random_state=1))


def test_a_verdict_that_hangs_on_its_examples_says_so() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone})
    verdict = verdict_of(results, trials, examples=answered(results, spread=2.0))
    new = verdict.parts[0].new_data
    assert new is not None and new[0] < 0 < new[1]
    assert (verdict.verdict, verdict.holds) == ("supported", Scope.THIS_SET)
    assert said(verdict, "the interval over new seeds excludes 0, the one over new seeds and new examples does not")
    near = verdict_of(results, trials, claim(margin=0.08), examples=answered(results, spread=0.3))
    assert (near.verdict, near.holds) == ("supported", Scope.THIS_SET) and said(near, "the margin 0.08")
    lost = verdict_of(results, trials, claim("alone", "good"), examples=answered(results))
    assert (lost.verdict, lost.holds) == ("refuted", Scope.NEW_DATA)


def test_what_only_this_test_set_shows_does_not_hold_on_new_data() -> None:
    """No difference on new data; this test set, whose examples come in 30 clusters with a correlation of .3, has one."""
    rng, num, decided, on_new = np.random.default_rng(8), 40, 0, 0
    for _ in range(num):
        cluster_E = np.repeat(np.arange(30), rng.integers(1, 9, 30))
        E = len(cluster_E)
        gap_E = math.sqrt(0.3) * rng.normal(size=30)[cluster_E] + math.sqrt(0.7) * rng.normal(size=E)
        gap_SE = gap_E + 0.05 * rng.normal(size=(5, 1)) + 0.3 * rng.normal(size=(5, E))
        values = {"good": dict(enumerate(3 + gap_SE.mean(1))), "alone": dict.fromkeys(range(5), 3.0)}
        results, trials = tables(values)
        rows = answered(results, num=E, spread=0.0)
        rows["loss"] = np.concatenate([*(3 * (3 + gap_SE)), np.full(5 * E, 9.0)])
        rows["cluster"] = np.tile(cluster_E, 10)
        verdict = verdict_of(results, trials, examples=rows)
        assert verdict.parts[0].new_data is not None
        decided += verdict.verdict != "undecided"
        on_new += verdict.holds == Scope.NEW_DATA
    assert decided / num > 0.4
    assert on_new / num <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / num)


def test_each_part_of_a_conjunctive_claim_must_hold_on_new_data() -> None:
    good, alone = around(-0.1)
    results, trials = tables({"good": good, "alone": alone, "other": {s: v + 0.001 for s, v in alone.items()}})
    both = claim("good", ("alone", "other"))
    assert verdict_of(results, trials, both, examples=answered(results)).holds == Scope.NEW_DATA
    rows = answered(results)
    draw = np.random.default_rng(1).normal(size=200)
    rows.loc[rows["arm"] == "other", "loss"] += np.tile(6 * (draw - draw.mean()), 5)
    verdict = verdict_of(results, trials, both, examples=rows)
    assert (verdict.verdict, verdict.holds) == ("supported", Scope.THIS_SET)


@pytest.mark.parametrize(
    ("change", "why"),
    [("none", "no answers are stored"), ("empty", "no answers are stored"), ("early", "at the end of a phase only"),
     ("dev", "at the end of a phase only"), ("failed", "a seed failed"), ("other", "answers to corpus are not stored for")],
)  # fmt: skip
def test_without_answers_the_verdict_says_that_there_is_no_such_interval(change: str, why: str) -> None:
    good, alone = around(-0.1)
    row = {"early": {"progress": 0.5}, "dev": {"split": "dev"}}.get(change, {})
    failed = {"good": (2,)} if change == "failed" else None
    if change == "failed":
        good = {seed: value for seed, value in good.items() if seed != 2}
    results, trials = tables({"good": good, "alone": alone}, failed=failed, **row)
    of = claim(at=0.5) if change == "early" else claim(split="dev") if change == "dev" else claim()
    examples = {"none": None, "empty": answered(results).head(0), "other": answered(results).assign(model="teacher")}
    verdict = verdict_of(results, trials, of, examples=examples.get(change, answered(results)))
    assert verdict.parts[0].new_data is None
    assert said(verdict, "no interval over new examples: ") and said(verdict, why)
    assert verdict.holds == (None if change == "failed" else Scope.THIS_SET)


def test_one_seed_speaks_of_its_two_runs_alone() -> None:
    results, trials = tables({"good": {0: 2.9}, "alone": {0: 3.0}})
    verdict = verdict_of(results, trials, examples=answered(results))
    assert (verdict.verdict, verdict.holds, verdict.parts[0].new_data) == ("undecided", None, None)
    assert said(verdict, "n = 1: an effect of two runs; its spread is unknown without a second seed")
    (note,) = (note for note in verdict.notes if note.kind == Kind.SINGLE_SEED_INTERVAL)
    low, high = note.about["interval"]
    assert low < -0.1 < high and f"[{low:+.3g}, {high:+.3g}]; other seeds may differ".replace("-", "−") in note_text(
        note
    )


# ----------------------------------------------------------------------------------------------- means over data sets


def fanned(
    *names: str, metric: str = "score", lack: tuple[str, int] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each data set a point higher than the one before; `lack`: data set and seed that `good` has not."""
    good, alone = around(-0.1, base=60.0)
    results, trials = tables({"good": alone, "alone": good}, metric=metric)
    rows = [results.assign(task=name, phase="finetune", value=results["value"] + i) for i, name in enumerate(names)]
    if lack:
        rows = [r[~((r["arm"] == "good") & (r["task"] == lack[0]) & (r["seed"] == lack[1]))] for r in rows]
    phases = {f"finetune[{name}]": {"key": name, "flops": 50.0, "device_seconds": 8.0} for name in names}
    trials["phases"] = [json.dumps({k: {**v, "key": f"{k}{i}"} for k, v in phases.items()}) for i in range(len(trials))]
    return pd.concat(rows), trials


def over(*names: str, each: bool = True) -> TaskFacts:
    scores = dict.fromkeys(names, score_metric("accuracy"))
    return TaskFacts({"finetune": names if each else ()}, scores, {n: n for n in names})


TASK = {"metric": "score", "phase": "finetune"}
QUERY = {"phase": "finetune", "metric": "score"}


@pytest.mark.parametrize("task", [None, "rte", ("rte",), ("sst2", "rte"), ["cola", "rte"]])
def test_a_claim_is_over_the_data_sets_that_it_names(task: Any) -> None:
    names = (
        {None: ("cola", "sst2", "rte"), "rte": ("rte",)}.get(task)
        if not isinstance(task, list | tuple)
        else tuple(task)
    )
    verdict = verdict_of(*fanned("cola", "sst2", "rte"), claim(task=task, **TASK), tasks=over("cola", "sst2", "rte"))
    assert names is not None and verdict.reading.tasks == names
    higher = np.mean([("cola", "sst2", "rte").index(name) for name in names])
    assert verdict.parts[0].arm_values == pytest.approx([v + higher for v in around(0, base=60.0)[1].values()])
    assert said(verdict, f"mean over {', '.join(names)}") == (len(names) > 1)
    assert list(verdict.by_task) == (list(names) if len(names) > 1 else [])
    for parts in verdict.by_task.values():
        assert parts[0].differences == pytest.approx(verdict.parts[0].differences)


def test_a_mean_over_fewer_data_sets_than_planned_is_missing() -> None:
    results, trials = fanned("cola", "rte")
    planned = over("cola", "rte", "qnli")
    verdict = verdict_of(results, trials, claim(**TASK), tasks=planned)
    assert (verdict.verdict, verdict.parts) == ("undecided", ())
    assert said(verdict, "'good' has no qnli at seed 0, 1, 2, 3, 4; a mean needs all data sets")
    assert verdict.by_task["cola"][0].n == 5 and verdict.by_task["qnli"] == ()
    lacking = verdict_of(*fanned("cola", "rte", lack=("rte", 3)), claim(**TASK), tasks=over("cola", "rte"))
    assert lacking.parts[0].seeds == (0, 1, 2, 4) and said(lacking, "'good' has no rte at seed 3")
    some = claim(task=None, metric="accuracy", phase="finetune")  # a part of a score, which not every task has
    assert verdict_of(*fanned("cola", "rte", metric="accuracy"), some, tasks=planned).parts[0].n == 5


def test_branches_of_a_phase_are_added_up_whatever_their_rows_call_it() -> None:
    whole = cost(*fanned("cola", "rte"), **QUERY)
    assert whole.student_tokens == 2000 and whole.flops == 100
    results, trials = fanned("cola", "rte")
    before = {f"teach[{name}]": {"key": name, "flops": 7.0, "device_seconds": 1.0} for name in ("cola", "rte")}
    trials["phases"] = [json.dumps({**before, **json.loads(cell)}) for cell in trials["phases"]]
    both, one = (verdict_of(results, trials, claim(task=task, **TASK)) for task in (None, "rte"))
    assert (
        cost(results, trials, **QUERY).flops == 100 + 14
        and cost(results, trials, tasks=("rte",), **QUERY).flops == 50 + 7
    )
    assert said(both, "all 5 seeds share one run of phase 'teach' on cola, rte: the verdict holds for this one teacher")
    assert said(one, "one run of phase 'teach' on rte:") and not said(one, "cola")


GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")


@pytest.mark.parametrize(
    ("names", "comparable"),
    [(GLUE, True), ((*GLUE, "wnli"), True), (GLUE[1:], False), (("rte",), True), (("cola", "x"), False)],
)
def test_an_average_over_some_of_glue_is_not_the_papers(names: tuple[str, ...], comparable: bool) -> None:
    tasks = over(*names)
    tasks = TaskFacts(tasks.each, tasks.scores, {n: n for n in names if n != "x"})
    verdict = verdict_of(*fanned(*names), claim(paper=0.1, **TASK), tasks=tasks)
    assert verdict.paper == ("inside" if comparable else "not comparable")
    assert said(verdict, "the average is not comparable with the papers'") == (not comparable)


@pytest.mark.parametrize(
    ("theirs", "names", "comparable"),
    [
        (("rte", "mrpc", "sst2", "qnli"), ("mrpc", "qnli", "rte", "sst2"), True),
        (("rte", "mrpc", "sst2", "qnli"), ("mrpc", "rte", "sst2"), False),
        (("rte", "mrpc", "sst2", "qnli"), GLUE, False),
        (("rte", "mrpc"), ("rte", "mrpc", "x"), False),
        (("rte",), ("rte",), True),
        (("rte",), ("x",), False),
        ("glue", GLUE, True),
        ("glue", (*GLUE, "wnli"), True),
        ((*GLUE, "wnli"), GLUE, False),
        ("glue", ("x",), False),
    ],
)
def test_a_figure_is_judged_on_the_average_over_its_own_tasks(
    theirs: Any, names: tuple[str, ...], comparable: bool
) -> None:
    tasks = over(*names)
    tasks = TaskFacts(tasks.each, tasks.scores, {n: n for n in names if n != "x"})
    of = claim(paper={"figure": 0.1, "over": theirs}, **TASK)
    verdict = verdict_of(*fanned(*names), of, tasks=tasks)
    assert of.figure == 0.1 and verdict.paper == ("inside" if comparable else "not comparable")
    assert said(verdict, "the average is not comparable with the papers'") == (not comparable)


def test_new_data_are_those_of_each_data_set() -> None:
    results, trials = fanned("cola", "rte", metric="task_loss")
    examples = answered(results, spread=0.2)
    verdict = verdict_of(
        results, trials, claim(metric="task_loss", phase="finetune"), tasks=over("cola", "rte"), examples=examples
    )
    assert verdict.parts[0].new_data is not None
    each = [parts[0].new_data for parts in verdict.by_task.values()]
    assert all(interval is not None for interval in each) and each[0] != each[1]


def test_a_claim_of_a_file_names_data_sets_once() -> None:
    about = {"arm": "a", "against": "b", "model": "m", "metric": "score"}
    assert Claim.model_validate({**about, "task": ["cola", "rte"]}).task == ("cola", "rte")
    assert Claim.model_validate({**about, "task": "cola"}).task == "cola"
    for wrong in ([], ["cola", "cola"]):
        with pytest.raises(ValueError, match=r"cola|least 1"):
            Claim.model_validate({**about, "task": wrong})


@pytest.mark.parametrize("task", [None, ["cola", "rte"], "rte"])
def test_an_objective_with_a_data_set_missing_is_missing(task: Any) -> None:
    what = {"phase": "finetune", "model": "student", "metric": "score", "mode": "max", "task": task}
    trial = {"phases": {"finetune": {"for_each_dataset": ["cola", "rte"]}}}
    study = Study(name="s", file="s.yaml", question="?", trial=trial, objective=what)  # type: ignore[arg-type]
    row = {"phase": "finetune", "model": "student", "metric": "score", "split": "dev", "progress": 1.0}
    records = [{**row, "task": name, "value": value} for name, value in (("cola", 40.0), ("rte", 60.0), ("other", 0.0))]
    assert measured(study, study.objective, records, {}) == (60.0 if task == "rte" else 50.0)
    assert measured(
        study, study.objective, [{**r, "phase": f"finetune[{r['task']}]"} for r in records], {}
    ) == measured(study, study.objective, records, {})
    assert measured(study, study.objective, [r for r in records if r["task"] != "rte"], {}) is None
    assert measured(study, study.objective, [{**r, "progress": 0.5} for r in records], {}) is None


# --------------------------------------------------------------------------------------------------------- confirm


def test_confirm_judges_the_winner_on_its_own_trials() -> None:
    good, alone = around(-0.1)
    results, trials = (t.assign(arm=None) for t in tables({"p07": good, "alone": alone}, kind="confirm"))
    searched = results.assign(kind="trial", value=0.0)
    at = MetricQuery("distil", "student", "mlm_loss")
    on_dev = results.assign(split="dev", value=results["value"] - 0.05 * (results["point"] == "p07"))
    whole = pd.concat([results, searched, on_dev])
    found = confirm_verdict(whole, trials, ("p07", "alone"), at, search_difference=-0.3)
    assert found.verdict == "supported"
    assert found.comparison is not None
    assert found.comparison.effect == pytest.approx(-0.1, abs=0.01)
    assert found.shrinkage == pytest.approx(-0.3 - (found.comparison.effect - 0.05)), "dev is compared with dev"
    lost = confirm_verdict(results.head(0), trials.head(0), ("p07", "alone"), at, search_difference=-0.3)
    assert (lost.verdict, lost.comparison, lost.shrinkage) == ("undecided", None, None)
