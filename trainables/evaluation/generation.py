"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainables.config.value import random_stream
from trainables.data.instructions.exchanges import Exchanges, ExchangeSet
from trainables.data.instructions.packing import ExchangeBatch, PackedBatch
from trainables.evaluation.per_example import LOGITS, ROWS, ExampleSums, Floats, Scored, in_eval_mode, is_mine, total
from trainables.generation.sample import sample
from trainables.losses.logits import kl
from trainables.metrics.rouge import rouge_l
from trainables.models.output_head import logits_at


@torch.no_grad()
def evaluate_exchanges(
    net: Any,
    data: ExchangeSet,
    split: Literal["dev", "test"],
    *,
    device: str,
    autocast: Callable[[], Any] = nullcontext,
    session: Any = None,
) -> Scored:
    """`lm_loss` (nats) and `lm_accuracy` (x 100) over the tokens of the replies, teacher-forced; and of replies of its own
    `rougeL` (x 100, the mean over the sampling seeds), `greedy_rougeL`, and `unfinished`, the share (x 100) without an end.

    By example, `predictions_E` are its `rougeL`.
    """
    exchanges: Exchanges = getattr(data, split)
    tally = ExampleSums.of(len(exchanges))
    with in_eval_mode(net):
        for _, indices, batch in _exchange_batches(exchanges, session, exchange_rows(data.vocab_size, data.length)):
            logits_NV, packed = _reply_logits(net, batch, data.vocab_size, device, autocast)
            tally.add(logits_NV, packed.labels_N, indices[packed.owners_N.cpu()])
    tally = tally.over(session)
    answered = {
        seed: _answered(net, data, exchanges, seed, device, autocast, session) for seed in (*data.scoring.seeds, None)
    }
    sampled = [answered[seed] for seed in data.scoring.seeds] or [answered[None]]
    rouge_E = np.mean([rouge for rouge, _ in sampled], axis=0)
    metrics = tally.metrics("lm") | {
        "rougeL": float(rouge_E.mean()),
        "greedy_rougeL": float(answered[None][0].mean()),
        "unfinished": float(100 * np.mean([unfinished for _, unfinished in sampled])),
    }
    return Scored(metrics, None, rouge_E, tally.losses_E, tally.counts_E)


def _answered(
    net: Any, data: ExchangeSet, exchanges: Exchanges, seed: int | None, device: str, autocast: Any, session: Any
) -> tuple[Floats, Floats]:
    """ROUGE-L of each example's reply, and whether it never ended. `seed`: None for greedy ones."""
    rouge_E, unfinished_E = np.zeros(len(exchanges)), np.zeros(len(exchanges))
    for first, indices, batch in _exchange_batches(exchanges, session, ROWS):
        drawn = sample(
            net,
            batch.prompts,
            data.scoring,
            end_id=data.end_id,
            pad_id=batch.pad_id,
            vocab_size=data.vocab_size,
            seed=random_stream("scoring", seed or 0),
            first=first,
            device=device,
            autocast=autocast,
            greedy=seed is None,
        )
        for index, reply in zip(indices.tolist(), drawn.replies, strict=True):
            rouge_E[index] = rouge_l(data.text(reply.tolist()), exchanges.references(index))
            unfinished_E[index] = reply[-1] != data.end_id
    if session:
        return total(session, rouge_E), total(session, unfinished_E)
    return rouge_E, unfinished_E


class Other(NamedTuple):
    """Whom a model is compared with, and what is to hold while that one is run."""

    net: Any
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


@torch.no_grad()
def agreements(
    net: Any,
    others: Mapping[str, Other],
    data: ExchangeSet,
    split: Literal["dev", "test"],
    *,
    device: str,
    autocast: Callable[[], Any] = nullcontext,
    session: Any = None,
) -> dict[str, dict[str, float]]:
    """By each of the others, `agreement`: how often (x 100) both find the same token likeliest, over the replies of the data;
    `kl`: KL(other || net), nats a token. The net runs once, whoever it is compared with."""
    rows = exchange_rows(data.vocab_size, data.length)
    sums = {name: [0.0, 0.0] for name in others}
    num = 0.0
    with ExitStack() as stack:
        for one in (net, *(other.net for other in others.values())):
            stack.enter_context(in_eval_mode(one))
        for _, _, batch in _exchange_batches(getattr(data, split), session, rows):
            ours_NV, _ = _reply_logits(net, batch, data.vocab_size, device, autocast)
            num += len(ours_NV)
            for name, other in others.items():
                with other.within():
                    theirs_NV, _ = _reply_logits(other.net, batch, data.vocab_size, device, autocast)
                sums[name][0] += (ours_NV.argmax(-1) == theirs_NV.argmax(-1)).sum().item()
                sums[name][1] += kl(theirs_NV.log_softmax(-1), ours_NV.log_softmax(-1)).item()
    found = {}
    for name, (same, divergence) in sums.items():
        same, divergence, total = session.total([same, divergence, num]) if session else (same, divergence, num)
        found[name] = {"agreement": 100 * same / total, "kl": divergence / total}
    return found


def exchange_rows(vocab_size: int, length: int) -> int:
    """Exchanges of an evaluation batch: fewer where whole logits, of every token in the worst case, would be large."""
    return max(1, min(ROWS, LOGITS // (vocab_size * length)))


def _exchange_batches(exchanges: Exchanges, session: Any, rows: int) -> Iterator[tuple[int, Tensor, ExchangeBatch]]:
    """(place of the first, indices, exchanges) of this rank, by rising length."""
    order = torch.from_numpy(np.argsort(exchanges.lengths, kind="stable"))
    for i, start in enumerate(range(0, len(order), rows)):
        if is_mine(i, session):
            yield start, order[start : start + rows], exchanges.rows(order[start : start + rows])


def _reply_logits(
    net: Any, batch: ExchangeBatch, vocab_size: int, device: str, autocast: Callable[[], Any]
) -> tuple[Tensor, PackedBatch]:
    """[N, V] before each token of the replies, padding rows of the vocabulary cut off."""
    packed = batch.to(device)
    with autocast():
        logits_NV = logits_at(net, packed.ids_BT, packed.positions_N, places_BT=packed.places_BT)
    return logits_NV[:, :vocab_size].float(), packed
