"""Weights over a phase's budget: pure functions of progress."""

from __future__ import annotations

import math

from trainables.config.phase import Optimizer
from trainables.config.terms import Cosine, Linear, OffWhenBetter, Step, Weight


def weight_at(weight: Weight, progress: float, *, off: bool = False) -> float:
    """The term's weight at a fraction of the budget. `off`: the latch of an off-switch, kept by the loop."""
    match weight:
        case Linear(start=start, end=end):
            return start + (end - start) * progress
        case Cosine(start=start, end=end):
            return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
        case Step(start=start, end=end, at=at):
            return start if progress < at else end
        case OffWhenBetter(weight=constant):
            return 0.0 if off else constant
        case _:
            return float(weight)


def can_be_zero(weight: Weight) -> bool:
    """Whether the term is off at some step, though not at all of them."""
    match weight:
        case OffWhenBetter():
            return True
        case Linear() | Cosine() | Step():
            return 0 in (weight.start, weight.end)
        case _:
            return weight == 0


def lr_factor(optimizer: Optimizer, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) as a fraction of `lr`."""
    num_warmup = round(optimizer.warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    if optimizer.schedule == "constant":
        return 1.0
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    shape = 1 - done if optimizer.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * shape
