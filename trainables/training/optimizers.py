"""Optimizers of a phase: one of each kind that its models use, stepped together.

`adamw`: torch's, fused. `adafactor` (Shazeer and Stern 2018, arXiv 1804.04235): transformers', with neither a relative
step size nor a scale of the weights, so that `lr` means the same as under AdamW: updates are clipped to a root mean
square of 1, then multiplied by `lr`. Its second moment decays by 1 - step^-0.8; there are no betas and no eps.
(torch.optim.Adafactor always scales by the weights: LoRA's B, which starts at zero, would learn a thousand times
slower.) `adamw_8bit` (Dettmers et al. 2022, arXiv 2110.02861): bitsandbytes'; tensors of fewer than 4,096 numbers keep
their moments in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import Parameter

from trainables.config.errors import ModelError
from trainables.config.phase import Phase


def make_optimizer(spec: Phase, parameters: Mapping[str, Sequence[Parameter]]) -> torch.optim.Optimizer:
    """Makes parameter groups by model, with the model's name under `model`: matrices decay, vectors (norms, biases) do
    not.

    `parameters`: the learning ones, by model. Raises ModelError where a kind's library is not installed.
    """
    check_optimizers(spec)
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in spec.train:
        rule = spec.optimizer_of(name)
        common: dict[str, Any] = {"lr": rule.lr, "model": name}
        if rule.kind != "adafactor":
            common |= {"betas": rule.betas, "eps": rule.eps}
        for is_matrix, decay in ((True, rule.weight_decay), (False, 0.0)):
            if params := [p for p in parameters[name] if (p.ndim >= 2) == is_matrix]:
                groups.setdefault(rule.kind, []).append({**common, "params": params, "weight_decay": decay})
    members = [_make(kind, of_kind) for kind, of_kind in groups.items()]
    return members[0] if len(members) == 1 else JointOptimizer(members)


def check_optimizers(spec: Phase) -> None:
    """Raises ModelError where a kind's library is not installed."""
    wanted = {spec.optimizer_of(name).kind for name in spec.train}
    if "adamw_8bit" in wanted and find_spec("bitsandbytes") is None:
        raise ModelError("optimizer kind adamw_8bit needs bitsandbytes: pip install 'codistill[eightbit]'")


def _make(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    match kind:
        case "adafactor":
            from transformers.optimization import Adafactor

            optimizer = Adafactor(groups, lr=groups[0]["lr"], scale_parameter=False, relative_step=False)
            _keep_types_on_load(optimizer)
            return optimizer  # type: ignore[no-any-return]
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups)  # type: ignore[no-any-return]
        case _:
            return torch.optim.AdamW(groups, fused=True)


def _keep_types_on_load(optimizer: torch.optim.Optimizer) -> None:
    """Keeps load_state_dict from casting the state to the type of the weights: fp32 moments of bf16 weights would be
    rounded, and a resumed run would differ."""
    stored: list[dict[int, dict[str, Any]]] = []

    def note(_optimizer: Any, state: dict[str, Any]) -> None:
        stored[:] = [state["state"]]

    def give_back(_optimizer: Any) -> None:
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in stored.pop().items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    optimizer.state[ordered[number]][key] = value.clone().to(ordered[number].device)

    optimizer.register_load_state_dict_pre_hook(note)
    optimizer.register_load_state_dict_post_hook(give_back)


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as one; `param_groups` are the members' own groups."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([{"params": group["params"]} for member in members for group in member.param_groups], {})
        self.members = tuple(members)
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for member in self.members for group in member.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
        self._share()
