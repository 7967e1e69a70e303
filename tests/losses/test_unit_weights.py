"""Weights per position: compared with definitions written anew, with the revised target itself, and with the chunked pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tests.support.specs import TERMS, UNIT_WEIGHTS
from tests.support.trials import flow, hard
from trainables.config.terms import Term
from trainables.losses.chunked import LogitSource, chunked_terms
from trainables.losses.terms import term_loss
from trainables.losses.unit_weights import WEIGHTS, unit_weights

N, V = 9, 6
LABELS_N = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])
REVISION = {"kind": "revision", "by": "teacher", "eta": 0.7}
AT_LOGITS = [kind for kind, value in TERMS.items() if "tau_squared" in value or kind == "cross_entropy"]


def term_of(value: dict[str, Any]) -> Term:
    return TypeAdapter(Term).validate_python(value)  # type: ignore[no-any-return]


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SIDES = {"teacher": logits(1), "other": logits(2), "student": logits(3)}


def test_every_rule_has_a_function_an_example_and_words() -> None:
    rules = [term_of(flow("teacher", "student", unit_weights=value)).rule for value in UNIT_WEIGHTS.values()]
    assert {type(rule) for rule in rules} == set(WEIGHTS)
    for kind, value in UNIT_WEIGHTS.items():
        term = term_of(flow("teacher", "student", unit_weights=value))
        assert TypeAdapter(Term).validate_json(term.model_dump_json()) == term
        assert term.rule is not None and term.rule.kind == kind
        assert term.rule.formula in term.formula and set(term.rule.models) <= set(term.reads)
        weights_N = unit_weights(term, SIDES, LABELS_N)
        assert weights_N is not None and weights_N.shape == (N,) and not weights_N.requires_grad
        assert bool(((weights_N >= 0) & (weights_N <= 1)).all()) and len(weights_N.unique()) > 1


def test_a_term_without_a_rule_dumps_as_before() -> None:
    for value in (flow("teacher", "student"), hard("student")):
        assert "unit_weights" not in term_of(value).model_dump(mode="json")
        assert unit_weights(term_of(value), SIDES, LABELS_N) is None


def revised_target() -> Tensor:
    """The target row by row: the teacher's probabilities, mixed with the label where the label is not the likeliest."""
    rows = []
    for row, label in zip(SIDES["teacher"].softmax(-1).tolist(), LABELS_N.tolist(), strict=True):
        share = 1.0 if row.index(max(row)) == label else 0.7 / (max(row) - row[label] + 1)
        rows.append([share * p + (1 - share) * (place == label) for place, p in enumerate(row)])
    return torch.tensor(rows, dtype=torch.float64)


