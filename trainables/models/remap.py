"""Remaps: one model's weights initialise another's, layer by layer, and by `remap_width.py` at another width.

A plan, which layer comes from which, is a pure function of shapes; `apply` copies tensors by a plan.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainables.config.errors import RemapError
from trainables.config.layer_maps import Layers, depth_plan
from trainables.config.models import Depth, Random, Remap, Width
from trainables.models import build, configs, initialise
from trainables.models.layouts import INNER_SIZES, LAYOUTS, NORM_EPS, PRE_NORM, Shape, family_of, place_of, shape_of
from trainables.models.remap_width import is_padded, plan_resizing, resize, with_own_rows

FIELDS = {  # of a shape, as transformers calls them
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "inner": "intermediate_size",
}
# fields of a config in which models may differ and copied weights still mean the same: sizes that a remap changes or compares
# itself, and settings of training, of tokens and of labels
FREE = re.compile(
    r"drop|token_id|initializer|init_|_init|std$|label|problem_type|architectures|dtype|version|_name|cache|output_|return_dict|"
    r"eps|max_position|n_positions|n_ctx|window|local_attention|layers$|layer_(types|order|swap)|loss|aux|pretraining_tp|chunk_size|"
    r"implementation|classifier_(pooling|activation)|summary_|sparse_pred|deterministic|type_vocab|tie_word|model_type|sub_configs"
)


def check(depth: Depth, source: Any, target: Any, width: Width | None = None) -> Layers:
    """Returns the plan between two transformers configs. Raises RemapError, which says what differs."""
    for key in ("model_type", "vocab_size"):
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
    _refuse_settings_that_differ(source, target)
    return depth_plan(depth, source.num_hidden_layers, target.num_hidden_layers)


def _refuse_widths_that_differ(old: Shape, new: Shape) -> None:
    for field, key in FIELDS.items():
        ours, theirs = getattr(old, field), getattr(new, field)
        if ours != theirs:
            raise RemapError(
                f"a remap without width needs equal {key}; source has {ours}, target {theirs}; expected width, one of "
                + ", ".join(get_args(Width))
            )


def _refuse_settings_that_differ(source: Any, target: Any) -> None:
    """Refuses settings under which copied weights would compute something else: at another rotary base, with another activation or scale …"""
    ours, theirs = source.to_dict(), target.to_dict()
    sizes = {
        target.attribute_map.get(key, key) for key in ("num_hidden_layers", *FIELDS.values(), *INNER_SIZES)
    } | configs.per_layer(target).keys()
    for key in sorted(ours.keys() & theirs.keys() - sizes):
        if not key.startswith("_") and not FREE.search(key) and ours[key] != theirs[key]:
            raise RemapError(
                f"a remap needs equal {key}; source has {ours[key]}, target {theirs[key]}; a target with `like: SOURCE` in "
                "place of `family` has the source's settings"
            )


def notes(source: Any, target: Any, layers: Layers) -> Iterator[str]:
    """Yields what a plan does that its name does not say. `source`, `target`: models, of any device."""
    old, new = shape_of(source.config), shape_of(target.config)
    copied = [layer for layer in layers if isinstance(layer, int)]
    gap = max((abs(b - a) for a, b in pairwise(copied)), default=1)
    if copied and (rest := source.config.num_hidden_layers - 1 - max(copied)) > gap:
        yield f"the last {rest} layers of the source are not copied"
    if old.is_rotary and new.head_size % old.head_size and old.head_size % new.head_size:
        yield f"rotary heads of {old.head_size} become {new.head_size}, no multiple: channels turn at the nearest speed"
    of_source, of_target = configs.per_layer(source.config), configs.per_layer(target.config)
    for key in of_source.keys() & of_target.keys():
        ours, theirs = of_source[key], of_target[key]
        for to, layer in enumerate(layers):
            if isinstance(layer, int) and ours[layer] != theirs[to]:
                yield f"layer {to} has {key} {theirs[to]} and weights of layer {layer}, which has {ours[layer]}"
                break
    prefix, known = layers_prefix(source), set(source.state_dict())
    own = [name for name in target.state_dict() if _is_copied(name, prefix, layers)]
    if own := [name for name in own if _wanted(name, prefix, layers, known) is None]:
        yield f"{len(own)} tensors that the source's layers lack keep their own weights: {own[0]} …"


def _is_copied(name: str, prefix: str, layers: Layers) -> bool:
    """Returns whether the tensor is part of a layer that is copied."""
    return name.startswith(prefix) and isinstance(layers[int(name.removeprefix(prefix).partition(".")[0])], int)


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
        wanted = _wanted(name, prefix, layers, ours)
        if wanted is None:
            left.append(name)
            continue
        old = ours[wanted]
        place = place_of(family_of(source.config), wanted)
        if resizing is not None:
            if place is None:
                raise RemapError(f"no width-remap rule for parameter {wanted} {tuple(old.shape)}")
            old = resize(resizing, wanted, old, tensor, following=ours.get(_following(wanted, prefix)))
        elif place == "table":
            old = with_own_rows(old, tensor)
        if old.shape != tensor.shape:
            raise RemapError(f"{wanted}: {tuple(old.shape)} cannot become {name}: {tuple(tensor.shape)}")
        tensor.copy_(old)
    if width is not None:
        _take_eps(width, source.config, target)
    return tuple(left)


def _wanted(name: str, prefix: str, layers: Layers, ours: Container[str]) -> str | None:
    """Returns the name of the source's tensor that becomes `name`, if there is one."""
    wanted = name
    if name.startswith(prefix):
        index, _, rest = name.removeprefix(prefix).partition(".")
        wanted = f"{prefix}{layers[int(index)]}.{rest}"  # of no layer where the plan has no number
    return wanted if wanted in ours else None  # e.g. ModernBERT's first layer has no norm


