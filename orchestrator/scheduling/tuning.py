"""The tuning of each arm: a race between the values of a grid, on dev, at the same seeds for all values and arms.

Each value runs at two seeds; those that are not clearly worse run on, up to `tune.seeds`. A choice is made only where all
trials so far are over, so that it does not depend on the order in which they end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.analysis.race import choose, contenders
from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.open_trials import OpenTrials, Teachers
from orchestrator.scheduling.trials import PlannedTrial, Planner, strata
from orchestrator.study.objectives import Measured
from orchestrator.study.schema import Study

Target = tuple[str, tuple[tuple[str, str], ...]]  # an arm, and the sizes at which it is tuned


@dataclass
class _Grid:
    """The trials of one target by value (None: a baseline without a grid), seed by seed, and the tuned value once known."""

    trials: dict[float | None, list[PlannedTrial]] = field(default_factory=dict)
    num_seeds: int = 1
    num_extensions: int = 0
    tuned: dict[str, Any] | None = None

    @property
    def is_one_trial(self) -> bool:
        """Whether all values train the same, because the arm sets the path itself."""
        return len({trials[0].id for trials in self.trials.values()}) == 1


def tuning_targets(study: Study) -> list[Target]:
    """Returns each arm, and each baseline arm at each combination of sizes; without a grid, the baselines alone."""
    minus, confirm = study.objective.minus, study.confirm
    names = sorted({arm for arm in (minus, confirm and confirm.against) if arm}) if study.search else []
    baselines = [_target(arm, sizes) for arm in names for sizes in strata(study) if sizes or arm == minus]
    if study.tune is None:
        return baselines
    return [*(_target(arm, {}) for arm in study.arms), *(target for target in baselines if target[1])]


def _target(arm: str, sizes: Mapping[str, str]) -> Target:
    return arm, tuple(sorted(sizes.items()))


class Tuning:
    """The first stage: all targets, in order."""

    def __init__(self, ledger: Ledger, planner: Planner, teachers: Teachers) -> None:
        self._ledger, self._planner = ledger, planner
        self._queue = OpenTrials(ledger, teachers)
        self._grids: dict[Target, _Grid] = {target: _Grid() for target in tuning_targets(ledger.study)}
        self._targets: dict[str, list[Target]] = {}  # trial -> the targets that it belongs to
        tune = ledger.study.tune
        for target, grid in self._grids.items():
            self._plan(target, sorted(next(iter(tune.grid.values()))) if tune else [None], range(1))
            if tune and tune.seeds > 1 and not grid.is_one_trial:
                self._race_on(target, grid.trials)
        for target in self._grids:
            self._tune_lr(target)

    def next(self) -> PlannedTrial | None:
        return self._queue.first()

    def update(self, trial: str) -> None:
        """Takes note that a trial no longer runs."""
        self._queue.wake(trial)
        for target in self._targets.get(trial, ()):
            self._tune_lr(target)

    @property
    def is_complete(self) -> bool:
        return all(grid.tuned is not None for grid in self._grids.values())

    def tuned(self, arm: str, sizes: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """Returns the tuned value of an arm; {} where it is not tuned, None while the value is not known."""
        grid = self._grids.get(_target(arm, sizes or {}))
        return {} if grid is None else grid.tuned

    def best_value(self, arm: str, sizes: Mapping[str, str], what: Measured | None = None) -> float | None:
        """Returns what the best trial of a tuned arm at these sizes and the seed of the search measured, by default the
        objective by which it is the best.

        None where this is not known or every trial failed.
        """
        grid = self._grids.get(_target(arm, sizes))
        if grid is None or grid.tuned is None:
            return None
        first = [trials[0].id for trials in grid.trials.values()]
        scores = {trial: v for trial in first if (v := self._ledger.value(trial)) is not None}
        sign = self._ledger.study.objective.sign
        best = min(scores, key=lambda trial: sign * scores[trial], default=None)
        return None if best is None else self._ledger.value(best, what)

    def _plan(self, target: Target, values: Iterable[float | None], seeds: Iterable[int]) -> None:
        (arm, sizes), tune, grid = target, self._ledger.study.tune, self._grids[target]
        index = list(self._grids).index(target)
        for seed in seeds:
            for value in [*values]:
                tuned = {path: value for path in (tune.grid if tune else ())}
                planned = self._planner.tuning(arm, dict(sizes), tuned, seed=seed)
                self._queue.push(planned, index, sum(map(len, grid.trials.values())))
                grid.trials.setdefault(value, []).append(planned)
                self._targets.setdefault(planned.id, []).append(target)

    def _race_on(self, target: Target, values: Iterable[float | None]) -> None:
        grid = self._grids[target]
        self._plan(target, values, [grid.num_seeds])
        grid.num_seeds += 1

    def _tune_lr(self, target: Target) -> None:
        """Goes on with the race of a target whose trials are over: a further seed, a wider grid, or the choice."""
        grid, tune = self._grids[target], self._ledger.study.tune
        while grid.tuned is None and all(self._ledger.is_over(t.id) for trials in grid.trials.values() for t in trials):
            if tune is None:
                grid.tuned = {}
                return
            (path, first), *_ = tune.grid.items()
            scores = self._scores(grid)
            racing, best = contenders(scores), choose(scores, middle := first[len(first) // 2])
            if len(racing) > 1 and grid.num_seeds < tune.seeds and not grid.is_one_trial:
                self._race_on(target, racing)
                continue
            values = sorted(scores)
            is_inside = best is None or values[0] < best < values[-1]
            if is_inside or grid.num_extensions == tune.extend or grid.is_one_trial:
                # where all failed, the middle: the arm's own trials show the failure
                grid.tuned = {path: middle if best is None else best}
                return
            assert best is not None
            factor = values[-1] / values[-2]
            grid.num_extensions += 1
            self._plan(target, [best * factor if best == values[-1] else best / factor], range(grid.num_seeds))

    def _scores(self, grid: _Grid) -> dict[float, dict[int, float]]:
        """Returns the objective by value and seed, with the sign that makes lower better."""
        sign = self._ledger.study.objective.sign
        return {
            value: {t.seed: sign * score for t in trials if (score := self._ledger.value(t.id)) is not None}
            for value, trials in grid.trials.items()
            if value is not None
        }
