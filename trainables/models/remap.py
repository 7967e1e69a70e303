"""Remaps: one model's weights initialise another's, layer by layer, and by `remap_width.py` at another width.

A plan, which layer comes from which, is a pure function of shapes; `apply` copies tensors by a plan.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainables.config.models import Depth, Model, Remap, Width
from trainables.models import build, initialise
from trainables.models.layouts import INNER_SIZES, LAYOUTS, NORM_EPS, PRE_NORM, Shape, family_of, place_of, shape_of
from trainables.models.remap_width import is_padded, plan_resizing, resize, with_own_rows

# For each target layer the source layer; None: the layer keeps its own weights; idle: this too, and adds nothing.
Layers = tuple[int | Literal["idle"] | None, ...]
SWITCHES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias", "decoder_bias", "scale_attn_weights")
FIELDS = {  # of a shape, as transformers calls them
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "inner": "intermediate_size",
}


class RemapError(ValueError):
    """Shapes between which a remap is impossible; the message says why and what is expected."""


def depth_plan(depth: Depth, num_source: int, num_target: int) -> Layers:
    """The source layer of each target layer. Raises RemapError.

    copy_last: in order, the last one repeated (DWT's remapping, section 3; FNA++). stack: the whole block repeated
    (G_stack). interpolate: each layer repeated in place, evenly (also downwards). spread: evenly, the first and the last
    included (DistilBERT: 0 2 4 7 9 11 of 12). every_other: 0, 2, 4 … first: in order, further layers keep their own
    weights. identity: in order, further layers add nothing. random: all layers keep their own; only the rest is copied.
    """
    target = range(num_target)
    match depth:
        case "copy_last":
            return tuple(min(i, num_source - 1) for i in target)
        case "stack":
            return tuple(i % num_source for i in target)
        case "interpolate":
            return tuple(i * num_source // num_target for i in target)
        case "spread":
            gaps = max(1, num_target - 1)  # rounded to the nearest, halves up
            return tuple((2 * i * (num_source - 1) + gaps) // (2 * gaps) for i in target)
        case "every_other":
            if num_source < 2 * num_target - 1:
                needed = 2 * num_target - 1
                raise RemapError(
                    f"every_other needs at least {needed} source layers for {num_target}; there are {num_source}"
                )
            return tuple(2 * i for i in target)
        case "first":
            return tuple(i if i < num_source else None for i in target)
        case "identity":
            if num_source > num_target:
                layers = f"the source has {num_source}, the target {num_target}"
                raise RemapError(f"identity adds layers; {layers}; expected first")
            return tuple(i if i < num_source else "idle" for i in target)
        case "random":
            return (None,) * num_target


def check(depth: Depth, source: Any, target: Any, width: Width | None = None) -> Layers:
    """The plan between two transformers configs. Raises RemapError, which says what differs."""
    for key in ("model_type", "vocab_size", *SWITCHES):
        ours, theirs = (family_of(c) if key == "model_type" else getattr(c, key, None) for c in (source, target))
        if ours != theirs:
            raise RemapError(f"a remap needs equal {key}; source has {ours}, target {theirs}")
    if getattr(target, "tie_word_embeddings", True) and not getattr(source, "tie_word_embeddings", True):
        raise RemapError(
            "target ties embeddings but source does not: tie_word_embeddings is true in the target, false in the source"
        )
    if depth == "identity" and family_of(target) not in PRE_NORM:
        raise RemapError(
            f"identity needs norms before each block, whose layers only add to the residual stream: {', '.join(PRE_NORM)}; "
            f"a {target.model_type} is not one of these"
        )
    if width is None:
        _refuse_widths_that_differ(shape_of(source), shape_of(target))
    elif family_of(source) not in LAYOUTS:
        raise RemapError(f"width remaps serve the families {', '.join(LAYOUTS)}; these are {source.model_type}")
    return depth_plan(depth, source.num_hidden_layers, target.num_hidden_layers)


def _refuse_widths_that_differ(old: Shape, new: Shape) -> None:
    for field, key in FIELDS.items():
        ours, theirs = getattr(old, field), getattr(new, field)
        if ours != theirs:
            raise RemapError(
                f"a remap without width needs equal {key}; source has {ours}, target {theirs}; expected width, one of "
                + ", ".join(get_args(Width))
            )


@torch.no_grad()
def apply(source: nn.Module, target: nn.Module, layers: Layers, width: Width | None = None) -> tuple[str, ...]:
    """Copies layers by plan, and everything around them (embeddings, final norm, head), into `target`.

    Idle layers write nothing to the residual stream: their output projections are 0, and learn from the first step.
    Positions that only the target has keep their own weights. Returns the names of the tensors that were not copied.
    """
    prefix = layers_prefix(source)
    resizing = None if width is None else plan_resizing(width, source, target, prefix)
    ours, theirs = source.state_dict(), target.state_dict()
    left, seen = [], set[int]()
    for name, tensor in theirs.items():
        if tensor.data_ptr() in seen:  # a head tied to the embeddings
            continue
        seen.add(tensor.data_ptr())
        if _is_silent(name, prefix, layers, family_of(target.config)):
            tensor.zero_()
            continue
        wanted, ahead = _wanted(name, prefix, layers, ours)
        if wanted is None:
            left.append(name)
            continue
        old = ours[wanted]
        place = place_of(family_of(source.config), wanted)
        if resizing is not None:
            if place is None:
                raise RemapError(f"no width-remap rule for parameter {wanted} {tuple(old.shape)}")
            old = resize(resizing, wanted, old, tensor, following=ahead)
        elif place == "table":
            old = with_own_rows(old, tensor)
        if old.shape != tensor.shape:
            raise RemapError(f"{wanted}: {tuple(old.shape)} cannot become {name}: {tuple(tensor.shape)}")
        tensor.copy_(old)
    if width is not None:
        _take_eps(width, source.config, target)
    return tuple(left)


def _wanted(name: str, prefix: str, layers: Layers, ours: Mapping[str, Tensor]) -> tuple[str | None, Tensor | None]:
    """The name of the source's tensor that becomes `name`, if there is one, and the same tensor of the next layer."""
    if not name.startswith(prefix):
        return (name if name in ours else None), None
    index, _, rest = name.removeprefix(prefix).partition(".")
    layer = layers[int(index)]
    if not isinstance(layer, int) or f"{prefix}{layer}.{rest}" not in ours:  # e.g. ModernBERT's first layer has no norm
        return None, None
    return f"{prefix}{layer}.{rest}", ours.get(f"{prefix}{layer + 1}.{rest}")


def _is_silent(name: str, prefix: str, layers: Layers, family: str) -> bool:
    """Whether this tensor is an output projection of an idle layer."""
    if not name.startswith(prefix) or layers[int(name.removeprefix(prefix).partition(".")[0])] != "idle":
        return False
    return place_of(family, name) in ("x <- o", "x <- inner")


def _take_eps(width: Width, source: Any, target: Any) -> None:
    """Sets the epsilon of norms: padded channels make the mean square smaller by old/new, so epsilon shrinks as well."""
    key, old, new = NORM_EPS[family_of(source)], shape_of(source), shape_of(target.config)
    eps = getattr(source, key) * (old.hidden / new.hidden if is_padded(width, old, new) else 1)
    setattr(target.config, key, eps)
    for module in target.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, eps)


