"""Weights for the positions of a term, from logits and labels: a table from the class of the rule to a pure function.

Legend: N positions, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainables.config import unit_weights as rules
from trainables.config.terms import Term
from trainables.config.value import Value
from trainables.losses.logits import log_probs

Logits = Mapping[str, Tensor]  # by model, [N, V]


@torch.no_grad()
def unit_weights(term: Term, logits: Logits, labels_N: Tensor) -> Tensor | None:
    """Computes the weight of each position in a term at the logits, [N], constants in at least fp32; None where the term
    has no rule."""
    rule = term.rule
    return None if rule is None else WEIGHTS[type(rule)](rule, term, logits, labels_N)


def revision(p_NV: Tensor, labels_N: Tensor, eta: float) -> Tensor:
    """Computes the share of a teacher's probabilities in the revised target, [N]: 1 where the label is the likeliest."""
    p_max_N, p_label_N = p_NV.amax(-1), p_NV.gather(-1, labels_N[:, None])[:, 0]
    return torch.where(p_label_N < p_max_N, eta / (p_max_N - p_label_N + 1), 1)


def overlap(from_NV: Tensor, to_NV: Tensor, top: int) -> Tensor:
    """Computes the fraction of the `top` largest of each side that both have, [N]."""
    top = min(top, from_NV.shape[-1])
    from_NK, to_NK = (side_NV.topk(top, dim=-1).indices for side_NV in (from_NV, to_NV))
    return (from_NK[:, :, None] == to_NK[:, None]).any(-1).sum(-1) / top


def _revision(rule: rules.Revision, term: Any, logits: Logits, labels_N: Tensor) -> Tensor:
    share_N = revision(log_probs(logits[rule.by]).exp(), labels_N, rule.eta)
    return share_N if term.source is not None else 1 - share_N


def _by_loss(rule: rules.ByLoss, term: Any, logits: Logits, labels_N: Tensor) -> Tensor:
    gains_KN = torch.stack([log_probs(logits[name]).gather(-1, labels_N[:, None])[:, 0] for name in rule.among])
    return (gains_KN / rule.temperature).softmax(0)[rule.among.index(term.source)]


def _overlap(rule: rules.Overlap, term: Any, logits: Logits, labels_N: Tensor) -> Tensor:
    return overlap(logits[term.source], logits[term.target], rule.top)


WEIGHTS: dict[type[Value], Callable[[Any, Any, Logits, Tensor], Tensor]] = {
    rules.Revision: _revision,
    rules.ByLoss: _by_loss,
    rules.Overlap: _overlap,
}
