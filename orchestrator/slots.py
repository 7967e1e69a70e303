"""Slots: warm, identical places that run one trial at a time. The only importer of ray.tune.

Tune is a scheduler made anew at each start: reused actors, and ASHA where the study asks for it. It remembers nothing;
what runs next comes from the agenda, and what ended goes back to it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher

from orchestrator.agenda import Agenda, objective
from orchestrator.study import Slot, Study
from trainables.attempt import Job, run
from trainables.loop import Alone

GROUPS = "groups"  # below a study's folder: what Ray Train writes of kept groups
CLOSE = {"job": "close"}
SPARE_CPUS = 1  # for the slots themselves
RETRIES = 3  # of a trial whose process or node was lost
CHATTER = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own files are the record
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # nobody reads Tune's snapshots
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the sweep
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # only searched points have an objective
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path of a study starts where its command was given
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # with the default of 2 s a lost worker is noticed late
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def start_ray(address: str | None, slot: Slot) -> int:
    """Connects, or starts Ray on this machine; returns how many slots there are. Everything binds to loopback.

    A slot of several workers is a process of its own beside them; it hardly computes, and on this machine it does not
    take a core from them.
    """
    os.environ.update({key: value for key, value in CHATTER.items() if key not in os.environ})
    logging.getLogger("ray").setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if slot.workers > 1:
        common["runtime_env"] = {"worker_process_setup_hook": _set_address}
    if address is None:
        spare = SPARE_CPUS if slot.workers > 1 else 0
        num_cpus = len(os.sched_getaffinity(0)) + spare
        # the dashboard serves the state API, without which a stopped group of workers is never freed
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=slot.workers > 1, dashboard_host="127.0.0.1", **common
        )
    else:
        ray.init(address=address, **common)
    have = ray.cluster_resources()
    cpus = have.get("CPU", 0) - (SPARE_CPUS if address is None and slot.workers > 1 else 0)
    num = int(cpus // (slot.cpus * slot.workers))
    if slot.gpus:
        num = min(num, int(have.get("GPU", 0) / (slot.gpus * slot.workers) + 1e-6))
    return num


def _set_address() -> None:
    """Ray Train's cleaner asks for "the" Ray of a machine; with several there it would free nothing, or the wrong one."""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def stop_ray() -> None:
    ray.shutdown()


def run_agenda(agenda: Agenda, num_slots: int, *, provenance: Mapping[str, Any], on_tick: Callable[[], None]) -> None:
    """Runs until the agenda has nothing more and nothing is running. Raises KeyboardInterrupt on Ctrl-C."""
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
            tune.with_resources(_in_slot, _resources(study.slot)),
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
    return {"cpu": slot.cpus, "gpu": slot.gpus} if slot.workers == 1 else {"cpu": SPARE_CPUS / 100}


# ------------------------------------------------------------------------------------------------------- in the driver


class _Source(Searcher):  # type: ignore[misc]
    """Tune's view of the agenda: what to run next, and what became of it."""

    def __init__(self, agenda: Agenda, provenance: Mapping[str, Any], num_slots: int) -> None:
        super().__init__()
        self.agenda, self.provenance, self.num_slots = agenda, provenance, num_slots
        self.live: dict[str, str] = {}  # Tune's trial id -> ours
        self.num_closed = 0

    def suggest(self, trial_id: str) -> Any:
        if len(self.live) >= self.num_slots:
            return None
        planned = self.agenda.next()
        if (
            planned is None
            and not self.live
            and self.num_closed < self.num_slots
            and self.agenda.study.slot.workers > 1
        ):
            self.num_closed += 1  # kept workers go home by themselves; left alone they delay Ray's end
            return CLOSE
        if planned is None:
            return None if self.live else Searcher.FINISHED
        self.agenda.start(planned, now())
        self.live[trial_id] = planned.id
        study = self.agenda.study
        is_point = planned.kind == "trial" and planned.arm is None
        watched = bool(study.search and study.search.stop_early and is_point and planned.id not in self.agenda.spared)
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
        )
        return {
            "job": json.dumps(asdict(job)),
            "watched": watched,
            "study": study.model_dump_json() if watched else "",
            "slot": study.slot.model_dump_json(),
        }

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if trial_id in self.live:
            self.agenda.progress(self.live[trial_id], json.loads(result["records"]))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        trial = self.live.pop(trial_id, None)
        if trial is None:
            return
        if result is not None and "end" in result:
            end = json.loads(result["end"])
        elif error:
            end = {
                "status": "failed",
                "reason": f"lost its process {RETRIES + 1} times",
                "attempts": RETRIES + 1,
                "node": None,
            }
        else:
            end = {"status": "stopped", "reason": "early stopping", "attempts": 1, "node": None}
        self.agenda.end(trial, end, now())

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles what it is given, for snapshots that nobody reads
        return {}

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Watch(tune.Callback):  # type: ignore[misc]
    """Lets the driver look around once a turn of Tune's loop."""

    def __init__(self, source: _Source, on_tick: Callable[[], None]) -> None:
        self.source, self.on_tick = source, on_tick

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.on_tick()


class _OnlyPoints(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA over searched points; teachers, arms and confirmations always run to their end."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not trial.config.get("watched"):
            return str(FIFOScheduler.CONTINUE)
        return str(super().on_trial_result(controller, trial, result))

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if trial.config.get("watched"):
            super().on_trial_complete(controller, trial, result)


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
    if config == CLOSE:
        from trainables.worker import close

        close()
        tune.report({"records": "[]"})
        return
    session = _TuneSession(Study.model_validate_json(config["study"]) if config["study"] else None)
    slot = Slot.model_validate_json(config["slot"])
    job = Job(**json.loads(config["job"]))
    if slot.workers == 1:
        tune.report({"records": "[]", "end": json.dumps(run(job, session))})
        return
    from trainables.worker import group

    own = group(slot.workers, slot.cpus, slot.gpus, f"{job.storage}/{job.folder}/{GROUPS}")
    with closing(own.run(job)) as messages:  # a stop by the scheduler leaves the block, and thereby stops all ranks
        for message in messages:
            if "end" in message:
                tune.report({"records": "[]", "end": message["end"]})
            else:
                session.report(json.loads(message["records"]))
