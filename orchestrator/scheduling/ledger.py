"""What is known of a study's trials: their files, rows and records, which are planned and which run. Decides nothing.

How a trial began is read from `trials/<id>/trial.json`, how it ended from `trials/<id>/end.json`; nothing else is
remembered between two starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from orchestrator.scheduling import trial_files
from orchestrator.scheduling.objective import measured
from orchestrator.scheduling.trial_files import Records, Row
from orchestrator.scheduling.trials import PlannedTrial
from orchestrator.study.objectives import Measured
from orchestrator.study.schema import Study
from trainables.runtime.outcome import Outcome, Status
from trainables.storage.files import Storage
from trainables.training.stop_signals import StopReason

OF_THE_START = ("spec", "fingerprints", "keys")  # of trial.json, beside the row
OF_THE_OUTCOME = ("status", "reason", "attempts", "faults", "node", "last_lines")


@dataclass
class Ledger:
    study: Study
    storage: Storage
    retry_failed: bool = False
    rows: dict[str, Row] = field(default_factory=dict)  # of all trials that have begun, by id
    records: dict[str, Records] = field(default_factory=dict)
    planned: dict[str, PlannedTrial] = field(default_factory=dict)  # the trials that the study asks for
    running: dict[str, PlannedTrial] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)  # planned trials without an outcome; no teachers
    reopened: set[str] = field(default_factory=set)  # trials that were stopped early and run to their end
    uses: Counter[str] = field(default_factory=Counter)  # planned trials by phase key; no teachers
    listeners: list[Callable[[Row, Records], None]] = field(default_factory=list)
    _teacher_keys: dict[str, str] = field(default_factory=dict)  # earlier teacher -> the phase that it trained
    _stopped_bytes: dict[str, int] = field(default_factory=dict)  # checkpoints of trials that were stopped early

    def __post_init__(self) -> None:
        self.home = self.storage.sub(self.study.folder)
        for trial, (row, records) in trial_files.read_all(self.home).items():
            start = row if records is None else None
            if records is not None and self.retry_failed and _may_run_again(row):
                start = trial_files.read_start(self.home, trial)
            if start is not None:
                self.rows[trial] = {key: start[key] for key in start if key not in OF_THE_START}
                self.rows[trial]["status"] = Status.RUNNING.value
            elif records is not None:
                self.rows[trial], self.records[trial] = row, records
            if row["kind"] == "teacher" and (start := start or trial_files.read_start(self.home, trial)):
                self._teacher_keys[trial] = [*start["keys"].values()][-1]

    # ------------------------------------------------------------------------------------------------------ questions

    def is_over(self, trial: str) -> bool:
        row = self.rows.get(trial)
        return row is not None and row["status"] != Status.RUNNING and trial not in self.reopened

    def is_planned(self, trial: str) -> bool:
        """Returns whether the study asks for a trial, or still reads the phase of an earlier teacher."""
        return trial in self.planned or self.uses[self._teacher_keys.get(trial, "")] > 0

    def value(self, trial: str, what: Measured | None = None) -> float | None:
        """Returns what a trial that has run to its end measured; by default the first objective."""
        row = self.rows.get(trial)
        if row is None or row["status"] != Status.ENDED:
            return None
        return measured(self.study, what or self.study.objective, self.records.get(trial, []), row["phases"])

    def row(self, trial: str) -> Row:
        """Returns the row of the trials table: point, arm and kind are those of the study now, not of when the trial
        ran."""
        row = {"study": self.study.folder, **self.rows[trial], "planned": self.is_planned(trial)}
        if (now := self.planned.get(trial)) is not None:
            row |= {"kind": now.kind, "point": now.point, "arm": now.arm, "params": dict(now.params)}
        return row

    def all_rows(self) -> list[Row]:
        """Returns the rows of all trials, planned or not, in the order in which the trials began."""
        return [self.row(trial) for trial in sorted(self.rows, key=lambda t: (self.rows[t].get("started") or 0, t))]

    # --------------------------------------------------------------------------------------------------------- events

    def plan(self, planned: PlannedTrial) -> None:
        """Notes that the study asks for a trial; of two parts that ask for the same trial, the first counts."""
        if planned.id not in self.planned:
            self.planned[planned.id] = planned
            self.uses.update(set(planned.keys.values()) if planned.kind != "teacher" else ())
        if planned.kind != "teacher" and not self.is_over(planned.id):
            self.unfinished.add(planned.id)

    def reopen(self, trial: str) -> None:
        """Notes that a trial which was stopped early is to run to its end."""
        self.reopened.add(trial)
        self.unfinished.add(trial)

    def start(self, planned: PlannedTrial, now: int) -> None:
        """Writes that the trial begins, before it does. `now`: UTC, milliseconds."""
        row: Row = {
            "trial": planned.id, "kind": planned.kind, "point": planned.point, "arm": planned.arm, "seed": planned.seed,
            "params": dict(planned.params), "status": Status.RUNNING.value, "reason": None, "attempts": 0, "node": None,
            "started": self.rows.get(planned.id, {}).get("started") or now, "ended": None, "phases": {},
            "upstream_flops": 0.0, "upstream_seconds": 0.0, "peak_memory": 0.0,
        }  # fmt: skip
        spec = planned.spec.model_dump(mode="json")
        more = {"spec": spec, "fingerprints": dict(planned.fingerprints), "keys": dict(planned.keys)}
        trial_files.write_start(self.home, planned.id, {**row, **more})
        self.plan(planned)
        self.rows[planned.id] = row
        self.running[planned.id] = planned
        self._notify(planned.id)

    def progress(self, trial: str, records: Records) -> None:
        """Passes new records on. At the end the file of the last attempt counts, not what was passed on."""
        if trial in self.running:
            for listener in self.listeners:
                listener(self.row(trial), records)

    def end(self, trial: str, outcome: Outcome, now: int) -> None:
        """Gives a trial its outcome: the file first, everything else after it. `now`: UTC, milliseconds."""
        planned, ended = self.running[trial], asdict(outcome)
        upstream = [outcome.phases[name] for name in planned.upstream if name in outcome.phases]
        row = {
            **self.rows[trial],
            **{key: ended[key] for key in OF_THE_OUTCOME},
            "status": outcome.status.value,
            "ended": now,
            "phases": ended["phases"],
            "upstream_flops": sum(phase["flops"] for phase in upstream),
            "upstream_seconds": sum(phase["seconds"] for phase in upstream),
            "peak_memory": outcome.peak_memory,
        }
        if trial in self.reopened:
            row["spared"] = True
        self.records[trial] = trial_files.write_end(self.home, trial, row)
        self.rows[trial] = row
        self.reopened.discard(trial)
        self.unfinished.discard(trial)
        del self.running[trial]
        if outcome.reason == StopReason.EARLY:  # may be reopened
            self._keep_room(trial)
        elif outcome.status != Status.ENDED:
            trial_files.forget_checkpoints(self.home, trial)
        self._notify(trial)

    def suspend(self, trial: str) -> None:
        """Notes that a trial stopped running without an outcome; the next start resumes the trial."""
        self.running.pop(trial, None)
        self._notify(trial)

    def requeue(self, trial: str) -> None:
        """Notes that a slot could not begin a trial; the trial starts in another slot, and no listener is notified."""
        del self.running[trial]

    def _keep_room(self, trial: str) -> None:
        """Lets checkpoints of trials that were stopped early take half of the room; the oldest are deleted first."""
        if (room := self.study.limits.checkpoint_gb) is None:
            return
        self._stopped_bytes[trial] = trial_files.checkpoint_bytes(self.home, trial)
        while sum(self._stopped_bytes.values()) > room / 2 * 1e9:
            oldest = next(iter(self._stopped_bytes))
            del self._stopped_bytes[oldest]
            trial_files.forget_checkpoints(self.home, oldest)

    def _notify(self, trial: str) -> None:
        for listener in self.listeners:
            listener(self.row(trial), self.records.get(trial, []))


def _may_run_again(row: Mapping[str, object]) -> bool:
    """Returns whether `--retry-failed` runs a trial again: one that failed, or that was stopped by hand."""
    return row["status"] == Status.FAILED or (row["status"] == Status.STOPPED and row["reason"] != StopReason.EARLY)
