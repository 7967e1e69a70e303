"""LoRA: exact on every family, merged and undone; only pairs learn; targets are projections, not matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.trials import FAMILIES
from trainables.config.errors import ModelError
from trainables.config.models import Model, Random, Sharing
from trainables.config.phase import Lora
from trainables.evaluation.model_size import size_and_speed
from trainables.models import build as build_
from trainables.models import lora, output_head
from trainables.models.layouts import is_linear, projections_of

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}
VOCABULARY, LENGTH = 60, 12
STORIES = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K"
GROUPED = {"num_key_value_heads": 2}  # of four query heads
SHAPES: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILIES},
    "qwen2": {},
    "llama-grouped": {"config": GROUPED},
    "qwen2-grouped": {"config": GROUPED},
    "roberta": {},
    "phi3": {"config": GROUPED},
    "gpt_neox": {},
    "bloom": {"intermediate_size": None},  # it has no field for it
}
ALL = ("query", "key", "value", "output")


def build(which: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any) -> Any:
    given = {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "intermediate_size": 48,
        "dropout": 0,
        "init": Random(std="width"),
        **SHAPES.get(which, {}),
        **more,
    }
    shape = Model(family=which.partition("-")[0], **given)
    how: dict[str, Any] = {"vocab_size": VOCABULARY, "special_ids": SPECIAL, "length": LENGTH}
    net = build_.build(shape, name="m", seed=seed, **how).to(dtype).eval()
    for path, parameter in net.named_parameters():  # biases that are zero hide mistakes
        if path.endswith("bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return net


def adapted(net: Any, *targets: str, seed: int = 0, name: str = "m", **more: Any) -> Any:
    wanted: Any = "all_linear" if targets == ("all_linear",) else targets or ("query", "value")
    return lora.attach(net, Lora(kind="lora", targets=wanted, **{"rank": 3, **more}), name=name, seed=seed)


def fill(net: Any, seed: int = 0) -> None:
    """Random pairs: a B of zeros changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in lora.adapter_state(net).items()}  # fmt: skip
    lora.load_adapter_state(net, state)


def some_ids() -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def logits(net: Any) -> torch.Tensor:
    out: torch.Tensor = net(input_ids=some_ids()).logits
    return out


def close(a: torch.Tensor, b: torch.Tensor, message: str | None = None) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=message)


def plain(net: Any, like: Any) -> Any:
    """What `merged` gives, in a model of the family's own class."""
    state = load(save({name: tensor.contiguous() for name, tensor in lora.merged(net).items()}))
    return build_.restore(build_.plain_config(like.config), state).eval()


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("targets", [("query", "value"), ALL, ("output",), ("all_linear",)], ids="+".join)
@pytest.mark.parametrize("which", SHAPES)
def test_at_first_nothing_changes_then_merged_and_original_are_exact(which: str, targets: tuple[str, ...]) -> None:
    base = build(which)
    net = adapted(copy.deepcopy(base), *targets)
    before = logits(base)
    close(logits(net), before)
    close(logits(plain(net, base)), before)
    for name, tensor in lora.merged(net).items():
        assert torch.equal(tensor, build_.weights_of(base)[name]), name
    fill(net)
    changed = logits(net)
    assert (changed - before).abs().max() > 1e-3
    merged = lora.merged(net)
    weights = build_.weights_of(base)
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {name: (t.shape, t.dtype) for name, t in weights.items()}  # fmt: skip
    close(logits(plain(net, base)), changed)
    with lora.original(net):
        close(logits(net), before)
    close(logits(net), changed)


@pytest.mark.parametrize("which", SHAPES)
def test_what_is_no_target_does_not_change_by_a_bit(which: str) -> None:
    base = build(which)
    net = adapted(copy.deepcopy(base), "query", "value")
    fill(net)
    before, after = build_.weights_of(base), lora.merged(net)
    targets = {f"{path}.weight": outputs for path, outputs in projections_of(base).items()}
    changed = set[str]()
    for name, tensor in before.items():
        if {"query", "value"} & set(targets.get(name, ())):
            is_conv = base.get_submodule(name.removesuffix(".weight")).__class__.__name__ == "Conv1D"
            for target, places in targets[name].items():
                ours, theirs = ((side[name].T if is_conv else side[name])[places] for side in (before, after))
                assert torch.equal(ours, theirs) == (target not in ("query", "value")), (name, target)
                changed |= {target} if not torch.equal(ours, theirs) else set()
        else:
            assert torch.equal(tensor, after[name]), name
    assert changed == {"query", "value"}


