"""Layers that run more than once: what runs when, one set of weights, and the plain BERT that does the same."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from orchestrator.planning.meta_models import RowShape, count_activations
from trainables.config.models import Depth, Random, Sharing, Width
from trainables.evaluation.model_size import size_and_speed
from trainables.models import build as build_
from trainables.models import initialise, remap
from trainables.models.shared_bert import (
    ORDERS,
    SharedBertConfig,
    SharedBertForMaskedLM,
    SharedBertModel,
    SharingError,
    check,
    execution,
    shared,
    unrolled,
)

VOCABULARY, LENGTH = 50, 12
EVERY = [(order, swap) for order in ORDERS for swap in (False, True)]


def plain_config(num_layers: int = 2, **more: Any) -> BertConfig:
    return BertConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": LENGTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **more,
        }
    )


def build(
    order: str = "twice", swap: bool = True, num_layers: int = 2, auto: Any = AutoModelForMaskedLM, **more: Any
) -> Any:
    """With weights as far from their start as trained ones: biases and gains that matter."""
    net = auto.from_config(shared(plain_config(num_layers, **more), order, swap))
    return stirred(net).eval()


@torch.no_grad()
def stirred(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def batch(num: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Sequences of which all but the first end in padding."""
    ids_BT = torch.randint(5, VOCABULARY, (num, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask_BT = (torch.arange(LENGTH) < LENGTH - 3 * torch.arange(num)[:, None]).long()
    return {"input_ids": ids_BT * mask_BT, "attention_mask": mask_BT}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def backward(net: Any, through: Any = None) -> dict[str, Tensor]:
    (through or net)(**batch()).logits.square().mean().backward()
    return gradients(net)


# ------------------------------------------------------------------------------------------------------------ execution


@pytest.mark.parametrize(
    ("order", "num_layers", "runs"),
    [
        ("twice", 3, "1 2 3 1' 2' 3'"),
        ("each_twice", 3, "1 1' 2 2' 3 3'"),
        ("mirror", 3, "1 2 3 3' 2' 1'"),
        ("upper_twice", 6, "1 2 3 4 5 6 4' 5' 6'"),
        ("lower_twice", 6, "1 2 3 4 5 6 1' 2' 3'"),
        ("twice", 1, "1 1'"),
        ("upper_twice", 2, "1 2 2'"),
    ],
)
def test_what_runs_when(order: str, num_layers: int, runs: str) -> None:
    swapped = tuple((int(run.strip("'")) - 1, run.endswith("'")) for run in runs.split())
    assert execution(order, num_layers, True) == swapped
    assert execution(order, num_layers, False) == tuple((layer, False) for layer, _ in swapped)


def test_an_order_that_cannot_be_is_refused() -> None:
    assert get_args(Sharing.model_fields["order"].annotation) == ORDERS and len(ORDERS) == 5
    for order in ("upper_twice", "lower_twice"):
        with pytest.raises(SharingError, match=f"order {order} needs an even number of layers; there are 3"):
            execution(order, 3, True)
    with pytest.raises(SharingError, match="no order 'thrice' of layers; expected twice, each_twice"):
        execution("thrice", 2, True)
    with pytest.raises(SharingError, match="needs an even number"):
        shared(plain_config(3), "upper_twice", True)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GPT2Config(), "a gpt2 fuses query and key"),
        (LlamaConfig(num_attention_heads=4, num_key_value_heads=2), "a llama of 4 query heads and 2 key heads"),
        (RobertaConfig(), "a roberta has no form with shared layers here; expected bert"),
        (plain_config(is_decoder=True), "encoders only"),
    ],
)
def test_who_cannot_swap_query_and_key_is_refused_by_name(config: Any, why: str) -> None:
    with pytest.raises(SharingError, match=why):
        check(config)
    check(plain_config())


def test_a_config_says_its_depth_and_keeps_its_shape() -> None:
    config = shared(plain_config(4, hidden_act="relu"), "upper_twice", True)
    assert (config.num_hidden_layers, config.num_executed_layers, config.hidden_act) == (4, 6, "relu")
    again = SharedBertConfig.from_dict(config.to_dict())
    assert (again.layer_order, again.layer_swap, again.model_type) == ("upper_twice", True, "shared_bert")
    assert shared(config, "mirror", False).layer_order == "mirror"


