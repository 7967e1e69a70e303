"""Loads a study file and checks everything that can be wrong with a study before a device is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.study.axes import label_of, labelled
from orchestrator.study.errors import (
    Lines,
    StudyError,
    explain,
    has_secret,
    line_of,
    nearest,
    redact,
    renamed_part,
    set_path,
)
from orchestrator.study.schema import Study
from orchestrator.study.validate import check_study
from orchestrator.study.yaml_reader import parse_value, read_yaml
from trainables.config.extension import Extension, ExtensionError, installed
from trainables.config.own import install_file
from trainables.config.trial import TrialSpec

KEYS = ("question", "trial", "profiles", "vary", "exclude", "search", "tune", "arms", "seeds", "objective", "good_enough",
        "claims", "confirm", "limits", "slot")  # fmt: skip


def load_study(
    file: str | Path,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    *,
    points: int | None = None,
    seeds: int | None = None,
    extension: str | None = None,
) -> Study:
    """Reads a study file, applies the profile and the overrides (`path=value`, paths from the top of the file), and
    validates the study. `extension`: the user's own file (`--extension`), which is installed first. Raises StudyError."""
    file = str(file)
    if extension is not None:
        install_extension(extension)
    raw, lines = read_yaml(file)
    _check_names(raw, file, lines)
    profiles = raw.pop("profiles", None) or {}
    default = next(iter(profiles), None)
    profile = profile or default
    if profile is not None:
        _apply_profile(raw, profiles, profile, file=file, lines=lines)
    fixed = _apply_overrides(raw, overrides)
    _refuse_secrets(raw, file, lines)
    if seeds is not None:
        raw["seeds"] = seeds
    if points is not None:
        if not isinstance(raw.get("search"), dict):
            raise StudyError(f"{file}: --points needs a `search` in the file")
        raw["search"] = {**raw["search"], "points": points}
    about = {"name": Path(file).stem, "file": file, "profile": profile, "is_default_profile": profile == default}
    others = [override for override in overrides if not override.startswith("trial.")]
    others += [f"seeds={seeds}"] * (seeds is not None) + [f"search.points={points}"] * (points is not None)
    try:
        study = Study.model_validate({**raw, **about, "fixed": fixed, "overrides": others})
        if "seed" in study.trial:
            line = line_of(lines, "trial", "seed")
            raise StudyError(f"{file}:{line}: trial.seed: a study file sets no seed of a trial; expected seeds: N")
        if "extension" in study.trial:
            line = line_of(lines, "trial", "extension")
            raise StudyError(f"{file}:{line}: trial.extension: a study names no code; expected --extension FILE.py")
        if (own := installed()) is not None:
            study = study.model_copy(update={"trial": {**study.trial, "extension": own.sha256}})
        TrialSpec.model_validate({**study.trial, "seed": 0})
    except ValidationError as error:
        if error.title == "Study":
            raise StudyError(explain(error, Study, file, lines=lines)) from None
        raise StudyError(explain(error, TrialSpec, file, root="trial", lines=lines)) from None
    check_study(study, lines)
    return study


