"""Reads tokens with a model and its cache of keys and values; rows of a batch can be joined, dropped and cut back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from trainables.generation.context import GenerationContext, GenerationError, Tokens

# layers whose only state is keys and values of tokens, as configs name them
ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


def check(net: Any) -> None:
    """Raises GenerationError for a model, on any device, without a standard cache of keys and values."""
    kinds = set(getattr(net.config.get_text_config(), "layer_types", None) or ())
    if getattr(net, "_is_stateful", False) or cache_name(net) is None or kinds - ATTENTION_LAYERS:
        raise _refused(net)


def cache_name(net: Any) -> str | None:
    """Finds the argument of the model's forward that takes a cache, if any: `cache` since transformers 5.24."""
    takes = inspect.signature(net.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in takes), None)


def _refused(net: Any) -> GenerationError:
    return GenerationError(
        f"generation unsupported for a {net.config.model_type}: no standard KV cache; expected llama, gpt2 …"
    )


class CachedModel:
    """A model and the cache of the tokens that it has read. The last slot of every row is its last token; padding is on
    the left, so that a distance in slots is a distance in tokens, as masks, windows and biases by distance assume.
    """

    def __init__(self, net: Any, vocab_size: int) -> None:
        self.net, self.vocab_size = net, vocab_size
        # windows are masks here: a layer that forgets tokens could not be cut back
        self.cache = Cache(layer_class_to_replicate=KeyValueCache)
        self.mask_BT: Tensor | None = None
        self.num_tokens = 0
        self.takes = inspect.signature(net.forward).parameters.keys()
        self.limit = getattr(net.config, "max_position_embeddings", None)
        check(net)
        self.cache_name = cache_name(net)

    def read(self, ids_BT: Tensor, mask_BT: Tensor, num: int) -> Tensor:
        """Reads further tokens; returns logits after each of the last `num`, [B, num, vocab_size]."""
        self.num_tokens += ids_BT.numel()
        self.mask_BT = mask_BT if self.mask_BT is None else torch.cat([self.mask_BT, mask_BT], 1)
        more: dict[str, Any] = {str(self.cache_name): self.cache}
        if "position_ids" in self.takes:
            position_ids_BT = (self.mask_BT.long().cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
            # only tokens that are dropped afterwards lie beyond the last position
            more["position_ids"] = position_ids_BT if self.limit is None else position_ids_BT.clamp_max(self.limit - 1)
        if "logits_to_keep" in self.takes:
            more["logits_to_keep"] = num
        mask_BT = self.mask_BT.long()
        logits_BTV: Tensor = self.net(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True, **more).logits
        if self.cache.get_seq_length() != self.mask_BT.shape[1]:
            raise _refused(self.net)
        return logits_BTV[:, -num:, : self.vocab_size].float()

    def join(self, others: Sequence[CachedModel]) -> None:
        """Appends the rows of others, whose caches are emptied."""
        masks = [each.mask_BT for each in (self, *others) if each.mask_BT is not None]
        longest = max(mask_BT.shape[1] for mask_BT in masks)
        self.mask_BT = torch.cat([functional.pad(mask_BT, (longest - mask_BT.shape[1], 0)) for mask_BT in masks])
        for own, *more in zip(self.cache.layers, *(other.cache.layers for other in others), strict=True):
            own.join(more)
        self.num_tokens += sum(other.num_tokens for other in others)

    def keep(self, rows_B: Tensor, drop_B: Tensor | None = None) -> None:
        """Keeps these rows only, each without its last `drop_B` tokens."""
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


def prefill(net: Any, prompts: Sequence[Tokens], context: GenerationContext) -> tuple[CachedModel, Tensor]:
    """Reads prompts, which are sorted by length; returns the model's cache, and logits after each, [B, vocab_size].

    In four parts, since padding costs as much as tokens: where lengths are spread evenly, this saves three quarters of
    it.
    """
    num_parts = 4 if len(prompts[0]) < len(prompts[-1]) else 1
    parts = [part.tolist() for part in np.array_split(np.arange(len(prompts)), num_parts) if len(part)]
    readings = [CachedModel(net, context.vocab_size) for _ in parts]
    logits = [
        reading.read(*left_padded([prompts[i] for i in part], context), 1)[:, 0]
        for reading, part in zip(readings, parts, strict=True)
    ]
    if len(readings) > 1:
        readings[0].join(readings[1:])
    return readings[0], torch.cat(logits)


class KeyValueCache(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, T, D] with extra slots, so that a further token does not copy all earlier ones."""

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

    def join(self, others: Sequence[KeyValueCache]) -> None:
        """Appends the rows of others, their last tokens in the same slot. Layer by layer, to hold only a single layer
        twice."""
        every = [self, *others]
        num, longest = sum(len(layer.keys) for layer in every), max(layer.get_seq_length() for layer in every)
        # masked values are multiplied by 0 and must be finite
        rooms = [kv.new_zeros((num, kv.shape[1], _roomy(longest), kv.shape[3])) for kv in (self.keys, self.values)]
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
        """Keeps these rows, and of each these slots."""
        kept = [states[rows_B[:, None], :, slots_BT].transpose(1, 2) for states in (self.keys, self.values)]
        self._move(slots_BT.shape[1], kept, kept)
        assert self.rooms is not None
        self.keys, self.values = (room[:, :, : slots_BT.shape[1]] for room in self.rooms)

    def _move(self, least: int, like: Sequence[Tensor], states: Sequence[Tensor] | None) -> None:
        """Allocates slots for `least` tokens and more, with other sizes and types as in `like`; copies `states`
        there."""
        rooms = [kv.new_empty((*kv.shape[:2], _roomy(least), kv.shape[3])) for kv in like]
        for room, kv in zip(rooms, states or (), strict=False):
            room[:, :, : kv.shape[2]] = kv
        self.rooms = (rooms[0], rooms[1])


def _roomy(num: int) -> int:
    """Returns `num` slots and extra ones."""
    return num + num // 4 + 32


def left_padded(prompts: Sequence[Tokens], context: GenerationContext) -> tuple[Tensor, Tensor]:
    """Pads prompts to [B, T] ids, and a mask that is False at padding."""
    longest = max(map(len, prompts))
    ids_BT = np.full((len(prompts), longest), context.pad_id, np.int64)
    for row, prompt in zip(ids_BT, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
    mask_BT = torch.arange(longest) >= longest - lengths_B1
    return torch.from_numpy(ids_BT).to(context.device), mask_BT.to(context.device)
