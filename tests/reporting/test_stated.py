"""What the report says of when claims were stated, alike on the page, in Markdown and on the terminal."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.analysis import tables as tables_
from orchestrator.analysis.claim_history import keep_history, read_history
from orchestrator.planning.preview import claim_lines
from orchestrator.report import main
from orchestrator.reporting.page import make_report
from orchestrator.reporting.stated import savings
from orchestrator.study.schema import Study
from tests.reporting.test_page import STUDY, Maker, arms, study_of
from trainables.storage.files import Storage, StorageError

ALONE = re.sub(r"(tune|search|confirm): .*\n|vary:\n(  .*\n)+", "", STUDY).replace(", minus: alone", "")


def said(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `report` makes of a study file: the page, the Markdown and the terminal."""
    study, runs = study_of(folder, text), folder / "runs"
    assert main([study.file, "--storage", str(runs)]) == 0
    written = [(runs / study.folder / name).read_text() for name in ("report.html", "report.md")]
    plain = [re.sub(r"\\(.)", r"\1", html.unescape(one)) for one in written]
    return [*plain, capsys.readouterr().err]


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """A storage in which a sweep ran five seeds of three arms."""
    study = study_of(tmp_path, ALONE)
    home = Storage(str(tmp_path / "runs")).sub(study.folder)
    keep_history(home, read_history(home).with_now(study, 0))
    maker = Maker(study)
    arms(maker)
    tables_.write(maker.tables(), home)
    return tmp_path


def test_claims_that_were_not_edited_were_fixed_before_results(swept: Path, capsys: Any) -> None:
    for shown in said(swept, ALONE, capsys):
        assert shown.count("fixed before results") >= 3 and "Edited after results" not in shown
    page = said(swept, ALONE.replace("A good teacher helps", "Other words", 1), capsys)[0]
    assert "Edited after results" not in page and "The report was made 2 times." in page


def test_an_edit_after_results_is_shown_everywhere(swept: Path, capsys: Any) -> None:
    edited = ALONE.replace("says: A good teacher helps,", "says: A good teacher helps, margin: -0.01,")
    edited = re.sub("  accurate: .*\n", "", edited)
    for shown in said(swept, edited, capsys):
        assert "stated after 15 of 15 results" in shown and "fixed before results" in shown
        assert "Edited after results: good_teacher_helps.margin: 0.0 → -0.01; accurate: stated → removed." in shown
    for shown in said(swept, ALONE, capsys):  # taken back: the history keeps it
        assert "good_teacher_helps.margin: -0.01 → 0.0" in shown and "stated after 15 of 15 results" in shown
    history = read_history(Storage(str(swept / "runs" / "dwt"))).with_now(study_of(swept, edited), 15)
    lines = claim_lines(study_of(swept, edited), history)
    assert any("stated after 15" in line for line in lines) and any(line.startswith("edited after 15 results") for line in lines)  # fmt: skip


def test_a_storage_without_a_history_says_so(swept: Path, capsys: Any) -> None:
    for name in ("000.json",):
        (swept / "runs" / "dwt" / "claims" / name).unlink()
    for _ in range(2):
        for shown in said(swept, ALONE, capsys):
            assert "not known to have been fixed before results" in shown and "stated after" not in shown


def test_seeds_beyond_the_plan_are_said_of_each_verdict(swept: Path, capsys: Any) -> None:
    home = Storage(str(swept / "runs" / "dwt"))
    keep_history(home, read_history(home).with_now(study_of(swept, ALONE, seeds=10), 15))
    for shown in said(swept, ALONE, capsys):
        assert shown.count("seeds changed beyond the plan") >= 3 and "changed beyond the plan, after results" in shown
        assert "Edited after results: seeds: 5 → 10." in shown


def test_a_storage_that_cannot_be_written_is_named_in_a_line(swept: Path, capsys: Any, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError(30, "Read-only file system")

    monkeypatch.setattr(Storage, "write", refuse)
    monkeypatch.setattr(Storage, "create", refuse)
    assert main([str(swept / "dwt.yaml"), "--storage", str(swept / "runs")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "The storage cannot be written: this report is not counted, and an edit of claims is not kept." in lines
    assert lines[-1].startswith("error: ") and "Read-only file system" in lines[-1]


def test_what_looks_saved_is_said(tmp_path: Path) -> None:
    study: Study = study_of(tmp_path, ALONE.replace("seeds: 5", "seeds: {looks: [3, 5, 9]}"))
    maker = Maker(study)
    arms(maker, seeds=3, good=2.5)
    report = make_report(study, maker.tables(), {})
    assert savings(study, maker.tables(), ()) == "", "no claims, no looks"
    assert "1 more claim waits for a planned look" in report.summary.answer
    assert "Planned looks: at most 12 trials of arms may follow." in report.summary.answer
    assert "provisional: judged at 5 seeds" in report.html
    arms(maker := Maker(study), seeds=3, good=2.5, too_weak=4.0)
    # 6 seeds of `alone` at 14 s, of `good` at 14 s beside a stored teacher, and of `too_weak` at 44 s with its own
    saved = f"saved 18 seeds and about {6 * (14 + 14 + 44) / 3600:.2g} device-hours against 9 seeds of each arm."
    assert saved in make_report(study, maker.tables(), {}).summary.answer