def install_extension(path: str) -> None:
    """Installs a user's own file in this process. Raises StudyError."""
    try:
        install_file(Extension(Path(path).name, Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"--extension {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except ExtensionError as error:
        raise StudyError(f"--extension {error}") from None


def _check_names(raw: dict[str, Any], file: str, lines: Lines) -> None:
    """Refuses an empty file, unknown top-level keys, malformed profiles, and former names of fields in dotted paths."""
    if not raw:
        raise StudyError(f"{file}: is empty; a study needs at least question, trial and objective")
    for key in raw:
        if key not in KEYS:
            where = f"{file}:{lines[(key,)]}"
            raise StudyError(f"{where}: unknown key {key!r}{nearest(key, KEYS)}; expected {', '.join(KEYS)}")
    profiles = raw.get("profiles") or {}
    if not isinstance(profiles, dict) or not all(isinstance(paths, dict) for paths in profiles.values()):
        raise StudyError(f"{file}:{line_of(lines, 'profiles')}: profiles: must map a name to `path: value`")
    for path, _ in _items(raw, ()):
        _refuse_former_names(path[-1], f"{file}:{line_of(lines, *path)}: {'.'.join(path[:-1])}")


def _items(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields each entry of nested mappings and lists, with its path."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, str(key)), item
        yield from _items(item, (*path, str(key)))


def _refuse_former_names(path: str, where: str) -> None:
    """Refuses a dotted path into the trial, wherever one stands, that uses a field's former name."""
    top, _, rest = path.partition(".")
    if top in ("trial", "vary", "arms", "tune"):
        path = rest.partition(".")[2] if top in ("arms", "tune") else rest
    if (renamed := renamed_part(path, TrialSpec)) is not None:
        raise StudyError(f"{where}: {path}: {renamed}")


def _apply_profile(
    raw: dict[str, Any], profiles: dict[str, dict[str, Any]], name: str, *, file: str, lines: Lines
) -> None:
    if name not in profiles:
        expected = f"{nearest(name, profiles)}; expected {', '.join(profiles) or 'none'}"
        raise StudyError(f"{file}: no profile {name!r}{expected}")
    for path, value in profiles[name].items():
        _set_in_file(raw, path, value, f"{file}:{line_of(lines, 'profiles', name, path)}: profile {name!r}")


def _apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies each `path=value`; returns the values given to paths of the trial."""
    fixed: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not path or not equals:
            raise StudyError(f"--set {override!r}: must be path=value, e.g. trial.phases.distil.budget.steps=200")
        value = parse_value(text, override)
        _refuse_former_names(path, "--set")
        if path.startswith("trial."):
            in_trial = path.removeprefix("trial.")
            fixed[in_trial] = value
            _take_out(raw, in_trial, lambda choice, given=value: choice == given)  # type: ignore[misc]
        _set_in_file(raw, path, value, f"--set {path}")
    return fixed


def _refuse_secrets(raw: dict[str, Any], file: str, lines: Lines) -> None:
    """Refuses passwords and tokens: tables, MLflow and the report show the study."""
    for path, value in _items(raw, ()):
        if isinstance(value, str) and has_secret(value):
            raise StudyError(
                f"{file}:{line_of(lines, *path)}: {'.'.join(path)}: {redact(value)!r} holds a password or token, which tables and "
                f"MLflow would show; give it in the environment (FSSPEC_<PROTOCOL>_PASSWORD, AWS_SECRET_ACCESS_KEY, HF_TOKEN)"
            )


def _set_in_file(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Sets a path from the top of the file. Keys of `vary` and of an arm are dotted paths themselves; null removes a varied
    path, an arm or a claim."""
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


def _take_out(raw: dict[str, Any], path: str, is_given: Callable[[Any], bool]) -> None:
    """Removes a path that now has a fixed value from `vary`, and from the conditions and exclusions that name its choices.

    A condition that holds is dropped; one that does not hold removes its own path as well. Exclusions likewise.
    """
    vary = raw.get("vary")
    if not isinstance(vary, dict) or path not in vary:
        return
    rule = vary.pop(path)
    choices = labelled(rule.get("choice")) if isinstance(rule, dict) else None
    labels = {label for label, choice in choices.items() if is_given(choice)} if isinstance(choices, dict) else set()
    inactive = []
    for name, other in vary.items():
        when = other.get("when") if isinstance(other, dict) else None
        if isinstance(when, dict) and path in when:
            wanted = when.pop(path)
            if not labels & {label_of(value) for value in (wanted if isinstance(wanted, list) else [wanted])}:
                inactive.append(name)
    for name in inactive:
        _take_out(raw, name, lambda _: False)
    if isinstance(rules := raw.get("exclude"), list):
        raw["exclude"] = [
            entry
            for entry in rules
            if not isinstance(entry, dict) or ((path not in entry or label_of(entry.pop(path)) in labels) and entry)
        ]
