"""Reading a study file and saying what is wrong with it: file, line, path, and what would be valid.

Everything that can be wrong is found here, before any device is asked for: each end of each range is put into the trial
and validated while the file loads.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from orchestrator.messages import (
    Lines,
    StudyError,
    explain,
    has_secret,
    line_of,
    nearest,
    redact,
    set_path,
    without_place,
)
from orchestrator.study import Choice, Claim, Objective, Study, label_of, labelled
from trainables.data.scores import EXCHANGE_METRICS, part_names, rule_of, score_names
from trainables.phases import instances, streams_of
from trainables.spec.data import Instructions, Tasks
from trainables.spec.phase import Phase
from trainables.spec.terms import Flow
from trainables.spec.trial import TrialSpec

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
                f"{file}:{lines[(key,)]}: unknown key {key!r}{nearest(key, KEYS)}; valid: {', '.join(KEYS)}"
            )
    profiles = raw.pop("profiles", None) or {}
    if not isinstance(profiles, dict) or not all(isinstance(v, dict) for v in profiles.values()):
        raise StudyError(f"{file}:{lines.get(('profiles',), 1)}: profiles: must map a name to `path: value`")
    default = next(iter(profiles), None)
    if profile is not None and profile not in profiles:
        raise StudyError(
            f"{file}: no profile {profile!r}{nearest(profile, profiles)}; valid: {', '.join(profiles) or 'none'}"
        )
    profile = profile or default
    for path, value in (profiles.get(profile) or {}).items() if profile else ():
        _set_in_file(raw, path, value, f"{file}:{line_of(lines, 'profiles', str(profile), path)}: profile {profile!r}")
    fixed: dict[str, Any] = {}
    for override in overrides:
        path, _, text = override.partition("=")
        if not path or "=" not in override:
            raise StudyError(f"--set {override!r}: must be path=value, e.g. trial.phases.distil.budget.steps=200")
        value = _parse_value(text, override)
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
                f"{file}:{line_of(lines, 'trial', 'seed')}: trial.seed: is not for a file; valid: seeds: N"
            )
        TrialSpec.model_validate({**study.trial, "seed": 0})
    except ValidationError as error:
        cls = Study if error.title == "Study" else TrialSpec
        raise StudyError(explain(error, cls, file, "trial" if cls is TrialSpec else "", lines)) from None
    _check(study, lines)
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
        raise StudyError(f"{where}: {path}: paths start at the file{nearest(top, KEYS)}; valid: {', '.join(KEYS)}")
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
        refused = _not_plain(text)
        if refused is not None:
            raise StudyError(f"{file}:{refused[0]}: {refused[1]}")
        value = _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        raise StudyError(f"{file}:{mark.line + 1 if mark else 1}: malformed YAML: {problem}") from None
    except YAMLError as error:
        raise StudyError(f"{file}: malformed YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise StudyError(f"{file}: malformed YAML: nested too deeply") from None
    if value is None:
        raise StudyError(f"{file}: is empty; a study needs at least question, trial and objective")
    if not isinstance(value, dict):
        raise StudyError(f"{file}:1: a study is a mapping; found {type(value).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    return _plain(value, (), lines), lines


def _not_plain(text: str) -> tuple[int, str] | None:
    """The first line that asks for more than plain data, and what it asks for. Looks at the text; makes nothing of it."""
    for event in _yaml().parse(io.StringIO(text)):
        line = event.start_mark.line + 1
        if getattr(event, "ctag", None) is not None or getattr(event, "tag", None) not in (None, "!"):
            return line, f"tag {str(event.tag)!r} refused; a study is plain data"
        if getattr(event, "anchor", None) is not None:
            return line, "anchors and aliases are refused; use profiles, arms or vary"
        if getattr(event, "value", None) == "<<":
            return line, "merge keys are refused; use profiles, arms or vary"
    return None


class _Constructor(RoundTripConstructor):  # type: ignore[misc]
    """Dates stay text: a study has none, and one that does not exist would raise."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", RoundTripConstructor.construct_scalar)


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.Constructor = _Constructor
    return yaml


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
        refused = _not_plain(text)
        if refused is not None:
            raise StudyError(f"--set {override!r}: {refused[1]}")
        return _plain(_yaml().load(text), (), {})
    except (YAMLError, RecursionError):
        raise StudyError(f"--set {override!r}: the value is not YAML") from None


