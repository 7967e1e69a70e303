"""Compares the plan's estimate of a phase's memory with the peak of a process that trains the phase.

    python -m benchmarks.memory [--rounds 3]

Each case in a fresh process on one thread of a CPU: CPython's documentation, V = 16,384, sequences of 128, four steps and two
evaluations of 64 sequences by the training loop; `restart` continues from a checkpoint of another process. Seen: the highest
resident size (VmHWM) of the process since the trial began. Said: the plan's total, whose constant for a process includes
Ray, which does not run here and takes about 0.1 GB. Not shown: GPUs, several workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.planning.meta_models import Shapes
from orchestrator.planning.reachable import ReachableTrial
from orchestrator.planning.slot_fit import estimate_memory
from orchestrator.study.schema import Slot
from trainables.config.data import PythonDocs
from trainables.config.phase_run import PhaseRun
from trainables.config.session import Record, SingleProcess
from trainables.config.trial import TrialSpec
from trainables.data.prepare import prepare
from trainables.runtime.trial import run_trial
from trainables.storage.files import Storage, bytes_text
from trainables.training.state import Environment, peak_memory

DATA: dict[str, Any] = {"kind": "python_docs", "tokenizer": {"kind": "wordpiece", "size": 16_384}, "length": 128, "evaluate": 64}  # fmt: skip


def _case(batch: int, models: dict[str, Any], flows: dict[str, Any], train: tuple[str, ...] = ("student",), **more: Any) -> dict[str, Any]:  # fmt: skip
    hard = {f"{name}_hard": {"kind": "cross_entropy", "of": name} for name in train}
    phase = {
        "train": dict.fromkeys(train, "full"),
        "streams": {"main": {"corruption": more.pop("corruption", {})}},
        "terms": {**hard, **{name: {"temperature": 2, "tau_squared": False, **flow} for name, flow in flows.items()}},
        "budget": {"steps": 4},
        "batch": batch,
        "evaluate": [0.5, 1],
        "optimizer": {"lr": 1e-3},
    }
    return {"data": DATA, "models": models, "phases": {"train": phase}, **more}


def _model(family: str, layers: int, width: int, **more: Any) -> dict[str, Any]:
    return {"family": family, "layers": layers, "width": width, **more}


TEACHER = {"teacher": _model("modernbert", 8, 256), "student": _model("modernbert", 4, 256)}
FLOW = {"flow": {"kind": "forward_kl", "from": "teacher", "to": "student"}}
BOTH = {
    "there": {"kind": "jeffreys", "from": "big", "to": "small"},
    "back": {"kind": "jsd", "from": "small", "to": "big"},
}
CASES = {
    "bert 4x256": _case(16, {"student": _model("bert", 4, 256, dropout=0)}, {}),
    "the same, dropout 0.1": _case(16, {"student": _model("bert", 4, 256)}, {}),
    "modernbert 4x256 from 8x256": _case(16, TEACHER, FLOW),
    "the same, bf16": _case(16, TEACHER, FLOW, precision="bf16"),
    "modernbert 4x256 with 2x128": _case(16, {"big": _model("modernbert", 4, 256), "small": _model("modernbert", 2, 128)}, BOTH, ("big", "small")),
    "gpt2 4x256": _case(16, {"student": _model("gpt2", 4, 256, dropout=0)}, {}, corruption=None),
    "bert 6x512, restart": _case(2, {"student": _model("bert", 6, 512, dropout=0)}, {}),
}  # fmt: skip


class _Stop(Exception):
    """Ends a trial as a kill would."""


class _Session(SingleProcess):
    def __init__(self, stops: bool) -> None:
        self.stops = stops

    def report(self, records: list[Record]) -> None:
        if self.stops:
            raise _Stop


def said(spec: TrialSpec, shapes: Shapes) -> float:
    """The plan's estimate, bytes."""
    return estimate_memory(ReachableTrial(spec.pruned(), "", {}), PhaseRun("train"), Slot(), shapes).total


def measure(spec: TrialSpec, home: str, attempt: int, stops: bool) -> float:
    """Peak bytes of this process; 0 where it `stops` at the first evaluation."""
    fingerprint = prepare(PythonDocs.model_validate(DATA), f"{home}/data").fingerprint
    folders = [f"study/trials/t/attempt-{n}" for n in range(1, attempt + 1)]
    at = Environment(
        storage=Storage(home),
        folder=folders[-1],
        earlier=tuple(folders[:-1]),
        checkpoint_seconds=0.0 if stops else 1e9,
    )
    try:
        run_trial(spec, {"data:corpus": fingerprint}, at, _Session(stops))
    except _Stop:
        return 0.0
    return peak_memory("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs=4, metavar=("NAME", "HOME", "ATTEMPT", "STOPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        name, home, attempt, stops = arguments.case
        print(json.dumps(measure(TrialSpec.model_validate(CASES[name]), home, int(attempt), stops == "stops")))
        return
    with tempfile.TemporaryDirectory() as home:
        shapes = Shapes.of({"corpus": prepare(PythonDocs.model_validate(DATA), f"{home}/data")})
        print("| case | said | seen, median | said / seen, each round |\n|---|---|---|---|")
        for number, (name, value) in enumerate(CASES.items()):
            seen = []
            for i in range(arguments.rounds):
                folder = Path(home) / f"{number}-{i}"
                folder.mkdir()
                (folder / "data").symlink_to(Path(home) / "data")
                is_restart = name.endswith("restart")
                if is_restart:
                    _run(name, folder, 1, stops=True)
                seen.append(_run(name, folder, 1 + is_restart, stops=False))
            spec = TrialSpec.model_validate(value)
            ratios = ", ".join(f"{said(spec, shapes) / one:.2f}" for one in seen)
            print(
                f"| {name} | {bytes_text(said(spec, shapes))} | {bytes_text(statistics.median(seen))} | {ratios} |",
                flush=True,
            )


def _run(name: str, home: Path, attempt: int, *, stops: bool) -> float:
    arguments = ["--case", name, str(home), str(attempt), "stops" if stops else "goes"]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
