"""Slots: warm, identical places that run one trial at a time. The only importer of ray.tune.

Tune is a scheduler made anew at each start: reused actors, and ASHA where the study asks for it. It remembers nothing;
what runs next comes from the agenda, and what ended goes back to it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.execution import class_cache
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.trainable.function_trainable import wrap_function

from orchestrator.agenda import Agenda, objective
from orchestrator.study import Slot, Study
from trainables.attempt import Job, run
from trainables.mailbox import STOPPED
from trainables.notice import listen
from trainables.running import Alone

GROUPS = "groups"  # below a study's folder: what Ray Train writes of kept groups
RETRIES = 3  # of a trial whose process or node was lost; one that was told to leave is not counted
NODES_SECONDS = 10.0  # between looks at whether there still is a node


def run_agenda(agenda: Agenda, num_slots: int, *, provenance: Mapping[str, Any], on_tick: Callable[[], None]) -> None:
    """Runs until the agenda has nothing more and nothing is running. Raises KeyboardInterrupt on Ctrl-C."""
    # Tune hands these on by way of command lines, which everybody sees: slots have them from their machine
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update([n for n in class_cache.ENV_VARS_TO_PROPAGATE if "AWS_" in n])
    study = agenda.study
    scratch = tempfile.mkdtemp(prefix="codistill-tune-")
    early = study.search.stop_early if study.search else None
    scheduler = (
        _OnlyPoints(
            time_attr="percent",
            metric="objective",
            mode=study.objective.mode,
            max_t=101,
            grace_period=round(100 * early.first),
            reduction_factor=early.reduction,
        )
        if early
        else FIFOScheduler()
    )
    source = _Source(agenda, provenance, num_slots)
    try:
        tune.Tuner(
            tune.with_resources(_Slot, _resources(study.slot)),
            tune_config=tune.TuneConfig(
                search_alg=source,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=None,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                name="run",
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[_Watch(source, on_tick)],
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        agenda.storage.delete(f"{study.folder}/{GROUPS}")


def _resources(slot: Slot) -> dict[str, float]:
    """What Tune reserves for a slot; the workers of a group are reserved by Ray Train."""
    return {"cpu": slot.cpus, "gpu": slot.gpus} if slot.workers == 1 else {"memory": 1}


# ------------------------------------------------------------------------------------------------------- in the driver


class _Source(Searcher):  # type: ignore[misc]
    """Tune's view of the agenda: what to run next, and what became of it."""

    def __init__(self, agenda: Agenda, provenance: Mapping[str, Any], num_slots: int) -> None:
        super().__init__()
        self.agenda, self.provenance, self.num_slots = agenda, provenance, num_slots
        self.live: dict[str, str] = {}  # Tune's trial id -> ours

    def suggest(self, trial_id: str) -> Any:
        if len(self.live) >= self.num_slots:
            return None
        planned = self.agenda.next()
        if planned is None:  # a slot that nothing will need any more is released while others still run
            return Searcher.FINISHED if not self.live or self.agenda.nothing_follows() else None
        try:
            self.agenda.start(planned, now())
        except OSError as error:
            self._cannot_write(error.strerror or str(error))
            return None if self.live else Searcher.FINISHED
        self.live[trial_id] = planned.id
        study = self.agenda.study
        is_point = planned.kind == "trial" and planned.arm is None
        watched = bool(study.search and study.search.stop_early and is_point and planned.id not in self.agenda.spared)
        limits = study.limits
        job = Job(
            trial=planned.id,
            spec=planned.spec.model_dump_json(),
            fingerprints=self.agenda.identity.of(planned.spec),
            storage=self.agenda.storage.uri,
            folder=study.folder,
            threads=max(1, int(study.slot.cpus)),
            device="cuda" if study.slot.gpus else "cpu",
            checkpoint_at_reports=watched,
            provenance=self.provenance,
            checkpoint_seconds=limits.checkpoint_seconds,
            checkpoint_bytes=self._room(),
            hang_seconds=60 * limits.hang_minutes,
            device_share=study.slot.gpus or 1.0,
        )
        return {
            "job": json.dumps(asdict(job)),
            "watched": watched,
            "study": study.model_dump_json() if watched else "",
            "slot": study.slot.model_dump_json(),
        }

    def _room(self) -> int | None:
        """For a running trial's checkpoints; points that were stopped early keep theirs in the other half."""
        study = self.agenda.study
        if study.limits.checkpoint_gb is None:
            return None
        part = 0.5 if study.search and study.search.stop_early else 1.0
        return int(part * study.limits.checkpoint_gb * 1e9 / self.num_slots)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if trial_id in self.live:
            self.agenda.progress(self.live[trial_id], json.loads(result["records"]))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        trial = self.live.pop(trial_id, None)
        if trial is None:
            return
        if result is not None and "end" in result:
            end = json.loads(result["end"])
        elif error and not has_node():
            self.no_node()
            self.agenda.leave(trial)
            return
        elif error:
            reason = f"its process was lost {RETRIES + 1} times"
            end = {"status": "failed", "reason": reason, "attempts": RETRIES + 1, "faults": RETRIES + 1, "node": None}
        else:
            end = STOPPED
        if end["status"] == "left":
            if end["reason"].startswith("storage"):
                self._cannot_write(end["reason"].removeprefix("storage: "))
            self.agenda.leave(trial)
            return
        try:
            self.agenda.end(trial, end, now())
        except OSError as failed:
            self._cannot_write(failed.strerror or str(failed))
            self.agenda.leave(trial)

    def _cannot_write(self, why: str) -> None:
        """Nobody is to blame but the storage: what runs may try, nothing new is started."""
        self.agenda.broken = True
        self.agenda.closed = self.agenda.closed or f"the storage cannot be written ({why}): nothing new was started"

    def no_node(self) -> None:
        self.agenda.closed, self.agenda.broken = "Ray's last node is gone: nothing new was started", True

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles what it is given, for snapshots that nobody reads
        return {}

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Watch(tune.Callback):  # type: ignore[misc]
    """Lets the driver look around once a turn of Tune's loop."""

    def __init__(self, source: _Source, on_tick: Callable[[], None]) -> None:
        self.source, self.on_tick, self.looked = source, on_tick, time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.on_tick()
        if time.monotonic() - self.looked > NODES_SECONDS:
            self.looked = time.monotonic()
            if not has_node():  # Tune would wait for ever
                self.source.no_node()
                raise KeyboardInterrupt