# -------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(("order", "swap"), EVERY)
def test_the_unrolled_bert_does_the_same(order: str, swap: bool) -> None:
    net = build(order, swap, num_layers=4).double()
    plain = unrolled(net)
    assert type(plain) is BertForMaskedLM and plain.config.model_type == "bert" and plain.dtype == torch.float64
    ours, theirs = (model(**batch(), output_hidden_states=True) for model in (net, plain))
    assert len(ours.hidden_states) == net.config.num_executed_layers + 1 == len(theirs.hidden_states)
    for mine, other in zip((*ours.hidden_states, ours.logits), (*theirs.hidden_states, theirs.logits), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    other_way = build(order, not swap, num_layers=4).double()
    assert not torch.allclose(other_way(**batch()).logits, ours.logits, atol=1e-3)  # what is compared is not blind


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_trunks_and_classifiers_unroll_too(auto: Any) -> None:
    net = build(auto=auto, num_labels=4).double()
    plain = unrolled(net)
    assert type(plain) is (BertModel if auto is AutoModel else BertForSequenceClassification) and not plain.training
    for mine, other in zip(net(**batch()).to_tuple(), plain(**batch()).to_tuple(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    bare = SharedBertModel(net.config, add_pooling_layer=False)
    assert unrolled(bare).pooler is None


def test_unrolling_touches_no_ones_draws_and_shares_nothing() -> None:
    net = build()
    state = torch.get_rng_state()
    plain = unrolled(net)
    assert torch.equal(torch.get_rng_state(), state)
    storages = [parameter.data_ptr() for parameter in plain.parameters()]
    assert len(set(storages)) == len(storages) and not set(storages) & {p.data_ptr() for p in net.parameters()}


def test_the_swapped_run_transposes_the_scores() -> None:
    """score_ij of the further run is score_ji of the first on the same input, biases included."""
    net = build("twice", True, 1, attn_implementation="eager").double()
    first, again = (layer.attention.self for layer in net.bert.encoder.executed)
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    query, key = (f(x_BTD).view(2, 5, 2, 8).transpose(1, 2) for f in (first.query, first.key))
    scores_BHTT = query @ key.transpose(-1, -2) / 8**0.5
    for run, scores in ((first, scores_BHTT), (again, scores_BHTT.transpose(-1, -2))):
        torch.testing.assert_close(run(x_BTD)[1], scores.softmax(-1), rtol=0, atol=1e-12)
    assert not torch.allclose(scores_BHTT, scores_BHTT.transpose(-1, -2), atol=0.1)


def test_hidden_states_and_attentions_are_of_each_run_and_count_from_the_end() -> None:
    net = build("mirror", True, 2, attn_implementation="eager")
    every = net(**batch(), output_hidden_states=True, output_attentions=True)
    assert len(every.hidden_states) == 5 and len(every.attentions) == 4
    last = net(**batch(), output_hidden_states=[-1, 2]).hidden_states
    assert [state is not None for state in last] == [False, False, True, False, True]
    assert torch.equal(last[-1], every.hidden_states[-1])


def test_each_run_has_hooks_of_its_own_in_order() -> None:
    net, seen = build("each_twice", True, 2), list[int]()
    for at, layer in enumerate(net.bert.encoder.executed):
        layer.register_forward_hook(lambda *_, at=at: seen.append(at))
    net(**batch())
    assert seen == [0, 1, 2, 3]


def test_a_projection_that_is_replaced_is_so_in_every_run() -> None:
    net = build("twice", True, 2).double()
    before = net(**batch()).logits
    projection = net.bert.encoder.layer[0].attention.self.query
    net.bert.encoder.layer[0].attention.self.query = nn.Sequential(projection, nn.Identity())
    assert torch.equal(net(**batch()).logits, before)
    calls = []
    net.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: calls.append(1))
    net(**batch())
    assert len(calls) == 2


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("order", "num_layers"), [(o, n) for o in ORDERS for n in (1, 2, 3, 6) if n % 2 == 0 or not o.endswith("er_twice")]
)
def test_sharing_adds_no_parameter_and_no_name(order: str, num_layers: int) -> None:
    with torch.device("meta"):
        net, plain = (
            SharedBertForMaskedLM(shared(plain_config(num_layers), order, True)),
            BertForMaskedLM(plain_config(num_layers)),
        )
    assert build_.num_parameters(net) == net.num_parameters() == build_.num_parameters(plain)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
def test_bert_base_has_as_many_parameters_as_the_protocol_says(num_layers: int) -> None:
    with torch.device("meta"):
        net = SharedBertModel(shared(BertConfig(num_hidden_layers=num_layers), "twice", True), add_pooling_layer=False)
    assert net.num_parameters() == 23_837_184 + 7_087_872 * num_layers


@pytest.mark.parametrize("order", ["twice", "each_twice", "mirror"])
@pytest.mark.parametrize("init", [Random(), Random(std="width", positions="sinusoid")], ids=["family", "width"])
def test_initial_weights_are_those_of_a_plain_bert(order: str, init: Random) -> None:
    net, plain = SharedBertForMaskedLM(shared(plain_config(3), order, True)), BertForMaskedLM(plain_config(3))
    for model in (net, plain):
        initialise.initialise(model, init, name="student", seed=5)
    ours, theirs = net.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_of_a_plain_bert_load_and_go_back() -> None:
    net, plain = build(), stirred(BertForMaskedLM(plain_config()))
    assert not net.load_state_dict(build_.weights_of(plain), strict=False).unexpected_keys
    net.load_state_dict(plain.state_dict(), strict=True)
    back = BertForMaskedLM(plain_config())
    back.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(back.eval()(**batch()).logits, plain.eval()(**batch()).logits)
    assert list(build_.weights_of(net)) == list(build_.weights_of(plain))


@pytest.mark.parametrize(
    ("depth", "width"), [("first", None), ("every_other", None), ("first", "select"), ("first", "prefix")]
)
def test_a_remap_from_a_plain_bert_reaches_all_runs(depth: Depth, width: Width | None) -> None:
    """The shared student gets what a plain one gets, name by name."""
    more = {} if width is None else {"hidden_size": 8, "intermediate_size": 12}
    teacher = stirred(BertForMaskedLM(plain_config(4)))
    net, plain = build(**more), BertForMaskedLM(plain_config(2, **more))
    plain.load_state_dict(net.state_dict())
    for target in (net, plain):
        left = remap.apply(teacher, target, remap.depth_plan(depth, 4, 2), width)
        assert not [name for name in left if "layer" in name]
    ours, theirs = net.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.testing.assert_close(unrolled(net)(**batch()).logits, net(**batch()).logits, rtol=0, atol=1e-5)


def test_a_copy_is_whole_and_apart() -> None:
    net = build("mirror")
    twin = copy.deepcopy(net)
    before = net(**batch()).logits
    assert torch.equal(twin(**batch()).logits, before)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(twin(**batch()).logits, before)
    with torch.no_grad():
        twin.bert.encoder.layer[0].attention.self.key.weight.zero_()
    runs = twin.bert.encoder.executed
    assert all(not p.any() for p in (runs[0].attention.self.key.weight, runs[-1].attention.self.query.weight))


def test_a_pickle_of_the_state_and_a_move_reach_all_runs() -> None:
    net, file = build(), io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = AutoModelForMaskedLM.from_config(net.config).eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(**batch()).logits, net(**batch()).logits)
    moved = other.to(torch.bfloat16)
    assert {run.attention.self.query.weight.dtype for run in moved.bert.encoder.executed} == {torch.bfloat16}
    with torch.device("meta"):
        empty = SharedBertForMaskedLM(net.config)
    assert empty(torch.zeros(2, 4, dtype=torch.long, device="meta")).logits.shape == (2, 4, VOCABULARY)