@pytest.mark.parametrize("target", ["query", "key", "value"])
@pytest.mark.parametrize("which", ["gpt2", "llama", "llama-grouped", "phi3", "gpt_neox"])
def test_attention_sees_a_change_in_that_target_alone(which: str, target: str) -> None:
    """By what the family's own code hands to attention, which knows nothing of our table."""
    seen = list[tuple[torch.Tensor, ...]]()

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        seen.append((query, key, value))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **more)

    AttentionInterface.register("watched", watched)
    base = build(which, layers=1)
    net = adapted(copy.deepcopy(base), target)
    fill(net)
    for one in (base, net, plain(net, base)):
        one.set_attn_implementation("watched")
        one(input_ids=some_ids())
    before, after, again = seen
    for name, was, now, whole in zip(("query", "key", "value"), before, after, again, strict=True):
        assert ((was - now).abs().max() < 1e-11) == (name != target), name
        close(now, whole)


def test_attention_of_bloom_sees_a_change_in_that_target_alone() -> None:
    """It has no rotations: the same added to all keys changes no probability; a value changes none either."""
    changes = {}
    for target in ("query", "key", "value"):
        base = build("bloom", layers=1)
        net = adapted(copy.deepcopy(base), target)
        split = net.transformer.h[0].self_attention.query_key_value
        with torch.no_grad():
            getattr(split, target).base_layer.bias += torch.randn(32, generator=torch.Generator().manual_seed(3))
        a, b = (one.transformer(input_ids=some_ids(), output_attentions=True) for one in (base, net))
        pairs = ((a.attentions[0], b.attentions[0]), (a.last_hidden_state, b.last_hidden_state))
        changes[target] = [bool((was - now).abs().max() > 1e-6) for was, now in pairs]
    assert changes == {"query": [True, True], "key": [False, False], "value": [False, True]}


@pytest.mark.parametrize("which", SHAPES)
def test_the_change_is_alpha_over_rank_times_b_a(which: str) -> None:
    base = build(which)
    for alpha, rslora, scale in ((None, False, 1.0), (6.0, False, 2.0), (6.0, True, 6 / 3**0.5)):
        net = adapted(copy.deepcopy(base), "value", alpha=alpha, rslora=rslora)
        fill(net)
        pairs, merged = lora.adapter_state(net), lora.merged(net)
        path, targets = next((p, t) for p, t in projections_of(base).items() if "value" in t)
        stem = f"{path}.value" if len(targets) > 1 else path
        expected = scale * pairs[f"{stem}.B"] @ pairs[f"{stem}.A"]
        change = merged[f"{path}.weight"] - base.state_dict()[f"{path}.weight"]
        is_conv = type(base.get_submodule(path)).__name__ == "Conv1D"
        close((change.T if is_conv else change)[targets["value"]], expected)


@pytest.mark.parametrize("which", SHAPES)
def test_only_pairs_get_gradients_and_at_first_only_b_moves(which: str) -> None:
    net = adapted(build(which), *ALL).train()
    logits(net).square().sum().backward()
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert len(learning) == len(lora.adapter_state(net)) and all(".lora_" in name for name in learning)
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == (name in learning), name
        if name in learning:
            assert bool(parameter.grad.any()) == (".lora_B." in name), name
    with lora.original(net):
        pass
    assert learning == {name for name, p in net.named_parameters() if p.requires_grad}


def test_a_second_attach_after_merging_goes_on_from_the_first() -> None:
    base = build("gpt2")
    first = adapted(base)
    fill(first)
    again = plain(first, base)
    second = adapted(again, "key", seed=1)
    close(logits(second), logits(first))
    fill(second, seed=1)
    close(logits(plain(second, base)), logits(second))


def test_layers_that_run_twice_with_query_and_key_swapped_are_adapted_in_both() -> None:
    base = build("bert", sharing=Sharing(swap=True))
    net = adapted(copy.deepcopy(base), "query")
    close(logits(net), logits(base))
    fill(net)
    close(logits(plain(net, base)), logits(net))


