"""Replies that models make: many at a time on a cache of keys and values, each token drawn from a stream of its own.

What a reply is depends on the weights, its prompt, how it is drawn, the seed and the prompt's number; on what else is in
the batch, and on how many rows run at a time, by float error only. That is why the loop is ours: transformers' `generate`
draws all rows from the process' one generator, lets a pretrained folder's `generation_config` have a say, and goes on
computing rows that have ended. The models' own forwards, masks and caches are transformers'.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from trainables.spec.data import Sampling
from trainables.spec.phase import Interleaved
from trainables.spec.value import random_stream

Tokens = NDArray[np.int32]
Autocast = Callable[[], AbstractContextManager[Any]]


class GenerationError(ValueError):
    """A prompt that cannot be answered, or a model that cannot answer so; the message says which and why."""


@dataclass(frozen=True)
class Drawn:
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
) -> Drawn:
    """A reply of `net` to each prompt. `first`: the number of the first prompt, where others answer those before it.

    `length`: tokens that prompt and reply may have together. `rows`: so many prompts at a time, all by default. No token
    at or beyond `vocab_size` is drawn. The net is in evaluation mode meanwhile, and as it was afterwards; the process'
    random generators are left alone. Raises GenerationError for an empty prompt, one that is longer than the model's
    context, and models without a cache of keys and values.
    """
    replies: dict[int, Tokens] = {}
    num_unfinished = num_tokens = 0
    room = _room(prompts, how.max_tokens, length, net)
    with _answering(net), autocast():
        for chosen in _batches(prompts, rows):
            written = _Written([room[i] for i in chosen], end_id, device)
            at_RT = _streams(seed, "draw", [first + i for i in chosen], how.max_tokens, device)
            reading, logits_BV = _begun(net, vocab_size, [prompts[i] for i in chosen], pad_id, device)
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
    return Drawn(tuple(replies[i] for i in range(len(prompts))), num_unfinished, num_tokens)


def interleave(
    draft: Any,
    teacher: Any,
    prompts: Sequence[Tokens],
    how: Interleaved,
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
) -> Drawn:
    """Replies that two models write together (Xu et al. 2025, speculative knowledge distillation, algorithm 1).

    The draft proposes `block` tokens, which the teacher scores in one pass. Kept are those before the first that is not
    among the teacher's `top` likeliest; in its place the teacher draws one. Where all are kept the teacher adds none.
    Arguments and errors as in `sample`. Draft and teacher have streams of their own, one draw for each place of a reply,
    so `block` changes what is computed and not what is written.
    """
    replies: dict[int, Tokens] = {}
    num_unfinished = draft_tokens = teacher_tokens = 0
    room = _room(prompts, how.max_tokens, length, draft, teacher)
    of_teacher = Sampling(temperature=how.teacher_temperature, top_p=how.teacher_top_p)
    with _answering(draft, teacher), autocast():
        for chosen in _batches(prompts, rows):
            drafting, judging = _Reading(draft, vocab_size), _Reading(teacher, vocab_size)
            written = _Written([room[i] for i in chosen], end_id, device)
            numbers = [first + i for i in chosen]
            draft_RT = _streams(seed, "draw", numbers, how.max_tokens, device)
            teacher_RT = _streams(seed, "teacher", numbers, how.max_tokens, device)
            ids_BT, mask_BT = _left_padded([prompts[i] for i in chosen], pad_id, device)  # what neither has read yet
            while len(written.active_B):
                num_B, left_B = written.num_R[written.active_B], written.left_B()
                block = min(how.block, int(left_B.max()))
                proposed, next_BT, next_mask_BT = list[Tensor](), ids_BT, mask_BT
                for place in range(block):
                    at_B = draft_RT[written.active_B, (num_B + place).clamp_max(how.max_tokens - 1)]
                    token_B = draw(drafting.read(next_BT, next_mask_BT, 1)[:, 0], at_B, how)
                    proposed.append(token_B)
                    next_BT, next_mask_BT = token_B[:, None], torch.ones_like(token_B[:, None], dtype=torch.bool)
                proposed_BG = torch.stack(proposed, 1)
                read_BT = torch.cat([ids_BT, proposed_BG[:, :-1]], 1)
                logits_BGV = judging.read(
                    read_BT, torch.cat([mask_BT, mask_BT.new_ones(proposed_BG[:, 1:].shape)], 1), block
                )
                kept_B, is_whole_B = _accepted(proposed_BG, logits_BGV, how.top, end_id, left_B)
                if not is_whole_B.all():
                    where_B = kept_B.clamp_max(block - 1)
                    at_B = teacher_RT[written.active_B, (num_B + kept_B).clamp_max(how.max_tokens - 1)]
                    logits_BV = logits_BGV[torch.arange(len(where_B), device=device), where_B]
                    instead_B1 = draw(logits_BV, at_B, of_teacher)[:, None]
                    here_BG = (torch.arange(block, device=device) == kept_B[:, None]) & ~is_whole_B[:, None]
                    proposed_BG = torch.where(here_BG, instead_B1, proposed_BG)
                new_B = kept_B + (~is_whole_B).long()
                goes_on_B = written.add(proposed_BG, new_B)
                if goes_on_B.any():  # both have read all but the last token of what is kept
                    active = goes_on_B.nonzero()[:, 0]
                    for reading in (drafting, judging):
                        reading.keep(active, (block - new_B)[active])
                ids_BT = proposed_BG.gather(1, new_B[:, None] - 1)[goes_on_B]
                mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
                written.active_B = written.active_B[goes_on_B]
            replies.update(zip(chosen, written.replies(), strict=True))
            num_unfinished += written.num_unfinished()
            draft_tokens += drafting.num_tokens
            teacher_tokens += judging.num_tokens
    ordered = tuple(replies[i] for i in range(len(prompts)))
    return Drawn(ordered, num_unfinished, draft_tokens, teacher_tokens)


def _accepted(proposed_BG: Tensor, logits_BGV: Tensor, top: int, end_id: int, left_B: Tensor) -> tuple[Tensor, Tensor]:
    """How many proposals each row keeps, and whether these are all that it could: up to its end token, and its room."""
    places_G = torch.arange(proposed_BG.shape[1], device=proposed_BG.device)
    chosen_BG1 = logits_BGV.gather(2, proposed_BG[:, :, None])
    is_inside_BG = (logits_BGV > chosen_BG1).sum(-1) < top  # so few are likelier
    ended_before_BG = (proposed_BG == end_id).long().cumsum(1) - (proposed_BG == end_id).long() > 0
    could_B = (~ended_before_BG & (places_G < left_B[:, None])).sum(1)
    kept_B = torch.minimum(is_inside_BG.long().cumprod(1).sum(1), could_B)
    return kept_B, kept_B == could_B


# ----------------------------------------------------------------------------------------------------------------- draws


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


def _streams(seed: int, purpose: str, numbers: Sequence[int], num: int, device: str) -> Tensor:
    """[R, num] in [0, 1): a stream for each prompt's number, of which the first draws are the same for every `num`."""
    each = [torch.Generator().manual_seed(random_stream(seed, purpose, number)) for number in numbers]
    return torch.stack([torch.rand(num, dtype=torch.float64, generator=stream) for stream in each]).to(device)