# ---------------------------------------------------------------------------------------------------------- checking


def _check(study: Study, lines: Lines) -> None:
    _every_condition_names_a_choice(study, lines)
    _every_end_of_every_range_is_a_valid_trial(study, lines)
    for arm in study.arms:
        with _blamed_on(f"{study.file}:{line_of(lines, 'arms', arm)}: arm {arm!r}"):
            _learns(study, spec := study.spec(arm=arm, seed=0))
            what = study.objective
            if study.tune and what.model not in spec.pruned().phases[what.phase].train:
                raise StudyError(f"does not train {what.model!r} in phase {what.phase!r}, by which `tune` chooses")
    for size in study.size_axes():
        if study.vary[size].when:
            raise StudyError(
                f"{study.file}:{line_of(lines, 'vary', size)}: vary.{size}: sizes cannot hang on a condition"
            )
    for path in study.tune.grid if study.tune else ():
        for value in study.tune.grid[path]:  # type: ignore[union-attr]
            with _blamed_on(f"{study.file}:{line_of(lines, 'tune', 'grid', path)}: tune.grid at {value!r}"):
                _learns(study, study.spec(seed=0, tuned={path: value}))
    _no_arm_is_there_twice(study, lines)
    base = TrialSpec.model_validate({**study.trial, "seed": 0})
    _measurable(study, base, study.objective, f"{study.file}:{line_of(lines, 'objective')}: objective")
    for name, claim in study.claims.items():
        at = f"{study.file}:{line_of(lines, 'claims', name)}: claims.{name}"
        _measurable(study, base, claim, at)
        for arm in (claim.arm, *claim.rivals):
            _known_arm(study, arm, at)
        if claim.arm in claim.rivals:
            raise StudyError(f"{at}: arm {claim.arm!r} is compared with itself")
        _recorded(study, base, claim, at)
    if study.objective.minus is not None:
        _known_arm(
            study, study.objective.minus, f"{study.file}:{line_of(lines, 'objective', 'minus')}: objective.minus"
        )
    if study.confirm is not None:
        _known_arm(study, study.confirm.against, f"{study.file}:{line_of(lines, 'confirm')}: confirm.against")
    if bool(study.search) != bool(study.vary):
        raise StudyError(f"{study.file}: `search` and `vary` need each other")
    if study.confirm and not study.search:
        raise StudyError(f"{study.file}:{line_of(lines, 'confirm')}: confirm needs a search whose winner it confirms")
    if not study.search and not study.arms:
        raise StudyError(f"{study.file}: nothing to run: give arms, or vary and search")
    if study.size_axes() and study.objective.minus is None:
        raise StudyError(
            f"{study.file}:{line_of(lines, 'objective')}: {study.size_axes()[0]} varies sizes, so the biggest model would win: "
            f"add `minus: ARM` to the objective; valid: {', '.join(study.arms) or 'an arm of its own'}"
        )
    _early_stopping_only_where_curves_keep_their_shape(study, lines)
    if study.search and study.search.sampler == "grid":
        for name, axis in study.vary.items():
            if not isinstance(axis, Choice):
                raise StudyError(
                    f"{study.file}:{line_of(lines, 'vary', name)}: a grid needs choices; {name} is a range"
                )


@contextmanager
def _blamed_on(place: str) -> Iterator[None]:
    """What is wrong with a trial is said of the place in the file that brought it about."""
    try:
        yield
    except StudyError as error:
        raise StudyError(f"{place}: {without_place(error)}") from None


def _no_arm_is_there_twice(study: Study, lines: Lines) -> None:
    """Equal arms have the same trials, which the tables can give to one of them only. With --set, which may make them equal
    for a quick look, that is so and no fault."""
    if study.fixed:
        return
    tuned = [{path: value} for path, grid in (study.tune.grid.items() if study.tune else ()) for value in grid] or [{}]
    seen: list[tuple[str, list[TrialSpec]]] = []
    for arm in study.arms:
        specs = [study.spec(arm=arm, seed=0, tuned=value).pruned() for value in tuned]
        for other, others in seen:
            if specs == others:
                raise StudyError(
                    f"{study.file}:{line_of(lines, 'arms', arm)}: arm {arm!r} trains the same as arm {other!r}; valid: one of "
                    f"them, or a difference in what is trained"
                )
        seen.append((arm, specs))


