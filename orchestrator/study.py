"""The study file: one question as one typed value. Knows YAML and the trial's schema; no Ray, no storage, no tracker.

Everything that can be wrong with a file is found here, before any device is asked for: each end of each range is put
into the trial and validated while the file loads. Errors are `StudyError`: one sentence naming file, line and path.
"""

from __future__ import annotations

import copy
import difflib
import io
import itertools
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, Tag, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from trainables.spec import Fraction, Masking, Name, Positive, TrialSpec, Value, by_key


class StudyError(ValueError):
    """A file or an argument that cannot be run; the message says what, where, and what would be valid."""


# --------------------------------------------------------------------------------------------------------- its values


def _labelled(value: Any) -> Any:
    """A list of choices becomes label -> value; a label is what the report prints."""
    if isinstance(value, list):
        return {_label(v): v for v in value}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    return value


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _Axis(Value):
    when: dict[
        str, Annotated[tuple[str, ...], BeforeValidator(lambda v: [str(v)] if not isinstance(v, list) else v)]
    ] = {}


class Choice(_Axis):
    """One of several labelled values. Where the axis is no path of the trial, each value is a mapping path -> value."""

    choice: Annotated[dict[str, Any], BeforeValidator(_labelled), Field(min_length=1)]

    def ends(self) -> tuple[Any, ...]:
        return tuple(self.choice)


class FloatRange(_Axis):
    float_: tuple[float, float] = Field(alias="float")
    log: bool = False

    @model_validator(mode="after")
    def _the_range_rises(self) -> FloatRange:
        _check_rising(*self.float_, log=self.log)
        return self

    def ends(self) -> tuple[Any, ...]:
        return self.float_


class IntRange(_Axis):
    int_: tuple[int, int] = Field(alias="int")
    log: bool = False
    step: PositiveInt = 1

    @model_validator(mode="after")
    def _the_range_rises(self) -> IntRange:
        _check_rising(*self.int_, log=self.log)
        return self

    def ends(self) -> tuple[Any, ...]:
        return self.int_


def _check_rising(low: float, high: float, *, log: bool) -> None:
    if not low < high:
        raise ValueError(f"the range must rise; got [{low}, {high}]")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range must lie above 0; got [{low}, {high}]")


Axis = Annotated[
    Annotated[Choice, Tag("choice")] | Annotated[FloatRange, Tag("float")] | Annotated[IntRange, Tag("int")],
    by_key("choice", "float", "int"),
]


class Objective(Value):
    """What a search sees: always dev, at the end of `phase`; with `minus`, the paired difference to that arm."""

    phase: Name
    model: Name
    metric: str
    mode: Literal["min", "max"]
    task: str | None = None
    minus: Name | None = None


class StopEarly(Value):
    """ASHA: from `first` (of the budget) on, only the best 1/`reduction` of the points seen at a rung go on."""

    kind: Literal["asha"]
    first: float = Field(0.5, ge=0.5, lt=1)
    reduction: int = Field(2, ge=2)


class Search(Value):
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    points: PositiveInt
    stop_early: StopEarly | None = None
    seed: int = Field(0, ge=0)


class Tune(Value):
    """The same grid for every arm: each takes the value best on dev, at seeds that no claim uses."""

    grid: dict[str, Annotated[tuple[Positive, ...], Field(min_length=3)]] = Field(min_length=1, max_length=1)
    extend: int = Field(2, ge=0)  # a winner at an edge extends the grid by one step, at most so often


class Confirm(Value):
    """The winner of the search against an arm of the same student, on fresh seeds, on test."""

    against: Name
    seeds: int = Field(5, ge=2)


class Claim(Value):
    """A sentence that the report judges: `arm` is better than `against` (than each, where several) by more than `margin`."""

    says: str | None = None
    arm: Name
    against: Name | tuple[Name, ...]
    phase: Name | None = None  # by default the objective's
    model: Name
    metric: str
    task: str | None = None
    split: Literal["test", "dev"] = "test"
    at: Fraction = 1.0
    margin: float = Field(0.0, ge=0)
    axis: Literal["student_tokens", "flops", "device_seconds"] = "student_tokens"
    family: str = "main"
    paper: str | float | None = None


