"""Checks a study beyond the types of its fields, before any device is used: every message says where and what is expected."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator.study.axes import Choice
from orchestrator.study.claims import AnyClaim, Claim, Crossing, Foretelling
from orchestrator.study.errors import Lines, StudyError, dotted, line_of, nearest
from orchestrator.study.objectives import COST_WORDS, Measured
from orchestrator.study.schema import Study
from trainables.config.data import Data, Sampling
from trainables.config.phase import Phase, Stream
from trainables.config.trial import TrialSpec
from trainables.metrics.known import LOSSES, OF_OTHER_MODELS, OF_REPLIES, OF_TOKENS
from trainables.metrics.language import LM_ACCURACY, LM_LOSS, MLM_ACCURACY, MLM_LOSS, TASK_LOSS
from trainables.metrics.replies import NAMED_BY_DATA
from trainables.metrics.task_scores import score_names
from trainables.training.phase_graph import phase_runs, streams_of


def check_study(study: Study, lines: Lines) -> None:
    """Raises StudyError for the first thing that is wrong."""
    checker = _Checker(study, lines)
    checker.vary()
    checker.arms()
    checker.objective_and_claims()
    checker.search()


@dataclass(frozen=True)
class _Checker:
    """Checks a study. One class, because every check names places of the study's file."""

    study: Study
    lines: Lines

    def place(self, *path: str) -> str:
        return f"{self.study.file}:{line_of(self.lines, *path)}"

    @contextmanager
    def blamed_on(self, place: str) -> Iterator[None]:
        """Puts the place in the file that makes a trial invalid before the message about the trial."""
        try:
            yield
        except StudyError as error:
            raise StudyError(f"{place}: {error.message}") from None

    def known(self, kind: str, name: str, among: Iterable[str], where: str) -> None:
        if name not in (among := tuple(among)):
            expected = ", ".join(among) or "none"
            raise StudyError(f"{where}: no {kind} {name!r}{nearest(name, among)}; expected {expected}")

    # ------------------------------------------------------------------------------------------------------- vary

    def vary(self) -> None:
        """Checks conditions and exclusions; then that the ends of all ranges are valid trials, alone and together."""
        study = self.study
        for i, name in enumerate(study.vary):
            self.axis(name, list(study.vary)[:i])
        for i, rule in enumerate(study.exclude):
            for name, label in rule.items():
                axis = study.vary.get(name)
                if not isinstance(axis, Choice) or label not in axis.choice:
                    raise StudyError(
                        f"{self.place('exclude', str(i))}: exclude: no choice {label!r} of {name!r} in vary"
                    )
        for name, axis in study.vary.items():
            for end in axis.ends():
                with self.blamed_on(f"{self.place('vary', name)}: vary.{name} at {end!r}"):
                    self.trains_objective(point=study.point_at(name, end))
        ends = [[(name, end) for end in axis.ends()] for name, axis in study.vary.items()]
        for combination in itertools.islice(itertools.product(*ends), 512) if ends else ():
            point: dict[str, Any] = {}
            for name, end in combination:
                point |= {name: end} if study.is_active(name, point) else {}
            if not study.is_excluded(point):
                try:
                    self.trains_objective(point=point)
                except StudyError as error:
                    raise StudyError(f"{self.place('vary')}: vary: {error}; exclude it") from None
        for size in study.size_axes():
            if study.vary[size].when:
                raise StudyError(f"{self.place('vary', size)}: vary.{size}: sizes cannot depend on a condition")

    def axis(self, name: str, before: Sequence[str]) -> None:
        study, axis, where = self.study, self.study.vary[name], f"{self.place('vary', name)}: vary.{name}"
        for other, labels in axis.when.items():
            if other not in study.vary:
                raise StudyError(f"{where}: condition on unknown parameter {other!r}{nearest(other, study.vary)}")
            if other not in before:
                raise StudyError(f"{where}: condition on {other!r}, which must stand before it")
            choice = study.vary[other]
            for label in labels:
                if not isinstance(choice, Choice) or label not in choice.choice:
                    expected = ", ".join(choice.choice) if isinstance(choice, Choice) else "none: it is a range"
                    raise StudyError(f"{where}: {other} has no choice {label!r}; expected {expected}")
        if study.is_zip(name) and not (
            isinstance(axis, Choice) and all(isinstance(value, dict) for value in axis.choice.values())
        ):
            paths = [path for path in dotted(study.trial) if path.endswith(f".{name}")]
            meant = nearest(name, TrialSpec.model_fields) or (f" (did you mean {paths[0]!r}?)" if paths else "")
            raise StudyError(f"{where}: is no path of the trial, so each choice must map paths to values{meant}")

    def trains_objective(self, **how: Any) -> TrialSpec:
        """Builds a trial, and checks that it trains something in the objective's phase."""
        spec, phase = self.study.spec(seed=0, **how), self.study.objective.phase
        if phase in spec.phases and phase not in spec.pruned().phases:
            raise StudyError(f"phases.{phase}: every term has weight 0: nothing is learnt")
        for path, sampling, length in _samplings(spec):
            if "max_tokens" in sampling.model_fields_set and sampling.max_tokens > length:
                raise StudyError(
                    f"trial.{path}.max_tokens: {sampling.max_tokens} is beyond length {length}, which a prompt and its reply "
                    f"share; expected at most {length}"
                )
        return spec

    # ------------------------------------------------------------------------------------------------------- arms

    def arms(self) -> None:
        study, objective = self.study, self.study.objective
        for arm in study.arms:
            with self.blamed_on(f"{self.place('arms', arm)}: arm {arm!r}"):
                spec = self.trains_objective(arm=arm)
                _check_early_stopping(spec)
                if study.tune and objective.model not in spec.pruned().phases[objective.phase].train:
                    raise StudyError(
                        f"does not train {objective.model!r} in phase {objective.phase!r}, by which `tune` chooses"
                    )
        grid = [(path, value) for path, values in (study.tune.grid if study.tune else {}).items() for value in values]
        for path, value in grid:
            with self.blamed_on(f"{self.place('tune', 'grid', path)}: tune.grid at {value!r}"):
                self.trains_objective(tuned={path: value})
        if study.fixed:  # --set may make arms equal for a quick look
            return
        seen: dict[str, list[TrialSpec]] = {}
        for arm in study.arms:
            tuned = [{path: value} for path, value in grid] or [{}]
            specs = [study.spec(arm=arm, seed=0, tuned=values).pruned() for values in tuned]
            for other, others in seen.items():
                if specs == others:  # they would have the same trials, which the tables can give to one arm only
                    raise StudyError(
                        f"{self.place('arms', arm)}: arm {arm!r} trains the same as arm {other!r}; expected one of them, "
                        "or a difference in what is trained"
                    )
            seen[arm] = specs

    # ------------------------------------------------------------------------------------------ objective and claims

    def objective_and_claims(self) -> None:
        study, base = self.study, TrialSpec.model_validate({**self.study.trial, "seed": 0})
        _check_early_stopping(base, f"{self.place('trial', 'phases')}: trial.")
        self.objectives(base)
        said = dict[str, str]()
        for name, claim in study.claims.items():
            where = f"{self.place('claims', name)}: claims.{name}"
            self.measured(base, claim, where)
            if isinstance(claim, Claim):
                for arm in (claim.arm, *claim.rivals):
                    self.known("arm", arm, study.arms, where)
                if claim.arm in claim.rivals:
                    raise StudyError(f"{where}: arm {claim.arm!r} is compared with itself")
                self.evaluated(base.phases[claim.phase or study.objective.phase], claim, where)
                self.of_one_tokenizer(claim, where)
            else:
                self.scaling(base, claim, where)
            if (other := said.setdefault(repr(claim.judged()), name)) != name:
                raise StudyError(f"{where}: says the same as claim {other!r}; expected one of them")

    def objectives(self, base: TrialSpec) -> None:
        """Checks that objectives and constraints are measured, and each number is named once; arms are tuned by the first."""
        study, several = self.study, len(self.study.objectives) > 1
        listed: list[tuple[tuple[str, ...], Measured, bool | None]] = [
            (("objective", str(i)) if several else ("objective",), what, None)
            for i, what in enumerate(study.objectives)
        ]
        listed += [(("search", "constraints", str(i)), c, c.at_most is None) for i, c in enumerate(study.constraints)]
        said = dict[Any, str]()
        for path, what, side in listed:
            name = ".".join(path)
            where = f"{self.place(*path)}: {name}"
            self.measured(base, what, where, costs=() if what is study.objective else tuple(COST_WORDS))
            if (other := said.setdefault((side, what.phase, what.model, what.metric, what.task), name)) != name:
                raise StudyError(f"{where}: is of the same number as {other}; expected one of them")
        for i, objective in enumerate(study.objectives):
            if objective.minus not in (None, study.objective.minus):
                raise StudyError(
                    f"{self.place('objective', str(i))}: objective.{i}.minus: all objectives are compared with one arm; "
                    f"expected {study.objective.minus or 'the same in the first objective'} (got {objective.minus!r})"
                )

    def scaling(self, base: TrialSpec, claim: Crossing | Foretelling, where: str) -> None:
        """Checks that the arms of a claim about scaling have enough losses for its curve, and of their teachers, too."""
        if claim.metric not in [metric.name for metric in LOSSES]:
            raise StudyError(f"{where}: a curve is of losses, and {claim.metric} is none")
        for phase in claim.phases:
            self.measured(base, claim, where, phase)
        for arm in claim.arms:
            self.known("arm", arm, self.study.arms, where)
        try:
            grid = self.study.grid(claim)
        except ValueError as error:
            raise StudyError(f"{where}: {error}") from None
        for arm, (teacher, (run, fraction)) in grid.teacher.items():
            trains = base.phases[run.phase]
            if claim.metric not in metrics_of(base, run.phase, _as_tuple(claim.task) or _trained_on(trains)):
                raise StudyError(f"{where}: phase {run.phase!r} does not measure {claim.metric} of {teacher!r}")
            if fraction not in trains.evaluate:
                raise StudyError(
                    f"{where}: {teacher!r} teaches arm {arm!r} as it is at {run.phase}@{fraction:g}, where nothing is measured; "
                    f"expected {fraction:g} in phases.{run.phase}.evaluate"
                )

    def measured(
        self,
        base: TrialSpec,
        what: Measured | AnyClaim,
        where: str,
        name: str | None = None,
        *,
        costs: Sequence[str] = (),
    ) -> None:
        """Checks that the metric is measured of the model, on the data sets, in the phase (by default its own); or that it
        is one of the costs."""
        name = name or what.phase or self.study.objective.phase
        self.known("phase", name, base.phases, where)
        phase = base.phases[name]
        rival = None if isinstance(what, Measured) else what.against_model
        for model in (what.model,) if rival is None else (what.model, rival):
            self.known("model", model, base.models, where)
            if model not in phase.train:
                raise StudyError(f"{where}: phase {name!r} does not train {model!r}; expected {', '.join(phase.train)}")
        tasks = _trained_on(phase)
        is_cost = what.metric in costs
        if not isinstance(what, Measured):
            tasks = (*tasks, *phase.eval_only)
        elif phase.eval_only and what.task is None and not is_cost:
            raise StudyError(
                f"{where}: {', '.join(phase.eval_only)} (of eval_only) is scored on test only, so a mean over all data sets "
                f"would not be the same on dev; name a data set that is scored on both: `task: {tasks[0]}`"
            )
        wanted = _as_tuple(what.task)
        for task in wanted:
            self.known("task", task, tasks, where)
        if is_cost:
            return
        expected = (*metrics_of(base, name, wanted or tasks), *costs)
        if what.metric not in expected:
            of = f" of {', '.join(wanted)}" if wanted else ""
            close = nearest(what.metric, expected)
            raise StudyError(f"{where}: no metric {what.metric!r}{of}{close}; expected {', '.join(expected)}")

    def of_one_tokenizer(self, claim: Claim, where: str) -> None:
        """Checks that a mean over tokens is compared between models that have the same tokens."""
        specs = [self.study.spec(arm=arm, seed=0) for arm in (claim.arm, *claim.rivals)]
        models = [claim.model, *[claim.against_model or claim.model] * len(claim.rivals)]
        names = [spec.models[model].tokenizer for spec, model in zip(specs, models, strict=True)]
        if len(set(names)) > 1 and _is_of_tokens(claim.metric):
            each = " and ".join(dict.fromkeys(f"{name or 'the data'}'s tokenizer" for name in names))
            raise StudyError(
                f"{where}: {claim.metric} is a mean over tokens, and what is compared has {each}; expected a metric of texts "
                "or classes (rougeL, score)"
            )

    def evaluated(self, phase: Phase, claim: Claim, where: str) -> None:
        """Checks that there is an evaluation at the progress that the claim compares."""
        if claim.at == 1:
            return
        fractions = ", ".join(f"{fraction:g}" for fraction in phase.evaluate)
        if claim.at != "equal" and claim.at not in phase.evaluate:
            raise StudyError(f"{where}: nothing is recorded at {claim.at:g}; expected {fractions}")
        how = f"at equal {claim.axis}" if claim.at == "equal" else f"at {claim.at:g}"
        if claim.at == "equal" and len(phase.evaluate) == 1:
            name = claim.phase or self.study.objective.phase
            raise StudyError(
                f"{where}: {how} the dearer arm is compared before its end, where phase {name!r} records nothing; give "
                f"phases.{name}.evaluate fractions before the end, e.g. [0.25, 0.5, 0.75, 1]"
            )
        wanted = _as_tuple(claim.task)
        late = [task for task in phase.eval_only if task in (wanted or phase.eval_only)]
        of_replies = [metric.name for metric in (*OF_REPLIES, *NAMED_BY_DATA)]
        if late and (wanted or (claim.at == "equal" and claim.metric in of_replies)):
            raise StudyError(
                f"{where}: {', '.join(late)} (of eval_only) is scored at the end only, and not {how}; name a task that is "
                f"scored before the end: {', '.join(_trained_on(phase))}"
            )

    # ----------------------------------------------------------------------------------------------------- search

    def search(self) -> None:
        study, objective, confirm = self.study, self.study.objective, self.study.confirm
        if objective.minus is not None:
            self.known("arm", objective.minus, study.arms, f"{self.place('objective', 'minus')}: objective.minus")
        if confirm is not None:
            self.known("arm", confirm.against, study.arms, f"{self.place('confirm')}: confirm.against")
            for name, end in ((name, end) for name, axis in study.vary.items() for end in axis.ends()):
                point = study.point_at(name, end)
                blamed = f"{self.place('confirm')}: confirm.against at the winner's settings, here {name} {end!r}"
                with self.blamed_on(blamed):
                    if not study.is_excluded(point):
                        self.trains_objective(arm=confirm.against, point=point)
        if bool(study.search) != bool(study.vary):
            raise StudyError(f"{study.file}: `search` and `vary` need each other")
        if confirm and not study.search:
            raise StudyError(f"{self.place('confirm')}: confirm needs a search whose winner it confirms")
        if not study.search and not study.arms:
            raise StudyError(f"{study.file}: nothing to run: give arms, or vary and search")
        if study.good_enough and len(study.arms) < 2:
            where = f"{self.place('good_enough')}: good_enough"
            raise StudyError(
                f"{where}: names the cheapest of several arms; expected two arms or more (got {len(study.arms)})"
            )
        if study.size_axes() and any(o.minus is None and not o.is_cost for o in study.objectives):
            raise StudyError(
                f"{self.place('objective')}: {study.size_axes()[0]} varies sizes, so the biggest model would win: add "
                f"`minus: ARM` to the objective; expected {', '.join(study.arms) or 'an arm of its own'}"
            )
        if study.search and study.search.stop_early and (study.constraints or len(study.objectives) > 1):
            raise StudyError(
                f"{self.place('search', 'stop_early')}: search.stop_early compares points by one objective before their end; "
                f"expected null, or one objective and no constraints"
            )
        harmless = (f"phases.{objective.phase}.optimizer.", f"phases.{objective.phase}.batch")
        varied = [path for name in study.vary for path in study.paths(name)]
        if f"models.{objective.model}.tokenizer" in varied and _is_of_tokens(objective.metric):
            raise StudyError(
                f"{self.place('objective')}: objective: {objective.metric} is a mean over tokens, and models.{objective.model}.tokenizer "
                "varies; expected a metric of texts or classes (rougeL, score)"
            )
        for path in varied if study.search and study.search.stop_early else ():
            if not path.startswith(harmless) and not (path.startswith("models.") and path.endswith(".dropout")):
                raise StudyError(
                    f"{self.place('search', 'stop_early')}: stop_early with {path} varied would stop curves that cross; early "
                    f"stopping is allowed where only {harmless[0]}*, {harmless[1]} or dropout vary"
                )
        for name, axis in study.vary.items():
            if study.search and study.search.sampler == "grid" and not isinstance(axis, Choice):
                raise StudyError(f"{self.place('vary', name)}: a grid needs choices; {name} is a range")


