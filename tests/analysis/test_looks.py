"""Planned looks: the error over all of them, what they find, and how verdicts are decided at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from orchestrator.analysis.looks import expected, level_of, over_looks
from orchestrator.analysis.statistics import ALPHA, MIN_PAIRS, paired_t
from orchestrator.analysis.verdicts import PlannedLook, Verdict, judge
from orchestrator.reporting.claim_lines import answer, claim_lines
from orchestrator.study.claims import Claim
from orchestrator.study.schema import Looks
from tests.analysis.test_verdicts import claim, tables

DEFAULT = Looks().looks
PLANS = [DEFAULT, (3, 5, 8), (4, 20), (3, 4, 5, 6, 7, 8, 9, 10), (10, 30)]


def least_p(looks: tuple[int, ...], num: int = 20_000) -> Any:
    """The least p over the looks of pairs without a difference, each drawn."""
    d = np.random.default_rng(5).normal(size=(num, looks[-1]))
    return np.minimum.reduce([paired_t(d[:, :n]).p for n in looks])


def test_the_default_looks_have_their_level() -> None:
    assert DEFAULT == (5, 8, 12, 20) and DEFAULT[0] >= MIN_PAIRS
    assert level_of(DEFAULT) == pytest.approx(0.0162, abs=0.0005)


@pytest.mark.parametrize("looks", PLANS)
def test_all_looks_together_err_with_alpha(looks: tuple[int, ...]) -> None:
    """20,000 drawn paths: ±0.3 points (two standard errors) of 5 %, and ±0.15 of 1 %, as the first of five claims has."""
    least = least_p(looks)
    for alpha, tolerance in ((0.05, 0.004), (0.01, 0.002)):
        assert np.mean(least <= level_of(looks, alpha)) == pytest.approx(alpha, abs=tolerance)


def test_a_p_over_looks_is_itself_for_one_and_rises_for_more() -> None:
    assert [over_looks(p, (7,)) for p in (0, 1e-9, 0.3, 1)] == [0, 1e-9, 0.3, 1]
    ps = [0.0, 1e-12, 1e-6, 1e-3, 0.0162, 0.05, 0.3, 1.0]
    worth = [over_looks(p, DEFAULT) for p in ps]
    assert worth == sorted(worth) and all(p <= each <= min(1, 4 * p) for p, each in zip(ps, worth, strict=True))
    assert over_looks(level_of(DEFAULT), DEFAULT) == pytest.approx(ALPHA, abs=1e-4)


@pytest.mark.parametrize(("effect", "power", "mean_n"), [(0.5, 0.43, 17.5), (0.7, 0.72, 15.3), (1.0, 0.96, 11.5), (1.5, 1.0, 7.5)])  # fmt: skip
def test_looks_find_what_was_measured(effect: float, power: float, mean_n: float) -> None:
    found = expected(DEFAULT, effect)
    assert found.power[-1] == pytest.approx(power, abs=0.012) and found.mean_n == pytest.approx(mean_n, abs=0.15)
    assert [*found.power] == sorted(found.power) and found.power[-1] > expected(DEFAULT, effect, ALPHA / 5).power[-1]


# ---------------------------------------------------------------------------------------------------------- verdicts


def at_looks(arms: Mapping[str, Any], claims: Mapping[str, Claim], looks: tuple[int, ...] = DEFAULT) -> dict[str, Verdict]:  # fmt: skip
    values = {arm: dict(enumerate(map(float, numbers))) for arm, numbers in arms.items()}
    return judge(claims, *tables(values), default_phase="distil", looks=looks)


def arms(rng: np.random.Generator, num: int, n: int = 20, gain: float = 0.0) -> dict[str, Any]:
    """Arms whose differences to `alone` have the SD 1; the first is better by `gain`."""
    drawn = {f"a{i}": 3 + rng.normal(-gain * (i == 0), 0.5**0.5, n) for i in range(num)}
    return {**drawn, "alone": 3 + rng.normal(0, 0.5**0.5, n)}


@pytest.mark.parametrize(("num_claims", "repetitions"), [(1, 20), (5, 4)])
def test_no_difference_is_seldom_decided_at_any_look(num_claims: int, repetitions: int) -> None:
    """Tables, judged; 5 % is the truth. Three standard errors are allowed: 15 points of 20, 33 of 4."""
    rng, claims = np.random.default_rng(11), {f"c{i}": claim(f"a{i}") for i in range(num_claims)}
    false = sum(
        any(v.verdict != "undecided" for v in at_looks(arms(rng, num_claims), claims).values())
        for _ in range(repetitions)
    )
    assert false / repetitions <= 0.05 + 3 * (0.05 * 0.95 / repetitions) ** 0.5


def test_what_a_look_decides_stays_decided() -> None:
    rng = np.random.default_rng(3)
    alone, noise = 3 + rng.normal(0, 1, 20), rng.normal(0, 0.02, 20)
    turned = alone - 1 + 3 * (np.arange(20) >= 5) + noise  # better by 1 at five seeds, worse by 2 later
    found = at_looks({"good": turned, "alone": alone}, {"c": claim()})["c"]
    assert (found.verdict, found.look, found.parts[0].n) == ("supported", PlannedLook(5, False), 5)


def test_a_look_judges_its_seeds_alone_and_waits_for_all_of_them() -> None:
    rng = np.random.default_rng(4)
    drawn = arms(rng, 2)
    claims = {"c": claim("a0"), "d": claim("a1")}
    for n, awaited in ((3, 5), (5, 8), (7, 8), (8, 12), (19, 20)):
        seen = {arm: values[:n] for arm, values in drawn.items()}
        found = at_looks(seen, claims)
        assert {v.look for v in found.values()} == {PlannedLook(awaited, True)}
        assert {v.verdict for v in found.values()} == {"undecided"} and all(v.is_open for v in found.values())
    assert {v.look for v in at_looks(drawn, claims).values()} == {PlannedLook(20, False)}
    lacking = at_looks({**drawn, "a1": drawn["a1"][:7]}, claims)
    assert {v.look for v in lacking.values()} == {PlannedLook(8, True)}, "Holm needs the whole family"
    apart = {"c": claims["c"], "d": claim("a1", family="own")}
    assert [v.look for v in at_looks({**drawn, "a1": drawn["a1"][:7]}, apart).values()] == [PlannedLook(20, False), PlannedLook(8, True)]  # fmt: skip


def test_claims_that_are_decided_count_no_more_in_holms_steps() -> None:
    """The second claim's p is between the levels of the first and of the last of two claims."""
    base = np.zeros(8)
    differences = np.resize([1.0, -1.0], 8)
    strong = 3 - 50 + differences * 0.01
    shift = next(s for s in np.linspace(0, 3, 3001) if paired_t(s + differences).p < 0.75 * level_of((5, 8)))
    assert paired_t(shift + differences).p > level_of((5, 8), ALPHA / 2)
    both = {"strong": strong, "good": 3 - shift - differences, "alone": 3 + base}
    found = at_looks(both, {"s": claim("strong"), "c": claim()}, (5, 8))
    assert found["s"].look == PlannedLook(5, False) and found["c"].verdict == "supported"
    weak = {**both, "strong": 3 + differences}
    assert at_looks(weak, {"s": claim("strong"), "c": claim()}, (5, 8))["c"].verdict == "undecided"


