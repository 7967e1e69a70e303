"""Numbers over a budget: weights, shares and learning rates at its start, in the middle and at its end, and their states."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from trainables.config.optimizer import Optimizer
from trainables.config.phase import Replay
from trainables.config.schedules import START, Schedule, Share, State, Weight

KINDS = [get_args(member.model_fields["kind"].annotation)[0] for member in get_args(get_args(Schedule)[0])]
VALUES: dict[str, tuple[dict[str, Any], dict[float, float]]] = {  # kind -> (fields, progress -> weight)
    "linear": ({"start": 4, "end": 1}, {0: 4, 0.25: 3.25, 0.5: 2.5, 1: 1}),
    "cosine": ({"start": 4, "end": 1}, {0: 4, 0.25: 2.5 + 1.5 * 2**-0.5, 0.5: 2.5, 1: 1}),
    "step": ({"start": 4, "end": 1, "at": 0.5}, {0: 4, 0.49: 4, 0.5: 1, 1: 1}),
    "off_when_better": ({"weight": 4}, {0: 4, 0.5: 4, 1: 4}),
}


def weight(value: Any) -> Weight:
    return TypeAdapter(Weight).validate_python(value)  # type: ignore[no-any-return]


def share(value: Any) -> Share:
    return TypeAdapter(Share).validate_python(value)  # type: ignore[no-any-return]


def observed(schedule: Weight | Share, state: State, loss: float, source_loss: float = 0.0) -> State:
    """The next state, through JSON; the given one is left as it was."""
    before = dict(state)
    after = schedule.observe(state, lambda: loss, lambda: source_loss)
    assert state == before
    return json.loads(json.dumps(after, allow_nan=False))  # type: ignore[no-any-return]


def test_every_schedule_has_its_values_here() -> None:
    assert set(KINDS) == set(VALUES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_has_its_values_over_the_budget(kind: str) -> None:
    fields, values = VALUES[kind]
    for progress, expected in values.items():
        assert weight({"kind": kind, **fields}).value_at(progress) == pytest.approx(expected)


def test_a_number_is_itself_all_the_way_and_a_number_in_json() -> None:
    assert [weight(2).value_at(progress, {"off": 1.0}) for progress in (0, 0.5, 1)] == [2.0, 2.0, 2.0]
    assert TypeAdapter(Weight).dump_json(weight(2)) == b"2.0"


def test_schedules_may_rise() -> None:
    assert weight({"kind": "linear", "start": 0, "end": 1}).value_at(0.5) == pytest.approx(0.5)
    assert weight({"kind": "cosine", "start": 0, "end": 1}).value_at(0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("value", "is_off", "can_be_zero"),
    [
        (0, True, True),
        (1, False, False),
        ({"kind": "linear", "start": 0, "end": 0}, True, True),
        ({"kind": "cosine", "start": 1, "end": 0}, False, True),
        ({"kind": "step", "start": 1, "end": 0, "at": 0}, True, True),
        ({"kind": "step", "start": 1, "end": 0, "at": 0.5}, False, True),
        ({"kind": "step", "start": 1, "end": 2, "at": 0.5}, False, False),
        ({"kind": "off_when_better", "weight": 1}, False, True),
    ],
)
def test_a_weight_tells_whether_it_is_always_or_sometimes_zero(value: Any, is_off: bool, can_be_zero: bool) -> None:
    assert (weight(value).is_off, weight(value).can_be_zero) == (is_off, can_be_zero)


def test_an_off_switch_turns_off_for_good_where_the_learner_is_better() -> None:
    switch, state, values = weight({"kind": "off_when_better", "weight": 4}), START, []
    for loss, source_loss in ((3.0, 2.0), (2.0, 2.0), (1.9, 2.0), (5.0, 2.0)):
        state = observed(switch, state, loss, source_loss)
        values.append(switch.value_at(0.5, state))
    assert values == [4, 4, 0, 0]
    switch.observe(state, pytest.fail, pytest.fail)  # needs no more evaluations


# --------------------------------------------------------------------------------------------------------------- shares


def test_a_share_rises_once_the_dev_loss_has_risen_by_the_tolerance() -> None:
    rising = share({"kind": "rises_with_loss", "start": 0.1, "step": 0.3, "tolerance": 0.1})
    state, values = START, []
    for loss in (2.0, 2.05, 2.1, 1.0, 2.15, 2.3, 2.0, 2.5, 2.7, 2.9, 9.0):
        state = observed(rising, state, loss)
        values.append(rising.value_at(0.5, state))
    # compared with 2.0, then with 2.1, 2.3, 2.5, and at last with itself at the top
    expected = [0.1, 0.1, 0.4, 0.4, 0.4, 0.7, 0.7, 1.0, 1.0, 1.0, 1.0]
    assert values == pytest.approx(expected)
    assert rising.value_at(0.0) == 0.1


def test_a_first_evaluation_only_sets_what_later_ones_are_compared_with() -> None:
    rising = share({"kind": "rises_with_loss", "tolerance": 0.0})
    state = observed(rising, START, 1e9)
    assert rising.value_at(0, state) == 0
    assert rising.value_at(0, observed(rising, state, 1e9)) == pytest.approx(0.1)  # at least: a rise of 0 is one of 0


def test_other_shares_are_numbers_or_schedules_and_evaluations_leave_them_alone() -> None:
    for value, expected in (
        (0.3, [0.3, 0.3, 0.3]),
        ({"kind": "linear", "start": 0.0, "end": 1.0}, [0.0, 0.5, 1.0]),
        ({"kind": "cosine", "start": 1.0, "end": 0.0}, [1.0, 0.5, 0.0]),
        ({"kind": "step", "start": 1.0, "end": 0.25, "at": 0.5}, [1.0, 0.25, 0.25]),
    ):
        schedule = share(value)
        state = observed(schedule, observed(schedule, START, 1.0), 5.0)
        assert [schedule.value_at(progress, state) for progress in (0.0, 0.5, 1.0)] == pytest.approx(expected)


def test_fresh_replies_become_fewer_or_more_or_are_a_half() -> None:
    for fresh, expected in (("decreasing", [1, 0.75, 0]), ("increasing", [0, 0.25, 1]), ("constant", [0.5, 0.5, 0.5])):
        replay = Replay.model_validate({"fresh": fresh})
        assert [replay.fresh_share(progress) for progress in (0.0, 0.25, 1.0)] == expected


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
        assert optimizer.lr_factor(step, 100) == pytest.approx(expected), step


@pytest.mark.parametrize("num_steps", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_step_is_wasted_and_the_rate_never_rises_after_warm_up(schedule: Any, warmup: float, num_steps: int) -> None:
    optimizer = Optimizer(lr=1e-3, schedule=schedule, warmup=warmup)
    factors = [optimizer.lr_factor(step, num_steps) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(factors[round(warmup * num_steps) :]))