class Limits(Value):
    minutes: Positive | None = None


class Slot(Value):
    """What one trial gets. Several workers to a trial are not built yet."""

    workers: Literal[1] = 1
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)


class Study(Value):
    """A question and all that it takes to answer it. `trial` is the raw trial, with the profile applied."""

    name: str
    file: str
    profile: str | None = None
    is_default_profile: bool = True
    question: str
    trial: dict[str, Any]
    vary: dict[str, Axis] = {}
    exclude: tuple[dict[str, str], ...] = ()
    search: Search | None = None
    tune: Tune | None = None
    arms: dict[Name, dict[str, Any]] = {}
    seeds: PositiveInt = 1
    objective: Objective
    claims: dict[Name, Claim] = {}
    confirm: Confirm | None = None
    limits: Limits = Limits()
    slot: Slot = Slot()
    fixed: dict[str, Any] = {}  # paths of the trial given by --set

    @property
    def folder(self) -> str:
        """Its folder in the storage."""
        return self.name if self.is_default_profile else f"{self.name}-{self.profile}"

    def spec(
        self,
        *,
        arm: str | None = None,
        point: Mapping[str, Any] | None = None,
        seed: int,
        tuned: Mapping[str, Any] | None = None,
    ) -> TrialSpec:
        """The trial of an arm, of a point, or of an arm put over a point (the paired baseline of that point).

        Precedence: trial < tuned < point < arm, and --set over all. An arm over a point keeps the point's sizes and
        undoes what the arm is about. Raises StudyError naming the arm or point.
        """
        raw = copy.deepcopy(self.trial)
        where = (
            " ".join(filter(None, (f"arm {arm!r}" if arm else "", f"point {dict(point)}" if point else ""))) or "trial"
        )
        for path, value in (tuned or {}).items():
            set_path(raw, path, value, where)
        for name, value in (point or {}).items():
            axis = self.vary[name]
            if isinstance(axis, Choice):
                value = axis.choice[value]
            if self.is_zip(name):
                for path, part in value.items():
                    set_path(raw, path, part, f"{where} {name}")
            else:
                set_path(raw, name, value, where)
        for path, value in (self.arms[arm] if arm else {}).items():
            set_path(raw, path, value, where)
        for path, value in self.fixed.items():
            set_path(raw, path, value, f"--set trial.{path}")
        try:
            return TrialSpec.model_validate({**raw, "seed": seed})
        except ValidationError as error:
            raise StudyError(_explain(error, TrialSpec, where, "trial", {})) from None

    def is_zip(self, axis: str) -> bool:
        return "." not in axis and axis not in TrialSpec.model_fields

    def is_active(self, axis: str, point: Mapping[str, Any]) -> bool:
        return all(point.get(other) in labels for other, labels in self.vary[axis].when.items())

    def is_excluded(self, point: Mapping[str, Any]) -> bool:
        return any(all(point.get(axis) == label for axis, label in rule.items()) for rule in self.exclude)

    def size_axes(self) -> tuple[str, ...]:
        """The axes that change a model's shape: strata of the report."""

        def resizes(path: str) -> bool:
            parts = path.split(".")
            return (
                len(parts) > 2
                and parts[0] == "models"
                and parts[2] in ("layers", "width", "inner", "family", "pretrained")
            )

        return tuple(name for name in self.vary if any(resizes(path) for path in self.paths(name)))

    def paths(self, axis: str) -> tuple[str, ...]:
        """The paths of the trial that an axis sets."""
        if not self.is_zip(axis):
            return (axis,)
        return tuple(dict.fromkeys(path for value in self.vary[axis].choice.values() for path in value))  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------------------- loading

KEYS = ("question", "trial", "profiles", "vary", "exclude", "search", "tune", "arms", "seeds", "objective", "claims",
        "confirm", "limits", "slot")  # fmt: skip