# --------------------------------------------------------------------------------------------------------------- batches


def _room(prompts: Sequence[Tokens], max_tokens: int, length: int | None, *nets: Any) -> list[int]:
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


def _batches(prompts: Sequence[Tokens], rows: int | None) -> Iterator[list[int]]:
    """Indices of prompts of similar lengths, so many at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = rows or max(len(prompts), 1)
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _left_padded(prompts: Sequence[Tokens], pad_id: int, device: str) -> tuple[Tensor, Tensor]:
    """[B, T] ids, and which of them are no padding."""
    longest = max(map(len, prompts))
    ids_BT = np.full((len(prompts), longest), pad_id, np.int64)
    for row, prompt in zip(ids_BT, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
    return torch.from_numpy(ids_BT).to(device), (torch.arange(longest) >= longest - lengths_B1).to(device)


class _Written:
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


# ---------------------------------------------------------------------------------------------------------------- models


@contextmanager
def _answering(*nets: nn.Module) -> Iterator[None]:
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


# layers that keep keys and values of tokens and nothing else, as configs name them
KEEPING_TOKENS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


def check(net: Any) -> None:
    """Raises GenerationError for a model, of any device, that has no cache of keys and values to go on from."""
    kinds = set(getattr(net.config.get_text_config(), "layer_types", None) or ())
    if getattr(net, "_is_stateful", False) or cache_name(net) is None or kinds - KEEPING_TOKENS:
        raise _refused(net)


def cache_name(net: Any) -> str | None:
    """What the model's forward calls its cache, if it has one: `cache` since transformers 5.24."""
    takes = inspect.signature(net.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in takes), None)


