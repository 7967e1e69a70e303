"""Data and a model -> named numbers. Sums over the whole split, divided once; the same masks for everyone, always."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch

from trainables.config.phase import Masking
from trainables.data.batches import evaluation_batches
from trainables.data.corpus.sequences import Corpus
from trainables.evaluation.per_example import ROWS, ExampleSums, Scored, in_eval_mode, is_mine
from trainables.models.output_head import logits_at


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
) -> Scored:
    """`mlm_loss` (nats) and `mlm_accuracy` (x 100), or `lm_…` for a next-token stream, over supervised positions."""
    tally, length = ExampleSums.of(len(getattr(corpus, split))), getattr(corpus, split).length
    with in_eval_mode(net):
        for i, batch in enumerate(evaluation_batches(corpus, split, corruption, batch=ROWS)):
            if not is_mine(i, session):
                continue
            with autocast():
                logits_NV = logits_at(net, batch.ids_BT.to(device), batch.positions_N.to(device)).float()
            logits_NV = logits_NV[:, : corpus.vocab_size]  # rows beyond it pad the embeddings
            tally.add(logits_NV, batch.labels_N.to(device), batch.positions_N // length + i * ROWS)
    tally = tally.over(session)
    return Scored(tally.metrics("lm" if corruption is None else "mlm"), None, None, tally.losses_E, tally.counts_E)
