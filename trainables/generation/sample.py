"""Replies that models make: many at a time on a cache of keys and values, each token drawn from a stream of its own.

What a reply is depends on the weights, its prompt, how it is drawn, the seed and the prompt's number; on what else is in
the batch, and on how many rows run at a time, by float error only. That is why the loop is ours: transformers' `generate`
draws all rows from the process' one generator, lets a pretrained folder's `generation_config` have a say, and goes on
computing rows that have ended. The models' own forwards, masks and caches are transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables.config.data import Sampling
from trainables.config.value import random_stream
from trainables.generation.kv_cache import GenerationError, Tokens, prefill

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Generation:
    """Replies in the order of their prompts, the end token included where it came."""

    replies: tuple[Tokens, ...]
    num_unfinished: int  # replies that were cut: at `max_tokens`, at `length`, or where the model has no more positions
    num_tokens: (
        int  # positions that the model computed, padding and what was thrown away included; of `interleave`: the draft
    )
    teacher_tokens: int = 0


def sample(
    net: Any,
    prompts: Sequence[Tokens],
    how: Sampling,
    *,
    end_id: int,
    pad_id: int,
    vocab_size: int,
    seed: int,
    first: int = 0,
    length: int | None = None,
    device: str,
    autocast: Autocast = nullcontext,
    rows: int | None = None,
    greedy: bool = False,
) -> Generation:
    """A reply of `net` to each prompt. `first`: the number of the first prompt, where others answer those before it.

    `length`: tokens that prompt and reply may have together. `rows`: so many prompts at a time, all by default. No token
    at or beyond `vocab_size` is drawn. The net is in evaluation mode meanwhile, and as it was afterwards; the process'
    random generators are left alone. Raises GenerationError for an empty prompt, one that is longer than the model's
    context, and models without a cache of keys and values.
    """
    replies: dict[int, Tokens] = {}
    num_unfinished = num_tokens = 0
    room = reply_room(prompts, how.max_tokens, length, net)
    with generation_mode(net), autocast():
        for chosen in length_batches(prompts, rows):
            written = RepliesInProgress([room[i] for i in chosen], end_id, device)
            at_RT = uniform_streams(seed, "draw", [first + i for i in chosen], how.max_tokens, device)
            reading, logits_BV = prefill(net, vocab_size, [prompts[i] for i in chosen], pad_id, device)
            while True:
                at_B = at_RT[written.active_B, written.num_R[written.active_B].clamp_max(how.max_tokens - 1)]
                token_B = logits_BV.argmax(-1) if greedy else draw(logits_BV, at_B, how)
                goes_on_B = written.add(token_B[:, None], torch.ones_like(token_B))
                if not (going_on := int(goes_on_B.sum())):
                    break
                # rows that ended are left out once they are a quarter, so that all such copies together cost four times
                # the first one at most
                if going_on <= 0.75 * len(goes_on_B):
                    reading.keep(goes_on_B.nonzero()[:, 0])
                    written.active_B, token_B = written.active_B[goes_on_B], token_B[goes_on_B]
                logits_BV = reading.read(token_B[:, None], torch.ones_like(token_B[:, None], dtype=torch.bool), 1)[:, 0]
            replies.update(zip(chosen, written.replies(), strict=True))
            num_unfinished += written.num_unfinished()
            num_tokens += reading.num_tokens
    return Generation(tuple(replies[i] for i in range(len(prompts))), num_unfinished, num_tokens)


def draw(logits_BV: Tensor, at_B: Tensor, how: Sampling) -> Tensor:
    """The token of each row at which the sum of probabilities, in the order of the vocabulary, passes `at_B` in [0, 1).

    Of tokens that are exactly as likely, `top_k` and `top_p` keep all or none.
    """
    probs_BV = (logits_BV.float() / how.temperature).softmax(-1)
    num = probs_BV.shape[1]
    if how.top_p < 1 or (how.top_k or num) < num:
        largest_BK = _descending(probs_BV)[:, : how.top_k] if how.top_p < 1 else probs_BV.topk(how.top_k or num).values
        before_BK = largest_BK.cumsum(-1) - largest_BK
        num_B1 = (before_BK < how.top_p * largest_BK.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp_min(1)
        probs_BV = probs_BV.masked_fill(probs_BV < largest_BK.gather(1, num_B1 - 1), 0.0)
    sums_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    # below the sum of all, so at a token that has some probability
    wanted_B1 = at_B[:, None].clamp_max(1 - 1e-12) * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, wanted_B1, right=True)[:, 0].clamp_max(num - 1)


def _descending(values_BV: Tensor) -> Tensor:
    """Sorted rows. On a CPU by NumPy, for which a whole vocabulary takes a tenth of the time that torch needs."""
    if values_BV.device.type == "cpu":
        return torch.from_numpy(np.sort(values_BV.numpy())).flip(-1)
    return values_BV.sort(descending=True).values


def uniform_streams(seed: int, purpose: str, numbers: Sequence[int], num: int, device: str) -> Tensor:
    """[R, num] in [0, 1): a stream for each prompt's number, of which the first draws are the same for every `num`."""
    each = [torch.Generator().manual_seed(random_stream(seed, purpose, number)) for number in numbers]
    return torch.stack([torch.rand(num, dtype=torch.float64, generator=stream) for stream in each]).to(device)


