"""Remaps of width: what is exact, per head, there and back, and what is left to learn."""

from __future__ import annotations

import copy
import itertools
import json
import math
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.support.trials import FAMILIES, Lab, distillation, model
from trainables.config.models import Model, Width
from trainables.models import build, importance, output_head
from trainables.models.layouts import LAYOUTS, NORM_EPS, place_of, shape_of
from trainables.models.remap import apply as copy_layers
from trainables.models.remap import check, layers_prefix, measure, preview_remap
from trainables.models.remap_width import chosen, fit, fit_channels, fit_heads, spaces

WIDTHS: tuple[Width, ...] = get_args(Width)
SMALL = {"layers": 2, "width": 16, "heads": 2, "intermediate_size": 24}
INNER = {"intermediate_size": 36}
WHOLE = {"width": 32, "heads": 4, "intermediate_size": 48}  # hidden size and heads by a whole factor, heads of one size
HALF_MORE = {"width": 24, "heads": 3, "intermediate_size": 36}
BIGGER_HEADS = {"width": 32, "heads": 2}
MORE_BIGGER_HEADS = {"width": 64, "heads": 4}
ROTARY = ("modernbert", "llama")


def net_of(family: str, *, name: str = "s", seed: int = 0, config: dict[str, Any] | None = None, **shape: Any) -> Any:
    """A model as far from its start as a trained one: gains are not 1, biases not 0."""
    value = {"family": family, **SMALL, "dropout": 0, "config": config or {}, **shape}
    return copy.deepcopy(_made(json.dumps(value), name, seed))


@cache
def _made(value: str, name: str, seed: int) -> Any:
    shape = Model.model_validate({**json.loads(value), "init": {"kind": "random", "std": "width"}})
    net = build.build(shape, name=name, seed=seed, vocab_size=40, special_ids={"pad_token_id": 0}, length=16)
    generator = torch.Generator().manual_seed(len(name) + seed)
    for parameter in net.parameters():
        if parameter.ndim < 2:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def resize(width: Width, source: Any, target: Any) -> tuple[str, ...]:
    return copy_layers(source, target, check("copy_last", source.config, target.config, width), width)


def difference(width: Width, source: Any, target: Any) -> float:
    return measure(source, target, check("copy_last", source.config, target.config, width), width).difference


def parts_of(net: Any, layer: int, size: int) -> dict[str, Tensor]:
    """The weights of one attention with a head in each row: queries, keys, values [H, size, D], output [H, size, D]."""
    found = {}
    family = net.config.model_type
    for name, weight in net.state_dict().items():
        place = place_of(family, name)
        if (
            not name.startswith(f"{layers_prefix(net)}{layer}.")
            or weight.ndim != 2
            or place is None
            or " <- " not in place
        ):
            continue
        weight = weight.t() if family == "gpt2" else weight
        spaces, _, reads = place.partition(" <- ")
        if reads == "o":
            found["o"] = weight.t().unflatten(0, (-1, size))
        elif spaces[0] in "qkv":
            names = spaces.split()
            found |= {n: part.unflatten(0, (-1, size)) for n, part in zip(names, weight.chunk(len(names)), strict=True)}
    assert set(found) == set("qkvo")
    return found


def inner_rows(net: Any, layer: int) -> Tensor:
    """What the first neurons' matrix of a layer reads: [inner, D]."""
    name = next(n for n in net.state_dict() if n.startswith(f"{layers_prefix(net)}{layer}.") and n.endswith(("c_fc.weight", "up_proj.weight")))  # fmt: skip
    weight: Tensor = net.state_dict()[name]
    return weight.t() if name.endswith("c_fc.weight") else weight


# ------------------------------------------------------------------------------------------------------------ exactness

