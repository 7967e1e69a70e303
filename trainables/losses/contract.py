"""What every term keeps, whatever its loss. The tests run this over the closed list, `orchestrator.check` over a user's file.

Each check raises Broken, whose message says what is expected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from trainables.config.terms import Term
from trainables.losses.terms import term_loss

ROWS, LENGTH, WIDTH, HEADS, VOCABULARY = 3, 5, 8, 2, 7
STEP = 1e-5  # of finite differences, in float64


class Broken(Exception):
    """A value does not keep its contract."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise Broken(message)


def some(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def side_of(term: Term, seed: int) -> list[Any]:
    """Draws outputs of one model, as the term's `inputs` ask for them: for each pair of layers, or a single one."""
    pairs = range(len(term.layer_pairs(4, 2)) or 1)
    if term.inputs == "logits":
        return [some(ROWS, VOCABULARY, seed=seed)]
    if term.inputs == "hidden_states":
        return [some(ROWS, LENGTH, WIDTH, seed=seed + pair) for pair in pairs]
    if term.inputs == "attention_scores":
        return [some(ROWS, HEADS, LENGTH, LENGTH, seed=seed + pair) for pair in pairs]
    return [tuple(some(ROWS, LENGTH, WIDTH, seed=seed + 10 * pair + i) for i in range(3)) for pair in pairs]


def _outputs(term: Term) -> tuple[list[Any], list[Any]]:
    return side_of(term, 100), side_of(term, 200)


def tensors(side: list[Any]) -> list[Tensor]:
    return [tensor for part in side for tensor in (part if isinstance(part, tuple) else (part,))]


def _cut(side: list[Any], rows: slice) -> list[Any]:
    return [tuple(t[rows] for t in part) if isinstance(part, tuple) else part[rows] for part in side]


def value_of(term: Term, source: list[Any], to: list[Any], rows: slice = slice(None)) -> Tensor:
    source, to = _cut(source, rows), _cut(to, rows)
    if term.inputs == "logits":
        labels_N = torch.tensor([1, 4, 0])[rows]
        return term_loss(term, None if term.source is None else source[0], to[0], labels_N)
    return term_loss(term, source, to, torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])[rows])


def survives_json(term: Term) -> None:
    again = TypeAdapter[Any](Term).validate_json(term.model_dump_json())
    expect(again == term, "is another value after JSON; expected fields that pydantic reads back")
    expect(all(model in term.formula for model in term.reads), "`formula` must name each model that the term reads")
    pairs = term.layer_pairs(4, 2)
    expect(
        all(0 <= i <= 4 and 0 <= j <= 2 for i, j in pairs), f"pairs {pairs}: expected layers that 4 and 2 layers have"
    )
    expect(bool(pairs) == (term.inputs != "logits"), "layers are paired below the logits, and only there")


def is_a_positive_number(term: Term) -> None:
    value = value_of(term, *_outputs(term))
    expect(isinstance(value, Tensor) and value.shape == (), f"expected a loss of shape (); found {_shape(value)}")
    expect(
        bool(value.isfinite()) and value.item() > 0,
        f"expected a positive number between unlike outputs; found {value.item():g}",
    )


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def is_the_same_each_time(term: Term) -> None:
    state, outputs = torch.random.get_rng_state(), _outputs(term)
    first, second = value_of(term, *outputs), value_of(term, *outputs)
    expect(torch.equal(first, second), "expected the same loss each time")
    expect(torch.equal(state, torch.random.get_rng_state()), "draws from torch's own random numbers; expected none")


def teaches_only_its_target(term: Term) -> None:
    source, to = _outputs(term)
    value_of(term, source, to).backward()  # type: ignore[no-untyped-call]
    expect(all(tensor.grad is None for tensor in tensors(source)), "a gradient reaches `from`; expected `to` alone")
    learnt = sum(float(tensor.grad.abs().sum()) for tensor in tensors(to) if tensor.grad is not None)
    expect(learnt > 0, "no gradient reaches `to`")


def is_a_sum_over_rows(term: Term) -> None:
    """Checks that the loop may divide once, by the normaliser of the global batch: no mean of means."""
    outputs = _outputs(term)
    rows = sum(value_of(term, *outputs, slice(row, row + 1)).item() for row in range(ROWS))
    whole = value_of(term, *outputs).item()
    expect(
        abs(whole - rows) <= 1e-10 * abs(whole), f"expected a sum over rows: {whole:.6g} of all, {rows:.6g} of each row"
    )


def has_the_gradient_of_finite_differences(term: Term) -> None:
    source, to = _outputs(term)
    value_of(term, source, to).backward()  # type: ignore[no-untyped-call]
    for number, tensor in enumerate(tensors(to)):
        direction, ends = some(*tensor.shape, seed=300 + number).detach(), list[float]()
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * STEP * direction
                ends.append(value_of(term, source, to).item())
                tensor -= sign * STEP * direction
        slope = 0.0 if tensor.grad is None else float((tensor.grad * direction).sum())
        expected = (ends[0] - ends[1]) / (2 * STEP)
        near = abs(slope - expected) <= max(1e-8, 1e-5 * abs(expected))
        expect(near, f"the gradient along a direction is {slope:.6g}; finite differences give {expected:.6g}")


TERM_CHECKS: tuple[Callable[[Term], None], ...] = (
    survives_json,
    is_a_positive_number,
    is_the_same_each_time,
    teaches_only_its_target,
    is_a_sum_over_rows,
    has_the_gradient_of_finite_differences,
)
