"""The searched points, the audit of early stopping, and the confirmation of the best point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.analysis.statistics import Chance
from orchestrator.scheduling import trial_files
from orchestrator.scheduling.confirmation import ConfirmStage
from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.objective import Scores
from orchestrator.scheduling.open_trials import OpenTrials, Teachers
from orchestrator.scheduling.optuna_sampler import Sampler
from orchestrator.scheduling.trials import PlannedTrial, Planner, strata
from orchestrator.scheduling.tuning import Tuning
from orchestrator.study.axes import Choice, FloatRange, IntRange
from orchestrator.study.errors import StudyError
from orchestrator.study.objectives import Objective
from orchestrator.study.schema import Search, Study
from trainables.config.value import random_stream
from trainables.runtime.outcome import Status
from trainables.training.stop_signals import StopReason

MIN_AUDITED, AUDITED_SHARE = 3, 0.1  # of the points stopped early, run to their end to see whether stopping was right


@dataclass(frozen=True)
class Point:
    number: int
    params: Mapping[str, Any]
    trial: PlannedTrial

    @property
    def name(self) -> str:
        return name_of(self.number)


def name_of(number: int) -> str:
    return f"p{number:03d}"


def is_in_space(study: Study, params: Mapping[str, Any]) -> bool:
    """Returns whether the study can still ask for a point."""
    seen: dict[str, Any] = {}
    for name, axis in study.vary.items():
        if not study.is_active(name, seen):
            continue
        if name not in params:
            return False
        value = params[name]
        match axis:
            case Choice():
                inside = value in axis.choice
            case FloatRange():
                inside = isinstance(value, int | float) and axis.float_[0] <= value <= axis.float_[1]
            case IntRange():
                inside = isinstance(value, int) and value in range(axis.int_[0], axis.int_[1] + 1, axis.step)
        if not inside:
            return False
        seen[name] = value
    return not study.is_excluded(seen)


class SearchStage:
    """The last stage. Starts once the baselines are known that scores are relative to."""

    def __init__(self, ledger: Ledger, planner: Planner, teachers: Teachers, tuning: Tuning) -> None:
        self._ledger, self._planner, self._tuning = ledger, planner, tuning
        self._queue, self._sampler = OpenTrials(ledger, teachers), Sampler(ledger.study)
        self._points: dict[int, Point] = {}
        self._by_trial: dict[str, Point] = {}
        self._unsettled: set[int] = set()  # points that are over, of which neither sampler nor winner takes account yet
        self._asked: set[int] = set()  # points that the sampler knows
        self._reported: set[int] = set()  # points whose outcome the sampler knows
        self._open: set[str] = set()  # trials of points without an outcome
        self._best: tuple[float, int] | None = None  # signed score and number
        self._is_exhausted = False  # the space holds no further point
        self._is_audited = False
        self._confirm = ConfirmStage(ledger, planner, tuning, self._queue)
        self._obsolete: list[str] = []  # trials whose checkpoints are to be deleted
        self._next_number = 0
        self._numbers = self._take_up_points()
        self._advance()

    # ------------------------------------------------------------------------------------------------------ questions

    @property
    def _search(self) -> Search:
        search = self._ledger.study.search
        assert search is not None
        return search

    @cached_property
    def _baselines(self) -> list[tuple[str, dict[str, str]]]:
        minus = self._ledger.study.objective.minus
        return [] if minus is None else [(minus, sizes) for sizes in [*strata(self._ledger.study)] or [{}]]

    @property
    def has_baselines(self) -> bool:
        return all(self._tuning.tuned(*baseline) is not None for baseline in self._baselines)

    @property
    def num_unasked(self) -> int:
        return 0 if self._is_exhausted else max(0, self._search.points - len(self._points))

    @property
    def num_unplanned(self) -> int:
        """Trials that will follow and cannot be named yet."""
        return self.num_unasked + self._confirm.num_unplanned

    @property
    def nothing_follows(self) -> bool:
        """Whether every trial of this stage is planned. False where this depends on outcomes."""
        return self._search.stop_early is None and self.num_unplanned == 0

    @property
    def points(self) -> list[Point]:
        """The points so far, by number."""
        return [self._points[number] for number in sorted(self._points)]

    def score(self, point: Point) -> float | None:
        """Returns the first objective, as the search sees it."""
        scores = self.scores(point)
        return None if scores is None else scores.values[0]

    def scores(self, point: Point) -> Scores | None:
        """Returns what the search sees: each objective, minus that of the tuned baseline of the same sizes if the study
        says so."""
        study = self._ledger.study
        values = [self._objective(point, objective) for objective in study.objectives]
        bounded = [self._ledger.value(point.trial.id, bound) for bound in study.constraints]
        known, within = ([v for v in found if v is not None] for found in (values, bounded))
        if len(known) < len(values) or len(within) < len(bounded):
            return None
        excess = (bound.excess(value) for bound, value in zip(study.constraints, within, strict=True))
        return Scores(tuple(known), tuple(excess))

    def _objective(self, point: Point, objective: Objective) -> float | None:
        value = self._ledger.value(point.trial.id, objective)
        if value is None or objective.minus is None:
            return value
        baseline = self._tuning.best_value(objective.minus, self._ledger.study.sizes_of(point.params), objective)
        return None if baseline is None else value - baseline

    def winner(self) -> Point | None:
        """Returns the best on the first objective of the points that ran to their end within the constraints."""
        return None if self._best is None else self._points[self._best[1]]

    def importance(self, objective: int = 0) -> tuple[str, dict[str, float]] | None:
        return self._sampler.importance(objective)

    def importance_by_chance(self) -> Chance:
        return self._sampler.importance_by_chance()

    # --------------------------------------------------------------------------------------------------------- events

    def next(self) -> PlannedTrial | None:
        """Returns the next trial to start. Asks the sampler for a new point where every known one runs or waits."""
        while self.has_baselines:
            first = self._queue.first()
            if first is not None or not self._ask_point():
                return first
        return None

    def update(self, trial: str) -> None:
        """Takes note that a trial no longer runs."""
        self._queue.wake(trial)
        point = self._by_trial.get(trial)
        if point is not None and self._ledger.is_over(trial):
            self._open.discard(trial)
            self._unsettled.add(point.number)
        self._advance()
        for obsolete in self._obsolete:
            trial_files.forget_checkpoints(self._ledger.home, obsolete)
        self._obsolete.clear()

    def _take_up_points(self) -> set[int]:
        """Takes up the points of earlier starts that the study still asks for. Returns the numbers of all."""
        rows = self._ledger.rows
        begun = {trial: row for trial, row in rows.items() if row["kind"] == "trial" and row["arm"] is None}
        numbers = {trial: int(row["point"][1:]) for trial, row in begun.items()}
        for trial in sorted(numbers, key=numbers.__getitem__):
            if not is_in_space(self._ledger.study, begun[trial]["params"]):
                continue
            params = {n: begun[trial]["params"][n] for n in self._ledger.study.vary if n in begun[trial]["params"]}
            try:
                point = Point(numbers[trial], params, self._planner.point(name_of(numbers[trial]), params))
            except StudyError:
                continue
            if point.trial.id == trial:
                self._add(point)
                if not self._ledger.is_over(trial):
                    self._sampler.add(point.number, params, Status.RUNNING, None)
                    self._asked.add(point.number)
        return set(numbers.values())

    def _add(self, point: Point) -> None:
        self._points[point.number] = self._by_trial[point.trial.id] = point
        self._queue.push(point.trial, 0, point.number)
        if self._ledger.is_over(point.trial.id):
            self._unsettled.add(point.number)
        else:
            self._open.add(point.trial.id)

    def _ask_point(self) -> bool:
        """Asks the sampler for a point; whether the stage may now have a trial to start."""
        num_running = sum(trial in self._open for trial in self._ledger.running)
        if self.num_unasked == 0 or len(self._open) - num_running > len(self._ledger.running):
            return False  # points that wait for their teachers: what is asked meanwhile is asked without their results
        while self._next_number in self._numbers:
            self._next_number += 1
        number, planned = self._next_number, dict[str, PlannedTrial]()

        def is_new(params: Mapping[str, Any]) -> bool:
            try:
                planned["last"] = self._planner.point(name_of(number), params)
            except StudyError:
                return False
            return planned["last"].id not in self._by_trial

        params = self._sampler.ask(number, is_new)
        if params is None:
            self._is_exhausted = True
        else:
            self._numbers.add(number)
            self._asked.add(number)
            self._add(Point(number, params, planned["last"]))
        self._advance()
        return True

    def _advance(self) -> None:
        """Takes account of points that are over; once all are, plans the audit and then the confirmation."""
        if not self.has_baselines:
            return
        for number in sorted(self._unsettled):
            self._settle(self._points[number])
        self._unsettled.clear()
        if self.num_unasked or self._open:
            return
        if not self._is_audited:
            self._audit_stopped()
        if not self._open and (winner := self.winner()) is not None:
            self._confirm.plan(winner.name, winner.params)
            self._confirm.update()

    def _settle(self, point: Point) -> None:
        """Tells the sampler how a point ended, once, and compares the point with the best."""
        scores, status = self.scores(point), Status(self._ledger.rows[point.trial.id]["status"])
        if point.number not in self._reported:
            self._reported.add(point.number)
            state = Status.FAILED if scores is None and status == Status.ENDED else status
            values, excess = scores or (None, ())
            if point.number in self._asked:
                self._sampler.tell(point.number, state, values, excess)
            else:
                self._sampler.add(point.number, point.params, state, values=values, excess=excess)
        if scores is not None and scores.is_feasible:
            signed = (self._ledger.study.objective.sign * scores.values[0], point.number)
            self._best = signed if self._best is None else min(self._best, signed)

    def _audit_stopped(self) -> None:
        """Lets some of the points that were stopped early, drawn at random, run to their end."""
        self._is_audited, rows = True, self._ledger.rows
        stopped = {p.trial.id for p in self.points if _is_stopped_early(rows[p.trial.id])}
        ever = [p for p in self.points if p.trial.id in stopped or rows[p.trial.id].get("spared")]
        wanted = max(MIN_AUDITED, math.ceil(AUDITED_SHARE * len(ever)))
        drawn = sorted(ever, key=lambda p: random_stream(self._search.seed, "spared", p.number))[:wanted]
        for point in drawn:
            if point.trial.id in stopped:
                self._ledger.reopen(point.trial.id)
                self._open.add(point.trial.id)
                self._queue.wake(point.trial.id)
        self._obsolete = list({p.trial.id for p in ever} - {p.trial.id for p in drawn})


def _is_stopped_early(row: Mapping[str, Any]) -> bool:
    return bool(row["status"] == Status.STOPPED and row["reason"] == StopReason.EARLY)
