"""Rules that steer a phase: each against its authors' loop written out, and as JSON in the middle."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from pydantic import TypeAdapter

from trainables.config.phase import Replay, Share
from trainables.config.terms import InterpolatedKL
from trainables.training.controllers import fresh_share, share_at, share_look, share_start, taid_start, taid_step


def term(**more: Any) -> InterpolatedKL:
    value = {"kind": "interpolated_kl", "from": "a", "to": "b", "tau_squared": False, **more}
    return InterpolatedKL.model_validate(value)


def share(value: Any) -> Any:
    return TypeAdapter(Share).validate_python(value)


def rising(**more: Any) -> Any:
    return share({"kind": "rises_with_loss", **more})


def losses(num: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [math.exp(-step / num) + 0.3 * draw.random() for step in range(num)]


def moved(of: InterpolatedKL, losses: list[float]) -> list[float]:
    """t at each step, through JSON each time."""
    state, found = taid_start(of), []
    for step, loss in enumerate(losses):
        progress = step / len(losses)
        found.append(state["t"])
        state = json.loads(json.dumps(taid_step(of, state, loss, progress), allow_nan=False))
    return found


# ----------------------------------------------------------------------------------------------------------------- TAID


@pytest.mark.parametrize(
    "more",
    [{}, {"alpha": 0.05}, {"alpha": 0.5, "beta": 0.0}, {"start": 0.2, "end": 0.7, "alpha": 0.02}, {"start": 1.0}],
)
def test_taid_is_its_rule_written_out(more: dict[str, Any]) -> None:
    of, given = term(**more), losses(60)
    t, m, expected = of.start, 0.0, [of.start, of.start]  # the first loss has none before it
    for step in range(1, len(given) - 1):
        d = (given[step - 1] - given[step]) / (given[step - 1] + 1e-15)
        m = of.beta * m + (1 - of.beta) * d
        dt = of.alpha * (1 / (1 + math.exp(-m))) * (1 - t)
        t = min(of.end, max(of.start + (of.end - of.start) * step / len(given), t + dt))
        expected.append(t)
    assert moved(of, given) == pytest.approx(expected, rel=1e-12)


def test_t_only_rises_from_start_and_never_passes_end() -> None:
    of = term(start=0.3, end=0.8, alpha=0.05)
    found = moved(of, losses(100))
    assert found[0] == 0.3 and found == sorted(found) and max(found) == 0.8


def test_without_alpha_t_is_a_straight_line_a_step_behind() -> None:
    found = moved(term(start=0.4, alpha=0.0), losses(10))
    assert found == pytest.approx([0.4, 0.4, *(0.4 + 0.6 * step / 10 for step in range(1, 9))])


def test_t_rises_faster_while_the_loss_falls() -> None:
    of = term(start=0.1, alpha=0.3, beta=0.5)
    falling, growing = ([1.5**-step for step in range(20)], [1.5**step for step in range(20)])
    assert moved(of, falling)[10] > moved(of, growing)[10]


def test_a_loss_of_zero_or_a_wild_one_is_borne() -> None:
    of = term(alpha=0.1)
    assert all(0.4 <= t <= 1 for t in moved(of, [1.0, 0.0, 0.0, 1e30, 1e-30, 1e30, 5.0, 5.0]))


# ------------------------------------------------------------------------------------------------------- made replies


def test_a_share_rises_when_the_loss_on_dev_has_risen_by_the_tolerance_since_it_last_did() -> None:
    of = rising(start=0.1, step=0.3, tolerance=0.1)
    state, found = share_start(of), []
    for loss in (2.0, 2.05, 2.1, 1.0, 2.15, 2.3, 2.0, 2.5, 2.7, 2.9, 9.0):
        state = json.loads(json.dumps(share_look(of, state, loss), allow_nan=False))
        found.append(share_at(of, state, 0.5))
    # compared with 2.0, then with 2.1, 2.3, 2.5, and at last with itself at the top
    expected = [0.1, 0.1, 0.4, 0.4, 0.4, 0.7, 0.7, 1.0, 1.0, 1.0, 1.0]
    assert found == pytest.approx(expected)
    assert share_at(of, share_start(of), 0.0) == 0.1


def test_a_first_look_only_sets_what_later_ones_are_compared_with() -> None:
    of = rising(tolerance=0.0)
    state = share_look(of, share_start(of), 1e9)
    assert share_at(of, state, 0) == 0
    assert share_at(of, share_look(of, state, 1e9), 0) == pytest.approx(0.1)  # at least: a rise of 0 is one of 0


def test_other_shares_are_numbers_or_schedules_and_looks_leave_them_alone() -> None:
    for value, expected in (
        (0.3, [0.3, 0.3, 0.3]),
        ({"kind": "linear", "start": 0.0, "end": 1.0}, [0.0, 0.5, 1.0]),
        ({"kind": "cosine", "start": 1.0, "end": 0.0}, [1.0, 0.5, 0.0]),
        ({"kind": "step", "start": 1.0, "end": 0.25, "at": 0.5}, [1.0, 0.25, 0.25]),
    ):
        of = share(value)
        state = share_look(of, share_look(of, share_start(of), 1.0), 5.0)
        assert [share_at(of, state, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(expected)


def test_fresh_replies_become_fewer_or_more_or_are_a_half() -> None:
    for fresh, expected in (("decreasing", [1, 0.75, 0]), ("increasing", [0, 0.25, 1]), ("constant", [0.5, 0.5, 0.5])):
        of = Replay.model_validate({"fresh": fresh})
        assert [fresh_share(of, progress) for progress in (0.0, 0.25, 1.0)] == expected


def test_nothing_given_is_changed() -> None:
    of, by = term(alpha=0.1), rising(tolerance=0.0)
    state, held = taid_step(of, taid_start(of), 2.0, 0.0), share_look(by, share_start(by), 1.0)
    before = dict(state), dict(held)
    taid_step(of, state, 1.0, 0.1)
    share_look(by, held, 2.0)
    assert (state, held) == before