def _every_condition_names_a_choice(study: Study, lines: Lines) -> None:
    seen: list[str] = []
    for name, axis in study.vary.items():
        at = f"{study.file}:{line_of(lines, 'vary', name)}: vary.{name}"
        for other, labels in axis.when.items():
            if other not in study.vary:
                raise StudyError(f"{at}: condition on unknown parameter {other!r}{nearest(other, study.vary)}")
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
                f"{at}: is no path of the trial, so each choice must map paths to values{nearest(name, TrialSpec.model_fields)}"
            )
        seen.append(name)
    for i, rule in enumerate(study.exclude):
        for name, label in rule.items():
            excluded = study.vary.get(name)
            if not isinstance(excluded, Choice) or label not in excluded.choice:
                raise StudyError(
                    f"{study.file}:{line_of(lines, 'exclude', str(i))}: exclude: no choice {label!r} of {name!r} in vary"
                )


def _learns(study: Study, spec: TrialSpec) -> None:
    if (phase := study.objective.phase) in spec.phases and phase not in spec.pruned().phases:
        raise StudyError(f"phases.{phase}: every term has weight 0: nothing is learnt")


def _every_end_of_every_range_is_a_valid_trial(study: Study, lines: Lines) -> None:
    for name in study.vary:
        for end in study.vary[name].ends():
            point = study.point_at(name, end)
            with _blamed_on(f"{study.file}:{line_of(lines, 'vary', name)}: vary.{name} at {end!r}"):
                _learns(study, study.spec(point=point, seed=0))
    combinations = itertools.product(*([(name, end) for end in axis.ends()] for name, axis in study.vary.items()))
    for combination in itertools.islice(combinations, 512):
        point = {}
        for name, end in combination:
            if study.is_active(name, point):
                point[name] = end
        if not study.is_excluded(point):
            try:
                _learns(study, study.spec(point=point, seed=0))
            except StudyError as error:
                raise StudyError(f"{study.file}:{line_of(lines, 'vary')}: vary: {error}; exclude it") from None


def _early_stopping_only_where_curves_keep_their_shape(study: Study, lines: Lines) -> None:
    if not (study.search and study.search.stop_early):
        return
    phase = study.objective.phase
    harmless = (f"phases.{phase}.optimizer.", f"phases.{phase}.batch")
    for name in study.vary:
        for path in study.paths(name):
            if not path.startswith(harmless) and not (path.startswith("models.") and path.endswith(".dropout")):
                raise StudyError(
                    f"{study.file}:{line_of(lines, 'search', 'stop_early')}: stop_early with {path} varied would stop curves that "
                    f"cross; early stopping is allowed where only {harmless[0]}*, {harmless[1]} or dropout vary"
                )


def _measurable(study: Study, base: TrialSpec, what: Objective | Claim, at: str) -> None:
    phase_name = what.phase or study.objective.phase
    if phase_name not in base.phases:
        raise StudyError(
            f"{at}: no phase {phase_name!r}{nearest(phase_name, base.phases)}; valid: {', '.join(base.phases)}"
        )
    phase = base.phases[phase_name]
    rival = what.against_model if isinstance(what, Claim) else None
    for model in (what.model,) if rival is None else (what.model, rival):
        if model not in base.models:
            raise StudyError(f"{at}: no model {model!r}{nearest(model, base.models)}; valid: {', '.join(base.models)}")
        if model not in phase.train:
            raise StudyError(f"{at}: phase {phase_name!r} does not train {model!r}; valid: {', '.join(phase.train)}")
    tasks = phase.each or tuple(dict.fromkeys(stream.data for stream in phase.streams.values()))
    if isinstance(what, Claim):  # what is only scored is scored on test
        tasks = (*tasks, *phase.scored_on)
    elif phase.scored_on and what.task is None:
        raise StudyError(
            f"{at}: {', '.join(phase.scored_on)} (of scored_on) is scored on test alone, so that a mean over all data would be "
            f"another one there than on dev; name what counts on both: `task: {tasks[0]}`"
        )
    wanted = (what.task,) if isinstance(what.task, str) else what.task
    for task in wanted or ():
        if task not in tasks:
            raise StudyError(f"{at}: no task {task!r}{nearest(task, tasks)}; valid: {', '.join(tasks)}")
    valid = metrics_of(base, phase_name, wanted or tasks)
    if what.metric not in valid:
        of = f" of {', '.join(wanted)}" if wanted else ""
        raise StudyError(f"{at}: no metric {what.metric!r}{of}{nearest(what.metric, valid)}; valid: {', '.join(valid)}")


