"""Whether a study's largest phase fits a slot, and what is advised where none fits."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.planning import slot_fit
from orchestrator.planning.reachable import ReachableTrial, reachable
from orchestrator.planning.slot_fit import MemoryEstimate, estimate_memory, largest_phase, memory_lines, slot_memory
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Limits, Search, Slot, StopEarly, Study
from tests.support.shapes import LENGTH, shapes, study, wide
from trainables.config.phase_run import PhaseRun
from trainables.training.phase_graph import phase_runs

SOFT = "phases.distil.terms.teacher_to_student"


def estimate_of(value: Study, rows: int | None = None) -> MemoryEstimate:
    trial = ReachableTrial(value.spec(seed=0).pruned(), "the trial", {})
    return estimate_memory(trial, PhaseRun("distil"), value.slot, shapes(), rows=rows)


def largest(value: Study) -> MemoryEstimate:
    return largest_phase(value, shapes(), list(reachable(value)))


def lines(value: Study) -> list[str]:
    return memory_lines(value, shapes(), list(reachable(value)), largest(value))


def has_machine(monkeypatch: pytest.MonkeyPatch, cores: int, memory: float) -> None:
    monkeypatch.setattr(slot_fit, "num_cores", lambda: cores)
    monkeypatch.setattr(slot_fit, "machine_memory", lambda: memory)


def has_gpu(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: type("P", (), {"total_memory": memory}))


# ------------------------------------------------------------------------------------------------------ memory of a slot


def test_a_slot_has_what_is_stated_or_at_most_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    has_machine(monkeypatch, 8, slot_fit.DRIVER + 24e9)
    assert slot_memory(Slot()) == 24e9 == slot_memory(Slot(cpus=99)) and slot_memory(Slot(workers=4)) == 6e9
    assert slot_memory(Slot(memory_gb=7)) == 7e9 == slot_memory(Slot(memory_gb=7, gpus=1))


def test_a_slot_of_a_gpu_has_the_share_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert slot_memory(Slot(gpus=1)) is None
    has_gpu(monkeypatch, 80e9)
    assert (slot_memory(Slot(gpus=1)), slot_memory(Slot(gpus=0.25))) == (80e9, 20e9)


def test_slots_are_as_many_as_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    has_machine(monkeypatch, 4, 64e9)
    asked = [Slot(), Slot(cpus=0.5), Slot(cpus=3), Slot(workers=2), Slot(workers=3), Slot(cpus=8)]
    assert [slot_fit.num_slots(slot) for slot in asked] == [4, 8, 1, 2, 1, 1]


def test_slots_are_as_many_as_memory_holds_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a container: `machine_memory` is its limit."""
    value = study(trial=wide())
    needed = largest(value).total
    for room, expected in ((8.1, 8), (3.5, 3), (1.01, 1)):
        has_machine(monkeypatch, 8, slot_fit.DRIVER + room * needed)
        assert slot_fit.num_slots(value.slot, needed) == expected
        said = [line for line in lines(value) if "slots at once" in line]
        assert [line.split(", ")[0] for line in said] == ([] if expected == 8 else [f"{expected} of 8 slots at once"])
        assert f"{expected} slots keep up to " in lines(value)[-1]
    has_machine(monkeypatch, 8, slot_fit.DRIVER + 0.99 * needed)
    with pytest.raises(StudyError, match=r"phase distil of the trial needs .* on this machine"):
        lines(value)
    assert slot_fit.num_slots(Slot(workers=2), needed) == 1 and slot_fit.num_slots(Slot(memory_gb=1), needed) == 8


def test_an_unknown_memory_is_said_with_what_would_make_it_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    up_to, one, advice, checkpoint = lines(study(trial=wide(), slot={"gpus": 1}))
    assert up_to.startswith("up to ") and "slot.memory_gb: N lets the plan check it" in one
    assert "with one sequence at a time" in one and advice.startswith("to need less: ")
    assert checkpoint.startswith("a checkpoint in phase distil is ")


def test_on_a_gpu_the_micro_batch_that_fits_is_expected() -> None:
    fits = estimate_of(study(trial=wide(), slot={"gpus": 1}), rows=16)
    value = study(trial=wide(), slot={"gpus": 1, "memory_gb": fits.total / 1e9})
    assert estimate_of(value).rows == 16 and estimate_of(value).total <= fits.total
    assert "in micro-batches of 16 of 64 sequences" in lines(value)[0]
    one = estimate_of(value, rows=1)
    with pytest.raises(StudyError, match="phase distil of the trial needs "):
        lines(value.model_copy(update={"slot": Slot(gpus=1, memory_gb=0.999 * one.total / 1e9)}))


# ---------------------------------------------------------------------------------------------------------- largest phase


def test_the_worst_ends_of_several_ranges_are_taken_together() -> None:
    value = study(
        trial=wide(),
        vary={
            "phases.distil.batch": {"int": [16, 128]},
            "data.length": {"choice": [32, 256]},
            "phases.distil.optimizer.lr": {"float": [1e-3, 1e-2]},
            "sizes": {"choice": {"small": {"models.student.layers": 1}, "large": {"models.student.layers": 5}}},
        },
    )
    worst = largest(value)
    spec = worst.trial.spec
    got = spec.phases["distil"].batch, spec.data["corpus"].length, spec.models["student"].layers, worst.share
    assert got == (128, 256, 5, 128)
    assert worst.trial.name == "point batch 128, length 256, sizes large"


