"""TODO."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.data.classification.tasks import Task, task_evaluation
from trainables.evaluation.per_example import ROWS, Scored, in_eval_mode, is_mine, total
from trainables.metrics.task_scores import scores
from trainables.models.output_head import class_logits


@torch.no_grad()
def evaluate_task(
    net: Any,
    task: Task,
    split: Literal["dev", "test"],
    *,
    made_E: Tensor | None = None,
    device: str,
    autocast: Callable[[], Any] = nullcontext,
    session: Any = None,
) -> Scored:
    """`task_loss` (nats, or squared error), and the task's scores (x 100). `made_E`: labels that a model made; with these
    the score is accuracy."""
    examples = getattr(task, split)
    labels_E = torch.as_tensor(examples.labels) if made_E is None else made_E
    predictions_E, losses_E = np.zeros(len(examples)), np.zeros(len(examples))
    with in_eval_mode(net):
        for i, (indices, batch) in enumerate(task_evaluation(examples, batch=ROWS)):
            if not is_mine(i, session):
                continue
            with autocast():
                on = batch.to(device)
                logits_BC = class_logits(net, on.ids_BT, on.mask_BT, on.types_BT).float().cpu()
            labels_B = labels_E[torch.as_tensor(indices)]
            if logits_BC.shape[1] == 1:
                predicted_B, loss_B = logits_BC[:, 0], (logits_BC[:, 0] - labels_B).square()
            else:
                predicted_B, loss_B = logits_BC.argmax(-1), F.cross_entropy(logits_BC, labels_B, reduction="none")
            predictions_E[indices], losses_E[indices] = predicted_B.double().numpy(), loss_B.double().numpy()
    if session:
        predictions_E, losses_E = total(session, predictions_E), total(session, losses_E)
    gold_E = labels_E.double().numpy()
    rule = task.score if made_E is None else "accuracy"
    found = scores(rule, predictions_E, gold_E, examples.parts, task.part_names) if np.isfinite(losses_E).all() else {}
    metrics = {"task_loss": float(losses_E.mean()), **found}
    return Scored(metrics, gold_E, predictions_E, losses_E, np.ones(len(examples)), examples.parts)
