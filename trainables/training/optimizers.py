"""Optimizers of a phase: one of each kind that its models ask for, stepped together where there are several.

`adamw`: torch's, fused. `adafactor` (Shazeer and Stern 2018, arXiv 1804.04235): transformers' with the learning rate as it
is given, no step size of its own and none relative to the weights, so that `lr` means what it means under AdamW: updates
are cut to a root mean square of 1, then multiplied by it. Its second moment forgets by 1 - step^-0.8; it takes neither
betas nor eps. (torch.optim.Adafactor cannot do without the scale of the weights: LoRA's B, which starts at zero, would
learn a thousand times slower.) `adamw_8bit` (Dettmers et al. 2022, arXiv 2110.02861): bitsandbytes', on CPUs and GPUs
without a compiler; tensors of fewer than 4,096 numbers keep moments in 32 bits.
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
    """Groups per model, each with its name under `model`: matrices decay, vectors (norms, biases) do not.

    `parameters`: what learns, by model. Raises ModelError where a kind's library is not installed.
    """
    check_optimizers(spec)
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in spec.train:
        o = spec.optimizer_of(name)
        common: dict[str, Any] = {"lr": o.lr, "model": name}
        if o.kind != "adafactor":
            common |= {"betas": o.betas, "eps": o.eps}
        matrices = [p for p in parameters[name] if p.ndim >= 2]
        vectors = [p for p in parameters[name] if p.ndim < 2]
        pair = (
            {**common, "params": matrices, "weight_decay": o.weight_decay},
            {**common, "params": vectors, "weight_decay": 0.0},
        )
        groups.setdefault(o.kind, []).extend(group for group in pair if group["params"])
    members = [_make(kind, found) for kind, found in groups.items() if found]
    return members[0] if len(members) == 1 else Several(members)


def check_optimizers(spec: Phase) -> None:
    """Raises ModelError where a kind's library is not installed."""
    wanted = {spec.optimizer_of(name).kind for name in spec.train}
    if "adamw_8bit" in wanted and find_spec("bitsandbytes") is None:
        raise ModelError("optimizer kind adamw_8bit needs bitsandbytes: pip install 'codistill[eightbit]'")


def _make(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    match kind:
        case "adafactor":
            from transformers.optimization import Adafactor

            made = Adafactor(groups, lr=groups[0]["lr"], scale_parameter=False, relative_step=False)
            _load_in_its_own_type(made)
            return made  # type: ignore[no-any-return]
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups)  # type: ignore[no-any-return]
        case _:
            return torch.optim.AdamW(groups, fused=True)


def _load_in_its_own_type(optimizer: torch.optim.Optimizer) -> None:
    """Optimizer.load_state_dict casts what it loads to the type of the weights: moments in fp32 beside weights in bf16
    would come back rounded, and a resumed run would go another way."""
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


class Several(torch.optim.Optimizer):
    """Optimizers of different kinds as one; `param_groups` are those of all, themselves."""

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
