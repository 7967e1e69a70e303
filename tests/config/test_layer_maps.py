"""Which layers are compared: the published maps, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from trainables.config.layer_maps import LayerMap, layer_pairs
from trainables.config.terms import AttentionMSE, HiddenMSE, RelationKL


@pytest.mark.parametrize(
    ("executed", "teacher", "student"),  # counted from 0, as published for a teacher of 12 layers
    [
        (1, [], []),
        (2, [5], [0]),  # plain of 2, and 1 executed twice
        (3, [3, 7], [0, 1]),
        (4, [2, 5, 8], [0, 1, 2]),  # 2 executed twice
        (6, [1, 3, 5, 7, 9], [0, 1, 2, 3, 4]),  # plain of 6, and 3 executed twice
        (9, [3, 7], [2, 5]),  # 6, of which 3 are executed twice
    ],
)
def test_the_even_map_is_the_published_one(executed: int, teacher: list[int], student: list[int]) -> None:
    pairs = layer_pairs("even", 12, executed)
    assert [(source - 1, to - 1) for source, to in pairs] == list(zip(teacher, student, strict=True))


@pytest.mark.parametrize(
    ("kind", "num_from", "num_to", "pairs"),
    [
        ("even", 12, 5, ()),  # nothing in common
        ("even", 2, 4, ((1, 2),)),  # a shallow teacher
        ("even", 4, 4, ((1, 1), (2, 2), (3, 3))),
        ("last", 12, 6, ((7, 1), (8, 2), (9, 3), (10, 4), (11, 5))),
        ("last", 3, 3, ((1, 1), (2, 2))),
        ("last", 12, 1, ()),
        ("uniform", 12, 4, ((0, 0), (3, 1), (6, 2), (9, 3), (12, 4))),
        ("uniform", 2, 1, ((0, 0), (2, 1))),
        ("top", 12, 5, ((12, 5),)),
        ("top", 2, 4, ((2, 4),)),
    ],
)
def test_layer_maps(kind: LayerMap, num_from: int, num_to: int, pairs: tuple[tuple[int, int], ...]) -> None:
    assert layer_pairs(kind, num_from, num_to) == pairs


def test_explicit_pairs_are_as_given() -> None:
    assert layer_pairs(((11, 6), (0, 0)), 12, 6) == ((11, 6), (0, 0))
    assert layer_pairs((), 12, 6) == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("uniform", 12, 5), "12 must be a multiple of 5; expected even, top"),
        (("uniform", 2, 4), "2 must be a multiple of 4"),
        (("last", 2, 4), "at least 4"),
        ((((13, 1),), 12, 6), "0 .* to 12 of `from`, 0 to 6 of `to`"),
        ((((1, 7),), 12, 6), "0 to 6 of `to`"),
        ((((-1, 1),), 12, 6), "0 "),
        (
            (
                (
                    (1, 1),
                    (1, 1),
                ),
                12,
                6,
            ),
            "twice",
        ),
    ],
)
def test_maps_that_are_not_defined_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_pairs(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("term", [{"layers": "even"}, {"layers": "last"}])
def test_an_even_map_of_one_layer_has_no_pairs_and_other_empty_maps_are_refused(
    term: dict[str, Any],
) -> None:
    flow = {"from": "a", "to": "b", **term}
    assert HiddenMSE.model_validate({"kind": "hidden_mse", **flow}).layer_pairs(12, 1) == ()
    for num_from, layers in ((12, ()), (7, "even")):
        other = HiddenMSE.model_validate({"kind": "hidden_mse", **flow, "layers": layers})
        with pytest.raises(ValueError, match="no layers correspond"):
            other.layer_pairs(num_from, 5)
    with pytest.raises(ValueError, match="no layers correspond"):
        AttentionMSE.model_validate({"kind": "attention_mse", **flow}).layer_pairs(12, 1)


def test_attention_skips_embeddings_and_relations_compare_the_last_layers() -> None:
    flow = {"from": "a", "to": "b"}
    assert AttentionMSE.model_validate({"kind": "attention_mse", **flow}).layer_pairs(4, 2) == ((2, 1), (4, 2))
    assert RelationKL.model_validate({"kind": "relation_kl", "heads": 2, **flow}).layer_pairs(4, 2) == ((4, 2),)
    explicit = RelationKL.model_validate({"kind": "relation_kl", "heads": 2, "from_layer": 3, **flow})
    assert explicit.layer_pairs(4, 2) == ((3, 2),)
    with pytest.raises(ValueError, match=r"0 .* to 2 of `from`"):
        explicit.layer_pairs(2, 2)
