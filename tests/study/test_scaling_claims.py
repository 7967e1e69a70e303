"""Claims about scaling in a study file: what they read of the arms, and one line for each thing that can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.study.claims import Crossing, Foretelling
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study

FILE = Path(__file__).parents[2] / "search_spaces/scaling.yaml"
Changed = Callable[..., Study]


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """Loads the shipped study with texts replaced, at their first place after `claims:`."""

    def load(*replacements: tuple[str, str]) -> Study:
        text = FILE.read_text()
        for old, new in replacements:
            start = text.index("claims:") if old in text[text.index("claims:") :] else 0
            assert old in text
            text = text[:start] + text[start:].replace(old, new, 1)
        (tmp_path / "study.yaml").write_text(text)
        return load_study(tmp_path / "study.yaml")

    return load


def test_each_kind_of_claim_is_told_by_its_key() -> None:
    claims = load_study(FILE).claims
    assert [type(claim) for claim in claims.values()] == [Crossing, Crossing, Foretelling]
    assert [claim.num_parts for claim in claims.values()] == [1, 1, 5]
    assert "above 1" in claims["weak_helps"].stated() and "within 2 %" in claims["foretold"].stated()
    assert "says" not in claims["weak_helps"].judged() and claims["weak_helps"].judged()["above"] == 1


def test_the_grid_of_a_claim_is_read_off_the_trials() -> None:
    study = load_study(FILE)
    grid = study.grid(study.claims["weak_helps"])  # type: ignore[arg-type]
    assert grid.alone == ("alone_s", "alone_m", "alone_l", "alone_xl")
    assert grid.alone_of["poor_l"] == "alone_l"
    assert {(teacher, str(start)) for teacher, start in grid.teacher.values()} == {("teacher", "teach")}
    assert [str(start) for start in grid.trained["good_m"]["d55"]] == ["trunk@0.55", "d55"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("crossing: r,", "crossing: size,", "claims.weak_helps.crossing: input should be 'r' or 'compute'"),
        ("above: 1,", "above: 0,", "claims.weak_helps.above"),
        ("above: 1,", "", "expected one bound, `below` or `above`"),
        ("above: 1,", "above: 1, below: 2,", "expected one bound, `below` or `above`"),
        ("above: 1,", "above: 1, arm: poor_s,", "claims.weak_helps.arm: unknown key 'arm' (did you mean 'arms'?)"),
        ("hold_out: largest", "hold_out: alone_xs", "hold_out 'alone_xs' is no arm without a teacher; expected largest, alone_s, alone_m"),
        ("hold_out: largest", "hold_out: good_xl", "hold_out 'good_xl' is no arm without a teacher"),
        ("error_below: 0.02", "error_below: 0", "claims.foretold.error_below"),
        ("error_below: 0.02", "error_below: -0.1", "claims.foretold.error_below"),
        ("error_below: 0.02", "error_below: 2", "claims.foretold.error_below"),
        ("metric: lm_loss, phases", "metric: lm_accuracy, phases", "a curve is of losses, and lm_accuracy is none"),
        ("phases: [d30,", "phases: [d31,", "no phase 'd31' (did you mean 'd30'?)"),
        ("phases: [d30,", "phases: [d40,", "claims.weak_helps.phases: names one twice: d40, d40"),
        ("phases: [d30, d40, d55, d75, d100]", "phases: []", "claims.weak_helps.phases"),
        ("phases: [d30,", "phases: [teach,", "phase 'teach' does not train 'student'"),
        ("arms: [alone_s,", "arms: [alone_t,", "claims.poor_stops: no arm 'alone_t' (did you mean 'alone_"),
        ("arms: [alone_s, ", "arms: [", "arm 'poor_s': no arm trains the same student for the same budgets without a teacher"),
        ("arms: [alone_s, alone_m, alone_l, alone_xl, poor_s, poor_m, poor_l, poor_xl]", "arms: [alone_s, poor_s]",
         "4 coefficients need 12 configurations of a student with a teacher or more; 1 arms x 5 phases are 5"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_claim_is_said_in_one_line(changed: Changed, old: str, new: str, said: str) -> None:
    with pytest.raises(StudyError) as error:
        changed((old, new))
    assert said in str(error.value) and str(error.value).startswith(
        str(error.value).split("study.yaml:")[0] + "study.yaml:"
    )
    assert "\n" not in str(error.value)


def test_a_law_needs_three_configurations_for_each_coefficient(changed: Changed) -> None:
    with pytest.raises(
        StudyError, match=r"claims.foretold: 5 coefficients need 15 configurations of other sizes, .* 3 arms x 2 "
    ):
        changed(("foretells: {hold_out: largest}, error_below: 0.02, model: student, metric: lm_loss, phases: [d30, d40, d55, d75, d100]",
                 "foretells: {hold_out: largest}, error_below: 0.02, model: student, metric: lm_loss, phases: [d30, d40]"))  # fmt: skip


def test_a_teacher_must_be_measured_where_it_teaches(changed: Changed) -> None:
    saved = (
        "evaluate: [1]\n      terms: {teacher_hard",
        "evaluate: [1]\n      save_at: [0.5]\n      terms: {teacher_hard",
    )
    starts = [("train: {student: full}\n", "train: {student: full}\n      start: {teacher: teach@0.5}\n")]
    starts += [(f"{{student: {start}}}", f"{{student: {start}, teacher: teach@0.5}}") for start in ("trunk@0.3", "trunk@0.4", "trunk@0.55", "trunk@0.75", "trunk")]  # fmt: skip
    with pytest.raises(StudyError, match="arm 'good_s' has several teachers; expected one"):
        changed(saved, *starts[:-1])
    with pytest.raises(
        StudyError, match=r"teaches arm 'good_s' as it is at teach@0.5, .* expected 0.5 in phases.teach.evaluate"
    ):
        changed(saved, *starts)
    measured = ("evaluate: [1]\n      save_at", "evaluate: [0.5, 1]\n      save_at")
    assert changed(saved, *starts, measured).claims.keys() == {"weak_helps", "poor_stops", "foretold"}
