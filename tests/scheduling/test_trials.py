"""Trials and their identities: equal where they compute the same, apart where anything can change a number."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.scheduling.trials import Fingerprints, PlannedTrial, Planner, strata, strata_of
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from tests.support.trials import distillation, wordy_documents

SOFT = "phases.distil.terms.teacher_to_student"
LR = "phases.distil.optimizer.lr"
SIZES = {
    "choice": {
        "small": {"models.teacher.layers": 1, "models.student.layers": 2},
        "big": {"models.teacher.layers": 2, "models.student.layers": 3},
    }
}
Make = Callable[..., Study]


@pytest.fixture
def make(prepared: Any, tmp_path: Path) -> Make:
    def make(trial: Any = None, **keys: Any) -> Study:
        raw = {
            "question": "?",
            "trial": {"data": {"corpus": prepared[2]["corpus"]}, **(trial or distillation())},
            "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min", "minus": "alone"},
            "arms": {"alone": {f"{SOFT}.weight": 0}, "taught": {}},
            "vary": {"sizes": SIZES, LR: {"float": [1e-3, 1e-2]}},
            "search": {"points": 3},
        } | keys
        file = tmp_path / "study.yaml"
        file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
        return load_study(file)

    return make


@pytest.fixture
def plan(prepared: Any) -> Callable[..., PlannedTrial]:
    """An arm at a seed, or a point."""
    fingerprints = Fingerprints(str(prepared[0]))

    def plan(study: Study, arm: str | None = "taught", seed: int = 0, **how: Any) -> PlannedTrial:
        spec = study.spec(arm=arm, seed=seed, **how)
        return Planner(study, fingerprints).plan(spec, "trial", arm or "p000", arm=arm, params=how.get("point", {}))

    return plan


def test_a_trial_keeps_its_id_under_every_name_and_order(make: Make, plan: Callable[..., PlannedTrial]) -> None:
    study = make()
    again = make(arms={"alone": {f"{SOFT}.weight": 0}, "guided": {f"{SOFT}.weight": 1}}, seeds=7, question="another")
    assert plan(study).id == plan(again, "guided").id and len(plan(study).id) == 12
    assert plan(study).id != plan(study, seed=1).id != plan(study, "alone").id
    assert int(plan(study).id, 16) >= 0


def test_what_a_study_says_beside_the_trial_is_in_no_id(make: Make, plan: Callable[..., PlannedTrial]) -> None:
    other = make(slot={"cpus": 2}, limits={"minutes": 3}, search={"points": 9, "seed": 4}, claims={})
    assert plan(make()).id == plan(other).id


@pytest.mark.parametrize(("path", "value"), [
    ("phases.distil.batch", 4), ("phases.distil.budget.steps", 9), ("models.student.dropout", 0.1), ("precision", "bf16"),
    (f"{SOFT}.temperature", 3), (f"{SOFT}.tau_squared", True), ("phases.teach.budget.steps", 9), ("models.teacher.layers", 2),
    ("phases.distil.optimizer.lr", 1e-3), ("phases.distil.seed", "shared"),
])  # fmt: skip
def test_whatever_can_change_a_number_is_in_the_id(
    make: Make, plan: Callable[..., PlannedTrial], path: str, value: Any
) -> None:
    study = make(arms={"alone": {f"{SOFT}.weight": 0}, "taught": {}, "other": {path: value}})
    mine, other = plan(study), plan(study, "other")
    assert mine.id != other.id and mine.keys["distil"] != other.keys["distil"]


def test_only_the_phases_that_read_a_change_get_a_new_key(make: Make, plan: Callable[..., PlannedTrial]) -> None:
    study = make(arms={"alone": {f"{SOFT}.weight": 0}, "taught": {}, "hot": {f"{SOFT}.temperature": 4}})
    taught, hot, alone = plan(study), plan(study, "hot"), plan(study, "alone")
    assert taught.keys["teach"] == hot.keys["teach"] and taught.keys["distil"] != hot.keys["distil"]
    assert list(taught.keys) == ["teach", "distil"] and taught.upstream == ("teach",)
    assert list(alone.keys) == ["distil"] and alone.upstream == ()
    assert plan(study, seed=1).keys["teach"] != taught.keys["teach"]


def test_a_teacher_is_the_trial_of_one_phase(make: Make, plan: Callable[..., PlannedTrial], prepared: Any) -> None:
    study = make()
    taught = plan(study, seed=3)
    teacher = Planner(study, Fingerprints(str(prepared[0]))).teacher(taught, "teach")
    assert (teacher.kind, teacher.point, teacher.arm, teacher.seed) == ("teacher", "teach", None, 3)
    assert teacher.keys == {"teach": taught.keys["teach"]} and set(teacher.spec.models) == {"teacher"}


def test_data_and_weights_count_by_content_not_by_place(make: Make, prepared: Any, tmp_path: Path) -> None:
    """A corpus that was moved is the same corpus; one that was edited is another."""
    spec = make().trial
    moved = copy.deepcopy(spec)
    moved["data"]["corpus"]["train"] = str(shutil.copy(prepared[2]["corpus"]["train"], tmp_path / "elsewhere.txt"))
    identity = Fingerprints(str(prepared[0]))
    trial = {key: value for key, value in moved.items() if key != "data"}
    there = [identity.of(make(trial={**trial, "data": data}).spec(seed=0)) for data in (spec["data"], moved["data"])]
    assert there[0] == there[1] == {"data:corpus": prepared[1]["data:corpus"]}
    (tmp_path / "elsewhere.txt").write_text("\n\n".join(wordy_documents(160, seed=5)))
    assert Fingerprints(None).of(make(trial={**trial, "data": moved["data"]}).spec(seed=0)) != there[0]


def test_an_identity_without_a_folder_writes_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, here = make(), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert Fingerprints(None).of(study.spec(seed=0)).keys() == {"data:corpus"}
    assert list(here.iterdir()) == []


def test_sizes_are_named_whoever_set_them(make: Make, plan: Callable[..., PlannedTrial]) -> None:
    """A baseline of a point and the arm itself stand in one stratum where their sizes agree."""
    study = make(
        arms={
            "alone": {f"{SOFT}.weight": 0},
            "taught": {},
            "large": {"models.teacher.layers": 2, "models.student.layers": 3},
        }
    )
    assert study.size_axes() == ("sizes",)
    assert strata_of(study, study.spec(arm="large", seed=0)) == {"sizes": "big"}
    assert strata_of(study, study.spec(seed=0)) == {}  # 1 and 1: no label says so
    assert plan(study, "large").params == {"sizes": "big"}
    assert list(strata(study)) == [{"sizes": "small"}, {"sizes": "big"}]


def test_excluded_sizes_are_no_stratum(make: Make) -> None:
    heads = {"choice": {"two": {"models.student.heads": 2}, "four": {"models.student.heads": 4}}}
    study = make(
        vary={"sizes": SIZES, "models.student.width": {"choice": [16, 32]}, "h": heads},
        exclude=[{"sizes": "big", "models.student.width": 32}],
    )
    assert len(list(strata(study))) == 3


def test_sizes_by_a_range_are_refused_since_each_needs_its_baseline(make: Make) -> None:
    study = make(vary={"models.student.layers": {"int": [1, 3]}})
    with pytest.raises(StudyError, match=r"study.yaml.*sizes are varied by choice"):
        list(strata(study))
