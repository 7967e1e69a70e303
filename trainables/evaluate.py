"""Data and a model -> named numbers. Sums over the whole split, divided once; the same masks for everyone, always."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F

from trainables.data.batches import evaluation_batches
from trainables.data.corpus import Corpus
from trainables.models import logits_at
from trainables.spec import Masking

ROWS = 32  # sequences of an evaluation batch; no number depends on it beyond float error


@torch.no_grad()
def evaluate(
    net: Any,
    corpus: Corpus,
    split: Literal["dev", "test"],
    corruption: Masking | None,
    *,
    device: str,
    autocast: Callable[[], Any] = nullcontext,
    session: Any = None,
) -> dict[str, float]:
    """`mlm_loss` (nats) and `mlm_accuracy` (x 100), or `lm_…` for a next-token stream, over supervised positions."""
    was_training = net.training
    net.eval()
    rank, world = (session.rank, session.world) if session else (0, 1)
    total = correct = count = 0.0
    for i, batch in enumerate(evaluation_batches(corpus, split, corruption, batch=ROWS)):
        if i % world != rank:
            continue
        labels_N = batch.labels_N.to(device)
        with autocast():
            logits_NV = logits_at(net, batch.ids_BT.to(device), batch.positions_N.to(device)).float()
        total += F.cross_entropy(logits_NV, labels_N, reduction="sum").item()
        correct += (logits_NV.argmax(-1) == labels_N).sum().item()
        count += len(labels_N)
    net.train(was_training)
    if session:
        total, correct, count = session.total([total, correct, count])
    kind = "lm" if corruption is None else "mlm"
    return {f"{kind}_loss": total / count, f"{kind}_accuracy": 100 * correct / count}
