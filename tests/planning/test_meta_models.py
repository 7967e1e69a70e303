"""What is counted without content is what real tensors take; and each shape is made once."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.planning.meta_models import (
    At,
    Rows,
    Shapes,
    StorageTracker,
    forward,
    reachable,
    reached_at,
    scores,
    scoring,
)
from orchestrator.study.errors import StudyError
from tests.support.shapes import LENGTH, SPECIAL, shapes, study
from tests.support.trials import FAMILIES, flow, hard, model, phase
from trainables.config import errors
from trainables.config.models import Model
from trainables.config.phase import Lora, Phase
from trainables.losses.chunked import LogitSource
from trainables.models import build, lora, output_head


def of(family: str, **more: Any) -> Model:
    return Model.model_validate(model(family, **{"layers": 2, **more}))


def real(value: Model) -> Any:
    return build.from_config(shapes().config(value, LENGTH))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("precision", "dropout"), [("fp32", 0), ("fp32", 0.1), ("bf16", 0), ("bf16", 0.1)])
def test_a_count_without_content_is_that_of_real_tensors(family: str, precision: Any, dropout: float) -> None:
    value, at = of(family, dropout=dropout), At("cpu", precision)
    net = real(value)
    for num, trained in itertools.product((1, 3), (True, False)):
        rows = Rows(num, LENGTH, 4)
        seen, counted = forward(net, rows, trained, at), shapes().forward(value, LENGTH, rows, trained=trained, at=at)
        assert (counted.kept, counted.peak) == (seen.kept, seen.peak)
        for ours, theirs in zip(counted.side, seen.side, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert shapes().scoring(value, LENGTH, rows, at=at) == scoring(net, rows, at) > 0
    assert counted.kept == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_is_what_autograd_saves(family: str, precision: Any) -> None:
    """The plain way to count: a hook on each tensor that autograd saves, weights aside."""
    net = real(of(family)).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    saved: list[Any] = []  # weak: what only the head's empty product saved goes with it

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    rows = Rows(3, LENGTH, 4)
    ids_BT = torch.zeros(rows.num, rows.length, dtype=torch.long)
    positions_N = (torch.arange(rows.num)[:, None] * rows.length + torch.arange(rows.positions)).flatten()
    own |= {tensor.untyped_storage().data_ptr() for tensor in (ids_BT, positions_N)}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        given_N = (output_head.logits_at if output_head.head_of(net) is None else output_head.head_inputs)(
            net, ids_BT, positions_N
        )
    found = {storage.data_ptr(): storage.nbytes() for ref in saved if (storage := ref()) is not None}
    found.pop(given_N.untyped_storage().data_ptr(), None)
    total = sum(found.values())
    assert forward(net, rows, True, At("cpu", precision)).kept == total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_are_linear_in_sequences(family: str, precision: Any) -> None:
    """With what all sequences share as the constant: masks, angles of positions, weights cast to bf16."""
    at, one = At("cpu", precision), shapes()
    kept = [one.forward(of(family), LENGTH, Rows(n, LENGTH, 4), trained=True, at=at).kept for n in (1, 2, 3, 9)]
    each = kept[1] - kept[0]
    assert each > 0 and kept[2] - kept[1] == each and kept[3] == kept[0] + 8 * each


def test_bf16_halves_most_of_what_a_sequence_keeps_and_adds_its_casts_of_the_weights() -> None:
    value, one = of("bert", width=64, intermediate_size=256), shapes()
    kept = {p: [one.forward(value, LENGTH, Rows(n, LENGTH, 4), trained=True, at=At("cpu", p)).kept for n in (1, 2)] for p in ("fp32", "bf16")}  # fmt: skip
    each = {p: two - first for p, (first, two) in kept.items()}
    assert 0.4 * each["fp32"] < each["bf16"] < 0.75 * each["fp32"]
    matrices = sum(
        p.numel() for name, p in one.net(value, LENGTH).named_parameters() if p.ndim == 2 and "layer" in name
    )
    assert kept["bf16"][0] - each["bf16"] >= 2 * matrices


def test_a_gpu_keeps_what_is_dropped_in_bytes_and_never_the_weights_of_attention() -> None:
    rows, one = Rows(2, LENGTH, 4), shapes()
    taken = {(d, p): one.forward(of("bert", dropout=p), LENGTH, rows, trained=True, at=At(d)).kept for d in ("cpu", "cuda") for p in (0, 0.1)}  # fmt: skip
    assert taken["cuda", 0] == taken["cpu", 0]
    hidden = rows.num * LENGTH * 16  # bytes of one mask: embeddings, and twice in each layer
    assert taken["cuda", 0.1] - taken["cuda", 0] >= 5 * hidden and taken["cuda", 0.1] < taken["cpu", 0.1]


TERMS = {
    "hard": {"h": hard("student")},
    **{kind: {"h": hard("student"), "f": flow("teacher", "student", kind, temperature=2)} for kind in ("forward_kl", "reverse_kl", "jeffreys", "jsd")},
}  # fmt: skip


@pytest.mark.parametrize("kind", TERMS)
def test_losses_without_content_take_what_real_ones_take(kind: str) -> None:
    value = Phase.model_validate(phase("student", TERMS[kind]))
    names = ["student"] if kind == "hard" else ["student", "teacher"]

    def count(num: int, device: str, dtype: torch.dtype = torch.float32) -> int:
        def side() -> LogitSource:
            hidden_ND = torch.zeros(num, 16, device=device, dtype=dtype)
            return LogitSource(hidden_ND, torch.zeros(5000, 16, device=device, dtype=dtype), None)

        return scores(value, {(name, "main"): side() for name in names}, At("cpu"))

    assert count(6, "meta") == count(6, "cpu") and count(6, "meta", torch.bfloat16) == count(6, "cpu", torch.bfloat16)
    one = 6 * 5000 * 4
    assert count(6, "meta") >= (2 + len(names)) * one  # logits, log-probabilities, a gradient
    two, three = count(10_000, "meta") - count(5_000, "meta"), 5_000 * 16 * 4 * 3 * len(names)
    assert 0 < two <= three  # beyond a chunk only what the head reads grows, and its gradient: no logits


def test_a_task_is_counted_with_a_head_of_its_own() -> None:
    one, at = shapes(), At("cpu")
    for num_labels in (1, 3):
        rows = Rows(2, LENGTH, 1, num_labels)
        taken = one.forward(of("bert"), LENGTH, rows, trained=True, at=at)
        assert taken.side.hidden_ND.shape == (2, num_labels) and taken.side.weight_VD is None
        net = build.from_config(one.config(of("bert"), LENGTH), num_labels)
        seen = forward(net, rows, True, at)
        assert (taken.kept, taken.peak) == (seen.kept, seen.peak)
        assert one.scoring(of("bert"), LENGTH, rows, at=at) == scoring(net, rows, at) > 0


def test_what_lives_is_counted_and_what_is_gone_is_not() -> None:
    known = torch.zeros(100)
    with StorageTracker([known]) as live:
        a = known + 1
        b = a[:10].view(2, 5)  # no storage of its own
        assert (live.now, live.peak) == (400, 400)
        del a
        assert live.now == 400
        del b
        assert (live.now, live.peak) == (0, 400)


def test_each_shape_is_made_once_and_has_no_content() -> None:
    one, value = Shapes(160, SPECIAL), of("modernbert")
    copied = value.model_copy(
        update={"init": Model.model_validate(model(init={"kind": "random", "std": "width"})).init}
    )
    assert one.net(value, LENGTH) is one.net(copied, LENGTH) is not one.net(value, LENGTH + 8)
    assert all(tensor.is_meta for tensor in one.net(value, LENGTH).parameters())
    at = (Rows(2, LENGTH, 4), At())
    assert one.forward(value, LENGTH, at[0], trained=True, at=at[1]) is one.forward(copied, LENGTH, at[0], trained=True, at=at[1])  # fmt: skip
    assert one.num_parameters(value, LENGTH) == build.num_parameters(real(value))
    assert one.num_tied(value, LENGTH) == 160 * 16 and one.num_tied(of("llama"), LENGTH) == 0


def test_pretrained_weights_are_counted_by_their_config_and_in_fp32(tmp_path: Path) -> None:
    real(of("llama", layers=3)).bfloat16().save_pretrained(tmp_path)
    found = shapes().net(Model(pretrained=str(tmp_path)), LENGTH)
    assert {tensor.dtype for tensor in found.parameters()} == {torch.float32}
    pretrained = Model(pretrained=str(tmp_path))
    assert shapes().num_parameters(pretrained, LENGTH) == shapes().num_parameters(of("llama", layers=3), LENGTH)
    with pytest.raises(errors.ModelError, match="no model at"):
        shapes().config(Model(pretrained=str(tmp_path / "nowhere")), LENGTH)


SIZES = {"small": {"models.student.layers": 1}, "large": {"models.student.layers": 3}}


def test_reachable_are_arms_the_ends_of_ranges_at_any_sizes_and_what_points_are_compared_with() -> None:
    assert [one.name for one in reachable(study())] == ["the trial"]
    searched = study(
        arms={"alone": {"phases.distil.terms.teacher_to_student.weight": 0}},
        vary={
            "sizes": {"choice": SIZES},
            "phases.distil.optimizer.lr": {"float": [1e-3, 1e-2]},
            "phases.distil.batch": {"choice": [8, 16]},
        },
        exclude=[{"sizes": "small", "phases.distil.batch": 16}],
        objective={"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min", "minus": "alone"},
    )
    found = {one.name: one for one in reachable(searched)}
    assert "arm alone" in found and "point sizes small, lr 0.001" in found and "point sizes large, lr 0.01" in found
    assert found["arm alone at sizes large"].spec.models["student"].layers == 3
    assert "teacher" not in found["arm alone at sizes large"].spec.models  # pruned
    assert "point sizes large, batch 16" in found and "point sizes small, batch 16" not in found
    assert reached_at(searched, found["point sizes large, batch 16"].point | {"sizes": "small"}) is None


def test_no_model_is_there_by_an_unknown_family() -> None:
    with pytest.raises(errors.ModelError, match="no language model of family"):
        shapes().net(of("nonsense"), LENGTH)
    with pytest.raises(StudyError):
        list(reachable(study(arms={"wrong": {"models.student.layers": 0}})))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["full", Lora(kind="lora", rank=2)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_rows_pairs_and_narrow_weights_are_counted_as_real_ones(precision: Any, how: Any, dtype: str) -> None:
    value, at = of("llama", dtype=dtype, layers=3), At("cpu", precision)
    net = build.build(value, name="m", seed=0, vocab_size=160, special_ids=SPECIAL, length=LENGTH)
    if how != "full":
        lora.attach(net, how, name="m", seed=0)
    rows = Rows(2, LENGTH, 6, packed=True)
    for trained in (True, False):
        counted = shapes().forward(value, LENGTH, rows, trained=trained, at=at, how=how)
        seen = forward(net, rows, trained, at)
        assert (counted.kept, counted.peak) == (seen.kept, seen.peak)
    assert shapes().scoring(value, LENGTH, rows, at=at, how=how) == scoring(net, rows, at)
    alone = shapes().forward(value, LENGTH, Rows(2, LENGTH, 6), trained=True, at=at, how=how)
    packed = shapes().forward(value, LENGTH, rows, trained=True, at=at, how=how)
    assert packed.kept >= alone.kept + 2 * LENGTH**2  # who sees whom


def test_what_is_made_again_is_not_kept() -> None:
    value, rows, at = of("llama", layers=6), Rows(2, LENGTH, 4), At("cpu")
    net = real(value)
    whole = forward(net, rows, True, at)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    least = forward(net, rows, True, at)
    counted = shapes().forward(value, LENGTH, rows, trained=True, at=at, recompute=True)
    assert counted.kept == least.kept + (whole.kept - least.kept) // 6 < whole.kept / 3
    inputs = 2 * LENGTH * 16 * 4  # bytes of what goes into a layer
    assert least.kept >= 6 * inputs


def test_a_token_of_a_reply_keeps_keys_and_values_of_each_layer() -> None:
    grouped = of("llama", layers=3, width=32, heads=4, config={"num_key_value_heads": 2})
    assert shapes().cached(grouped, LENGTH, at=At()) == 2 * 3 * 2 * 8 * 4
    narrow = grouped.model_copy(update={"dtype": "bf16"})
    assert shapes().cached(narrow, LENGTH, at=At()) == 2 * 3 * 2 * 8 * 2
    assert shapes().cached(of("gpt2"), LENGTH, at=At("cuda", "bf16")) == 2 * 2 * 16 * 2
