"""Activations counted without content are those that autograd saves of real tensors; and each model is built once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from orchestrator.planning.meta_models import Activations, RowShape, Shapes, count_activations
from tests.support.shapes import LENGTH, SPECIAL, shapes
from tests.support.trials import FAMILIES, model
from trainables.config.errors import ModelError
from trainables.config.models import Model
from trainables.config.phase import How, Lora
from trainables.models import build, lora, output_head

ROW = RowShape(LENGTH, 4)


def model_of(family: str, **more: Any) -> Model:
    return Model.model_validate(model(family, **{"layers": 2, **more}))


def real(value: Model) -> Any:
    return build.build(value, name="m", seed=0, vocab_size=160, special_ids=SPECIAL, length=LENGTH)


def counted(value: Model, *, row: RowShape = ROW, how: How = "full", precision: Any = "fp32", drops: bool = True) -> Activations:  # fmt: skip
    return shapes().activations(value, LENGTH, row, how=how, precision=precision, drops=drops)


def saved_bytes(net: Any, num: int, row: RowShape = ROW, precision: str = "fp32") -> int:
    """What autograd saves of real tensors, weights and inputs aside."""
    net.train()
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids_BT = torch.full((num, row.length), 7)
    positions_N = torch.arange(num * row.positions)
    own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers(), ids_BT, positions_N]}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        if row.num_labels is None:
            kept = output_head.logits_at(net, ids_BT, positions_N)
        else:
            kept = output_head.class_logits(net, ids_BT, torch.ones_like(ids_BT), None)
    assert kept.requires_grad
    return sum(storage.nbytes() for where, storage in saved.items() if where not in own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("precision", "dropout"), [("fp32", 0), ("fp32", 0.1), ("bf16", 0), ("bf16", 0.1)])
def test_activations_without_content_are_within_a_tenth_of_real_ones(
    family: str, precision: str, dropout: float
) -> None:
    """Of fake tensors transformers always makes the mask of attention; of real ones only where the mask hides tokens."""
    value = model_of(family, dropout=dropout, width=64, intermediate_size=256)
    net, found = real(value), counted(value, precision=precision)
    for num in (1, 4):
        assert found.kept(num) == pytest.approx(saved_bytes(net, num, precision=precision), rel=0.1)


@pytest.mark.parametrize("how", ["full", Lora(kind="lora", rank=2)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pairs_and_narrow_weights_keep_less(how: Any, dtype: str) -> None:
    value = model_of("llama", dtype=dtype, width=64, intermediate_size=256)
    net = real(value)
    if how != "full":
        lora.attach(net, how, name="m", seed=0)
    found = counted(value, how=how)
    assert found.kept(3) == pytest.approx(saved_bytes(net, 3), rel=0.15)
    assert (how, dtype) == ("full", "fp32") or found.kept(3) < counted(model_of("llama", width=64, intermediate_size=256)).kept(3)  # fmt: skip


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_task_is_counted_with_a_head_of_its_own(num_labels: int) -> None:
    row, value = RowShape(LENGTH, 1, num_labels), model_of("bert", width=64)
    net = build.from_config(shapes().config(value, LENGTH), num_labels)
    assert counted(value, row=row).kept(2) == pytest.approx(saved_bytes(net, 2, row), rel=0.1)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mixture_of_experts_is_estimated_from_its_config(family: str, precision: Any) -> None:
    sizes: dict[str, Any] = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    own = {"moe_intermediate_size": 64, "num_experts": 8} if family == "qwen3_moe" else {"num_local_experts": 8}
    config = AutoConfig.for_model(family, vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, pad_token_id=0, eos_token_id=1, **sizes, **own)  # fmt: skip
    with torch.device("meta"):
        net = build.from_config(config)
    found = count_activations(net, ROW, precision=precision, drops=True)
    seen = saved_bytes(build.from_config(config), 4, precision=precision)
    assert found.kept(4) == pytest.approx(seen, rel=0.25)


def test_gradient_checkpointing_keeps_inputs_of_layers_and_one_layer() -> None:
    found = counted(model_of("llama", layers=6))
    inputs = 6 * 2 * LENGTH * 16 * 4  # bytes that go into the layers
    again = found.kept(2, gradient_checkpointing=True)
    assert again == found.fixed + inputs + found.one_layer(2) < found.kept(2) / 2


def test_a_gpu_keeps_no_weights_of_attention_where_dropout_asks_for_them() -> None:
    value = model_of("bert", dropout=0.1)
    assert counted(value, drops=False).kept(2) == counted(model_of("bert")).kept(2) < counted(value).kept(2)


def test_each_model_is_built_once_and_has_no_content() -> None:
    one, value = Shapes(160, SPECIAL), model_of("modernbert")
    init = Model.model_validate(model(init={"kind": "random", "std": "width"})).init
    copied = value.model_copy(update={"init": init})
    assert one.net(value, LENGTH) is one.net(copied, LENGTH) is not one.net(value, LENGTH + 8)
    assert all(tensor.is_meta for tensor in one.net(value, LENGTH).parameters())
    assert one.num_parameters(value, LENGTH) == build.num_parameters(real(value))
    assert one.num_bytes(value.model_copy(update={"dtype": "bf16"}), LENGTH) == 2 * one.num_parameters(value, LENGTH)


def test_pretrained_weights_are_counted_by_their_config_and_in_fp32(tmp_path: Path) -> None:
    real(model_of("llama", layers=3)).bfloat16().save_pretrained(tmp_path)
    pretrained = Model(pretrained=str(tmp_path))
    found = shapes().net(pretrained, LENGTH)
    assert {tensor.dtype for tensor in found.parameters()} == {torch.float32}
    assert shapes().num_parameters(pretrained, LENGTH) == shapes().num_parameters(model_of("llama", layers=3), LENGTH)
    with pytest.raises(ModelError, match="no weights at"):
        shapes().config(Model(pretrained=str(tmp_path / "nowhere")), LENGTH)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ModelError, match="no language model of family"):
        shapes().net(model_of("nonsense"), LENGTH)