EXACT: list[tuple[str, Width, dict[str, Any]]] = [
    *itertools.product(FAMILIES, ("replicate", "replicate_noise", "zero_pad", "mean_pad", "select", "importance"), (INNER,)),
    *itertools.product(FAMILIES, ("replicate", "replicate_noise"), (WHOLE, BIGGER_HEADS, MORE_BIGGER_HEADS)),
    *itertools.product(("llama",), ("zero_pad", "select", "importance"), (WHOLE, HALF_MORE, MORE_BIGGER_HEADS)),
    *itertools.product(("gpt2",), ("mean_pad", "select", "importance"), (WHOLE, HALF_MORE, MORE_BIGGER_HEADS)),
]  # fmt: skip
NOT: list[tuple[str, Width, dict[str, Any]]] = [
    *itertools.product(FAMILIES, ("aki",), (INNER, WHOLE)),
    *itertools.product(FAMILIES, ("prefix",), (WHOLE, HALF_MORE)),
    *itertools.product(FAMILIES, ("replicate", "replicate_noise"), (HALF_MORE,)),
    *itertools.product(("bert", "modernbert", "gpt2"), ("zero_pad",), (WHOLE, HALF_MORE)),
    *itertools.product(("bert", "modernbert", "llama"), ("mean_pad",), (WHOLE, HALF_MORE)),
]


def test_every_operator_is_called_exact_or_not_for_every_family() -> None:
    assert {(f, w) for f, w, _ in (*EXACT, *NOT)} == set(itertools.product(FAMILIES, WIDTHS))


@pytest.mark.parametrize(("family", "width", "shape"), EXACT)
def test_what_can_be_exact_is(family: str, width: Width, shape: dict[str, Any]) -> None:
    assert difference(width, net_of(family), net_of(family, name="target", **shape)) < 1e-13


@pytest.mark.parametrize(("family", "width", "shape"), NOT)
def test_what_cannot_be_exact_is_measured_as_such(family: str, width: Width, shape: dict[str, Any]) -> None:
    assert difference(width, net_of(family), net_of(family, name="target", **shape)) > 1e-2


@pytest.mark.parametrize(
    ("family", "width"), [("bert", "replicate_noise"), ("gpt2", "mean_pad"), ("gpt2", "replicate")]
)
def test_exact_logits_are_equal_one_by_one(family: str, width: Width) -> None:
    source, target = net_of(family).double(), net_of(family, name="target", **WHOLE).double()
    resize(width, source, target)
    ids_BT = torch.arange(32).view(2, 16)
    assert torch.allclose(source(ids_BT).logits, target(ids_BT).logits, rtol=0, atol=1e-10)


PADS: list[tuple[str, Width]] = [("llama", "zero_pad"), ("gpt2", "mean_pad"), ("llama", "select"), ("gpt2", "select")]


@pytest.mark.parametrize(("family", "width"), PADS)
def test_what_a_pad_leaves_free_meets_only_zeros(family: str, width: Width) -> None:
    source, targets = net_of(family), [net_of(family, name="target", seed=seed, **HALF_MORE) for seed in (0, 1)]
    for parameter in targets[1].parameters():
        parameter.data *= 30
    assert all(difference(width, source, target) < 1e-12 for target in targets)
    for target in targets:
        resize(width, source, target)
    assert any(not torch.equal(a, b) for a, b in zip(*(t.parameters() for t in targets), strict=True))


@pytest.mark.parametrize("shape", [HALF_MORE, MORE_BIGGER_HEADS], ids=str)
@pytest.mark.parametrize(("family", "width"), PADS)
def test_new_heads_and_neurons_are_as_fresh_as_they_were(family: str, width: Width, shape: dict[str, Any]) -> None:
    source, target = net_of(family), net_of(family, name="target", **{**shape, "intermediate_size": 36})
    size = shape_of(target.config).head_size
    own, own_inner = copy.deepcopy(parts_of(target, 1, size)), inner_rows(target, 1).clone()
    resize(width, source, target)
    found = parts_of(target, 1, size)
    for name in "qkv":
        assert torch.equal(found[name][2:], own[name][2:])  # of the heads that are there, keys' new channels are zero
    assert torch.equal(found["q"][:, 8:], own["q"][:, 8:]) if family == "gpt2" else True
    assert torch.equal(found["v"][:, 8:], own["v"][:, 8:]) and not found["o"][2:].any() and not found["o"][:, 8:].any()
    assert torch.equal(inner_rows(target, 1)[24:], own_inner[24:])


