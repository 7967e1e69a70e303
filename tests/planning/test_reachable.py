"""The trials that a study can reach."""

from __future__ import annotations

import pytest

from orchestrator.planning.reachable import reachable, reached_at
from orchestrator.study.errors import StudyError
from tests.support.shapes import study

SIZES = {"small": {"models.student.layers": 1}, "large": {"models.student.layers": 3}}


def test_reachable_trials_are_arms_ends_of_ranges_and_baselines_at_all_sizes() -> None:
    assert [trial.name for trial in reachable(study())] == ["the trial"]
    searched = study(
        arms={"alone": {"phases.distil.terms.teacher_to_student.weight": 0}},
        vary={
            "sizes": {"choice": SIZES},
            "phases.distil.optimizer.lr": {"float": [1e-3, 1e-2]},
            "phases.distil.batch": {"choice": [8, 16]},
        },
        exclude=[{"sizes": "small", "phases.distil.batch": 16}],
        objective={"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min", "minus": "alone"},
    )
    found = {trial.name: trial for trial in reachable(searched)}
    assert "arm alone" in found and "point sizes small, lr 0.001" in found and "point sizes large, lr 0.01" in found
    assert found["arm alone at sizes large"].spec.models["student"].layers == 3
    assert "teacher" not in found["arm alone at sizes large"].spec.models  # pruned
    assert "point sizes large, batch 16" in found and "point sizes small, batch 16" not in found
    assert reached_at(searched, found["point sizes large, batch 16"].point | {"sizes": "small"}) is None


def test_an_arm_that_is_no_valid_trial_is_refused() -> None:
    with pytest.raises(StudyError):
        list(reachable(study(arms={"wrong": {"models.student.layers": 0}})))
