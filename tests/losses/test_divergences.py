"""Soft ranks and their correlation against plain algorithms; the bounds, limits and traps of single divergences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from tests.support.divergences import KINDS, flow, soft_ranks
from trainables.losses.logits import head_share
from trainables.losses.soft_rank import correlation, soft_rank, union
from trainables.losses.terms import divergence

STRENGTHS = (0.01, 0.3, 1.0, 5.0, 100.0)


def values(num: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num, width, generator=draw, dtype=torch.float64)).to(dtype)


def all_items(of: Tensor) -> Tensor:
    return torch.ones_like(of, dtype=torch.bool)


def some_items(num: int, width: int) -> Tensor:
    """At least two of each row."""
    found = torch.rand(num, width, generator=torch.Generator().manual_seed(5)) < 0.6
    found[:, [1, width - 2]] = True
    return found


# ----------------------------------------------------------------------------------------------------------- soft ranks


def test_soft_ranks_of_the_examples_of_its_authors() -> None:
    """From the README of fast-soft-sort: 1 is the smallest."""
    given = torch.tensor([[5.0, 1.0, 2.0], [2.0, 1.0, 5.0]], dtype=torch.float64)
    for strength, expected in ((2.0, [[3, 1.25, 1.75], [1.75, 1.25, 3]]), (1.0, [[3, 1, 2], [2, 1, 3]])):
        torch.testing.assert_close(soft_rank(given, all_items(given), strength), torch.tensor(expected).double())


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("width", [2, 3, 6, 10])
def test_soft_ranks_are_those_of_pooling_adjacent_violators(width: int, strength: float) -> None:
    given = values(40, width)
    given[20:] = given[20:].round()  # ties
    expected = torch.tensor([soft_ranks(row, strength) for row in given.tolist()], dtype=torch.float64)
    found = soft_rank(given, all_items(given), strength)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.sum(-1), torch.full((40,), width * (width + 1) / 2, dtype=torch.float64))


@pytest.mark.parametrize("strength", [0.3, 1.0, 5.0])
def test_soft_ranks_are_the_nearest_point_of_the_permutahedron(strength: float) -> None:
    """No corner lies beyond the plane through the projection that faces what is projected: that is what nearest means."""
    given = values(20, 5)
    away = given / strength - soft_rank(given, all_items(given), strength)
    corners = torch.tensor(list(itertools.permutations(range(1, 6))), dtype=torch.float64)
    reach = ((corners - soft_rank(given, all_items(given), strength).unsqueeze(1)) * away.unsqueeze(1)).sum(-1)
    assert reach.max().item() < 1e-9


def test_soft_ranks_tend_to_ranks_and_to_their_mean() -> None:
    given = values(20, 8)
    found = soft_rank(given, all_items(given), 1e-6)
    np.testing.assert_allclose(found.numpy(), rankdata(given.numpy(), axis=-1), atol=1e-9)
    torch.testing.assert_close(
        soft_rank(given, all_items(given), 1e9), torch.full((20, 8), 4.5).double(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("strength", STRENGTHS)
def test_what_is_no_item_changes_neither_ranks_nor_gradients(strength: float) -> None:
    given, is_item = values(30, 6), some_items(30, 6)
    slopes = values(30, 6, seed=1).masked_fill(~is_item, 0)
    leaf = given.clone().requires_grad_()
    found = soft_rank(leaf, is_item, strength)
    (found * slopes).sum().backward()
    assert leaf.grad is not None
    for row in range(30):
        alone = given[row, is_item[row]].unsqueeze(0).requires_grad_()
        wanted = soft_rank(alone, all_items(alone), strength)
        (wanted * slopes[row, is_item[row]]).sum().backward()
        assert alone.grad is not None
        torch.testing.assert_close(found[row, is_item[row]], wanted[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(leaf.grad[row, is_item[row]], alone.grad[0], rtol=1e-10, atol=1e-10)
        assert not leaf.grad[row, ~is_item[row]].any()


@pytest.mark.parametrize("strength", [0.3, 1.0, 5.0])
def test_the_gradient_of_soft_ranks_agrees_with_finite_differences(strength: float) -> None:
    given = values(8, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: soft_rank(z, all_items(z), strength), (given,))


def test_soft_ranks_of_far_values_lose_no_digits() -> None:
    given = torch.tensor([[1e6, -1e6, 3.0, 3.5, 1e6 + 1]], requires_grad=True)
    found = soft_rank(given, all_items(given), 1.0)
    expected = soft_ranks(given[0].tolist(), 1.0)
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- correlation


def test_the_union_has_each_of_the_likeliest_once() -> None:
    source, to = values(50, 9), values(50, 9, seed=1)
    items, is_item = union(source, to, 4)
    assert items.shape == is_item.shape == (50, 8)
    for row in range(50):
        expected = {i for side in (source, to) for i in np.argsort(side[row].numpy())[-4:].tolist()}
        found = items[row, is_item[row]].tolist()
        assert len(found) == len(expected) and set(found) == expected
    assert union(source, source, 4)[1].sum(-1).tolist() == [4] * 50
    assert union(source, to, 100)[1].sum(-1).tolist() == [9] * 50


def test_with_sharp_ranks_it_is_spearmans_correlation() -> None:
    source, to = values(20, 9), values(20, 9, seed=1)
    term = flow("rank_correlation", top=9, strength=1e-6)
    for row in range(20):
        expected = 1 - spearmanr(source[row].numpy(), to[row].numpy()).statistic
        found = divergence(term, source[row : row + 1], to[row : row + 1]).item()
        assert found == pytest.approx(expected, abs=1e-9)


def test_opposite_orders_are_two_apart_and_the_temperature_only_softens() -> None:
    source = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert divergence(flow("rank_correlation", top=4), source, -source).item() == pytest.approx(2, abs=1e-6)
    a, b = values(5, 12), values(5, 12, seed=1)
    softened = divergence(flow("rank_correlation", temperature=2.0, strength=1.0), a, b)
    assert softened.item() == pytest.approx(divergence(flow("rank_correlation", strength=2.0), a, b).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 7.3, -1e4])
def test_without_an_order_on_either_side_nothing_is_correlated(level: float, dtype: torch.dtype) -> None:
    flat = torch.full((3, 20), level, dtype=dtype)
    for source, to in ((flat, values(3, 20, dtype=dtype)), (values(3, 20, dtype=dtype), flat), (flat, flat + 1)):
        leaf = to.clone().requires_grad_()
        value = divergence(flow("rank_correlation"), source, leaf)
        value.backward()
        assert value.item() == 3 and leaf.grad is not None and not leaf.grad.any()


def test_a_position_without_an_order_leaves_the_others_alone() -> None:
    source, to = values(4, 20), values(4, 20, seed=1)
    to[2] = 0
    leaf = to.clone().requires_grad_()
    divergence(flow("rank_correlation"), source, leaf).backward()
    others = to[[0, 1, 3]].requires_grad_()
    divergence(flow("rank_correlation"), source[[0, 1, 3]], others).backward()
    assert leaf.grad is not None and others.grad is not None
    assert torch.equal(leaf.grad[[0, 1, 3]], others.grad) and others.grad.abs().sum() > 0


def test_correlation_counts_items_only() -> None:
    a, b, is_item = values(30, 6), values(30, 6, seed=1), some_items(30, 6)
    found = correlation(a, b, is_item)
    for row in range(30):
        kept = is_item[row]
        assert found[row].item() == pytest.approx(np.corrcoef(a[row, kept], b[row, kept])[0, 1], rel=1e-10)


# ------------------------------------------------------------------------------------------------- bounds, limits, traps


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.9])
def test_skew_divergences_are_bounded_and_tend_to_the_kls(alpha: float) -> None:
    source, to = values(6, 9), values(6, 9, seed=1)
    for kind, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        far = divergence(flow(kind, alpha=alpha), 1e4 * source, 1e4 * to).item()
        assert 0 < far <= 6 * -math.log(alpha) * (1 + 1e-12)
        near = divergence(flow(kind, alpha=1e-9), source, to).item()
        assert near == pytest.approx(divergence(flow(plain), source, to).item(), rel=1e-5)


def test_skew_reverse_kl_learns_through_both_of_its_sides() -> None:
    """Public code of DistiLLM-2 detaches the mixture; DistiLLM's own, and the definition, do not."""
    source, to = values(6, 9), values(6, 9, seed=1).requires_grad_()
    divergence(flow("skew_reverse_kl", alpha=0.3), source, to).backward()
    leaf = to.detach().requires_grad_()
    q, p = leaf.softmax(-1), source.softmax(-1)
    (q * (q.log() - (0.7 * p + 0.3 * q.detach()).log())).sum().backward()
    assert to.grad is not None and leaf.grad is not None
    assert (to.grad - leaf.grad).norm() > 0.05 * leaf.grad.norm()


