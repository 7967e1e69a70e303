"""The fused loss against the plain one: values, every gradient, types, memory, FLOPs; and heads of whole models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.support.divergences import KINDS
from tests.support.trials import FAMILIES
from trainables.config.errors import ModelError
from trainables.config.models import Model
from trainables.config.terms import CrossEntropy, Term
from trainables.losses.chunked import Fused, LogitSource, chunked_terms
from trainables.losses.logits import cross_entropy
from trainables.losses.terms import divergence
from trainables.models import build as build_
from trainables.models import output_head

WIDTHS = {"big": 6, "small": 3}
VOCABULARY = 11
SPECIAL = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}


def term(kind: str, **more: Any) -> Term:
    base = {"kind": kind, "of": "small"} if kind == "cross_entropy" else {"kind": kind, "from": "big", "to": "small"}
    value = {**base, **({} if kind == "cross_entropy" else {"tau_squared": False}), **more}
    return TypeAdapter(Term).validate_python(value)  # type: ignore[no-any-return]


def back(kind: str, **more: Any) -> Term:
    return term(kind, **{"from": "small", "to": "big"}, **more)


BOTH_WAYS: dict[str, Term] = {
    "big_hard": term("cross_entropy", of="big"),
    "small_hard": term("cross_entropy"),
    "big_to_small": term("forward_kl", temperature=2.0, tau_squared=True),
    "small_to_big": back("reverse_kl", temperature=0.5),
    "small_to_big_too": back("jsd", beta=0.3),
}
ODD: dict[str, dict[str, Any]] = {  # parameters of kinds that have some, none of them the default
    "jsd": {"beta": 0.8},
    "skew_kl": {"alpha": 0.3},
    "skew_reverse_kl": {"alpha": 0.3},
    "adaptive_kl": {"head": 0.7},
    "interpolated_kl": {"start": 0.6},
    "rank_correlation": {"top": 3, "strength": 0.5},
}
UNEVEN = dict(zip(BOTH_WAYS, (0.3, 1.0, 2.0, 0.7, 1.3), strict=True))


def some_side(
    num: int, width: int, *, seed: int, bias: bool = True, rows: int = VOCABULARY, spread: float = 1.5
) -> LogitSource:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(num, width), (rows, width), (rows,)] if bias else [(num, width), (rows, width)]
    made = [(spread * torch.randn(shape, generator=draw, dtype=torch.float64)).requires_grad_() for shape in shapes]
    return LogitSource(*made)


def some_sides(num: int, **more: Any) -> dict[str, LogitSource]:
    return {name: some_side(num, width, seed=seed, **more) for seed, (name, width) in enumerate(WIDTHS.items())}


def some_labels(num: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (num,), generator=torch.Generator().manual_seed(9))


def plain_terms(
    sources: Mapping[str, LogitSource], labels_N: Tensor, terms: Mapping[str, Term], weights: Mapping[str, float]
) -> Fused:
    """The same by whole logits."""
    rows = min(side.hidden_ND.shape[1] if side.weight_VD is None else len(side.weight_VD) for side in sources.values())
    logits = {
        name: (side.hidden_ND if side.weight_VD is None else F.linear(*side))[:, :rows]
        for name, side in sources.items()
    }
    values = {
        name: cross_entropy(logits[term.of], labels_N)
        if isinstance(term, CrossEntropy)
        else divergence(term, logits[term.from_], logits[term.to])
        for name, term in terms.items()
    }
    return Fused(torch.stack([weights[name] * value for name, value in values.items()]).sum(), values)


def in_fours(*args: Any) -> Fused:
    return chunked_terms(*args, chunk=4)


def leaves(sources: Mapping[str, LogitSource]) -> list[Tensor]:
    return [tensor for side in sources.values() for tensor in side if tensor is not None and tensor.requires_grad]


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def assert_equal_to_plain(
    sources: Mapping[str, LogitSource],
    labels_N: Tensor,
    terms: Mapping[str, Term],
    weights: Mapping[str, float] | None = None,
    *,
    chunk: int,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    context: AbstractContextManager[Any] | None = None,
) -> None:
    weights = weights or dict.fromkeys(terms, 1.0)
    with context or nullcontext():
        ours, theirs = (
            chunked_terms(sources, labels_N, terms, weights, chunk=chunk),
            plain_terms(sources, labels_N, terms, weights),
        )
    tensors = leaves(sources)
    assert list(ours.values) == list(theirs.values)
    for name, value in ours.values.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, theirs.values[name].detach(), rtol=rtol, atol=atol, msg=name)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=rtol, atol=atol)
    for found, wanted in zip(gradients(ours.loss, tensors), gradients(theirs.loss, tensors), strict=True):
        assert found.dtype == wanted.dtype
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=max(atol, rtol * scale))


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["cross_entropy", *KINDS])
def test_a_term_and_its_gradients_are_those_of_the_plain_path(kind: str, temperature: float, bias: bool) -> None:
    if kind == "cross_entropy":
        alone = {name: side for name, side in some_sides(7, bias=bias).items() if name == "small"}
        return assert_equal_to_plain(alone, some_labels(7), {"hard": term(kind)}, chunk=3)
    for tau_squared, chunk in ((False, 1), (True, 3), (True, 100)):
        flow = term(kind, temperature=temperature, tau_squared=tau_squared, **ODD.get(kind, {}))
        assert_equal_to_plain(some_sides(7, bias=bias), some_labels(7), {"flow": flow}, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 1000])
@pytest.mark.parametrize("num", [1, 2, 7])
def test_terms_of_both_sides_in_both_directions_for_any_chunk(num: int, chunk: int) -> None:
    assert_equal_to_plain(some_sides(num), some_labels(num), BOTH_WAYS, UNEVEN, chunk=chunk)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_both_ways_at_once(kind: str) -> None:
    terms = {"a": term("cross_entropy"), "b": back(kind, temperature=2.0), "c": term(kind, temperature=2.0)}
    assert_equal_to_plain(some_sides(5), some_labels(5), terms, chunk=2)


def test_more_than_two_sides() -> None:
    sources = {**some_sides(5), "third": some_side(5, 4, seed=7, bias=False)}
    terms = {**BOTH_WAYS, "in": term("forward_kl", to="third"), "out": term("jeffreys", **{"from": "third"})}
    assert_equal_to_plain(sources, some_labels(5), terms, dict.fromkeys(terms, 0.5), chunk=2)


@pytest.mark.parametrize(
    "kind", ["forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "interpolated_kl"]
)
def test_tokens_that_the_teacher_excludes_leave_value_and_gradients_finite(kind: str) -> None:
    sources = some_sides(5)
    logits_NV = F.linear(*sources["big"]).detach()  # type: ignore[arg-type]
    logits_NV[:, 3:6] = -torch.inf
    sources["big"] = LogitSource(logits_NV)
    assert_equal_to_plain(sources, some_labels(5), {"flow": term(kind)}, chunk=2)
    found = chunked_terms(sources, some_labels(5), {"flow": term(kind)}, {"flow": 1.0}, chunk=2)
    assert found.loss.isfinite() and all(g.isfinite().all() for g in gradients(found.loss, leaves(sources)))


def test_no_position_gives_zero() -> None:
    assert_equal_to_plain(some_sides(0), some_labels(0), BOTH_WAYS, UNEVEN, chunk=4)


def test_rows_that_only_pad_one_sides_embeddings_are_cut() -> None:
    sources = {"big": some_side(5, 6, seed=0, rows=VOCABULARY + 5), "small": some_side(5, 3, seed=1)}
    assert_equal_to_plain(sources, some_labels(5), BOTH_WAYS, UNEVEN, chunk=2)
    padding = gradients(
        chunked_terms(sources, some_labels(5), BOTH_WAYS, UNEVEN, chunk=2).loss, [sources["big"].weight_VD]
    )[0]
    assert padding[VOCABULARY:].abs().max() == 0 and padding[:VOCABULARY].abs().min() > 0


@pytest.mark.parametrize("more_rows", [0, 4])
def test_logits_may_stand_for_hidden_states_and_weight(more_rows: int) -> None:
    for name in WIDTHS:
        sources = some_sides(5)
        sources[name] = LogitSource(some_side(5, VOCABULARY + more_rows, seed=4).hidden_ND)
        assert_equal_to_plain(sources, some_labels(5), BOTH_WAYS, UNEVEN, chunk=2)


def test_the_gradient_agrees_with_finite_differences() -> None:
    """Each hard loss by itself: a flow's gradient leaves `from` out, which differences do not. So flows from a frozen side.

    Nor those that leave out a part of `to` too: `test_losses` takes their differences with that part in its place.
    """
    sources, labels_N = some_sides(3, spread=0.5), some_labels(3)
    frozen = {"big": LogitSource(*(tensor.detach() for tensor in sources["big"])), "small": sources["small"]}
    flows = {kind: term(kind, temperature=1.5) for kind in KINDS if kind not in ("adaptive_kl", "interpolated_kl")}
    hard = {name: BOTH_WAYS[name] for name in ("big_hard", "small_hard")}
    for terms, start in ((hard, sources), ({**flows, "hard": term("cross_entropy")}, frozen)):

        def loss(*tensors: Tensor, terms: Any = terms, start: Any = start) -> Tensor:
            given = iter(tensors)
            again = {
                name: LogitSource(*(next(given) if t.requires_grad else t for t in side))
                for name, side in start.items()
            }
            return chunked_terms(again, labels_N, terms, dict.fromkeys(terms, 0.7), chunk=2).loss

        assert torch.autograd.gradcheck(loss, leaves(start))


# ---------------------------------------------------------------------------------------------------------- who learns


@pytest.mark.parametrize("frozen", ["big", "small"])
def test_a_frozen_side_gets_no_gradient_and_changes_none(frozen: str) -> None:
    sources = some_sides(5)
    sources[frozen] = LogitSource(*(tensor.detach() for tensor in sources[frozen]))
    assert_equal_to_plain(sources, some_labels(5), BOTH_WAYS, UNEVEN, chunk=2)


@pytest.mark.parametrize(
    "which", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_of_a_side_only_what_requires_a_gradient_gets_one(which: tuple[bool, ...]) -> None:
    sources = some_sides(5)
    part = (tensor.detach().requires_grad_(on) for tensor, on in zip(sources["small"], which, strict=True))
    sources["small"] = LogitSource(*part)
    assert_equal_to_plain(sources, some_labels(5), BOTH_WAYS, UNEVEN, chunk=2)


@pytest.mark.parametrize("off", list(BOTH_WAYS))
def test_a_term_of_weight_zero_has_a_value_and_no_gradient(off: str) -> None:
    assert_equal_to_plain(some_sides(5), some_labels(5), BOTH_WAYS, {**UNEVEN, off: 0.0}, chunk=2)


def test_a_term_of_weight_zero_spoils_no_gradient_though_its_value_is_no_number() -> None:
    sources = some_sides(5)
    sources["big"] = sources["big"]._replace(hidden_ND=torch.full_like(sources["big"].hidden_ND, torch.inf))
    found = chunked_terms(
        sources, some_labels(5), BOTH_WAYS, {**dict.fromkeys(UNEVEN, 0.0), "small_hard": 1.0}, chunk=2
    )
    assert found.values["big_to_small"].isnan() and found.values["small_hard"].isfinite()
    assert all(bool(g.isfinite().all()) for g in gradients(found.loss, list(sources["small"])))  # type: ignore[arg-type]


def test_what_no_term_teaches_has_no_gradient_at_all() -> None:
    """None, not zeros: AdamW goes on with its momentum, and decays, where it is given zeros."""
    sources = some_sides(5)
    found = chunked_terms(
        sources, some_labels(5), BOTH_WAYS, {**dict.fromkeys(UNEVEN, 0.0), "big_to_small": 1.0}, chunk=2
    )
    found.loss.backward()
    assert all(tensor.grad is None for tensor in sources["big"])
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in sources["small"])


def test_without_a_gradient_only_values_are_made() -> None:
    sources = some_sides(5)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = chunked_terms(sources, some_labels(5), BOTH_WAYS, UNEVEN, chunk=2)
    assert not found.loss.requires_grad
    assert counter.get_total_flops() == sum(2 * 5 * VOCABULARY * width for width in WIDTHS.values())
    for name, value in plain_terms(sources, some_labels(5), BOTH_WAYS, UNEVEN).values.items():
        torch.testing.assert_close(found.values[name], value.detach())


# ------------------------------------------------------------------------------------------- as a part of something else


def test_gradients_are_scaled_by_what_comes_after() -> None:
    sources, labels_N = some_sides(5), some_labels(5)
    found = [chunked_terms(sources, labels_N, BOTH_WAYS, UNEVEN, chunk=2).loss for _ in range(2)]
    for one, scaled in zip(
        gradients(found[0], leaves(sources)), gradients(3.0 * found[1], leaves(sources)), strict=True
    ):
        torch.testing.assert_close(3.0 * one, scaled)


def test_micro_batches_add_up_to_the_batch() -> None:
    sources, labels_N = some_sides(7), some_labels(7)
    whole = chunked_terms(sources, labels_N, BOTH_WAYS, UNEVEN, chunk=2)
    parts = [
        chunked_terms(
            {n: s._replace(hidden_ND=s.hidden_ND[cut]) for n, s in sources.items()},
            labels_N[cut],
            BOTH_WAYS,
            UNEVEN,
            chunk=2,
        )
        for cut in (slice(0, 3), slice(3, 7))
    ]
    for name, value in whole.values.items():
        torch.testing.assert_close(value, parts[0].values[name] + parts[1].values[name])
    total = gradients(parts[0].loss + parts[1].loss, leaves(sources))
    for a, b in zip(gradients(whole.loss, leaves(sources)), total, strict=True):
        torch.testing.assert_close(a, b)


def test_a_weight_that_is_the_embedding_too_gets_both_gradients() -> None:
    ids_N = some_labels(6)
    table = {name: side.weight_VD for name, side in some_sides(1).items()}
    found = []
    for function in (plain_terms, in_fours):
        tied = {name: LogitSource(torch.tanh(weight[ids_N]), weight) for name, weight in table.items()}
        found.append(gradients(function(tied, some_labels(6), BOTH_WAYS, UNEVEN).loss, list(table.values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- types


def in_single(sources: Mapping[str, LogitSource]) -> dict[str, LogitSource]:
    return {name: LogitSource(*(t.detach().float().requires_grad_() for t in side)) for name, side in sources.items()}


def test_fp32_is_within_float_error_of_fp64() -> None:
    """Values to 1e-5 of themselves, gradients to 1e-5 of their largest entry."""
    single, labels_N = in_single(some_sides(50)), some_labels(50)
    assert_equal_to_plain(single, labels_N, BOTH_WAYS, UNEVEN, chunk=16, rtol=1e-5)
    double = {name: LogitSource(*(t.detach().double().requires_grad_() for t in side)) for name, side in single.items()}
    ours = chunked_terms(single, labels_N, BOTH_WAYS, UNEVEN, chunk=16)
    assert all(value.dtype == torch.float32 for value in ours.values.values())
    exact = plain_terms(double, labels_N, BOTH_WAYS, UNEVEN)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=0)
    for a, b in zip(gradients(ours.loss, leaves(single)), gradients(exact.loss, leaves(double)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 * b.abs().max().item())


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_autocast_is_that_of_the_plain_path() -> None:
    """The same products in bf16 and the same rounding of logits: values to 1e-5. Gradients to 2 % of their largest entry,
    as the plain path adds terms and rounds sums over positions in bf16 and the fused one adds chunks in fp32."""
    single, labels_N = in_single(some_sides(50)), some_labels(50)
    with autocast():
        ours, theirs = (f(single, labels_N, BOTH_WAYS, UNEVEN) for f in (in_fours, plain_terms))
    for name, value in ours.values.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, theirs.values[name].detach(), rtol=1e-5, atol=0)
    for a, b in zip(gradients(ours.loss, leaves(single)), gradients(theirs.loss, leaves(single)), strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.abs().max().item())


def test_autocast_in_chunks_is_no_further_from_fp64_than_the_plain_path() -> None:
    single, labels_N = in_single(some_sides(400)), some_labels(400)
    double = {name: LogitSource(*(t.detach().double().requires_grad_() for t in side)) for name, side in single.items()}
    exact = gradients(plain_terms(double, labels_N, BOTH_WAYS, UNEVEN).loss, leaves(double))
    with autocast():
        ours = chunked_terms(single, labels_N, BOTH_WAYS, UNEVEN, chunk=1).loss
        theirs = plain_terms(single, labels_N, BOTH_WAYS, UNEVEN).loss
    pairs = zip(exact, gradients(ours, leaves(single)), gradients(theirs, leaves(single)), strict=True)
    for wanted, a, b in pairs:
        assert (a - wanted).norm() <= 1.05 * (b - wanted).norm()


def test_under_autocast_a_weight_is_cast_once_not_once_a_chunk() -> None:
    single, rows = in_single(some_sides(20, rows=300)), 300
    with autocast(), Casts() as casts:
        chunked_terms(single, some_labels(20, rows), BOTH_WAYS, UNEVEN, chunk=2).loss.backward()
    assert sorted(casts.shapes) == sorted((rows, width) for width in WIDTHS.values())


class Casts(TorchDispatchMode):
    """The shapes of the matrices of 300 rows that are cast to half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and out.shape[0] == 300:
            self.shapes += [tuple(out.shape)] * (out.ndim == 2)
        return out