BETWEEN = 0.03  # a p that decides a single look, and no look of several


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fields", [{}, {"less": "flops"}, {"at": "equal", "axis": "flops"}, {"against": ("alone", "more")}])  # fmt: skip
def test_every_kind_of_claim_goes_by_the_level_of_its_looks(fields: Mapping[str, Any], sign: int) -> None:
    n, noise = 12, np.resize([1.0, -1.0], 12)
    k = len(claim(**fields).rivals) * (2 if "less" in fields else 1) if sign < 0 else 1
    shift = next(s for s in np.linspace(0, 3, 3001) if paired_t(s + noise).p * k < BETWEEN)
    values = {"good": 3 - sign * (shift + noise), "alone": np.full(n, 3.0), "more": np.full(n, 3.0)}
    by_arm = {arm: dict(enumerate(map(float, numbers))) for arm, numbers in values.items()}
    made = tables(by_arm, flops={"good": 40.0, "alone": 50.0, "more": 50.0})
    wanted = "supported" if sign > 0 else "refuted"
    verdicts = [judge({"c": claim(**fields)}, *made, default_phase="distil", looks=looks)["c"] for looks in ((n,), (4, n))]  # fmt: skip
    if fields.get("at") != "equal":  # where costs are equal to the end, the dearer arm has no value within the budget
        assert [v.verdict for v in verdicts] == [wanted, "undecided"]
    assert verdicts[1].look == PlannedLook(n, False)


def test_equivalence_goes_by_the_level_of_its_looks() -> None:
    noise = np.resize([1.0, -1.0], 12)
    room = next(w for w in np.linspace(0, 3, 3001) if paired_t(w + noise).p / 2 < 0.7 * ALPHA)
    of = {"c": claim(within=float(room))}
    made = {"good": 3 + noise, "alone": np.full(12, 3.0)}
    assert [at_looks(made, of, looks)["c"].verdict for looks in ((12,), (4, 12))] == ["equivalent", "undecided"]


def test_lost_seeds_are_judged_by_signs_at_the_level_of_the_looks() -> None:
    values = {arm: {seed: 3.0 - 0.1 * (arm == "good") + 0.001 * seed for seed in range(9)} for arm in ("good", "alone")}
    made = tables({**values, "good": {s: v for s, v in values["good"].items() if s != 4}}, failed={"good": (4,)})
    # 8 of 9: p = .039
    assert [judge({"c": claim()}, *made, default_phase="distil", looks=looks)["c"].verdict for looks in ((9,), (5, 9))] == ["supported", "undecided"]  # fmt: skip


def test_intervals_hold_at_all_looks() -> None:
    drawn = arms(np.random.default_rng(1), 1)
    one, several = (at_looks(drawn, {"c": claim("a0")}, looks)["c"].parts[0] for looks in ((20,), DEFAULT))
    assert one.simultaneous and several.simultaneous and several.interval == one.interval
    half = paired_t(drawn["a0"] - drawn["alone"], confidence=1 - level_of(DEFAULT)).half
    assert several.simultaneous[1] - several.simultaneous[0] == pytest.approx(2 * half)


def test_the_headline_counts_no_open_claim() -> None:
    drawn = {**arms(np.random.default_rng(4), 2, n=5), "strong": np.zeros(5) + 0.01 * np.arange(5)}
    claims = {"c": claim("a0"), "s": claim("strong"), "d": claim("a1")}
    found = [*at_looks(drawn, claims).values()]
    assert answer(None, found).startswith("One claim is supported, ") and answer(None, found).endswith("2 more claims wait for a planned look.")  # type: ignore[arg-type]  # fmt: skip
    assert [line.more for line in claim_lines(found)][::2] == ["provisional: judged at 8 seeds"] * 2
    assert "No verdict yet on 2 claims" in answer(None, [found[0], found[2]])  # type: ignore[arg-type]
