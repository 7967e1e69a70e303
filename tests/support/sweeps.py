"""What tests of whole sweeps share: a bench that starts the command and sees that nothing outlives it, and a small study.

Every process that a test starts carries a mark in its environment; none with that mark may be left when the test ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator.analysis import tables as tables_
from orchestrator.scheduling.trials import Fingerprints
from tests.support.trials import Listener, wordy_documents
from trainables.config.trial import TrialSpec
from trainables.runtime import trial_attempt
from trainables.runtime.outcome import Outcome
from trainables.storage.files import Storage

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "search_spaces" / "smoke.yaml"
MARK = "CODISTILL_TEST_MARK"


# ------------------------------------------------------------------------------------------------------------ processes


def marked(mark: str) -> dict[int, str]:
    """Living processes with this mark: pid -> command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                ours = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                if ours and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":  # a zombie is none
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")[:150]
            except OSError:  # it has ended, or is another user's
                continue
    return found


def is_agent(command_line: str) -> bool:
    """Ray's own, which train nothing: agents, and a worker that was just being started and looks for its Ray."""
    rays = ("Agent", "/dashboard/", "/autoscaler/", "default_worker.py")
    return any(name in command_line for name in rays)


@dataclass
class Bench:
    """A folder, and the processes that were started in it."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, study: Path | str, *arguments: str, storage: str | None = None, cwd: Path = ROOT) -> subprocess.Popen[str]:  # fmt: skip
        runs = storage or str(self.folder / "runs")
        command = [sys.executable, "-m", "orchestrator.sweep", str(study), "--storage", runs,
                   "--tracking-uri", f"sqlite:///{self.folder}/mlflow.db", *arguments]  # fmt: skip
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)  # fmt: skip
        self.started.append(process)
        return process

    def sweep(self, study: Path | str, *arguments: str, expect: int = 0, timeout: float = 600, **more: Any) -> Said:
        return finish(self.start(study, *arguments, **more), expect, timeout)

    def left(self, patience: float = 20) -> dict[int, str]:
        """What still lives a little after its driver."""
        until = time.monotonic() + patience
        while (found := marked(self.mark)) and time.monotonic() < until:
            time.sleep(0.2)
        return found

    def end_agents(self) -> None:
        """After a kill nothing that trains may live on; Ray's agents, which serve nobody now, take up to a minute."""
        until = time.monotonic() + 20
        while any(not is_agent(line) for line in marked(self.mark).values()) and time.monotonic() < until:
            time.sleep(0.2)
        found = marked(self.mark)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        alive = {pid: line for pid, line in found.items() if not is_agent(line)}
        assert not alive, f"these outlive their driver: {alive}"

    def close(self) -> None:
        found = self.left()
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.kill()
            process.communicate()
        assert not found, f"left behind: {found}"


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def finish(process: subprocess.Popen[str], expect: int = 0, timeout: float = 600, quiet: bool = True) -> Said:
    out, err = process.communicate(timeout=timeout)
    said = Said(process.returncode, out, err)
    assert process.returncode == expect, f"exit {process.returncode}\n{out[-4000:]}\n{err[-4000:]}"
    assert not quiet or "Traceback" not in out + err, err[-4000:]
    return said


