"""Evaluates a model on prepared data, whatever their format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from trainables.data.prepared import Prepared
from trainables.evaluation.classification import evaluate_task
from trainables.evaluation.generation import evaluate_exchanges
from trainables.evaluation.language_modelling import evaluate_corpus
from trainables.evaluation.per_example import Placement, Scored, Targets

EVALUATIONS: Mapping[str, Callable[..., Scored]] = {  # by format
    "corpus": evaluate_corpus,
    "task": evaluate_task,
    "instructions": evaluate_exchanges,
}


def evaluate(net: Any, data: Prepared, split: Literal["dev", "test"], targets: Targets, *, on: Placement) -> Scored:
    return EVALUATIONS[data.format.name](net, data, split, targets, on=on)
