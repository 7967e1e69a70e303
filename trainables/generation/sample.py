"""Samples replies: many at a time with a cache of keys and values, each token drawn from a random stream of its own.

A reply depends on the weights, its prompt, how tokens are drawn, the seed and the prompt's number. The rest of the
batch, and how many rows run at a time, change it by float error only. For this reason the loop is not transformers'
`generate`, which draws all rows from the process' one generator, reads a pretrained folder's `generation_config`, and
goes on computing rows that have ended. The models' own forwards, masks and caches are transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables.config.data import Sampling
from trainables.config.value import random_stream
from trainables.generation.context import Generation, GenerationContext, GenerationError, Tokens
from trainables.generation.kv_cache import prefill


def sample(
    net: Any,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    context: GenerationContext,
    *,
    seed: int,
    first: int = 0,
    greedy: bool = False,
) -> Generation:
    """Generates a reply of `net` to each prompt. `first`: the number of the first prompt, where other ranks answer
    those before.

    The net is in evaluation mode meanwhile, and as before afterwards; the process' random generators are left alone.
    Raises GenerationError for an empty prompt, for a prompt longer than the model's context, and for models without a
    cache of keys and values.
    """
    device, replies, num_tokens = context.device, dict[int, Tokens](), 0
    room = reply_room(prompts, sampling.max_tokens, context.length, net)
    with generation_mode(net), context.autocast():
        for chosen in length_batches(prompts, context.rows):
            written = RepliesInProgress([room[i] for i in chosen], context.end_ids, device)
            uniforms_RT = uniform_streams(
                seed, "draw", [first + i for i in chosen], num=sampling.max_tokens, device=device
            )
            reading, logits_BV = prefill(net, [prompts[i] for i in chosen], context)
            while True:
                places_B = written.num_R[written.active_B].clamp_max(sampling.max_tokens - 1)
                uniforms_B = uniforms_RT[written.active_B, places_B]
                token_B = logits_BV.argmax(-1) if greedy else draw(logits_BV, uniforms_B, sampling)
                goes_on_B = written.add(token_B[:, None], torch.ones_like(token_B))
                if not (going_on := int(goes_on_B.sum())):
                    break
                # rows that ended are dropped once they are a quarter, so that all copies together cost at most
                # four times the first
                if going_on <= 0.75 * len(goes_on_B):
                    reading.keep(goes_on_B.nonzero()[:, 0])
                    written.active_B, token_B = written.active_B[goes_on_B], token_B[goes_on_B]
                logits_BV = reading.read(token_B[:, None], torch.ones_like(token_B[:, None], dtype=torch.bool), 1)[:, 0]
            replies.update(zip(chosen, written.replies(), strict=True))
            num_tokens += reading.num_tokens
    return Generation(tuple(replies[i] for i in range(len(prompts))), num_tokens)


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """Draws the token of each row at which the sum of probabilities, in the order of the vocabulary, passes
    `uniforms_B` in [0, 1).

    Of equally likely tokens `top_k` and `top_p` keep all or none.
    """
    probs_BV = (logits_BV.float() / sampling.temperature).softmax(-1)
    num = probs_BV.shape[1]
    if sampling.top_p < 1 or (sampling.top_k or num) < num:
        largest_BK = (
            _descending(probs_BV)[:, : sampling.top_k]
            if sampling.top_p < 1
            else probs_BV.topk(sampling.top_k or num).values
        )
        before_BK = largest_BK.cumsum(-1) - largest_BK
        num_B1 = (before_BK < sampling.top_p * largest_BK.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp_min(1)
        probs_BV = probs_BV.masked_fill(probs_BV < largest_BK.gather(1, num_B1 - 1), 0.0)
    sums_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    # below the sum of all, so at a token of positive probability
    wanted_B1 = uniforms_B[:, None].clamp_max(1 - 1e-12) * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, wanted_B1, right=True)[:, 0].clamp_max(num - 1)


def _descending(values_BV: Tensor) -> Tensor:
    """Sorts rows. On a CPU by NumPy, ten times faster than torch for a whole vocabulary."""
    if values_BV.device.type == "cpu":
        return torch.from_numpy(np.sort(values_BV.numpy())).flip(-1)
    return values_BV.sort(descending=True).values


def uniform_streams(seed: int, purpose: str, numbers: Sequence[int], *, num: int, device: str) -> Tensor:
    """Draws [R, num] in [0, 1) from a random stream for each prompt's number; the first draws are the same for every
    `num`."""
    each = [torch.Generator().manual_seed(random_stream(seed, purpose, number)) for number in numbers]
    return torch.stack([torch.rand(num, dtype=torch.float64, generator=stream) for stream in each]).to(device)


def reply_room(prompts: Sequence[Tokens], max_tokens: int, length: int | None, *nets: Any) -> list[int]:
    """Tokens that each reply may have, at least 1: its prompt and the reply have at most `length` tokens, and a
    position in every model."""
    limits = [getattr(net.config, "max_position_embeddings", None) for net in nets]
    limit = min((limit for limit in limits if limit is not None), default=None)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise GenerationError(f"prompt {number} is empty; expected at least one token")
        if limit is not None and len(prompt) > limit:
            raise GenerationError(
                f"prompt {number} has {len(prompt)} tokens, but the {nets[limits.index(limit)].config.model_type} that "
                f"is to answer has positions for {limit}: leave out longer prompts (`prompt_length`)"
            )
    most = min((most for most in (limit, length) if most is not None), default=None)
    return [max_tokens if most is None else max(1, min(max_tokens, most - len(prompt))) for prompt in prompts]


def length_batches(prompts: Sequence[Tokens], rows: int | None) -> Iterator[list[int]]:
    """Indices of prompts of similar lengths, at most `rows` at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = rows or max(len(prompts), 1)
    yield from (order[start : start + size] for start in range(0, len(order), size))