def test_hidden_states_in_half_precision_get_gradients_in_half_precision() -> None:
    single, labels_N = in_single(some_sides(20)), some_labels(20)
    halved = {n: s._replace(hidden_ND=s.hidden_ND.detach().bfloat16().requires_grad_()) for n, s in single.items()}
    with autocast():
        ours = chunked_terms(halved, labels_N, BOTH_WAYS, UNEVEN, chunk=8).loss
        theirs = plain_terms(halved, labels_N, BOTH_WAYS, UNEVEN).loss
    for a, b in zip(gradients(ours, leaves(halved)), gradients(theirs, leaves(halved)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.02 * b.abs().max().item())


def test_far_apart_logits_give_finite_gradients() -> None:
    sources = in_single(some_sides(5, spread=40.0))
    found = chunked_terms(sources, some_labels(5), BOTH_WAYS, UNEVEN, chunk=2)
    assert all(bool(g.isfinite().all()) for g in gradients(found.loss, leaves(sources)))


# ------------------------------------------------------------------------------------------------- memory and arithmetic


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("num", [40, 400])
def test_nothing_larger_than_a_chunk_of_logits_is_ever_there(num: int) -> None:
    rows, chunk = 3000, 8
    sources, labels_N = some_sides(num, rows=rows, bias=True), some_labels(num, rows)
    with Sizes() as sizes:
        chunked_terms(sources, labels_N, BOTH_WAYS, UNEVEN, chunk=chunk).loss.backward()
    assert sizes.largest == chunk * rows > max(WIDTHS.values()) * rows
    with Sizes() as sizes:
        plain_terms(sources, labels_N, BOTH_WAYS, UNEVEN).loss.backward()
    assert sizes.largest == num * rows


@pytest.mark.parametrize("frozen", [None, "big"])
@pytest.mark.parametrize("bias", [True, False])
def test_flops_are_those_of_the_plain_path(bias: bool, frozen: str | None) -> None:
    """They stand in the results, and arms are compared at equal FLOPs."""
    counted = []
    for function in (plain_terms, in_fours):
        sources = some_sides(7, bias=bias)
        terms = BOTH_WAYS
        if frozen:
            sources[frozen] = LogitSource(*(t.detach() for t in sources[frozen] if t is not None))
            terms = {name: value for name, value in BOTH_WAYS.items() if name in ("small_hard", "big_to_small")}
        with FlopCounterMode(display=False) as counter:
            function(sources, some_labels(7), terms, UNEVEN).loss.backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


# -------------------------------------------------------------------------------------------------------- whole models


def build(family: str, *, width: int = 32, name: str = "m", **more: Any) -> Any:
    shape = Model(family=family, layers=2, width=width, heads=2, intermediate_size=48, dropout=0, **more)
    return build_.build(shape, name=name, seed=0, vocab_size=60, special_ids=SPECIAL, length=16)


def some_ids(num: int = 3) -> Tensor:
    return torch.randint(5, 60, (num, 16), generator=torch.Generator().manual_seed(0))


def side_of(
    net: nn.Module, positions_N: Tensor, *, ids_BT: Tensor | None = None, through: nn.Module | None = None
) -> LogitSource:
    head = output_head.head_of(net)
    assert head is not None
    return LogitSource(
        output_head.head_inputs(net, some_ids() if ids_BT is None else ids_BT, positions_N, through=through), *head
    )


POSITIONS_N = torch.tensor([0, 5, 15, 16, 37])


@pytest.mark.parametrize("family", [*FAMILIES, "roberta", "albert", "opt", "qwen3"])
def test_hidden_states_and_head_make_the_logits_of_any_family(family: str) -> None:
    net = build(family).double()
    wanted = output_head.logits_at(net, some_ids(), POSITIONS_N)
    torch.testing.assert_close(F.linear(*side_of(net, POSITIONS_N)), wanted, rtol=0, atol=1e-12)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (net.base_model, net.get_output_embeddings()))
    again = output_head.logits_at(net, some_ids(), POSITIONS_N)
    torch.testing.assert_close(again, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_family_that_does_more_to_its_logits_has_no_such_head(family: str) -> None:
    net = build(family)
    assert output_head.head_of(net) is None
    with pytest.raises(ModelError, match=f"logits of a {family} are more than a linear layer"):
        output_head.head_inputs(net, some_ids(), POSITIONS_N)
    assert output_head.logits_at(net, some_ids(), POSITIONS_N).shape == (5, 60)  # the hooks are gone


def test_asking_for_the_head_changes_no_model_and_no_draw() -> None:
    net = build("bert", config={"hidden_dropout_prob": 0.5}).train()
    state = torch.get_rng_state()
    assert output_head.head_of(net) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_whole_models_teach_each_other_as_in_the_plain_path(family: str) -> None:
    nets = {"big": build(family).double(), "small": build(family, width=16, name="n").double()}
    labels_N = some_labels(5, 60)

    def trained(fused: bool) -> dict[str, Tensor | None]:
        for net in nets.values():
            net.zero_grad(set_to_none=True)
        if fused:
            sources = {name: side_of(net, POSITIONS_N) for name, net in nets.items()}
            loss = chunked_terms(sources, labels_N, BOTH_WAYS, UNEVEN, chunk=2).loss
        else:
            logits = {name: output_head.logits_at(net, some_ids(), POSITIONS_N) for name, net in nets.items()}
            identity = {name: LogitSource(logits[name], torch.eye(60, dtype=torch.float64)) for name in nets}
            loss = plain_terms(identity, labels_N, BOTH_WAYS, UNEVEN).loss
        loss.backward()
        return {f"{name}.{key}": p.grad for name, net in nets.items() for key, p in net.named_parameters()}

    ours, theirs = trained(True), trained(False)
    assert {name for name, g in ours.items() if g is None} == {name for name, g in theirs.items() if g is None}
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_what_wraps_a_model_step_after_step(family: str, one_rank: None) -> None:
    """DistributedDataParallel refuses the next forward if any gradient did not come by it."""
    net = build(family)
    wrapped = DistributedDataParallel(net)
    terms: dict[str, Term] = {"hard": term("cross_entropy")}
    reduced = []
    wrapped.register_comm_hook(None, lambda _, bucket: (reduced.append(bucket.buffer().numel()), _done(bucket))[1])
    for _ in range(3):
        net.zero_grad(set_to_none=True)
        side = side_of(net, POSITIONS_N, through=wrapped)
        chunked_terms({"small": side}, some_labels(5, 60), terms, {"hard": 1.0}, chunk=2).loss.backward()
        assert sum(reduced) == build_.num_parameters(net)
        reduced.clear()


def _done(bucket: Any) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def rank_of_two(rank: int, folder: str) -> None:
    """Both models on two ranks, half of the positions each; rank 0 leaves the averaged gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    nets = {"big": build("bert"), "small": build("gpt2", width=16)}
    ids_BT, positions_N = some_ids(4)[2 * rank : 2 * rank + 2], torch.tensor([1, 8, 20])
    labels_N = some_labels(6, 60)[3 * rank : 3 * rank + 3]
    wrapped = {name: DistributedDataParallel(net) for name, net in nets.items()}
    for accumulate in (True, False):  # the first micro-batch is not exchanged
        with (
            wrapped["big"].no_sync() if accumulate else nullcontext(),
            wrapped["small"].no_sync() if accumulate else nullcontext(),
        ):
            sources = {n: side_of(nets[n], positions_N, ids_BT=ids_BT, through=wrapped[n]) for n in nets}
            (2 * chunked_terms(sources, labels_N, BOTH_WAYS, UNEVEN, chunk=2).loss).backward()
    if rank == 0:
        torch.save({f"{n}.{k}": p.grad for n, net in nets.items() for k, p in net.named_parameters()}, f"{folder}/gradients")  # fmt: skip
    torch.distributed.barrier()  # who leaves first may not take the others' connections along
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_get_the_gradients_of_one(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from tests.losses import test_chunked as t; t.rank_of_two(int(sys.argv[1]), {str(tmp_path)!r})"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], cwd=Path(__file__).parents[2]) for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    found = torch.load(tmp_path / "gradients", weights_only=True)
    nets = {"big": build("bert"), "small": build("gpt2", width=16)}
    sources = {n: side_of(net, torch.tensor([1, 8, 20, 33, 40, 52]), ids_BT=some_ids(4)) for n, net in nets.items()}
    (2 * chunked_terms(sources, some_labels(6, 60), BOTH_WAYS, UNEVEN, chunk=100).loss).backward()
    for n, net in nets.items():
        for key, p in net.named_parameters():
            torch.testing.assert_close(found[f"{n}.{key}"], p.grad, rtol=1e-4, atol=1e-6, msg=f"{n}.{key}")