@pytest.mark.parametrize(("ties", "untied"), [((True, True), 0), ((True, False), 1), ((False, False), 2)])
@pytest.mark.parametrize("width", ["replicate", "replicate_noise", "zero_pad"])
def test_heads_may_be_tied_or_not(width: Width, ties: tuple[bool, bool], untied: int) -> None:
    source, target = (net_of("llama", name=n, config={"tie_word_embeddings": tie}, **shape)
                      for n, tie, shape in zip(("s", "target"), ties, ({}, WHOLE), strict=True))  # fmt: skip
    heads = [net.lm_head.weight is not net.get_input_embeddings().weight for net in (source, target)]
    assert sum(heads) == untied
    assert difference(width, source, target) < 1e-13


@pytest.mark.parametrize("width", ["replicate", "replicate_noise", "zero_pad", "mean_pad"])
def test_pre_norm_depth_that_adds_nothing_and_width_are_exact_together(width: Width) -> None:
    family = "llama" if width == "zero_pad" else "gpt2"
    source, target = net_of(family), net_of(family, name="target", **{**WHOLE, "layers": 3})
    for name, parameter in target.named_parameters():
        if name.startswith(f"{layers_prefix(target)}2.") and name.split(".")[-2] in ("c_proj", "o_proj", "down_proj"):
            parameter.data.zero_()
    layers = check("first", source.config, target.config, width)
    assert layers == (0, 1, None) and measure(source, target, layers, width).verdict == "exact"
    left = copy_layers(source, target, layers, width)
    assert left and all(name.startswith(f"{layers_prefix(target)}2.") for name in left)


@pytest.mark.parametrize(("family", "width"), [("llama", "zero_pad"), ("gpt2", "mean_pad"), ("llama", "replicate")])
def test_the_epsilon_of_the_norms_is_kept_with_the_model(family: str, width: Width) -> None:
    key = NORM_EPS[family]
    source, target = net_of(family, config={key: 1e-2}), net_of(family, name="target", **WHOLE)
    assert difference(width, source, target) < 1e-13
    resize(width, source, target)
    assert getattr(target.config, key) == (1e-2 if width == "replicate" else 5e-3)
    again = build.restore(build.plain_config(target.config), build.weights_of(target)).eval()
    ids_BT = torch.arange(16)[None]
    assert torch.equal(again(ids_BT).logits, target(ids_BT).logits)


def test_scores_that_are_not_scaled_stay_so_when_heads_grow() -> None:
    config = {"scale_attn_weights": False}
    source = net_of("gpt2", config=config)
    assert difference("mean_pad", source, net_of("gpt2", name="target", config=config, **BIGGER_HEADS)) < 1e-13


# ---------------------------------------------------------------------------------------------------------------- heads

GROUPS = [((4, 2), (8, 2)), ((4, 2), (8, 4)), ((4, 2), (8, 8)), ((4, 2), (4, 4)), ((2, 1), (6, 3)), ((4, 4), (6, 6)), ((2, 2), (6, 2))]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), GROUPS)
@pytest.mark.parametrize("width", ["replicate", "replicate_noise", "zero_pad", "select"])
def test_grouped_queries_keep_their_keys(width: Width, old: tuple[int, int], new: tuple[int, int]) -> None:
    source, target = (
        net_of("llama", name=n, width=8 * 12, heads=h, config={"num_key_value_heads": kv, "head_dim": 8})
        for n, (h, kv) in (("s", old), ("target", new))
    )
    assert difference(width, source, target) < 1e-13
    resize(width, source, target)
    again = net_of(
        "llama", name="again", width=8 * 12, heads=old[0], config={"num_key_value_heads": old[1], "head_dim": 8}
    )
    if width != "select":
        assert difference(width, target, again) < 1e-6  # float32 lies in between


