"""TODO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

ROWS = 32  # sequences of an evaluation batch; no number depends on it beyond float error


LOGITS = 2**27  # numbers of whole logits that are there at once where replies are scored


Floats = NDArray[np.float64]


class Scored(NamedTuple):
    """How a model does on a split: over all, and on each example E."""

    metrics: dict[str, float]
    labels_E: Floats | None  # class or number; None for a corpus, as `predictions_E`
    predictions_E: Floats | None
    losses_E: Floats  # nats (squared error for numbers), summed over the example's supervised positions
    counts_E: Floats  # supervised positions; 1 in a task
    parts_E: NDArray[np.int64] | None = None  # which part of the split, where it has several


@dataclass
class ExampleSums:
    """Sums by example of what is known of supervised tokens."""

    losses_E: Floats
    counts_E: Floats
    correct: float = 0.0

    @classmethod
    def of(cls, num: int) -> ExampleSums:
        return cls(np.zeros(num), np.zeros(num))

    def add(self, logits_NV: Tensor, labels_N: Tensor, examples_N: Tensor) -> None:
        loss_N = F.cross_entropy(logits_NV, labels_N, reduction="none").double().cpu().numpy()
        np.add.at(self.losses_E, examples_N.numpy(), loss_N)
        np.add.at(self.counts_E, examples_N.numpy(), 1.0)
        self.correct += (logits_NV.argmax(-1) == labels_N).sum().item()

    def over(self, session: Any) -> ExampleSums:
        """Of all ranks."""
        if not session:
            return self
        return ExampleSums(total(session, self.losses_E), total(session, self.counts_E), *session.total([self.correct]))

    def metrics(self, kind: str) -> dict[str, float]:
        num = self.counts_E.sum()
        return {f"{kind}_loss": float(self.losses_E.sum() / num), f"{kind}_accuracy": float(100 * self.correct / num)}


@contextmanager
def in_eval_mode(net: Any) -> Iterator[None]:
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


def is_mine(index: int, session: Any) -> bool:
    return session is None or index % session.world == session.rank


def total(session: Any, values: Floats) -> Floats:
    return np.asarray(session.total(values.tolist()))
