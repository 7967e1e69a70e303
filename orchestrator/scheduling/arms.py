"""The arms at their reporting seeds, each once its tuned value is known; up to the first look, then as open claims need.

Seed by seed, and within a seed in an order drawn from the study's seed: what a machine does to the times of trials, or when
a sweep is cut short, falls on all arms alike.
"""

from __future__ import annotations

from orchestrator.analysis.tables import tables
from orchestrator.analysis.verdicts import judge_study
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
        self._planned: dict[str, list[PlannedTrial]] = {}  # by arm
        self._open = {arm for claim in ledger.study.claims.values() for arm in claim.arms}  # of claims to be decided
        self._plan()

    def next(self) -> PlannedTrial | None:
        return self._queue.first()

    def update(self, trial: str) -> None:
        """Takes note that a trial no longer runs."""
        self._queue.wake(trial)
        self._plan()

    def stand_ins(self) -> list[PlannedTrial]:
        """Returns trials without a tuned value, for the arms that are still being tuned: not planned, but as many."""
        return [trial for arm in self._untuned for trial in self._planner.untuned(arm)]

    @property
    def most_to_follow(self) -> int:
        """The most trials that open claims may ask for at later looks."""
        first, last = self._ledger.study.looks[0], self._ledger.study.num_seeds
        return sum(last - len(self._planned.get(arm, range(first))) for arm in self._open)

    def _plan(self) -> None:
        for arm in [*self._untuned]:
            if self._tuning.tuned(arm) is not None:
                self._untuned.remove(arm)
                self._add(arm, self._ledger.study.looks[0])
        while not self._untuned and self.most_to_follow and self._are_over():
            rows = [self._ledger.row(trial.id) for trials in self._planned.values() for trial in trials]
            made = tables(self._ledger.study.folder, rows, self._ledger.records)
            waiting = [(v.claim, v.look) for v in judge_study(self._ledger.study, made) if v.look and v.is_open]
            added = [self._add(arm, look.num_seeds) for claim, look in waiting for arm in claim.arms]
            # where nothing is added, arms have trials in common (by --set), and no look can judge them
            self._open = {arm for claim, _ in waiting for arm in claim.arms} if any(added) else set()

    def _are_over(self) -> bool:
        return all(self._ledger.is_over(trial.id) for trials in self._planned.values() for trial in trials)

    def _add(self, arm: str, num_seeds: int) -> list[PlannedTrial]:
        """Plans an arm's trials up to so many seeds; returns those that are new."""
        tuned, begun = self._tuning.tuned(arm) or {}, self._planned.setdefault(arm, [])
        is_as_known = not begun and not tuned
        new = self._planner.untuned(arm) if is_as_known else self._planner.arm(arm, tuned, range(len(begun), num_seeds))
        for trial in new:
            self._queue.push(trial, trial.seed, self._drawn(arm, trial.seed))
        begun += new
        return new

    def _drawn(self, arm: str, seed: int) -> int:
        search = self._ledger.study.search
        return random_stream(search.seed if search else 0, "order of arms", str(seed), arm)