def _recorded(study: Study, base: TrialSpec, claim: Claim, at: str) -> None:
    """Something is recorded where the claim is read: on the way, too, where it may be read there."""
    name = claim.phase or study.objective.phase
    phase = base.phases[name]
    looks = ", ".join(f"{fraction:g}" for fraction in phase.evaluate)
    if claim.at == 1:
        return
    if claim.at != "equal" and claim.at not in phase.evaluate:
        raise StudyError(f"{at}: nothing is recorded at {claim.at:g}; valid: {looks}")
    how = f"at equal {claim.axis}" if claim.at == "equal" else f"at {claim.at:g}"
    if claim.at == "equal" and len(phase.evaluate) == 1:
        raise StudyError(
            f"{at}: {how} the dearer side is read on its way, where phase {name!r} records nothing; give "
            f"phases.{name}.evaluate fractions before the end, e.g. [0.25, 0.5, 0.75, 1]"
        )
    wanted = (claim.task,) if isinstance(claim.task, str) else claim.task
    late = [task for task in phase.scored_on if task in (wanted or phase.scored_on)]
    if late and (wanted or (claim.at == "equal" and claim.metric in EXCHANGE_METRICS)):
        own = dict.fromkeys(phase.each or (stream.data for stream in phase.streams.values()))
        raise StudyError(
            f"{at}: {', '.join(late)} (of scored_on) is scored at the end alone, and cannot be read {how}; "
            f"name a task that is scored on the way: {', '.join(own)}"
        )


def metrics_of(spec: TrialSpec, phase: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """What is measured of a model in each of these data sets, or of language in any of them."""
    further = set(tasks) & set(spec.phases[phase].scored_on)
    found: dict[str, int] = dict.fromkeys(EXCHANGE_METRICS, len(further)) if further else {}
    for instance in instances(spec.upto(phase)):
        for stream in streams_of(spec, instance).values() if instance.phase == phase else ():
            data = spec.data[stream.data]
            if stream.data not in tasks:
                continue
            if not isinstance(data, Tasks):
                kind = "lm" if stream.corruption is None else "mlm"
                names: tuple[str, ...] = (f"{kind}_loss", f"{kind}_accuracy")
                if isinstance(data, Instructions):
                    names = (*EXCHANGE_METRICS, *_agreements(spec.phases[phase], stream.data))
            else:
                rule = "accuracy" if stream.labels else rule_of(data)
                names = ("task_loss", *score_names(rule, part_names(data)))
            for name in names:
                found[name] = found.get(name, 0) + 1
    language = {name for name in found if name.startswith(("lm_", "mlm_"))}
    return tuple(name for name, count in found.items() if name in language or count == len(set(tasks)))


def _agreements(phase: Phase, data: str) -> tuple[str, ...]:
    """How near who learns on these exchanges is to each that it learns from, and to what that one was before."""
    terms = (term for term in phase.terms.values() if isinstance(term, Flow) and phase.streams[term.on].data == data)
    others = []
    for term in terms:
        others += [term.from_] if phase.train.get(term.from_) == "full" else [term.from_, f"{term.from_}_original"]
    return tuple(f"{other}_{metric}" for other in dict.fromkeys(others) for metric in ("agreement", "kl"))


def _known_arm(study: Study, arm: str, at: str) -> None:
    if arm not in study.arms:
        raise StudyError(f"{at}: no arm {arm!r}{nearest(arm, study.arms)}; valid: {', '.join(study.arms) or 'none'}")
