"""Terms that have a state: each against its authors' loop written out, and as JSON in the middle."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from trainables.config.schedules import START
from trainables.config.terms import InterpolatedKL


def term(**more: Any) -> InterpolatedKL:
    value = {"kind": "interpolated_kl", "from": "a", "to": "b", "tau_squared": False, **more}
    return InterpolatedKL.model_validate(value)


def losses(num: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [math.exp(-step / num) + 0.3 * draw.random() for step in range(num)]


def moved(of: InterpolatedKL, losses: list[float]) -> list[float]:
    """t at each step, through JSON each time."""
    state, found = START, []
    for step, loss in enumerate(losses):
        progress, before = step / len(losses), dict(state)
        found.append(of.at_state(state).start)
        after = of.next_state(state, loss, progress)
        assert state == before
        state = json.loads(json.dumps(after, allow_nan=False))
    return found


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
