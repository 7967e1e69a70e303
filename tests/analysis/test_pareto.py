"""Quality beside cost, against known truths: the front of a table, and how often the cheapest good enough arm is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from orchestrator.analysis.pareto import ArmPoint, cheapest_good_enough, no_worse_p, non_dominated
from orchestrator.analysis.statistics import sd_interval
from orchestrator.scheduling.objective import measured
from orchestrator.study.load import load_study
from orchestrator.study.objectives import Measured

NAN, INF = float("nan"), float("inf")


def test_the_front_of_a_known_table() -> None:
    points = [(1, 9), (2, 5), (2, 6), (3, 5), (4, 1), (5, 0), (4, 1), (0.5, NAN), (INF, 0)]
    assert non_dominated(points) == [True, True, False, False, True, True, True, False, False]
    assert non_dominated([]) == [] and non_dominated([(1, 2, 3), (1, 2, 4)]) == [True, False]


def arms(means: list[float], rng: np.random.Generator, n: int = 6, sd: float = 0.1) -> list[ArmPoint]:
    """The arms by rising cost; each seed shifts all arms alike."""
    shared = rng.normal(0, 0.3, n)
    return [
        ArmPoint(f"a{i}", dict(enumerate((mean + shared + rng.normal(0, sd, n)).tolist())), dict.fromkeys(range(n), i + 1.0))
        for i, mean in enumerate(means)
    ]  # fmt: skip


@pytest.mark.parametrize("means", [[3.1, 3.1, 3.1, 3.0], [3.1, 3.0], [3.4, 3.1, 3.0, 3.0]])
def test_the_named_arm_is_truly_worse_by_delta_in_at_most_five_percent(means: list[float]) -> None:
    """Arms at 3.1 are worse than the best by exactly the 0.1 that is asked for: the hardest case."""
    rng, wrong, num = np.random.default_rng(5), 0, 400
    for _ in range(num):
        found = cheapest_good_enough(arms(means, rng), 0.1, lower_is_better=True)
        assert found is not None
        wrong += found.name is not None and means[int(found.name[1:])] > 3.05
    assert wrong / num <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / num)


def test_a_cheap_arm_that_is_as_good_is_named_and_one_that_lost_a_seed_is_not() -> None:
    made = arms([3.0, 3.0, 3.0], np.random.default_rng(1), n=12)
    found = cheapest_good_enough(made, 0.2, lower_is_better=True)
    assert found is not None and found.name == "a0"
    lost = [ArmPoint(a.name, a.quality, a.costs, a.name == "a0") for a in made]
    assert cheapest_good_enough(lost, 0.2, lower_is_better=True).name == "a1"  # type: ignore[union-attr]
    better = [ArmPoint(a.name, {s: -v for s, v in a.quality.items()}, a.costs) for a in made]
    assert cheapest_good_enough(better, 0.2, lower_is_better=False).name == "a0"  # type: ignore[union-attr]
    assert cheapest_good_enough(made[:1], 0.2, lower_is_better=True) is None
    assert cheapest_good_enough(arms([3.0, 3.0], np.random.default_rng(1), n=2), 9, lower_is_better=True).name is None  # type: ignore[union-attr]


def test_p_is_the_largest_one_sided_t_and_adjusted_in_steps() -> None:
    made = arms([3.02, 3.0, 3.01], np.random.default_rng(3))
    values = {arm.name: np.array([*arm.quality.values()]) for arm in made}
    plain = {
        a: max(stats.ttest_1samp(values[b] - values[a], -0.1, alternative="greater").pvalue for b in values if b != a)
        for a in values
    }
    first, second, third = sorted(plain, key=plain.__getitem__)
    found = no_worse_p({arm.name: arm.quality for arm in made}, 0.1, lower_is_better=True)
    assert found[first] == pytest.approx(min(1, 2 * plain[first]))
    assert found[second] == pytest.approx(min(1, max(2 * plain[first], 2 * plain[second])))
    assert found[third] == pytest.approx(min(1, max(found[second], plain[third])))


def test_a_cost_of_a_phase_that_fans_out_is_that_of_all_its_branches() -> None:
    study = load_study(Path(__file__).parents[2] / "search_spaces" / "pea_kd.yaml")
    phase = next(name for name in study.trial["phases"] if study.each_of(name))
    study = study.model_copy(update={"fixed": {f"phases.{phase}.for_each_dataset": ["topic", "other"]}})
    each, spent = study.each_of(phase), {"tokens": 3, "flops": 7.0, "device_seconds": 2.0}
    phases = {f"{phase}[{item}]": {"key": item, **spent} for item in each}
    for metric, of_one in (("flops", 7.0), ("student_tokens", 3), ("device_seconds", 2.0)):
        what = Measured(phase=phase, model=study.trains(phase)[0], metric=metric)
        assert measured(study, what, [], phases) == of_one * len(each) > of_one
        one = what.model_copy(update={"task": each[0]})
        assert measured(study, one, [], phases) == of_one
    assert measured(study, what.model_copy(update={"metric": "student_tokens", "model": "nobody"}), [], phases) == 0
    rows = [{"phase": f"{phase}[{item}]", "task": item, "split": "system", "metric": "parameters", "model": study.trains(phase)[0],
             "progress": 1.0, "value": float(i)} for i, item in enumerate(each)]  # fmt: skip
    size = what.model_copy(update={"metric": "parameters"})
    assert measured(study, size, rows, {}) == (len(each) - 1) / 2 and measured(study, size, rows[1:], {}) is None


def test_the_interval_of_an_sd_covers_it() -> None:
    rng = np.random.default_rng(2)
    inside = [low <= 1 <= high for low, high in (sd_interval(rng.normal(size=5).std(ddof=1), 5) for _ in range(600))]
    assert 0.92 < np.mean(inside) < 0.98
