"""Where points come from: Optuna, asked and told. The only importer of optuna; knows no Ray and no storage.

The study in memory is derived: it is rebuilt from the trials' ends at each start. Each question is asked with a sampler
seeded by (study seed, number), so that an answer depends only on what was known when it was asked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from orchestrator.study.schema import Choice, FloatRange, Study
from trainables.config.value import digest, random_stream

optuna.logging.set_verbosity(optuna.logging.WARNING)

State = Literal["running", "ended", "stopped", "failed"]
STATES = {
    "running": TrialState.RUNNING,
    "ended": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,  # never COMPLETE: its last score is no final one
    "failed": TrialState.FAIL,
}
TRIES = 50  # questions before a space counts as used up
INSISTS = 10  # questions after which TPE, whose favourite may be excluded, is replaced by a random draw
LISTED = 10_000  # combinations: of so few, those that a sampler does not come upon are taken from a list


def space_of(study: Study) -> dict[str, BaseDistribution]:
    return {name: _distribution(axis) for name, axis in study.vary.items()}


def _distribution(axis: Any) -> BaseDistribution:
    match axis:
        case Choice():
            return CategoricalDistribution(list(axis.choice))
        case FloatRange():
            return FloatDistribution(*axis.float_, log=axis.log)
        case _:
            return IntDistribution(*axis.int_, log=axis.log, step=axis.step)


def _suggest(trial: optuna.Trial, name: str, axis: Any) -> Any:
    match axis:
        case Choice():
            return trial.suggest_categorical(name, list(axis.choice))
        case FloatRange():
            return trial.suggest_float(name, *axis.float_, log=axis.log)
        case _:
            return trial.suggest_int(name, *axis.int_, log=axis.log, step=axis.step)


@dataclass
class Sampler:
    """Asks for points one by one. `is_new` refuses points that the study excludes or already has."""

    study: Study
    _optuna: optuna.Study = field(init=False)
    _numbers: dict[int, int] = field(default_factory=dict)  # our number -> Optuna's
    _space: dict[str, BaseDistribution] = field(init=False)
    _left: list[dict[str, Any]] | None = None  # of all combinations, those not asked yet

    def __post_init__(self) -> None:
        self._space = space_of(self.study)
        direction = "minimize" if self.study.objective.mode == "min" else "maximize"
        self._optuna = optuna.create_study(direction=direction)

    def add(self, number: int, params: Mapping[str, Any], state: State, score: float | None) -> None:
        """A point of an earlier run, or one that is running."""
        self._numbers[number] = len(self._optuna.get_trials(deepcopy=False))
        distributions = {name: self._space[name] for name in params}
        value = score if state == "ended" else None
        self._optuna.add_trial(
            create_trial(state=STATES[state], params=dict(params), distributions=distributions, value=value)
        )

    def tell(self, number: int, state: State, score: float | None) -> None:
        self._optuna.tell(self._numbers[number], score if state == "ended" else None, state=STATES[state])

    def ask(self, number: int, is_new: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any] | None:
        """The point's params (labels for choices), or None where the space holds nothing new."""
        assert self.study.search is not None
        if self.study.search.sampler == "grid":
            return self._of_the_list(number, is_new)
        for attempt in range(TRIES):
            self._optuna.sampler = self._sampler(number, attempt)
            trial = self._optuna.ask()
            params: dict[str, Any] = {}
            for name, axis in self.study.vary.items():
                if self.study.is_active(name, params):
                    params[name] = _suggest(trial, name, axis)
            if not self.study.is_excluded(params) and is_new(params):
                self._numbers[number] = trial.number
                return params
            self._optuna.tell(trial, state=TrialState.FAIL)
        is_list = all(isinstance(axis, Choice) for axis in self.study.vary.values())
        return self._of_the_list(number, is_new) if is_list and self._size() <= LISTED else None

    def _of_the_list(self, number: int, is_new: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any] | None:
        """The next of all combinations. What is refused once is refused for good."""
        if self._left is None:
            self._left = self._grid()
        while self._left:
            if is_new(self._left[0]):
                params = self._left.pop(0)
                self.add(number, params, "running", None)
                return params
            self._left.pop(0)
        return None

    def _size(self) -> int:
        return math.prod(len(axis.ends()) for axis in self.study.vary.values())

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        assert self.study.search is not None
        seed = random_stream(self.study.search.seed, "search", number, attempt) % 2**32
        if self.study.search.sampler == "random" or attempt >= INSISTS:
            return optuna.samplers.RandomSampler(seed=seed)
        startup = min(10, max(4, self.study.search.points // 3))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)

    def _grid(self) -> list[dict[str, Any]]:
        """Every combination of choices, conditions respected, in an order drawn once."""
        found: dict[str, dict[str, Any]] = {}
        for combination in itertools.product(*(axis.ends() for axis in self.study.vary.values())):
            params: dict[str, Any] = {}
            for name, label in zip(self.study.vary, combination, strict=True):
                if self.study.is_active(name, params):
                    params[name] = label
            if not self.study.is_excluded(params):
                found[digest([self.study.search and self.study.search.seed, params])] = params
        return [found[key] for key in sorted(found)]

    def importance(self) -> tuple[str, dict[str, float]] | None:
        """(evaluator, importance by axis) over completed points, or None where Optuna can say nothing."""
        if sum(trial.state == TrialState.COMPLETE for trial in self._optuna.get_trials(deepcopy=False)) < 2:
            return None
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        try:
            found = optuna.importance.get_param_importances(self._optuna, evaluator=evaluator)
        except (ValueError, RuntimeError):
            return None
        return "PED-ANOVA", dict(found)
