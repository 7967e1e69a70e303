"""A mirror of the tables in MLflow. The only importer of mlflow; knows no Ray and decides nothing.

The tables are the truth and are written first. One daemon thread copies them, so that a tracking store which is slow, away
or broken can neither delay nor fail a sweep. The thread reads once what the store has; from then on it sends only what the
store lacks, with the tables' timestamps. To catch up, everything is put again, and nothing is doubled.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shlex
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.study.errors import redact
from orchestrator.study.paths import sqlite_file

Row = Mapping[str, Any]
Point = tuple[str, int, int]  # metric, step, and the time where the step alone does not tell two apart

STATUS = {"running": "RUNNING", "ended": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}  # ours -> MLflow's
TAGS = ("study", "trial", "point", "arm", "seed", "status", "kind", "planned", "reason")
BATCH = 800  # points of one request; MLflow takes 1000 entities, parameters and tags among them
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the mirror retries itself, after reading what has arrived
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass
class _Run:
    """A run as the store has it."""

    id: str
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: set[str] = field(default_factory=set)
    metrics: set[str] = field(default_factory=set)  # whose points were there at connecting, and are not in `done` yet


@dataclass
class _Trial:
    """The rows of one trial, and how many of them have arrived."""

    row: Row
    sent: Row | None = None  # the row that the store has; compared by identity
    todo: dict[Point, Row] = field(default_factory=dict)
    done: set[Point] = field(default_factory=set)
    refused: str | None = None  # why the store refuses the trial, which is sent again once it has more rows

    def waits(self) -> int:
        return len(self.todo) + (self.sent is not self.row)


class Mirror:
    """One study in one experiment: a parent run, and a nested run per trial.

    `tags` describe the parent. No method raises, and none but `close` and `first_answer` blocks.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        *,
        tags: Mapping[str, object] | None = None,
        every: float = 2.0,
    ) -> None:
        self.uri, self.experiment, self._every = uri, experiment, every
        self._about = {"study": experiment, **_strings(tags or {}), "kind": "study", "status": "running"}
        self._inbox: deque[tuple[Row, Sequence[Row]]] = deque()
        self._trials: dict[str, _Trial] = {}
        self._waiting: dict[str, _Trial] = {}  # those with something to send
        self._end: tuple[str, list[Path]] | None = None
        self._lock = threading.Lock()  # of `_trials` between the two threads; never held over a request
        self._closing = threading.Event()
        self._answered = threading.Event()  # once connected, or once that failed
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)
        self._client: Any = None
        self._error: Exception | None = None

    def start(self) -> None:
        """Imports mlflow and connects in the background, which takes seconds."""
        self._thread.start()

    def first_answer(self, timeout: float) -> str | None:
        """Waits at most `timeout` seconds for the store to answer or to fail; returns the problem, if there is one."""
        self._answered.wait(timeout)
        return self.problem

    def put(self, trial: Row, rows: Sequence[Row]) -> None:
        """Takes a row of `trials` and its rows of `results`: all of them, or those since the last call."""
        self._inbox.append((dict(trial), list(rows)))

    def finish(self, status: str, artifacts: Sequence[Path] = (), *, verdicts: Mapping[str, str] | None = None) -> None:
        """Ends the parent run (`ended`, `failed` or `stopped`) with these files and a tag for the verdict on each claim, once
        all trials have arrived."""
        of_claims = {_clean(f"verdict.{claim}"): verdict for claim, verdict in (verdicts or {}).items()}
        self._about = self._about | {"status": status} | of_claims
        self._end = (status, list(artifacts))

    def close(self, timeout: float = 60.0) -> int:
        """Waits at most `timeout` seconds until everything has arrived; returns how many records have not."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        waiting = self._num_waiting()
        if waiting and self._error is None and not self._refused():
            self._error = TimeoutError(f"not done in {timeout:g} s")
        return waiting

    @property
    def problem(self) -> str | None:
        """One line without secrets, or None while there is no problem."""
        waiting, refused, where = self._num_waiting(), self._refused(), f"MLflow at {redact(self.uri)}"
        if self._error is not None:
            mend = f"{self.advice}, then " if self._is_old else ""
            wait = f"{waiting} records wait; {mend}run the same command again to catch up"
            return f"{where} did not answer: {wait} ({_reason(self._error)})"
        if refused is not None:
            return f"{where} refused {refused.waits()} records of trial {refused.row.get('trial')}: {refused.refused}"
        return None

    @property
    def advice(self) -> str:
        """What is wrong with the store, and what makes it answer again."""
        if (file := sqlite_file(self.uri)) is None:
            return "MLflow does not answer; start it"
        upgrade = f"copy the file and run `mlflow db upgrade {shlex.quote(self.uri)}`, or " if self._is_old else ""
        return f"MLflow cannot use {file}; {upgrade}move it away: the mirror is made again from the tables"

    @property
    def _is_old(self) -> bool:
        """Whether another release of MLflow wrote the store."""
        return "mlflow db upgrade" in str(self._error)

    # ------------------------------------------------------------------------------------------------- both threads

    def _take(self) -> list[_Trial]:
        """Moves what was put to its trial, without points that the store has and steps put twice; the trials to send."""
        with self._lock:
            while self._inbox:
                row, rows = self._inbox.popleft()
                trial = self._trials.setdefault(str(row.get("trial")), _Trial(row))
                trial.row, trial.refused = row, None
                points = {_point(_name(r), r.get("step"), r.get("t")): r for r in rows}
                trial.todo |= {point: r for point, r in points.items() if point not in trial.done}
                self._waiting[str(row.get("trial"))] = trial
            return list(self._waiting.values())

    def _num_waiting(self) -> int:
        trials = self._take()
        with self._lock:
            return sum(trial.waits() for trial in trials) + (self._end is not None)

    def _refused(self) -> _Trial | None:
        return next((trial for trial in self._take() if trial.refused is not None), None)

    # ------------------------------------------------------------------------------------------- the mirror's thread

    def _loop(self) -> None:
        while True:
            closing = self._closing.is_set()
            try:
                if self._client is None:
                    self._connect()
                    self._answered.set()
                self._round()
                self._error = None
            except Exception as error:  # of any kind: a mirror never fails a sweep
                self._error, self._client = error, None
                self._answered.set()
            if closing and (self._error is None or time.monotonic() > self._deadline):
                return
            time.sleep(0.5) if closing else self._closing.wait(self._every)

    def _connect(self) -> None:
        """Finds or creates the experiment and the parent run, and reads all runs in one search."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)  # `problem` has what a user needs
        with _alone(self.uri):  # the first request makes the tables
            client = MlflowClient(self.uri)
            experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            self._experiment_id = client.create_experiment(self.experiment, artifact_location=_artifacts(self.uri))
        else:
            self._experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":  # its name stays taken
                client.restore_experiment(self._experiment_id)
        found = client.search_runs([self._experiment_id], max_results=50_000)  # latest first: of two, the older wins
        parents = [_run(run) for run in found if run.data.tags.get("kind") == "study"]
        self._client = client
        self._parent = parents[-1] if parents else self._create(self.experiment, self._about, None)
        nested = [run for run in found if run.data.tags.get("mlflow.parentRunId") == self._parent.id]
        self._runs = {run.data.tags["trial"]: _run(run) for run in nested if "trial" in run.data.tags}
        self._write(self._parent, self._about, {})
        self._status(self._parent, "running", None)

    def _create(self, name: str, tags: dict[str, str], start: int | None) -> _Run:
        run = self._client.create_run(self._experiment_id, start_time=start, tags=tags, run_name=name)
        return _Run(run.info.run_id, tags=dict(tags))

    def _round(self) -> None:
        for trial in self._take():
            if time.monotonic() > self._deadline:
                return
            if trial.waits() and trial.refused is None:
                try:
                    self._deliver(trial)
                except Exception as error:
                    if not _content(error):
                        raise
                    trial.refused = _reason(error)
        if self._end is not None:
            status, artifacts = self._end
            self._write(self._parent, self._about, {})
            self._status(self._parent, status, None)
            for path in filter(Path.exists, artifacts):
                self._client.log_artifact(self._parent.id, str(path))
            self._end = None

    def _deliver(self, trial: _Trial) -> None:
        with self._lock:
            row, todo = trial.row, dict(trial.todo)
        key, tags = str(row.get("trial")), _strings({name: row.get(name) for name in TAGS})
        run = self._runs.get(key)
        if run is None:
            name = f"{row.get('arm') or row.get('point')}/{row.get('seed')}"
            run = self._create(name, {**tags, "mlflow.parentRunId": self._parent.id}, _milliseconds(row.get("started")))
            self._runs[key] = run
            trial.done.clear()  # an earlier run was deleted, and its points with it
        if run.metrics and todo:  # an earlier command, or a request whose answer was lost, sent some of it
            all_there = {**tags, "rows": str(len(trial.done) + len(todo))}.items() <= run.tags.items()
            ended = tags.get("status") != "running"
            self._arrived(trial, todo if all_there and ended else self._history(run))
            run.metrics.clear()
        points = {point: r for point, r in todo.items() if point not in trial.done}
        tags["rows"] = str(len(trial.done) + len(points))
        self._write(run, tags, _flat(row.get("params") or {}), points)
        self._arrived(trial, points)
        self._status(run, str(row.get("status")), _milliseconds(row.get("ended")))
        trial.sent = row
        with self._lock:
            if not trial.waits():
                self._waiting.pop(key, None)

    def _history(self, run: _Run) -> set[Point]:
        """Returns every point of a run in the store. One request for each metric, so only for a trial that had not
        finished."""
        history = (self._client.get_metric_history(run.id, name) for name in run.metrics)
        return {_point(point.key, point.step, point.timestamp) for points in history for point in points}

    def _arrived(self, trial: _Trial, points: Iterable[Point]) -> None:
        with self._lock:
            trial.done.update(points)
            trial.todo = {point: r for point, r in trial.todo.items() if point not in trial.done}

    def _write(
        self, run: _Run, tags: dict[str, str], params: dict[str, str], points: Mapping[Point, Row] | None = None
    ) -> None:
        """Sends what the run lacks in as few requests as MLflow allows; the tags go last, since they hold the count."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [
            Metric(name, float(r["value"]), int(r["t"]), int(r["step"])) for (name, _, _), r in (points or {}).items()
        ]
        new_params = [Param(name, value) for name, value in params.items() if name not in run.params]
        new_tags = [RunTag(name, value) for name, value in tags.items() if run.tags.get(name) != value]
        while metrics or new_params or new_tags:
            last = len(metrics) <= BATCH and len(new_params) <= 100
            self._client.log_batch(run.id, metrics[:BATCH], new_params[:100], new_tags if last else [])
            del metrics[:BATCH], new_params[:100]
            new_tags = [] if last else new_tags
        run.params |= set(params)
        run.tags |= tags

    def _status(self, run: _Run, ours: str, ended: int | None) -> None:
        status = STATUS.get(ours, "RUNNING")
        if status == run.status:
            return
        if status == "RUNNING":
            self._client.update_run(run.id, status=status)
        else:
            self._client.set_terminated(run.id, status, ended)
        run.status = status


# ---------------------------------------------------------------------------------------------------- pure functions


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Keeps the mirrors of other sweeps from a SQLite file: two that make its tables at once break them."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _reason(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}".partition("\n")[0])[:300]


def _content(error: Exception) -> bool:
    """Returns whether the content of a request is at fault, so that the same request would fail again."""
    code = getattr(error, "get_http_status_code", None)
    return isinstance(error, KeyError | TypeError | ValueError) if code is None else code() == 400


def _artifacts(uri: str) -> str | None:
    """Returns the artifact folder of a new experiment: beside a SQLite file (not MLflow's ./mlruns), or the server's
    choice."""
    if not uri.startswith("sqlite:"):
        return None
    file = sqlite_file(uri)
    folder = file.resolve().parent if file is not None else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "mlartifacts").as_uri()


def _run(run: Any) -> _Run:
    return _Run(run.info.run_id, run.info.status, dict(run.data.tags), set(run.data.params), set(run.data.metrics))


def _name(row: Row) -> str:
    """Returns `<phase>/<model>/<task>/<split>/<metric>`, without parts that are missing."""
    parts = (row.get(key) for key in ("phase", "model", "task", "split", "metric"))
    return _clean("/".join(part for part in parts if isinstance(part, str) and part))


@cache  # as many as there are metrics and parameters
def _clean(name: str) -> str:
    """Returns a name in the characters and the form (a normal path of at most 250 characters) that MLflow accepts."""
    parts = (part for part in re.sub(r"[^\w.\- :/]", "_", name)[:250].split("/") if part.strip(". "))
    return "/".join(parts) or "_"


def _point(name: str, step: Any, t: Any) -> Point:
    """Returns the identity of a number: a resumed trial reports a step again, at another time; machine figures go by
    the clock."""
    return (name, step, t if "/system/" in f"/{name}" else 0)


def _strings(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value)[:5000] for name, value in values.items() if value is not None and value == value}


def _milliseconds(value: Any) -> int | None:
    return None if value is None or value != value else int(value)  # a table reads a missing time as NaN


def _flat(params: Any) -> dict[str, str]:
    """Returns nested parameters, or JSON of them, as dotted path -> text of at most 6000 characters."""
    flat: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        else:
            flat[_clean(path)] = (value if isinstance(value, str) else json.dumps(value, default=str))[:6000]

    walk(json.loads(params) if isinstance(params, str) else params, "")
    return flat