Lines = Mapping[tuple[str, ...], int]


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
                f"{file}:{lines[(key,)]}: unknown key {key!r}{_nearest(key, KEYS)}; valid: {', '.join(KEYS)}"
            )
    profiles = raw.pop("profiles", None) or {}
    if not isinstance(profiles, dict) or not all(isinstance(v, dict) for v in profiles.values()):
        raise StudyError(f"{file}:{lines.get(('profiles',), 1)}: profiles: must map a name to `path: value`")
    default = next(iter(profiles), None)
    if profile is not None and profile not in profiles:
        raise StudyError(
            f"{file}: no profile {profile!r}{_nearest(profile, profiles)}; valid: {', '.join(profiles) or 'none'}"
        )
    profile = profile or default
    for path, value in (profiles.get(profile) or {}).items() if profile else ():
        set_path(raw, path, value, f"{file}:{_line(lines, 'profiles', str(profile), path)}: profile {profile!r}")
    fixed: dict[str, Any] = {}
    for override in overrides:
        path, _, text = override.partition("=")
        if not path or "=" not in override:
            raise StudyError(f"--set {override!r}: must be path=value, e.g. trial.phases.distil.budget.steps=200")
        value = _parse_value(text, override)
        if path.split(".")[0] not in KEYS:
            raise StudyError(
                f"--set {path}: paths start at the file{_nearest(path.split('.')[0], KEYS)}; valid: {', '.join(KEYS)}"
            )
        if path.startswith("trial."):
            fixed[path.removeprefix("trial.")] = value
            (raw.get("vary") or {}).pop(path.removeprefix("trial."), None)
        set_path(raw, path, value, f"--set {path}")
    if seeds is not None:
        raw["seeds"] = seeds
    if points is not None:
        if not raw.get("search"):
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
        TrialSpec.model_validate({**study.trial, "seed": 0})
    except ValidationError as error:
        cls = Study if error.title == "Study" else TrialSpec
        raise StudyError(_explain(error, cls, file, "trial" if cls is TrialSpec else "", lines)) from None
    _check(study, lines)
    return study


