"""Loss and scores of a model on a task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.data.classification.tasks import Examples, Task
from trainables.data.order import by_length
from trainables.evaluation.per_example import DEFAULT_TARGETS, Placement, Scored, Targets, in_eval_mode
from trainables.metrics.task_scores import scores
from trainables.models.output_head import class_logits


@torch.no_grad()
def evaluate_task(
    net: Any, task: Task, split: Literal["dev", "test"], targets: Targets = DEFAULT_TARGETS, *, on: Placement
) -> Scored:
    """Measures `task_loss` (nats, or squared error) and the task's scores (x 100); accuracy for labels of a model."""
    examples: Examples = getattr(task, split)
    is_derived = targets.labels_E is not None
    labels_E = torch.as_tensor(examples.labels if targets.labels_E is None else targets.labels_E)
    predictions_E, losses_E = np.zeros(len(examples)), np.zeros(len(examples))
    with in_eval_mode(net):
        for indices, logits_BC in batch_logits(net, examples, on):
            labels_B = labels_E[indices]
            if logits_BC.shape[1] == 1:
                predicted_B, loss_B = logits_BC[:, 0], (logits_BC[:, 0] - labels_B).square()
            else:
                predicted_B, loss_B = logits_BC.argmax(-1), F.cross_entropy(logits_BC, labels_B, reduction="none")
            predictions_E[indices], losses_E[indices] = predicted_B.double().numpy(), loss_B.double().numpy()
    predictions_E, losses_E = on.total(predictions_E), on.total(losses_E)
    gold_E, metrics = labels_E.double().numpy(), {"task_loss": float(losses_E.mean())}
    if np.isfinite(losses_E).all():
        rule = "accuracy" if is_derived else task.score
        metrics |= scores(rule, predictions_E, gold_E, examples.parts, part_names=task.part_names)
    ones_E, clusters_E = np.ones(len(examples)), examples.clusters()
    return Scored(metrics, gold_E, predictions_E, losses_E, ones_E, examples.parts, clusters_E)


@torch.no_grad()
def batch_logits(net: Any, examples: Examples, on: Placement) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (indices of examples, logits [B, C] on the CPU) for the batches of this rank, by rising length."""
    for i, (indices, batch) in enumerate(by_length(examples, on.rows)):
        if on.is_mine(i):
            batch = batch.to(on.device)
            with on.autocast():
                logits_BC = class_logits(net, batch.ids_BT, batch.mask_BT, batch.types_BT)
            yield indices, logits_BC.float().cpu()
