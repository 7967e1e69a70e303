"""Losses on logits at N supervised positions. Every value is a *sum* in fp32: the loop divides once, by the number of
supervised positions in the global batch, so that no loss is a mean of means.

Legend: N positions (or sequences of a task), V vocabulary (or classes). With V = 1 the one logit is a predicted number:
losses are then squared differences. Divergences are true values, zero where both sides agree.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EXCLUDED = -1e30  # a logit, and a log-probability, of a token that has none; finite after any scale
INFINITE = 1e15  # nats: what no divergence reaches unless one side says what the other excludes


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Computes -sum_n weight_n log softmax(logits_n)[label_n], nats; sum_n weight_n (logit_n - label_n)^2 where labels are numbers."""
    if logits_NV.shape[-1] == 1:
        errors_N = F.mse_loss(wide(logits_NV)[:, 0], labels_N.to(wide(logits_NV).dtype), reduction="none")
        return total(errors_N, weights_N)
    if weights_N is not None:
        return total(F.cross_entropy(wide(logits_NV), labels_N, reduction="none"), weights_N)
    return F.cross_entropy(wide(logits_NV), labels_N, reduction="sum")


def total(parts_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """Adds up what the positions contribute, [N] or [N, V], each position times its weight."""
    if weights_N is None:
        return parts_N.sum()
    return (weights_N * (parts_N if parts_N.dim() == 1 else parts_N.sum(-1))).sum()


def wide(logits_NV: Tensor) -> Tensor:
    """Casts to at least fp32: sums over a vocabulary lose too much in half precision."""
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def log_probs(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes log softmax(logits / temperature), finite everywhere: tokens that a model excludes have `EXCLUDED`."""
    return F.log_softmax(softened(logits_NV, temperature), dim=-1)


def softened(logits_NV: Tensor, temperature: float) -> Tensor:
    """Divides logits by a temperature. One of -inf (a suppressed token) becomes `EXCLUDED`: its probability stays 0, and 0 log 0 is
    0 in every divergence, which takes it for NaN otherwise."""
    logits_NV = wide(logits_NV) / temperature
    return logits_NV.masked_fill_(logits_NV == -math.inf, EXCLUDED)  # in place, since [N, V] is large


def kl(log_p_NV: Tensor, log_q_NV: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Computes sum_n weight_n KL(p_n || q_n) from log-probabilities."""
    return total(F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True), weights_N)


def jsd(log_p_NV: Tensor, log_q_NV: Tensor, beta: float, weights_N: Tensor | None = None) -> Tensor:
    """Computes beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: GKD's convention (Agarwal et al.
    2024).

    Zero at both ends of beta; divided by beta the limit is KL(p || q), by 1 - beta KL(q || p).
    """
    log_m_NV = log_mixture(log_p_NV, log_q_NV, beta)
    return beta * kl(log_p_NV, log_m_NV, weights_N) + (1 - beta) * kl(log_q_NV, log_m_NV, weights_N)


def log_mixture(log_p_NV: Tensor, log_q_NV: Tensor, share: float) -> Tensor:
    """Computes log(share p + (1 - share) q) of log-probabilities, 0 < share < 1."""
    return torch.logaddexp(log_p_NV + math.log(share), log_q_NV + math.log1p(-share))


@torch.no_grad()
def head_share(log_p_NV: Tensor, log_q_NV: Tensor, head: float) -> Tensor:
    """Computes the share of sum |p - q| that lies in the head of p, [N] (Wu et al. 2024). A constant, without a gradient.

    The head: the likeliest tokens while their mass is at most `head`, and always the first. Mass and differences are
    both in sorted order (some public code mixes the orders and gets other weights). Where both sides agree: a half.
    """
    p_NV, order_NV = log_p_NV.exp().sort(dim=-1, descending=True, stable=True)
    is_head_NV = p_NV.cumsum(-1) <= head
    is_head_NV[:, 0] = True
    apart_NV = (p_NV - log_q_NV.exp().gather(-1, order_NV)).abs()
    head_N, all_N = apart_NV.masked_fill(~is_head_NV, 0).sum(-1), apart_NV.sum(-1)
    return torch.where(all_N > 0, head_N / all_N, 0.5)


def kl_N(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Computes KL(p_n || q_n), [N]."""
    return F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)
