"""What runs next: tuning, then arms, then searched points, their audit and the confirmation, each after its teachers.

Bookkeeping over plain files: no Ray, no clock, no tracker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.analysis.claim_history import ClaimHistory, count_results, keep_history, read_history
from orchestrator.scheduling.arms import Arms
from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.open_trials import Teachers
from orchestrator.scheduling.search_stage import SearchStage
from orchestrator.scheduling.trials import Fingerprints, PlannedTrial, Planner
from orchestrator.scheduling.tuning import Tuning
from orchestrator.study.schema import Study
from trainables.runtime.outcome import Outcome
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore


@dataclass(frozen=True)
class _Stages:
    tuning: Tuning
    arms: Arms
    search: SearchStage | None


class Scheduler:
    """The stages of a study over one ledger. A trial is started by `start`, and leaves by `end`, `suspend` or `requeue`.

    The ledger is read at once. The stages are planned when they are first used, which needs the fingerprints of all data
    and pretrained models.
    """

    def __init__(
        self, study: Study, fingerprints: Fingerprints, storage: Storage, *, retry_failed: bool = False
    ) -> None:
        self.study, self.storage = study, storage
        self.ledger = Ledger(study, storage, retry_failed)
        self._planner = Planner(study, fingerprints)
        self.closed: str | None = None  # why nothing new is started: a limit, an interrupt, a full disk
        self.is_broken = False  # closed by a fault that a person must mend
        self._is_history_kept = False
        self.disabled_reasons: list[str] = []  # why each disabled slot is disabled

    @cached_property
    def _stages(self) -> _Stages:
        teachers = Teachers(self.ledger, self._planner)
        tuning = Tuning(self.ledger, self._planner, teachers)
        arms = Arms(self.ledger, self._planner, teachers, tuning)
        search = SearchStage(self.ledger, self._planner, teachers, tuning) if self.study.search else None
        return _Stages(tuning, arms, search)

    @property
    def search(self) -> SearchStage | None:
        return self._stages.search

    def tuned(self, arm: str, sizes: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """Returns the tuned value of an arm; {} where it is not tuned, None while the value is not known."""
        return self._stages.tuning.tuned(arm, sizes)

    # ------------------------------------------------------------------------------------------------------ questions

    def known(self) -> list[PlannedTrial]:
        """Returns the trials that can be named now, with stand-ins for those of arms that are still being tuned."""
        later, planned = self._stages.arms.stand_ins(), self.ledger.planned
        return [*planned.values(), *(trial for trial in later if trial.id not in planned)]

    def num_left(self) -> int:
        """Counts trials still to come, as far as is known, without teachers and later looks."""
        ledger = self.ledger
        later = sum(t.id not in ledger.planned and not ledger.is_over(t.id) for t in self._stages.arms.stand_ins())
        return len(ledger.unfinished) + later + (self.search.num_unplanned if self.search else 0)

    def claim_history(self) -> ClaimHistory:
        """Returns the history of the claims, with those of the study now.

        Where it begins, trials count whose phases are stored already: another folder may have had their results.
        """
        history, ledger = read_history(self.ledger.home), self.ledger
        num_results = count_results(ledger.rows.values())
        if not history.entries and self.study.claims:
            find, arms = (
                PhaseStore(self.storage).find,
                [t for t in ledger.planned.values() if t.kind == "trial" and t.arm],
            )
            new = (trial for trial in arms if trial.id not in ledger.rows)
            num_results += sum(all(find(key) is not None for key in trial.keys.values()) for trial in new)
        return history.with_now(self.study, num_results)

    @property
    def most_at_later_looks(self) -> int:
        """The most trials that later looks may ask for, beyond `num_left`."""
        return self._stages.arms.most_to_follow

    def is_complete(self) -> bool:
        """Returns whether every trial is over. A space that is used up shows only once `next` has asked for a point."""
        return not self.ledger.unfinished and (self.search is None or self.search.num_unasked == 0)

    def nothing_follows(self) -> bool:
        """Returns whether all that will ever run is running, so that a slot that is idle now stays idle. False where
        unknown."""
        if (
            self.most_at_later_looks
            or not self._stages.tuning.is_complete
            or (self.search is not None and not self.search.nothing_follows)
        ):
            return False
        return len(self.ledger.unfinished) == sum(trial in self.ledger.unfinished for trial in self.ledger.running)

    # --------------------------------------------------------------------------------------------------------- events

    def next(self) -> PlannedTrial | None:
        """Returns the next trial to start, the same until it is started. None: nothing now (something runs), or nothing
        at all.

        A search may plan a new point to answer.
        """
        if self.closed:
            return None
        stages = self._stages
        planned = stages.tuning.next() or stages.arms.next()
        return planned or (stages.search.next() if stages.search else None)

    def start(self, planned: PlannedTrial, now: int) -> None:
        """Starts a trial; before the first one, keeps what the study claims."""
        if not self._is_history_kept:
            keep_history(self.ledger.home, self.claim_history())
            self._is_history_kept = True
        self.ledger.start(planned, now)

    def end(self, trial: str, outcome: Outcome, now: int) -> None:
        self.ledger.end(trial, outcome, now)
        self.update(trial)

    def suspend(self, trial: str) -> None:
        self.ledger.suspend(trial)
        self.update(trial)

    def requeue(self, trial: str) -> None:
        self.ledger.requeue(trial)
        self.update(trial)

    def close(self, why: str, *, is_broken: bool = False) -> None:
        """Starts nothing new from now on. The first reason counts."""
        self.closed = self.closed or why
        self.is_broken = self.is_broken or is_broken

    def update(self, trial: str) -> None:
        """Lets every stage take note that a trial no longer runs."""
        self._stages.tuning.update(trial)
        self._stages.arms.update(trial)
        if self.search is not None:
            self.search.update(trial)
