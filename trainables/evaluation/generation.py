"""Loss of a model on replies, scores of the replies that it generates, and its agreement with other models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainables.config.value import random_stream
from trainables.data.instructions.exchanges import Exchanges, ExchangeSet
from trainables.data.instructions.packing import ExchangeBatch, PackedBatch
from trainables.data.order import by_length
from trainables.evaluation.per_example import (
    DEFAULT_TARGETS,
    LOGITS,
    ROWS,
    ExampleSums,
    Floats,
    Placement,
    Scored,
    Targets,
    in_eval_mode,
)
from trainables.generation.context import GenerationContext
from trainables.generation.sample import sample
from trainables.losses.logits import INFINITE, kl, log_probs
from trainables.metrics.replies import score_reply
from trainables.metrics.rouge import GREEDY_ROUGE_L, ROUGE_L, UNFINISHED, rouge_l
from trainables.models.output_head import logits_at


@torch.no_grad()
def evaluate_exchanges(
    net: Any, data: ExchangeSet, split: Literal["dev", "test"], _: Targets = DEFAULT_TARGETS, *, on: Placement
) -> Scored:
    """Measures `lm_loss` (nats) and `lm_accuracy` (x 100) over the tokens of the replies, teacher-forced; and of generated
    replies `rougeL` (x 100, the mean over the sampling seeds), `greedy_rougeL`, and `unfinished`, the share (x 100) without
    an end; and each further metric that the data set names, as `rougeL`.

    By example, `predictions_E` are its `rougeL`, `samples_EK` that of each drawn reply, and `scores` has the further metrics.
    """
    exchanges: Exchanges = getattr(data, split)
    sums = ExampleSums.of(len(exchanges))
    with in_eval_mode(net):
        for _first, indices, batch in _batches(exchanges, exchange_rows(data.vocab_size, data.length), on):
            logits_NV, packed = _reply_logits(net, batch, data.vocab_size, on)
            sums.add(logits_NV, packed.labels_N, indices[packed.example_ids_N.cpu()])
    sums = sums.over(on)
    seeds = data.scoring.seeds
    generated = {seed: _score_replies(net, data, exchanges, seed, on=on) for seed in (*seeds, None)}
    drawn = [generated[seed] for seed in seeds] or [generated[None]]
    sampled = {name: np.mean([scores[name] for scores in drawn], axis=0) for name in drawn[0]}
    rouge_E, unfinished_E = sampled.pop(ROUGE_L.name), sampled.pop(UNFINISHED.name)
    metrics = sums.metrics("lm") | {
        ROUGE_L.name: float(rouge_E.mean()),
        GREEDY_ROUGE_L.name: float(generated[None][ROUGE_L.name].mean()),
        UNFINISHED.name: float(100 * unfinished_E.mean()),
        **{name: float(score_E.mean()) for name, score_E in sampled.items()},
    }
    rouge_EK = np.stack([generated[seed][ROUGE_L.name] for seed in seeds], axis=1) if seeds else None
    found = Scored(metrics, None, rouge_E, sums.losses_E, sums.counts_E, clusters_E=exchanges.clusters())
    return found._replace(scores=sampled, samples_EK=rouge_EK)


def _score_replies(
    net: Any, data: ExchangeSet, exchanges: Exchanges, seed: int | None, *, on: Placement
) -> dict[str, Floats]:
    """Scores each example's reply by every metric; `unfinished`: 1 where the reply never ended. `seed`: None for greedy
    replies."""
    metrics = data.scoring.metrics
    names = (ROUGE_L.name, UNFINISHED.name, *(metric.kind for metric in metrics))
    scores = {name: np.zeros(len(exchanges)) for name in names}
    context = GenerationContext(data.end_ids, data.end_id, data.vocab_size, on.device, on.autocast)
    for first, indices, batch in _batches(exchanges, on.rows, on):
        drawn = sample(
            net,
            batch.prompts,
            data.scoring,
            context,
            seed=random_stream("scoring", seed or 0),
            first=first,
            greedy=seed is None,
        )
        for index, reply in zip(indices.tolist(), drawn.replies, strict=True):
            text, references = data.text(reply.tolist()), exchanges.references(index)
            scores[ROUGE_L.name][index] = rouge_l(text, references)
            scores[UNFINISHED.name][index] = not context.has_ended(reply)
            for metric in metrics:
                scores[metric.kind][index] = score_reply(metric, text, references)
    return {name: on.total(score_E) for name, score_E in scores.items()}


class ComparedModel(NamedTuple):
    """A model for comparison; `context` is entered around each of its forwards."""

    net: Any
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@torch.no_grad()
def agreements(
    net: Any,
    others: Mapping[str, ComparedModel],
    data: ExchangeSet,
    split: Literal["dev", "test"],
    *,
    on: Placement,
) -> dict[str, dict[str, float]]:
    """Measures, for each of the others, `agreement`: how often (x 100) both find the same token likeliest, over the replies
    of the data; and `kl`: KL(other || net), nats a token. The net runs once for all others."""
    sums = {name: [0.0, 0.0] for name in others}
    num = 0.0
    with ExitStack() as stack:
        for model in (net, *(other.net for other in others.values())):
            stack.enter_context(in_eval_mode(model))
        for _, _, batch in _batches(getattr(data, split), exchange_rows(data.vocab_size, data.length), on):
            ours_NV, _ = _reply_logits(net, batch, data.vocab_size, on)
            num += len(ours_NV)
            for name, other in others.items():
                with other.context():
                    theirs_NV, _ = _reply_logits(other.net, batch, data.vocab_size, on)
                sums[name][0] += (ours_NV.argmax(-1) == theirs_NV.argmax(-1)).sum().item()
                apart = kl(log_probs(theirs_NV), log_probs(ours_NV)).item()
                sums[name][1] += apart if apart < INFINITE else math.inf
    measured = {}
    for name, (same, divergence) in sums.items():
        same, divergence, tokens = on.ranks.total([same, divergence, num])
        measured[name] = {"agreement": 100 * same / tokens, "kl": divergence / tokens}
    return measured


def exchange_rows(vocab_size: int, length: int) -> int:
    """Returns the exchanges of a batch: fewer where whole logits, of every token in the worst case, would be large."""
    return max(1, min(ROWS, LOGITS // (vocab_size * length)))


def _batches(exchanges: Exchanges, rows: int, on: Placement) -> Iterator[tuple[int, Tensor, ExchangeBatch]]:
    """Yields (place of the first in the order, indices, exchanges) for the batches of this rank, by rising length."""
    for i, (indices, batch) in enumerate(by_length(exchanges, rows)):
        if on.is_mine(i):
            yield i * rows, indices, batch


def _reply_logits(net: Any, batch: ExchangeBatch, vocab_size: int, on: Placement) -> tuple[Tensor, PackedBatch]:
    """Computes logits [N, V] before each token of the replies, without rows that pad the embeddings."""
    packed = batch.to(on.device)
    with on.autocast():
        logits_NV = logits_at(net, packed.ids_BT, packed.positions_N, position_ids_BT=packed.position_ids_BT)
    return logits_NV[:, :vocab_size].float(), packed
