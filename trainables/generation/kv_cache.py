"""TODO."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer


class GenerationError(ValueError):
    """A prompt that cannot be answered, or a model that cannot answer so; the message says which and why."""


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
        f"a {kind} cannot answer: it keeps more than keys and values of tokens; expected llama, gpt2 …"
    )


class CachedModel:
    """A model, and what it has read of each row. The last slot of every row is its last token; padding is on the left.

    So whatever lies one slot further is one token further, as masks, windows and biases by distance take it to be.
    """

    def __init__(self, net: Any, vocab_size: int) -> None:
        self.net, self.vocab_size = net, vocab_size
        self.cache = Cache(
            layer_class_to_replicate=KeyValueCache
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

    def join(self, others: Sequence[CachedModel]) -> None:
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


def prefill(
    net: Any, vocab_size: int, prompts: Sequence[Tokens], pad_id: int, device: str
) -> tuple[CachedModel, Tensor]:
    """The prompts, shortest first, as the model has read them, and logits after each, [B, vocab_size].

    Read in four parts, since a padded place costs as much as a token: where lengths are spread evenly, parts spare three
    quarters of the padding.
    """
    num_parts = 4 if len(prompts[0]) < len(prompts[-1]) else 1
    parts = [part.tolist() for part in np.array_split(np.arange(len(prompts)), num_parts) if len(part)]
    readings = [CachedModel(net, vocab_size) for _ in parts]
    logits = [
        reading.read(*left_padded([prompts[i] for i in part], pad_id, device), 1)[:, 0]
        for reading, part in zip(readings, parts, strict=True)
    ]
    if len(readings) > 1:
        readings[0].join(readings[1:])
    return readings[0], torch.cat(logits)


class KeyValueCache(DynamicLayer):  # type: ignore[misc]
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

    def join(self, others: Sequence[KeyValueCache]) -> None:
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


Tokens = NDArray[np.int32]


def left_padded(prompts: Sequence[Tokens], pad_id: int, device: str) -> tuple[Tensor, Tensor]:
    """[B, T] ids, and which of them are no padding."""
    longest = max(map(len, prompts))
    ids_BT = np.full((len(prompts), longest), pad_id, np.int64)
    for row, prompt in zip(ids_BT, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
    return torch.from_numpy(ids_BT).to(device), (torch.arange(longest) >= longest - lengths_B1).to(device)
