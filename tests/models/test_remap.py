"""Remaps: plans by shape, what a plan copies, and what it does to the function."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig

from tests.support.trials import FAMILIES, distillation
from trainables.config.models import Depth, Model, Random, Remap, Width
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec, trial_id
from trainables.models import build
from trainables.models.layouts import PRE_NORM, place_of
from trainables.models.remap import Layers, RemapError, apply, check, depth_plan, layers_prefix, measure, preview_remap
from trainables.training.phase_graph import phase_key

DEPTHS = get_args(Depth)
PLANS: dict[str, dict[tuple[int, int], Layers]] = {  # (source, target) layers -> plan
    "copy_last": {(2, 2): (0, 1), (2, 4): (0, 1, 1, 1), (4, 2): (0, 1), (1, 3): (0, 0, 0)},
    "stack": {(2, 2): (0, 1), (2, 4): (0, 1, 0, 1), (2, 5): (0, 1, 0, 1, 0), (4, 2): (0, 1), (1, 3): (0, 0, 0)},
    "interpolate": {(2, 2): (0, 1), (2, 4): (0, 0, 1, 1), (2, 3): (0, 0, 1), (4, 2): (0, 2), (6, 4): (0, 1, 3, 4)},
    "spread": {
        (12, 6): (0, 2, 4, 7, 9, 11),  # DistilBERT's
        (12, 3): (0, 6, 11),
        (4, 2): (0, 3),
        (6, 1): (0,),
        (2, 4): (0, 0, 1, 1),
        (2, 2): (0, 1),
    },
    "identity": {(2, 2): (0, 1), (2, 4): (0, 1, "idle", "idle")},
    "every_other": {(2, 1): (0,), (3, 2): (0, 2), (4, 2): (0, 2), (12, 6): (0, 2, 4, 6, 8, 10), (1, 1): (0,)},
    "first": {(2, 2): (0, 1), (2, 4): (0, 1, None, None), (4, 2): (0, 1)},
    "random": {(2, 2): (None, None), (2, 3): (None, None, None)},
}


def net_of(
    family: str,
    layers: int,
    *,
    name: str = "m",
    width: int = 16,
    heads: int = 2,
    intermediate_size: int = 24,
    vocab_size: int = 40,
    **config: Any,
) -> Any:
    shape = Model(
        family=family,
        layers=layers,
        width=width,
        heads=heads,
        intermediate_size=intermediate_size,
        dropout=0,
        config=config,
    )
    return build.build(shape, name=name, seed=0, vocab_size=vocab_size, special_ids={"pad_token_id": 0}, length=16)


def previewed(source: Model, target: Model, config: Any = None) -> Any:
    """The preview between two shapes. `config`: of a source with pretrained weights."""
    how: dict[str, Any] = {"vocab_size": 40, "special_ids": {"pad_token_id": 0}, "length": 16}
    configs = [config or build.make_config(source, **how), build.make_config(target, **how)]
    assert isinstance(target.init, Remap)
    return preview_remap(target.init, *configs)


def layer_of(net: Any, name: str) -> tuple[int, str] | None:
    prefix = layers_prefix(net)
    if not name.startswith(prefix):
        return None
    index, _, rest = name.removeprefix(prefix).partition(".")
    return int(index), rest


# --------------------------------------------------------------------------------------------------------------- plans


def test_every_depth_has_plans_here() -> None:
    assert set(DEPTHS) == set(PLANS)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_plan_names_a_source_layer_for_each_target_layer(depth: Any) -> None:
    for (num_source, num_target), expected in PLANS[depth].items():
        assert depth_plan(depth, num_source, num_target) == expected
    for num_source in range(1, 9):
        for num_target in range(1, 9):
            try:
                plan = depth_plan(depth, num_source, num_target)
            except RemapError:
                assert depth in ("every_other", "identity")
                continue
            assert len(plan) == num_target
            assert all(layer in (None, "idle", *range(num_source)) for layer in plan)
            if depth in ("every_other", "interpolate", "spread") and 1 < num_target <= num_source:  # from end to end
                assert plan[0] == 0 and plan[-1] >= num_source - -(-num_source // num_target)


def test_every_other_says_how_many_layers_it_needs() -> None:
    with pytest.raises(
        RemapError, match="every_other of 30 source layers is 15, and the target has 10; expected spread"
    ):
        depth_plan("every_other", 30, 10)
    with pytest.raises(RemapError, match="at least 5 source layers for 3; there are 4"):
        depth_plan("every_other", 4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, "equal hidden_size; source has 16, target 32; expected width, one of replicate, "),
        ({"heads": 4}, "equal num_attention_heads; source has 2, target 4; expected width"),
        ({"intermediate_size": 25}, "equal intermediate_size; source has 24, target 25; expected width"),
        ({"vocab_size": 41}, "equal vocab_size; source has 40, target 41"),
    ],
)
def test_shapes_that_differ_beside_depth_are_refused_by_name(change: dict[str, int], message: str) -> None:
    for family in FAMILIES:
        with pytest.raises(RemapError, match=message):
            check("stack", net_of(family, 1).config, net_of(family, 2, **change).config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 1}, "equal num_key_value_heads; source has 2, target 1; expected width"),
        ({"head_dim": 16}, "equal head_dim; source has 8, target 16; expected width"),
        ({"attention_bias": True}, "equal attention_bias; source has False, target True"),
        ({"tie_word_embeddings": True}, "target ties embeddings but source does not"),
    ],
)
def test_what_only_some_families_have_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RemapError, match=message):
        check("stack", net_of("llama", 1).config, net_of("llama", 2, **change).config)


@pytest.mark.parametrize("width", get_args(Width))
def test_with_a_width_sizes_may_differ_and_nothing_else(width: Width) -> None:
    source = net_of("llama", 2).config
    wide = net_of("llama", 3, width=64, heads=4, intermediate_size=40, num_key_value_heads=2, head_dim=8).config
    assert check("stack", source, wide, width) == (0, 1, 0)
    for change in ({"vocab_size": 41}, {"mlp_bias": True}, {"tie_word_embeddings": True}):
        with pytest.raises(RemapError):
            check("stack", source, net_of("llama", 2, width=32, **change).config, width)
    with pytest.raises(RemapError, match="every_other needs"):
        check("every_other", source, net_of("llama", 2, width=32).config, width)


def test_a_width_is_for_families_whose_tensors_are_known() -> None:
    opt = AutoConfig.for_model("opt", hidden_size=16, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    assert check("stack", opt, opt) == (0,)
    with pytest.raises(RemapError, match="serve the families bert, modernbert, gpt2, llama; these are opt"):
        check("stack", opt, opt, "replicate")
    odd = net_of("gpt2", 1, add_cross_attention=True)
    with pytest.raises(RemapError, match=r"no width-remap rule for parameter transformer\.h\.0\.crossattention"):
        apply(odd, net_of("gpt2", 1, add_cross_attention=True), (0,), "replicate")


def test_families_that_differ_are_refused() -> None:
    with pytest.raises(RemapError, match="equal model_type; source has bert, target modernbert"):
        check("stack", net_of("bert", 1).config, net_of("modernbert", 2).config)


def test_an_inner_width_that_differs_is_refused_and_both_tensors_are_named() -> None:
    source, target = net_of("bert", 1), net_of("bert", 2, intermediate_size=48)
    with pytest.raises(RemapError, match=r"layer\.0\.intermediate.*cannot become .*\(48, 16\)"):
        apply(source, target, depth_plan("stack", 1, 2))


# ------------------------------------------------------------------------------------------------------------- copying


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_apply_copies_what_the_plan_says_and_everything_around(family: str, depth: Any) -> None:
    num_source, num_target = (3, 2) if depth == "every_other" else (2, 3)
    source, target = net_of(family, num_source, name="s"), net_of(family, num_target, name="t")
    for net, shift in ((source, 1.0), (target, 2.0)):  # so that no two tensors are equal by chance, norms included
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(
                    shift * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
                )
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    ours = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    plan = depth_plan(depth, num_source, num_target)
    left = apply(source, target, plan)
    copied = 0
    for name, tensor in target.state_dict().items():
        at = layer_of(target, name)
        layer = None if at is None else plan[at[0]]
        wanted = name if at is None else f"{layers_prefix(source)}{layer}.{at[1]}" if isinstance(layer, int) else None
        if layer == "idle" and place_of(family, name) in ("x <- o", "x <- inner"):
            assert not tensor.any() and name not in left
            continue
        if wanted is not None and wanted not in ours:  # ModernBERT's first layer has no attention norm
            assert family == "modernbert" and wanted.endswith("0.attn_norm.weight"), wanted
            wanted = None
        assert torch.equal(tensor, before[name] if wanted is None else ours[wanted]), (name, wanted)
        assert (name in left) == (wanted is None)
        copied += wanted is not None
    assert copied > 0
    assert all(torch.equal(tensor, ours[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_that_shares_no_memory_with_its_copy_stays_as_it_is(family: str) -> None:
    source, target = net_of(family, 1), net_of(family, 2)
    apply(source, target, depth_plan("stack", 1, 2))
    theirs = {tensor.data_ptr() for tensor in target.state_dict().values()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in source.state_dict().values())


# ------------------------------------------------------------------------------------------------------------ measuring


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_plan_is_exact_and_leaves_both_models_alone(family: str) -> None:
    source, target = net_of(family, 2, name="s"), net_of(family, 2, name="t")
    before = [parameter.clone() for parameter in target.parameters()]
    found = measure(source, target, depth_plan("copy_last", 2, 2))
    assert found.verdict == "exact" and found.difference < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    assert next(target.parameters()).dtype == torch.float32


@pytest.mark.parametrize("depth", ["stack", "copy_last", "interpolate"])
def test_growing_a_post_norm_encoder_by_copies_is_lossy(depth: Any) -> None:
    source, target = net_of("bert", 2), net_of("bert", 4)
    with torch.no_grad():  # far from the small weights of the start, at which every layer is almost nothing
        for parameter in source.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    assert measure(source, target, depth_plan(depth, 2, 4)).verdict == "lossy"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_growing_a_pre_norm_decoder_by_layers_that_add_nothing_is_exact(family: str) -> None:
    source, target = net_of(family, 2, name="s"), net_of(family, 3, name="t")
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name.startswith(f"{layers_prefix(target)}2.") and name.split(".")[-2] in (
                "c_proj",
                "o_proj",
                "down_proj",
            ):
                parameter.zero_()
    assert measure(source, target, depth_plan("first", 2, 3)).verdict == "exact"


@pytest.mark.parametrize("num_target", [3, 5])
@pytest.mark.parametrize("family", PRE_NORM)
def test_growing_by_identity_is_exact_where_norms_come_first_and_new_layers_learn(family: str, num_target: int) -> None:
    source, target = Model(family=family, layers=3, width=128), Model(family=family, layers=num_target, width=128)
    target = target.model_copy(update={"init": Remap(kind="remap", from_="s", depth="identity")})
    plan, found = previewed(source, target)
    assert plan == (0, 1, 2, "idle", "idle")[:num_target] and found.verdict == "exact" and found.difference < 1e-12
    net = net_of(family, num_target, name="t")
    apply(net_of(family, 3, name="s"), net, plan)
    ids = torch.arange(8)[None]
    net(input_ids=ids, labels=ids).loss.backward()
    new = {n: p for n, p in net.named_parameters() if n.startswith(f"{layers_prefix(net)}3.")}
    silent = [p for n, p in new.items() if place_of(family, n) in ("x <- o", "x <- inner") and n.endswith("weight")]
    assert len(silent) == (2 if num_target > 3 else 0) and all(p.grad is not None and p.grad.any() for p in silent)


def test_identity_is_refused_where_a_block_cannot_add_nothing() -> None:
    with pytest.raises(RemapError, match="residual stream: modernbert, gpt2, llama; a bert is not one of these"):
        check("identity", net_of("bert", 1).config, net_of("bert", 2).config)
    with pytest.raises(RemapError, match="identity adds layers; the source has 2, the target 1; expected first"):
        check("identity", net_of("gpt2", 2).config, net_of("gpt2", 1).config)


@pytest.mark.parametrize(("depth", "layers", "verdict"), [("copy_last", (2, 2), "exact"), ("stack", (2, 4), "lossy")])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_remap_of_depth_does_is_preview_remapn(
    family: str, depth: Any, layers: tuple[int, int], verdict: str
) -> None:
    source, target = (Model(family=family, layers=num, width=768, heads=12) for num in layers)
    target = target.model_copy(update={"init": Remap(kind="remap", from_="s", depth=depth)})
    plan, found = previewed(source, target)
    assert plan == depth_plan(depth, *layers) and found.verdict == verdict


def test_grouped_heads_of_a_given_size_are_preview_remapn_in_their_proportions() -> None:
    wide = {"num_key_value_heads": 8, "head_dim": 128}
    source = Model(
        family="llama",
        layers=1,
        width=2048,
        heads=32,
        intermediate_size=5632,
        config={**wide, "num_key_value_heads": 4},
    )
    target = Model(family="llama", layers=1, width=4096, heads=64, intermediate_size=11264, config=wide,
                   init=Remap(kind="remap", from_="s", depth="stack", width="replicate"))  # fmt: skip
    assert previewed(source, target)[1].verdict == "exact"


@pytest.mark.parametrize(
    ("of_source", "of_target", "verdict"),
    [(None, None, "exact"), (None, "twice", "lossy"), ("mirror", "twice", "lossy"), ("twice", "twice", "exact")],
)
def test_layers_that_run_again_are_preview_remapn_as_they_run(
    of_source: str | None, of_target: str | None, verdict: str
) -> None:
    models_ = [Model.model_validate({"family": "bert", "layers": 2, "width": 128,
                                     "sharing": order and {"order": order, "swap": True},
                                     "init": {"kind": "remap", "from": "s", "depth": "first"}})
               for order in (of_source, of_target)]  # fmt: skip
    source, target = models_[0].model_copy(update={"init": Random()}), models_[1]
    assert previewed(source, target)[1].verdict == verdict


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_bring_their_own_shape_are_preview_remapn_by_it(family: str) -> None:
    source, target = Model(pretrained="s"), Model(family=family, layers=2, width=128, heads=4)
    target = target.model_copy(update={"init": Remap(kind="remap", from_="s", depth="first")})
    config = net_of(family, 2, width=128, heads=4, intermediate_size=512).config
    before = config.to_dict()
    assert previewed(source, target, config)[1].verdict == "exact" and config.to_dict() == before
    assert (
        previewed(source, target, net_of(family, 3, width=128, heads=4, intermediate_size=512).config)[1].verdict
        == "lossy"
    )
    with pytest.raises(RemapError, match="equal hidden_size"):
        previewed(source, target, net_of(family, 2, width=64, heads=4, intermediate_size=512).config)


def test_what_pretrained_weights_do_otherwise_is_seen() -> None:
    """Rotations are no part of a shape: a target with those of its family computes something else."""
    target = Model(family="llama", layers=2, width=128, heads=4, init=Remap(kind="remap", from_="s", depth="first"))
    config = net_of("llama", 2, width=128, heads=4, intermediate_size=512).config
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 100.0}
    with pytest.raises(RemapError, match=r"equal rope_parameters; source has .*100\.0.*`like: SOURCE`"):
        previewed(Model(pretrained="s"), target, config)


# ------------------------------------------------------------------------------------------------------------- identity


def spec_of(init: dict[str, Any]) -> TrialSpec:
    data = {"kind": "python_docs", "tokenizer": {"kind": "wordpiece", "size": 160}}
    init = {"kind": "remap", "from": "teacher", "depth": "stack", **init}
    value = distillation()
    value["models"]["student"]["init"] = init
    return TrialSpec.model_validate({"data": data, **value})


def test_a_remap_without_width_has_one_id_however_it_is_written() -> None:
    found = {"data:corpus": "x"}
    assert trial_id(spec_of({}), found) == trial_id(spec_of({"width": None}), found)


@pytest.mark.parametrize("width", get_args(Width))
def test_a_width_is_part_of_a_trials_id_and_of_its_phases_keys(width: Width) -> None:
    found = {"data:corpus": "x"}
    plain, wide = spec_of({}), spec_of({"width": width})
    assert TrialSpec.model_validate(wide.model_dump(mode="json")) == wide
    assert TrialSpec.model_validate_json(wide.model_dump_json()) == wide
    assert trial_id(plain, found) != trial_id(wide, found)
    keys = [[phase_key(s.pruned(), PhaseRun(p), found) for s in (plain, wide)] for p in ("teach", "distil")]
    assert keys[0][0] == keys[0][1] and keys[1][0] != keys[1][1]


def test_a_width_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValidationError, match="replicate_noise"):
        spec_of({"width": "wavelet"})
