"""Command lines that the report prints: they name the study as it was loaded, and the storage where it is not the default."""

from __future__ import annotations

import json
import shlex

from orchestrator.study.schema import Study

DEFAULT_STORAGE = "./runs"


def sweep_command(study: Study, storage: str = DEFAULT_STORAGE) -> str:
    return f"python -m orchestrator.sweep {shlex.quote(study.file)}{_arguments(study, storage)}"


def export_command(study: Study, chosen: str, storage: str = DEFAULT_STORAGE) -> str:
    """Returns the command that exports a model. `chosen`: `--arm A` or `--trial ID`."""
    what = f"--to best {chosen} --model {study.objective.model}"
    return f"python -m orchestrator.export {shlex.quote(study.file)} {what}{_arguments(study, storage)}"


def _arguments(study: Study, storage: str) -> str:
    profile = [] if study.is_default_profile else ["--profile", str(study.profile)]
    fixed = [f"trial.{path}={json.dumps(value)}" for path, value in study.fixed.items()]
    sets = [part for override in (*study.overrides, *fixed) for part in ("--set", override)]
    elsewhere = [] if storage == DEFAULT_STORAGE else ["--storage", storage]
    return "".join(f" {shlex.quote(argument)}" for argument in (*profile, *sets, *elsewhere))
