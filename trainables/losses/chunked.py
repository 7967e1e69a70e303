"""Computes the terms of a stream from hidden states and head weights, with the logits of one chunk of positions at a
time.

The plain path, `term_loss` on whole logits, keeps several tensors [N, V] for each side and term until the backward.
Here each chunk of positions goes through the logits of all models, each term by the same plain function, its gradient
down to the logits by autograd, and from there by two matrix products to hidden states and head. All gradients are
computed in the forward, with the matrix products of the plain path and no more. (Computing the logits again in the
backward, with `torch.utils.checkpoint`, would be shorter, but takes half as long again.)

Legend: N positions, C positions of a chunk, V vocabulary, D width of a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainables.config.terms import Term
from trainables.losses.terms import term_loss
from trainables.losses.unit_weights import unit_weights


class LogitSource(NamedTuple):
    """The tensors of a model's logits: hidden @ weight.T + bias. A tensor that requires a gradient learns.

    Without a weight `hidden` holds the logits themselves, [N, V]: for a model whose head is more than a linear layer.
    """

    hidden_ND: Tensor
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None


class Fused(NamedTuple):
    """`loss`: the weighted sum of all terms, with every gradient. `values`: each term's own sum, detached."""

    loss: Tensor
    values: dict[str, Tensor]


def chunked_terms(
    sources: Mapping[str, LogitSource],
    labels_N: Tensor,
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
    *,
    chunk: int,
    vocab_size: int | None = None,
    second: tuple[Tensor, Tensor] | None = None,
) -> Fused:
    """Computes all terms over the same N positions, `chunk` of them at a time; `sources` by the model's name.

    Values are sums over positions, in nats, as the plain functions give them; the weights contain the divisors. A
    flow's gradient reaches only `to`; a term of weight zero has a value and no gradient. A side with more rows than
    another, or than `vocab_size` (embeddings may be padded), is cut to the fewest. `second`: other labels [N] of the
    same positions, and the shares [N] of the first, between which a hard term is split. To be called under autocast, if
    there is one: products are in its type, softmax and sums in fp32, as in the plain path.

    Memory: a few tensors [C, V] at a time, and until the backward a gradient for each tensor that learns.
    """
    read = dict.fromkeys(model for term in terms.values() for model in term.reads)
    taught = {term.target for name, term in terms.items() if weights[name]} if torch.is_grad_enabled() else set()
    fewest = min(num_rows(sources[model]) for model in read)
    fewest = fewest if vocab_size is None else min(fewest, vocab_size)
    heads = {model: _head(sources[model], fewest, is_taught=model in taught) for model in read}
    values = _walk(heads, labels_N, terms, weights, chunk=chunk, second=second)
    loss = torch.stack([weights[name] * value for name, value in values.items()]).sum()
    pairs = [pair for model in read for pair in zip(sources[model], heads[model].gradients, strict=True)]
    learning = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if learning:
        loss = _Known.apply(loss, [gradient for _, gradient in learning], *(tensor for tensor, _ in learning))  # type: ignore[no-untyped-call]
    return Fused(loss, values)


def _walk(
    heads: Mapping[str, _Head],
    labels_N: Tensor,
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
    *,
    chunk: int,
    second: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """Computes each term's value, and adds the gradients of their weighted sum to the heads."""
    values: dict[str, Tensor] = {}
    for start in range(0, max(1, len(labels_N)), chunk):  # where there is no position, one empty chunk
        part = slice(start, start + chunk)
        logits = {model: head.logits(part) for model, head in heads.items()}
        for name, term in terms.items():
            weights_N = unit_weights(term, logits, labels_N[part])
            if second is not None and term.source is None:
                weights_N = second[1][part]
            with torch.enable_grad():
                # no variable holds the source's logits beyond this line: memory
                value = term_loss(
                    term, term.source and logits[term.source], logits[term.target], labels_N[part], weights_N=weights_N
                )
                if second is not None and term.source is None:
                    value = value + term_loss(
                        term, None, logits[term.target], second[0][part], weights_N=1 - second[1][part]
                    )
                if logits[term.target].requires_grad and weights[name]:  # one term at a time has tensors [C, V]
                    (weights[name] * value).backward()  # type: ignore[no-untyped-call]
            values[name] = values[name] + value.detach() if name in values else value.detach()
        for model, head in heads.items():
            slope_CV = logits.pop(model).grad
            if slope_CV is not None:
                head.take(part, slope_CV)
    return values


@dataclass(frozen=True)
class _Head:
    """A side as the products use it, and its gradients so far (None for a frozen tensor)."""

    hidden_ND: Tensor
    weight_VD: Tensor | None  # in the type of the products
    bias_V: Tensor | None
    num_rows: int
    gradients: tuple[Tensor | None, ...]  # of hidden, weight and bias, in their own type and size

    @torch.no_grad()
    def logits(self, part: slice) -> Tensor:
        """Returns logits [C, V]; a leaf that requires a gradient, if any tensor of this side learns."""
        if self.weight_VD is None:
            logits_CV = self.hidden_ND[part, : self.num_rows].detach()
        else:
            logits_CV = F.linear(self.hidden_ND[part].to(self.weight_VD.dtype), self.weight_VD, self.bias_V)
        return logits_CV.requires_grad_(any(gradient is not None for gradient in self.gradients))

    @torch.no_grad()
    def take(self, part: slice, slope_CV: Tensor) -> None:
        """Adds the gradients of a chunk, from the gradient of its logits."""
        hidden, weight, bias = self.gradients
        if hidden is not None:
            if self.weight_VD is None:
                hidden[part, : self.num_rows] = slope_CV
            else:
                hidden[part] = slope_CV @ self.weight_VD
        if weight is not None:
            rows_VD, hidden_CD = weight[: self.num_rows], self.hidden_ND[part].to(slope_CV.dtype)
            if rows_VD.dtype == slope_CV.dtype:
                torch.addmm(rows_VD, slope_CV.t(), hidden_CD, out=rows_VD)
            else:
                rows_VD += slope_CV.t() @ hidden_CD
        if bias is not None:
            bias[: self.num_rows] += slope_CV.sum(0, dtype=bias.dtype)


@torch.no_grad()
def _head(side: LogitSource, num_rows: int, *, is_taught: bool) -> _Head:
    gradients = (
        torch.zeros_like(tensor) if is_taught and tensor is not None and tensor.requires_grad else None
        for tensor in side
    )
    weight, bias = (None if tensor is None else _as_multiplied(tensor[:num_rows]) for tensor in side[1:])
    return _Head(side.hidden_ND, weight, bias, num_rows, tuple(gradients))


def _as_multiplied(tensor: Tensor) -> Tensor:
    """Casts to the type that autocast gives to products, once for all chunks: autocast does not cache casts of
    slices."""
    kind = tensor.device.type
    is_cast = kind != "meta" and torch.is_autocast_enabled(kind) and tensor.dtype == torch.float32
    return tensor.to(torch.get_autocast_dtype(kind)) if is_cast else tensor


def num_rows(side: LogitSource) -> int:
    """Entries of the side's vocabulary, or its classes."""
    return side.hidden_ND.shape[1] if side.weight_VD is None else len(side.weight_VD)


class _Known(torch.autograd.Function):
    """A number whose gradients have already been computed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * slope for gradient in ctx.saved_tensors)
