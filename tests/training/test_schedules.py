"""Weights and learning rates over a budget: their values at start, at the end of warm-up, in the middle, at the end."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, get_args

import pytest
from pydantic import TypeAdapter

from trainables.config.phase import Optimizer
from trainables.config.terms import Schedule, Weight
from trainables.training.schedules import lr_factor, weight_at

KINDS = [member.model_fields["kind"].annotation.__args__[0] for member in get_args(get_args(Schedule)[0])]
VALUES: dict[str, tuple[dict[str, Any], dict[float, float]]] = {  # kind -> (fields, progress -> weight)
    "linear": ({"start": 4, "end": 1}, {0: 4, 0.25: 3.25, 0.5: 2.5, 1: 1}),
    "cosine": ({"start": 4, "end": 1}, {0: 4, 0.25: 2.5 + 1.5 * 2**-0.5, 0.5: 2.5, 1: 1}),
    "step": ({"start": 4, "end": 1, "at": 0.5}, {0: 4, 0.49: 4, 0.5: 1, 1: 1}),
    "off_when_better": ({"weight": 4}, {0: 4, 0.5: 4, 1: 4}),
}


def weight(value: Any) -> Weight:
    return TypeAdapter(Annotated[Weight, None]).validate_python(value)  # type: ignore[no-any-return]


def test_every_schedule_has_its_values_here() -> None:
    assert set(KINDS) == set(VALUES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_has_its_values_over_the_budget(kind: str) -> None:
    fields, values = VALUES[kind]
    for progress, expected in values.items():
        assert weight_at(weight({"kind": kind, **fields}), progress) == pytest.approx(expected)


def test_a_number_is_itself_all_the_way_and_no_latch_touches_it() -> None:
    assert [weight_at(weight(2), progress) for progress in (0, 0.5, 1)] == [2.0, 2.0, 2.0]
    assert weight_at(weight(2), 0.5, off=True) == 2.0


def test_an_off_switch_that_is_latched_gives_zero() -> None:
    assert weight_at(weight({"kind": "off_when_better", "weight": 4}), 0.5, off=True) == 0.0


def test_schedules_may_rise() -> None:
    assert weight_at(weight({"kind": "linear", "start": 0, "end": 1}), 0.5) == pytest.approx(0.5)
    assert weight_at(weight({"kind": "cosine", "start": 0, "end": 1}), 0.5) == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"schedule": "linear"}, {0: 1, 50: 0.5, 99: 0.01}),
        ({"schedule": "linear", "warmup": 0.1}, {0: 0.1, 8: 0.9, 9: 1, 10: 1, 55: 0.5, 99: 1 / 90}),
        ({"schedule": "linear", "min_lr_ratio": 0.2}, {0: 1, 50: 0.6, 99: 0.2 + 0.8 * 0.01}),
        ({"schedule": "cosine"}, {0: 1, 25: (1 + 2**-0.5) / 2, 50: 0.5}),
        ({"schedule": "cosine", "warmup": 0.5, "min_lr_ratio": 0.1}, {0: 0.02, 49: 1, 50: 1, 75: 0.55}),
        ({"schedule": "constant", "warmup": 0.1}, {0: 0.1, 9: 1, 10: 1, 99: 1}),
        ({"schedule": "linear", "warmup": 1}, {0: 0.01, 99: 1}),
    ],
)
def test_the_learning_rate_warms_up_then_falls(fields: dict[str, Any], values: dict[int, float]) -> None:
    optimizer = Optimizer(lr=1e-3, **fields)
    for step, expected in values.items():
        assert lr_factor(optimizer, step, 100) == pytest.approx(expected), step


@pytest.mark.parametrize("num_steps", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_step_is_wasted_and_the_rate_never_rises_after_warm_up(schedule: Any, warmup: float, num_steps: int) -> None:
    optimizer = Optimizer(lr=1e-3, schedule=schedule, warmup=warmup)
    factors = [lr_factor(optimizer, step, num_steps) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(factors[round(warmup * num_steps) :]))