# ---------------------------------------------------------------------------------------------------------- the passes


@pytest.mark.parametrize("which", SHAPES)
def test_hidden_states_and_logits_of_chosen_positions_are_those_of_the_whole_forward(which: str) -> None:
    net = adapted(build(which))
    fill(net)
    positions_N = torch.tensor([0, 7, LENGTH, 2 * LENGTH + 3])
    whole = logits(net).flatten(0, 1)[positions_N]
    close(output_head.logits_at(net, some_ids(), positions_N), whole)
    weight, bias = output_head.head_of(net)  # type: ignore[misc]
    assert not weight.requires_grad
    close(nn.functional.linear(output_head.head_inputs(net, some_ids(), positions_N), weight, bias), whole)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_it_can_be_wrapped_for_several_workers_with_activations_made_again(which: str) -> None:
    positions_N, gradients = torch.tensor([0, 7, LENGTH]), []
    for recompute in (False, True):
        net = adapted(build(which)).train()
        fill(net)
        if recompute:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped = nn.parallel.DistributedDataParallel(net)
        for _ in range(2):  # the second forward would say that something got no gradient in the first
            output_head.head_inputs(net, some_ids(), positions_N, through=wrapped).square().sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
    assert gradients[0]
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_it_generates_as_the_merged_model_does() -> None:
    base = build("gpt2")
    net = adapted(copy.deepcopy(base))
    fill(net)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = some_ids()[:, :4]
    assert torch.equal(net.generate(ids, **how), plain(net, base).generate(ids, **how))


# ---------------------------------------------------------------------------------------------------- draws and dropout


def test_pairs_depend_on_seed_name_and_path_and_on_nothing_else() -> None:
    net = build("gpt2")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = lora.adapter_state(adapted(net, *ALL))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    fewer = lora.adapter_state(adapted(build("gpt2", layers=1), "value"))
    assert fewer.keys() < first.keys() and len(fewer) == 2
    for name, tensor in fewer.items():
        assert torch.equal(tensor, first[name])
    drawn = [name for name in first if name.endswith(".A")]
    for other in (adapted(build("gpt2"), *ALL, seed=1), adapted(build("gpt2"), *ALL, name="n")):
        assert not any(torch.equal(lora.adapter_state(other)[name], first[name]) for name in drawn)
    assert not any(first[name].any() for name in first if name.endswith(".B"))
    bound = 32**-0.5  # kaiming_uniform_ with a = sqrt(5)
    values = torch.cat([first[name].flatten() for name in drawn])
    assert values.abs().max() <= bound and values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("which", [*SHAPES, "gpt_neo"])
def test_the_bases_dropout_is_off_and_stays_off(which: str) -> None:
    """GPT-Neo reads its rates from the config at each forward."""
    if which == "gpt_neo":
        config = AutoConfig.for_model(which, vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], attention_dropout=0.5, embed_dropout=0.5, resid_dropout=0.5)  # fmt: skip
        base = build_.from_config(config).double()
    else:
        base = build(which, dropout=0.5)
    said = build_.plain_config(base.config)
    assert not torch.equal(logits(base.train()), logits(base))
    net = adapted(base)
    for _ in range(2):
        net.eval()
        quiet = logits(net)
        net.train()
        assert net.training and torch.equal(logits(net), quiet) and torch.equal(logits(net), quiet)
    assert build_.plain_config(net.config) == said


def test_dropout_of_its_own_is_before_a_and_off_when_evaluating() -> None:
    net = adapted(build("llama", dropout=0.5), dropout=0.5)
    fill(net)
    assert not torch.equal(logits(net.train()), logits(net))
    assert torch.equal(logits(net.eval()), logits(net))


# ------------------------------------------------------------------------------------------------------ types and state


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_pairs_on_weights_in_bf16_learn_in_fp32(which: str) -> None:
    base = build(which, dtype=torch.bfloat16)
    net = adapted(copy.deepcopy(base))
    assert torch.equal(logits(net), logits(base)) or which == "gpt2"  # split products may round otherwise
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    logits(net).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.requires_grad)
    fill(net)
    assert {t.dtype for t in lora.merged(net).values()} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(net).isfinite().all()


