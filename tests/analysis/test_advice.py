"""The cheapest evidence for a claim that is undecided: seeds or examples, by the parts of the variance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.analysis.advice import more_evidence
from orchestrator.analysis.arm_values import ArmValues
from orchestrator.analysis.claim_parts import Part
from orchestrator.analysis.costs import Cost, TrialCost
from orchestrator.analysis.new_data import DataSet, intervals
from orchestrator.analysis.statistics import Decision, compare, detectable_in_sd, seeds_needed
from orchestrator.reporting.claim_lines import claim_lines
from tests.analysis.test_verdicts import around, tables, verdict_of
from trainables.metrics.language import LM_LOSS
from trainables.metrics.metric import Examples

SPENT = TrialCost(Cost(9.0, 9.0, 3600.0), {})  # an hour


def part_of(effect_in_sd: float, n: int, share: float | None) -> Part:
    noise = np.resize([1.0, -1.0], n)
    gains = effect_in_sd * noise.std(ddof=1) + noise
    found = compare(dict(enumerate(-gains)), dict.fromkeys(range(n), 0.0), lower_is_better=True)
    assert found is not None and found.p is not None
    return Part(found.p, found.gain, (), False, replace(found, example_share=share))


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
    assert more.seeds_hours == pytest.approx(2 * more.seeds) and more.examples_hours == pytest.approx(2 * n)


def test_examples_are_advised_where_they_are_cheaper_than_seeds() -> None:
    far, near = advise(part_of(0.3, 5, 1.0), 5), advise(part_of(1.2, 6, 1.0), 6)
    assert far.seeds and far.seeds > 5 and far.examples and far.is_by_examples
    assert near.seeds and near.seeds < 6 and near.examples and not near.is_by_examples
    assert not advise(part_of(0.3, 5, 0.0), 5).is_by_examples and not advise(part_of(0.3, 5, None), 5).is_by_examples


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
