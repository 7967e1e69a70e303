"""A metric as one value: its direction, its range, and how to compute it from stored examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Column = Literal["label", "prediction", "loss", "count", "scores"]

TEST_SET_PARTS = ("matched", "mismatched")  # of MNLI, scored one by one


@dataclass(frozen=True)
class Examples:
    """The answers of one model to the E examples of a data set; a column that the metric does not need may be empty."""

    part_E: NDArray[np.int64]  # of the test set
    label_E: Floats
    prediction_E: Floats  # a class or a number; of replies the ROUGE-L of each
    loss_E: Floats  # nats (squared error for numbers), summed over the example's supervised positions
    count_E: Floats  # of these positions
    scores: Mapping[str, Floats] = field(default_factory=dict)  # of replies, [E] for each further metric

    def only(self, keep_E: NDArray[np.bool_]) -> Examples:
        """Returns the answers to these examples."""
        names = ("part_E", "label_E", "prediction_E", "loss_E", "count_E")
        columns = {name: column[keep_E] for name in names if len(column := getattr(self, name))}
        return replace(self, **columns, scores={name: score_E[keep_E] for name, score_E in self.scores.items()})

    def parts(self) -> Iterator[tuple[Examples, NDArray[np.bool_]]]:
        """Yields the examples of each part of the test set, and where they are."""
        for part in np.unique(self.part_E):
            here_E = self.part_E == part
            yield self.only(here_E), here_E


Clusters = NDArray[np.int64]
LeftOut = Callable[[Examples, Clusters], Floats]


@dataclass(frozen=True)
class Metric:
    """How good a model is, in one number.

    `value` computes the number from examples. `left_out` computes it [C + 1] without each of C clusters in turn and, last, of
    all examples, where clusters_E[e] is the cluster of example e, and no cluster is in two parts. A metric without them is
    recorded as a number only, and has no interval over new examples.
    """

    name: str
    words: str
    better: Literal["lower", "higher"]
    bounds: tuple[float, float] | None = None  # the least and the largest value, where both exist
    needs: tuple[Column, ...] = ()
    value: Callable[[Examples], float] | None = None
    left_out: LeftOut | None = None
    by_part: bool = False  # also recorded for each part of a test set: accuracy_matched
    beside_model: bool = False  # recorded for each model that the scored one is compared with: teacher_agreement

    @property
    def lower_is_better(self) -> bool:
        return self.better == "lower"

    @property
    def worst_and_best(self) -> tuple[float, float] | None:
        if self.bounds is None:
            return None
        low, high = self.bounds
        return (high, low) if self.lower_is_better else (low, high)

    def is_recorded_as(self, name: str) -> bool:
        """Returns whether tables may call this metric `name`."""
        if self.beside_model:
            return name.endswith(f"_{self.name}") and len(name) > len(self.name) + 1
        return name == self.name or (self.by_part and name in [f"{self.name}_{part}" for part in TEST_SET_PARTS])


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Returns numerator / denominator, and 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)


def of_sums(columns: Callable[[Examples], Sequence[ArrayLike]], score: Callable[..., Floats]) -> LeftOut:
    """Returns the `left_out` of a metric that is a score of the sums of columns [E]."""

    def left_out(examples: Examples, clusters_E: Clusters) -> Floats:
        C = int(clusters_E.max()) + 1
        sums = [np.bincount(clusters_E, np.asarray(column, dtype=np.float64), C + 1) for column in columns(examples)]
        return score(*(sum_C.sum() - sum_C for sum_C in sums))

    return left_out
