"""The cheapest evidence for a claim that is undecided: seeds, examples or replies, by the parts of the variance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from orchestrator.analysis.advice import more_evidence
from orchestrator.analysis.arm_values import ArmValues
from orchestrator.analysis.claim_parts import Part
from orchestrator.analysis.costs import Cost, TrialCost
from orchestrator.analysis.new_data import DataSet, NewData, Runs, StoredAnswers, Variances, intervals
from orchestrator.analysis.queries import MetricQuery, Records, TaskFacts
from orchestrator.analysis.statistics import Decision, compare, detectable_in_sd, seeds_needed
from orchestrator.reporting.claim_lines import claim_lines
from tests.analysis.test_verdicts import around, claim, tables, verdict_of
from trainables.metrics.language import LM_LOSS
from trainables.metrics.metric import Examples

SPENT = TrialCost(Cost(9.0, 9.0, 3600.0), {})  # an hour


def part_of(effect_in_sd: float, n: int, share: float | None) -> Part:
    noise = np.resize([1.0, -1.0], n)
    gains = effect_in_sd * noise.std(ddof=1) + noise
    found = compare(dict(enumerate(-gains)), dict.fromkeys(range(n), 0.0), lower_is_better=True)
    assert found is not None and found.p is not None
    new_data = None if share is None else NewData((0, 0), (), Variances(n, 1.0, 1.0, share, 9.0))
    return Part(found.p, found.gain, (), False, found, new_data=new_data)


def advise(part: Part, n: int, leans: Decision = Decision.SUPPORTED, level: float = 0.05):  # type: ignore[no-untyped-def]
    pair = [ArmValues(name, {}, {}, (), (), dict.fromkeys(range(n), SPENT)) for name in ("a", "b")]
    return more_evidence([(pair[0], pair[1])], [part], leans, within=None, level=level, alpha=0.05)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_more_examples_reduce_the_share_that_varies_with_them(share: float) -> None:
    n, effect = 6, 0.9
    more = advise(part_of(effect, n, share), n)
    left = (effect / detectable_in_sd(n)) ** 2 - (1 - share)
    assert more.seeds == (seeds_needed(effect) or 0) - n
    assert more.examples == (pytest.approx(share / left) if left > 0 else None)
    assert more.seeds_hours == pytest.approx(2 * more.seeds) and more.anew_hours == pytest.approx(2 * n)


def test_examples_are_advised_where_they_are_cheaper_than_seeds() -> None:
    far, near = advise(part_of(0.3, 5, 1.0), 5), advise(part_of(1.2, 6, 1.0), 6)
    assert far.seeds and far.seeds > 5 and far.examples and far.cheapest == "examples"
    assert near.seeds and near.seeds < 6 and near.examples and near.cheapest == "seeds"
    assert {advise(part_of(0.3, 5, share), 5).cheapest for share in (0.0, None)} == {"seeds"}


def test_levels_of_holm_and_of_looks_count() -> None:
    part = part_of(0.8, 6, None)
    few, many = advise(part, 6).seeds, advise(part, 6, level=0.01).seeds
    assert few and many and many == (seeds_needed(0.8, alpha=0.01) or 0) - 6 > few


def test_the_share_of_examples_is_that_of_the_variance() -> None:
    """The variance of the pairs is .02 by seed and 4/200 by seed and example: half of it is the examples'."""
    rng, S, E = np.random.default_rng(2), 200, 200
    none_E, one_E, part_E = np.full(E, np.nan), np.ones(E), np.zeros(E, np.int64)
    d_SE = 0.2 + rng.normal(0, 3, E) + rng.normal(0, 0.02**0.5, (S, 1)) + rng.normal(0, 2, (S, E))
    assert LM_LOSS.left_out is not None
    left_out = [
        [LM_LOSS.left_out(Examples(part_E, none_E, none_E, loss_E, one_E), np.arange(E)) for loss_E in arm_SE]
        for arm_SE in (d_SE, 0 * d_SE)
    ]
    data = DataSet(np.array(left_out), part_E, np.ones(E, np.int64))
    assert intervals([data]).share == pytest.approx(0.5, abs=0.1)


def test_an_effect_that_points_the_other_way_is_said_with_its_cost() -> None:
    worse, alone = around(0.002, 5)
    verdict = verdict_of(*tables({"good": worse, "alone": alone}))
    (line,) = claim_lines([verdict])
    assert verdict.seeds_more and "device-hours), to refute: the effect points the other way" in line.more


