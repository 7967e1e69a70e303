"""A trial: its phases in order. Knows no paper, no tracker and no Ray; reads a spec, trains phases, writes plain files.

A stored phase is not trained again; an interrupted phase resumes from its checkpoint.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainables.config.phase_run import PhaseRun
from trainables.config.session import Record, Session
from trainables.config.trial import TrialSpec
from trainables.data.prepared import open_data
from trainables.storage.files import log
from trainables.storage.phase_store import Corrupt, PhaseStore, StoredPhase
from trainables.training.loop import train_phase
from trainables.training.phase_graph import phase_runs
from trainables.training.state import Environment, TrialContext, peak_memory

SAME = ("phase", "model", "task", "split", "metric", "step")  # a phase that is trained again replaces its records


def fresh(seed: int, threads: int) -> None:
    """Resets the state of the process, so that a trial computes the same whatever ran before."""
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:  # a new high-water mark of memory; Linux only
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def run_trial(spec: TrialSpec, fingerprints: Mapping[str, str], at: Environment, session: Session) -> dict[str, Any]:
    """Runs what the store lacks. Returns the trial's `phases` (key, reused, costs) and `peak_memory` in bytes.

    Records of all phases, reused ones included, are written to `<folder>/records.jsonl` as they come.
    """
    fresh(spec.seed, at.threads)
    spec = spec.pruned()
    written: dict[tuple[Any, ...], Record] = {}

    def emit(records: list[Record]) -> None:
        written.update({tuple(record[key] for key in SAME): record for record in records})
        if session.rank == 0:
            text = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in written.values())
            at.storage.write(f"{at.folder}/records.jsonl", text.encode())
        session.report(records)

    data = at.storage.sub("data").uri
    opened = {name: open_data(data, fingerprints[f"data:{name}"]) for name in spec.readings()}
    run = TrialContext(spec, fingerprints, opened, PhaseStore(at.storage), at, session, emit)
    done: dict[PhaseRun, StoredPhase] = {}
    for instance in phase_runs(spec):
        published = session.agree(run.store.find(run.key(instance)))
        if published is None:
            done |= _train_healing(run, instance)
        else:
            log.info("phase %s: reused (%s)", instance, published.key)
            emit([dict(record) for record in published.records])
            done[instance] = published
    phases = {
        str(instance): {
            "key": published.key,
            "reused": published.provenance.get("trial") != at.trial,
            **{name: published.cost[name] for name in ("flops", "seconds", "device_seconds", "tokens")},
        }
        for instance, published in done.items()
    }
    return {"phases": phases, "peak_memory": peak_memory(at.device)}


def _train_healing(run: TrialContext, instance: PhaseRun) -> dict[PhaseRun, StoredPhase]:
    """Trains a phase, after training again any phase that it starts from and whose files turn out to be damaged."""
    done: dict[PhaseRun, StoredPhase] = {}
    damaged: set[str] = set()
    while True:
        try:
            return {**done, instance: train_phase(run, instance)}
        except Corrupt as damage:
            if damage.key in damaged:  # training it again did not help
                raise
            damaged.add(damage.key)
            if run.session.rank == 0:
                run.store.set_aside(damage.key, damage.why)
            run.session.agree(None)
        for upstream in phase_runs(run.spec.upto(instance.phase)):
            if upstream.phase != instance.phase and run.session.agree(run.store.find(run.key(upstream))) is None:
                done |= _train_healing(run, upstream)
