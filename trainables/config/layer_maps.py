"""Which layers of two models belong together: those that a term compares, and those that a remap copies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from trainables.config.errors import RemapError
from trainables.config.models import Depth

# For each target layer the source layer; None: the layer keeps its own weights; idle: this too, and adds nothing.
Layers = tuple[int | Literal["idle"] | None, ...]
Pairs = tuple[tuple[int, int], ...]
LayerMap = Annotated[
    Annotated[Literal["even", "last", "uniform", "top"], Tag("name")] | Annotated[Pairs, Tag("pairs")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "pairs"),
]


def layer_pairs(layers: LayerMap, num_from: int, num_to: int) -> Pairs:
    """Returns pairs (from, to) of layers whose outputs are compared, counted from 1 as executed; 0 is the embeddings.

    A layer that runs twice counts twice. `even`: each layer of `to` except the last, where its fraction of the depth is
    a whole layer of `from` (Patient-KD's "skip"; for 12 layers Pea-KD's maps). `last`: each layer of `to` except the
    last, paired from the top. `uniform`: all layers and the embeddings, each with the end of its block (TinyBERT).
    `top`: the last with the last.

    May be empty: a `to` of one layer has only its last. Raises ValueError where the map is not defined for these
    depths, or a pair is out of range.
    """
    other_maps = "expected even, top or explicit pairs"
    match layers:
        case "even":
            return tuple((to * num_from // num_to, to) for to in range(1, num_to) if to * num_from % num_to == 0)
        case "last":
            if num_from < num_to:
                raise ValueError(
                    f"a layer map 'last' from {num_from} layers to {num_to}: `from` must have at least {num_to}; "
                    f"{other_maps}"
                )
            return tuple((num_from - num_to + to, to) for to in range(1, num_to))
        case "uniform":
            if num_from % num_to:
                raise ValueError(
                    f"a layer map 'uniform' from {num_from} layers to {num_to}: {num_from} must be a multiple of "
                    f"{num_to}; {other_maps}"
                )
            return tuple((to * num_from // num_to, to) for to in range(num_to + 1))
        case "top":
            return ((num_from, num_to),)
    for source, to in layers:
        if not (0 <= source <= num_from and 0 <= to <= num_to):
            raise ValueError(
                f"layers ({source}, {to}): expected 0 (the embeddings) to {num_from} of `from`, 0 to {num_to} of `to`"
            )
    if repeated := next((pair for pair in layers if layers.count(pair) > 1), None):
        raise ValueError(f"layers {repeated} are given twice; weigh the term instead")
    return layers


def depth_plan(depth: Depth, num_source: int, num_target: int) -> Layers:
    """Returns the source layer of each target layer. Raises RemapError.

    copy_last: in order, the last one repeated (DWT's remapping, section 3; FNA++). stack: the whole block repeated
    (G_stack). interpolate: each layer repeated in place, evenly (also downwards). spread: evenly, the first and the last
    included (DistilBERT: 0 2 4 7 9 11 of 12). every_other: 0, 2, 4 … up to the last or the last but one, so that the
    target has half as many layers. first: in order, further layers keep their own weights. identity: in order, further
    layers add nothing. random: all layers keep their own; only the rest is copied.
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
            if num_source > 2 * num_target:
                raise RemapError(
                    f"every_other of {num_source} source layers is {-(-num_source // 2)}, and the target has {num_target}; "
                    "expected spread, which takes any number from the first to the last"
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
