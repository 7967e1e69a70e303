"""A phase whose terms have weights per position: the same numbers however the batch is cut, on two workers, and after a stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.support.specs import DATA
from tests.support.trials import Lab, Listener, Stopped, close_numbers, flow, hard, model, phase, same_numbers
from trainables.config.trial import TrialSpec

REVISION = {"kind": "revision", "by": "teacher", "eta": 0.7}
BY_LOSS = {"kind": "by_loss", "among": ["teacher", "other"]}


def weighted(stream: dict[str, Any] | None = None) -> dict[str, Any]:
    terms = {
        "revised": flow("teacher", "student", unit_weights=REVISION),
        "corrected": hard("student", unit_weights=REVISION),
        "one": flow("teacher", "student", "reverse_kl", unit_weights=BY_LOSS),
        "two": flow("other", "student", "jsd", unit_weights=BY_LOSS),
        "order": flow("teacher", "student", "rank_correlation", top=3, unit_weights={"kind": "overlap", "top": 3}),
    }
    teachers = {f"{name}_hard": hard(name) for name in ("teacher", "other")}
    return {
        "models": {"teacher": model(layers=2), "other": model(), "student": model()},
        "phases": {
            "teach": phase(("teacher", "other"), teachers),
            "distil": phase("student", terms, **({} if stream is None else {"streams": {"main": stream}})),
        },
    }


def test_parts_of_a_batch_and_a_stop_change_no_number(new_lab: Callable[[], Lab]) -> None:
    whole, parts, stopped = new_lab(), new_lab(), new_lab()
    expected = whole.run(whole.spec(weighted()))
    close_numbers(parts.run(parts.spec(weighted()), micro_batch=3), expected, rtol=5e-6)
    with pytest.raises(Stopped):
        stopped.run(stopped.spec(weighted()), session=Listener(("distil", 0.5)), checkpoint_at_reports=True)
    same_numbers(stopped.run(stopped.spec(weighted()), attempt=2), expected)


def test_weights_are_part_of_what_a_phase_is_stored_under(new_lab: Callable[[], Lab]) -> None:
    lab = new_lab()
    path = "phases.distil.terms.revised.unit_weights"
    specs = [lab.spec(weighted(), changes) for changes in ({}, {f"{path}.eta": 0.6}, {path: None})]
    assert len({lab.key(spec, "distil") for spec in specs}) == 3
    assert len({lab.key(spec, "teach") for spec in specs}) == 1


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(new_lab: Callable[[], Lab]) -> None:
    from tests.support.ranks import run_on_ranks

    whole, lab = new_lab(), new_lab()
    expected, ran = whole.run(whole.spec(weighted())), run_on_ranks(lab, lab.spec(weighted()), 2)
    assert ran.values.keys() == expected.values.keys()
    for key, value in expected.values.items():
        assert ran.values[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key
    theirs = expected.weights("distil", "student")
    for key, tensor in ran.weights("distil", "student").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"data": "number"}, "number is a regression, whose positions have no probabilities"),
        ({"data": "ask", "replies": {"kind": "sampled", "by": "teacher"}}, "revision reads a label, which generated"),
    ],
)
def test_weights_without_labels_or_probabilities_are_refused(stream: dict[str, Any], message: str) -> None:
    data = {
        "corpus": DATA["python_docs"],
        "number": {"kind": "labelled_files", "train": "a.csv"},
        "ask": {"kind": "python_instructions"},
    }
    trial = weighted(stream)
    del trial["phases"]["distil"]["terms"]["corrected"]
    with pytest.raises(ValidationError, match=message):
        TrialSpec.model_validate({"data": data, **trial})