RELOAD = """
import sys, torch
from transformers import AutoModelForMaskedLM
import trainables.models.shared_bert
net = AutoModelForMaskedLM.from_pretrained(sys.argv[1]).eval()
torch.save({"weights": net.state_dict(), "logits": net(**torch.load(sys.argv[2], weights_only=True)).logits}, sys.argv[3])
"""


def test_a_saved_model_is_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    net = build("mirror", True, 3)
    net.save_pretrained(tmp_path / "net")
    with safe_open(tmp_path / "net" / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert sum(torch.Size(shape).numel() for shape in stored.values()) == build_.num_parameters(net)
    assert not [name for name in stored if "again" in name]
    torch.save(batch(), tmp_path / "batch")
    told = [str(tmp_path / name) for name in ("net", "batch", "found")]
    subprocess.run(
        [sys.executable, "-c", RELOAD, *told], check=True, cwd=Path(__file__).parents[2], capture_output=True
    )
    found = torch.load(tmp_path / "found", weights_only=True)
    ours = net.state_dict()
    assert ours.keys() == found["weights"].keys() and all(torch.equal(ours[n], t) for n, t in found["weights"].items())
    torch.testing.assert_close(found["logits"], net(**batch()).logits, rtol=0, atol=1e-5)  # its threads may differ
    unrolled(net).save_pretrained(tmp_path / "plain")
    plain = BertForMaskedLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(**batch()).logits, net(**batch()).logits, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(
    ("order", "swap"), [("twice", True), ("twice", False), ("each_twice", True), ("upper_twice", True)]
)
def test_gradients_add_up_over_the_runs(order: str, swap: bool) -> None:
    """Against finite differences, at entries of query and key that both runs read."""
    net = build(order, swap).double()
    target = torch.randn(3, LENGTH, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss() -> Tensor:
        return (net(**batch()).logits * target).mean()

    loss().backward()
    grads, generator = gradients(net), torch.Generator().manual_seed(3)
    for layer in range(2):
        for name in ("query.weight", "query.bias", "key.weight", "key.bias"):
            path = f"bert.encoder.layer.{layer}.attention.self.{name}"
            flat, grad = net.get_parameter(path).data.view(-1), grads[path].view(-1)
            for at in torch.randint(len(flat), (3,), generator=generator).tolist():
                with torch.no_grad():
                    before, values = flat[at].item(), []
                    for step in (1e-5, -1e-5):
                        flat[at] = before + step
                        values.append(loss().item())
                    flat[at] = before
                assert grad[at].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9), path
    biases = [grads[f"bert.encoder.layer.1.attention.self.{name}.bias"].abs().max().item() for name in ("query", "key")]
    assert biases[0] > 1e-6 and (biases[1] > 1e-6) == swap  # a key's bias moves nothing, unless it is a query's


def test_gradients_are_the_sums_of_those_of_the_unrolled_layers() -> None:
    net = build("twice", True).double()
    ours, theirs = backward(net), backward(unrolled(net))
    for layer in range(2):
        mine, first, second = (f"bert.encoder.layer.{at}." for at in (layer, layer, layer + 2))
        for name, other in (("query", "key"), ("key", "query"), ("value", "value")):
            name, other = (f"attention.self.{which}.weight" for which in (name, other))
            torch.testing.assert_close(ours[mine + name], theirs[first + name] + theirs[second + other])
        name = "output.LayerNorm.weight"
        torch.testing.assert_close(ours[mine + name], theirs[first + name] + theirs[second + name])


def test_checkpoints_of_activations_change_no_gradient() -> None:
    net = build("each_twice").double().train()
    expected, calls = backward(net), []
    net.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(run.gradient_checkpointing and run.training for run in net.bert.encoder.executed)
    net.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(backward(net), expected)
    assert len(calls) == 4  # two runs, each again in the backward


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ranks_exchange_each_shared_gradient_once_and_whole(one_rank: None) -> None:
    net = build("mirror").double()
    expected = backward(net)
    wrapped = DistributedDataParallel(net)
    for _ in range(2):  # it refuses the second forward if a gradient did not come by it
        torch.testing.assert_close(backward(net, wrapped), expected)


def test_every_run_drops_out_in_training_only() -> None:
    net = build(attention_probs_dropout_prob=0.5)
    assert torch.equal(net(**batch()).logits, net(**batch()).logits)
    net.train()
    runs = net.bert.encoder.executed
    x_BTD = torch.randn(1, 4, 16)
    for run in runs:
        assert not torch.equal(run.attention.self(x_BTD)[0], run.attention.self(x_BTD)[0])


# ---------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("order", ORDERS)
def test_every_run_is_computed_and_counted(order: str) -> None:
    net = build(order)
    counts = []
    for model in (net, unrolled(net)):
        with FlopCounterMode(display=False) as counter:
            backward(model)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_trial_says_of_shared_layers_what_they_weigh_once_and_what_all_runs_take() -> None:
    """Equal parameters to as many layers, equal FLOPs to as many as run: beside both stands the time."""
    nets = build("twice"), BertForMaskedLM(plain_config()), BertForMaskedLM(plain_config(4))
    ours, plain, deep = (size_and_speed(net, length=LENGTH, is_task=False, device="cpu") for net in nets)
    assert ours["parameters"] == plain["parameters"] < deep["parameters"]
    assert ours["forward_flops"] == deep["forward_flops"] > plain["forward_flops"]
    assert all(found["latency_ms"] > 0 for found in (ours, plain, deep))


def test_the_plan_sees_the_memory_of_every_run() -> None:
    with torch.device("meta"):
        net, plain = SharedBertForMaskedLM(shared(plain_config(), "twice", True)), BertForMaskedLM(plain_config(4))
    row = RowShape(LENGTH, positions=2)
    assert count_activations(net, row, precision="fp32", drops=True) == count_activations(plain, row, precision="fp32", drops=True)  # fmt: skip
