"""The points of a search, from Optuna. The only importer of optuna; knows no Ray and no storage.

Optuna's study is in memory, and rebuilt from the trials' ends at each start. Each question is put to a sampler seeded by
(study seed, number), so that an answer depends only on what was known when the question was put.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from orchestrator.analysis.statistics import Chance, importance_by_chance
from orchestrator.study.axes import Axis, Choice, FloatRange
from orchestrator.study.schema import Study
from trainables.config.value import digest, random_stream
from trainables.runtime.outcome import Status

optuna.logging.set_verbosity(optuna.logging.WARNING)

STATES = {
    Status.RUNNING: TrialState.RUNNING,
    Status.ENDED: TrialState.COMPLETE,
    Status.STOPPED: TrialState.PRUNED,  # not COMPLETE: its last score is no final score
    Status.FAILED: TrialState.FAIL,
}
Values = float | Sequence[float] | None  # one for each objective
TRIES = 50  # questions before a space counts as used up
RANDOM_AFTER = 10  # questions after which random draws replace TPE, whose favourite may be excluded
LISTED = 10_000  # combinations: in a space of at most so many, points that the sampler misses come from a list


def _distribution(axis: Axis) -> BaseDistribution:
    match axis:
        case Choice():
            return CategoricalDistribution(list(axis.choice))
        case FloatRange():
            return FloatDistribution(*axis.float_, log=axis.log)
        case _:
            return IntDistribution(*axis.int_, log=axis.log, step=axis.step)


def _suggest(trial: optuna.Trial, name: str, axis: Axis) -> Any:
    match axis:
        case Choice():
            return trial.suggest_categorical(name, list(axis.choice))
        case FloatRange():
            return trial.suggest_float(name, *axis.float_, log=axis.log)
        case _:
            return trial.suggest_int(name, *axis.int_, log=axis.log, step=axis.step)


class Sampler:
    """Asks for points one by one. `is_new` refuses points that the study excludes or already has."""

    def __init__(self, study: Study) -> None:
        assert study.search is not None
        self._study, self._search = study, study.search
        self._space = {name: _distribution(axis) for name, axis in study.vary.items()}
        directions = ["minimize" if objective.mode == "min" else "maximize" for objective in study.objectives]
        self._optuna = optuna.create_study(directions=directions)
        self._running: dict[int, optuna.Trial] = {}  # by the number of the point
        self._left: list[dict[str, Any]] | None = None  # of all combinations, those not asked yet

    def add(
        self, number: int, params: Mapping[str, Any], status: Status, values: Values, *, excess: Sequence[float] = ()
    ) -> None:
        """Adds a point that Optuna has not drawn: of an earlier start, or from the list of combinations.

        `excess`: beyond each constraint, above 0 where the point violates it.
        """
        distributions = {name: self._space[name] for name in params}
        if status == Status.RUNNING:
            self._optuna.enqueue_trial(dict(params))
            self._running[number] = self._optuna.ask(distributions)
            return
        is_over = status == Status.ENDED
        self._optuna.add_trial(
            create_trial(
                state=STATES[status],
                params=dict(params),
                distributions=distributions,
                values=_listed(values) if is_over else None,
                constraints=_constraints(excess) if is_over else None,
            )
        )

    def tell(self, number: int, status: Status, values: Values, excess: Sequence[float] = ()) -> None:
        trial = self._running.pop(number)
        if status == Status.ENDED:
            for name, value in _constraints(excess).items():
                trial.set_constraint(name, value)
        self._optuna.tell(trial, _listed(values) if status == Status.ENDED else None, state=STATES[status])

    def ask(self, number: int, is_new: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any] | None:
        """Returns the point's params (labels for choices), or None where the space holds no new point.

        `is_new` is called last with the params that are returned.
        """
        if self._search.sampler == "grid":
            return self._next_listed(number, is_new)
        for attempt in range(TRIES):
            self._optuna.sampler = self._sampler(number, attempt)
            trial = self._optuna.ask()
            params: dict[str, Any] = {}
            for name, axis in self._study.vary.items():
                if self._study.is_active(name, params):
                    params[name] = _suggest(trial, name, axis)
            if not self._study.is_excluded(params) and is_new(params):
                self._running[number] = trial
                return params
            self._optuna.tell(trial, state=TrialState.FAIL)
        axes = self._study.vary.values()
        is_list = all(isinstance(axis, Choice) for axis in axes) and math.prod(len(a.ends()) for a in axes) <= LISTED
        return self._next_listed(number, is_new) if is_list else None

    def _next_listed(self, number: int, is_new: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any] | None:
        """Returns the next of all combinations. A combination that is refused once is refused for good."""
        if self._left is None:
            self._left = self._grid()
        while self._left:
            params = self._left.pop(0)
            if is_new(params):
                self.add(number, params, Status.RUNNING, None)
                return params
        return None

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        seed = random_stream(self._search.seed, "search", number, attempt) % 2**32
        if self._search.sampler == "random" or attempt >= RANDOM_AFTER:
            return optuna.samplers.RandomSampler(seed=seed)
        startup = min(10, max(4, self._search.points // 3))
        # for several objectives too: NSGA-II keeps its generations in attributes that a study rebuilt at a start has not
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)

    def _grid(self) -> list[dict[str, Any]]:
        """Returns every combination of choices, conditions respected, in an order drawn once."""
        combinations: dict[str, dict[str, Any]] = {}
        for labels in itertools.product(*(axis.ends() for axis in self._study.vary.values())):
            params: dict[str, Any] = {}
            for name, label in zip(self._study.vary, labels, strict=True):
                if self._study.is_active(name, params):
                    params[name] = label
            if not self._study.is_excluded(params):
                combinations[digest([self._search.seed, params])] = params
        return [combinations[key] for key in sorted(combinations)]

    def importance(self, objective: int = 0) -> tuple[str, dict[str, float]] | None:
        """Returns (evaluator, importance by axis for an objective) over completed points, or None where Optuna has too few."""
        if sum(trial.state == TrialState.COMPLETE for trial in self._optuna.get_trials(deepcopy=False)) < 2:
            return None
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        sign = self._study.objectives[objective].sign  # a target is minimised
        target = None if len(self._study.objectives) == 1 else lambda trial: sign * trial.values[objective]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a target is minimised
            try:
                found = optuna.importance.get_param_importances(self._optuna, evaluator=evaluator, target=target)
            except (ValueError, RuntimeError):
                return None
        return "PED-ANOVA", dict(found)

    def importance_by_chance(self) -> Chance:
        """Returns the importances of the completed points where their scores are permuted; there are importances."""
        done = [trial for trial in self._optuna.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]

        def importances(scores: Sequence[float]) -> dict[str, float]:
            permuted = optuna.create_study(direction=self._optuna.directions[0].name.lower())
            for trial, score in zip(done, scores, strict=True):
                permuted.add_trial(create_trial(params=trial.params, distributions=trial.distributions, value=score))
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return dict(optuna.importance.get_param_importances(permuted, evaluator=evaluator))

        return importance_by_chance(importances, [trial.values[0] for trial in done])


def _listed(values: Values) -> list[float] | None:
    return [values] if isinstance(values, int | float) else None if values is None else [*values]


def _constraints(excess: Sequence[float]) -> dict[str, float]:
    return {str(i): value for i, value in enumerate(excess)}
