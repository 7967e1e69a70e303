"""One attempt at a trial, in a plain process: its folder, its log, its outcome. A trial that fails is a row, no exception."""

from __future__ import annotations

import io
import logging
import platform
import socket
import traceback
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from trainables.data import DataError
from trainables.loop import Diverged, Session, Surroundings
from trainables.models import ModelError
from trainables.remap import RemapError
from trainables.spec import TrialSpec
from trainables.store import Storage, as_json, log
from trainables.trial import run_trial


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


def run(job: Job, session: Session) -> dict[str, Any]:
    """Runs one attempt and returns its end: status, reason, attempts, node, phases, peak_memory."""
    storage = Storage(job.storage)
    home = f"{job.folder}/trials/{job.trial}"
    earlier = sorted((f for f in storage.list(home) if f.startswith("attempt-")), key=lambda f: int(f[8:]))
    number, earlier = session.agree((int(earlier[-1][8:]) + 1 if earlier else 1, earlier))
    end: dict[str, Any] = {"status": "ended", "reason": None, "attempts": number, "node": socket.gethostname()}
    started = {"node": end["node"], "device": job.device}
    if session.rank == 0:
        storage.write(f"{home}/attempt-{number}/attempt.json", as_json(started))  # it counts, however early it dies
    with _logged(storage, f"{home}/log.txt" if session.rank == 0 else None) as text:
        log.info("attempt %d of trial %s on %s, %s", number, job.trial, end["node"], job.device)
        try:
            spec = TrialSpec.model_validate_json(job.spec)
            at = Surroundings(
                storage=storage,
                folder=f"{home}/attempt-{number}",
                earlier=tuple(f"{home}/{name}" for name in earlier),
                trial=job.trial,
                device=job.device,
                threads=job.threads,
                checkpoint_at_reports=job.checkpoint_at_reports,
                provenance={**job.provenance, **versions(job.device), "node": end["node"]},
            )
            end |= run_trial(spec, job.fingerprints, at, session)
            log.info("ended")
        except Diverged as error:
            end |= {"status": "failed", "reason": f"diverged: {error}"}
        except torch.OutOfMemoryError as error:
            end |= {"status": "failed", "reason": f"out of memory: {str(error).splitlines()[0]}"}
        except (DataError, ModelError, RemapError) as error:
            end |= {"status": "failed", "reason": str(error)}
        except Exception as error:
            end |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            log.error("%s", traceback.format_exc())
        if end["status"] == "failed":
            log.error("failed: %s", end["reason"])
            end["last_lines"] = text.getvalue().splitlines()[-5:]
    return end


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
