"""When claims were stated: what an edit after results shows, and that nothing turns it into a claim fixed beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.analysis.claim_history import (
    ClaimHistory,
    count_results,
    digest_of,
    keep_history,
    note_report,
    read_history,
)
from orchestrator.study.schema import Study
from trainables.storage.files import Storage, StorageError

CLAIM = {"arm": "taught", "against": "alone", "model": "student", "metric": "mlm_loss"}
BEFORE, UNKNOWN = "fixed before results", "not known to have been fixed before results"


def study(seeds: Any = 5, **claims: Any) -> Study:
    objective = {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"}
    raw = {"name": "s", "file": "s.yaml", "question": "?", "trial": {}, "objective": objective, "seeds": seeds}
    return Study.model_validate({**raw, "arms": {"alone": {}, "taught": {}}, "claims": claims or {"helps": CLAIM}})


@pytest.fixture
def home(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "s"))


def at(home: Storage, of: Study, num_results: int) -> ClaimHistory:
    """A sweep or a report finds so many results."""
    keep_history(home, read_history(home).with_now(of, num_results))
    return read_history(home).with_now(of, num_results)


def test_what_is_claimed_before_results_is_fixed_and_written_once(home: Storage) -> None:
    for num in (0, 3, 10):
        history = at(home, study(), num)
        assert history.stated("helps").text() == BEFORE and not history.edits() and history.is_known
    assert home.list("claims") == ["000.json"]


def test_an_edit_before_results_is_none(home: Storage) -> None:
    at(home, study(), 0)
    history = at(home, study(helps={**CLAIM, "margin": 0.1}), 0)
    assert history.stated("helps").text() == BEFORE and not history.edits()


FIELDS = {
    "arm": "alone", "against": "other", "against_model": "teacher", "metric": "accuracy", "split": "dev", "at": 0.5,
    "margin": -0.1, "within": 0.2, "axis": "flops", "less": "flops", "family": "own", "task": "rte", "phase": "teach", "model": "teacher",
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_that_decides_shows_an_edit_after_results(home: Storage, field: str) -> None:
    at(home, study(), 0)
    history = at(home, study(helps={**CLAIM, field: FIELDS[field]}), 6)
    assert history.stated("helps").text() == "stated after 6 of 6 results"
    (edit,) = history.edits()
    assert (edit.name, edit.field, edit.after, edit.num_results) == ("helps", field, FIELDS[field], 6)
    later = read_history(home).with_now(study(helps={**CLAIM, field: FIELDS[field]}), 10)
    assert later.stated("helps").text() == "stated after 6 of 10 results"


def test_every_field_that_decides_is_tried(home: Storage) -> None:
    assert {*type(study().claims["helps"]).model_fields} == {*FIELDS, "says", "paper"}


def test_words_a_papers_figure_and_a_name_are_no_edit(home: Storage) -> None:
    at(home, study(), 0)
    history = at(home, study(renamed={**CLAIM, "says": "It helps.", "paper": "+1"}), 6)
    assert history.stated("renamed").text() == BEFORE and not history.edits()


def test_an_edit_that_is_taken_back_stays_in_the_history(home: Storage) -> None:
    at(home, study(), 0)
    at(home, study(helps={**CLAIM, "margin": 0.1}), 6)
    history = at(home, study(), 6)
    assert [edit.text() for edit in history.edits()] == ["helps.margin: 0.0 → 0.1", "helps.margin: 0.1 → 0.0"]
    assert history.stated("helps").text() == "stated after 6 of 6 results"


def test_claims_that_are_added_or_removed_are_listed(home: Storage) -> None:
    at(home, study(helps=CLAIM, cheap={**CLAIM, "less": "flops"}), 0)
    history = at(home, study(helps=CLAIM, close={**CLAIM, "within": 0.1}), 4)
    assert history.stated("helps").text() == BEFORE and history.stated("close").num_results == 4
    assert {edit.text() for edit in history.edits()} == {"cheap: stated → removed", "close: none → added"}


@pytest.mark.parametrize("lost", [["000.json"], ["000.json", "001.json"], ["001.json"]])
def test_no_deleted_file_turns_an_edit_into_a_claim_fixed_beforehand(home: Storage, lost: list[str]) -> None:
    at(home, study(), 0)
    edited = study(helps={**CLAIM, "margin": -0.1})
    at(home, edited, 6)
    for name in lost:
        home.delete(f"claims/{name}")
    for _ in range(2):
        assert at(home, edited, 6).stated("helps").text() in (UNKNOWN, "stated after 6 of 6 results")


def test_a_changed_file_is_found(home: Storage) -> None:
    at(home, study(), 0)
    edited = study(helps={**CLAIM, "margin": -0.1})
    at(home, edited, 6)
    for name in home.list("claims"):
        text = home.read(f"claims/{name}") or b""
        home.write(f"claims/{name}", text.replace(b'"margin": 0.0', b'"margin": -0.1'))
        history = at(home, edited, 6)
        if history.is_whole:
            continue
        assert history.stated("helps").text() == UNKNOWN
        return
    raise AssertionError("no change was found")


def test_a_storage_without_a_history_knows_nothing(home: Storage) -> None:
    for _ in range(2):
        history = at(home, study(), 6)
        assert history.stated("helps").text() == UNKNOWN and history.fixed is None and not history.is_beyond_plan


def test_numbers_of_seeds_beyond_the_plan_show(home: Storage) -> None:
    at(home, study(), 0)
    assert not at(home, study(), 10).is_beyond_plan
    more = at(home, study(seeds=10), 10)
    assert more.is_beyond_plan and more.looks == (10,) and [e.text() for e in more.edits()] == ["seeds: 5 → 10"]
    assert more.stated("helps").text() == BEFORE, "the claim is as it was"
    kept = read_history(home).with_now(study(), 20, read_history(home).looks)
    assert kept.looks == (10,) and not kept.is_new, "a report does not see `--seeds` and judges what the sweep ran"


def test_reports_are_counted_where_the_storage_can_be_written(home: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    at(home, study(), 0)
    for num in (1, 2):
        assert note_report(home, at(home, study(), 5)).num_reports == num == read_history(home).num_reports

    def refuse(*_: Any) -> None:
        raise StorageError(30, "Read-only file system")

    monkeypatch.setattr(Storage, "write", refuse)
    monkeypatch.setattr(Storage, "create", refuse)
    edited = read_history(home).with_now(study(helps={**CLAIM, "margin": 0.1}), 6)
    history = note_report(home, edited)
    assert not history.is_writable and history.num_reports == 2
    assert history.stated("helps").text() == "stated after 6 of 6 results"


def test_results_are_trials_of_arms_that_are_over() -> None:
    rows = [{"kind": kind, "arm": arm, "status": status} for kind, arm, status in (
        ("trial", "a", "ended"), ("trial", "a", "failed"), ("trial", "a", "running"), ("trial", None, "ended"),
        ("trial", float("nan"), "ended"), ("tune", "a", "ended"), ("confirm", "a", "ended"),
    )]  # fmt: skip
    assert count_results(rows) == 2


def test_the_hash_is_of_what_decides() -> None:
    assert digest_of(study()) == digest_of(study(helps={**CLAIM, "says": "x"}))
    assert len({digest_of(s) for s in (study(), study(seeds=6), study(helps={**CLAIM, "margin": 1}))}) == 3
