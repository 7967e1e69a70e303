"""The loss of each term: a table from the class of the config value to a pure function of tensors.

A loss is a *sum* over what its term is averaged over, in at least fp32; its gradient reaches only `to`.

Legend: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.config import terms
from trainables.config.terms import Term
from trainables.config.value import Value
from trainables.losses.hidden import attention_mse, hidden_cosine, hidden_mse, relation_kl
from trainables.losses.logits import (
    INFINITE,
    cross_entropy,
    head_share,
    jsd,
    kl,
    kl_N,
    log_mixture,
    log_probs,
    softened,
    total,
    wide,
)
from trainables.losses.soft_rank import correlation, soft_rank, union

# of a term, of `from` and `to`, and of the weights of positions
Divergence = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def term_loss(
    term: Term, source: Any, to: Any, labels_or_mask: Tensor | None, *, weights_N: Tensor | None = None
) -> Tensor:
    """Computes the loss of `term` from its `inputs`, as the models `from` and `to` give them.

    logits: [N, V] (`source`: None for a hard loss), labels [N], and weights of positions [N] or None. hidden_states: a [B, T, D] for each pair of layers,
    and a mask [B, T]. attention_scores: a [B, H, T, T] for each pair, and a mask [B, T] or [B, T, T]. relations: for
    each pair queries, keys and values [B, T, D], and a mask [B, T].
    """
    if isinstance(term, terms.OwnTerm):
        loss: Tensor = term.total(source, to, labels_or_mask)
        return loss
    return LOSSES[type(term)](term, source, to, labels_or_mask, weights_N)


def divergence(term: Any, from_NV: Tensor, to_NV: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Computes the divergence of a term at the logits, summed over positions with their weights. KLs and JSD in nats; at each position
    total variation lies in 0 … 1 and rank correlation in 0 … 2.

    Both sides are softened by `temperature`; with `tau_squared` the value is multiplied by its square, so that the
    gradient keeps its size as the temperature rises (Hinton et al. 2015, section 2). Numbers have no temperature.
    A token that a side excludes (a logit of -inf) has the probability 0; a KL is infinite where its second side excludes what
    the first one says.
    """
    from_NV = from_NV.detach()
    if to_NV.shape[-1] == 1:
        return total(F.mse_loss(wide(to_NV), wide(from_NV), reduction="none"), weights_N)
    value = DIVERGENCES[type(term)](term, from_NV, to_NV, weights_N)
    value = value.masked_fill(value > INFINITE, torch.inf)
    return value * term.temperature**2 if term.tau_squared else value


def _of_log_probs(of_log_probs: Divergence) -> Divergence:
    """Turns a divergence of log-probabilities into one of logits at the term's temperature."""

    def of_logits(term: Any, from_NV: Tensor, to_NV: Tensor, weights_N: Tensor | None) -> Tensor:
        p_NV, q_NV = (log_probs(side, term.temperature) for side in (from_NV, to_NV))
        return of_log_probs(term, p_NV, q_NV, weights_N)

    return of_logits


def _adaptive_kl(term: terms.AdaptiveKL, log_p_NV: Tensor, log_q_NV: Tensor, weights_N: Tensor | None) -> Tensor:
    head_N = head_share(log_p_NV, log_q_NV, term.head)
    return total(head_N * kl_N(log_p_NV, log_q_NV) + (1 - head_N) * kl_N(log_q_NV, log_p_NV), weights_N)


def _interpolated_kl(
    term: terms.InterpolatedKL, log_p_NV: Tensor, log_q_NV: Tensor, weights_N: Tensor | None
) -> Tensor:
    return kl(F.log_softmax(torch.lerp(log_q_NV.detach(), log_p_NV, term.start), dim=-1), log_q_NV, weights_N)


def _rank_correlation(term: terms.RankCorrelation, from_NV: Tensor, to_NV: Tensor, weights_N: Tensor | None) -> Tensor:
    """Computes 1 - Pearson's correlation of soft ranks among the `top` likeliest of either side (RLKD, arXiv 2409.12545),
    summed.

    Of softened logits instead of log-probabilities: ranks do not change when a constant is added.
    """
    items_NK, is_item_NK = union(from_NV, to_NV, term.top)
    from_ranks_NK, to_ranks_NK = (
        soft_rank(softened(side_NV.gather(-1, items_NK), term.temperature), is_item_NK, term.strength)
        for side_NV in (from_NV, to_NV)
    )
    return total(1 - correlation(from_ranks_NK, to_ranks_NK, is_item_NK), weights_N)


DIVERGENCES: dict[type[Value], Divergence] = {
    terms.ForwardKL: _of_log_probs(lambda term, p, q, w: kl(p, q, w)),
    terms.ReverseKL: _of_log_probs(lambda term, p, q, w: kl(q, p, w)),
    terms.Jeffreys: _of_log_probs(lambda term, p, q, w: (kl(p, q, w) + kl(q, p, w)) / 2),
    terms.JSD: _of_log_probs(lambda term, p, q, w: jsd(p, q, term.beta, w)),
    terms.SkewKL: _of_log_probs(lambda term, p, q, w: kl(p, log_mixture(p, q, term.alpha), w)),
    terms.SkewReverseKL: _of_log_probs(lambda term, p, q, w: kl(q, log_mixture(q, p, term.alpha), w)),
    terms.TotalVariation: _of_log_probs(lambda term, p, q, w: total((p.exp() - q.exp()).abs(), w) / 2),
    terms.AdaptiveKL: _of_log_probs(_adaptive_kl),
    terms.InterpolatedKL: _of_log_probs(_interpolated_kl),
    terms.RankCorrelation: _rank_correlation,
}
LOSSES: dict[type[Value], Callable[[Any, Any, Any, Any, Any], Tensor]] = {
    terms.CrossEntropy: lambda term, source, to, labels_N, w: cross_entropy(to, labels_N, w),
    **dict.fromkeys(DIVERGENCES, lambda term, source, to, labels_N, w: divergence(term, source, to, w)),
    terms.HiddenMSE: lambda term, source, to, mask_BT, _: hidden_mse(
        source, to, mask_BT, first=term.positions == "first", normalise=term.normalise
    ),
    terms.HiddenCosine: lambda term, source, to, mask_BT, _: hidden_cosine(source[0], to[0], mask_BT),
    terms.AttentionMSE: lambda term, source, to, mask, _: attention_mse(source, to, mask),
    terms.RelationKL: lambda term, source, to, mask_BT, _: relation_kl(source[0], to[0], mask_BT, num_heads=term.heads),
}
