"""Reading a study file and saying what is wrong with it: file, line, path, and what would be valid.

Everything that can be wrong is found here, before any device is asked for: each end of each range is put into the trial
and validated while the file loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.study.errors import (
    Lines,
    StudyError,
    explain,
    has_secret,
    line_of,
    nearest,
    redact,
    set_path,
)
from orchestrator.study.schema import Study, label_of, labelled
from orchestrator.study.validate import check_study
from orchestrator.study.yaml_reader import parse_value, read_yaml
from trainables.config.trial import TrialSpec

KEYS = ("question", "trial", "profiles", "vary", "exclude", "search", "tune", "arms", "seeds", "objective", "claims",
        "confirm", "limits", "slot")  # fmt: skip


def load_study(
    file: str | Path,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    *,
    points: int | None = None,
    seeds: int | None = None,
) -> Study:
    """Reads, checks and resolves a study. `overrides` are `path=value` with paths that start at the file."""
    file = str(file)
    raw, lines = read_yaml(file)
    for key in raw:
        if key not in KEYS:
            raise StudyError(
                f"{file}:{lines[(key,)]}: unknown key {key!r}{nearest(key, KEYS)}; expected {', '.join(KEYS)}"
            )
    profiles = raw.pop("profiles", None) or {}
    if not isinstance(profiles, dict) or not all(isinstance(v, dict) for v in profiles.values()):
        raise StudyError(f"{file}:{lines.get(('profiles',), 1)}: profiles: must map a name to `path: value`")
    default = next(iter(profiles), None)
    if profile is not None and profile not in profiles:
        raise StudyError(
            f"{file}: no profile {profile!r}{nearest(profile, profiles)}; expected {', '.join(profiles) or 'none'}"
        )
    profile = profile or default
    for path, value in (profiles.get(profile) or {}).items() if profile else ():
        _set_in_file(raw, path, value, f"{file}:{line_of(lines, 'profiles', str(profile), path)}: profile {profile!r}")
    fixed: dict[str, Any] = {}
    for override in overrides:
        path, _, text = override.partition("=")
        if not path or "=" not in override:
            raise StudyError(f"--set {override!r}: must be path=value, e.g. trial.phases.distil.budget.steps=200")
        value = parse_value(text, override)
        if path.startswith("trial."):
            fixed[path.removeprefix("trial.")] = value
            _take_out(raw, path.removeprefix("trial."), lambda choice, given=value: choice == given)  # type: ignore[misc]
        _set_in_file(raw, path, value, f"--set {path}")
    _refuse_secrets(raw, (), file, lines)
    if seeds is not None:
        raw["seeds"] = seeds
    if points is not None:
        if not isinstance(raw.get("search"), dict):
            raise StudyError(f"{file}: --points needs a `search` in the file")
        raw["search"] = {**raw["search"], "points": points}
    stem = Path(file).stem
    try:
        study = Study.model_validate(
            {
                **raw,
                "name": stem,
                "file": file,
                "profile": profile,
                "is_default_profile": profile == default,
                "fixed": fixed,
            }
        )
        if "seed" in study.trial:
            raise StudyError(
                f"{file}:{line_of(lines, 'trial', 'seed')}: trial.seed: is not for a file; expected seeds: N"
            )
        TrialSpec.model_validate({**study.trial, "seed": 0})
    except ValidationError as error:
        cls = Study if error.title == "Study" else TrialSpec
        raise StudyError(explain(error, cls, file, "trial" if cls is TrialSpec else "", lines)) from None
    check_study(study, lines)
    return study


def _refuse_secrets(value: Any, at: tuple[str, ...], file: str, lines: Lines) -> None:
    """What a study says stands in its tables, in MLflow and in its report."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _refuse_secrets(item, (*at, str(key)), file, lines)
    if isinstance(value, str) and has_secret(value):
        raise StudyError(
            f"{file}:{line_of(lines, *at)}: {'.'.join(at)}: {redact(value)!r} holds a password or token, which tables and "
            f"MLflow would show; give it in the environment (FSSPEC_<PROTOCOL>_PASSWORD, AWS_SECRET_ACCESS_KEY, HF_TOKEN)"
        )


def _set_in_file(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Sets a path that starts at the file. Axes and the entries of an arm are named by paths themselves; null takes an
    axis, an arm or a claim away."""
    top, _, rest = path.partition(".")
    if top not in KEYS:
        raise StudyError(f"{where}: {path}: paths start at the file{nearest(top, KEYS)}; expected {', '.join(KEYS)}")
    if top not in ("vary", "arms", "claims") or not rest:
        set_path(raw, path, value, where)
        return
    entries = raw[top] = raw.get(top) or {}
    if not isinstance(entries, dict):
        raise StudyError(f"{where}: {path}: {top} has no parts")
    name, _, inside = rest.partition(".") if top != "vary" else (rest, "", "")
    if inside and top == "arms":
        entries[name] = {**(entries.get(name) or {}), inside: value}
    elif inside:
        set_path(raw, path, value, where)
    elif value is None:
        entries.pop(name, None)
    else:
        entries[name] = value


def _take_out(raw: dict[str, Any], path: str, is_it: Callable[[Any], bool]) -> None:
    """Takes a varied path whose value is now given out of `vary`, and decides what was said about its choices:
    conditions that hold fall away, those that do not take their axis along, and exclusions likewise."""
    vary = raw.get("vary")
    if not isinstance(vary, dict) or path not in vary:
        return
    axis = vary.pop(path)
    choices = labelled(axis.get("choice")) if isinstance(axis, dict) else None
    labels = {label for label, choice in choices.items() if is_it(choice)} if isinstance(choices, dict) else set()
    gone = []
    for name, other in vary.items():
        when = other.get("when") if isinstance(other, dict) else None
        if isinstance(when, dict) and path in when:
            wanted = when.pop(path)
            if not labels & {label_of(one) for one in (wanted if isinstance(wanted, list) else [wanted])}:
                gone.append(name)
    for name in gone:
        _take_out(raw, name, lambda _: False)
    rules = raw.get("exclude")
    if isinstance(rules, list):
        raw["exclude"] = [
            rule for rule in rules if not isinstance(rule, dict) or (_still_holds(rule, path, labels) and rule)
        ]


def _still_holds(rule: dict[str, Any], path: str, labels: set[str]) -> bool:
    return path not in rule or label_of(rule.pop(path)) in labels
