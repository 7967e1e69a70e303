"""What a phase depends on: its key changes with whatever changes a number in it, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.trials import distillation, flow, hard, model, phase
from trainables.config.phase import Phase
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec
from trainables.training.phase_graph import (
    SHARED_SEED,
    Origin,
    num_steps,
    origin_of,
    phase_key,
    phase_runs,
    seed_of,
    streams_of,
)

FOUND = {"data:corpus": "c", "data:other": "o", "model:teacher": "w"}
DATA = {
    name: {"kind": "files", "train": "a.txt", "tokenizer": {"kind": "wordpiece", "size": 160}, "length": length}
    for name, length in (("corpus", 32), ("other", 32))
}


def trial(change: Callable[[dict[str, Any]], Any] = lambda value: None) -> TrialSpec:
    value = {"data": {name: {**data} for name, data in DATA.items()}, **distillation()}
    change(value)
    return TrialSpec.model_validate(value).pruned()


def keys(change: Callable[[dict[str, Any]], Any] = lambda value: None, **found: str) -> dict[str, str]:
    spec = trial(change)
    return {str(i): phase_key(spec, i, {**FOUND, **found}) for i in phase_runs(spec)}


def distil(**more: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda value: value["phases"]["distil"].update(more)


def changed(change: Callable[[dict[str, Any]], Any], **found: str) -> set[str]:
    """The phases whose keys differ from those of the trial as it is."""
    before, after = keys(), keys(change, **found)
    return {name for name in after if before.get(name) != after[name]}


BOTH, ONLY_DISTIL = {"teach", "distil"}, {"distil"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda v: v.update(seed=1), BOTH, id="seed"),
        pytest.param(lambda v: v.update(precision="bf16"), BOTH, id="precision"),
        pytest.param(lambda v: v["data"]["other"].update(length=64), BOTH, id="the longest sequence"),
        pytest.param(lambda v: v["models"]["teacher"].update(intermediate_size=48), BOTH, id="shape of the teacher"),
        pytest.param(
            lambda v: v["models"]["teacher"].update(init={"kind": "random", "std": 0.5}), BOTH, id="init of the teacher"
        ),
        pytest.param(lambda v: v["phases"]["teach"]["budget"].update(steps=9), BOTH, id="the teacher's budget"),
        pytest.param(lambda v: v["models"]["student"].update(layers=2), ONLY_DISTIL, id="shape of the student"),
        pytest.param(
            lambda v: v["models"]["student"].update(init={"kind": "remap", "from": "teacher", "depth": "stack"}),
            ONLY_DISTIL,
            id="a remap",
        ),
        pytest.param(distil(batch=4), ONLY_DISTIL, id="batch"),
        pytest.param(distil(budget={"tokens": 99}), ONLY_DISTIL, id="kind of budget"),
        pytest.param(distil(optimizer={"lr": 1e-3, "warmup": 0.1}), ONLY_DISTIL, id="learning rate"),
        pytest.param(distil(evaluate=[0.5, 1]), ONLY_DISTIL, id="when it is evaluated"),
        pytest.param(distil(save_at=[0.5]), ONLY_DISTIL, id="what is kept"),
        pytest.param(distil(streams={"main": {"data": "other"}}), ONLY_DISTIL, id="data"),
        pytest.param(distil(streams={"main": {"corruption": {"probability": 0.3}}}), ONLY_DISTIL, id="corruption"),
        pytest.param(
            lambda v: v["phases"]["distil"]["terms"]["teacher_to_student"].update(temperature=1),
            ONLY_DISTIL,
            id="temperature",
        ),
        pytest.param(
            lambda v: v["phases"]["distil"]["terms"]["teacher_to_student"].update(weight=0), ONLY_DISTIL, id="ablation"
        ),
    ],
)
def test_a_key_changes_with_what_the_phase_reads(change: Callable[[dict[str, Any]], Any], expected: set[str]) -> None:
    assert changed(change) == expected


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda v: v["models"].update(third=model()), id="a model that nothing uses"),
        pytest.param(lambda v: v["data"]["corpus"].update(train="b.txt"), id="where the data lies"),
        pytest.param(
            lambda v: v["phases"]["distil"]["terms"].update(off=flow("teacher", "student", weight=0)),
            id="a term of weight zero",
        ),
        pytest.param(distil(start={"teacher": "teach"}), id="a start that is the default"),
        pytest.param(distil(optimizer={"student": {"lr": 5e-3, "warmup": 0.1}}), id="whose optimizer, by name"),
        pytest.param(
            distil(optimizer={"all": {"lr": 5e-3, "warmup": 0.1}, "student": {"lr": 5e-3, "warmup": 0.1}}),
            id="an optimizer that is not used",
        ),
        pytest.param(
            lambda v: v["phases"].update(later=phase("student", {"h": hard("student")})), id="a phase that comes later"
        ),
        pytest.param(
            lambda v: v.update(phases={"before": phase("student", {"h": hard("student")}, for_each_dataset=["other"]), **v["phases"]}),
            id="a phase that fans out",
        ),
        pytest.param(
            lambda v: v["phases"]["distil"].update(terms=dict(reversed(v["phases"]["distil"]["terms"].items()))),
            id="the order of terms",
        ),
    ],
)  # fmt: skip
def test_a_key_does_not_change_with_what_the_phase_does_not_read(change: Callable[[dict[str, Any]], Any]) -> None:
    before, after = keys(), keys(change)
    assert {name: after[name] for name in before} == before


def test_data_and_pretrained_weights_count_by_content() -> None:
    assert changed(lambda v: None, **{"data:corpus": "d"}) == BOTH
    assert changed(lambda v: None, **{"data:other": "p"}) == set()

    def pretrained(value: dict[str, Any]) -> None:
        value["models"]["teacher"] = {"pretrained": "somewhere"}

    assert keys(pretrained) == keys(lambda v: v["models"].update(teacher={"pretrained": "elsewhere"}))
    assert keys(pretrained)["teach"] != keys(pretrained, **{"model:teacher": "v"})["teach"]
    in_bf16 = {"pretrained": "somewhere", "dtype": "bf16"}
    assert keys(lambda v: v["models"].update(teacher=in_bf16))["teach"] != keys(pretrained)["teach"]


def test_a_key_is_that_of_the_trial_that_makes_only_this_phase() -> None:
    def change(value: dict[str, Any]) -> None:
        value["data"]["other"]["length"] = 64  # the student reads longer sequences than the teacher
        value["phases"]["distil"]["streams"] = {"main": {"data": "other"}}

    spec = trial(change)
    assert phase_key(spec.upto("teach").pruned(), PhaseRun("teach"), FOUND) == keys(change)["teach"]


def test_a_shared_phase_has_one_key_for_all_seeds_and_what_reads_it_has_one_for_each() -> None:
    def at(seed: int) -> Callable[[dict[str, Any]], None]:
        def change(value: dict[str, Any]) -> None:
            value["seed"] = seed
            value["phases"]["teach"]["seed"] = "shared"

        return change

    one, two = keys(at(1)), keys(at(2))
    assert one["teach"] == two["teach"] and one["distil"] != two["distil"]
    assert seed_of(trial(at(1)), "teach") == SHARED_SEED and seed_of(trial(at(1)), "distil") == 1


def test_each_data_set_of_a_fan_out_is_an_instance_with_a_key_of_its_own() -> None:
    def change(value: dict[str, Any]) -> None:
        value["phases"]["tune"] = phase(
            "student", {"h": hard("student")}, for_each_dataset=["corpus", "other"], save_at=[0.5]
        )
        value["phases"]["go_on"] = phase("student", {"h": hard("student")}, start={"student": "tune[other]@0.5"})

    spec = trial(change)
    tunes = [PhaseRun("tune", "corpus"), PhaseRun("tune", "other")]
    assert [i for i in phase_runs(spec) if i.phase == "tune"] == tunes
    assert [str(i) for i in tunes] == ["tune[corpus]", "tune[other]"]
    assert [streams_of(spec, i)["main"].data for i in tunes] == ["corpus", "other"]
    assert len({phase_key(spec, i, FOUND) for i in tunes}) == 2
    assert origin_of(spec, PhaseRun("tune", "other"), "student") == Origin(PhaseRun("distil"), "student", 1.0)
    origin = origin_of(spec, PhaseRun("go_on"), "student")
    assert origin == Origin(PhaseRun("tune", "other"), "student", 0.5) and origin.entry == "student@0.5"


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1}, 1),
        ({"tokens": 256}, 1),
        ({"tokens": 257}, 2),
        ({"epochs": 1}, 13),  # 100 sequences in batches of 8
        ({"epochs": 0.5}, 7),
        ({"epochs": 0.001}, 1),
        ({"epochs": 2}, 25),
    ],
)
def test_a_budget_is_rounded_up_to_whole_batches(budget: dict[str, Any], expected: int) -> None:
    value = Phase.model_validate({**phase("m", {"h": hard("m")}), "budget": budget})
    assert num_steps(value, length=32, num_sequences=100) == expected
