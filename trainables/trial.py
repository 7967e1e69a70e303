"""A trial: its phases in order. Knows no paper, no tracker and no Ray; reads a spec, trains phases, writes plain files.

A phase that the store has is not trained again; one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainables.data.corpus import open_corpus
from trainables.loop import Record, Run, Session, Surroundings, peak_memory, train_phase
from trainables.phases import Instance, instances, phase_key
from trainables.spec import TrialSpec
from trainables.store import Corrupt, PhaseStore, Published, log


def fresh(seed: int, threads: int) -> None:
    """Undoes whatever an earlier trial in this process may have left; the first and the third trial are then alike."""
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


def run_trial(spec: TrialSpec, fingerprints: Mapping[str, str], at: Surroundings, session: Session) -> dict[str, Any]:
    """Runs what the store lacks. Returns the trial's `phases` (key, reused, costs) and `peak_memory` in bytes.

    Records of all phases, reused ones included, are written to `<folder>/records.jsonl` as they come.
    """
    fresh(spec.seed, at.threads)
    spec = spec.pruned()
    written: list[Record] = []

    def emit(records: list[Record]) -> None:
        written.extend(records)
        if session.rank == 0:
            text = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in written)
            at.storage.write(f"{at.folder}/records.jsonl", text.encode())
        session.report(records)

    data = at.storage.sub("data").uri
    corpora = {name: open_corpus(data, fingerprints[f"data:{name}"]) for name in spec.data}
    run = Run(spec, fingerprints, corpora, PhaseStore(at.storage), at, session, emit)
    phases: dict[str, Any] = {}
    for instance in instances(spec):
        published = run.store.find(run.key(instance))
        if published is None:
            published = _train_healing(run, instance)
        else:
            log.info("phase %s: reused (%s)", instance, published.key)
            emit([dict(record) for record in published.records])
        phases[str(instance)] = {
            "key": published.key,
            "reused": published.provenance.get("trial") != at.trial,
            **{name: published.cost[name] for name in ("flops", "seconds", "device_seconds", "tokens")},
        }
    return {"phases": phases, "peak_memory": peak_memory(at.device)}


def _train_healing(run: Run, instance: Instance) -> Published:
    """Trains a phase; where one that it starts from turns out to be damaged, that one is trained again first."""
    try:
        return train_phase(run, instance)
    except Corrupt as damage:
        run.store.set_aside(damage.key, damage.why)
    for upstream in instances(run.spec.upto(instance.phase)):
        if upstream != instance and run.store.find(phase_key(run.spec, upstream, run.fingerprints)) is None:
            _train_healing(run, upstream)
    return train_phase(run, instance)
