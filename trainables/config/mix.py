"""What a stream makes of the examples that it reads."""

from __future__ import annotations

from trainables.config.value import Positive, Value


class Mix(Value):
    """Each example of a task with another one of the batch, as a mixture of word embeddings: λ E(x_i) + (1 - λ) E(x_j), in
    each model's own table, λ from Beta(alpha, alpha) (MixKD, Liang et al. 2021).

    A hard term is split λ : 1 - λ between both labels. The formula is that of mixup in the embeddings; MixKD's own is
    known from its abstract and second-hand.
    """

    alpha: Positive = 0.4  # the smaller, the nearer is λ to 0 or 1

    @property
    def formula(self) -> str:
        return f"pairs of examples, λ E(x_i) + (1 - λ) E(x_j) in each model's embeddings, λ from Beta({self.alpha:g}, {self.alpha:g})"