def layers_prefix(net: nn.Module) -> str:
    """The prefix of the layers in the state dict: the path of the ModuleList that is as long as the config says."""
    num = net.config.num_hidden_layers  # type: ignore[union-attr]
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num:
            return f"{name}."
    raise RemapError(f"no list of {num} layers in {type(net).__name__}")


@dataclass(frozen=True)
class Measured:
    """How far a remap changes a model's logits, on random inputs in float64."""

    verdict: Literal["exact", "approximate", "lossy"]
    difference: float  # root mean square difference of centred logits over their own root mean square


@torch.no_grad()
def measure(
    source: nn.Module, target: nn.Module, layers: Layers, width: Width | None = None, *, length: int = 16, num: int = 8
) -> Measured:
    """Applies the plan to copies, and compares logits: exact below 1e-9, approximate below 0.1, else lossy."""
    source, target = copy.deepcopy(source).double().eval(), copy.deepcopy(target).double().eval()
    apply(source, target, layers, width)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(source.config.vocab_size, (num, length), generator=generator)  # type: ignore[union-attr,arg-type]
    with _Double():
        mask_BT = torch.ones_like(ids_BT)
        before, after = (net(input_ids=ids_BT, attention_mask=mask_BT).logits for net in (source, target))
    before, after = (z - z.mean(-1, keepdim=True) for z in (before, after))
    difference = float((after - before).norm() / before.norm())
    return Measured("exact" if difference < 1e-9 else "approximate" if difference < 0.1 else "lossy", difference)