def test_total_variation_is_a_metric_of_at_most_one_and_obeys_pinsker() -> None:
    a, b, c = (values(1, 9, seed=seed) for seed in range(3))

    def between(x: Tensor, y: Tensor) -> float:
        return divergence(flow("total_variation"), x, y).item()

    assert 0 < between(a, b) < 1 and between(a, b) == pytest.approx(between(b, a))
    assert between(a, c) <= between(a, b) + between(b, c)
    assert between(a, b) <= math.sqrt(divergence(flow("forward_kl"), a, b).item() / 2)
    apart = torch.tensor([[1e4, 0.0]], dtype=torch.float64)
    assert between(apart, apart.flip(-1)) == 1


def log_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_the_head_holds_the_likeliest_tokens_up_to_its_mass() -> None:
    p, q = log_of([0.1, 0.3, 0.2, 0.4]), log_of([0.3, 0.3, 0.3, 0.1])
    # sorted: .4 .3 .2 .1, differences .3 0 .1 .2
    for head, expected in ((0.3, 0.3), (0.5, 0.3), (0.75, 0.3), (0.92, 0.4), (1 - 1e-9, 0.4)):
        assert head_share(p, q, head).item() == pytest.approx(expected / 0.6), head


def test_the_head_is_where_the_likeliest_are_and_not_at_the_same_places_unsorted() -> None:
    """A public copy of AKL applies the mask of the sorted order to unsorted differences."""
    p, q = log_of([0.1, 0.3, 0.2, 0.4]), log_of([0.3, 0.3, 0.3, 0.1])
    order = torch.tensor([2, 0, 3, 1])
    assert head_share(p[:, order], q[:, order], 0.5).item() == pytest.approx(head_share(p, q, 0.5).item())


