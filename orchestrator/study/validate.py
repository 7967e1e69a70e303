"""TODO."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from orchestrator.study.errors import (
    Lines,
    StudyError,
    line_of,
    nearest,
    without_place,
)
from orchestrator.study.schema import Choice, Claim, Objective, Study
from trainables.config.data import Instructions, Tasks
from trainables.config.phase import Phase
from trainables.config.terms import Flow
from trainables.config.trial import TrialSpec
from trainables.metrics.task_scores import EXCHANGE_METRICS, part_names, rule_of, score_names
from trainables.training.phase_graph import phase_runs, streams_of


def check_study(study: Study, lines: Lines) -> None:
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
            f"add `minus: ARM` to the objective; expected {', '.join(study.arms) or 'an arm of its own'}"
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
                    f"{study.file}:{line_of(lines, 'arms', arm)}: arm {arm!r} trains the same as arm {other!r}; expected one of "
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
                    raise StudyError(f"{at}: {other} has no choice {label!r}; expected {valid}")
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
            f"{at}: no phase {phase_name!r}{nearest(phase_name, base.phases)}; expected {', '.join(base.phases)}"
        )
    phase = base.phases[phase_name]
    rival = what.against_model if isinstance(what, Claim) else None
    for model in (what.model,) if rival is None else (what.model, rival):
        if model not in base.models:
            raise StudyError(
                f"{at}: no model {model!r}{nearest(model, base.models)}; expected {', '.join(base.models)}"
            )
        if model not in phase.train:
            raise StudyError(f"{at}: phase {phase_name!r} does not train {model!r}; expected {', '.join(phase.train)}")
    tasks = phase.for_each_dataset or tuple(dict.fromkeys(stream.data for stream in phase.streams.values()))
    if isinstance(what, Claim):  # what is only scored is scored on test
        tasks = (*tasks, *phase.eval_only)
    elif phase.eval_only and what.task is None:
        raise StudyError(
            f"{at}: {', '.join(phase.eval_only)} (of eval_only) is scored on test alone, so that a mean over all data would be "
            f"another one there than on dev; name what counts on both: `task: {tasks[0]}`"
        )
    wanted = (what.task,) if isinstance(what.task, str) else what.task
    for task in wanted or ():
        if task not in tasks:
            raise StudyError(f"{at}: no task {task!r}{nearest(task, tasks)}; expected {', '.join(tasks)}")
    valid = metrics_of(base, phase_name, wanted or tasks)
    if what.metric not in valid:
        of = f" of {', '.join(wanted)}" if wanted else ""
        raise StudyError(
            f"{at}: no metric {what.metric!r}{of}{nearest(what.metric, valid)}; expected {', '.join(valid)}"
        )


def _recorded(study: Study, base: TrialSpec, claim: Claim, at: str) -> None:
    """Something is recorded where the claim is read: on the way, too, where it may be read there."""
    name = claim.phase or study.objective.phase
    phase = base.phases[name]
    looks = ", ".join(f"{fraction:g}" for fraction in phase.evaluate)
    if claim.at == 1:
        return
    if claim.at != "equal" and claim.at not in phase.evaluate:
        raise StudyError(f"{at}: nothing is recorded at {claim.at:g}; expected {looks}")
    how = f"at equal {claim.axis}" if claim.at == "equal" else f"at {claim.at:g}"
    if claim.at == "equal" and len(phase.evaluate) == 1:
        raise StudyError(
            f"{at}: {how} the dearer side is read on its way, where phase {name!r} records nothing; give "
            f"phases.{name}.evaluate fractions before the end, e.g. [0.25, 0.5, 0.75, 1]"
        )
    wanted = (claim.task,) if isinstance(claim.task, str) else claim.task
    late = [task for task in phase.eval_only if task in (wanted or phase.eval_only)]
    if late and (wanted or (claim.at == "equal" and claim.metric in EXCHANGE_METRICS)):
        own = dict.fromkeys(phase.for_each_dataset or (stream.data for stream in phase.streams.values()))
        raise StudyError(
            f"{at}: {', '.join(late)} (of eval_only) is scored at the end alone, and cannot be read {how}; "
            f"name a task that is scored on the way: {', '.join(own)}"
        )


def metrics_of(spec: TrialSpec, phase: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """What is measured of a model in each of these data sets, or of language in any of them."""
    further = set(tasks) & set(spec.phases[phase].eval_only)
    found: dict[str, int] = dict.fromkeys(EXCHANGE_METRICS, len(further)) if further else {}
    for instance in phase_runs(spec.upto(phase)):
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
        raise StudyError(f"{at}: no arm {arm!r}{nearest(arm, study.arms)}; expected {', '.join(study.arms) or 'none'}")