def _following(name: str, prefix: str) -> str:
    """Returns the name of the same tensor in the next layer."""
    index, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{int(index) + 1}.{rest}" if name.startswith(prefix) else ""


def _is_silent(name: str, prefix: str, layers: Layers, family: str) -> bool:
    """Returns whether this tensor is an output projection of an idle layer."""
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
    """Returns the prefix of the layers in the state dict: the path of the ModuleList that is as long as the config
    says."""
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
        before, after = (_logits(net, ids_BT, mask_BT) for net in (source, target))
    before, after = (z - z.mean(-1, keepdim=True) for z in (before, after))
    difference = float((after - before).norm() / before.norm())
    return Measured("exact" if difference < 1e-9 else "approximate" if difference < 0.1 else "lossy", difference)


def _logits(net: Any, ids_BT: Tensor, mask_BT: Tensor) -> Any:
    what = f"compute a {net.config.model_type} of this size"
    return configs.by_transformers(what, lambda: net(input_ids=ids_BT, attention_mask=mask_BT).logits)


def preview_remap(init: Remap, source: Any, target: Any) -> tuple[Layers, Measured]:
    """Returns the plan by which a model is remapped, and its effect on small models of the same configs and
    proportions, with gains and biases that differ from their start as trained ones do. Raises RemapError; ModelError
    for a family whose small models transformers cannot compute.

    `source`, `target`: the transformers configs.
    """
    nets: list[Any] = []
    for name, config in zip(("source", "target"), _small(source, target), strict=True):
        net = build.from_config(config).float()
        draw = partial(initialise.initialise, net, Random(std="width"), name=name, seed=0)
        configs.by_transformers(f"draw a {config.model_type} of this size", draw)
        generator = torch.Generator().manual_seed(len(nets))
        for vector in (parameter for parameter in net.parameters() if parameter.ndim < 2):  # gains of 1, biases of 0
            vector.data.add_(0.3 * torch.randn(vector.shape, generator=generator))
        nets.append(net)
    layers = check(init.depth, nets[0].config, nets[1].config, init.width)
    return layers, measure(nets[0], nets[1], layers, init.width)


def _small(*pair: Any) -> list[Any]:
    """Copies of two configs with the smallest sizes of the same proportions: few heads, small heads and inner layers. Norms,
    rotations and biases stay as they are."""
    shapes = [shape_of(config) for config in pair]
    share = [shape.hidden // shape.heads for shape in shapes]
    heads = [n for shape in shapes for n in (shape.heads, shape.kv_heads)]
    heads_unit, size_unit = math.gcd(*heads), math.gcd(*share, *(shape.head_size for shape in shapes))
    inner_unit, most = math.gcd(*(shape.inner for shape in shapes)), max(shape.inner for shape in shapes)
    num = 2 if heads_unit == max(shape.heads for shape in shapes) else 1
    found = []
    for config, shape, each in zip(pair, shapes, share, strict=True):
        small, num_heads = copy.deepcopy(config), num * shape.heads // heads_unit
        sizes = {
            "vocab_size": 128,
            "max_position_embeddings": 40,
            "hidden_size": num_heads * 8 * each // size_unit,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num * shape.kv_heads // heads_unit,
            "head_dim": 8 * shape.head_size // size_unit,
            configs.inner_size(config): max(1, 64 * inner_unit // most) * shape.inner // inner_unit,
            **{
                key: 0
                for key, value in config.to_dict().items()
                if key.endswith("_token_id") and isinstance(value, int)
            },
        }
        for key, size in sizes.items():
            if key is not None and configs.has_field(config, key) and getattr(config, key) is not None:
                setattr(small, key, size)
        found.append(small)
    return found


class _Double(TorchFunctionMode):
    """Keeps float64 where a family's code casts to float32 (norms of Llama, rotations of ModernBERT)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_single = func is torch.Tensor.float or (
            func is torch.Tensor.to and torch.float32 in (*args[1:], *(kwargs or {}).values())
        )
        if to_single and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
