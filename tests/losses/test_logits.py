"""Losses: against references of their own, at their limits, and by where their gradients go."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.divergences import KINDS, Row, flow, soft_ranks
from trainables.config.models import Model
from trainables.config.phase import Masking
from trainables.data.corpus.masking import mask_batch, next_token_batch
from trainables.losses.logits import cross_entropy, jsd, kl
from trainables.losses.terms import divergence
from trainables.models import build, output_head

NUM, VOCABULARY = 5, 7


def _softmax(z: Row) -> Row:
    raised = [math.exp(one - max(z)) for one in z]
    return [one / sum(raised) for one in raised]


def _kl(p: Row, q: Row) -> float:
    return sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p, q, strict=True))


def _mixed(p: Row, q: Row, share: float) -> Row:
    return [share * pi + (1 - share) * qi for pi, qi in zip(p, q, strict=True)]


def _adaptive(p: Row, q: Row, q_there: Row, head: float) -> float:
    apart, mass = [0.0, 0.0], 0.0  # in the head, in the tail
    for place, (pi, qi) in enumerate(sorted(zip(p, q_there, strict=True), reverse=True)):
        mass += pi
        apart[place > 0 and mass > head] += abs(pi - qi)
    return (apart[0] * _kl(p, q) + apart[1] * _kl(q, p)) / sum(apart)


def _unlike_ranks(z_p: Row, z_q: Row, top: int, strength: float) -> float:
    items = sorted({i for z in (z_p, z_q) for i in np.argsort(z)[-top:].tolist()})
    ranks = [soft_ranks([z[i] for i in items], strength) for z in (z_p, z_q)]
    return 1 - float(np.corrcoef(*ranks)[0, 1])


def of_position(flow: Any, z_p: Row, z_q: Row, z_there: Row) -> float:
    """The definitions in the papers, in plain numbers, from softened logits. `z_there`: those of `to` in what is detached."""
    p, q = _softmax(z_p), _softmax(z_q)
    match flow.kind:
        case "forward_kl":
            return _kl(p, q)
        case "reverse_kl":
            return _kl(q, p)
        case "jeffreys":
            return (_kl(p, q) + _kl(q, p)) / 2
        case "jsd":
            m = _mixed(p, q, flow.beta)
            return flow.beta * _kl(p, m) + (1 - flow.beta) * _kl(q, m)
        case "skew_kl":
            return _kl(p, _mixed(p, q, flow.alpha))
        case "skew_reverse_kl":
            return _kl(q, [(1 - flow.alpha) * pi + flow.alpha * qi for pi, qi in zip(p, q, strict=True)])
        case "total_variation":
            return sum(abs(pi - qi) for pi, qi in zip(p, q, strict=True)) / 2
        case "adaptive_kl":
            return _adaptive(p, q, _softmax(z_there), flow.head)
        case "interpolated_kl":
            return _kl(_softmax(_mixed(z_p, z_there, flow.start)), q)
        case "rank_correlation":
            return _unlike_ranks(z_p, z_q, flow.top, flow.strength)
        case _:
            raise AssertionError(f"{flow.kind} has no reference")


PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "jsd": [{"beta": beta} for beta in (0.1, 0.5, 0.9)],
    "skew_kl": [{"alpha": alpha} for alpha in (0.1, 0.7)],
    "skew_reverse_kl": [{"alpha": alpha} for alpha in (0.1, 0.7)],
    "adaptive_kl": [{"head": head} for head in (0.05, 0.5, 0.95)],
    "interpolated_kl": [{"start": t} for t in (0.0, 0.4, 1.0)],
    "rank_correlation": [{"top": 2}, {"top": 3, "strength": 0.1}, {"top": 5}, {"top": 50, "strength": 10.0}],
}


def in_plain_numbers(flow: Any, source: torch.Tensor, to: torch.Tensor, there: torch.Tensor) -> float:
    rows = zip(*((side / flow.temperature).tolist() for side in (source, to, there)), strict=True)
    value = sum(of_position(flow, *row) for row in rows)
    return value * (flow.temperature**2 if flow.tau_squared else 1)


def some_logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (3 * torch.randn(NUM, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(
        dtype
    )


@pytest.mark.parametrize("tau_squared", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_its_definition_written_out(kind: str, temperature: float, tau_squared: bool) -> None:
    source, to = some_logits(0), some_logits(1)
    for more in PARAMETERS.get(kind, [{}]):
        term = flow(kind, temperature=temperature, tau_squared=tau_squared, **more)
        expected = in_plain_numbers(term, source, to, to)
        assert divergence(term, source, to).item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


# a KL whose second side excludes what the first one says
INFINITE_WHERE = {
    ("from",): ("reverse_kl", "jeffreys", "adaptive_kl"),
    ("to",): ("forward_kl", "jeffreys", "adaptive_kl"),
}


@pytest.mark.parametrize("excludes", [("from",), ("to",), ("from", "to")])
@pytest.mark.parametrize("kind", KINDS)
def test_an_excluded_token_adds_what_one_of_probability_0_does(kind: str, excludes: tuple[str, ...]) -> None:
    """A logit of -inf against one whose probability, 1e-152, no sum of doubles can tell from 0."""

    def of(logit: float) -> tuple[torch.Tensor, torch.Tensor]:
        source, to = some_logits(0), some_logits(1)
        for name, side in (("from", source), ("to", to)):
            side[:, [1, 4]] = logit if name in excludes else side[:, [1, 4]]
        term = flow(kind, temperature=2.0, **PARAMETERS.get(kind, [{}])[-2:][0])
        value = divergence(term, source, to.requires_grad_())
        value.backward()
        assert to.grad is not None
        return value.detach(), to.grad

    (value, slope), (expected, expected_slope) = of(-math.inf), of(-700.0)
    if kind in INFINITE_WHERE.get(excludes, ()):
        assert value == math.inf
    elif kind == "rank_correlation":
        assert value.isfinite() and slope.isfinite().all()
    else:
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(slope, expected_slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_zero_where_both_agree_and_positive_elsewhere(kind: str) -> None:
    shift = 0.0 if kind == "total_variation" else 3.0  # logits have no fixed level, but |x| has a kink at 0
    source, to = some_logits(0), (some_logits(0) + shift).requires_grad_()
    value = divergence(flow(kind), source, to)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert to.grad is not None and to.grad.abs().max() < 1e-12
    assert divergence(flow(kind), source, some_logits(1)).item() > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_definition_by_finite_differences(kind: str, temperature: float) -> None:
    """What is detached (weights of AKL, the student in TAID's target) stays where it is."""
    source, step = some_logits(0), 1e-5
    for more in PARAMETERS.get(kind, [{}]):
        to, term = some_logits(1).requires_grad_(), flow(kind, temperature=temperature, **more)
        divergence(term, source, to).backward()
        there, expected = to.detach(), torch.zeros(NUM, VOCABULARY, dtype=torch.float64)
        for place in np.ndindex(NUM, VOCABULARY):
            ends = []
            for sign in (1, -1):
                moved = there.clone()
                moved[place] += sign * step
                ends.append(in_plain_numbers(term, source, moved, there))
            expected[place] = (ends[0] - ends[1]) / (2 * step)
        assert to.grad is not None
        torch.testing.assert_close(to.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_fp32(kind: str) -> None:
    source, to = some_logits(0, torch.bfloat16), some_logits(1, torch.bfloat16).requires_grad_()
    value = divergence(flow(kind), source, to)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(divergence(flow(kind), source.double(), to.detach().double()).item(), rel=1e-5)


@pytest.mark.parametrize("size", [500.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_apart_give_a_finite_value(kind: str, dtype: torch.dtype, size: float) -> None:
    source = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype) * size
    to = (torch.tensor([[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 0.0, -1.0]]) * size).to(dtype).requires_grad_()
    value = divergence(flow(kind), source, to)
    value.backward()
    assert math.isfinite(value.item()) and to.grad is not None and bool(to.grad.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_where_no_position_is_the_value_is_zero(kind: str) -> None:
    to = torch.zeros(0, VOCABULARY, requires_grad=True)
    value = divergence(flow(kind), torch.zeros(0, VOCABULARY), to)
    value.backward()
    assert value.item() == 0 and to.grad is not None and to.grad.shape == to.shape


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_fitted_by_squared_differences_whatever_the_flow(kind: str) -> None:
    source, to = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.5]])
    assert divergence(flow(kind, temperature=3.0, tau_squared=True), source, to).item() == pytest.approx(4.25)


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
    """beta is the weight of `from` (the teacher) in the mixture: public code differs in exactly this."""
    p, q = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]
    mixture = [0.64, 0.21, 0.15]
    expected = 0.9 * _kl(p, mixture) + 0.1 * _kl(q, mixture)
    found = divergence(flow("jsd", beta=0.9), *(torch.tensor([side], dtype=torch.float64).log() for side in (p, q)))
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
    expected = -sum(math.log(_softmax(logits[n].tolist())[label]) for n, label in enumerate(labels.tolist()))
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels), (logits.requires_grad_(),))