@pytest.mark.parametrize("width", WIDTHS)
def test_a_query_head_goes_where_its_keys_are(width: Width) -> None:
    sizes = [(h, kv) for h in (1, 2, 3, 4, 6, 8, 12) for kv in (1, 2, 3, 4, 6, 8, 12) if h % kv == 0]
    for old, new in itertools.product(sizes, repeat=2):
        heads, keys = fit_heads(width, old, new)
        assert (heads.num_old, heads.num_new, keys.num_old, keys.num_new) == (old[0], new[0], old[1], new[1])
        of = set(zip(keys.new.tolist(), keys.old.tolist(), strict=True))
        for to, source in zip(heads.new.tolist(), heads.old.tolist(), strict=True):
            assert (to // (new[0] // new[1]), source // (old[0] // old[1])) in of, (old, new)
        if new[0] >= old[0] and new[1] >= old[1] and new[1] % old[1] == 0:  # then none is lost, and copies share
            assert set(heads.old.tolist()) == set(range(old[0]))
            total = torch.zeros(old[0], dtype=torch.float64).index_add(0, heads.old, heads.write * heads.read)
            assert torch.allclose(total, torch.ones_like(total))


@pytest.mark.parametrize("width", ["prefix", "select", "importance"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_model_gets_whole_heads(family: str, width: Width) -> None:
    source, target = net_of(family, width=32, heads=4), net_of(family, name="target", width=16, heads=2)
    for layer in range(2):
        for part in parts_of(source, layer, 8).values():
            part.copy_(torch.arange(1.0, 5.0)[:, None, None].expand_as(part))  # every weight is the number of its head
    resize(width, source, target)
    for layer in range(2):
        found = parts_of(target, layer, 8)
        for head in range(2):
            assert len({float(v) for part in found.values() for v in part[head].flatten()}) == 1
        assert not torch.equal(found["q"][0], found["q"][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_heads_share_what_they_put_out(family: str) -> None:
    source, target = net_of(family), net_of(family, name="target", **WHOLE)
    resize("replicate", source, target)
    old, new = parts_of(source, 1, 8), parts_of(target, 1, 8)
    for name in "qkv":  # heads 0 1 -> 0 1 0 1; each reads every channel twice, at half weight
        assert torch.equal(new[name], old[name].repeat(2, 1, 2) / 2)
    assert torch.equal(new["o"], old["o"].repeat(2, 1, 2) / 2)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 12), (6, 12), (8, 12), (8, 8)])
def test_rotary_pairs_go_to_the_pairs_of_nearest_speed(old: int, new: int) -> None:
    pairs = fit_channels("zero_pad", old, new, is_rotary=True)
    of = dict(zip(pairs.old.tolist(), pairs.new.tolist(), strict=True))
    assert len(set(of.values())) == old
    for i in range(old // 2):
        assert of[i + old // 2] == of[i] + new // 2
        speeds = [abs(j / new - i / old) for j in range(new // 2)]
        assert speeds[of[i]] == min(speeds) and (new % old or speeds[of[i]] == 0)
    assert fit_channels("select", new, old, is_rotary=True).old.tolist() == pairs.new.tolist()


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_heads_that_grow_by_no_whole_factor_are_not_exact(family: str) -> None:
    target = net_of(family, name="target", width=24, heads=2)
    assert difference("replicate", net_of(family), target) > 1e-3
    if family == "llama":
        assert difference("zero_pad", net_of(family), target) > 1e-3


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("shape", [HALF_MORE, MORE_BIGGER_HEADS], ids=str)
@pytest.mark.parametrize("width", ["replicate", "replicate_noise", "zero_pad", "mean_pad", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_down_after_up_is_where_one_was(family: str, width: Width, shape: dict[str, Any]) -> None:
    source, target, again = (net_of(family, name=n).double() for n in ("s", "target", "again"))
    target = net_of(family, name="target", **shape).double()
    resize(width, source, target)
    resize(width, target, again)
    left = {f"{layers_prefix(source)}0.attn_norm.weight"}
    for (name, a), b in zip(source.state_dict().items(), again.state_dict().values(), strict=True):
        assert name in left or torch.allclose(a, b, rtol=1e-12, atol=1e-12), name
    assert getattr(again.config, NORM_EPS[family]) == pytest.approx(getattr(source.config, NORM_EPS[family]))


@pytest.mark.parametrize("shape", [HALF_MORE, {"width": 8, "heads": 1, "intermediate_size": 48}, {"heads": 4}], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_two_shapes_do_and_every_tensor_is_made(family: str, width: Width, shape: dict[str, Any]) -> None:
    source = net_of(family)
    targets = [net_of(family, name="target", seed=seed, **shape) for seed in (0, 1)]
    for target in targets:
        assert resize(width, source, target) == ()
    a, b = (target.state_dict() for target in targets)
    for name in a:
        assert a[name].isfinite().all()
        same = a[name] == b[name]
        if width in ("replicate", "aki"):
            assert same.all(), name  # nothing is left to chance
        elif width == "replicate_noise":
            assert (a[name] - b[name]).norm() < 0.9 * a[name].norm(), name
        else:
            assert same.any(), name
    assert all(torch.equal(x, y) for x, y in zip(source.parameters(), net_of(family).parameters(), strict=True))
    verdict = measure(source, targets[0], check("copy_last", source.config, targets[0].config, width), width)
    assert math.isfinite(verdict.difference)


@pytest.mark.parametrize("width", ["select", "importance"])
@pytest.mark.parametrize("shape", [HALF_MORE, {"intermediate_size": 24}, {"width": 16, "heads": 2}, {"width": 16, "heads": 4}], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_model_by_choice_is_nearer_than_a_fresh_one(family: str, shape: dict[str, Any], width: Width) -> None:
    source = net_of(family, width=32, heads=4, intermediate_size=48)
    target = net_of(family, name="target", **{"width": 32, "heads": 4, **shape})
    ids_BT = torch.arange(32).view(2, 16)
    before, fresh = (net(ids_BT).logits.detach() for net in (source, target))
    before, fresh = (z - z.mean(-1, keepdim=True) for z in (before, fresh))
    assert difference(width, source, target) < 0.95 * float((fresh - before).norm() / before.norm())


# -------------------------------------------------------------------------------------------------------------- choices


def test_the_best_are_kept_in_their_order_and_else_an_even_spread() -> None:
    assert chosen(6, 3, torch.tensor([1.0, 5.0, 0.0, 5.0, 9.0, 5.0])) == [1, 3, 4]
    assert chosen(6, 3) == [0, 2, 4] and chosen(6, 4) == [0, 2, 3, 5] and chosen(5, 5) == [0, 1, 2, 3, 4]
    assert fit("select", 6, 4).old.tolist() == [0, 2, 3, 5] and fit("zero_pad", 6, 4).old.tolist() == [0, 1, 2, 3]
    heads, keys = fit_heads("importance", (6, 3), (2, 1), torch.tensor([9.0, 0, 4, 4, 4, 5]))
    assert keys.old.tolist() == [0] or keys.old.tolist() == [2]
    assert heads.old.tolist() == [0, 1] if keys.old.tolist() == [0] else [4, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_silent_is_what_a_smaller_model_does_without(family: str) -> None:
    source = net_of(family, width=32, heads=4, intermediate_size=32)
    for layer, (heads, neurons) in enumerate([((1, 2), range(0, 32, 2)), ((0, 3), range(16, 32))]):
        parts_of(source, layer, 8)["o"][list(heads)] = 0
        for name, weight in source.state_dict().items():
            if (
                name.startswith(f"{layers_prefix(source)}{layer}.")
                and place_of(family, name) == "x <- inner"
                and weight.ndim == 2
            ):
                (weight.t() if family != "gpt2" else weight)[list(neurons)] = 0
    found = importance.scores(source, layers_prefix(source))
    assert [(f["q"] == 0).nonzero().flatten().tolist() for f in found] == [[1, 2], [0, 3]]
    assert [(f["inner"] == 0).nonzero().flatten().tolist() for f in found] == [
        list(range(0, 32, 2)),
        list(range(16, 32)),
    ]
    config = {"head_dim": 8, "num_key_value_heads": 2} if family == "llama" else {}
    target = net_of(family, name="target", width=32, heads=4, intermediate_size=16)
    assert difference("importance", source, target) < 1e-13
    assert difference("select", source, target) > 1e-2
    if family == "llama":  # whole heads go, the hidden size stays
        source = net_of(family, width=32, heads=4, intermediate_size=32, config={"head_dim": 8})
        parts_of(source, 0, 8)["o"][[1, 2]] = 0
        parts_of(source, 1, 8)["o"][[0, 3]] = 0
        target = net_of(family, name="target", width=32, heads=2, intermediate_size=32, config=config)
        assert difference("importance", source, target) < 1e-13


def test_norms_shrink_by_what_the_channels_that_stay_hold_of_the_whole() -> None:
    source = net_of("llama", width=32, heads=4)
    for name, weight in source.state_dict().items():  # nobody writes to half of the channels
        place = place_of("llama", name) or ""
        if place == "table" or place.startswith("x <- "):
            (weight.t() if place == "table" else weight)[::2] = 0
    shares = importance.shares(source, torch.arange(1, 32, 2))
    assert len(shares) == 5 and all(share == pytest.approx(math.sqrt(2)) for share in shares.values())
    target = net_of("llama", name="target", width=16, heads=4, config={"head_dim": 8})
    assert difference("importance", source, target) < 1e-4  # but for the norms' epsilon
    assert difference("select", source, target) > 1e-2


def test_norms_that_subtract_the_mean_do_not_count_it() -> None:
    plain, raised = net_of("gpt2", width=32, heads=4), net_of("gpt2", width=32, heads=4)
    raised.get_input_embeddings().weight.data += 5  # of all channels alike: no norm sees it
    kept = torch.arange(12)
    assert importance.shares(plain, kept) == pytest.approx(importance.shares(raised, kept), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- learning


def gradients(net: Any) -> dict[str, Tensor]:
    ids_BT = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(1))
    net.double().zero_grad()
    torch.nn.functional.cross_entropy(net(ids_BT).logits.flatten(0, 1), ids_BT.roll(1, 1).flatten()).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("width", ["replicate", "replicate_noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_learn_the_same_unless_there_is_noise(family: str, width: Width) -> None:
    source, target = net_of(family).double(), net_of(family, name="target", **WHOLE).double()
    resize(width, source, target)
    found = gradients(target)
    seen = 0
    for name, grad in found.items():
        place = place_of(family, name)
        if place is None or "<- x" not in place or not name.startswith(layers_prefix(target)) or grad.ndim != 2:
            continue
        for part in (grad.t() if family == "gpt2" else grad).chunk(len(place.partition(" <- ")[0].split())):
            first, second = part.chunk(2)  # rows of the first copies, rows of the second ones
            if part.abs().max() < 1e-9:
                continue
            apart = (first - second).abs().max() / part.abs().max()
            assert (apart < 1e-9) == (width == "replicate"), name
            seen += 1
    assert seen >= 6
    table = found[next(name for name in found if place_of(family, name) == "table")]
    apart = (table[:, :16] - table[:, 16:]).abs().max() / table.abs().max()
    assert (apart < 1e-9) == (width == "replicate")


@pytest.mark.parametrize("width", ["replicate", "replicate_noise"])
def test_noise_stands_ten_decibels_below_the_weights(width: Width) -> None:
    source, target = net_of("llama"), net_of("llama", name="target", **WHOLE)
    resize(width, source, target)
    plain = net_of("llama", name="target", **WHOLE)
    resize("replicate", source, plain)
    for (name, noisy), clean in zip(target.state_dict().items(), plain.state_dict().values(), strict=True):
        share = float((noisy - clean).norm() / clean.norm())
        reads = noisy.ndim == 2 and place_of("llama", name) != "table"
        assert share == pytest.approx(10**-0.5 if reads and width == "replicate_noise" else 0, abs=1e-6), name


@pytest.mark.parametrize(("family", "width"), [("llama", "zero_pad"), ("gpt2", "mean_pad")])
def test_what_is_padded_learns(family: str, width: Width) -> None:
    source, target = net_of(family), net_of(family, name="target", **WHOLE)
    resize(width, source, target)
    found = gradients(target)
    for name, grad in found.items():
        place = place_of(family, name)
        if place in ("x <- o", "x <- inner") and grad.ndim == 2:
            reads = grad if family == "gpt2" else grad.t()
            assert (reads[len(reads) // 2 :].abs().sum(1) > 0).all(), name  # from the new heads and neurons
            assert (reads[:, 16:].abs().sum(0) > 0).all(), name  # and to the new channels


def test_copies_come_from_the_next_layer_where_that_is_asked_for() -> None:
    source, target = net_of("gpt2", layers=3), net_of("gpt2", name="target", layers=3, intermediate_size=48)
    resize("aki", source, target)
    old, new = ([block.mlp.c_fc.weight.detach() for block in net.transformer.h] for net in (source, target))
    for layer, following in ((0, 1), (1, 2), (2, 2)):
        assert torch.equal(new[layer], torch.cat([old[layer], old[following]], 1))
    assert torch.equal(target.transformer.h[0].mlp.c_fc.bias[24:], source.transformer.h[1].mlp.c_fc.bias)


def test_an_overlap_is_copied_and_nothing_else() -> None:
    source, target = net_of("gpt2"), net_of("gpt2", name="target", width=24, heads=3, intermediate_size=36)
    own = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    resize("prefix", source, target)
    for name, tensor in target.state_dict().items():
        old = source.state_dict()[name]
        if "attn" in name:
            continue
        where = tuple(slice(0, size) for size in old.shape)
        assert torch.equal(tensor[where], old)
        rest = torch.ones_like(tensor, dtype=torch.bool).index_put(
            tuple(torch.meshgrid(*(torch.arange(size) for size in old.shape), indexing="ij")), torch.tensor(False)
        )
        assert torch.equal(tensor[rest], own[name][rest] if tensor.ndim == 1 else torch.zeros_like(tensor[rest])), name


# ------------------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize(("num", "kept"), [(8, 8), (24, 16)])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("width", [None, "replicate"])
def test_learned_positions_are_taken_as_far_as_they_go(width: Width | None, family: str, num: int, kept: int) -> None:
    shape = {} if width is None else WHOLE
    source, target = net_of(family), net_of(family, name="target", config={"max_position_embeddings": num}, **shape)
    tables = [next(m for n, m in net.named_modules() if n.endswith(("wpe", "position_embeddings"))).weight.detach() for net in (source, target)]  # fmt: skip
    own = tables[1].clone()
    copy_layers(source, target, check("copy_last", source.config, target.config, width), width)
    times = tables[1].shape[1] // 16
    assert torch.equal(tables[1][:kept], tables[0][:kept].repeat(1, times)) and torch.equal(
        tables[1][kept:], own[kept:]
    )
    ids_BT = torch.arange(8)[None]
    assert torch.allclose(source(ids_BT).logits, target(ids_BT).logits, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- whole remaps


def test_every_tensor_of_every_family_has_a_place() -> None:
    assert set(LAYOUTS) == set(NORM_EPS) == set(FAMILIES)
    for family in FAMILIES:
        biased = {k: True for k in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")}
        config = {k: v for k, v in biased.items() if hasattr(net_of(family).config, k)}
        for net in (net_of(family), net_of(family, config=config)):
            assert all(place_of(family, name) for name in net.state_dict()), family
        if config:
            assert difference("replicate", net_of(family, config=config), net_of(family, name="target", config=config, **WHOLE)) < 1e-13  # fmt: skip


def test_equal_shapes_are_copied_bit_by_bit() -> None:
    for family, width in itertools.product(FAMILIES, WIDTHS):
        source, target = net_of(family), net_of(family, name="target")
        resize(width, source, target)
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_spaces_say_where_writers_keep_their_own() -> None:
    old, new = shape_of(net_of("gpt2").config), shape_of(net_of("gpt2", **{**WHOLE, "heads": 2}).config)
    found = spaces("zero_pad", old, new, has_mean=False)
    assert not found["x"].fresh.any() and not found["k"].fresh.any()  # zeros: heads are as many, only larger
    assert found["q"].fresh.sum() == found["v"].fresh.sum() == 16 and found["inner"].fresh.sum() == 24
    assert set(found["q"].pairs.write.tolist()) == {math.sqrt(2)}


@pytest.mark.parametrize(
    ("family", "width", "sizes", "verdict"),
    [
        ("llama", "zero_pad", ((768, 12), (1024, 16)), "exact"),
        ("llama", "replicate", ((768, 12), (1024, 16)), "lossy"),
        ("gpt2", "mean_pad", ((768, 12), (1280, 20)), "exact"),
        ("bert", "replicate", ((384, 6), (768, 12)), "exact"),
        ("bert", "importance", ((768, 12), (384, 6)), "lossy"),
    ],
)
def test_a_remap_is_preview_remapn_on_small_models_of_the_same_proportions(
    family: str, width: Width, sizes: tuple[tuple[int, int], tuple[int, int]], verdict: str
) -> None:
    source, target = (
        Model.model_validate({"family": family, "layers": 2, "width": size, "heads": heads, "init": init})
        for (size, heads), init in zip(sizes, ({"kind": "random"}, {"kind": "remap", "from": "s", "depth": "stack", "width": width}), strict=True)
    )  # fmt: skip
    how: dict[str, Any] = {"vocab_size": 40, "special_ids": {"pad_token_id": 0}, "length": 16}
    ours, theirs = (build.make_config(model, **how) for model in (source, target))
    layers, found = preview_remap(target.init, ours, theirs)
    assert layers == (0, 1) and found.verdict == verdict


def test_a_trial_remaps_the_trained_model_and_its_key_says_how(lab: Lab) -> None:
    init = {"kind": "remap", "from": "teacher", "depth": "copy_last", "width": "zero_pad"}
    trial = distillation(
        teacher=model("llama"), student=model("llama", width=32, heads=4, intermediate_size=64, init=init)
    )
    for part in trial["phases"].values():
        part |= {"streams": {"main": {"corruption": None}}, "budget": {"steps": 2}, "evaluate": [0, 1]}
    del trial["phases"]["distil"]["terms"]["teacher_to_student"]
    spec = lab.spec(trial)
    ran = lab.run(spec)
    taught = ran.of("teach", "teacher", "lm_loss")[-1]
    assert ran.of("distil", "student", "lm_loss")[0] == pytest.approx(taught, rel=1e-5)  # exact, before the first step
    published = lab.store.find(lab.key(spec, "distil"))
    assert published is not None and published.configs["student"]["rms_norm_eps"] == 5e-7
    keys = {width: lab.key(lab.spec(trial, {"models.student.init.width": width}), "distil") for width in WIDTHS}
    assert len(set(keys.values())) == len(WIDTHS)


@pytest.mark.parametrize("width", ["replicate", "replicate_noise", "importance"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_changes_its_width_as_a_language_model_does(family: str, width: Width) -> None:
    def classifier(**shape: Any) -> Any:
        value = Model.model_validate({"family": family, **SMALL, "dropout": 0, **shape})
        made: Any = build.build(value, name="m", seed=len(shape), vocab_size=40, special_ids={"pad_token_id": 0}, length=16, num_labels=3)  # fmt: skip
        return made.double().eval()

    source, target = classifier(), classifier(width=2 * SMALL["width"], heads=2 * SMALL["heads"])
    if width == "importance":  # downwards: whole heads, and every tensor is made
        source, target = target, source
    assert resize(width, source, target) == ()
    ids_BT = torch.tensor([[3, 7, 9, 20, 5, 0], [4, 4, 8, 11, 12, 13]])
    mask_BT = (ids_BT != 0).long()
    with torch.no_grad():
        ours, theirs = (output_head.class_logits(net, ids_BT, mask_BT, None) for net in (source, target))
    assert torch.isfinite(theirs).all()
    if width != "importance":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
