"""Soft ranks of a few items, and the correlation of two sides' ranks: a Spearman correlation with a gradient.

Legend: N positions, V vocabulary, K items of a position (repeated items are masked out).
"""

from __future__ import annotations

import torch
from torch import Tensor


def union(from_NV: Tensor, to_NV: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Finds the `top` largest of each side, [N, 2 top], and a mask in which each token counts once.

    (RLKD's code keeps tokens that are repeated in a position, unless they are repeated at all positions.)
    """
    top = min(top, from_NV.shape[-1])
    from_NK, to_NK = (side.detach().topk(top, dim=-1).indices for side in (from_NV, to_NV))
    is_new_NK = (to_NK.unsqueeze(-1) != from_NK.unsqueeze(-2)).all(-1)
    return torch.cat([from_NK, to_NK], -1), torch.cat([torch.ones_like(is_new_NK), is_new_NK], -1)


def soft_rank(values_NK: Tensor, is_item_NK: Tensor, strength: float) -> Tensor:
    """Ranks from 1 (the smallest) to the number of items: the projection of values / strength onto the permutahedron.

    Blondel et al. 2020 (Fast Differentiable Sorting and Ranking), with l2 regularisation. As strength falls they tend
    to the ranks, as it rises to their mean. Masked entries change nothing; their own value has no meaning.

    The projection of s, sorted in descending order, is s - v, where v is the descending sequence nearest to s - (n, …,
    1): isotonic regression, here v_i = min_{a <= i} max_{b >= i} mean(s - w)_{a … b}, with all [K, K] means of a
    position at once: for few items. Neighbours in s with a gap of n or more never interact; larger gaps are cut to K,
    so that far values lose no digits, and masked entries are put K below.
    """
    num = values_NK.shape[-1]
    order_NK = values_NK.detach().masked_fill(~is_item_NK, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    sorted_NK = values_NK.gather(-1, order_NK) / strength
    gaps_NK = (sorted_NK[:, :-1] - sorted_NK[:, 1:]).clamp(max=num)
    gaps_NK = gaps_NK.masked_fill(~is_item_NK.gather(-1, order_NK)[:, 1:], num)
    s_NK = torch.cat([torch.zeros_like(sorted_NK[:, :1]), -gaps_NK.cumsum(-1)], -1)

    place_K = torch.arange(num, device=values_NK.device)
    w_NK = is_item_NK.sum(-1, keepdim=True) - place_K
    sums_NK = (s_NK - w_NK).cumsum(-1)
    before_NK = sums_NK - (s_NK - w_NK)
    counts_KK = place_K - place_K.unsqueeze(-1) + 1  # from a to b, both included
    means_NKK = (sums_NK.unsqueeze(-2) - before_NK.unsqueeze(-1)) / counts_KK.clamp(min=1)
    means_NKK = means_NKK.masked_fill(counts_KK < 1, -torch.inf)
    # the largest over b >= i for each a, then the smallest over a <= i
    largest_NKK = means_NKK.flip(-1).cummax(-1).values.flip(-1)
    v_NK = largest_NKK.masked_fill(counts_KK < 1, torch.inf).amin(-2)
    return (s_NK - v_NK).gather(-1, order_NK.argsort(-1))


def correlation(a_NK: Tensor, b_NK: Tensor, is_item_NK: Tensor) -> Tensor:
    """Computes Pearson's correlation over the items of each position, [N]; 0 where a side does not vary by more than rounding errors."""
    a_NK, b_NK = (_centred(side, is_item_NK) for side in (a_NK, b_NK))
    squares_N = a_NK.square().sum(-1), b_NK.square().sum(-1)
    num = a_NK.shape[-1]
    least = (num**2 * torch.finfo(a_NK.dtype).eps) ** 2  # sums of K ranks, none above K
    varies_N = (squares_N[0] > least) & (squares_N[1] > least)
    # put in before the root, whose slope at 0 has no bound
    norms_N = (s_N.masked_fill(~varies_N, 1).sqrt() for s_N in squares_N)
    covariance_N = (a_NK * b_NK).sum(-1).masked_fill(~varies_N, 0)
    for norm_N in norms_N:
        covariance_N = covariance_N / norm_N
    return covariance_N


def _centred(side_NK: Tensor, is_item_NK: Tensor) -> Tensor:
    side_NK = side_NK.masked_fill(~is_item_NK, 0)
    mean_N1 = side_NK.sum(-1, keepdim=True) / is_item_NK.sum(-1, keepdim=True)
    return (side_NK - mean_N1).masked_fill(~is_item_NK, 0)
