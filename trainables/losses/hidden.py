"""Losses below the logits: hidden states, attention scores, relations of vectors; and which layer teaches which.

Every value is a *sum* over units in at least fp32, and the loop divides once, by the units in the global batch: rows
where only the first position counts, else tokens (padding is none). What is a mean (over channels, heads, keys, pairs
of layers) is one inside a unit, so that no batch and no padding changes it. The gradient reaches only `to`.

Legend: B rows, T positions, D width of a side, H heads, L pairs of layers, as sequences of tensors. `mask_BT`: 1 is a
token, 0 is padding; None: all are tokens. Where queries meet keys it may be `mask_BTT`, the keys that each query sees
(causal or windowed attention: what a model never looks at is arbitrary); a query that sees none is padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.losses.logits import kl, wide

LayerMap = Literal["even", "last", "uniform", "top", "explicit"]


def hidden_mse(
    from_LBTD: Sequence[Tensor], to_LBTD: Sequence[Tensor], mask_BT: Tensor | None, *, first: bool, normalise: bool
) -> Tensor:
    """Squared differences of hidden states: mean over channels and pairs of layers, sum over positions.

    `first`: position 0 of each row only ([CLS]; rows are padded on the right). `normalise`: vectors of length 1 first.
    Both: Patient-KD's (Sun et al. 2019) as its authors coded it, a mean over rows, pairs and channels, times the rows.
    Neither: TinyBERT's (Jiao et al. 2020, eq. 8-9), on states of `to` that a projector took to the other width; there
    the pairs are *summed*, which makes it L times as much.
    """
    _check(from_LBTD, to_LBTD)
    where = slice(0, 1) if first else slice(None)
    mask_BT = None if mask_BT is None else mask_BT[:, where]
    values = []
    for source, to in zip(from_LBTD, to_LBTD, strict=True):
        source, to = (_tokens(side[:, where], mask_BT) for side in (source.detach(), to))
        if normalise:
            source, to = F.normalize(source, dim=-1), F.normalize(to, dim=-1)
        values.append((to - source).square().mean(-1).sum())
    return torch.stack(values).mean()


def hidden_cosine(from_BTD: Tensor, to_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """1 - cos of the two states of a position, sum over tokens: DistilBERT's (Sanh et al. 2019), on the last layer."""
    _check([from_BTD], [to_BTD])
    source, to = (_tokens(side, mask_BT) for side in (from_BTD.detach(), to_BTD))
    away_BT = 1 - F.cosine_similarity(to, source, dim=-1)
    return (away_BT if mask_BT is None else away_BT.masked_fill(~mask_BT.bool(), 0)).sum()


