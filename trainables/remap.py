"""How one model's weights initialise another's. A plan is a pure function of shapes; applying it copies tensors.

Depth only: both models have one family and one width. Width remaps join `plan` and `apply` beside `depth_plan`; what
calls them does not change.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from trainables.spec import Depth

Layers = tuple[int | None, ...]  # for each target layer the source layer, or None: keeps its own initialisation
SHAPE_OF_THE_REST = ("model_type", "hidden_size", "num_attention_heads", "vocab_size")


class RemapError(ValueError):
    """Shapes that the remap cannot serve."""


def depth_plan(depth: Depth, num_source: int, num_target: int) -> Layers:
    """Source layer of each target layer.

    copy_last: in order, the last one repeated (DWT's remapping, section 3; FNA++). stack: the whole block again and
    again (G_stack). interpolate: each layer repeated in place, evenly spread (also downwards). every_other: 0, 2, 4 …
    (DistilBERT). first: in order, the rest left open. random: every layer left open; only what surrounds them is copied.
    """
    target = range(num_target)
    match depth:
        case "copy_last":
            return tuple(min(i, num_source - 1) for i in target)
        case "stack":
            return tuple(i % num_source for i in target)
        case "interpolate":
            return tuple(i * num_source // num_target for i in target)
        case "every_other":
            if num_source < 2 * num_target - 1:
                raise RemapError(
                    f"every_other needs at least {2 * num_target - 1} source layers for {num_target}; there are {num_source}"
                )
            return tuple(2 * i for i in target)
        case "first":
            return tuple(i if i < num_source else None for i in target)
        case "random":
            return (None,) * num_target


def check(depth: Depth, source: Any, target: Any) -> Layers:
    """The plan between two transformers configs, or RemapError naming the field that stands in the way."""
    for key in SHAPE_OF_THE_REST:
        ours, theirs = getattr(source, key), getattr(target, key)
        if ours != theirs:
            raise RemapError(f"a depth remap needs equal {key}; source has {ours}, target {theirs}")
    return depth_plan(depth, source.num_hidden_layers, target.num_hidden_layers)


@torch.no_grad()
def apply(source: nn.Module, target: nn.Module, layers: Layers) -> None:
    """Copies layers by plan, and everything that surrounds them (embeddings, final norm, head), in place."""
    prefix = layers_prefix(source)
    ours, theirs = source.state_dict(), target.state_dict()
    for name, tensor in theirs.items():
        if not name.startswith(prefix):
            wanted: str | None = name
        else:
            index, _, rest = name.removeprefix(prefix).partition(".")
            layer = layers[int(index)]
            wanted = None if layer is None else f"{prefix}{layer}.{rest}"
        if wanted is None or wanted not in ours:  # e.g. a first layer that has no norm of its own
            continue
        if ours[wanted].shape != tensor.shape:
            raise RemapError(f"{wanted}: {tuple(ours[wanted].shape)} cannot become {name}: {tuple(tensor.shape)}")
        tensor.copy_(ours[wanted])


def layers_prefix(net: nn.Module) -> str:
    """Where the list of layers lies in the state dict: the one ModuleList as long as the config says."""
    num = net.config.num_hidden_layers  # type: ignore[union-attr]
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num:
            return f"{name}."
    raise RemapError(f"no list of {num} layers in {type(net).__name__}")


@dataclass(frozen=True)
class Measured:
    """What a remap does to the function, on random inputs in float64."""

    verdict: Literal["exact", "approximate", "lossy"]
    difference: float  # root mean square difference of centred logits over their own root mean square


@torch.no_grad()
def measure(source: nn.Module, target: nn.Module, layers: Layers, *, length: int = 16, num: int = 8) -> Measured:
    """Applies the plan to copies and compares logits: exact below 1e-9, approximate below 0.1, else lossy."""
    source, target = copy.deepcopy(source).double().eval(), copy.deepcopy(target).double().eval()
    apply(source, target, layers)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(source.config.vocab_size, (num, length), generator=generator)  # type: ignore[union-attr,arg-type]
    before, after = (net(input_ids=ids_BT).logits for net in (source, target))
    before, after = (z - z.mean(-1, keepdim=True) for z in (before, after))
    difference = float((after - before).norm() / before.norm())
    return Measured("exact" if difference < 1e-9 else "approximate" if difference < 0.1 else "lossy", difference)
