"""Losses below the logits: against references of their own, by where gradients go, and by what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.losses.hidden import (
    attention_mse,
    hidden_cosine,
    hidden_mse,
    relation_kl,
    scores,
)

B, T, D, H, L = 3, 5, 8, 2, 2
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])

Loss = Callable[[list[Tensor], list[Tensor], Tensor | None], Tensor]
LOSSES: dict[str, tuple[Loss, tuple[int, ...], int]] = {  # the loss, a tensor's shape, how many of them
    "mse_all": (lambda a, b, m: hidden_mse(a, b, m, first=False, normalise=False), (B, T, D), L),
    "mse_all_normalised": (lambda a, b, m: hidden_mse(a, b, m, first=False, normalise=True), (B, T, D), L),
    "mse_first": (lambda a, b, m: hidden_mse(a, b, m, first=True, normalise=False), (B, T, D), L),
    "mse_first_normalised": (lambda a, b, m: hidden_mse(a, b, m, first=True, normalise=True), (B, T, D), L),
    "cosine": (lambda a, b, m: hidden_cosine(a[0], b[0], m), (B, T, D), 1),
    "attention": (attention_mse, (B, H, T, T), L),
    "relation": (lambda a, b, m: relation_kl(a, b, m, num_heads=H), (B, T, D), 3),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
with_and_without_padding = pytest.mark.parametrize("mask", [MASK_BT, None], ids=["padded", "full"])


def drawn(shape: tuple[int, ...], num: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for _ in range(num)]


def learning(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


# ----------------------------------------------------------------------------------------------------- for each of them


@every_loss
@with_and_without_padding
def test_the_gradient_of_to_agrees_with_finite_differences(name: str, mask: Tensor | None) -> None:
    loss, shape, num = LOSSES[name]
    source = drawn(shape, num, seed=0)
    assert torch.autograd.gradcheck(
        lambda *to: loss(source, list(to), mask), tuple(learning(drawn(shape, num, seed=1)))
    )


@every_loss
def test_from_has_no_gradient_though_the_value_depends_on_it(name: str) -> None:
    loss, shape, num = LOSSES[name]
    source, to = learning(drawn(shape, num, seed=0)), learning(drawn(shape, num, seed=1))
    value = loss(source, to, MASK_BT)
    value.backward()
    assert all(tensor.grad is None for tensor in source)
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in to)
    assert abs(loss([2 * s + 1 for s in source], to, MASK_BT).item() - value.item()) > 1e-3


@every_loss
def test_a_tensor_that_is_on_both_sides_learns_as_to_only(name: str) -> None:
    loss, shape, num = LOSSES[name]
    both = learning(drawn(shape, num, seed=0))
    (direct,) = torch.autograd.grad(loss([0.5 * x.flip(0) for x in both], both, None), both[:1])
    (detached,) = torch.autograd.grad(loss([0.5 * x.detach().flip(0) for x in both], both, None), both[:1])
    torch.testing.assert_close(direct, detached, rtol=0, atol=0)


@every_loss
@with_and_without_padding
def test_zero_with_zero_gradient_where_both_sides_are_equal_and_positive_elsewhere(
    name: str, mask: Tensor | None
) -> None:
    loss, shape, num = LOSSES[name]
    source, to = drawn(shape, num, seed=0), learning(drawn(shape, num, seed=0))
    value = loss(source, to, mask)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert all(tensor.grad is not None and tensor.grad.abs().max() < 1e-14 for tensor in to)
    assert loss(source, drawn(shape, num, seed=1), mask).item() > 0.01


@every_loss
def test_the_value_is_a_sum_over_rows(name: str) -> None:
    loss, shape, num = LOSSES[name]
    source, to = drawn(shape, num, seed=0), drawn(shape, num, seed=1)
    rows = [
        loss([s[i : i + 1] for s in source], [t[i : i + 1] for t in to], MASK_BT[i : i + 1]).item() for i in range(B)
    ]
    assert loss(source, to, MASK_BT).item() == pytest.approx(sum(rows), rel=1e-12)


def cut(tensor: Tensor, length: int) -> Tensor:
    return tensor[:, :, :length, :length] if tensor.dim() == 4 else tensor[:, :length]


@every_loss
@pytest.mark.parametrize("what", [1e3, math.inf, math.nan])
def test_padding_changes_neither_value_nor_gradient_whatever_stands_there(name: str, what: float) -> None:
    """The row of three tokens gives by itself, cut to three, what it gives among padding."""
    loss, shape, num = LOSSES[name]
    row, length = slice(1, 2), 3
    alone = (
        [cut(s[row], length) for s in drawn(shape, num, seed=0)],
        learning([cut(t[row], length) for t in drawn(shape, num, seed=1)]),
    )
    padded: tuple[list[Tensor], list[Tensor]] = ([], [])
    for seed, side in enumerate(padded):
        for tensor in drawn(shape, num, seed=seed):
            filled = torch.full_like(tensor[row], what)
            cut(filled, length).copy_(cut(tensor[row], length))
            side.append(filled.requires_grad_())
    values = [loss(*alone, None), loss(*padded, MASK_BT[row])]
    assert values[1].item() == pytest.approx(values[0].item(), rel=1e-12)
    for value in values:
        value.backward()
    for small, large in zip(alone[1], padded[1], strict=True):
        assert small.grad is not None and large.grad is not None
        torch.testing.assert_close(cut(large.grad, length), small.grad)
        assert large.grad.isfinite().all() and large.grad.abs().sum().item() == pytest.approx(
            small.grad.abs().sum().item()
        )


@every_loss
def test_a_row_of_padding_only_adds_nothing(name: str) -> None:
    loss, shape, num = LOSSES[name]
    source, to = drawn(shape, num, seed=0), learning(drawn(shape, num, seed=1))
    nothing = loss(source, to, torch.zeros(B, T, dtype=torch.int64))
    nothing.backward()
    assert nothing.item() == 0 and all(t.grad is not None and t.grad.abs().max() == 0 for t in to)


@every_loss
def test_half_precision_is_summed_in_fp32_under_autocast_too(name: str) -> None:
    loss, shape, num = LOSSES[name]
    source, to = drawn(shape, num, 0, torch.bfloat16), drawn(shape, num, 1, torch.bfloat16)
    expected = loss([s.double() for s in source], [t.double() for t in to], MASK_BT).item()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(source, to, MASK_BT)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-5)


@every_loss
def test_shapes_alone_are_enough(name: str) -> None:
    loss, shape, num = LOSSES[name]
    tensors = [tensor.to("meta") for tensor in drawn(shape, num, seed=0)]
    assert loss(tensors, tensors, MASK_BT.to("meta")).shape == ()


# -------------------------------------------------------------------------------------------------------------- hidden


def test_normalised_first_states_are_a_mean_over_rows_layers_and_channels() -> None:
    """As Patient-KD's public code has it: states stacked to [B, L, D], normalised, one mean over everything."""
    source, to = drawn((B, T, D), L, seed=0), drawn((B, T, D), L, seed=1)
    value = hidden_mse(source, to, MASK_BT, first=True, normalise=True).item()
    stacked = (F.normalize(torch.stack([x[:, 0] for x in side], dim=1), dim=2) for side in (source, to))
    assert value / B == pytest.approx(F.mse_loss(*stacked).item(), rel=1e-12)
    total = 0.0
    for a, b in zip(source, to, strict=True):
        for i in range(B):
            p, q = a[i, 0].tolist(), b[i, 0].tolist()
            norms = [math.sqrt(sum(x * x for x in v)) for v in (p, q)]
            total += sum((x / norms[0] - y / norms[1]) ** 2 for x, y in zip(p, q, strict=True)) / D / L
    assert value == pytest.approx(total, rel=1e-12)