def test_cross_entropy_is_the_forward_kl_from_a_teacher_without_doubt() -> None:
    labels, to = torch.tensor([0, 3, 6, 1, 1]), some_logits(1)
    certain = 1e4 * F.one_hot(labels, VOCABULARY).double()
    assert divergence(flow("forward_kl"), certain, to).item() == pytest.approx(cross_entropy(to, labels).item())


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama"])
def test_the_hard_loss_is_that_of_transformers_on_the_same_positions(family: str) -> None:
    shape = Model(family=family, layers=1, width=16, heads=2, intermediate_size=32, dropout=0)
    net = build.build(shape, name="m", seed=0, vocab_size=50, special_ids={"pad_token_id": 0}, length=16)
    ids_BT = torch.randint(5, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    if build.is_masked_lm(family):
        batch = mask_batch(ids_BT, masking=Masking(), vocab_size=50, mask_id=4, special_ids=(0, 1, 2, 3, 4), seed=0)
        labels_BT = torch.full_like(ids_BT, -100)
        labels_BT.view(-1)[batch.positions_N] = batch.labels_N
    else:
        batch, labels_BT = next_token_batch(ids_BT), ids_BT
    theirs = net(input_ids=batch.ids_BT, labels=labels_BT).loss
    ours = cross_entropy(output_head.logits_at(net, batch.ids_BT, batch.positions_N), batch.labels_N) / len(
        batch.labels_N
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