def _samplings(spec: TrialSpec) -> Iterator[tuple[str, Sampling, int]]:
    """Yields (path, how replies are drawn, the tokens of prompt and reply) wherever a trial draws replies."""
    for name, data in spec.data.items():
        if data.scoring is not None:
            yield f"data.{name}.scoring", data.scoring, data.length
    for name, phase in spec.phases.items():
        for on, stream in phase.streams.items():
            if stream.replies is not None:
                length = min(spec.data[item].length for item in phase.for_each_dataset or (stream.data,))
                yield f"phases.{name}.streams.{on}.replies", stream.replies, length


def _is_of_tokens(metric: str) -> bool:
    return metric in [known.name for known in OF_TOKENS]


def _check_early_stopping(spec: TrialSpec, where: str = "") -> None:
    """Raises StudyError where the metric by which a phase stops is not measured."""
    for name, phase in spec.phases.items():
        rule = phase.early_stopping
        if rule is not None and rule.metric is not None:
            expected = metrics_of(spec, name, (rule.data,) if rule.data else _trained_on(phase))
            if rule.metric not in expected:
                close = nearest(rule.metric, expected)
                raise StudyError(
                    f"{where}phases.{name}.early_stopping: no metric {rule.metric!r}{close}; expected {', '.join(expected)}"
                )