def test_all_states_are_a_mean_squared_error_over_tokens_layers_and_channels() -> None:
    source, to = drawn((B, T, D), L, seed=0), drawn((B, T, D), L, seed=1)
    tokens = MASK_BT.bool()
    expected = F.mse_loss(torch.stack([s[tokens] for s in source]), torch.stack([t[tokens] for t in to]))
    value = hidden_mse(source, to, MASK_BT, first=False, normalise=False)
    assert value.item() / MASK_BT.sum().item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_projector_of_to_learns_and_what_it_is_applied_to_as_well() -> None:
    source = drawn((B, T, D), 1, seed=0)
    to, weight_DE = learning(drawn((B, T, 3), 1, seed=1))[0], learning(drawn((D, 3), 1, seed=2))[0]

    def loss(to_BTE: Tensor, weight: Tensor) -> Tensor:
        return hidden_mse(source, [to_BTE @ weight.T], MASK_BT, first=False, normalise=False)

    assert torch.autograd.gradcheck(loss, (to, weight_DE))


def test_the_cosine_is_torchs_cosine_embedding_loss_over_tokens() -> None:
    (source,), (to,) = drawn((B, T, D), 1, seed=0), drawn((B, T, D), 1, seed=1)
    tokens = MASK_BT.bool()
    num = int(tokens.sum())
    expected = torch.nn.CosineEmbeddingLoss(reduction="mean")(to[tokens], source[tokens], torch.ones(num)).item()
    assert hidden_cosine(source, to, MASK_BT).item() / num == pytest.approx(expected, rel=1e-9)
    assert hidden_cosine(source, -7 * source, None).item() == pytest.approx(2 * B * T)  # length does not matter


