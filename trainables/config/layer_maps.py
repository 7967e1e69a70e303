"""Which layers of two models a term compares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

Pairs = tuple[tuple[int, int], ...]
LayerMap = Annotated[
    Annotated[Literal["even", "last", "uniform", "top"], Tag("name")] | Annotated[Pairs, Tag("pairs")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "pairs"),
]


def layer_pairs(layers: LayerMap, num_from: int, num_to: int) -> Pairs:
    """Pairs (from, to) of layers whose outputs are compared, counted from 1 as executed; 0 is the embeddings.

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
