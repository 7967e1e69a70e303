"""What every evaluation returns: metrics of a split, and the loss and prediction of each example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainables.config.phase import Masking
from trainables.config.session import Ranks, SingleProcess

ROWS = 32  # sequences of an evaluation batch
LOGITS = 2**27  # numbers of whole logits in memory at once where replies are scored

Floats = NDArray[np.float64]


class Scored(NamedTuple):
    """The scores of a model on a split: over all examples, and on each example E."""

    metrics: dict[str, float]
    labels_E: Floats | None  # class or number; None for a corpus, as `predictions_E`
    predictions_E: Floats | None
    losses_E: Floats  # nats (squared error for numbers), summed over the example's supervised positions
    counts_E: Floats  # supervised positions; 1 in a task
    parts_E: NDArray[np.int64] | None = None  # which part of the split, where it has several
    clusters_E: NDArray[np.int64] | None = None  # the document or text that examples share; None where unknown
    scores: Mapping[str, Floats] = {}  # of replies, [E] for each metric that the data set names
    samples_EK: Floats | None = None  # of drawn replies: the score of each, whose mean is the prediction


class Targets(NamedTuple):
    """What a stream supervises, where that is not what the data set itself says."""

    corruption: Masking | None = None  # of a corpus; None: the next token
    labels_E: Tensor | None = None  # of a task, by another model; None: the labels of the data set


DEFAULT_TARGETS = Targets()


@dataclass(frozen=True)
class Placement:
    """Where an evaluation runs; no number depends on it beyond float error."""

    device: str
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ranks: Ranks = field(default_factory=SingleProcess)
    rows: int = ROWS  # sequences of a batch

    def is_mine(self, index: int) -> bool:
        """Returns whether this rank evaluates batch `index`."""
        return index % self.ranks.world == self.ranks.rank

    def total(self, values: Floats) -> Floats:
        """Sums over the ranks."""
        return np.asarray(self.ranks.total(values.tolist()))


@dataclass
class ExampleSums:
    """Loss, number and correctness of supervised tokens, summed by example."""

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

    def over(self, on: Placement) -> ExampleSums:
        """Sums over the ranks."""
        return ExampleSums(on.total(self.losses_E), on.total(self.counts_E), *on.ranks.total([self.correct]))

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
