"""Rules that steer a phase while it runs: how far a target has moved, how often replies are made.

Pure functions over small states, dicts of numbers that go into the checkpoint as JSON; the loop says when they are called,
with numbers that are the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trainables.config.phase import Replay, RisesWithLoss, Share
from trainables.config.terms import InterpolatedKL
from trainables.training.schedules import weight_at

State = Mapping[str, float]


def taid_start(term: InterpolatedKL) -> dict[str, float]:
    return {"t": term.start, "momentum": 0.0}


def taid_step(term: InterpolatedKL, state: State, loss: float, progress: float) -> dict[str, float]:
    """After each step, with its mean loss over all ranks and the progress at which it was made (Shing et al. 2025).

    t rises by alpha sigmoid(m) (1 - t), m the relative fall of the loss with momentum, and is never below the straight line
    from `start` to `end`. The first step only sets what the second is compared with, as in the authors' code. There the
    loss is a cross-entropy with the target, here the true divergence: its relative falls are larger.
    """
    if "loss" not in state:
        return {**state, "loss": loss}
    fall = (state["loss"] - loss) / (state["loss"] + 1e-15)
    momentum = term.beta * state["momentum"] + (1 - term.beta) * fall
    risen = state["t"] + term.alpha * _sigmoid(momentum) * (1 - state["t"])
    line = term.start + (term.end - term.start) * progress
    return {"t": min(term.end, max(line, risen)), "momentum": momentum, "loss": loss}


def share_start(share: Share) -> dict[str, float]:
    return {"share": share.start} if isinstance(share, RisesWithLoss) else {}


def share_at(share: Share, state: State, progress: float) -> float:
    """The fraction of steps whose replies are made, at a fraction of the budget."""
    return state["share"] if isinstance(share, RisesWithLoss) else weight_at(share, progress)


def share_look(share: Share, state: State, dev_loss: float) -> dict[str, float]:
    """After each look at dev. The first one only sets what later ones are compared with; then that moves with each rise of
    the share, and only then (DistiLLM, Ko et al. 2024; its first look is before the first step).
    """
    if not isinstance(share, RisesWithLoss):
        return dict(state)
    if "loss" not in state:
        return {**state, "loss": dev_loss}
    if dev_loss < state["loss"] + share.tolerance:
        return dict(state)
    return {"share": min(state["share"] + share.step, 1.0), "loss": dev_loss}


def fresh_share(replay: Replay, progress: float) -> float:
    """Of the steps that read made replies, the fraction that have fresh ones once as many as `size` are kept."""
    match replay.fresh:
        case "decreasing":
            return 1 - progress
        case "increasing":
            return progress
        case "constant":
            return 0.5


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), by a function that does not overflow."""
    return (1 + math.tanh(x / 2)) / 2