def replies(  # type: ignore[no-untyped-def]
    effect: float,
    of_seeds: float,
    of_examples: float,
    of_draws: float,
    *,
    seeds: int = 6,
    is_alike: bool = False,
    salt: int = 0,
):
    """Tables of ROUGE-L of 4 drawn replies to 200 prompts, with these SDs of the paired difference: by seed, by seed and
    prompt, by draw. `is_alike`: a draw is as lucky at each seed."""
    rng, E, K = np.random.default_rng(salt), 200, 4
    hard_E, shape = rng.normal(40, 5, (E, 1)), (seeds, E, K)
    luck_SEK = of_draws * (rng.normal(size=(1, E, K)) + np.zeros(shape) if is_alike else rng.normal(size=shape))
    gain_SEK = (
        effect + of_seeds * rng.normal(size=(seeds, 1, 1)) + of_examples * rng.normal(size=(seeds, E, 1)) + luck_SEK
    )
    rows, values = [], dict[str, dict[int, float]]()
    for arm, score_SEK in (("good", hard_E + gain_SEK), ("alone", hard_E + np.zeros(shape))):
        values[arm] = dict(enumerate(score_SEK.mean((1, 2)).tolist()))
        for seed, score_EK in enumerate(score_SEK):
            about = {"arm": arm, "point": arm, "seed": seed, "kind": "trial", "planned": True, "model": "student"}
            about |= {
                "phase": "distil",
                "task": "text",
                "split": "test",
                "part": 0,
                "count": 1,
                "loss": 1.0,
                "label": np.nan,
            }
            columns = {
                "example": range(E),
                "cluster": range(E),
                "prediction": score_EK.mean(1),
                "samples": score_EK.tolist(),
            }
            rows.append(pd.DataFrame({**about, **columns}))
    return tables(values, metric="rougeL", task="text"), pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize(("of_seeds", "of_examples", "of_draws"), [(0.3, 4.0, 8.0), (0.5, 0.0, 8.0), (0.0, 6.0, 0.0)])
def test_the_parts_of_the_variance_of_drawn_replies_are_found(
    of_seeds: float, of_examples: float, of_draws: float
) -> None:
    """The variance of a pair is s² + e² / 200 + d² / (200 · 4); what varies with the prompt has the draws in it."""
    made, answers = replies(0.0, of_seeds, of_examples, of_draws, seeds=40)
    found = _new_data(made, answers, 40)
    draws = of_draws**2 / 800
    assert found.variances.samples * 40 == pytest.approx(draws, rel=0.05, abs=1e-12)
    assert found.variances.both * 40 == pytest.approx(of_examples**2 / 200 + draws, rel=0.08)
    assert found.variances.seeds * 40 == pytest.approx(of_seeds**2 + of_examples**2 / 200 + draws, rel=0.5)


def test_draws_that_are_as_lucky_at_each_seed_are_no_part_of_their_spread() -> None:
    made, answers = replies(0.0, 0.3, 0.0, 8.0, is_alike=True)
    assert _new_data(made, answers, 6).sample_share == pytest.approx(0.0, abs=1e-9)


def _new_data(made: tuple[pd.DataFrame, pd.DataFrame], answers: pd.DataFrame, seeds: int) -> NewData:
    records, query = Records(*made, TaskFacts()), MetricQuery("distil", "student", "rougeL", ("text",))
    of = made[0].pivot_table(index="arm", columns="seed", values="value").loc[["good", "alone"]].to_numpy()
    runs = Runs(("good", "alone"), (query, query), range(seeds), {"text": of})
    return StoredAnswers(answers, records).intervals(runs, TaskFacts())


@pytest.mark.parametrize(
    ("effect", "spread", "cheapest", "says"),
    [
        (0.6, (0.8, 0.5, 0.5), "seeds", "more seeds"),
        (0.45, (0.05, 12.0, 2.0), "examples", "times the examples, all trials anew"),
        (0.45, (0.05, 0.5, 26.0), "samples", "times the replies to each prompt, all trials anew"),
    ],
)
def test_the_cheapest_of_seeds_prompts_and_replies_is_advised(effect: float, spread: tuple[float, float, float], cheapest: str, says: str) -> None:  # fmt: skip
    """The effect is near the SD of the pairs, of which almost all is by seed, by prompt, or by draw."""
    made, answers = replies(effect, *spread, salt=3)
    verdict = verdict_of(*made, claim(metric="rougeL"), examples=answers)
    (line,) = claim_lines([verdict])
    assert verdict.verdict == Decision.UNDECIDED and (verdict.more.seeds or 0) > 0
    assert verdict.more.cheapest == cheapest and says in line.more, (verdict.more, line.more)
    without = verdict_of(*made, claim(metric="rougeL"), examples=answers.drop(columns="samples"))
    assert without.more == verdict.more._replace(samples=None, num_samples=0)
