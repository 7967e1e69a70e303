"""Loss and accuracy of a language model on a corpus: sums over the whole split, divided once; the same masks always."""

from __future__ import annotations

from typing import Any, Literal

import torch

from trainables.data.corpus.sequences import Corpus
from trainables.evaluation.per_example import DEFAULT_TARGETS, ExampleSums, Placement, Scored, Targets, in_eval_mode
from trainables.models.output_head import logits_at


@torch.no_grad()
def evaluate_corpus(
    net: Any, corpus: Corpus, split: Literal["dev", "test"], targets: Targets = DEFAULT_TARGETS, *, on: Placement
) -> Scored:
    """Measures `mlm_loss` (nats) and `mlm_accuracy` (x 100), or `lm_...` for next tokens, over supervised positions."""
    sequences = getattr(corpus, split)
    sums = ExampleSums.of(len(sequences))
    with in_eval_mode(net):
        for i, batch in enumerate(corpus.evaluation_batches(split, targets.corruption, batch=on.rows)):
            if not on.is_mine(i):
                continue
            with on.autocast():
                logits_NV = logits_at(net, batch.ids_BT.to(on.device), batch.positions_N.to(on.device)).float()
            logits_NV = logits_NV[:, : corpus.vocab_size]  # rows beyond the vocabulary pad the embeddings
            sums.add(logits_NV, batch.labels_N.to(on.device), batch.positions_N // sequences.length + i * on.rows)
    sums = sums.over(on)
    metrics = sums.metrics("lm" if targets.corruption is None else "mlm")
    return Scored(metrics, None, None, sums.losses_E, sums.counts_E, clusters_E=sequences.documents)
