"""Generates replies that two models write together: a draft proposes tokens, a teacher accepts or replaces them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainables.config.data import Sampling
from trainables.config.phase import Interleaved
from trainables.generation.context import Generation, GenerationContext, Tokens
from trainables.generation.kv_cache import CachedModel, left_padded
from trainables.generation.sample import (
    RepliesInProgress,
    draw,
    generation_mode,
    length_batches,
    reply_room,
    uniform_streams,
)


def interleave(
    nets: tuple[Any, Any],
    prompts: Sequence[Tokens],
    rule: Interleaved,
    context: GenerationContext,
    *,
    seed: int,
    first: int = 0,
) -> Generation:
    """Replies that two models, a draft and a teacher, write together (Xu et al. 2025, speculative knowledge
    distillation, algorithm 1).

    The draft proposes `block` tokens, which the teacher scores in one pass. Tokens before the first that is not among
    the teacher's `top` likeliest are kept; the teacher draws a replacement for the first. Where all are kept the
    teacher adds none. Arguments and errors as in `sample`. Draft and teacher have random streams of their own, one draw
    for each place of a reply, so that `block` changes the cost but not the reply.
    """
    (draft, teacher), device, vocab_size = nets, context.device, context.vocab_size
    replies: dict[int, Tokens] = {}
    draft_tokens = teacher_tokens = 0
    room = reply_room(prompts, rule.max_tokens, context.length, draft, teacher)
    teacher_sampling = Sampling(temperature=rule.teacher_temperature, top_p=rule.teacher_top_p)
    with generation_mode(draft, teacher), context.autocast():
        for chosen in length_batches(prompts, context.rows):
            drafting, judging = CachedModel(draft, vocab_size), CachedModel(teacher, vocab_size)
            written = RepliesInProgress([room[i] for i in chosen], context.end_ids, device)
            numbers = [first + i for i in chosen]
            draft_RT = uniform_streams(seed, "draw", numbers, num=rule.max_tokens, device=device)
            teacher_RT = uniform_streams(seed, "teacher", numbers, num=rule.max_tokens, device=device)
            ids_BT, mask_BT = left_padded([prompts[i] for i in chosen], context)  # not read by either model yet
            while len(written.active_B):
                num_B, left_B = written.num_R[written.active_B], written.left_B()
                block = min(rule.block, int(left_B.max()))
                proposed, next_BT, next_mask_BT = list[Tensor](), ids_BT, mask_BT
                for place in range(block):
                    uniforms_B = draft_RT[written.active_B, (num_B + place).clamp_max(rule.max_tokens - 1)]
                    token_B = draw(drafting.read(next_BT, next_mask_BT, 1)[:, 0], uniforms_B, rule)
                    proposed.append(token_B)
                    next_BT, next_mask_BT = token_B[:, None], torch.ones_like(token_B[:, None], dtype=torch.bool)
                proposed_BG = torch.stack(proposed, 1)
                read_BT = torch.cat([ids_BT, proposed_BG[:, :-1]], 1)
                read_mask_BT = torch.cat([mask_BT, mask_BT.new_ones(proposed_BG[:, 1:].shape)], 1)
                logits_BGV = judging.read(read_BT, read_mask_BT, block)
                kept_B, is_whole_B = _accepted(proposed_BG, logits_BGV, left_B, top=rule.top, ends_E=written.ends_E)
                if not is_whole_B.all():
                    where_B = kept_B.clamp_max(block - 1)
                    uniforms_B = teacher_RT[written.active_B, (num_B + kept_B).clamp_max(rule.max_tokens - 1)]
                    logits_BV = logits_BGV[torch.arange(len(where_B), device=device), where_B]
                    instead_B1 = draw(logits_BV, uniforms_B, teacher_sampling)[:, None]
                    here_BG = (torch.arange(block, device=device) == kept_B[:, None]) & ~is_whole_B[:, None]
                    proposed_BG = torch.where(here_BG, instead_B1, proposed_BG)
                new_B = kept_B + (~is_whole_B).long()
                goes_on_B = written.add(proposed_BG, new_B)
                if goes_on_B.any():  # both models have read all kept tokens except the last
                    active = goes_on_B.nonzero()[:, 0]
                    for reading in (drafting, judging):
                        reading.keep(active, (block - new_B)[active])
                ids_BT = proposed_BG.gather(1, new_B[:, None] - 1)[goes_on_B]
                mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
                written.active_B = written.active_B[goes_on_B]
            replies.update(zip(chosen, written.replies(), strict=True))
            draft_tokens += drafting.num_tokens
            teacher_tokens += judging.num_tokens
    return Generation(tuple(replies[i] for i in range(len(prompts))), draft_tokens, teacher_tokens)


def _accepted(
    proposed_BG: Tensor, logits_BGV: Tensor, left_B: Tensor, *, top: int, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Counts the proposals that each row keeps, and whether it keeps all up to its end token and its length."""
    places_G = torch.arange(proposed_BG.shape[1], device=proposed_BG.device)
    chosen_BG1 = logits_BGV.gather(2, proposed_BG[:, :, None])
    is_inside_BG = (logits_BGV > chosen_BG1).sum(-1) < top  # fewer than `top` tokens are likelier
    is_end_BG = torch.isin(proposed_BG, ends_E).long()
    ended_before_BG = is_end_BG.cumsum(1) - is_end_BG > 0
    could_B = (~ended_before_BG & (places_G < left_B[:, None])).sum(1)
    kept_B = torch.minimum(is_inside_BG.long().cumprod(1).sum(1), could_B)
    return kept_B, kept_B == could_B