def test_revision_gives_the_gradient_of_kl_from_the_revised_target() -> None:
    to_NV = logits(3).requires_grad_()
    terms = [
        term_of(flow("teacher", "student", unit_weights=REVISION)),
        term_of(hard("student", unit_weights=REVISION)),
    ]
    for term in terms:
        weights_N = unit_weights(term, SIDES, LABELS_N)
        term_loss(term, SIDES["teacher"] if term.source else None, to_NV, LABELS_N, weights_N=weights_N).backward()  # type: ignore[no-untyped-call]
    ours, to_NV.grad = to_NV.grad, None
    target_NV = revised_target()
    torch.nn.functional.kl_div(to_NV.log_softmax(-1), target_NV, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert ours is not None and to_NV.grad is not None
    torch.testing.assert_close(ours, to_NV.grad, rtol=1e-12, atol=1e-14)
    wrong_N = SIDES["teacher"].argmax(-1) != LABELS_N
    assert 0 < int(wrong_N.sum()) < N and bool((target_NV.argmax(-1) == LABELS_N).all())


@pytest.mark.parametrize("eta", [0.05, 0.5, 0.99, 1])
def test_the_label_is_likeliest_in_the_revised_target_for_any_eta(eta: float) -> None:
    term = term_of(flow("teacher", "student", unit_weights=REVISION | {"eta": eta}))
    share_N = unit_weights(term, SIDES, LABELS_N)
    assert share_N is not None
    target_NV = SIDES["teacher"].softmax(-1) * share_N[:, None]
    target_NV[range(N), LABELS_N] += 1 - share_N
    torch.testing.assert_close(target_NV.gather(-1, LABELS_N[:, None])[:, 0], target_NV.amax(-1))


def test_teachers_share_the_weight_by_their_loss_on_the_label() -> None:
    rule = {"kind": "by_loss", "among": ["teacher", "other"], "temperature": 0.5}
    terms = [term_of(flow(source, "student", unit_weights=rule)) for source in ("teacher", "other")]
    weights_KN = [unit_weights(term, SIDES, LABELS_N) for term in terms]
    torch.testing.assert_close(sum(weights_KN), torch.ones(N, dtype=torch.float64))
    for place, label in enumerate(LABELS_N.tolist()):
        likely = [SIDES[name][place].softmax(-1)[label].item() ** 2 for name in ("teacher", "other")]
        assert weights_KN[0][place].item() == pytest.approx(likely[0] / sum(likely), rel=1e-12)  # type: ignore[index]


def test_overlap_is_the_share_of_tokens_in_both_tops() -> None:
    for top, cut in ((1, 1), (3, 3), (V, V), (50, V)):
        term = term_of(flow("teacher", "student", unit_weights={"kind": "overlap", "top": top}))
        weights_N = unit_weights(term, SIDES, LABELS_N)
        assert weights_N is not None
        for place in range(N):
            tops = [set(sorted(range(V), key=lambda v: -SIDES[m][place][v])[:cut]) for m in ("teacher", "student")]
            assert weights_N[place].item() == pytest.approx(len(tops[0] & tops[1]) / cut)


@pytest.mark.parametrize("kind", AT_LOGITS)
def test_a_weighted_loss_is_the_sum_of_weights_times_the_losses_of_positions(kind: str) -> None:
    term, weights_N = term_of(TERMS[kind]), torch.rand(N, generator=torch.Generator().manual_seed(5)).double()
    source = SIDES["teacher"] if term.source else None

    def value(rows: slice, weights_N: Tensor | None) -> float:
        return term_loss(
            term,
            source if source is None else source[rows],
            SIDES["student"][rows],
            LABELS_N[rows],
            weights_N=weights_N,
        ).item()

    parts = [weights_N[i].item() * value(slice(i, i + 1), None) for i in range(N)]
    assert value(slice(None), weights_N) == pytest.approx(math.fsum(parts), rel=1e-12)
    assert value(slice(None), torch.ones(N)) == pytest.approx(value(slice(None), None), rel=1e-12)


@pytest.mark.parametrize("kind", UNIT_WEIGHTS)
def test_chunks_change_neither_value_nor_gradient(kind: str) -> None:
    """The gradient is compared with finite differences: no rule's weight has one."""
    terms = {"soft": term_of(flow("teacher", "student", unit_weights=UNIT_WEIGHTS[kind]))}
    if kind == "revision":
        terms["hard"] = term_of(hard("student", unit_weights=UNIT_WEIGHTS[kind]))
    weights = dict.fromkeys(terms, 0.5)

    def run(to_NV: Tensor, chunk: int) -> Tensor:
        sides = {**SIDES, "student": to_NV}
        return chunked_terms(
            {name: LogitSource(side) for name, side in sides.items()}, LABELS_N, terms, weights, chunk=chunk
        ).loss

    slopes = []
    for chunk in (2, N):
        to_NV = SIDES["student"].clone().requires_grad_()
        run(to_NV, chunk).backward()  # type: ignore[no-untyped-call]
        slopes.append(to_NV.grad)
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)
    assert all(SIDES[name].grad is None for name in ("teacher", "other"))
    direction_NV, step = logits(7), 1e-6
    ends = [run(SIDES["student"] + sign * step * direction_NV, N).item() for sign in (1, -1)]
    assert slopes[0] is not None
    assert float((slopes[0] * direction_NV).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (flow("teacher", "student", "jsd", unit_weights=REVISION), "forward_kl at temperature 1"),
        (flow("teacher", "student", temperature=2, unit_weights=REVISION), "forward_kl at temperature 1"),
        (flow("other", "student", unit_weights=REVISION), "revision is by 'teacher', expected 'other'"),
        (flow("x", "student", unit_weights=UNIT_WEIGHTS["by_loss"]), "'x' is not among them"),
        (hard("student", unit_weights=UNIT_WEIGHTS["overlap"]), "revision"),
    ],
)
def test_a_rule_is_refused_where_it_has_no_meaning(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        term_of(value)
