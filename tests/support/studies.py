"""Runs the trials of a study one after another in this process, without Ray."""

from __future__ import annotations

from orchestrator.scheduling.scheduler import Scheduler
from tests.support.trials import Listener
from trainables.runtime.trial_attempt import Job, run


def run_trials(scheduler: Scheduler) -> None:
    """Runs every trial that the scheduler names, to its end."""
    while (planned := scheduler.next()) is not None:
        scheduler.start(planned, 1)
        job = Job(
            trial=planned.id,
            spec=planned.spec.model_dump_json(),
            fingerprints=planned.fingerprints,
            storage=scheduler.storage.uri,
            folder=scheduler.study.folder,
            threads=1,
            device="cpu",
            checkpoint_at_reports=False,
            provenance={},
        )
        scheduler.end(planned.id, run(job, Listener()), 2)
