"""The tuning of each arm: the trials of a grid, and the value that is best on dev."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.open_trials import OpenTrials, Teachers
from orchestrator.scheduling.trials import PlannedTrial, Planner, strata
from orchestrator.study.objectives import Measured
from orchestrator.study.schema import Study

Target = tuple[str, tuple[tuple[str, str], ...]]  # an arm, and the sizes at which it is tuned


@dataclass
class _Grid:
    """The trials of one target by value (None: a baseline without a grid) and, once known, the tuned value."""

    trials: dict[float | None, PlannedTrial] = field(default_factory=dict)
    num_extensions: int = 0
    tuned: dict[str, Any] | None = None


def tuning_targets(study: Study) -> list[Target]:
    """Each arm, and each baseline arm at each combination of sizes; without a grid, the baselines alone."""
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
        for target in self._grids:
            tune = ledger.study.tune
            self._plan(target, sorted(next(iter(tune.grid.values()))) if tune else [None])
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
        """The tuned value of an arm; {} where it is not tuned, None while the value is not known."""
        grid = self._grids.get(_target(arm, sizes or {}))
        return {} if grid is None else grid.tuned

    def best_value(self, arm: str, sizes: Mapping[str, str], what: Measured | None = None) -> float | None:
        """What the best trial of a tuned arm at these sizes measured, by default the objective by which it is the best.

        None where this is not known or every trial failed.
        """
        grid = self._grids.get(_target(arm, sizes))
        if grid is None or grid.tuned is None:
            return None
        scores = {t.id: v for t in grid.trials.values() if (v := self._ledger.value(t.id)) is not None}
        best = (min if self._ledger.study.objective.mode == "min" else max)(
            scores, key=scores.__getitem__, default=None
        )
        return None if best is None else self._ledger.value(best, what)

    def _plan(self, target: Target, values: list[float] | list[None]) -> None:
        (arm, sizes), tune = target, self._ledger.study.tune
        index = list(self._grids).index(target)
        for value in values:
            tuned = {path: value for path in (tune.grid if tune else ())}
            planned = self._planner.tuning(arm, dict(sizes), tuned)
            grid = self._grids[target]
            self._queue.push(planned, index, len(grid.trials))
            grid.trials[value] = planned
            self._targets.setdefault(planned.id, []).append(target)

    def _tune_lr(self, target: Target) -> None:
        """Chooses the value of a target whose trials are over, after extending a grid whose best value is at an edge."""
        grid, tune = self._grids[target], self._ledger.study.tune
        while grid.tuned is None and all(self._ledger.is_over(trial.id) for trial in grid.trials.values()):
            if tune is None:
                grid.tuned = {}
                return
            (path, first), *_ = tune.grid.items()
            trials = {value: trial for value, trial in grid.trials.items() if value is not None}
            values = sorted(trials)
            scores = {v: score for v in values if (score := self._ledger.value(trials[v].id)) is not None}
            sign = 1.0 if self._ledger.study.objective.mode == "min" else -1.0
            best = min(scores, key=lambda v: sign * scores[v], default=None)
            is_inside = best is None or values[0] < best < values[-1]
            # an arm that sets the path itself has one trial for all values
            if is_inside or grid.num_extensions == tune.extend or len({trial.id for trial in trials.values()}) == 1:
                # where all failed, the middle: the arm's own trials show the failure
                grid.tuned = {path: first[len(first) // 2] if best is None else best}
                return
            assert best is not None
            factor = values[-1] / values[-2]
            grid.num_extensions += 1
            self._plan(target, [best * factor if best == values[-1] else best / factor])
