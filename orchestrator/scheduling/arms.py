"""The arms at their reporting seeds, each once its tuned value is known.

Seed by seed, and within a seed in an order drawn from the study's seed: what a machine does to the times of trials, or when
a sweep is cut short, falls on all arms alike.
"""

from __future__ import annotations

from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.open_trials import OpenTrials, Teachers
from orchestrator.scheduling.trials import PlannedTrial, Planner
from orchestrator.scheduling.tuning import Tuning
from trainables.config.value import random_stream


class Arms:
    """The second stage."""

    def __init__(self, ledger: Ledger, planner: Planner, teachers: Teachers, tuning: Tuning) -> None:
        self._ledger, self._planner, self._tuning = ledger, planner, tuning
        self._queue = OpenTrials(ledger, teachers)
        self._untuned = list(ledger.study.arms)
        self._plan()

    def next(self) -> PlannedTrial | None:
        return self._queue.first()

    def update(self, trial: str) -> None:
        """Takes note that a trial no longer runs."""
        self._queue.wake(trial)
        self._plan()

    def stand_ins(self) -> list[PlannedTrial]:
        """Trials without a tuned value, for the arms that are still being tuned: not planned, but as many."""
        return [trial for arm in self._untuned for trial in self._planner.untuned(arm)]

    def _plan(self) -> None:
        for arm in [*self._untuned]:
            tuned = self._tuning.tuned(arm)
            if tuned is not None:
                self._untuned.remove(arm)
                for trial in self._planner.arm(arm, tuned) if tuned else self._planner.untuned(arm):
                    self._queue.push(trial, trial.seed, self._drawn(arm, trial.seed))

    def _drawn(self, arm: str, seed: int) -> int:
        search = self._ledger.study.search
        return random_stream(search.seed if search else 0, "order of arms", str(seed), arm)