def _as_tuple(task: str | Sequence[str] | None) -> tuple[str, ...]:
    return (task,) if isinstance(task, str) else tuple(task or ())


def _trained_on(phase: Phase) -> tuple[str, ...]:
    return phase.for_each_dataset or tuple(dict.fromkeys(stream.data for stream in phase.streams.values()))


def metrics_of(spec: TrialSpec, phase: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """Returns the metrics that are measured in each of these data sets; of tokens, those measured in any of them."""
    of_tasks: Mapping[str, list[str]] = {task: [] for task in tasks}
    for task in set(tasks) & set(spec.phases[phase].eval_only):
        of_tasks[task].extend(_metrics_of_replies(spec.data[task]))
    for run in phase_runs(spec.upto(phase)):
        for stream in streams_of(spec, run).values() if run.phase == phase else ():
            if stream.data in of_tasks:
                of_tasks[stream.data].extend(_metrics_of_stream(spec, spec.phases[phase], stream))
    of_tokens = {metric.name for metric in OF_TOKENS}
    names = dict.fromkeys(name for of_task in of_tasks.values() for name in of_task)
    return tuple(n for n in names if n in of_tokens or all(n in of_task for of_task in of_tasks.values()))


def _metrics_of_replies(data: Data) -> list[str]:
    return [metric.name for metric in OF_REPLIES] + [
        metric.kind for metric in (data.scoring.metrics if data.scoring else ())
    ]


def _metrics_of_stream(spec: TrialSpec, phase: Phase, stream: Stream) -> list[str]:
    data = spec.data[stream.data]
    if data.rule is not None:
        return [TASK_LOSS.name, *score_names("accuracy" if stream.labels else data.rule, data.part_names)]
    if data.scoring is None:
        return [m.name for m in ((LM_LOSS, LM_ACCURACY) if stream.corruption is None else (MLM_LOSS, MLM_ACCURACY))]
    terms = [t for t in phase.terms.values() if t.inputs == "logits" and phase.streams[t.on].data == stream.data]
    sources = dict.fromkeys(term.source for term in terms if term.source is not None)
    # a source that is not trained in full can be compared as it was before, too
    others = [o for s in sources for o in ((s,) if phase.train.get(s) == "full" else (s, f"{s}_original"))]
    return _metrics_of_replies(data) + [f"{other}_{m.name}" for other in others for m in OF_OTHER_MODELS]