def reply_room(prompts: Sequence[Tokens], max_tokens: int, length: int | None, *nets: Any) -> list[int]:
    """Tokens that each reply may have: with its prompt at most `length`, and what every model has positions for; and at
    least 1."""
    limits = [getattr(net.config, "max_position_embeddings", None) for net in nets]
    limit = min((limit for limit in limits if limit is not None), default=None)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise GenerationError(f"prompt {number} is empty: a model needs at least a start token to go on from")
        if limit is not None and len(prompt) > limit:
            raise GenerationError(
                f"prompt {number} has {len(prompt)} tokens, and a {nets[limits.index(limit)].config.model_type} with "
                f"positions for {limit} is to answer it: leave out longer ones (`prompt_length`)"
            )
    most = min((most for most in (limit, length) if most is not None), default=None)
    return [max_tokens if most is None else max(1, min(max_tokens, most - len(prompt))) for prompt in prompts]


def length_batches(prompts: Sequence[Tokens], rows: int | None) -> Iterator[list[int]]:
    """Indices of prompts of similar lengths, so many at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = rows or max(len(prompts), 1)
    yield from (order[start : start + size] for start in range(0, len(order), size))


class RepliesInProgress:
    """The replies so far of R rows, of which B are active: those that the models still go on with."""

    def __init__(self, room: list[int], end_id: int, device: str) -> None:
        self.end_id = end_id
        self.room_R = torch.tensor(room, device=device)
        self.num_R = torch.zeros_like(self.room_R)
        self.has_ended_R = torch.zeros_like(self.room_R, dtype=torch.bool)
        self.ids_RT = torch.zeros((len(room), max(room)), dtype=torch.long, device=device)
        self.active_B = torch.arange(len(room), device=device)

    def left_B(self) -> Tensor:
        return (self.room_R - self.num_R)[self.active_B]

    def add(self, ids_BG: Tensor, num_B: Tensor) -> Tensor:
        """Adds the first `num_B` tokens of each active row, but to those that have ended; returns which go on."""
        active_B = self.active_B
        goes_on_B = ~self.has_ended_R[active_B] & (self.left_B() > 0)
        places_G = torch.arange(ids_BG.shape[1], device=ids_BG.device)
        is_new_BG = (places_G < num_B[:, None]) & goes_on_B[:, None]
        rows_N, columns_N = is_new_BG.nonzero(as_tuple=True)
        new_N = ids_BG[rows_N, columns_N]
        self.ids_RT[active_B[rows_N], self.num_R[active_B[rows_N]] + columns_N] = new_N
        self.num_R[active_B] += is_new_BG.sum(1)
        self.has_ended_R[active_B] |= (is_new_BG & (ids_BG == self.end_id)).any(1)
        return ~self.has_ended_R[active_B] & (self.left_B() > 0)

    def replies(self) -> list[Tokens]:
        ids_RT = self.ids_RT.cpu().numpy().astype(np.int32)
        return [row[:num].copy() for row, num in zip(ids_RT, self.num_R.tolist(), strict=True)]

    def num_unfinished(self) -> int:
        return int((~self.has_ended_R).sum())


@contextmanager
def generation_mode(*nets: nn.Module) -> Iterator[None]:
    """Without gradients, and in evaluation mode, in which layers keep their caches though they recompute in training."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
