"""The open trials of a stage in the order in which they are to run, and the teachers that must run before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.trials import PlannedTrial, Planner
from orchestrator.study.axes import Choice
from trainables.config.phase_run import PhaseRun
from trainables.storage.phase_store import PhaseStore


@dataclass(frozen=True)
class WaitsFor:
    """A trial cannot start: this running trial is training a phase that both need."""

    trial: str


@dataclass
class Teachers:
    """Decides which phases that several trials need are trained first, by a trial of their own."""

    ledger: Ledger
    planner: Planner

    def __post_init__(self) -> None:
        self._store = PhaseStore(self.ledger.storage)

    def before(self, planned: PlannedTrial) -> PlannedTrial | WaitsFor:
        """Returns the trial to start now so that `planned` can run: `planned` itself or a teacher; or the trial that
        both wait for."""
        own = self._own(planned)
        for phase_run in planned.upstream:
            key = planned.keys[phase_run]
            if self._store.find(key) is not None:
                continue
            # as a teacher, or in a trial that trains the phase for itself
            trainer = next((other.id for other in self.ledger.running.values() if key in other.keys.values()), None)
            if trainer is not None:
                return WaitsFor(trainer)
            if phase_run in own:
                continue
            teacher = self.planner.teacher(planned, phase_run)
            if not self.ledger.is_over(teacher.id):  # where a teacher failed, the trial trains the phase itself
                return self.before(teacher)
        return planned

    def _own(self, planned: PlannedTrial) -> Collection[str]:
        """Returns phase runs that a trial trains for itself: reached by a continuous parameter, or needed by no other
        trial."""
        if not planned.is_point:
            return {name for name in planned.upstream if self._num_uses(planned.keys[name]) < 2}
        vary = self.ledger.study.vary
        ranges = [name.split(".") for name in planned.params if not isinstance(vary.get(name), Choice)]
        own = set()
        for name in planned.upstream:
            needs = planned.spec.upto(PhaseRun.parse(name).phase)
            parts: dict[str, Collection[str]] = {"phases": needs.phases, "models": needs.models}
            if any(path[0] in parts and path[1] in parts[path[0]] for path in ranges):
                own.add(name)
        return own

    def _num_uses(self, key: str) -> int:
        return max(self._expected_uses[key], self.ledger.uses[key])

    @cached_property
    def _expected_uses(self) -> Counter[str]:
        """Trials of all arms by phase key, as far as they are known before tuning."""
        arms = [planned for arm in self.ledger.study.arms for planned in self.planner.untuned(arm)]
        return Counter(key for planned in arms for key in set(planned.keys.values()))


class OpenTrials:
    """A priority queue: `first` costs the same however many trials are open, over or waiting.

    Trials that run leave the queue and trials that wait lie beside it; `wake` puts them back when the running trial
    concerned has ended, was suspended or was requeued.
    """

    def __init__(self, ledger: Ledger, teachers: Teachers) -> None:
        self._ledger, self._teachers = ledger, teachers
        self._trials: dict[str, tuple[tuple[int, ...], PlannedTrial]] = {}  # id -> position, trial
        self._heap: list[tuple[tuple[int, ...], str]] = []
        self._waiting: dict[str, list[str]] = {}  # running trial -> those that wait for it

    def push(self, planned: PlannedTrial, *position: int) -> None:
        """Plans a trial. Of two with one id the first keeps its position."""
        self._ledger.plan(planned)
        if planned.id not in self._trials:
            self._trials[planned.id] = (position, planned)
            self._put(planned.id)

    def wake(self, trial: str) -> None:
        for waiting in (*self._waiting.pop(trial, ()), trial):
            if waiting in self._trials:
                self._put(waiting)

    def first(self) -> PlannedTrial | None:
        """Returns the trial to start now: the first that can run, or the teacher that it needs. None where all wait or
        run."""
        while self._heap:
            trial = self._heap[0][1]
            if not self._ledger.is_over(trial) and trial not in self._ledger.running:
                start = self._teachers.before(self._trials[trial][1])
                if not isinstance(start, WaitsFor):
                    return start
                self._waiting.setdefault(start.trial, []).append(trial)
            heappop(self._heap)
        return None

    def _put(self, trial: str) -> None:
        if not self._ledger.is_over(trial):
            heappush(self._heap, (self._trials[trial][0], trial))
