"""Data and a model -> named numbers. Sums over the whole split, divided once; the same masks for everyone, always."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainables.data.batches import evaluation_batches
from trainables.data.corpus import Corpus
from trainables.data.exchanges import ExchangeBatch, Exchanges, ExchangeSet, PackedBatch
from trainables.data.rouge import rouge_l
from trainables.data.scores import scores
from trainables.data.tasks import Task, task_evaluation
from trainables.generate import sample
from trainables.losses.logits import kl
from trainables.models import class_logits, logits_at, num_parameters
from trainables.spec.phase import Masking
from trainables.spec.value import random_stream

ROWS = 32  # sequences of an evaluation batch; no number depends on it beyond float error
LOGITS = 2**27  # numbers of whole logits that are there at once where replies are scored
Floats = NDArray[np.float64]


class Scored(NamedTuple):
    """How a model does on a split: over all, and on each example E."""

    metrics: dict[str, float]
    labels_E: Floats | None  # class or number; None for a corpus, as `predictions_E`
    predictions_E: Floats | None
    losses_E: Floats  # nats (squared error for numbers), summed over the example's supervised positions
    counts_E: Floats  # supervised positions; 1 in a task
    parts_E: NDArray[np.int64] | None = None  # which part of the split, where it has several


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
    tally, length = _Tally.of(len(getattr(corpus, split))), getattr(corpus, split).length
    with _in_eval_mode(net):
        for i, batch in enumerate(evaluation_batches(corpus, split, corruption, batch=ROWS)):
            if not _is_mine(i, session):
                continue
            with autocast():
                logits_NV = logits_at(net, batch.ids_BT.to(device), batch.positions_N.to(device)).float()
            logits_NV = logits_NV[:, : corpus.vocab_size]  # rows beyond it pad the embeddings
            tally.add(logits_NV, batch.labels_N.to(device), batch.positions_N // length + i * ROWS)
    tally = tally.over(session)
    return Scored(tally.metrics("lm" if corruption is None else "mlm"), None, None, tally.losses_E, tally.counts_E)


@dataclass
class _Tally:
    """Sums by example of what is known of supervised tokens."""

    losses_E: Floats
    counts_E: Floats
    correct: float = 0.0

    @classmethod
    def of(cls, num: int) -> _Tally:
        return cls(np.zeros(num), np.zeros(num))

    def add(self, logits_NV: Tensor, labels_N: Tensor, examples_N: Tensor) -> None:
        loss_N = F.cross_entropy(logits_NV, labels_N, reduction="none").double().cpu().numpy()
        np.add.at(self.losses_E, examples_N.numpy(), loss_N)
        np.add.at(self.counts_E, examples_N.numpy(), 1.0)
        self.correct += (logits_NV.argmax(-1) == labels_N).sum().item()

    def over(self, session: Any) -> _Tally:
        """Of all ranks."""
        if not session:
            return self
        return _Tally(_total(session, self.losses_E), _total(session, self.counts_E), *session.total([self.correct]))

    def metrics(self, kind: str) -> dict[str, float]:
        num = self.counts_E.sum()
        return {f"{kind}_loss": float(self.losses_E.sum() / num), f"{kind}_accuracy": float(100 * self.correct / num)}


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
    with _in_eval_mode(net):
        for i, (indices, batch) in enumerate(task_evaluation(examples, batch=ROWS)):
            if not _is_mine(i, session):
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
        predictions_E, losses_E = _total(session, predictions_E), _total(session, losses_E)
    gold_E = labels_E.double().numpy()
    rule = task.score if made_E is None else "accuracy"
    found = scores(rule, predictions_E, gold_E, examples.parts, task.part_names) if np.isfinite(losses_E).all() else {}
    metrics = {"task_loss": float(losses_E.mean()), **found}
    return Scored(metrics, gold_E, predictions_E, losses_E, np.ones(len(examples)), examples.parts)


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
    tally = _Tally.of(len(exchanges))
    with _in_eval_mode(net):
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
        return _total(session, rouge_E), _total(session, unfinished_E)
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
            stack.enter_context(_in_eval_mode(one))
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
        if _is_mine(i, session):
            yield start, order[start : start + rows], exchanges.rows(order[start : start + rows])


def _reply_logits(
    net: Any, batch: ExchangeBatch, vocab_size: int, device: str, autocast: Callable[[], Any]
) -> tuple[Tensor, PackedBatch]:
    """[N, V] before each token of the replies, padding rows of the vocabulary cut off."""
    packed = batch.to(device)
    with autocast():
        logits_NV = logits_at(net, packed.ids_BT, packed.positions_N, places_BT=packed.places_BT)
    return logits_NV[:, :vocab_size].float(), packed


@contextmanager
def _in_eval_mode(net: Any) -> Iterator[None]:
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


@torch.no_grad()
def flops_per_token(net: Any, *, length: int, device: str) -> float:
    """Of a forward over a sequence of `length`, the head at each of its tokens."""
    ids_BT = torch.zeros((1, length), dtype=torch.long, device=device)
    with _in_eval_mode(net), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        logits_at(net, ids_BT, torch.arange(length, device=device))
    return float(counter.get_total_flops()) / length


RUNS = 9  # timed forwards of one sequence, after two that warm up


@torch.no_grad()
def size_and_speed(
    net: Any, *, length: int, is_task: bool, device: str, autocast: Callable[[], Any] = nullcontext
) -> dict[str, float]:
    """`parameters` (shared ones once), `forward_flops` of one sequence, `latency_ms`: the median time of one by itself.

    A sequence of `length` tokens without padding, through everything, the head at all positions. Other trials that run
    on the machine make it slower.
    """
    ids_BT = torch.ones((1, length), dtype=torch.long, device=device)

    def forward() -> None:
        with autocast():
            if is_task:
                class_logits(net, ids_BT, torch.ones_like(ids_BT), None)
            else:
                logits_at(net, ids_BT, torch.arange(length, device=device))
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    with _in_eval_mode(net):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            forward()
        forward()
        for _ in range(RUNS):
            started = time.perf_counter()
            forward()
            times.append(time.perf_counter() - started)
    found = {"parameters": num_parameters(net), "forward_flops": counter.get_total_flops()}
    return {**{name: float(value) for name, value in found.items()}, "latency_ms": 1000 * sorted(times)[RUNS // 2]}


def _attention_flops(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    """Two products for each pair of positions."""
    b, h, t, d = query
    return int(2 * b * h * t * key[2] * (d + value[3]))


def _attention_backward_flops(_grad: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    """Five products: the scores are made again, then gradients of values, of weights, of queries and of keys."""
    b, h, t, d = query
    return int(2 * b * h * t * key[2] * (3 * d + 2 * value[3]))


_ATEN = torch.ops.aten
FLOPS = {  # PyTorch has formulas for the kernels of GPUs, but none for that of CPUs
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _is_mine(index: int, session: Any) -> bool:
    return session is None or index % session.world == session.rank


def _total(session: Any, values: Floats) -> Floats:
    return np.asarray(session.total(values.tolist()))