class RepliesInProgress:
    """The replies so far of R rows, of which B are active, those that are not dropped yet."""

    def __init__(self, room: list[int], end_ids: Sequence[int], device: str) -> None:
        self.ends_E = torch.tensor(end_ids, device=device)
        self.room_R = torch.tensor(room, device=device)
        self.num_R = torch.zeros_like(self.room_R)
        self.has_ended_R = torch.zeros_like(self.room_R, dtype=torch.bool)
        self.ids_RT = torch.zeros((len(room), max(room)), dtype=torch.long, device=device)
        self.active_B = torch.arange(len(room), device=device)

    def left_B(self) -> Tensor:
        return (self.room_R - self.num_R)[self.active_B]

    def add(self, ids_BG: Tensor, num_B: Tensor) -> Tensor:
        """Adds the first `num_B` tokens to each active row that has not ended; returns which rows go on."""
        active_B = self.active_B
        goes_on_B = ~self.has_ended_R[active_B] & (self.left_B() > 0)
        places_G = torch.arange(ids_BG.shape[1], device=ids_BG.device)
        is_new_BG = (places_G < num_B[:, None]) & goes_on_B[:, None]
        rows_N, columns_N = is_new_BG.nonzero(as_tuple=True)
        new_N = ids_BG[rows_N, columns_N]
        self.ids_RT[active_B[rows_N], self.num_R[active_B[rows_N]] + columns_N] = new_N
        self.num_R[active_B] += is_new_BG.sum(1)
        self.has_ended_R[active_B] |= (is_new_BG & torch.isin(ids_BG, self.ends_E)).any(1)
        return ~self.has_ended_R[active_B] & (self.left_B() > 0)

    def replies(self) -> list[Tokens]:
        ids_RT = self.ids_RT.cpu().numpy().astype(np.int32)
        return [row[:num].copy() for row, num in zip(ids_RT, self.num_R.tolist(), strict=True)]


@contextmanager
def generation_mode(*nets: nn.Module) -> Iterator[None]:
    """Turns off gradients and training mode; in training, gradient checkpointing would disable the caches."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
