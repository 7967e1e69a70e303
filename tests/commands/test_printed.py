"""Runs the commands that commands and reports print, as they are printed: each loads the same study from the same storage."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from orchestrator import export, model_folder, report, sweep
from orchestrator.reporting.commands import export_command, sweep_command
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from tests.support.source_tree import ROOT

MAIN = {"sweep": sweep.main, "report": report.main, "export": export.main}
GIVEN = {
    "plain": [],
    "profile": ["--profile", "long"],
    "sets": ["--set", "trial.phases.distil.batch=4", "--set", "trial.phases.distil.evaluate=[0.5, 1]"],
    "text": ["--set", "question=Is it, 'so' to say, \"better\"?"],
    "no value": [
        "--set",
        "trial.phases.distil.optimizer.max_grad_norm=null",
        "--set",
        "trial.models.student.config={}",
    ],
    "counts": ["--set", "limits.minutes=5", "--seeds", "7", "--points", "9"],
    "storage": ["--profile", "long", "--storage", "other runs"],
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("my studies").mkdir()
    text = (ROOT / "search_spaces" / "smoke.yaml").read_text()
    Path("my studies/it's mine.yaml").write_text(f"{text}profiles: {{laptop: {{}}, long: {{seeds: 4}}}}\n")
    return "my studies/it's mine.yaml"


def run(printed: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, str]:
    """Runs a printed command up to its work; returns the study and the storage with which the work would begin."""
    found: list[tuple[Study, str]] = []
    monkeypatch.setattr(sweep, "_sweep", lambda study, arguments: found.append((study, arguments.storage)) or 0)
    monkeypatch.setattr(model_folder, "export", lambda study, storage, *_, **__: found.append((study, storage)))
    *python, module = shlex.split(printed)[:3]
    assert python == ["python", "-m"] and module.startswith("orchestrator.")
    assert MAIN[module.removeprefix("orchestrator.")](shlex.split(printed)[3:]) == 0
    return found[0]


def loaded(file: str, words: list[str]) -> tuple[Study, str]:
    arguments = sweep._parser().parse_args([file, *words])
    study = load_study(file, arguments.profile, arguments.set, points=arguments.points, seeds=arguments.seeds)
    return study, arguments.storage


def same(a: Study, b: Study) -> bool:
    """Whether two studies are the same, however their values were given."""
    unset = {"overrides": ()}
    return a.model_copy(update=unset) == b.model_copy(update=unset)


@pytest.mark.parametrize("words", GIVEN.values(), ids=GIVEN)
def test_the_commands_of_a_report_run_as_printed(words: list[str], file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study, storage = loaded(file, words)
    for printed in (sweep_command(study, storage), export_command(study, "--arm taught", storage)):
        again, where = run(printed, monkeypatch)
        assert same(again, study) and where == storage, printed
    assert sweep_command(again, storage) == sweep_command(study, storage)


@pytest.mark.parametrize("words", GIVEN.values(), ids=GIVEN)
def test_what_a_sweep_prints_to_go_on_runs_as_printed(
    words: list[str], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, storage = loaded(file, words)
    printed = " ".join(sweep._same_arguments(sweep._parser().parse_args([file, *words])))
    again, where = run(f"python -m orchestrator.sweep {printed}", monkeypatch)
    assert again == study and where == storage


def test_the_command_that_a_report_without_tables_names_runs(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["--profile", "long", "--set", "seeds=3", "--storage", "other runs"]
    assert report.main([file, *words]) == 2
    printed = capsys.readouterr().err.strip().partition("first run ")[2]
    study, storage = run(printed, monkeypatch)
    assert study.seeds == 3 and study.profile == "long" and storage == "other runs"