def preview_remap(source: Model, target: Model, config: Any = None) -> tuple[Layers, Measured]:
    """The plan by which `target` is remapped from `source`, and its effect on small models of the same family, depths and
    proportions, with gains and biases that differ from their start as trained ones do. Raises RemapError.

    `config`: the transformers config of a source with pretrained weights, which bring their own shape.
    """
    assert isinstance(target.init, Remap)
    if config is not None:
        source = _described(config)
    nets: list[Any] = []
    for name, model in zip(("source", "target"), _small(source, target), strict=True):
        made = build.make_config(model, vocab_size=128, special_ids={"pad_token_id": 0}, length=32)
        if name == "source" and config is not None:
            made = _resized(config, made)
        net = build.from_config(made).float()
        initialise.initialise(net, build.initial(model), name=name, seed=0)
        generator = torch.Generator().manual_seed(len(nets))
        for vector in (parameter for parameter in net.parameters() if parameter.ndim < 2):  # gains of 1, biases of 0
            vector.data.add_(0.3 * torch.randn(vector.shape, generator=generator))
        nets.append(net)
    layers = check(target.init.depth, nets[0].config, nets[1].config, target.init.width)
    return layers, measure(nets[0], nets[1], layers, target.init.width)


def _described(config: Any) -> Model:
    """A model value with the shape of a transformers config."""
    shape = shape_of(config)
    sizes = {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size}
    return Model(
        family=family_of(config),
        layers=config.num_hidden_layers,
        width=shape.hidden,
        heads=shape.heads,
        intermediate_size=shape.inner,
        config={key: size for key, size in sizes.items() if getattr(config, key, None) is not None},
    )


def _resized(config: Any, small: Any) -> Any:
    """A copy of a config with the sizes of a small one; norms, rotations and biases stay as they are."""
    resized = copy.deepcopy(config)
    ids = (key for key in small.to_dict() if key.endswith("_token_id"))
    for key in ("vocab_size", "max_position_embeddings", *FIELDS.values(), *INNER_SIZES, *ids):
        if hasattr(small, key) and hasattr(resized, key):
            setattr(resized, key, getattr(small, key))
    return resized


def _small(*pair: Model) -> list[Model]:
    """The smallest models of the same proportions: few heads, small heads and inner layers."""
    heads = [model.num_heads for model in pair]
    kv_heads = [int(model.config.get("num_key_value_heads", model.num_heads)) for model in pair]
    share = [(model.width or 0) // model.num_heads for model in pair]
    head_size = [int(model.config.get("head_dim", size)) for model, size in zip(pair, share, strict=True)]
    inner = [model.intermediate_size or 4 * (model.width or 0) for model in pair]
    heads_unit, size_unit, inner_unit = math.gcd(*heads, *kv_heads), math.gcd(*share, *head_size), math.gcd(*inner)
    num = 2 if heads_unit == max(heads) else 1
    small = []
    for i, model in enumerate(pair):
        width_of_head, num_heads = 8 * share[i] // size_unit, num * heads[i] // heads_unit
        sizes = {"num_key_value_heads": num * kv_heads[i] // heads_unit, "head_dim": 8 * head_size[i] // size_unit}
        value = {
            "family": model.family,
            "layers": model.layers,
            "heads": num_heads,
            "width": num_heads * width_of_head,
            "intermediate_size": max(1, 64 * inner_unit // max(inner)) * inner[i] // inner_unit,
            "dropout": 0,
            "config": {key: sizes.get(key, value) for key, value in model.config.items()},
            "init": {"kind": "random", "std": "width"},
            "sharing": model.sharing,
        }
        small.append(Model.model_validate(value))
    return small


class _Double(TorchFunctionMode):
    """Keeps float64 where a family's code casts to float32 (norms of Llama, rotations of ModernBERT)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_single = func is torch.Tensor.float or (
            func is torch.Tensor.to and torch.float32 in (*args[1:], *(kwargs or {}).values())
        )
        if to_single and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
