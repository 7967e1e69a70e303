"""Losses on logits at N supervised positions. Every value is a *sum* in fp32: the loop divides once, by the number of
supervised positions in the global batch (protocol of the project: never means of means).

Legend: N positions (or sequences of a task), V vocabulary (or classes). With V = 1 the one logit is a number to be fitted,
not a class: losses are then squared differences. All divergences are true values (zero where both sides agree), not cross-entropies.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.spec.terms import JSD, Flow, ForwardKL, Jeffreys, ReverseKL


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-sum_n log softmax(logits_n)[label_n], nats; sum_n (logit_n - label_n)^2 where labels are numbers."""
    if logits_NV.shape[-1] == 1:
        return F.mse_loss(wide(logits_NV)[:, 0], labels_N.to(wide(logits_NV).dtype), reduction="sum")
    return F.cross_entropy(wide(logits_NV), labels_N, reduction="sum")


def divergence(flow: Flow, from_NV: Tensor, to_NV: Tensor) -> Tensor:
    """The flow's divergence, summed over positions, nats; its gradient reaches only `to`.

    Both sides are softened by `temperature`; with `tau_squared` the value is multiplied by its square, so that the
    gradient keeps its size as the temperature rises (Hinton et al. 2015, section 2). Numbers have no temperature.
    """
    if to_NV.shape[-1] == 1:
        return F.mse_loss(wide(to_NV), wide(from_NV.detach()), reduction="sum")
    log_p_NV = F.log_softmax(wide(from_NV.detach()) / flow.temperature, dim=-1)
    log_q_NV = F.log_softmax(wide(to_NV) / flow.temperature, dim=-1)
    match flow:
        case ForwardKL():
            value = kl(log_p_NV, log_q_NV)
        case ReverseKL():
            value = kl(log_q_NV, log_p_NV)
        case Jeffreys():
            value = (kl(log_p_NV, log_q_NV) + kl(log_q_NV, log_p_NV)) / 2
        case JSD():
            value = jsd(log_p_NV, log_q_NV, flow.beta)
    return value * flow.temperature**2 if flow.tau_squared else value


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
    log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
    return beta * kl(log_p_NV, log_m_NV) + (1 - beta) * kl(log_q_NV, log_m_NV)
