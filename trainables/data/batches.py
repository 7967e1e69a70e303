"""Which sequences a step reads, the fixed batches of evaluation, and examples for the plan."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from trainables.config.errors import DataError
from trainables.config.phase import Masking
from trainables.config.value import random_stream
from trainables.data.classification.tasks import Task
from trainables.data.corpus.masking import MaskedBatch, mask_batch, next_token_batch, slice_batch
from trainables.data.corpus.sequences import Corpus
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.data.prepared import Prepared

EVALUATION_SEED = random_stream("evaluation masks")  # one for all: models, arms, steps, seeds


def batch_indices(num: int, batch: int, step: int, *, seed: int, stream: str) -> Tensor:
    """Sequences [batch] of global step `step`, of the epochs' permutations laid end to end. A pure function."""
    epochs = range(step * batch // num, ((step + 1) * batch - 1) // num + 1)
    order = torch.cat([_permutation(num, random_stream(seed, "order", stream, epoch)) for epoch in epochs])
    start = step * batch - epochs[0] * num
    return order[start : start + batch]


@lru_cache(maxsize=4)
def _permutation(num: int, seed: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))


def corrupt(ids_BT: Tensor, corpus: Corpus, masking: Masking | None, *, seed: int) -> MaskedBatch:
    """The global batch of a stream: masked, or with the next token as label."""
    if masking is None:
        return next_token_batch(ids_BT)
    if corpus.mask_id is None:
        raise DataError("the tokenizer has no mask token; use `corruption: null` or a tokenizer that has one")
    return mask_batch(
        ids_BT,
        masking=masking,
        vocab_size=corpus.vocab_size,
        mask_id=corpus.mask_id,
        special_ids=corpus.special_ids,
        seed=seed,
    )


def evaluation_batches(
    corpus: Corpus, split: Literal["dev", "test"], masking: Masking | None, *, batch: int
) -> Iterator[MaskedBatch]:
    """A split in order, `batch` sequences at a time. Masks are drawn for the whole split, whatever `batch` is."""
    sequences = getattr(corpus, split)
    whole = corrupt(sequences.rows(range(len(sequences))), corpus, masking, seed=EVALUATION_SEED)
    for start in range(0, len(sequences), batch):
        yield slice_batch(whole, start, min(start + batch, len(sequences)))


def examples(data: Prepared, masking: Masking | None, *, num: int = 2, num_tokens: int = 60) -> list[str]:
    """Beginnings of training sequences, decoded; a supervised token stands as «word→[MASK]», a task's label ahead.

    Of an exchange the reply, which is supervised, stands in «», ends included; of a long prompt the middle is left out.
    """
    if isinstance(data, ExchangeSet):
        return [_exchanged(data, index, num_tokens) for index in range(min(num, len(data.train or data.test)))]
    if isinstance(data, Task):
        return [_labelled(data, index, num_tokens) for index in range(min(num, len(data.train)))]
    ids_BT = data.train.rows(range(min(num, len(data.train))))
    seen = corrupt(ids_BT, data, masking, seed=EVALUATION_SEED)
    length = ids_BT.shape[1]
    supervised = set(seen.positions_N.tolist()) if masking is not None else set()
    return [
        _marked(data, ids, new, {p - row * length for p in supervised if p // length == row})
        for row, (ids, new) in enumerate(zip(ids_BT[:, :num_tokens], seen.ids_BT[:, :num_tokens], strict=True))
    ]


def _exchanged(data: ExchangeSet, index: int, num_tokens: int) -> str:
    split, decode = data.train or data.test, data.tokenizer.decode

    def shown(ids: list[int], head: int, tail: int) -> str:
        parts = [ids] if len(ids) <= head + tail else [ids[:head], ids[-tail:]]
        return " … ".join(" ".join(decode(part).split()) for part in parts)

    given = shown(split.prompt(index).tolist(), num_tokens // 6, num_tokens // 3)
    return f"{given} «{shown(split.reply(index).tolist(), num_tokens // 3, num_tokens // 6)}»"


def _labelled(task: Task, index: int, num_tokens: int) -> str:
    label = task.train.labels[index].item()
    text = task.tokenizer.decode(task.train.ids(index)[:num_tokens])
    return f"«{f'{label:g}' if task.is_regression else task.class_names[int(label)]}» {' '.join(text.split())}"


def _marked(corpus: Corpus, ids_T: Tensor, seen_T: Tensor, supervised: set[int]) -> str:
    decode = corpus.tokenizer.decode
    parts, run = list[str](), list[int]()
    for position, (token, seen) in enumerate(zip(ids_T.tolist(), seen_T.tolist(), strict=True)):
        if position not in supervised:
            run.append(token)
            continue
        parts += [decode(run), f"«{decode([token]).strip()}→{decode([seen]).strip()}»"]
        run = []
    return " ".join(" ".join([*parts, decode(run)]).split())
