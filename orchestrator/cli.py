"""What the commands share: arguments that name a study, and the provenance of a run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.study.schema import Study


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that speaks of a study takes."""
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("--profile", metavar="P", help="a profile of the file; by default its first")
    parser.add_argument(
        "--set",
        metavar="path=value",
        action="append",
        default=[],
        help="paths start at the file, e.g. trial.models.student.layers=6",
    )
    parser.add_argument(
        "--storage", metavar="URI", default="./runs", help="a folder or any fsspec URI (default ./runs)"
    )


def positive_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on; got {text!r}")
    return int(text)


def hours_above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of hours above 0; got {text!r}")


def provenance(study: Study) -> dict[str, str]:
    """Commit and versions: printed beside every number, part of no key."""
    found = {"study": study.file, "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
    root = Path(__file__).parent.parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout.strip()
        found["commit"] = commit + (" with changes" if changed else "")
    for package in ("codistill", "torch", "transformers", "ray", "optuna", "mlflow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["python"] = sys.version.split()[0]
    found["machine"] = f"{os.uname().sysname} {os.uname().machine}, {os.cpu_count()} cores"
    return found
