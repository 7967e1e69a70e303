"""What a notebook sees of a study: data frames that agree with the report, figures that show themselves, the example's cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.analysis import tables
from orchestrator.notebook import Results, load
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import Fingerprints
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from tests.support.studies import run_trials
from tests.support.trials import Lab, distillation
from trainables.storage.files import as_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(new_lab: Callable[[], Lab], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two arms and two seeds that ran, as `sweep` leaves it."""
    lab, soft = new_lab(), "phases.distil.terms.teacher_to_student.weight"
    raw = {
        "question": "Does the teacher help?",
        "trial": {"data": {"corpus": lab.data["corpus"]}, **distillation()},
        "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"},
        "arms": {"alone": {soft: 0}, "taught": {}},
        "seeds": 2,
        "claims": {"helps": {"arm": "taught", "against": "alone", "model": "student", "metric": "mlm_loss"}},
    }
    file = tmp_path_factory.mktemp("study") / "mine.yaml"
    file.write_text(json.dumps(raw))
    study = load_study(file)
    scheduler = Scheduler(study, Fingerprints(str(lab.root / "data")), lab.storage)
    run_trials(scheduler)
    ledger = scheduler.ledger
    tables.write(tables.tables(study.folder, ledger.all_rows(), ledger.records, lab.store.examples), ledger.home)
    ledger.home.write("study.yaml", as_json(study.model_dump(mode="json", by_alias=True)))
    return ledger.home.path()


def test_claims_are_a_row_each_with_their_interval(folder: Path) -> None:
    (row,) = load(folder).claims.to_dict("records")
    assert (row["claim"], row["arm"], row["against"], row["n"]) == ("helps", "taught", "alone", 2)
    assert row["low"] < row["effect"] < row["high"] and row["verdict"] in ("supported", "refuted", "undecided")


def test_the_ends_of_curves_are_what_the_claim_compares(folder: Path) -> None:
    results = load(folder)
    ends = results.curves("test").query("progress == 1").groupby("arm")["value"].mean()
    assert ends["taught"] - ends["alone"] == pytest.approx(results.claims["effect"].item(), abs=1e-12)
    assert len(results.trials) == 4 and np.isfinite(results.curves()["flops"]).all()
    assert set(results.examples["arm"]) == {"alone", "taught"}


def test_a_figure_needs_no_style_of_a_page(folder: Path) -> None:
    figure = load(folder).figure()
    assert figure is not None
    shown = figure._repr_html_()  # by this name a notebook asks for it
    assert "<svg" in shown and "var(" not in shown and "claim 1" in shown


@pytest.mark.parametrize("what", ["nothing there", "another version"])
def test_what_cannot_be_loaded_is_said_in_one_line(folder: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "none"
    if what == "another version":
        path.mkdir()
        for file in folder.glob("*.parquet"):
            (path / file.name).write_bytes(file.read_bytes())
        (path / "study.yaml").write_text(json.dumps({"question": "?"}))
    with pytest.raises(StudyError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_the_example_notebook_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((ROOT / "docs" / "results.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert 'load("runs/dwt")' in code[0] and all(not cell.get("outputs") for cell in cells)
    names: dict[str, Any] = {}
    for source in [code[0].replace("runs/dwt", str(folder)), *code[1:]]:
        exec(compile(source, "results.ipynb", "exec"), names)
    assert isinstance(names["results"], Results)
