"""How a model's weights follow its gradient: the rule, and the learning rate over a phase's budget."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from trainables.config.value import Fraction, Positive, Value


class Optimizer(Value):
    """Decoupled weight decay on matrices, linear warm-up, then `schedule` down to `min_lr_ratio` times `lr`.

    `adamw_8bit` keeps both moments in 8 bits; `adafactor` keeps row and column means of the second, and takes no betas.
    """

    kind: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"  # how the moments are kept
    lr: Positive  # the highest learning rate
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # decay of the two moments
    eps: Positive = 1e-8  # added to the denominator
    weight_decay: float = Field(0.01, ge=0)  # decoupled, on matrices
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up
    warmup: Fraction = 0.0  # fraction of the phase's budget
    min_lr_ratio: Fraction = 0.0  # fraction of `lr` at the end
    max_grad_norm: Positive | None = 1.0  # norm of this model's gradient

    def lr_factor(self, step: int, num_steps: int) -> float:
        """Computes the learning rate of optimizer step `step` (from 0) as a fraction of `lr`."""
        num_warmup = round(self.warmup * num_steps)
        if step < num_warmup:
            return (step + 1) / num_warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - num_warmup) / max(1, num_steps - num_warmup)
        shape = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape
