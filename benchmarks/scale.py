"""What a trial costs the driver when there are many: a sweep of trivial trials, fifth by fifth.

    python -m benchmarks.scale --trials 10000 --minutes 60     # arms' trials; as many as an hour allows
    python -m benchmarks.scale --search tpe                    # points that Optuna's TPE chooses
    python -m benchmarks.scale --next                          # the scheduler alone, without trials

The command `orchestrator.sweep` runs as it is (scheduler, slots, files, MLflow mirror in SQLite); from outside, once a
second, this reads how many trials have ended and the CPU time of the driver's process. Where all trials have ended, the same
command runs again, which trains nothing, and tables are made of a quarter, a half and all of the trials.

*Wall*, *driver CPU*: seconds per trial, in each fifth of the trials after the first `SKIP` (start-up: Ray, processes,
imports). *Last / first*: of the last and the first fifth; at most 1.1 for the driver's CPU. Trivial trials are the hard case:
a real trial lasts minutes, so that the driver has a thousand times as long for it.

`--next` lets 100, 1,000 and 10,000 planned trials end without running them, in memory, and times `next` and the update of
the stages after an end: CPU time, mean per trial.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.overhead import STUDY, busy_cores

SKIP = 20  # trials of the start
PARTS = 5
SEARCH = """
vary:
  phases.pretrain.optimizer.lr: {{float: [1e-4, 1e-1], log: true}}
  phases.pretrain.optimizer.weight_decay: {{float: [1e-4, 1e-1], log: true}}
  phases.pretrain.optimizer.warmup: {{float: [0, 0.5]}}
search: {{sampler: {sampler}, points: {points}}}
"""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def num_ended(trials: Path) -> int:
    return sum((folder / "end.json").exists() for folder in trials.iterdir()) if trials.is_dir() else 0


def sweep(study: Path, storage: Path) -> list[tuple[float, float, int]]:
    """(wall, driver CPU, trials that have ended), about once a second."""
    command = [sys.executable, "-m", "orchestrator.sweep", str(study), "--storage", str(storage)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen = []
    while driver.poll() is None:
        seen.append((time.time(), cpu_seconds(driver.pid), num_ended(storage / study.stem / "trials")))
        time.sleep(1)
    assert driver.returncode == 0, driver.returncode
    return seen


def at(seen: list[tuple[float, float, int]], count: float) -> tuple[float, float]:
    """Wall and CPU when so many had ended, interpolated between two readings."""
    for (w0, c0, n0), (w1, c1, n1) in itertools.pairwise(seen):
        if n0 <= count <= n1 and n1 > n0:
            part = (count - n0) / (n1 - n0)
            return w0 + part * (w1 - w0), c0 + part * (c1 - c0)
    return seen[-1][:2]


def print_fifths(seen: list[tuple[float, float, int]]) -> None:
    size = (seen[-1][2] - SKIP) / PARTS
    marks = [at(seen, SKIP + i * size) for i in range(PARTS + 1)]
    wall, cpu = ([(b[i] - a[i]) / size for a, b in itertools.pairwise(marks)] for i in (0, 1))
    print(f"{'fifth':>8}{'wall/trial':>12}{'driver CPU/trial':>18}")
    for i in range(PARTS):
        print(f"{i + 1:8}{wall[i]:12.3f}{cpu[i]:18.4f}")
    print(f"last / first: wall {wall[-1] / wall[0]:.2f}, driver CPU {cpu[-1] / cpu[0]:.2f}")
    print(f"the whole sweep: {seen[-1][2]} trials, {seen[-1][0] - seen[0][0]:.0f} s, driver CPU {seen[-1][1]:.0f} s")


def print_tables(storage: Path, name: str) -> None:
    from orchestrator.analysis.tables import tables, write
    from orchestrator.scheduling import trial_files
    from trainables.storage.files import Storage

    home = Storage(str(storage / name))
    ends = {trial: end for trial, end in trial_files.read_all(home).items() if end[1] is not None}
    print(f"\n{'trials':>8}{'rows':>10}{'bytes':>12}{'bytes/trial':>13}{'seconds':>10}")
    for share in (0.25, 0.5, 1.0):
        some = list(ends)[: int(share * len(ends))]
        began = time.perf_counter()
        made = tables(name, [{**ends[t][0], "planned": True} for t in some], {t: ends[t][1] or [] for t in some})
        write(made, home.sub("scale"))
        seconds = time.perf_counter() - began
        size = home.size("scale")
        print(f"{len(some):8}{len(made.results):10}{size:12}{size / len(some):13.0f}{seconds:10.2f}")


def time_next(study: Path, text: Path, num: int) -> None:
    from orchestrator.scheduling import trial_files
    from orchestrator.scheduling.scheduler import Scheduler
    from orchestrator.scheduling.trials import Fingerprints
    from orchestrator.study.load import load_study
    from trainables.runtime.outcome import Outcome, Status
    from trainables.storage.files import Storage

    study.write_text(STUDY.format(text=text, seeds=num, cpus=1, workers=1))
    scheduler = Scheduler(load_study(study), Fingerprints(None), Storage(f"memory://scale-{num}"))
    began = time.perf_counter()
    scheduler.known()
    print(f"{num:8} trials planned in {time.perf_counter() - began:.1f} s", end="", flush=True)
    trial_files.write_start = lambda *_: None
    trial_files.write_end = lambda *_: []
    ended, spent = Outcome(Status.ENDED), list[float]()
    while True:
        began = time.process_time()
        planned = scheduler.next()
        seconds = time.process_time() - began
        if planned is None:
            break
        scheduler.ledger.start(planned, 1)
        scheduler.ledger.end(planned.id, ended, 2)
        began = time.process_time()
        scheduler.update(planned.id)
        spent.append(seconds + time.process_time() - began)
    part = len(spent) // PARTS
    first, last = (sum(some) / part * 1e6 for some in (spent[:part], spent[-part:]))
    print(f"; next and update: {first:.0f} µs in the first fifth, {last:.0f} µs in the last")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="then nothing new is started")
    parser.add_argument("--search", choices=("tpe", "random"), help="points of a search instead of one arm's seeds")
    parser.add_argument("--next", action="store_true", help="time the scheduler alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="codistill-scale-") as scratch:
        text, study, storage = Path(scratch) / "text.txt", Path(scratch) / "many.yaml", Path(scratch) / "runs"
        draw = random.Random(0)
        documents = [" ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(20)) for _ in range(200)]
        text.write_text("\n\n".join(documents))
        if arguments.next:
            for num in (100, 1000, 10_000):
                time_next(study, text, num)
            return
        body = STUDY.format(text=text, seeds=1 if arguments.search else arguments.trials, cpus=1, workers=1)
        points = arguments.trials - 1
        body += SEARCH.format(sampler=arguments.search, points=points) if arguments.search else ""
        study.write_text(f"{body}\nlimits: {{minutes: {arguments.minutes:g}}}\n")
        print(f"{arguments.trials} trials on {os.cpu_count()} cores; others keep {busy_cores():.1f} of them busy")
        seen = sweep(study, storage)
        print_fifths(seen)
        if num_ended(storage / study.stem / "trials") >= arguments.trials:
            began = time.perf_counter()
            sweep(study, storage)
            print(f"the same command again, which trains nothing: {time.perf_counter() - began:.0f} s")
        print_tables(storage, study.stem)


if __name__ == "__main__":
    main()
