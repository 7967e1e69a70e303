"""Parts of the commands: arguments that name a study and a storage, and the provenance of a run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.study.errors import StudyError, has_secret, redact
from orchestrator.study.schema import Study
from trainables.config.extension import installed
from trainables.storage.files import Storage


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that name a study: the file, the profile, overrides, and the storage."""
    parser.add_argument("study", metavar="STUDY.yaml", type=os.path.expanduser)
    parser.add_argument("--profile", metavar="P", help="a profile of the file; by default its first")
    parser.add_argument(
        "--set",
        metavar="path=value",
        action="append",
        default=[],
        help="paths start at the file, e.g. trial.models.student.layers=6",
    )
    parser.add_argument(
        "--extension",
        metavar="FILE.py",
        type=os.path.expanduser,
        help="your own terms, schedules and metrics; the file runs with your rights, here and in every slot",
    )
    add_storage_argument(parser)


def add_storage_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        metavar="URI",
        default="./runs",
        type=os.path.expanduser,
        help="a folder or any fsspec URI (default ./runs)",
    )


def open_storage(uri: str) -> Storage:
    """Opens the storage at `uri`; a relative path becomes absolute, so that each slot finds the same folder.

    Raises StudyError where the storage cannot be listed, and where the URI holds a secret: slots, logs and Ray's files
    carry the URI.
    """
    if has_secret(uri):
        kind = re.sub(r"\W", "_", uri.partition("://")[0]).upper()
        raise StudyError(
            f"--storage {redact(uri)}: a URI that slots and logs carry takes no password; give it in the environment, "
            f"as FSSPEC_{kind}_PASSWORD (FSSPEC_<PROTOCOL>_<ARGUMENT>), or in the service's own way (AWS_SECRET_ACCESS_KEY)"
        )
    storage = Storage(uri if "://" in uri else os.path.abspath(os.path.expanduser(uri)))
    try:
        storage.list()
    except (ValueError, ImportError, OSError) as error:
        reason = redact(str(error).strip().splitlines()[0])
        raise StudyError(f"--storage {redact(uri)}: cannot be read ({reason}); give a folder or URI that can") from None
    return storage


def confirm(question: str) -> bool:
    """Asks; only `y` is a yes, and the end of the input is a no."""
    with contextlib.suppress(EOFError):
        return input(question).strip().lower() == "y"
    return False


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
    """Collects commit, versions and machine, which are printed beside every number and part of no key."""
    found = {"study": study.file, "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
    root = Path(__file__).parent.parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        )
        found["commit"] = commit + (" with changes" if changed else "")
    for package in ("codistill", "torch", "transformers", "ray", "optuna", "mlflow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if (own := installed()) is not None:
        found["extension"] = f"{own.file}, SHA-256 {own.sha256}"
    found["python"] = sys.version.split()[0]
    found["machine"] = f"{os.uname().sysname} {os.uname().machine}, {os.cpu_count()} cores"
    return found
