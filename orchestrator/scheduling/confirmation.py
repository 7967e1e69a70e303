"""The confirmation of a search's winner: on fresh seeds, against the baseline at equal steps, then at equal cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from orchestrator.analysis.costs import DEARER
from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.open_trials import OpenTrials
from orchestrator.scheduling.trials import PlannedTrial, Planner
from orchestrator.scheduling.tuning import Tuning
from trainables.config.phase_run import PhaseRun
from trainables.runtime.outcome import Status


class ConfirmStage:
    """Plans the winner and its rivals in pairs; once their costs are known, the rival that costs as much as the winner."""

    def __init__(self, ledger: Ledger, planner: Planner, tuning: Tuning, queue: OpenTrials) -> None:
        self._ledger, self._planner, self._tuning, self._queue = ledger, planner, tuning, queue
        self._winner: str | None = None  # that is being confirmed
        self._runs: list[list[PlannedTrial]] = []  # by seed: the winner and its rivals at equal steps
        self._is_cost_known = False

    @property
    def num_unplanned(self) -> int:
        """Trials that may follow and cannot be named yet."""
        confirm = self._ledger.study.confirm
        if confirm is None or self._is_cost_known:
            return 0
        if self._winner is not None:
            return confirm.seeds
        return confirm.seeds * (4 if self._takes_over else 3)

    @cached_property
    def _takes_over(self) -> bool:
        study = self._ledger.study
        return bool(study.confirm and study.taken_over(study.confirm.against))

    def plan(self, winner: str, params: Mapping[str, Any]) -> None:
        """Plans the trials at equal steps, unless a winner is being confirmed."""
        confirm = self._ledger.study.confirm
        if confirm is None or self._winner is not None:
            return
        tuned = self._tuning.tuned(confirm.against, self._ledger.study.sizes_of(params))
        if tuned is None:
            return
        self._winner, self._runs = winner, self._planner.confirmation(winner, params, tuned)
        for seed, runs in enumerate(self._runs):
            for index, planned in enumerate(runs):
                self._queue.push(planned, 1, seed, index)

    def update(self) -> None:
        """Plans the trials at equal cost once all others are over: of the rival that is better on dev."""
        if (
            self._winner is None
            or self._is_cost_known
            or not all(self._ledger.is_over(t.id) for r in self._runs for t in r)
        ):
            return
        self._is_cost_known = True
        winner, *rivals = zip(*self._runs, strict=True)
        best = min(rivals, key=self._score)
        (w_before, w_own), (before, own) = self._flops(winner), self._flops(best)
        if own > 0 and w_before + w_own > DEARER * (before + own):
            for seed, planned in enumerate(best):
                longer = self._planner.at_cost(planned, self._winner, (w_before + w_own - before) / own)
                self._queue.push(longer, 2, seed)

    def _score(self, trials: Sequence[PlannedTrial]) -> float:
        """Returns the mean objective on dev, where lower is better."""
        scores = [score for t in trials if (score := self._ledger.value(t.id)) is not None]
        return self._ledger.study.objective.sign * math.fsum(scores) / len(scores) if scores else math.inf

    def _flops(self, trials: Sequence[PlannedTrial]) -> tuple[float, float]:
        """Returns the mean FLOPs of the phases before that of the objective, and of this phase; 0 where no trial ended."""
        own, spent = self._ledger.study.objective.phase, list[tuple[float, float]]()
        for planned in trials:
            row, needed = self._ledger.rows[planned.id], planned.spec.upto(own).phases
            if row["status"] == Status.ENDED:
                phases = {PhaseRun.parse(name): float(done["flops"]) for name, done in row["phases"].items()}
                here = math.fsum(flops for run, flops in phases.items() if run.phase == own)
                spent.append((math.fsum(flops for run, flops in phases.items() if run.phase in needed) - here, here))
        means = [math.fsum(part) / len(spent) for part in zip(*spent, strict=True)] or [0.0, 0.0]
        return means[0], means[1]