def test_the_largest_is_named_by_its_arm() -> None:
    arms: dict[str, Any] = {"taught": {}, "alone": {f"{SOFT}.weight": 0}, "big": {"models.student.layers": 6}}
    assert "phase distil of arm big" in lines(study(trial=wide(), arms=arms))[0]


def test_every_branch_of_a_phase_is_looked_at() -> None:
    trial = wide()
    trial["data"] = {"short": {**trial["data"], "length": LENGTH}, "long": trial["data"]}
    for name in trial["phases"]:
        trial["phases"][name]["for_each_dataset"] = ["short", "long"]
        trial["phases"][name]["streams"] = {"main": {"data": "short"}}
    trial["phases"]["distil"]["start"] = {"teacher": "teach[long]"}
    value = study(trial=trial)
    assert {str(run) for run in phase_runs(value.spec(seed=0))} >= {"distil[short]", "distil[long]"}
    assert "phase distil[long] of the trial" in largest(value).where


# ---------------------------------------------------------------------------------------------------------------- advice

CHANGES = {
    "trial.phases.distil.gradient_checkpointing: true": {"phases.distil.gradient_checkpointing": True},
    "trial.precision: bf16": {"precision": "bf16"},
    "trial.phases.distil.batch: 32": {"phases.distil.batch": 32},
    "trial.data.length: 64": {"data.length": 64},
}


@pytest.mark.parametrize("label", CHANGES)
def test_a_setting_saves_what_is_said_and_fits_where_it_is_said(label: str) -> None:
    value = study(trial=wide())
    before, after = (estimate_of(study(trial=wide(), fixed=fixed)).total for fixed in ({}, CHANGES[label]))
    tight = value.model_copy(update={"slot": Slot(memory_gb=after / 1e9)})
    with pytest.raises(StudyError) as error:
        lines(tight)
    text = str(error.value)
    assert text.startswith("mine.yaml: phase distil of the trial needs ") and "\n" not in text
    assert "(process 650 MB, weights " in text and ", activations " in text
    assert f"{label} saves {slot_fit.bytes_text(before - after)} (fits)" in text
    tighter = value.model_copy(update={"slot": Slot(memory_gb=0.999 * after / 1e9)})
    assert f"{label} saves {slot_fit.bytes_text(before - after)} (fits)" not in slot_fit.advice(
        tighter.slot, shapes(), estimate_of(tighter)
    )


def test_all_settings_are_weighed_one_at_a_time() -> None:
    trial = wide()
    trial["models"] = {name: {**one, "width": 256, "intermediate_size": 1024} for name, one in trial["models"].items()}
    value = study(trial=trial)
    text = slot_fit.advice(value.slot, shapes(), estimate_of(value))
    for setting in ("gradient_checkpointing: true", "precision: bf16", "models.teacher.dtype: bf16", "optimizer.kind: adafactor",
                    "optimizer.kind: adamw_8bit", "train.student: {kind: lora}", "batch: 32", "data.length: 64"):  # fmt: skip
        assert setting in text
    assert "slot.workers: 2 saves" in text


def test_a_larger_part_of_a_gpu_gives_more(monkeypatch: pytest.MonkeyPatch) -> None:
    value = study(trial=wide(), slot={"gpus": 0.25})
    has_gpu(monkeypatch, 2.01 * estimate_of(value, rows=1).total)
    with pytest.raises(StudyError, match=r"slot\.gpus: 0\.5 gives a worker .* \(fits\)"):
        lines(value)


def test_where_no_setting_helps_this_is_said() -> None:
    trial = wide(batch=1, gradient_checkpointing=True, optimizer={"lr": 1e-3, "kind": "adafactor"})
    value = study(trial={**trial, "precision": "bf16"}, slot={"memory_gb": 0.1})
    with pytest.raises(StudyError, match=r"to need less: smaller models; no single setting saves 1 %$"):
        lines(value)


# ----------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_are_counted_by_slot_twice_each(monkeypatch: pytest.MonkeyPatch) -> None:
    has_machine(monkeypatch, 4, 64e9)
    value = study(trial=wide(), slot={"cpus": 2})
    size = 3 * 4 * shapes().num_parameters(value.spec(seed=0).models["student"], 128)
    each, kept = slot_fit.bytes_text(size), slot_fit.bytes_text(4 * size)
    assert lines(value)[-1].startswith(f"a checkpoint in phase distil is {each}; 2 slots keep up to {kept}")


@pytest.mark.parametrize(("room", "search", "is_too_little"), [(4.1, None, False), (3.9, None, True), (7.9, "asha", True), (8.1, "asha", False)])  # fmt: skip
def test_a_limit_that_is_too_small_for_the_checkpoints_is_told(
    monkeypatch: pytest.MonkeyPatch, room: float, search: str | None, is_too_little: bool
) -> None:
    has_machine(monkeypatch, 4, 64e9)
    value = study(trial=wide(), slot={"cpus": 2})
    size = 3 * 4 * shapes().num_parameters(value.spec(seed=0).models["student"], 128)
    early = Search(points=4, stop_early=StopEarly(kind="asha")) if search else None
    value = value.model_copy(update={"limits": Limits(checkpoint_gb=room * size / 1e9), "search": early})
    assert ("is too little" in lines(value)[-1]) == is_too_little
