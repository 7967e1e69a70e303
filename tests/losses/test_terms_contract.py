"""What every term keeps, whatever its loss: run over the closed list; a term from outside needs only an example in TERMS."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests.support.specs import TERMS
from trainables.config.schedules import START
from trainables.config.terms import Term
from trainables.losses.terms import LOSSES, term_loss

ROWS, LENGTH, WIDTH, HEADS, VOCABULARY = 3, 5, 8, 2, 7
# part of their target is a detached function of `to`: test_logits.py compares them with their definitions instead
DETACHED_FROM_TO = {"adaptive_kl", "interpolated_kl"}


def term_of(kind: str) -> Term:
    return TypeAdapter(Term).validate_python(TERMS[kind])  # type: ignore[no-any-return]


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def side_of(term: Term, seed: int) -> list[Any]:
    """Random outputs of one model, as the term's `inputs` ask for them: for each pair of layers, or a single one."""
    pairs = range(len(term.layer_pairs(4, 2)) or 1)
    match term.inputs:
        case "logits":
            return [some(ROWS, VOCABULARY, seed=seed)]
        case "hidden_states":
            return [some(ROWS, LENGTH, WIDTH, seed=seed + pair) for pair in pairs]
        case "attention_scores":
            return [some(ROWS, HEADS, LENGTH, LENGTH, seed=seed + pair) for pair in pairs]
        case "relations":
            return [tuple(some(ROWS, LENGTH, WIDTH, seed=seed + 10 * pair + i) for i in range(3)) for pair in pairs]


def tensors(side: list[Any]) -> list[Tensor]:
    return [tensor for part in side for tensor in (part if isinstance(part, tuple) else (part,))]


def cut(side: list[Any], rows: slice) -> list[Any]:
    return [tuple(t[rows] for t in part) if isinstance(part, tuple) else part[rows] for part in side]


def value_of(term: Term, source: list[Any], to: list[Any], rows: slice = slice(None)) -> Tensor:
    source, to = cut(source, rows), cut(to, rows)
    if term.inputs == "logits":
        labels_N = torch.tensor([1, 4, 0])[rows]
        return term_loss(term, None if term.source is None else source[0], to[0], labels_N)
    return term_loss(term, source, to, torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])[rows])


kinds = pytest.mark.parametrize("kind", TERMS)


def test_every_term_has_a_loss_and_an_example() -> None:
    members = get_args(get_args(Term)[0])
    assert set(members) == set(LOSSES) == {type(term_of(kind)) for kind in TERMS}


@kinds
def test_a_term_survives_json_and_says_what_it_reads_and_teaches(kind: str) -> None:
    term = term_of(kind)
    assert TypeAdapter(Term).validate_json(term.model_dump_json()) == term
    assert term.target in term.reads and term.source != term.target
    assert set(term.reads) == {model for model in (term.source, term.target) if model}
    assert all(model in term.formula for model in term.reads)
    pairs = term.layer_pairs(4, 2)
    assert all(0 <= source <= 4 and 0 <= to <= 2 for source, to in pairs)
    assert bool(pairs) == (term.inputs != "logits")


@kinds
def test_a_loss_is_a_number_the_same_each_time_whose_gradient_reaches_only_to(kind: str) -> None:
    term, (source, to) = term_of(kind), (side_of(term_of(kind), seed) for seed in (100, 200))
    random_state = torch.random.get_rng_state()
    value = value_of(term, source, to)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.shape == () and value.isfinite() and value > 0
    assert torch.equal(value, value_of(term, source, to))
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert all(tensor.grad is None for tensor in tensors(source))
    assert sum(float(tensor.grad.abs().sum()) for tensor in tensors(to) if tensor.grad is not None) > 0


@kinds
def test_a_loss_is_a_sum_over_rows(kind: str) -> None:
    """What the loop divides by the normaliser of the global batch: no mean of means."""
    term, (source, to) = term_of(kind), (side_of(term_of(kind), seed) for seed in (100, 200))
    rows = [value_of(term, source, to, slice(row, row + 1)).item() for row in range(ROWS)]
    assert value_of(term, source, to).item() == pytest.approx(sum(rows), rel=1e-10)


@pytest.mark.parametrize("kind", [kind for kind in TERMS if kind not in DETACHED_FROM_TO])
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    term, (source, to) = term_of(kind), (side_of(term_of(kind), seed) for seed in (100, 200))
    value_of(term, source, to).backward()  # type: ignore[no-untyped-call]
    for number, tensor in enumerate(tensors(to)):
        direction = some(*tensor.shape, seed=300 + number).detach()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * 1e-5 * direction
                ends.append(value_of(term, source, to).item())
                tensor -= sign * 1e-5 * direction
        slope = 0.0 if tensor.grad is None else float((tensor.grad * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


@kinds
def test_a_state_begins_empty_is_plain_numbers_and_leaves_the_term_a_term(kind: str) -> None:
    term = term_of(kind)
    assert term.at_state(START) == term
    state = START
    for step, loss in enumerate((2.0, 1.5, 1.6)):
        state = json.loads(json.dumps(dict(term.next_state(state, loss, step / 3)), allow_nan=False))
        assert type(term.at_state(state)) is type(term)
    assert bool(state) == term.has_state
