"""A sweep whose storage is a bucket: checked against moto's S3, on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.analysis import tables as tables_
from tests.support.s3_server import serving
from tests.support.sweeps import ROOT, Bench, Said, write_study
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore

pytestmark = pytest.mark.slow
RUNS = "s3://sweeps/runs"


@dataclass(frozen=True)
class Swept:
    bench: Bench
    file: Path
    said: Said

    @property
    def cache(self) -> Path:
        return self.bench.folder / "cache"

    def ask(self, module: str, *arguments: str) -> Said:
        command = [sys.executable, "-m", f"orchestrator.{module}", str(self.file), "--storage", RUNS, *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        return Said(run.returncode, run.stdout, run.stderr)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    for module in ("moto", "boto3", "flask", "s3fs"):
        pytest.importorskip(module, reason="needs moto and s3fs, of the extra `dev`")
    bench = Bench(tmp_path_factory.mktemp("bucket"))
    with pytest.MonkeyPatch.context() as environment, serving("sweeps") as there:
        for name, value in {**there, "CODISTILL_CACHE": str(bench.folder / "cache")}.items():
            environment.setenv(name, value)
        try:
            file = write_study(bench.folder, steps=40)  # longer than the arm `short`
            yield Swept(bench, file, bench.sweep(file, storage=RUNS))
        finally:
            bench.close()


def ends(storage: Storage) -> dict[str, str]:
    found = {trial: storage.read(f"study/trials/{trial}/end.json") for trial in storage.list("study/trials")}
    return {trial: json.loads(text)["status"] for trial, text in found.items() if text is not None}


def test_all_of_it_lies_in_the_bucket_and_nothing_of_it_here(swept: Swept) -> None:
    storage = Storage(RUNS)
    assert set(ends(storage).values()) == {"ended"} and len(ends(storage)) == 4
    assert {"report.html", "report.md", "results.parquet", "study.yaml"} <= set(storage.list("study"))
    tables = tables_.read(storage.sub("study"))
    assert tables is not None and set(tables.trials["status"]) == {"ended"}
    assert not (swept.bench.folder / "runs").exists()


def test_machines_keep_copies_of_what_they_read(swept: Swept) -> None:
    storage = Storage(RUNS)
    assert sorted(path.name for path in (swept.cache / "data").iterdir()) == storage.list("data")
    phases = {key: PhaseStore(storage).find(key) for key in storage.list("phases")}
    assert len(phases) == 4, "one teacher, and the students of three arms"
    copies, teachers = {path.name for path in (swept.cache / "weights").iterdir()}, set()
    for phase in phases.values():
        assert phase is not None and phase.examples is not None
        assert phase.examples["sha256"] in copies, "the tables read the scores of all examples"
        teachers |= {entry["sha256"] for model, entry in phase.files.items() if model.startswith("teacher")}
    assert teachers & copies, "the students' slots read the teacher"


def test_the_same_command_again_trains_nothing(swept: Swept) -> None:
    storage = Storage(RUNS)
    before = {trial: storage.list(f"study/trials/{trial}") for trial in storage.list("study/trials")}
    said = swept.bench.sweep(swept.file, storage=RUNS)
    assert "0 to run" in said.out and "nothing to train" in said.out
    assert {trial: storage.list(f"study/trials/{trial}") for trial in storage.list("study/trials")} == before


def test_the_report_is_made_anew_from_the_bucket(swept: Swept) -> None:
    storage = Storage(RUNS)
    first = storage.read("study/report.md")
    storage.delete("study/report.md")
    swept.ask("report")
    again = storage.read("study/report.md")
    assert first is not None and again is not None
    assert again == first.replace(b"was made 2 times", b"was made 3 times")  # it counts how often it was made


def test_an_arms_student_is_exported_from_the_bucket(swept: Swept, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    swept.ask("export", "--arm", "taught", "--to", str(tmp_path / "student"))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 1
