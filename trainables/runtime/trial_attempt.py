"""One attempt at a trial, in a plain process: its folder, its log, its outcome. A trial that fails raises nothing."""

from __future__ import annotations

import errno
import io
import logging
import os
import platform
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from trainables.config.errors import DataError, ModelError, is_out_of_memory
from trainables.config.session import Session
from trainables.config.trial import TrialSpec
from trainables.runtime.outcome import Outcome, Status
from trainables.runtime.trial import run_trial
from trainables.storage.files import Storage, StorageError, as_json, attempts, log
from trainables.training.state import Diverged, Environment, Stopped, Suspended
from trainables.training.stop_signals import LEAVE, Notice, StopReason, watched

OUTCOMES = (Diverged, DataError, ModelError)  # whose message says all: logged without a traceback
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # of what a trial writes outside the storage


@dataclass(frozen=True)
class Job:
    """All that a slot needs to run a trial; travels as JSON."""

    trial: str
    spec: str  # TrialSpec as JSON
    fingerprints: Mapping[str, str]
    storage: str
    folder: str  # the study's, below the storage
    threads: int
    device: str
    checkpoint_at_reports: bool
    provenance: Mapping[str, Any]
    checkpoint_seconds: float = 20.0
    checkpoint_bytes: int | None = None  # room for this trial's checkpoints
    hang_seconds: float = 900.0
    device_share: float = 1.0  # of its memory; others have the rest


def run(job: Job, session: Session) -> Outcome:
    """Runs one attempt at a trial.

    ENDED, FAILED and STOPPED (by hand) are outcomes of the trial. SUSPENDED is none: the trial resumes from its checkpoint.
    A stop by the search's scheduler raises inside `session.report`, and passes through.
    """
    storage = Storage(job.storage)
    home = f"{job.folder}/trials/{job.trial}"
    earlier = session.agree(attempts(storage, home))
    number = int(earlier[-1].rpartition("-")[2]) + 1 if earlier else 1
    folder = f"{home}/attempt-{number}"
    outcome = Outcome(Status.ENDED, attempts=number, node=socket.gethostname())
    is_first = session.rank == 0

    def write(**status: str) -> None:
        if is_first:
            storage.write(f"{folder}/attempt.json", as_json({"node": outcome.node, "device": job.device, **status}))

    def note(status: Status) -> None:
        with suppress(OSError):  # the driver's own file counts
            write(status=status)

    with _logged(storage, f"{home}/log.txt" if is_first else None) as text, _stacks(storage, folder) as stacks:
        log.info("attempt %d of trial %s on %s, %s", number, job.trial, outcome.node, job.device)
        notice = Notice(storage if is_first else None, f"{home}/{LEAVE}", job.hang_seconds, stacks)
        try:
            write()  # the attempt counts, however early its process dies
            outcome = replace(outcome, faults=session.agree(_num_lost(storage, earlier) if is_first else 0))
            at = Environment(
                storage=storage,
                folder=folder,
                earlier=tuple(earlier),
                trial=job.trial,
                device=job.device,
                threads=job.threads,
                checkpoint_seconds=job.checkpoint_seconds,
                checkpoint_bytes=job.checkpoint_bytes,
                checkpoint_at_reports=job.checkpoint_at_reports,
                notice=notice,
                provenance={**job.provenance, **versions(job.device), "node": outcome.node},
            )
            if job.device.startswith("cuda") and job.device_share < 1:
                torch.cuda.set_per_process_memory_fraction(job.device_share)
            with watched(notice):
                spec = TrialSpec.model_validate_json(job.spec)
                outcome = replace(outcome, **run_trial(spec, job.fingerprints, at, session))
            log.info("ended")
        except Suspended as suspended:
            status = Status.STOPPED if suspended.asked == StopReason.BY_HAND else Status.SUSPENDED
            outcome = replace(outcome, status=status, reason=suspended.asked)
        except (SystemExit, Stopped):
            note(Status.STOPPED)
            raise
        except Exception as error:
            outcome = classify_failure(outcome, error)
            if not isinstance(error, OUTCOMES):
                log.error("%s", traceback.format_exc())
        if outcome.status == Status.FAILED:
            log.error("failed: %s", outcome.reason)
            outcome = replace(outcome, last_lines=text.getvalue().splitlines()[-5:])
        if not outcome.is_suspended or outcome.reason == StopReason.LEAVE:
            note(outcome.status)
    return outcome


def classify_failure(attempt: Outcome, error: Exception) -> Outcome:
    """Returns the trial's own failure, or one of the storage or of another rank, after which the trial resumes later."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, Diverged):
        return replace(attempt, status=Status.FAILED, reason=f"diverged: {error}")
    if isinstance(error, OUTCOMES):
        return replace(attempt, status=Status.FAILED, reason=str(error))
    if is_out_of_memory(error):
        return replace(attempt, status=Status.FAILED, reason=f"out of memory: {first}")
    if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        return replace(attempt, status=Status.SUSPENDED, reason=StopReason.STORAGE, detail=error.strerror)
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):
        return replace(attempt, status=Status.SUSPENDED, reason=StopReason.PEER_LOST)
    return replace(attempt, status=Status.FAILED, reason=f"{type(error).__name__}: {first}")


def _num_lost(storage: Storage, attempts: Sequence[str]) -> int:
    """Counts attempts without a status: killed, lost with their node, or cut off, but not by the sweep's own end."""
    return sum(b'"status"' not in (storage.read(f"{name}/attempt.json") or b"") for name in attempts)


@contextmanager
def _stacks(storage: Storage, folder: str) -> Iterator[Any]:
    """Yields the file for the stacks of a process that hangs: beside the attempt if the storage is local, else stderr."""
    if not storage.is_local:
        yield sys.__stderr__
        return
    path = storage.path(f"{folder}/hung-{os.getpid()}.txt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:
        yield sys.__stderr__
        return
    with file:
        yield file
    if not path.stat().st_size:
        path.unlink()


@contextmanager
def _logged(storage: Storage, name: str | None) -> Any:
    """Appends what is logged in the block to the trial's log, also when the attempt is stopped from outside."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    level = log.level
    log.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield text
    finally:
        root.removeHandler(handler)
        log.setLevel(level)
        if name is not None:
            with suppress(OSError):  # a full disk has been reported already
                storage.write(name, (storage.read(name) or b"") + text.getvalue().encode())


def versions(device: str) -> dict[str, str]:
    """Returns what a number may depend on beside its key."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else platform.processor() or platform.machine(),
    }
