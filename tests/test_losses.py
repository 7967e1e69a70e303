"""Losses: against references of their own, at their limits, and by where their gradients go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import TypeAdapter

from trainables import models
from trainables.data.masking import mask_batch, next_token_batch
from trainables.losses.logits import cross_entropy, divergence, jsd, kl
from trainables.spec.models import Model
from trainables.spec.phase import Masking
from trainables.spec.terms import Flow

KINDS = [member.model_fields["kind"].annotation.__args__[0] for member in get_args(Flow)]
NUM, VOCABULARY = 5, 7

Probabilities = NDArray[np.float64]


def _kl(p: Probabilities, q: Probabilities) -> float:
    return float(sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p.ravel(), q.ravel(), strict=True)))


REFERENCE: dict[str, Callable[[Probabilities, Probabilities, float], float]] = {
    "forward_kl": lambda p, q, beta: _kl(p, q),
    "reverse_kl": lambda p, q, beta: _kl(q, p),
    "jeffreys": lambda p, q, beta: (_kl(p, q) + _kl(q, p)) / 2,
    "jsd": lambda p, q, beta: beta * _kl(p, beta * p + (1 - beta) * q) + (1 - beta) * _kl(q, beta * p + (1 - beta) * q),
}


def flow(kind: str, **more: Any) -> Flow:
    value = {"kind": kind, "from": "a", "to": "b", "tau_squared": False, **more}
    return TypeAdapter(Flow).validate_python(value)  # type: ignore[no-any-return]


def some_logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (3 * torch.randn(NUM, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(
        dtype
    )


def softmax(logits: torch.Tensor, temperature: float) -> Probabilities:
    raised = np.exp(logits.double().numpy() / temperature)
    return raised / raised.sum(-1, keepdims=True)  # type: ignore[no-any-return]


def test_every_divergence_has_a_reference() -> None:
    assert set(KINDS) == set(REFERENCE)


@pytest.mark.parametrize("tau_squared", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_its_definition_written_out(kind: str, temperature: float, tau_squared: bool) -> None:
    source, to = some_logits(0), some_logits(1)
    for beta in (0.1, 0.5, 0.9) if kind == "jsd" else (0.5,):
        more = {"beta": beta} if kind == "jsd" else {}
        expected = REFERENCE[kind](softmax(source, temperature), softmax(to, temperature), beta)
        value = divergence(flow(kind, temperature=temperature, tau_squared=tau_squared, **more), source, to)
        assert value.item() == pytest.approx(expected * (temperature**2 if tau_squared else 1), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_zero_with_zero_gradient_where_both_agree_and_positive_elsewhere(kind: str) -> None:
    source, to = some_logits(0), (some_logits(0) + 3.0).requires_grad_()  # logits have no fixed level
    value = divergence(flow(kind), source, to)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert to.grad is not None and to.grad.abs().max() < 1e-12
    assert divergence(flow(kind), source, some_logits(1)).item() > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_agrees_with_finite_differences(kind: str, temperature: float) -> None:
    source, to = some_logits(0), some_logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(flow(kind, temperature=temperature), source, z), (to,))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_only_to(kind: str) -> None:
    source, to = some_logits(0).requires_grad_(), some_logits(1).requires_grad_()
    divergence(flow(kind), source, to).backward()
    assert source.grad is None
    assert to.grad is not None and to.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_a_sum_over_positions(kind: str) -> None:
    source, to = some_logits(0), some_logits(1)
    rows = [divergence(flow(kind), source[i : i + 1], to[i : i + 1]).item() for i in range(NUM)]
    assert divergence(flow(kind), source, to).item() == pytest.approx(sum(rows), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_fp32(kind: str) -> None:
    source, to = some_logits(0, torch.bfloat16), some_logits(1, torch.bfloat16).requires_grad_()
    value = divergence(flow(kind), source, to)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(divergence(flow(kind), source.double(), to.detach().double()).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_apart_give_a_finite_value(kind: str) -> None:
    source = torch.tensor([[500.0, -500.0, 0.0]])
    to = torch.tensor([[-500.0, 500.0, 0.0]], requires_grad=True)
    value = divergence(flow(kind), source, to)
    value.backward()
    assert math.isfinite(value.item()) and to.grad is not None and bool(to.grad.isfinite().all())


def test_jsd_over_beta_tends_to_forward_and_over_one_minus_beta_to_reverse_kl() -> None:
    log_p, log_q = (F.log_softmax(some_logits(seed), -1) for seed in (0, 1))
    assert jsd(log_p, log_q, 1e-7).item() / 1e-7 == pytest.approx(kl(log_p, log_q).item(), rel=1e-4)
    assert jsd(log_p, log_q, 1 - 1e-7).item() / 1e-7 == pytest.approx(kl(log_q, log_p).item(), rel=1e-4)


def test_jeffreys_and_the_even_jsd_are_symmetric_and_the_jsd_is_bounded() -> None:
    a, b = some_logits(0), 100 * some_logits(1)
    for kind in ("jeffreys", "jsd"):
        assert divergence(flow(kind), a, b).item() == pytest.approx(divergence(flow(kind), b, a).item(), rel=1e-12)
    assert divergence(flow("jsd"), a, b).item() <= NUM * math.log(2)


def test_jsd_follows_the_convention_of_gkd() -> None:
    """beta weighs `from` (the teacher) in the mixture: public code differs in exactly this."""
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.1, 0.3, 0.6]])
    mixture = 0.9 * p + 0.1 * q
    expected = 0.9 * _kl(p, mixture) + 0.1 * _kl(q, mixture)
    found = divergence(flow("jsd", beta=0.9), torch.from_numpy(p).log(), torch.from_numpy(q).log())
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_tau_squared_keeps_the_size_of_the_gradient() -> None:
    """At a high temperature tau^2 times the gradient tends to (z - v) / V of centred logits (Hinton et al. 2015)."""
    source, to = some_logits(0), some_logits(1).requires_grad_()
    divergence(flow("forward_kl", temperature=1e6, tau_squared=True), source, to).backward()
    difference = (to - source).detach()
    expected = (difference - difference.mean(-1, keepdim=True)) / VOCABULARY
    assert to.grad is not None
    torch.testing.assert_close(to.grad, expected, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- cross-entropy


def test_cross_entropy_is_its_definition_written_out() -> None:
    logits, labels = some_logits(0), torch.tensor([0, 3, 6, 1, 1])
    p = softmax(logits, 1.0)
    expected = -sum(math.log(p[n, label]) for n, label in enumerate(labels.tolist()))
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels), (logits.requires_grad_(),))


def test_cross_entropy_is_the_forward_kl_from_a_teacher_without_doubt() -> None:
    labels, to = torch.tensor([0, 3, 6, 1, 1]), some_logits(1)
    certain = 1e4 * F.one_hot(labels, VOCABULARY).double()
    assert divergence(flow("forward_kl"), certain, to).item() == pytest.approx(cross_entropy(to, labels).item())


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama"])
def test_the_hard_loss_is_that_of_transformers_on_the_same_positions(family: str) -> None:
    shape = Model(family=family, layers=1, width=16, heads=2, inner=32, dropout=0)
    net = models.build(shape, name="m", seed=0, vocab_size=50, special_ids={"pad_token_id": 0}, length=16)
    ids_BT = torch.randint(5, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    if models.is_masked_lm(family):
        batch = mask_batch(ids_BT, masking=Masking(), vocab_size=50, mask_id=4, special_ids=(0, 1, 2, 3, 4), seed=0)
        labels_BT = torch.full_like(ids_BT, -100)
        labels_BT.view(-1)[batch.positions_N] = batch.labels_N
    else:
        batch, labels_BT = next_token_batch(ids_BT), ids_BT
    theirs = net(input_ids=batch.ids_BT, labels=labels_BT).loss
    ours = cross_entropy(models.logits_at(net, batch.ids_BT, batch.positions_N), batch.labels_N) / len(batch.labels_N)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