def test_state_makes_a_round_trip_and_what_does_not_fit_is_refused_by_name() -> None:
    net, other = (adapted(build("gpt2"), seed=seed) for seed in (0, 1))
    fill(net)
    state = load(save(lora.adapter_state(net)))
    assert "transformer.h.0.attn.c_attn.query.A" in state and len(state) == 8
    lora.load_adapter_state(other, state)
    assert torch.equal(logits(net), logits(other))
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn\.key\.A is None"):
        lora.load_adapter_state(adapted(build("gpt2"), *ALL), state)
    with pytest.raises(ModelError, match=r"query\.A is \(3, 32\), the model has \(4, 32\)"):
        lora.load_adapter_state(adapted(build("gpt2"), rank=4), state)


def test_whether_pairs_are_there() -> None:
    net = build()
    assert not lora.is_attached(net) and lora.is_attached(adapted(net))


def test_a_shape_without_weights_can_be_adapted_to_count_what_learns() -> None:
    config = build("gpt2").config
    with torch.device("meta"):
        net = adapted(build_.from_config(config))
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 2 * 2 * 3 * (32 + 32)


# -------------------------------------------------------------------------------------------------------------- refusals


def test_a_family_whose_projections_are_not_known_is_refused_with_its_linear_layers() -> None:
    config = AutoConfig.for_model("mpt", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4)
    with pytest.raises(ModelError) as error:
        adapted(build_.from_config(config))
    assert "model 'm' (mpt): no projection is known as query" in str(error.value)
    assert "transformer.blocks.*.attn.Wqkv" in str(error.value) and "expected targets: all_linear" in str(error.value)


@pytest.mark.parametrize("which", SHAPES)
def test_all_linear_is_every_linear_layer_below_the_head(which: str) -> None:
    base = build(which)
    below = [path for path, module in base.base_model.named_modules() if is_linear(module)]
    pairs = {name.rpartition(".")[0] for name in lora.adapter_state(adapted(copy.deepcopy(base), "all_linear"))}
    prefix = f"{base.base_model_prefix}."
    for path in below:
        assert any(pair == prefix + path or pair.startswith(f"{prefix}{path}.") for pair in pairs), path
    assert all(pair.startswith(prefix) for pair in pairs)  # none in the head


def test_a_family_without_known_projections_can_be_adapted_in_all_linear_layers() -> None:
    config = AutoConfig.for_model("mpt", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4)
    base = build_.from_config(config).double().eval()
    net = adapted(copy.deepcopy(base), "all_linear")
    assert len(lora.adapter_state(net)) == 2 * 2 * 4  # A and B of four linear layers in each of two layers
    close(logits(net), logits(base))
    fill(net)
    close(logits(plain(net, base)), logits(net))


@pytest.mark.parametrize("family", ["opt", "qwen3", "gemma2", "phi", "mistral"])
def test_families_with_usual_names_need_no_layout(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)  # fmt: skip
    base = build_.from_config(config).double().eval()
    assert {target for targets in projections_of(base).values() for target in targets} == set(ALL)
    net = adapted(copy.deepcopy(base), *ALL)
    close(logits(net), logits(base))
    fill(net)
    close(logits(plain(net, base)), logits(net))


# ---------------------------------------------------------------------------------------------------------- real weights


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real models are not here")
def test_a_real_model_is_adapted_merged_and_saved_as_a_folder(tmp_path: Path) -> None:
    how: dict[str, Any] = {"vocab_size": 512, "special_ids": {}, "length": 64}
    base = build_.build(Model(pretrained=str(STORIES)), name="m", seed=0, **how)
    prompt = torch.tensor([[1, 403, 407, 261, 378]])
    before = base(input_ids=prompt).logits
    net = adapted(base, *ALL, rank=4)
    torch.testing.assert_close(net(input_ids=prompt).logits, before)
    fill(net)
    build_.restore(build_.plain_config(net.config), lora.merged(net)).save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    after = net.eval()(input_ids=prompt).logits
    torch.testing.assert_close(again(input_ids=prompt).logits, after, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.1
    assert size_and_speed(net, length=16, is_task=False, device="cpu")["parameters"] > build_.num_parameters(again)