class _OnlyPoints(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA over searched points; teachers, arms and confirmations always run to their end."""

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
    """UTC, milliseconds."""
    return int(time.time() * 1000)


# ------------------------------------------------------------------------------------------------------- in the slot


class _TuneSession(Alone):
    """What a one-worker trial speaks to. A stop by the scheduler surfaces as SystemExit inside `report`."""

    def __init__(self, study: Study | None) -> None:
        self.study = study
        self.seen: list[dict[str, Any]] = []

    def report(self, records: list[dict[str, Any]]) -> None:
        self.seen += records
        metrics: dict[str, Any] = {"records": json.dumps(records)}
        if self.study is not None:
            at = [r for r in records if r["phase"] == self.study.objective.phase]
            if at:
                last = max(r["progress"] for r in at)
                value = objective(self.study, [{**r, "progress": 1.0} for r in at if r["progress"] == last])
                if value is not None and last < 1:  # what has reached its end is not stopped there
                    metrics |= {"percent": round(100 * last), "objective": value}
        tune.report(metrics)


def _in_slot(config: dict[str, Any]) -> None:
    """Runs one trial: here, or on the group of workers that this process keeps."""
    session = _TuneSession(Study.model_validate_json(config["study"]) if config["study"] else None)
    slot = Slot.model_validate_json(config["slot"])
    job = Job(**json.loads(config["job"]))
    if slot.workers == 1:
        end = run(job, session)
        if end["reason"] == "terminated":  # another process takes it up
            why = f"trial {job.trial}: this process was told to end (SIGTERM); its checkpoint is written"
            raise RayActorError(error_msg=why, preempted=True)  # of this kind Tune counts none towards `RETRIES`
        _report_end(end)
        return
    from trainables.worker import group

    own = group(slot.workers, slot.cpus, slot.gpus, f"{job.storage}/{job.folder}/{GROUPS}")
    with closing(own.run(job)) as messages:  # a stop by the scheduler leaves the block, and thereby stops all ranks
        for message in messages:
            if "end" in message:
                _report_end(json.loads(message["end"]))
            else:
                session.report(json.loads(message["records"]))


def _report_end(end: dict[str, Any]) -> None:
    if (end["status"], end["reason"]) == ("left", "stop"):
        end = {**end, "status": "stopped", "reason": "stopped by hand"}
    tune.report({"records": "[]", "end": json.dumps(end)})


class _Slot(wrap_function(_in_slot)):  # type: ignore[misc]
    """A process that runs one trial after another; what it keeps between them ends with it."""

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
                from trainables.worker import close

                close()
