"""Losses below the logits: hidden states, attention scores, relations of vectors.

Every value is a *sum* in at least fp32, over rows where only the first position counts, else over tokens (without
padding); the loop divides once, by their number in the global batch. Means over channels, heads, keys and pairs of
layers are taken within a row or token, so that neither the batch nor padding changes them. The gradient reaches only
`to`.

Legend: B rows, T positions, D width of a side, H heads, L pairs of layers, as sequences of tensors. `mask_BT`: 1 is a
token, 0 is padding; None: no padding. For queries and keys also `mask_BTT`, the keys that each query sees (causal or
windowed attention); a query that sees none is padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.losses.logits import kl, wide


def hidden_mse(
    from_LBTD: Sequence[Tensor], to_LBTD: Sequence[Tensor], mask_BT: Tensor | None, *, first: bool, normalise: bool
) -> Tensor:
    """Sums squared differences of hidden states: mean over channels and pairs of layers, sum over positions.

    `first`: position 0 of each row only ([CLS]; rows are padded on the right). `normalise`: vectors of length 1 first.
    Both: Patient-KD (Sun et al. 2019) as its authors coded it, a mean over rows, pairs and channels, times the rows.
    Neither: TinyBERT (Jiao et al. 2020, eq. 8-9), after a projector; the paper *sums* over pairs: L times this value.
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
    """Computes 1 - cosine of the two states of a position, sum over tokens (DistilBERT, Sanh et al. 2019, on the last layer)."""
    _check([from_BTD], [to_BTD])
    source, to = (_tokens(side, mask_BT) for side in (from_BTD.detach(), to_BTD))
    away_BT = 1 - F.cosine_similarity(to, source, dim=-1)
    return (away_BT if mask_BT is None else away_BT.masked_fill(~mask_BT.bool(), 0)).sum()


def attention_mse(from_LBHTT: Sequence[Tensor], to_LBHTT: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Sums squared differences of scores before the softmax (TinyBERT, Jiao et al. 2020, eq. 7), sum over query tokens.

    Mean over heads, pairs of layers, and the keys that the query sees. The authors' code differs in three ways: it sums
    over pairs, takes the mean over all T keys with zeros at padding, and counts queries at padding; without padding its
    loss is L times this value / (B T). Scores at padding may be any value, infinite too.
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
    """Computes KL(from || to) of the relations among queries, among keys and among values, in nats.

    Each of the three [B, T, D] is split into `num_heads` relation heads, whatever heads the model has: D may differ
    between the sides. A relation is softmax(x x^T / sqrt(D / num_heads)) over the tokens of a row. Mean over relation
    heads, sum over query tokens, *sum* over the three relations (MiniLMv2, Wang et al. 2021, eq. 5-8, all weights 1;
    the paper divides by the tokens of each row, here the loop divides by those of the batch).

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
    """Computes attention scores before mask and softmax, q k^T / sqrt(D / num_heads): [B, H, T, T], in at least fp32.

    Queries and keys after rotation by position, if any. Raises ValueError where widths differ or do not split into
    heads.
    """
    if query_BTD.shape != key_BTD.shape:
        raise ValueError(
            f"scores of queries {_shape(query_BTD)} and keys {_shape(key_BTD)}: shapes must be the same; "
            "repeat keys that several heads share"
        )
    kind = query_BTD.device.type
    has_autocast = torch.amp.is_autocast_available(kind)  # not on "meta"
    with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():  # products in fp32
        query_BHTE, key_BHTE = _split(query_BTD, num_heads), _split(key_BTD, num_heads)
        return query_BHTE @ key_BHTE.transpose(-1, -2) / math.sqrt(query_BHTE.shape[-1])


# ---------------------------------------------------------------------------------------------------------------- parts


def _tokens(side_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Sets padding to zero before anything is computed, so that NaN at padding reaches no gradient."""
    side_BTD = wide(side_BTD)
    return side_BTD if mask_BT is None else side_BTD.masked_fill(~mask_BT.bool().unsqueeze(-1), 0)


def _sees(mask: Tensor | None, side: Tensor) -> Tensor:
    """Returns the keys that each query sees, [B, T, T]. `side`: rows first, positions second to last."""
    if mask is None:
        num, length = len(side), side.shape[-2]
        return torch.ones(num, length, length, dtype=torch.bool, device=side.device)
    mask = mask.bool()
    return mask if mask.dim() == 3 else mask.unsqueeze(2) & mask.unsqueeze(1)


def _log_relation(side_BTD: Tensor, sees_BTT: Tensor, num_heads: int) -> Tensor:
    """Computes the log softmax over the seen keys, [B, num_heads, T, T]; finite at the others, with exp 0.

    For a query that sees none the distribution is uniform on both sides, so that the divergence is exactly 0.
    """
    side_BTD = _tokens(side_BTD, sees_BTT.any(-1))
    scores_BHTT = scores(side_BTD, side_BTD, num_heads)
    return scores_BHTT.masked_fill(~sees_BTT.unsqueeze(1), torch.finfo(scores_BHTT.dtype).min).log_softmax(-1)


def _split(side_BTD: Tensor, num_heads: int) -> Tensor:
    """Splits the channels into heads: [B, H, T, D / H]."""
    width = side_BTD.shape[-1]
    if width % num_heads:
        valid = ", ".join(str(num) for num in range(1, width + 1) if width % num == 0)
        raise ValueError(f"a width of {width} does not split into {num_heads} heads; expected {valid}")
    rows, length = side_BTD.shape[:2]
    return wide(side_BTD).reshape(rows, length, num_heads, width // num_heads).transpose(1, 2)


def _check(from_L: Sequence[Tensor], to_L: Sequence[Tensor]) -> None:
    """Raises ValueError for shapes that broadcasting would accept, and for no layers at all."""
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
