"""What runs in a slot: one trial after another, in the slot's process or on the group of workers that it keeps."""

from __future__ import annotations

import json
import time
from contextlib import closing
from functools import cache
from typing import Any, NoReturn

from ray import tune
from ray.exceptions import RayActorError

from orchestrator.cluster.ray_internals import function_trainable
from orchestrator.scheduling.objective import measured
from orchestrator.study.schema import Slot, Study
from trainables.config.session import SingleProcess
from trainables.runtime.outcome import Outcome
from trainables.runtime.preflight import Expected, fault
from trainables.runtime.trial_attempt import Job, run
from trainables.training.stop_signals import StopReason, listen

GROUPS = "groups"  # below a study's folder: what Ray Train writes about groups
DISABLED_SECONDS = 1.0  # between two reports of a disabled slot


class _TuneSession(SingleProcess):
    """Reports a trial's records to Tune. A stop by the scheduler surfaces as SystemExit inside `report`."""

    def __init__(self, study: Study | None) -> None:
        self.study = study  # of a trial that may be stopped early

    def report(self, records: list[dict[str, Any]]) -> None:
        metrics: dict[str, Any] = {"records": json.dumps(records)}
        if self.study is not None:
            rows = [r for r in records if r["phase"] == self.study.objective.phase]
            last = max((r["progress"] for r in rows), default=1.0)
            now = [{**r, "progress": 1.0} for r in rows if r["progress"] == last]
            value = measured(self.study, self.study.objective, now, {})
            if value is not None and last < 1:  # a trial at its end is not stopped
                metrics |= {"percent": round(100 * last), "objective": value}
        tune.report(metrics)


def run_in_slot(config: dict[str, Any]) -> None:
    """Runs one trial."""
    session = _TuneSession(Study.model_validate_json(config["study"]) if config["study"] else None)
    slot = Slot.model_validate_json(config["slot"])
    job = Job(**json.loads(config["job"]))
    if slot.workers == 1:
        if (why := own_fault(config["expected"])) is not None:
            _disable_slot(why)
        tune.report({"records": "[]", "begun": True})
        outcome = run(job, session)
        if outcome.is_suspended and outcome.reason == StopReason.TERMINATED:  # another process resumes the trial
            why = f"trial {job.trial}: this process was told to end (SIGTERM); its checkpoint is written"
            raise RayActorError(error_msg=why, preempted=True)  # which Tune does not count towards its retries
        _report_end(outcome)
        return
    from trainables.runtime.worker_group import group

    tune.report({"records": "[]"})  # does not return where the trial resumed elsewhere when this slot was lost
    expected = Expected(**json.loads(config["expected"]))
    workers = group(
        slot.workers, slot.cpus, slot.gpus, folder=f"{job.storage}/{job.folder}/{GROUPS}", expected=expected
    )
    with closing(workers.run(job)) as messages:  # a stop by the scheduler leaves the block, and thereby stops all ranks
        for message in messages:
            if "end" in message:
                _report_end(Outcome.from_json(message["end"]))
            elif "fault" in message:
                _disable_slot(message["fault"])
            elif "begun" in message:
                tune.report({"records": "[]", "begun": True})
            else:
                session.report(json.loads(message["records"]))


@cache
def own_fault(expected: str) -> str | None:
    """Returns what keeps this process from running trials; checked once."""
    return fault(Expected(**json.loads(expected)))


def _disable_slot(why: str) -> NoReturn:
    """Keeps the slot occupied until Tune stops this trial, which it does inside `report`.

    Tune cannot avoid a machine: a slot that is given back is offered the next trial.
    """
    while True:
        tune.report({"records": "[]", "fault": why})
        time.sleep(DISABLED_SECONDS)


def _report_end(outcome: Outcome) -> None:
    tune.report({"records": "[]", "end": outcome.to_json()})


class SlotProcess(function_trainable(run_in_slot)):  # type: ignore[misc]
    """The process of a slot; what it keeps between trials ends with it."""

    def setup(self, config: dict[str, Any]) -> None:
        super().setup(config)
        listen()

    def cleanup(self) -> None:
        try:
            super().cleanup()
        finally:
            if (
                Slot.model_validate_json(self.config["slot"]).workers > 1
            ):  # else ray.train would be imported for nothing
                from trainables.runtime.worker_group import close

                close()
