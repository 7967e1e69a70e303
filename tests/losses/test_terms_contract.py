"""What every term keeps, whatever its loss: run over the closed list; a term from outside needs only an example in TERMS."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import get_args

import pytest
from pydantic import TypeAdapter

from tests.support.specs import TERMS
from trainables.config.schedules import START
from trainables.config.terms import Term
from trainables.losses.contract import TERM_CHECKS, has_the_gradient_of_finite_differences
from trainables.losses.terms import LOSSES

# part of their target is a detached function of `to`: test_logits.py compares them with their definitions instead
DETACHED_FROM_TO = {"adaptive_kl", "interpolated_kl"}


def term_of(kind: str) -> Term:
    return TypeAdapter(Term).validate_python(TERMS[kind])  # type: ignore[no-any-return]


kinds = pytest.mark.parametrize("kind", TERMS)


def test_every_term_has_a_loss_and_an_example() -> None:
    members = get_args(get_args(Term)[0])
    assert set(members) == set(LOSSES) == {type(term_of(kind)) for kind in TERMS}


@kinds
@pytest.mark.parametrize("check", TERM_CHECKS, ids=lambda check: check.__name__)
def test_a_term_keeps_the_contract(kind: str, check: Callable[[Term], None]) -> None:
    if check is not has_the_gradient_of_finite_differences or kind not in DETACHED_FROM_TO:
        check(term_of(kind))


@kinds
def test_a_term_says_what_it_reads_and_teaches(kind: str) -> None:
    term = term_of(kind)
    assert term.target in term.reads and term.source != term.target
    assert set(term.reads) == {model for model in (term.source, term.target) if model}


@kinds
def test_a_state_begins_empty_is_plain_numbers_and_leaves_the_term_a_term(kind: str) -> None:
    term = term_of(kind)
    assert term.at_state(START) == term
    state = START
    for step, loss in enumerate((2.0, 1.5, 1.6)):
        state = json.loads(json.dumps(dict(term.next_state(state, loss, step / 3)), allow_nan=False))
        assert type(term.at_state(state)) is type(term)
    assert bool(state) == term.has_state