def read_yaml(file: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """YAML 1.2 as plain values, and the line of each path. Refuses tags, anchors, duplicate keys, binary files."""
    try:
        text = Path(file).read_bytes().decode()
    except FileNotFoundError:
        raise StudyError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise StudyError(f"{file}: is a folder; give a study file, e.g. search_spaces/smoke.yaml") from None
    except UnicodeDecodeError:
        raise StudyError(f"{file}: not a text file (UTF-8 YAML is expected)") from None
    except OSError as error:
        raise StudyError(f"{file}: {error.strerror}") from None
    try:
        for event in YAML(typ="rt", pure=True).parse(io.StringIO(text)):
            line = event.start_mark.line + 1
            if getattr(event, "ctag", None) is not None or getattr(event, "tag", None) not in (None, "!"):
                raise StudyError(f"{file}:{line}: tag {str(event.tag)!r} refused; a study is plain data")
            if getattr(event, "anchor", None) is not None:
                raise StudyError(f"{file}:{line}: anchors and aliases are refused; use profiles, arms or vary")
        value = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        raise StudyError(f"{file}:{mark.line + 1 if mark else 1}: malformed YAML: {problem}") from None
    except YAMLError as error:
        raise StudyError(f"{file}: malformed YAML: {' '.join(str(error).split())}") from None
    if value is None:
        raise StudyError(f"{file}: is empty; a study needs at least question, trial and objective")
    if not isinstance(value, dict):
        raise StudyError(f"{file}:1: a study is a mapping; found {type(value).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    return _plain(value, (), lines), lines


def _plain(value: Any, at: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> Any:
    if isinstance(value, dict):
        for key in value:
            lines[(*at, str(key))] = value.lc.key(key)[0] + 1  # type: ignore[attr-defined]
        return {str(key): _plain(item, (*at, str(key)), lines) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, (*at, str(i)), lines) for i, item in enumerate(value)]
    for kind in (bool, int, float):  # ruamel's scalars remember their spelling; ours do not
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else str(value)


def _parse_value(text: str, override: str) -> Any:
    try:
        return _plain(YAML(typ="rt", pure=True).load(text), (), {})
    except YAMLError:
        raise StudyError(f"--set {override!r}: the value is not YAML") from None


def set_path(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Sets a dotted path in nested mappings, in place. Names on the way must exist or be optional mappings."""
    *parents, last = path.split(".")
    at: Any = raw
    for i, key in enumerate(parents):
        if not isinstance(at, dict):
            raise StudyError(f"{where}: {path}: {'.'.join(parents[:i])} has no parts")
        if key not in at:
            if i and parents[i - 1] in ("models", "phases", "terms", "arms"):
                raise StudyError(
                    f"{where}: no {path!r}: there is no {key!r}{_nearest(key, at)}; valid: {', '.join(at)}"
                )
            at[key] = {}
        at = at[key]
    if not isinstance(at, dict):
        raise StudyError(f"{where}: {path}: {'.'.join(parents)} has no parts")
    at[last] = copy.deepcopy(value)


# ---------------------------------------------------------------------------------------------------------- checking


def _check(study: Study, lines: Lines) -> None:
    _every_condition_names_a_choice(study, lines)
    _every_end_of_every_range_is_a_valid_trial(study, lines)
    for arm in study.arms:
        try:
            study.spec(arm=arm, seed=0)
        except StudyError as error:
            raise StudyError(f"{study.file}:{_line(lines, 'arms', arm)}: arm {arm!r}: {_tail(error)}") from None
    for path in study.tune.grid if study.tune else ():
        for value in study.tune.grid[path]:  # type: ignore[union-attr]
            study.spec(seed=0, tuned={path: value})
    base = TrialSpec.model_validate({**study.trial, "seed": 0})
    _measurable(study, base, study.objective, f"{study.file}:{_line(lines, 'objective')}: objective")
    for name, claim in study.claims.items():
        at = f"{study.file}:{_line(lines, 'claims', name)}: claims.{name}"
        _measurable(study, base, claim, at)
        against = (claim.against,) if isinstance(claim.against, str) else claim.against
        for arm in (claim.arm, *against):
            _known_arm(study, arm, at)
        if claim.arm in against:
            raise StudyError(f"{at}: arm {claim.arm!r} is compared with itself")
        phase = base.phases[claim.phase or study.objective.phase]
        if claim.at not in phase.evaluate:
            raise StudyError(
                f"{at}: nothing is recorded at {claim.at:g}; valid: {', '.join(f'{f:g}' for f in phase.evaluate)}"
            )
    if study.objective.minus is not None:
        _known_arm(study, study.objective.minus, f"{study.file}:{_line(lines, 'objective', 'minus')}: objective.minus")
    if study.confirm is not None:
        _known_arm(study, study.confirm.against, f"{study.file}:{_line(lines, 'confirm')}: confirm.against")
    if bool(study.search) != bool(study.vary):
        raise StudyError(f"{study.file}: `search` and `vary` need each other")
    if study.confirm and not study.search:
        raise StudyError(f"{study.file}:{_line(lines, 'confirm')}: confirm needs a search whose winner it confirms")
    if not study.search and not study.arms:
        raise StudyError(f"{study.file}: nothing to run: give arms, or vary and search")
    if study.size_axes() and study.objective.minus is None:
        raise StudyError(
            f"{study.file}:{_line(lines, 'objective')}: {study.size_axes()[0]} varies sizes, so the biggest model would win: "
            f"add `minus: ARM` to the objective; valid: {', '.join(study.arms) or 'an arm of its own'}"
        )
    _early_stopping_only_where_curves_keep_their_shape(study, lines)
    if study.search and study.search.sampler == "grid":
        for name, axis in study.vary.items():
            if not isinstance(axis, Choice):
                raise StudyError(f"{study.file}:{_line(lines, 'vary', name)}: a grid needs choices; {name} is a range")


def _every_condition_names_a_choice(study: Study, lines: Lines) -> None:
    seen: list[str] = []
    for name, axis in study.vary.items():
        at = f"{study.file}:{_line(lines, 'vary', name)}: vary.{name}"
        for other, labels in axis.when.items():
            if other not in study.vary:
                raise StudyError(f"{at}: condition on unknown parameter {other!r}{_nearest(other, study.vary)}")
            if other not in seen:
                raise StudyError(f"{at}: condition on {other!r}, which must stand before it")
            choice = study.vary[other]
            for label in labels:
                if not isinstance(choice, Choice) or label not in choice.choice:
                    valid = ", ".join(choice.choice) if isinstance(choice, Choice) else "none: it is a range"
                    raise StudyError(f"{at}: {other} has no choice {label!r}; valid: {valid}")
        if study.is_zip(name) and not (
            isinstance(axis, Choice) and all(isinstance(v, dict) for v in axis.choice.values())
        ):
            raise StudyError(
                f"{at}: is no path of the trial, so each choice must map paths to values{_nearest(name, TrialSpec.model_fields)}"
            )
        seen.append(name)
    for i, rule in enumerate(study.exclude):
        for name, label in rule.items():
            excluded = study.vary.get(name)
            if not isinstance(excluded, Choice) or label not in excluded.choice:
                raise StudyError(
                    f"{study.file}:{_line(lines, 'exclude', str(i))}: exclude: no choice {label!r} of {name!r} in vary"
                )


def _every_end_of_every_range_is_a_valid_trial(study: Study, lines: Lines) -> None:
    for name in study.vary:
        for end in study.vary[name].ends():
            point = _with_conditions(study, name, end)
            try:
                study.spec(point=point, seed=0)
            except StudyError as error:
                raise StudyError(
                    f"{study.file}:{_line(lines, 'vary', name)}: vary.{name} at {end!r}: {_tail(error)}"
                ) from None
    combinations = itertools.product(*([(name, end) for end in axis.ends()] for name, axis in study.vary.items()))
    for combination in itertools.islice(combinations, 512):
        point = {}
        for name, end in combination:
            if study.is_active(name, point):
                point[name] = end
        if not study.is_excluded(point):
            study.spec(point=point, seed=0)


def _with_conditions(study: Study, name: str, end: Any) -> dict[str, Any]:
    """A point that holds this end and what its conditions ask for, in the order of the file."""
    wanted, todo = {name: end}, [name]
    while todo:
        for other, labels in study.vary[todo.pop()].when.items():
            wanted[other] = labels[0]
            todo.append(other)
    return {key: wanted[key] for key in study.vary if key in wanted}


def _early_stopping_only_where_curves_keep_their_shape(study: Study, lines: Lines) -> None:
    if not (study.search and study.search.stop_early):
        return
    phase = study.objective.phase
    harmless = (f"phases.{phase}.optimizer.", f"phases.{phase}.batch")
    for name in study.vary:
        for path in study.paths(name):
            if not path.startswith(harmless) and not (path.startswith("models.") and path.endswith(".dropout")):
                raise StudyError(
                    f"{study.file}:{_line(lines, 'search', 'stop_early')}: stop_early with {path} varied would stop curves that "
                    f"cross; early stopping is allowed where only {harmless[0]}*, {harmless[1]} or dropout vary"
                )


def _measurable(study: Study, base: TrialSpec, what: Objective | Claim, at: str) -> None:
    phase_name = what.phase or study.objective.phase
    if phase_name not in base.phases:
        raise StudyError(
            f"{at}: no phase {phase_name!r}{_nearest(phase_name, base.phases)}; valid: {', '.join(base.phases)}"
        )
    phase = base.phases[phase_name]
    if what.model not in base.models:
        raise StudyError(
            f"{at}: no model {what.model!r}{_nearest(what.model, base.models)}; valid: {', '.join(base.models)}"
        )
    if what.model not in phase.train:
        raise StudyError(f"{at}: phase {phase_name!r} does not train {what.model!r}; valid: {', '.join(phase.train)}")
    valid = metrics_of(base, phase_name)
    if what.metric not in valid:
        raise StudyError(f"{at}: no metric {what.metric!r}{_nearest(what.metric, valid)}; valid: {', '.join(valid)}")
    tasks = phase.each or tuple(dict.fromkeys(stream.data for stream in phase.streams.values()))
    if what.task is not None and what.task not in tasks:
        raise StudyError(f"{at}: no task {what.task!r}{_nearest(what.task, tasks)}; valid: {', '.join(tasks)}")


def metrics_of(spec: TrialSpec, phase: str) -> tuple[str, ...]:
    """What is measured of a model in a phase: by the kinds of its streams."""
    masked = {isinstance(stream.corruption, Masking) for stream in spec.phases[phase].streams.values()}
    kinds = [kind for kind, is_masked in (("mlm", True), ("lm", False)) if is_masked in masked]
    return tuple(f"{kind}_{what}" for kind in kinds for what in ("loss", "accuracy"))


def _known_arm(study: Study, arm: str, at: str) -> None:
    if arm not in study.arms:
        raise StudyError(f"{at}: no arm {arm!r}{_nearest(arm, study.arms)}; valid: {', '.join(study.arms) or 'none'}")


# ---------------------------------------------------------------------------------------------------------- messages


def _nearest(word: str, among: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(among), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _line(lines: Lines, *path: str) -> int:
    """The line of a path, or of the nearest part of it that the file has."""
    for i in range(len(path), 0, -1):
        if path[:i] in lines:
            return lines[path[:i]]
    return 1


def _tail(error: StudyError) -> str:
    """The message without the name of the arm or point before it."""
    return str(error).split(": ", 1)[-1]


def _explain(error: ValidationError, cls: type[BaseModel], file: str, root: str, lines: Lines) -> str:
    """The first error as one sentence: file, line, path, what is wrong, what would be valid."""
    errors = error.errors(include_url=False)
    problem = min(errors, key=lambda e: (e["type"] != "extra_forbidden", -len(e["loc"])))
    loc = tuple(str(part) for part in problem["loc"])
    path, fields = _walk(cls, loc)
    full = tuple(filter(None, (root, *path)))
    at = f"{file}:{_line(lines, *full)}: " if lines else f"{file}: "
    where = f"{'.'.join(full)}: " if full else ""
    if problem["type"] == "extra_forbidden":
        key = loc[-1]
        return f"{at}{where}unknown key {key!r}{_nearest(key, fields)}; valid: {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"{at}{where}is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = problem.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{at}{where}{message}{shown}"


def _walk(cls: Any, loc: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Pydantic's location without the names of union members, and the keys that are valid where it ends."""
    path: list[str] = []
    current: Any = cls
    fields: tuple[str, ...] = ()
    for part in loc:
        options = list(_members(current))
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        by_tag = [
            m
            for m in models
            if part in (_tag(m), *(f.alias or n for n, f in m.model_fields.items() if f.is_required()))
        ]
        if len(models) > 1 and by_tag:
            current = by_tag[0]
            continue
        if len(options) > 1 and part in ("number", "schedule"):
            continue
        path.append(part)
        field = next((f for m in models for n, f in m.model_fields.items() if part in (n, f.alias)), None)
        fields = tuple(f.alias or n for m in models[:1] for n, f in m.model_fields.items())
        if field is not None:
            current = field.annotation
        else:
            mapping = next((o for o in options if typing.get_origin(o) in (dict, tuple)), None)
            current = (
                typing.get_args(mapping)[-1] if mapping is not None and typing.get_origin(mapping) is dict else Any
            )
    return tuple(part for part in path if not part.startswith(("function-", "dict[", "tuple[", "constrained"))), fields


def _members(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind and typing.get_origin(kind.annotation) is Literal else None
