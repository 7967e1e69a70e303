"""One attempt at a trial, in a plain process: its folder, its log, its outcome. A trial that fails is a row, no exception."""

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
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from trainables.config.errors import DataError, ModelError
from trainables.config.trial import TrialSpec
from trainables.models.remap import RemapError
from trainables.runtime.trial import run_trial
from trainables.storage.checkpoints import attempts
from trainables.storage.files import Storage, StorageError, as_json, log
from trainables.training.state import Diverged, Environment, Session, Stopped, Suspended, is_out_of_memory
from trainables.training.stop_signals import LEAVE, Notice, watched

PEER_LOST = "another rank was lost"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # wherever else a trial writes


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


def run(job: Job, session: Session) -> dict[str, Any]:
    """Runs one attempt and returns its end: status, reason, attempts, faults, node, phases, peak_memory.

    `ended` and `failed` are outcomes; so is `left` with the reason `stop`. Any other `left` is none: the trial goes on later,
    from its checkpoint (reason: `leave`, `terminated`, another rank that was lost, or `storage: …` where nothing could be written).
    """
    storage = Storage(job.storage)
    home = f"{job.folder}/trials/{job.trial}"
    earlier = session.agree(attempts(storage, home))
    number = int(earlier[-1].rpartition("-")[2]) + 1 if earlier else 1
    folder = f"{home}/attempt-{number}"
    end: dict[str, Any] = {"status": "ended", "reason": None, "attempts": number, "node": socket.gethostname()}
    is_first = session.rank == 0

    def tell(**more: str) -> None:
        if is_first:
            storage.write(f"{folder}/attempt.json", as_json({"node": end["node"], "device": job.device, **more}))

    def note(status: str) -> None:
        with suppress(OSError):  # the driver's own file is what counts
            tell(status=status)

    with _logged(storage, f"{home}/log.txt" if is_first else None) as text, _stacks(storage, folder) as stacks:
        log.info("attempt %d of trial %s on %s, %s", number, job.trial, end["node"], job.device)
        notice = Notice(storage if is_first else None, f"{home}/{LEAVE}", job.hang_seconds, stacks)
        try:
            tell()  # it counts, however early it dies
            end["faults"] = session.agree(_num_lost(storage, earlier) if is_first else 0)
            spec = TrialSpec.model_validate_json(job.spec)
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
                provenance={**job.provenance, **versions(job.device), "node": end["node"]},
            )
            if job.device.startswith("cuda") and job.device_share < 1:
                torch.cuda.set_per_process_memory_fraction(job.device_share)
            with watched(notice):
                end |= run_trial(spec, job.fingerprints, at, session)
            log.info("ended")
        except Suspended as left:
            end |= {"status": "left", "reason": left.asked}
        except (SystemExit, Stopped):  # by the scheduler, inside `report`
            note("stopped")
            raise
        except Diverged as error:
            end |= {"status": "failed", "reason": f"diverged: {error}"}
        except (DataError, ModelError, RemapError) as error:
            end |= {"status": "failed", "reason": str(error)}
        except Exception as error:
            end |= _what_befell(error)
            log.error("%s", traceback.format_exc())
        if end["status"] == "failed":
            log.error("failed: %s", end["reason"])
            end["last_lines"] = text.getvalue().splitlines()[-5:]
        if end["status"] != "left" or end["reason"] == "stop":
            note(end["status"])
    return end


def _what_befell(error: Exception) -> dict[str, str]:
    """The trial's own failure, or that of the place where it writes: then the trial is not to blame, and goes on later."""
    first = (str(error).splitlines() or [""])[0]
    if is_out_of_memory(error):
        return {"status": "failed", "reason": f"out of memory: {first}"}
    if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        return {"status": "left", "reason": f"storage: {error.strerror}"}
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):
        return {"status": "left", "reason": PEER_LOST}
    return {"status": "failed", "reason": f"{type(error).__name__}: {first}"}


def _num_lost(storage: Storage, attempts: Sequence[str]) -> int:
    """Attempts that ended without an outcome: killed, lost with their node, cut off, or left."""
    return sum(b'"status"' not in (storage.read(f"{name}/attempt.json") or b"") for name in attempts)


@contextmanager
def _stacks(storage: Storage, folder: str) -> Iterator[Any]:
    """Where a process that hangs writes what it was doing before it is ended: beside the attempt, if that is local."""
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
    """Everything logged meanwhile is appended to the trial's log, also when the attempt is stopped from outside."""
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
            with suppress(OSError):  # a full disk has been told already
                storage.write(name, (storage.read(name) or b"") + text.getvalue().encode())


def versions(device: str) -> dict[str, str]:
    """What a number may also depend on, beside its key."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else platform.processor() or platform.machine(),
    }