def test_adaptive_kl_lies_between_both_kls_and_is_forward_where_all_is_head() -> None:
    source, to = values(6, 9), values(6, 9, seed=1)
    for row in range(6):
        sources = source[row : row + 1], to[row : row + 1]
        ends = sorted(divergence(flow(kind), *sources).item() for kind in ("forward_kl", "reverse_kl"))
        assert ends[0] <= divergence(flow("adaptive_kl"), *sources).item() <= ends[1]
    certain, doubtful = log_of([1 - 3e-9, 1e-9, 1e-9, 1e-9]), log_of([0.4, 0.2, 0.2, 0.2])
    head = head_share(certain, doubtful, 0.5).item()  # the first is head though its mass is above it
    assert head == pytest.approx(0.5, rel=1e-6)


def test_where_both_sides_are_the_same_the_head_has_a_half() -> None:
    p = log_of([0.1, 0.3, 0.2, 0.4])
    assert head_share(p, p, 0.5).item() == 0.5


def test_an_interpolated_target_goes_from_the_student_to_the_teacher() -> None:
    source, to = values(6, 9), values(6, 9, seed=1)
    found = [divergence(flow("interpolated_kl", start=t), source, to).item() for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == sorted(found) and found[0] == pytest.approx(0, abs=1e-12)
    assert found[-1] == pytest.approx(divergence(flow("forward_kl"), source, to).item(), rel=1e-12)


def test_an_interpolated_target_is_a_constant() -> None:
    """The gradient is that of the cross-entropy with it: q - p_t."""
    source, to = values(6, 9), values(6, 9, seed=1).requires_grad_()
    divergence(flow("interpolated_kl", start=0.3), source, to).backward()
    there = to.detach()
    target = (0.3 * source + 0.7 * there).softmax(-1)
    assert to.grad is not None
    torch.testing.assert_close(to.grad, there.softmax(-1) - target)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_back_from_the_device(kind: str) -> None:
    """On `meta` there is nothing to read: what waits for a number would fail here, and be slow elsewhere."""
    source, to = (torch.empty(4, 30, device="meta", requires_grad=True) for _ in range(2))
    value = divergence(flow(kind), source, to)
    value.backward()
    assert value.shape == () and to.grad is not None and to.grad.shape == to.shape
