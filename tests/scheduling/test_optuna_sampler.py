"""Points: conditions and exclusions respected, and answers that depend only on what was known when they were asked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.scheduling.optuna_sampler import Sampler
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from tests.support.trials import distillation

WEIGHT, TAU = "phases.distil.terms.teacher_to_student.weight", "phases.distil.terms.teacher_to_student.temperature"
INIT, DEPTH = "models.student.init", "models.student.init.depth"
VARY: dict[str, Any] = {
    "sizes": {"choice": {"one": {"models.student.layers": 1}, "two": {"models.student.layers": 2}}},
    WEIGHT: {"choice": {"weak": 0.5, "strong": 4}},
    INIT: {
        "choice": {"random": {"kind": "random"}, "remap": {"kind": "remap", "from": "teacher", "depth": "copy_last"}}
    },
    DEPTH: {"choice": ["copy_last", "stack"], "when": {INIT: "remap"}},
}


@pytest.fixture
def study(tmp_path: Path) -> Any:
    def make(sampler: str, vary: Mapping[str, Any] = VARY, **search: Any) -> Study:
        raw = {
            "question": "?",
            "trial": {"data": {"kind": "python_docs", "tokenizer": {"kind": "wordpiece"}}, **distillation()},
            "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min", "minus": "alone"},
            "arms": {"alone": {WEIGHT: 0, INIT: {"kind": "random"}}},
            "vary": copy.deepcopy(dict(vary)),
            "exclude": [{"sizes": "one", DEPTH: "stack"}],
            "search": {"sampler": sampler, "points": 30, **search},
        }
        file = tmp_path / "study.yaml"
        file.write_text(json.dumps(raw))
        return load_study(file)

    return make


def new(seen: list[dict[str, Any]]) -> Any:
    return lambda params: params not in seen


def ask_all(sampler: Sampler, num: int, score: Any) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    for number in range(num):
        params = sampler.ask(number, new(seen))
        if params is None:
            break
        seen.append(params)
        sampler.tell(number, "ended", score(params))
    return seen


def by_weight(params: Mapping[str, Any]) -> float:
    return (params[WEIGHT] == "strong") + 0.1 * (params["sizes"] == "one")


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_every_point_of_a_small_space_is_found_once_and_nothing_else(study: Any, sampler: str) -> None:
    made = study(sampler)
    found = ask_all(Sampler(made), 30, by_weight)
    expected = [
        {"sizes": size, WEIGHT: weight, INIT: init, **({DEPTH: depth} if init == "remap" else {})}
        for size in ("one", "two")
        for weight in ("weak", "strong")
        for init, depth in (("random", None), ("remap", "copy_last"), ("remap", "stack"))
        if (size, depth) != ("one", "stack")
    ]
    key = lambda params: json.dumps(params, sort_keys=True)  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, expected))
    for params in found:
        made.spec(point=params, seed=0)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_history_gets_the_same_question_also_when_it_was_rebuilt(study: Any, sampler: str) -> None:
    vary = {**VARY, TAU: {"float": [1, 8], "log": True}}
    first = Sampler(study(sampler, vary))
    points = ask_all(first, 12, by_weight)
    rebuilt = Sampler(study(sampler, vary))
    for number, params in enumerate(points):
        rebuilt.add(number, params, "ended", by_weight(params))
    again = rebuilt.ask(12, new(points))
    assert again == first.ask(12, new(points)) and again is not None
    other = Sampler(study(sampler, vary, seed=1))
    assert ask_all(other, 12, by_weight) != points


def test_tpe_learns_what_is_good_and_a_random_search_does_not(study: Any) -> None:
    vary = {**VARY, TAU: {"float": [1, 8], "log": False}}
    low = {}
    for sampler in ("tpe", "random"):
        points = ask_all(Sampler(study(sampler, vary)), 30, lambda params: float(params[TAU]))
        low[sampler] = sum(params[TAU] < 2 for params in points[15:])
    assert low["tpe"] > low["random"] + 2


def test_a_stopped_point_is_no_completed_one_for_importance(study: Any) -> None:
    sampler = Sampler(study("random"))
    for number, state in enumerate(("stopped", "failed", "running")):
        sampler.add(number, {"sizes": "one", WEIGHT: "weak", INIT: "random"}, state, None)
    assert sampler.importance() is None


def test_noise_looks_no_more_important_than_chance_and_an_effect_does(study: Any) -> None:
    """Pure noise over 70 points has a top share of about .39, which says nothing."""
    rng, vary = np.random.default_rng(0), {**VARY, TAU: {"float": [1, 8], "log": False}}
    noise, effect = Sampler(study("random", vary)), Sampler(study("random", vary))
    for number in range(40):
        params = {"sizes": str(rng.choice(["one", "two"])), WEIGHT: str(rng.choice(["weak", "strong"]))}
        params |= {INIT: "random", TAU: float(rng.uniform(1, 8))}
        noise.add(number, params, "ended", float(rng.normal()))
        effect.add(number, params, "ended", params[TAU] + float(rng.normal(0, 0.1)))
    (_, by_noise), (_, by_effect) = noise.importance(), effect.importance()  # type: ignore[misc]
    assert max(by_noise.values()) < noise.importance_by_chance().largest <= 1
    assert by_effect[TAU] > effect.importance_by_chance().each[TAU]
