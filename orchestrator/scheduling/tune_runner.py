"""Runs a study's trials in slots, by Ray Tune: reused processes, and ASHA where the study stops trials early.

Tune is made anew at each start and remembers nothing: what runs next comes from the scheduler, and what ended goes back to
it. What happens in a slot is in slot.py.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher

from orchestrator.cluster import ray_internals
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.slot import GROUPS, SlotProcess
from orchestrator.scheduling.trials import PlannedTrial
from orchestrator.study.errors import redact
from orchestrator.study.schema import Search, Slot
from trainables.runtime.outcome import STOPPED_EARLY, Outcome, lost
from trainables.runtime.preflight import MARKER, expect
from trainables.runtime.trial_attempt import Job
from trainables.storage.files import StorageError
from trainables.training.stop_signals import StopReason

RETRIES = 3  # of a trial whose process or node was lost; an announced loss (SIGTERM) is not counted
NODES_SECONDS = 10.0  # between two checks that a node is alive


class LeaveTune(BaseException):
    """Leaves Tune's loop at once. Not an Exception: for these Tune first waits for actors that may be gone."""


def run_trials(
    scheduler: Scheduler,
    num_slots: int,
    *,
    provenance: Mapping[str, Any],
    on_tick: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Runs until nothing is left to start and nothing runs. Raises KeyboardInterrupt where `on_tick` does."""
    ray_internals.set_slot_environment()
    study = scheduler.study
    scratch = tempfile.mkdtemp(prefix="codistill-tune-")
    source = TrialSource(scheduler, provenance, num_slots, say)
    try:
        source.write_expected()
        tune.Tuner(
            tune.with_resources(SlotProcess, _resources(study.slot)),
            tune_config=tune.TuneConfig(
                search_alg=source,
                scheduler=_early_stopping(study.search, study.objective.mode),
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=None,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                name="run",
                verbose=0,
                stop=source.is_unwanted,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[Watch(source, on_tick)],
            ),
        ).fit()
    except LeaveTune:
        source.requeue_waiting()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for name in (GROUPS, MARKER):
            with suppress(OSError):  # storage that cannot be written has been reported already
                scheduler.ledger.home.delete(name)


def _early_stopping(search: Search | None, mode: str) -> FIFOScheduler:
    if search is None or (asha := search.stop_early) is None:
        return FIFOScheduler()
    return _OnlyPoints(
        time_attr="percent",
        metric="objective",
        mode=mode,
        max_t=101,
        grace_period=round(100 * asha.first),
        reduction_factor=asha.reduction,
    )


def _device(slot: Slot) -> str:
    return "cuda" if slot.gpus else "cpu"


def _resources(slot: Slot) -> dict[str, float]:
    """Returns what Tune reserves for a slot; Ray Train reserves the workers of a group."""
    return {"cpu": slot.cpus, "gpu": slot.gpus} if slot.workers == 1 else {"memory": 1}


class TrialSource(Searcher):  # type: ignore[misc]
    """Gives Tune the next trial, and the scheduler its outcome. Tune's trials have ids of their own.

    A slot whose machine is unfit stays occupied to the end, by the Tune trial that reported the fault (Tune cannot avoid a
    machine); the trial that was to run there is requeued and starts in another slot.
    """

    def __init__(
        self, scheduler: Scheduler, provenance: Mapping[str, Any], num_slots: int, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.scheduler, self.provenance, self.num_slots, self.say = scheduler, provenance, num_slots, say
        self.expected = ""  # what each slot must find, as JSON
        self.active: dict[str, str] = {}  # Tune's id -> trial
        self.begun: set[str] = set()  # Tune's ids of trials in slots that were found fit
        self.disabled: set[str] = set()  # Tune's ids of trials that occupy a slot which is unfit
        self.is_finished = False

    def write_expected(self) -> None:
        """Writes what slots must find. Where that fails, nothing is started."""
        planned, study = self.scheduler.known(), self.scheduler.study
        try:
            expected = expect(
                self.scheduler.storage,
                study.folder,
                device=_device(study.slot),
                specs=[trial.spec for trial in planned],
                fingerprints=[trial.fingerprints for trial in planned],
            )
        except OSError as error:
            self._cannot_write(error)
        else:
            self.expected = json.dumps(asdict(expected))

    def suggest(self, trial_id: str) -> Any:
        if self.active and len(self.active) >= self.num_slots - len(self.disabled):
            return None
        try:
            planned = self.scheduler.next()
            if planned is None:  # a slot that no trial will need is released while others still run
                follows = self.active.keys() - self.begun or not self.scheduler.nothing_follows()
                self.is_finished = not self.active or not follows
                return Searcher.FINISHED if self.is_finished else None
            self.scheduler.start(planned, now())
        except OSError as error:
            self._cannot_write(error)
            self.is_finished = not self.active
            return Searcher.FINISHED if self.is_finished else None
        self.active[trial_id] = planned.id
        study = self.scheduler.study
        is_audited = planned.id in self.scheduler.ledger.reopened
        watched = bool(study.search and study.search.stop_early and planned.is_point and not is_audited)
        return {
            "job": json.dumps(asdict(self._job(planned, checkpoint_at_reports=watched))),
            "watched": watched,
            "study": study.model_dump_json() if watched else "",
            "slot": study.slot.model_dump_json(),
            "expected": self.expected,
        }

    def _job(self, planned: PlannedTrial, *, checkpoint_at_reports: bool) -> Job:
        study, limits = self.scheduler.study, self.scheduler.study.limits
        room = None
        if limits.checkpoint_gb is not None:  # points that were stopped early keep their checkpoints in the other half
            share = 0.5 if study.search and study.search.stop_early else 1.0
            room = int(share * limits.checkpoint_gb * 1e9 / self.num_slots)
        return Job(
            trial=planned.id,
            spec=planned.spec.model_dump_json(),
            fingerprints=dict(planned.fingerprints),
            storage=self.scheduler.storage.uri,
            folder=study.folder,
            threads=max(1, int(study.slot.cpus)),
            device=_device(study.slot),
            checkpoint_at_reports=checkpoint_at_reports,
            provenance=self.provenance,
            checkpoint_seconds=limits.checkpoint_seconds,
            checkpoint_bytes=room,
            hang_seconds=60 * limits.hang_minutes,
            device_share=study.slot.gpus or 1.0,
        )

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if trial_id not in self.active:
            return
        if "fault" in result:
            self._disable_slot(trial_id, redact(result["fault"]))
        elif "begun" not in result:
            self.scheduler.ledger.progress(self.active[trial_id], json.loads(result["records"]))
        elif self.scheduler.closed and trial_id not in self.begun:  # waited for a machine until nothing new is to start
            self.scheduler.requeue(self.active.pop(trial_id))
        else:
            self.begun.add(trial_id)

    def _disable_slot(self, trial_id: str, fault: str) -> None:
        self.disabled.add(trial_id)
        reasons = self.scheduler.disabled_reasons
        reasons.append(fault)
        self.say(f"slot disabled: {fault}")
        if self.is_finished or len(self.disabled) == self.num_slots:
            self.scheduler.close(f"no slot is usable: {'; '.join(sorted({*reasons}))}", is_broken=True)
        self.scheduler.requeue(self.active.pop(trial_id))

    def is_unwanted(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Returns whether Tune shall end one of its trials: a requeued one, unless it occupies an unfit slot while
        others run."""
        is_needed = "fault" in result and not (self.is_finished and not self.active)
        return trial_id not in self.active and not is_needed

    def only_waits(self) -> bool:
        """Returns whether nothing new is to start, and every active trial still waits for a machine."""
        return bool(self.scheduler.closed and self.active) and not self.active.keys() & self.begun

    def requeue_waiting(self) -> None:
        for trial_id in self.active.keys() - self.begun:
            self.scheduler.requeue(self.active.pop(trial_id))

    def requeue_given_up(self, trial_id: str) -> None:
        """Requeues a trial that Tune gave up because its slot did not leave the trial before."""
        trial = self.active.pop(trial_id)
        self.say(f"trial {trial}: its slot was lost before the trial began; the trial starts in another slot")
        self.scheduler.requeue(trial)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        self.disabled.discard(trial_id)
        trial = self.active.pop(trial_id, None)
        if trial is None:
            return
        if result is not None and "end" in result:
            outcome = Outcome.from_json(result["end"])
        elif error and not has_node():
            self.close_without_nodes()
            self.scheduler.suspend(trial)
            return
        elif error:
            outcome = lost(f"its process was lost {RETRIES + 1} times", RETRIES + 1)
        else:
            outcome = STOPPED_EARLY
        if outcome.is_suspended:
            if outcome.reason == StopReason.STORAGE:
                self._cannot_write(StorageError(errno.EIO, outcome.detail))
            self.scheduler.suspend(trial)
            return
        try:
            self.scheduler.end(trial, outcome, now())
        except OSError as fault:
            self._cannot_write(fault)
            self.scheduler.suspend(trial)

    def _cannot_write(self, error: OSError) -> None:
        """Starts nothing new; running trials may go on."""
        why = f"the storage cannot be written ({error.strerror or error}): nothing new was started"
        self.scheduler.close(why, is_broken=True)

    def close_without_nodes(self) -> None:
        self.scheduler.closed = None  # counts more than any earlier reason
        self.scheduler.close("Ray's last node is gone: nothing new was started", is_broken=True)

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles its searcher for snapshots that are never read
        return {}

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class Watch(tune.Callback):  # type: ignore[misc]
    """Calls the driver once a turn of Tune's loop, and leaves the loop where Tune would wait in vain."""

    def __init__(self, source: TrialSource, on_tick: Callable[[], None]) -> None:
        self.source, self.on_tick, self.checked = source, on_tick, time.monotonic()
        self.num_seen = 0  # of Tune's trials, which only become more
        self.trials: dict[str, Any] = {}  # by Tune's id, those that may be active

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (ours := self.source.active.get(trial.trial_id)) is not None:
            self.source.say(
                f"trial {ours}: its process or machine was lost; the trial resumes from its last checkpoint in another slot"
            )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials |= {trial.trial_id: trial for trial in trials[self.num_seen :]}
        self.num_seen = len(trials)
        self.trials = {trial_id: self.trials[trial_id] for trial_id in self.trials.keys() & self.source.active.keys()}
        for trial_id, trial in self.trials.items():
            if ray_internals.is_given_up(trial):
                self.source.requeue_given_up(trial_id)
        self.on_tick()
        if self.source.only_waits():  # Tune would wait with them, and pay for machines
            raise LeaveTune
        if time.monotonic() - self.checked > NODES_SECONDS:
            self.checked = time.monotonic()
            if not has_node():  # Tune would wait forever
                self.source.close_without_nodes()
                raise LeaveTune


class _OnlyPoints(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA over searched points; teachers, arms, audits and confirmations always run to their end."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not trial.config.get("watched"):
            return str(FIFOScheduler.CONTINUE)
        return str(super().on_trial_result(controller, trial, result))

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if trial.config.get("watched"):
            super().on_trial_complete(controller, trial, result)


def has_node() -> bool:
    return any(node["Alive"] for node in ray.nodes())


def now() -> int:
    """Returns the time, UTC, in milliseconds."""
    return int(time.time() * 1000)
