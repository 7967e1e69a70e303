"""Scores the channels, heads and neurons of a model on random inputs, to choose those that a smaller model keeps.

Minitron's criteria (arXiv 2407.14679), with random tokens instead of calibration text, which a remap does not have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainables.models.layouts import family_of, is_transposed, place_of, shape_of


def scores(net: Any, layers: str) -> list[dict[str, Tensor]]:
    """Measures, by layer, scores of hidden channels (`x`, equal in all layers), query heads (`q`) and neurons (`inner`).

    Channels: mean absolute output of norms. Heads, neurons: mean norm of what they add to the residual stream.
    `layers`: the prefix of the layers in the state dict.
    """
    family, shape = family_of(net.config), shape_of(net.config)
    channels = torch.zeros(shape.hidden, dtype=torch.float64)
    found = [{"x": channels} for _ in range(net.config.num_hidden_layers)]

    def record(name: str, module: nn.Module, given: Tensor, made: Tensor) -> None:
        place = place_of(family, f"{name}.weight")
        if place == "norm":
            channels.add_(made.flatten(0, -2).abs().mean(0))
        if place not in ("x <- o", "x <- inner"):
            return
        weight: Any = module.weight
        weight_DI = weight.t() if is_transposed(module) else weight
        layer = found[int(name.removeprefix(layers).partition(".")[0])]
        if place == "x <- inner":
            layer["inner"] = given.flatten(0, -2).abs().mean(0) * weight_DI.norm(dim=0)
        else:
            given_NHC, weight_DHC = (t.unflatten(-1, (shape.heads, -1)) for t in (given.flatten(0, -2), weight_DI))
            square_HCC = torch.einsum("dhc,dhe->hce", weight_DHC, weight_DHC)
            layer["q"] = torch.einsum("nhc,hce,nhe->nh", given_NHC, square_HCC, given_NHC).clamp_min(0).sqrt().mean(0)

    _watch(net, record)
    return found


def shares(net: Any, kept: Tensor) -> dict[str, float]:
    """Returns, by norm, the root mean square of the input's kept channels, divided by that of all channels; the gain shrinks so."""
    family, found = family_of(net.config), dict[str, float]()

    def record(name: str, module: nn.Module, given: Tensor, _made: Tensor) -> None:
        if place_of(family, f"{name}.weight") in ("norm", "last norm"):
            whole, part = given, given[..., kept]
            if isinstance(module, nn.LayerNorm):
                whole, part = (t - t.mean(-1, keepdim=True) for t in (whole, part))
            whole, part = (t.square().mean(-1).sqrt() for t in (whole, part))
            found[name] = float((part / whole)[whole > 0].mean())  # the row of the padding token is zero

    _watch(net, record)
    return found


@torch.no_grad()
def _watch(net: Any, record: Callable[[str, nn.Module, Tensor, Tensor], None]) -> None:
    """Calls `record(name, module, first input, output)` for each module with a weight, on random tokens in float64."""
    net = copy.deepcopy(net).double().eval()
    for name, module in net.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(lambda m, given, made, name=name: record(name, m, given[0].detach(), made))
    generator = torch.Generator().manual_seed(0)
    shape = (16, min(32, net.config.max_position_embeddings))
    ids_BT = torch.randint(net.config.vocab_size, shape, generator=generator)
    net(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