def _refused(net: Any) -> GenerationError:
    kind = net.config.model_type
    return GenerationError(
        f"a {kind} cannot answer: it keeps more than keys and values of tokens; valid: llama, gpt2 …"
    )


class _Reading:
    """A model, and what it has read of each row. The last slot of every row is its last token; padding is on the left.

    So whatever lies one slot further is one token further, as masks, windows and biases by distance take it to be.
    """

    def __init__(self, net: Any, vocab_size: int) -> None:
        self.net, self.vocab_size = net, vocab_size
        self.cache = Cache(
            layer_class_to_replicate=_Slots
        )  # windows are masks here: a layer that forgets cannot go back
        self.mask_BT: Tensor | None = None
        self.num_tokens = 0
        self.takes = inspect.signature(net.forward).parameters.keys()
        self.limit = getattr(net.config, "max_position_embeddings", None)
        check(net)
        self.cache_name = cache_name(net)

    def read(self, ids_BT: Tensor, mask_BT: Tensor, num: int) -> Tensor:
        """Reads on; logits after each of the last `num` tokens, [B, num, vocab_size]."""
        self.num_tokens += ids_BT.numel()
        self.mask_BT = mask_BT if self.mask_BT is None else torch.cat([self.mask_BT, mask_BT], 1)
        more: dict[str, Any] = {str(self.cache_name): self.cache}
        if "position_ids" in self.takes:
            places_BT = (self.mask_BT.long().cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
            # only what is thrown away lies beyond the last position
            more["position_ids"] = places_BT if self.limit is None else places_BT.clamp_max(self.limit - 1)
        if "logits_to_keep" in self.takes:
            more["logits_to_keep"] = num
        logits_BTV: Tensor = self.net(
            input_ids=ids_BT,
            attention_mask=self.mask_BT.long(),
            use_cache=True,
            **more,
        ).logits
        if self.cache.get_seq_length() != self.mask_BT.shape[1]:
            raise _refused(self.net)
        return logits_BTV[:, -num:, : self.vocab_size].float()

    def join(self, others: Sequence[_Reading]) -> None:
        """Goes on with the rows of others, too, behind its own; the others are used up."""
        masks = [one.mask_BT for one in (self, *others) if one.mask_BT is not None]
        longest = max(mask_BT.shape[1] for mask_BT in masks)
        self.mask_BT = torch.cat([functional.pad(mask_BT, (longest - mask_BT.shape[1], 0)) for mask_BT in masks])
        for own, *more in zip(self.cache.layers, *(other.cache.layers for other in others), strict=True):
            own.join(more)
        self.num_tokens += sum(other.num_tokens for other in others)

    def keep(self, rows_B: Tensor, drop_B: Tensor | None = None) -> None:
        """Goes on with these rows only, each without its last `drop_B` tokens."""
        assert self.mask_BT is not None
        num, slots = self.mask_BT.shape
        drop_B = torch.zeros_like(rows_B) if drop_B is None else drop_B
        lengths_B = self.mask_BT[rows_B].sum(1) - drop_B
        longest, least = int(lengths_B.max()), int(drop_B.min())
        if len(rows_B) == num and longest == slots - least and least == int(drop_B.max()):
            self.mask_BT = self.mask_BT[:, :longest]
            self.cache.crop(-least)
            return
        places_T = torch.arange(longest, device=rows_B.device)
        slots_BT = (places_T + (slots - longest) - drop_B[:, None]).clamp_min(0)
        self.mask_BT = places_T >= longest - lengths_B[:, None]
        for layer in self.cache.layers:
            layer.take(rows_B, slots_BT)


def _begun(net: Any, vocab_size: int, prompts: Sequence[Tokens], pad_id: int, device: str) -> tuple[_Reading, Tensor]:
    """The prompts, shortest first, as the model has read them, and logits after each, [B, vocab_size].

    Read in four parts, since a padded place costs as much as a token: where lengths are spread evenly, parts spare three
    quarters of the padding.
    """
    num_parts = 4 if len(prompts[0]) < len(prompts[-1]) else 1
    parts = [part.tolist() for part in np.array_split(np.arange(len(prompts)), num_parts) if len(part)]
    readings = [_Reading(net, vocab_size) for _ in parts]
    logits = [
        reading.read(*_left_padded([prompts[i] for i in part], pad_id, device), 1)[:, 0]
        for reading, part in zip(readings, parts, strict=True)
    ]
    if len(readings) > 1:
        readings[0].join(readings[1:])
    return readings[0], torch.cat(logits)


class _Slots(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, T, D] with room behind them, so that a further token does not copy all earlier ones."""

    keys: Tensor
    values: Tensor
    rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self.rooms is None or self.rooms[0].shape[-2] < new:
            self._move(new, (key_states, value_states), (self.keys, self.values) if old else None)
        assert self.rooms is not None
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, old:new] = states
        self.keys, self.values = (room[:, :, :new] for room in self.rooms)
        return self.keys, self.values

    def join(self, others: Sequence[_Slots]) -> None:
        """The rows of others behind its own, their last tokens in the same slot. Layer by layer: one is held twice."""
        every = [self, *others]
        num, longest = sum(len(layer.keys) for layer in every), max(layer.get_seq_length() for layer in every)
        # what is masked is multiplied by 0 and must be finite
        rooms = [one.new_zeros((num, one.shape[1], _roomy(longest), one.shape[3])) for one in (self.keys, self.values)]
        start = 0
        for layer in every:
            stop = start + len(layer.keys)
            for room, states in zip(rooms, (layer.keys, layer.values), strict=True):
                room[start:stop, :, longest - states.shape[2] : longest] = states
            layer.rooms, start = None, stop
            del layer.keys, layer.values
        self.rooms = (rooms[0], rooms[1])
        self.keys, self.values = (room[:, :, :longest] for room in rooms)

    def take(self, rows_B: Tensor, slots_BT: Tensor) -> None:
        """Each of these rows, at these of its slots."""
        kept = [states[rows_B[:, None], :, slots_BT].transpose(1, 2) for states in (self.keys, self.values)]
        self._move(slots_BT.shape[1], kept, kept)
        assert self.rooms is not None
        self.keys, self.values = (room[:, :, : slots_BT.shape[1]] for room in self.rooms)

    def _move(self, least: int, like: Sequence[Tensor], states: Sequence[Tensor] | None) -> None:
        """To rooms for `least` tokens and some, of the rows, heads, widths and types of `like`."""
        rooms = [one.new_empty((*one.shape[:2], _roomy(least), one.shape[3])) for one in like]
        for room, one in zip(rooms, states or (), strict=False):
            room[:, :, : one.shape[2]] = one
        self.rooms = (rooms[0], rooms[1])


def _roomy(num: int) -> int:
    """So many slots and some."""
    return num + num // 4 + 32
