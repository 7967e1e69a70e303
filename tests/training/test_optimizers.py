"""Optimizers: groups by model, AdamW as it always was, other kinds beside it, state that survives a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from tests.support.trials import hard, phase
from trainables.config.errors import ModelError
from trainables.config.phase import Phase
from trainables.training import optimizers
from trainables.training.optimizers import JointOptimizer, check_optimizers, make_optimizer

KINDS = ("adamw", "adafactor", "adamw_8bit")


def spec(**kinds: str) -> Phase:
    """A phase in which each named model learns by a kind of its own."""
    rules = {name: {"kind": kind, "lr": 1e-2 * (i + 1), "weight_decay": 0.1, "betas": (0.8, 0.95)} for i, (name, kind) in enumerate(kinds.items())}  # fmt: skip
    return Phase(**phase(tuple(kinds), {f"{name}_hard": hard(name) for name in kinds}, optimizer=rules))


def parameters(names: Any, dtype: torch.dtype = torch.float32) -> dict[str, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return {name: [Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in ((80, 64), (64,))] for name in names}  # fmt: skip


def go(optimizer: Any, on: Mapping[str, list[Parameter]], steps: range) -> None:
    """Steps towards fixed random values, with gradients that depend on the step alone and on the weights."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for tensors in on.values():
            for p in tensors:
                p.grad = (p.detach() + torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def flat(on: Mapping[str, list[Parameter]]) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for tensors in on.values() for p in tensors])


def needs(*kinds: str) -> None:
    if "adamw_8bit" in kinds:
        pytest.importorskip("bitsandbytes", reason="the extra `eightbit` is not installed")


def test_adamw_alone_is_the_one_adamw_of_all_models() -> None:
    on, reference = parameters("ab"), parameters("ab")
    ours = make_optimizer(spec(a="adamw", b="adamw"), on)
    assert type(ours) is torch.optim.AdamW
    groups = [(g["model"], g["lr"], g["betas"], g["eps"], g["weight_decay"], len(g["params"]), g["fused"]) for g in ours.param_groups]  # fmt: skip
    assert groups == [
        (name, lr, (0.8, 0.95), 1e-8, decay, 1, True) for name, lr in (("a", 0.01), ("b", 0.02)) for decay in (0.1, 0.0)
    ]
    theirs = torch.optim.AdamW([{"params": [p], "lr": lr, "weight_decay": 0.1 * (p.ndim > 1), "betas": (0.8, 0.95)} for lr, name in ((0.01, "a"), (0.02, "b")) for p in reference[name]], fused=True)  # fmt: skip
    go(ours, on, range(5))
    go(theirs, reference, range(5))
    assert torch.equal(flat(on), flat(reference))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_moves_by_about_lr_and_towards_the_goal(kind: str) -> None:
    """`lr` means the same in all: the first update of AdamW is lr in each number, Adafactor's has that root mean square."""
    needs(kind)
    on = parameters("a")
    optimizer = make_optimizer(spec(a=kind).model_copy(), on)
    assert {group["model"] for group in optimizer.param_groups} == {"a"}
    before = flat(on)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-3, 0.0
    go(optimizer, on, range(1))
    assert (flat(on) - before).square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.05)
    for group in optimizer.param_groups:
        group["lr"] = 3e-2
    go(optimizer, on, range(1, 120))
    assert flat(on).abs().mean() < 0.5 * before.abs().mean()


@pytest.mark.parametrize("kind", ["adafactor", "adamw_8bit"])
def test_other_kinds_keep_less_than_adamw_does(kind: str) -> None:
    needs(kind)
    on = parameters("a")
    optimizer = make_optimizer(spec(a=kind), on)
    go(optimizer, on, range(1))
    held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))  # fmt: skip
    assert held < 0.4 * 2 * 4 * flat(on).numel()  # AdamW: two numbers of four bytes for each weight


def test_adafactor_does_not_depend_on_the_size_of_the_weights() -> None:
    """LoRA's B starts at zero: a step relative to its size would be nothing."""
    on = {"a": [Parameter(torch.zeros(8, 4))]}
    optimizer = make_optimizer(spec(a="adafactor"), on)
    go(optimizer, on, range(1))
    assert flat(on).square().mean().sqrt().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("kinds", [("adamw", "adafactor"), ("adafactor", "adamw"), ("adamw_8bit", "adafactor", "adamw")], ids="+".join)  # fmt: skip
def test_kinds_beside_each_other_do_what_each_does_alone(kinds: tuple[str, ...]) -> None:
    needs(*kinds)
    named = dict(zip("abc", kinds, strict=False))
    together, alone = parameters(named), parameters(named)
    several = make_optimizer(spec(**named), together)
    assert isinstance(several, JointOptimizer)
    assert list(dict.fromkeys(group["model"] for group in several.param_groups)) == list(named)
    go(several, together, range(3))
    for group in several.param_groups:  # as the loop sets the schedule
        group["lr"] = 0.5 * group["lr"]
    go(several, together, range(3, 5))
    for name in named:
        single = make_optimizer(spec(**named).model_copy(update={"train": {name: "full"}}), {name: alone[name]})
        for steps, factor in ((range(3), 1.0), (range(3, 5), 0.5)):
            for group in single.param_groups:
                group["lr"] *= factor
            with_draws_of_others = {n: alone[n] if n == name else parameters(named)[n] for n in named}
            go(single, with_draws_of_others, steps)
    assert torch.equal(flat(together), flat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kinds", [(kind,) for kind in KINDS] + [("adamw", "adafactor")], ids="+".join)
def test_a_run_goes_on_from_its_state_bit_by_bit(kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    needs(*kinds)
    named = dict(zip("ab", kinds, strict=False))
    whole, first = parameters(named, dtype), parameters(named, dtype)
    go(make_optimizer(spec(**named), whole), whole, range(6))
    optimizer = make_optimizer(spec(**named), first)
    go(optimizer, first, range(3))
    file = BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": first}, file)
    file.seek(0)
    with torch.serialization.safe_globals([Parameter]):
        stored = torch.load(file, weights_only=True)
    second = {name: [Parameter(p.detach().clone()) for p in tensors] for name, tensors in stored["weights"].items()}
    again = make_optimizer(spec(**named), second)
    again.load_state_dict(stored["optimizer"])
    assert [group["model"] for group in again.param_groups] == [group["model"] for group in optimizer.param_groups]
    go(again, second, range(3, 6))
    assert torch.equal(flat(second), flat(whole))
    for group in again.param_groups:  # still the groups of what steps
        group["lr"], group["weight_decay"] = 0.0, 0.0
    before = flat(second)
    go(again, second, range(6, 7))
    assert torch.equal(flat(second), before)


def test_without_the_library_of_8_bits_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    for ask in (check_optimizers, lambda of: make_optimizer(of, parameters("ab"))):
        call: Callable[[Phase], Any] = ask
        with pytest.raises(ModelError, match=r"^optimizer kind adamw_8bit needs bitsandbytes: pip install 'codistill\[eightbit\]'$"):  # fmt: skip
            call(spec(a="adamw", b="adamw_8bit"))
        call(spec(a="adamw", b="adafactor"))


def test_a_model_of_matrices_alone_has_one_group() -> None:
    on = {"a": [Parameter(torch.randn(4, 2))], "b": parameters("b")["b"]}
    optimizer = make_optimizer(spec(a="adafactor", b="adamw"), on)
    assert [group["model"] for group in optimizer.param_groups] == ["a", "b", "b"]
