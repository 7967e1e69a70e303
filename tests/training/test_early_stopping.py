"""Early stopping: the weights that were best on dev are those of the phase's end, and the choice survives a restart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.support.trials import Lab, Ran, Stopped, answering, break_at, distillation, flow, hard, model, phase
from trainables.config.phase import Phase

RISING = {"lr": 0.5, "schedule": "constant"}  # each step makes the model worse
LOOKS = [0, 0.25, 0.5, 0.75, 1]


def worsening(lab: Lab, rule: dict[str, Any] | None, **changes: Any) -> Any:
    trial = {
        "models": {"student": model()},
        "phases": {"learn": phase("student", {"hard": hard("student")}, evaluate=LOOKS, optimizer=RISING)},
    }
    return lab.spec(trial, {"phases.learn.early_stopping": rule, **changes})


def ends(ran: Ran, phase: str = "learn") -> list[dict[str, Any]]:
    return [r for r in ran.records if (r["phase"], r["progress"]) == (phase, 1) and r["split"] in ("dev", "test")]


def test_a_phase_that_gets_worse_ends_early_with_its_first_weights(lab: Lab) -> None:
    ran = lab.run(worsening(lab, {"metric": "mlm_loss", "patience": 2}))
    plain = lab.run(worsening(lab, None), trial="plain")
    losses = plain.of("learn", "student", "mlm_loss")
    assert min(losses) == losses[0] < losses[1]  # else the test tests nothing
    steps = {r["step"] for r in ran.records}
    assert max(steps) == 4  # evaluations at 2 and 4 of 8 steps were worse than the one before the first
    assert ran.phases["learn"]["tokens"] == plain.phases["learn"]["tokens"] / 2
    for split in ("dev", "test"):
        first, *_ = plain.of("learn", "student", "mlm_loss", split)
        assert [r["value"] for r in ends(ran) if r["split"] == split and r["metric"] == "mlm_loss"] == [first]
    untrained = lab.run(
        worsening(lab, None, **{"phases.learn.budget.steps": 1, "phases.learn.optimizer.lr": 1e-30}), trial="u"
    )
    for name, tensor in ran.weights("learn", "student").items():
        torch.testing.assert_close(tensor, untrained.weights("learn", "student")[name])


def test_without_patience_the_best_is_kept_and_the_whole_budget_is_spent(lab: Lab) -> None:
    ran = lab.run(worsening(lab, {"metric": "mlm_loss"}))
    assert max(r["step"] for r in ran.records) == 8
    assert len(ran.of("learn", "student", "mlm_loss")) == 5
    assert ran.of("learn", "student", "mlm_loss")[-1] == ran.of("learn", "student", "mlm_loss")[0]


def test_the_last_weights_may_stay(lab: Lab) -> None:
    ran = lab.run(worsening(lab, {"metric": "mlm_loss", "patience": 1, "restore": "last"}))
    plain = lab.run(worsening(lab, None), trial="plain")
    assert max(r["step"] for r in ran.records) == 2
    assert ends(ran)[0]["value"] == plain.of("learn", "student", ends(ran)[0]["metric"])[1]


@pytest.mark.parametrize("rule", [{"metric": "mlm_loss"}, {"term": "student_hard"}], ids=str)
def test_where_the_end_is_best_nothing_changes(lab: Lab, rule: dict[str, Any]) -> None:
    off = {"phases.distil.terms.teacher_to_student.weight": 0.5, "phases.distil.budget.steps": 16}
    plain = lab.run(lab.spec(distillation(), off))
    losses = plain.of("distil", "student", "mlm_loss")
    assert losses[-1] == min(losses)  # else the test tests nothing
    ran = lab.run(
        lab.spec(distillation(), {**off, "phases.distil.early_stopping": {**rule, "patience": 3}}), trial="early"
    )
    ours = {key: value for key, value in ran.values.items() if key[4] not in ("student_hard",) or key[3] == "train"}
    assert ours == plain.values
    assert ran.phases["distil"]["key"] != plain.phases["distil"]["key"]


@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interrupted_phase_chooses_as_it_would_have(lab: Lab, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    rule = {"metric": "mlm_loss", "patience": 3}
    whole = lab.run(worsening(lab, rule))
    other = Lab(lab.root.parent / f"{lab.root.name}-again", lab.fingerprints, lab.data)
    other.root.mkdir()
    (other.root / "data").symlink_to(lab.root / "data")
    with monkeypatch.context() as patch:
        break_at(patch, "learn", step)
        with pytest.raises(Stopped):
            other.run(worsening(other, rule), checkpoint_seconds=-1.0)
    assert other.run(worsening(other, rule), attempt=2).values == whole.values


def test_a_term_on_dev_is_the_loss_that_evaluations_measure(lab: Lab) -> None:
    ran = lab.run(worsening(lab, {"term": "hard"}, **{"phases.learn.optimizer": {"lr": 5e-3}}))
    assert ran.of("learn", "student", "hard") == pytest.approx(ran.of("learn", "student", "mlm_loss"), rel=1e-5)


def test_a_term_on_dev_of_a_task(new_task_lab: Any) -> None:
    lab = new_task_lab()
    learn = phase(
        "student",
        {"hard": hard("student")},
        streams={"main": {"data": "pair"}},
        evaluate=LOOKS,
        early_stopping={"term": "hard", "patience": 1},
    )
    ran = lab.run(lab.spec({"models": {"student": model()}, "phases": {"learn": learn}}))
    assert ran.of("learn", "student", "hard") == pytest.approx(ran.of("learn", "student", "task_loss"), rel=1e-5)


def test_a_flow_on_dev_is_the_divergence_from_the_teacher(new_instructed_lab: Any) -> None:
    lab = new_instructed_lab()
    ran = lab.run(lab.spec(answering(early_stopping={"term": "teacher_to_student", "patience": 1})))
    ours = ran.of("distil", "student", "teacher_to_student")
    assert ours == pytest.approx(ran.of("distil", "student", "teacher_kl"), rel=1e-4)


def test_a_phase_without_the_field_is_dumped_as_before() -> None:
    plain = Phase.model_validate(phase("student", {"hard": hard("student")}))
    assert "early_stopping" not in plain.model_dump(mode="json")
    rule = {"metric": "mlm_loss", "patience": 2}
    stopping = Phase.model_validate(phase("student", {"hard": hard("student")}, early_stopping=rule))
    assert Phase.model_validate(stopping.model_dump(mode="json")) == stopping


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({}, "expected either `metric` or `term`"),
        ({"metric": "a", "term": "soft"}, "expected either `metric` or `term`"),
        ({"metric": "mlm_loss", "restore": "last"}, "give `patience`"),
        ({"metric": "mlm_loss", "patience": 0}, "greater than 0"),
        ({"term": "sfot", "patience": 1}, "no term 'sfot'; expected hard, soft, off"),
        ({"term": "off", "patience": 1}, "'off' has weight 0"),
        ({"term": "soft", "model": "student"}, "a term has its own model"),
        ({"metric": "mlm_loss", "model": "teacher"}, "'teacher' is not trained; expected student"),
        ({"metric": "mlm_loss", "data": "other"}, "'other'; expected corpus"),
    ],
)
def test_what_cannot_decide_is_refused(rule: dict[str, Any], said: str) -> None:
    terms = {"hard": hard("student"), "soft": flow("teacher", "student"), "off": flow("teacher", "student", weight=0)}
    with pytest.raises(ValidationError, match=said):
        Phase.model_validate(phase("student", terms, early_stopping=rule))
    with pytest.raises(ValidationError, match="fractions before the end"):
        Phase.model_validate(phase("student", terms, early_stopping={"metric": "mlm_loss"}, evaluate=[1]))
