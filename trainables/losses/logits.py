"""Losses on logits at N supervised positions. Every value is a *sum* in fp32: the loop divides once, by the number of
supervised positions in the global batch (protocol of the project: never means of means).

Legend: N positions (or sequences of a task), V vocabulary (or classes). With V = 1 the one logit is a number to be fitted,
not a class: losses are then squared differences. All are true values (zero where both sides agree), not cross-entropies.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.config.terms import (
    JSD,
    AdaptiveKL,
    Flow,
    ForwardKL,
    InterpolatedKL,
    Jeffreys,
    RankCorrelation,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from trainables.losses.soft_rank import correlation, soft_rank, union


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-sum_n log softmax(logits_n)[label_n], nats; sum_n (logit_n - label_n)^2 where labels are numbers."""
    if logits_NV.shape[-1] == 1:
        return F.mse_loss(wide(logits_NV)[:, 0], labels_N.to(wide(logits_NV).dtype), reduction="sum")
    return F.cross_entropy(wide(logits_NV), labels_N, reduction="sum")


def divergence(flow: Flow, from_NV: Tensor, to_NV: Tensor) -> Tensor:
    """The flow's divergence, summed over positions; its gradient reaches only `to`. KLs and JSD in nats; of the others
    total variation lies in 0 … 1 and rank correlation in 0 … 2 at each position.

    Both sides are softened by `temperature`; with `tau_squared` the value is multiplied by its square, so that the
    gradient keeps its size as the temperature rises (Hinton et al. 2015, section 2). Numbers have no temperature.
    The target of `InterpolatedKL` is taken at t = `start`: whoever moves it passes the flow of the step.
    """
    from_NV = from_NV.detach()
    if to_NV.shape[-1] == 1:
        return F.mse_loss(wide(to_NV), wide(from_NV), reduction="sum")
    value = _unranked(flow, from_NV, to_NV) if isinstance(flow, RankCorrelation) else _between(flow, from_NV, to_NV)
    return value * flow.temperature**2 if flow.tau_squared else value


def _between(flow: Flow, from_NV: Tensor, to_NV: Tensor) -> Tensor:
    log_p_NV = F.log_softmax(wide(from_NV) / flow.temperature, dim=-1)
    log_q_NV = F.log_softmax(wide(to_NV) / flow.temperature, dim=-1)
    match flow:
        case ForwardKL():
            return kl(log_p_NV, log_q_NV)
        case ReverseKL():
            return kl(log_q_NV, log_p_NV)
        case Jeffreys():
            return (kl(log_p_NV, log_q_NV) + kl(log_q_NV, log_p_NV)) / 2
        case JSD():
            return jsd(log_p_NV, log_q_NV, flow.beta)
        case SkewKL():
            return kl(log_p_NV, log_mixture(log_p_NV, log_q_NV, flow.alpha))
        case SkewReverseKL():
            return kl(log_q_NV, log_mixture(log_q_NV, log_p_NV, flow.alpha))
        case TotalVariation():
            return (log_p_NV.exp() - log_q_NV.exp()).abs().sum() / 2
        case AdaptiveKL():
            head_N = head_share(log_p_NV, log_q_NV, flow.head)
            return (head_N * _kl_N(log_p_NV, log_q_NV) + (1 - head_N) * _kl_N(log_q_NV, log_p_NV)).sum()
        case InterpolatedKL(start=t):
            log_target_NV = F.log_softmax(torch.lerp(log_q_NV.detach(), log_p_NV, t), dim=-1)
            return kl(log_target_NV, log_q_NV)
        case _:
            raise AssertionError(f"{flow.kind} is not between probabilities")


def _unranked(flow: RankCorrelation, from_NV: Tensor, to_NV: Tensor) -> Tensor:
    """1 - Pearson's correlation of soft ranks among the `top` likeliest of either side (RLKD, arXiv 2409.12545), summed.

    Softened logits will do in place of log-probabilities: ranks don't see what is added to all.
    """
    items_NK, is_item_NK = union(from_NV, to_NV, flow.top)
    from_ranks_NK, to_ranks_NK = (
        soft_rank(wide(side_NV.gather(-1, items_NK)) / flow.temperature, is_item_NK, flow.strength)
        for side_NV in (from_NV, to_NV)
    )
    return (1 - correlation(from_ranks_NK, to_ranks_NK, is_item_NK)).sum()


def wide(logits_NV: Tensor) -> Tensor:
    """At least fp32: sums over a vocabulary lose too much in half precision."""
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """sum_n KL(p_n || q_n) from log-probabilities."""
    return F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)


def jsd(log_p_NV: Tensor, log_q_NV: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: GKD's convention (Agarwal et al. 2024).

    It vanishes at both ends of beta; divided by beta it tends to KL(p || q), by 1 - beta to KL(q || p).
    """
    log_m_NV = log_mixture(log_p_NV, log_q_NV, beta)
    return beta * kl(log_p_NV, log_m_NV) + (1 - beta) * kl(log_q_NV, log_m_NV)


def log_mixture(log_p_NV: Tensor, log_q_NV: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q) of log-probabilities, 0 < share < 1."""
    return torch.logaddexp(log_p_NV + math.log(share), log_q_NV + math.log1p(-share))


@torch.no_grad()
def head_share(log_p_NV: Tensor, log_q_NV: Tensor, head: float) -> Tensor:
    """[N]: how much of sum |p - q| lies in the head of p, for AKL (Wu et al. 2024). A constant: without a gradient.

    The head: the likeliest tokens while their mass is at most `head`, and always the first. Mass and differences are both
    in the sorted order (methods in public that mix them up give other weights). Where both sides agree: a half.
    """
    p_NV, order_NV = log_p_NV.exp().sort(dim=-1, descending=True, stable=True)
    is_head_NV = p_NV.cumsum(-1) <= head
    is_head_NV[:, 0] = True
    apart_NV = (p_NV - log_q_NV.exp().gather(-1, order_NV)).abs()
    head_N, all_N = apart_NV.masked_fill(~is_head_NV, 0).sum(-1), apart_NV.sum(-1)
    return torch.where(all_N > 0, head_N / all_N, 0.5)


def _kl_N(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """[N]: KL(p_n || q_n)."""
    return F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)
