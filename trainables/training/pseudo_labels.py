"""Labels that models make: how well each example of a task is predicted, as four classes. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainables.config.phase import PredictionQuality
from trainables.storage.files import log

FEW = 20  # examples of a label, below which little can be learnt from the label


@dataclass(frozen=True)
class Labelled:
    """The labels of one split, and how they came about."""

    labels_E: Tensor  # int64
    thresholds: tuple[float, float]  # of right and of wrong predictions
    accuracy: float  # x 100, of the models that label


def prediction_quality(
    rule: PredictionQuality,
    logits_EC: Tensor,
    classes_E: Tensor,
    *,
    seed: int,
    thresholds: tuple[float, float] | None = None,
) -> Labelled:
    """Labels each example: 0 right with its largest probability above t1, 1 right and not above, 2 wrong and above t2, 3
    wrong and not above.

    At temperature 1 (Cho & Kang 2022). t1, t2: `thresholds` (those of train, for the other splits), else the rule's, else
    the medians over right and over wrong predictions; where no prediction is wrong t2 = t1, and the other way round.
    `seed`: of the permutation, where the rule asks for one.
    """
    confidence_E, predicted_E = logits_EC.double().softmax(-1).max(-1)
    right_E = predicted_E == classes_E
    if thresholds is None and rule.thresholds == "median":
        medians = [confidence_E[which].median().item() if which.any() else None for which in (right_E, ~right_E)]
        t1, t2 = (medians[i] if medians[i] is not None else medians[1 - i] for i in (0, 1))
        thresholds = (float(t1 or 0.0), float(t2 or 0.0))
    elif thresholds is None:
        assert isinstance(rule.thresholds, tuple)  # of one data set
        t1, t2 = rule.thresholds
        thresholds = (t1, t2 if (~right_E).any() else t1)
    bars_E = torch.where(right_E, thresholds[0], thresholds[1])
    labels_E = 2 * (~right_E).long() + (confidence_E <= bars_E).long()
    if rule.permuted:
        labels_E = labels_E[torch.randperm(len(labels_E), generator=torch.Generator().manual_seed(seed))]
    return Labelled(labels_E, thresholds, 100 * right_E.double().mean().item())


def out_of_fold(logits: Sequence[Tensor], folds_E: Tensor | None) -> Tensor:
    """Returns logits [E, C] of each example by the model that was not trained on its fold; on dev and test their mean."""
    if len(logits) == 1:
        return logits[0]
    stacked_MEC = torch.stack(list(logits))
    if folds_E is None:
        return stacked_MEC.mean(0)
    return stacked_MEC[folds_E, torch.arange(len(folds_E))]


def describe(labelled: Labelled, where: str) -> dict[str, float]:
    """Returns counts, thresholds and accuracy as metrics; logs them, and warns of labels with few examples."""
    counts = torch.bincount(labelled.labels_E, minlength=PredictionQuality.NUM).tolist()
    about = f"labels {counts}, thresholds {labelled.thresholds[0]:.4f} {labelled.thresholds[1]:.4f}, accuracy {labelled.accuracy:.2f}"
    log.info("%s: %s", where, about)
    for label, count in enumerate(counts):
        if count < FEW:
            log.warning("%s: only %d examples of label %d", where, count, label)
    found = {f"label_{label}_count": float(count) for label, count in enumerate(counts)}
    return {
        **found,
        "labeller_accuracy": labelled.accuracy,
        **{f"threshold_{i + 1}": t for i, t in enumerate(labelled.thresholds)},
    }