def until(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, f"it ended: {process.communicate()}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
    return found


# -------------------------------------------------------------------------------------------------------------- studies


STUDY = """\
question: Does the machinery hold?
trial:
  data: {{kind: files, train: {corpus}, tokenizer: {{kind: wordpiece, size: 160}}, length: 32, evaluate: 16}}
  models:
    teacher: {{family: bert, layers: 1, width: 16, heads: 2, dropout: 0.1}}
    student: {{family: bert, layers: 1, width: 16, heads: 2, dropout: 0.1}}
  phases:
    teach:
      train: {{teacher: full}}
      budget: {{steps: 20}}
      batch: 8
      optimizer: {{lr: 5e-3}}
      terms: {{teacher_hard: {{kind: cross_entropy, of: teacher}}}}
    distil:
      train: {{student: full}}
      budget: {{steps: {steps}}}
      batch: 8
      optimizer: {{lr: 5e-3}}
      terms:
        student_hard: {{kind: cross_entropy, of: student}}
        soft: {{kind: forward_kl, from: teacher, to: student, weight: 1, tau_squared: false}}
objective: {{phase: distil, model: student, metric: mlm_loss, mode: min}}
{rest}
"""
ARMS = (
    "arms: {short: {phases.distil.budget.steps: 20}, alone: {phases.distil.terms.soft.weight: 0}, taught: {}}\nseeds: 1"
)


def write_study(folder: Path, *, steps: int = 30, rest: str = ARMS, name: str = "study") -> Path:
    corpus, file = folder / "corpus.txt", folder / f"{name}.yaml"
    corpus.write_text("\n\n".join(wordy_documents(160, seed=1)))
    file.write_text(STUDY.format(corpus=corpus, steps=steps, rest=rest))
    return file


def tables(storage: Path, study: str = "study") -> tables_.Tables:
    found = tables_.read(Storage(str(storage)).sub(study))
    assert found is not None
    return found


def values(storage: Path, study: str = "study") -> dict[tuple[Any, ...], float]:
    """Every number that the specs determine; times and memory are the machine's."""
    frame = tables(storage, study).results
    frame = frame[frame["split"] != "system"]
    keys = ["trial", "phase", "model", "task", "split", "metric", "step", "progress", "tokens", "flops"]
    return {tuple(row[key] for key in keys): row["value"] for row in frame.to_dict("records")}


def attempts(storage: Path, study: str = "study") -> dict[str, list[str]]:
    trials = storage / study / "trials"
    return {t.name: sorted(a.name for a in t.glob("attempt-*")) for t in trials.iterdir()} if trials.is_dir() else {}


def ended(storage: Path, study: str = "study") -> dict[str, dict[str, Any]]:
    return {file.parent.name: json.loads(file.read_text()) for file in (storage / study / "trials").glob("*/end.json")}


def same_numbers(storage: Path, trial: str, plain: Path) -> bool:
    """Whether a trial of a sweep and an attempt in a plain process agree bit for bit."""
    keys = ("phase", "model", "task", "split", "metric", "step", "progress", "tokens", "flops")
    ours = tables(storage).results.query("trial == @trial").to_dict("records")
    theirs = tables_.parse_records(tables_.records_file(Storage(str(plain / "plain")), "trial"))
    one, two = (
        {tuple(r[k] for k in keys): r["value"] for r in rows if r["split"] != "system"} for rows in (ours, theirs)
    )
    assert len(one) > 10 and one.keys() == two.keys()
    return one == two


def run_alone(spec: TrialSpec, storage: Path, *, threads: int = 1) -> Outcome:
    """An attempt in this process, without Ray."""
    identity, spec = Fingerprints(str(storage / "data")), spec.pruned()
    job = trial_attempt.Job(trial="trial", spec=spec.model_dump_json(), fingerprints=identity.of(spec), storage=str(storage), folder="plain",
                      threads=threads, device="cpu", checkpoint_at_reports=False, provenance={})  # fmt: skip
    before = torch.get_num_threads()
    end = trial_attempt.run(job, Listener())
    torch.set_num_threads(before)
    assert end.status == "ended", end
    return end


RARELY = "limits: {checkpoint_seconds: 100000}"


def checkpoints(storage: Path, attempt: int) -> set[str]:
    """Trials that have one from this attempt."""
    return {path.parent.parent.name for path in storage.glob(f"study/trials/*/attempt-{attempt}/checkpoint.json")}


def began_at(storage: Path, trial: str) -> list[int]:
    """The steps from which the attempts at a trial began the phase `distil`, as far as they came to write their log."""
    log = (storage / "study" / "trials" / trial / "log.txt").read_text()
    return [int(step) for step in re.findall(r"phase distil: from step (\d+)", log)]


def tell(what: str, since: float) -> None:
    """For the table in docs/faults.md: `pytest -s`."""
    print(f"\n[{what}: went on after {time.monotonic() - since:.1f} s]")
