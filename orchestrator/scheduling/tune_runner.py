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
from contextlib import closing, suppress
from dataclasses import asdict
from functools import cache
from typing import Any, NoReturn

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.trainable.function_trainable import wrap_function

from orchestrator.scheduling.scheduler import Agenda, objective
from orchestrator.study.errors import redact
from orchestrator.study.schema import Slot, Study
from trainables.runtime.job_queue import STOPPED
from trainables.runtime.preflight import MARKER, Expected, expect, fault
from trainables.runtime.trial_attempt import Job, run
from trainables.training.state import SingleProcess
from trainables.training.stop_signals import listen

GROUPS = "groups"  # below a study's folder: what Ray Train writes of kept groups
RETRIES = 3  # of a trial whose process or node was lost; one that was told to leave is not counted
PARKED_SECONDS = 1.0  # between words from a slot that is not used
NODES_SECONDS = 10.0  # between looks at whether there still is a node


def run_agenda(
    agenda: Agenda,
    num_slots: int,
    *,
    provenance: Mapping[str, Any],
    on_tick: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Runs until the agenda has nothing more and nothing is running. Raises KeyboardInterrupt on Ctrl-C."""
    # Tune hands these on by way of command lines, which everybody sees: slots have them from their machine
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update([n for n in class_cache.ENV_VARS_TO_PROPAGATE if "AWS_" in n])
    class_cache.ENV_VARS_TO_PROPAGATE.add("TUNE_FUNCTION_THREAD_TIMEOUT_S")  # read in the slot, not here
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
    source = _Source(agenda, provenance, num_slots, say)
    try:
        source.say_what_is_expected()
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
                stop=source.is_unwanted,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[_Watch(source, on_tick)],
            ),
        ).fit()
    except KeyboardInterrupt:
        if not source.only_waits():
            raise
        source.leave_what_waits()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for name in (GROUPS, MARKER):
            with suppress(OSError):  # storage that cannot be written any more has been told of already
                agenda.storage.delete(f"{study.folder}/{name}")


def _device(slot: Slot) -> str:
    return "cuda" if slot.gpus else "cpu"


def _resources(slot: Slot) -> dict[str, float]:
    """What Tune reserves for a slot; the workers of a group are reserved by Ray Train."""
    return {"cpu": slot.cpus, "gpu": slot.gpus} if slot.workers == 1 else {"memory": 1}


# ------------------------------------------------------------------------------------------------------- in the driver


class _Source(Searcher):  # type: ignore[misc]
    """Tune's view of the agenda: what to run next, and what became of it.

    Tune cannot keep off a machine, so a slot that is not fit stays occupied to the end, by the Tune trial that found it so;
    the trial that was to run there is taken back and starts in another slot.
    """

    def __init__(
        self,
        agenda: Agenda,
        provenance: Mapping[str, Any],
        num_slots: int,
        say: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.agenda, self.provenance, self.num_slots, self.say = agenda, provenance, num_slots, say
        self.expected = ""  # what each slot must find, as JSON
        self.live: dict[str, str] = {}  # Tune's trial id -> ours
        self.begun: set[str] = set()  # Tune's ids of trials in slots that were found fit
        self.parked: set[str] = set()  # Tune's ids of those that keep a slot which is not fit
        self.is_finished = False

    def say_what_is_expected(self) -> None:
        """Where that cannot be written, nothing is started."""
        planned, study = self.agenda.known(), self.agenda.study
        try:
            expected = expect(
                self.agenda.storage,
                study.folder,
                device=_device(study.slot),
                specs=[one.spec for one in planned],
                fingerprints=[self.agenda.identity.of(one.spec) for one in planned],
            )
        except OSError as error:
            self._cannot_write(error.strerror or str(error))
        else:
            self.expected = json.dumps(asdict(expected))

    def suggest(self, trial_id: str) -> Any:
        if self.live and len(self.live) >= self.num_slots - len(self.parked):
            return None
        try:
            planned = self.agenda.next()
        except OSError as error:
            self._cannot_write(error.strerror or str(error))
            planned = None
        if planned is None:  # a slot that nothing will need any more is released while others still run
            self.is_finished = not self.live or (self.live.keys() <= self.begun and self.agenda.nothing_follows())
            return Searcher.FINISHED if self.is_finished else None
        try:
            self.agenda.start(planned, now())
        except OSError as error:
            self._cannot_write(error.strerror or str(error))
            self.is_finished = not self.live
            return Searcher.FINISHED if self.is_finished else None
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
            device=_device(study.slot),
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
            "expected": self.expected,
        }

    def _room(self) -> int | None:
        """For a running trial's checkpoints; points that were stopped early keep theirs in the other half."""
        study = self.agenda.study
        if study.limits.checkpoint_gb is None:
            return None
        part = 0.5 if study.search and study.search.stop_early else 1.0
        return int(part * study.limits.checkpoint_gb * 1e9 / self.num_slots)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if trial_id not in self.live:
            return
        if "fault" in result:
            self._park(trial_id, redact(result["fault"]))
        elif "begun" in result and self.agenda.closed and trial_id not in self.begun:
            self.agenda.take_back(self.live.pop(trial_id))  # it has waited for a machine until nothing new is to start
        elif "begun" in result:
            self.begun.add(trial_id)
        else:
            self.agenda.progress(self.live[trial_id], json.loads(result["records"]))

    def _park(self, trial_id: str, fault: str) -> None:
        self.parked.add(trial_id)
        self.agenda.unused.append(fault)
        self.say(f"a slot is not used: {fault}")
        if self.is_finished or len(self.parked) == self.num_slots:
            self.agenda.closed = self.agenda.closed or f"no slot is usable: {'; '.join(sorted({*self.agenda.unused}))}"
            self.agenda.broken = True
        self.agenda.take_back(self.live.pop(trial_id))

    def is_unwanted(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether Tune shall end a trial of its own: one that was taken back, unless it still keeps a slot from others."""
        return trial_id not in self.live and ("fault" not in result or (self.is_finished and not self.live))

    def only_waits(self) -> bool:
        """Whether nothing new is to start, and nothing runs but what still waits for a machine."""
        return bool(self.agenda.closed and self.live) and not self.live.keys() & self.begun

    def leave_what_waits(self) -> None:
        for trial_id in list(self.live):
            self.agenda.take_back(self.live.pop(trial_id))

    def take_up_again(self, trial_id: str) -> None:
        """Of a trial that Tune gave up because its slot did not let go of the one before."""
        trial = self.live.pop(trial_id)
        self.say(f"trial {trial}: its slot was lost before it began; it goes on in another")
        self.agenda.take_back(trial)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        self.parked.discard(trial_id)
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

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (ours := self.source.live.get(trial.trial_id)) is not None:
            self.source.say(
                f"trial {ours}: its process or machine left; it goes on from its last checkpoint in another slot"
            )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for trial in trials:  # where an actor could not be used again, Tune tells nobody
            if trial.trial_id in self.source.live and trial.status == Trial.ERROR:
                self.source.take_up_again(trial.trial_id)
        self.on_tick()
        if self.source.only_waits():  # Tune would wait with them, and pay for machines
            raise KeyboardInterrupt
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


class _TuneSession(SingleProcess):
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
        why = _own_fault(config["expected"])
        if why is not None:
            _park(why)
        tune.report({"records": "[]", "begun": True})
        end = run(job, session)
        if end["reason"] == "terminated":  # another process takes it up
            why = f"trial {job.trial}: this process was told to end (SIGTERM); its checkpoint is written"
            raise RayActorError(error_msg=why, preempted=True)  # of this kind Tune counts none towards `RETRIES`
        _report_end(end)
        return
    from trainables.runtime.worker_group import group

    tune.report({"records": "[]"})  # does not return where the trial went on elsewhere when this slot was lost
    expected = Expected(**json.loads(config["expected"]))
    own = group(slot.workers, slot.cpus, slot.gpus, f"{job.storage}/{job.folder}/{GROUPS}", expected)
    with closing(own.run(job)) as messages:  # a stop by the scheduler leaves the block, and thereby stops all ranks
        for message in messages:
            if "end" in message:
                _report_end(json.loads(message["end"]))
            elif "fault" in message:
                _park(message["fault"])
            elif "begun" in message:
                tune.report({"records": "[]", "begun": True})
            else:
                session.report(json.loads(message["records"]))


@cache
def _own_fault(expected: str) -> str | None:
    """What keeps this process from running trials; looked for once."""
    return fault(Expected(**json.loads(expected)))


def _park(why: str) -> NoReturn:
    """Keeps the slot from others until the scheduler ends this, inside `report`."""
    while True:
        tune.report({"records": "[]", "fault": why})
        time.sleep(PARKED_SECONDS)


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
                from trainables.runtime.worker_group import close

                close()
