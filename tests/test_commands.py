"""Tests what people and machines start: every command's module can be imported, and a wheel holds all that runs."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT, TOP, files, sources

STARTED_BY = [
    *(ROOT / name for name in ("cluster.yaml", "cluster-local.yaml", "Makefile", "README.md", "CONTRIBUTING.md")),
    *sorted(file for ending in ("sbatch", "yaml", "md") for file in (ROOT / "docs").glob(f"*.{ending}")),
    *sorted((ROOT / "search_spaces").glob("*.yaml")),
]
OURS = (*TOP, "benchmarks", "tests")


def modules(file: Path) -> set[str]:
    """Returns our modules that a file runs by `python -m`."""
    found = re.findall(r"python3? -m ([A-Za-z_][\w.]*\w)", file.read_text())
    return {module for module in found if module.split(".")[0] in OURS}


def test_the_files_that_start_something_are_read() -> None:
    named = {file.name: modules(file) for file in STARTED_BY}
    assert named["Makefile"] >= {"orchestrator.sweep", "orchestrator.cluster.check_config"}
    assert len(named["cluster.yaml"]) == 2 and named["sweep.sbatch"] == named["rayjob.yaml"] == {"orchestrator.sweep"}


@pytest.mark.parametrize("module", sorted({module for file in STARTED_BY for module in modules(file)}))
def test_every_module_that_is_started_can_be_imported(module: str) -> None:
    importlib.import_module(module)


def test_the_slurm_script_recognises_the_message_that_the_hours_have_passed() -> None:
    (pattern,) = re.findall(r'grep -q "(.*)" "\$said"', (ROOT / "docs" / "sweep.sbatch").read_text())
    said = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "7.5" for part in node.values)
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) and str(getattr(node.values[0], "value", "")).startswith("--hours ")
    ]
    assert len(said) == 1 and re.search(pattern, said[0])


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_template(tmp_path: Path) -> None:
    """An editable install, as tests run on, hides a missing one."""
    for name in (*TOP, "pyproject.toml", "README.md"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(file.relative_to(ROOT)) for file in files().values()}
    others = {path for top in TOP for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix != ".py"}
    ours |= {str(path.relative_to(ROOT)) for path in others if "__pycache__" not in path.parts}
    assert "orchestrator/reporting/report.html.j2" in ours
    assert not sorted(ours - held)
    assert not sorted(name for name in held if not name.startswith(TOP) and ".dist-info/" not in name)