# ------------------------------------------------------------------------------------------------- attention, relations


def test_scores_are_those_of_attention() -> None:
    """softmax(scores) v is what torch's own attention gives."""
    query, key, value = drawn((B, T, D), 3, seed=0)
    heads = [x.view(B, T, H, D // H).transpose(1, 2) for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*heads)
    torch.testing.assert_close(scores(query, key, H).softmax(-1) @ heads[2], expected)


def test_attention_is_a_mean_squared_error_over_heads_and_keys_that_are_seen() -> None:
    source, to = drawn((B, H, T, T), L, seed=0), drawn((B, H, T, T), L, seed=1)
    expected = sum(F.mse_loss(s, t).item() for s, t in zip(source, to, strict=True))  # the public code: sum over pairs
    assert attention_mse(source, to, None).item() * L / (B * T) == pytest.approx(expected, rel=1e-12)
    total = 0.0
    for s, t in zip(source, to, strict=True):
        for b, num in enumerate(MASK_BT.sum(1).tolist()):
            for query in range(num):
                total += sum(
                    (t[b, h, query, key] - s[b, h, query, key]).item() ** 2 for h in range(H) for key in range(num)
                ) / (H * num * L)
    assert attention_mse(source, to, MASK_BT).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("name", ["attention", "relation"])
def test_what_a_query_does_not_see_counts_for_nothing(name: str) -> None:
    """A causal mask: what the first n positions give does not depend on those after them."""
    loss, shape, num = LOSSES[name]
    source, to = drawn(shape, num, seed=0), drawn(shape, num, seed=1)
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    per_query = []
    for length in range(T + 1):
        some = causal & (torch.arange(T) < length)[:, None]
        per_query.append(loss(source, to, some).item())
        if length:
            short = [[cut(x, length) for x in side] for side in (source, to)]
            alone = loss(short[0], short[1], causal[:, :length, :length]).item()
            assert per_query[-1] == pytest.approx(alone, rel=1e-12)
    assert per_query[0] == 0 and loss(source, to, causal).item() == pytest.approx(per_query[-1])
    assert loss(source, to, None).item() != pytest.approx(per_query[-1])


def kl_of_relations(source: Tensor, to: Tensor, num_heads: int, length: int) -> float:
    """One row, written out: [T, D] and [T, E], their first `length` positions."""
    total = 0.0
    for head in range(num_heads):
        rows = []
        for side in (source, to):
            size = side.shape[-1] // num_heads
            x = side[:length, head * size : (head + 1) * size].tolist()
            dots = [[math.exp(sum(a * b for a, b in zip(u, v, strict=True)) / math.sqrt(size)) for v in x] for u in x]
            rows.append([[dot / sum(row) for dot in row] for row in dots])
        for p_row, q_row in zip(*rows, strict=True):
            total += sum(p * math.log(p / q) for p, q in zip(p_row, q_row, strict=True))
    return total / num_heads


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_relations_are_their_definition_written_out_for_any_widths(num_heads: int) -> None:
    source, to = drawn((B, T, D), 3, seed=0), drawn((B, T, 12), 3, seed=1)
    expected = sum(
        kl_of_relations(s[b], t[b], num_heads, num)
        for s, t in zip(source, to, strict=True)
        for b, num in enumerate(MASK_BT.sum(1).tolist())
    )
    assert relation_kl(source, to, MASK_BT, num_heads=num_heads).item() == pytest.approx(expected, rel=1e-10)


def test_relations_are_invariant_to_rotations_inside_a_relation_head_alone() -> None:
    source, to = drawn((B, T, D), 3, seed=0), drawn((B, T, D), 3, seed=1)
    turns = [torch.linalg.qr(square).Q for square in drawn((D // H, D // H), H, seed=2)]
    inside, across = torch.block_diag(*turns), torch.linalg.qr(drawn((D, D), 1, seed=3)[0]).Q
    value = relation_kl(source, to, MASK_BT, num_heads=H).item()
    turned = relation_kl([s @ inside for s in source], [t @ inside.T for t in to], MASK_BT, num_heads=H)
    assert turned.item() == pytest.approx(value, rel=1e-10)
    other = relation_kl(source, [t @ across for t in to], MASK_BT, num_heads=H)
    assert abs(other.item() - value) > 1e-3 * value


def test_relations_far_apart_give_a_finite_value_and_gradient() -> None:
    source, to = drawn((B, T, D), 3, 0, torch.float32), learning(drawn((B, T, D), 3, 1, torch.float32))
    value = relation_kl([100 * s for s in source], [100 * t for t in to], MASK_BT, num_heads=H)
    value.backward()
    assert math.isfinite(value.item()) and all(t.grad is not None and t.grad.isfinite().all() for t in to)


# ------------------------------------------------------------------------------------------------------------- refusals


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: attention_mse([zeros(1, 4, 3, 3)], [zeros(1, 2, 3, 3)], None),
            "4 attention heads .* compare relations",
        ),
        (
            lambda: hidden_mse([zeros(1, 3, 4)], [zeros(1, 3, 1)], None, first=True, normalise=True),
            "width 4 .* project",
        ),
        (lambda: hidden_cosine(zeros(1, 3, 4), zeros(1, 3, 2), None), "width 4 in `from`, 2 in `to`"),
        (lambda: hidden_mse([zeros(2, 3, 4)], [zeros(1, 3, 4)], None, first=True, normalise=True), r"\[2, 3, 4\]"),
        (lambda: hidden_mse([], [], None, first=True, normalise=True), "at least one"),
        (lambda: hidden_mse([zeros(1, 3, 4)], [], None, first=True, normalise=True), "as many"),
        (lambda: scores(zeros(1, 3, 6), zeros(1, 3, 6), 4), "width of 6 .* 4 heads; expected 1, 2, 3, 6"),
        (lambda: scores(zeros(1, 3, 6), zeros(1, 3, 3), 3), "repeat keys"),
        (lambda: relation_kl([zeros(1, 3, 4)], [zeros(1, 2, 4)], None, num_heads=2), "rows and positions"),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