def attention_mse(from_LBHTT: Sequence[Tensor], to_LBHTT: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Squared differences of scores before the softmax (TinyBERT, Jiao et al. 2020, eq. 7), sum over query tokens.

    The mean is over heads, pairs of layers, and the keys that the query sees. The authors' code differs in three ways:
    it sums over pairs, its mean over keys is over all T with zeros at padding, and queries at padding count; where
    nothing is padded its loss is L times this value / (B T). Scores at padding may be anything, infinite too.
    """
    _check(from_LBHTT, to_LBHTT)
    values = []
    for source, to in zip(from_LBHTT, to_LBHTT, strict=True):
        sees_BTT = _sees(mask, to)
        unseen_B1TT = ~sees_BTT.unsqueeze(1)
        source, to = (wide(side).masked_fill(unseen_B1TT, 0) for side in (source.detach(), to))
        per_query_BT = (to - source).square().mean(1).sum(-1) / sees_BTT.sum(-1).clamp(min=1)
        values.append(per_query_BT.sum())
    return torch.stack(values).mean()


def relation_kl(from_qkv: Sequence[Tensor], to_qkv: Sequence[Tensor], mask: Tensor | None, *, num_heads: int) -> Tensor:
    """KL(from || to) of how each position's query resembles all others', the same of keys and of values, nats.

    Each of the three [B, T, D] is split anew into `num_heads` relation heads, whatever heads the model has: D may
    differ between the sides. A relation is softmax(x x^T / sqrt(D / num_heads)) over the tokens of a row. Mean over
    relation heads, sum over query tokens, *sum* over the three relations (MiniLMv2, Wang et al. 2021, eq. 5-8, all
    weights 1; it divides by the tokens of each row, here the loop divides by those of the batch).

    Memory: a few tensors [B, num_heads, T, T] for each relation until the backward.
    """
    values = []
    for source_BTD, to_BTD in zip(from_qkv, to_qkv, strict=True):
        if source_BTD.shape[:2] != to_BTD.shape[:2]:
            raise ValueError(
                f"relations of {_shape(source_BTD)} and {_shape(to_BTD)}: rows and positions must be the same"
            )
        sees_BTT = _sees(mask, to_BTD)
        log_p_BHTT = _log_relation(source_BTD.detach(), sees_BTT, num_heads)
        log_q_BHTT = _log_relation(to_BTD, sees_BTT, num_heads)
        values.append(kl(log_p_BHTT, log_q_BHTT) / num_heads)
    return torch.stack(values).sum()


def scores(query_BTD: Tensor, key_BTD: Tensor, num_heads: int) -> Tensor:
    """Attention scores before mask and softmax, q k^T / sqrt(D / num_heads): [B, H, T, T], in at least fp32.

    Queries and keys as the model compares them: after rotation by position, where it has one. Raises ValueError where
    the widths differ or do not split into heads.
    """
    if query_BTD.shape != key_BTD.shape:
        raise ValueError(
            f"scores of queries {_shape(query_BTD)} and keys {_shape(key_BTD)}: shapes must be the same; "
            "repeat keys that several heads share"
        )
    kind = query_BTD.device.type
    has_autocast = torch.amp.is_autocast_available(
        kind
    )  # which would make the product in half precision; "meta" has none
    with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
        query_BHTE, key_BHTE = _split(query_BTD, num_heads), _split(key_BTD, num_heads)
        return query_BHTE @ key_BHTE.transpose(-1, -2) / math.sqrt(query_BHTE.shape[-1])


# ----------------------------------------------------------------------------------------------------------- layer maps


def layer_pairs(
    kind: LayerMap, num_from: int, num_to: int, explicit: Sequence[tuple[int, int]] | None = None
) -> tuple[tuple[int, int], ...]:
    """Pairs (from, to) of layers whose outputs are compared, counted from 1; 0 is the embeddings.

    A layer is one that is *executed*: one that runs twice counts twice. `even`: each `to` but the last, where its share
    of the depth is a whole layer of `from` (Patient-KD's "skip"; for 12 layers Pea-KD's maps). `last`: each `to` but
    the last, with as many layers before the last of `from`. `uniform`: all, embeddings included, each with the end of
    its block (TinyBERT; attention has no layer 0: leave that pair out). `top`: the last with the last. `explicit`: as
    given.

    May be empty, where nothing corresponds: a `to` of one layer has none but its last. Raises ValueError where the map
    is not defined for these depths, or a pair is out of range.
    """
    if (kind == "explicit") != (explicit is not None):
        raise ValueError(f"a layer map {kind!r} {'needs' if explicit is None else 'takes no'} explicit pairs")
    match kind:
        case "even":
            inner = range(1, num_to)
            return tuple((to * num_from // num_to, to) for to in inner if to * num_from % num_to == 0)
        case "last":
            if num_from < num_to:
                raise ValueError(
                    f"a layer map 'last' from {num_from} layers to {num_to}: `from` must have at least {num_to}; "
                    "valid here: even, top or explicit pairs"
                )
            return tuple((num_from - num_to + to, to) for to in range(1, num_to))
        case "uniform":
            if num_from % num_to:
                raise ValueError(
                    f"a layer map 'uniform' from {num_from} layers to {num_to}: {num_from} must be a multiple of "
                    f"{num_to}; valid here: even, top or explicit pairs"
                )
            return tuple((to * num_from // num_to, to) for to in range(num_to + 1))
        case "top":
            return ((num_from, num_to),)
        case "explicit":
            assert explicit is not None
            return _in_range(explicit, num_from, num_to)
        case _:
            raise ValueError(f"no layer map {kind!r}; expected even, last, uniform, top, explicit")


def _in_range(pairs: Sequence[tuple[int, int]], num_from: int, num_to: int) -> tuple[tuple[int, int], ...]:
    for source, to in pairs:
        if not (0 <= source <= num_from and 0 <= to <= num_to):
            raise ValueError(
                f"layers ({source}, {to}): valid are 0 (the embeddings) to {num_from} of `from`, 0 to {num_to} of `to`"
            )
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise ValueError(f"layers {twice} are given twice; weigh the term instead")
    return tuple(pairs)


# ---------------------------------------------------------------------------------------------------------------- parts


def _tokens(side_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Zeros at padding, put there before anything is computed: what is not a number there spoils no gradient then."""
    side_BTD = wide(side_BTD)
    return side_BTD if mask_BT is None else side_BTD.masked_fill(~mask_BT.bool().unsqueeze(-1), 0)


def _sees(mask: Tensor | None, side: Tensor) -> Tensor:
    """[B, T, T]: which keys a query sees. `side`: rows first, positions last but one."""
    if mask is None:
        num, length = len(side), side.shape[-2]
        return torch.ones(num, length, length, dtype=torch.bool, device=side.device)
    mask = mask.bool()
    return mask if mask.dim() == 3 else mask.unsqueeze(2) & mask.unsqueeze(1)


def _log_relation(side_BTD: Tensor, sees_BTT: Tensor, num_heads: int) -> Tensor:
    """log softmax over the keys that are seen: [B, num_heads, T, T]; finite at the others too, where its exp is 0.

    A query that sees none is as likely to see any, on both sides: it adds exactly nothing to a divergence.
    """
    side_BTD = _tokens(side_BTD, sees_BTT.any(-1))
    scores_BHTT = scores(side_BTD, side_BTD, num_heads)
    return scores_BHTT.masked_fill(~sees_BTT.unsqueeze(1), torch.finfo(scores_BHTT.dtype).min).log_softmax(-1)


def _split(side_BTD: Tensor, num_heads: int) -> Tensor:
    """[B, H, T, D / H]"""
    width = side_BTD.shape[-1]
    if width % num_heads:
        valid = ", ".join(str(num) for num in range(1, width + 1) if width % num == 0)
        raise ValueError(f"a width of {width} does not split into {num_heads} heads; expected {valid}")
    rows, length = side_BTD.shape[:2]
    return wide(side_BTD).reshape(rows, length, num_heads, width // num_heads).transpose(1, 2)


def _check(from_L: Sequence[Tensor], to_L: Sequence[Tensor]) -> None:
    """Refuses what broadcasting would let pass, and a mean over nothing."""
    if not from_L or len(from_L) != len(to_L):
        raise ValueError(f"{len(from_L)} layers of `from` and {len(to_L)} of `to`: as many of each, and at least one")
    for source, to in zip(from_L, to_L, strict=True):
        if source.shape == to.shape:
            continue
        if source.dim() == to.dim() == 4 and source.shape[1] != to.shape[1]:
            raise ValueError(
                f"{source.shape[1]} attention heads in `from`, {to.shape[1]} in `to`: scores are compared head by "
                "head; give both models as many heads, or compare relations, which are split anew"
            )
        if source.dim() == to.dim() == 3 and source.shape[-1] != to.shape[-1]:
            raise ValueError(
                f"hidden states of width {source.shape[-1]} in `from`, {to.shape[-1]} in `to`: project `to` first"
            )
        raise ValueError(f"{_shape(source)} of `from` and {_shape(to)} of `to`: shapes must be the same")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
