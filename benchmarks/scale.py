"""What a trial costs the driver when there are many: a sweep of trivial trials, hundred by hundred.

    python -m benchmarks.scale                 # 1,000 arms' trials
    python -m benchmarks.scale --search tpe    # 1,000 points that Optuna's TPE chooses

The command `orchestrator.sweep` runs as it is (agenda, slots, files, MLflow mirror in SQLite); from outside, once a second,
this looks at how many trials have ended and at the CPU time of the driver's process. Then it starts the same command
again, which trains nothing, and makes the tables of a quarter, a half and all of the trials.

*Wall*, *driver CPU*: seconds per trial, in each tenth of the trials after the first `SKIP` (start-up: Ray, processes,
imports). *Last / first*: the medians of the last two tenths by the first two. Trivial trials are the hard case: a real
trial lasts minutes, so that the driver has a thousand times as long for it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.overhead import STUDY, busy_cores

SKIP = 20  # trials of the start
PARTS = 10
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
    """Wall and CPU when so many had ended, in a straight line between two looks."""
    for (w0, c0, n0), (w1, c1, n1) in itertools.pairwise(seen):
        if n0 <= count <= n1 and n1 > n0:
            part = (count - n0) / (n1 - n0)
            return w0 + part * (w1 - w0), c0 + part * (c1 - c0)
    return seen[-1][:2]


def tables(storage: Path, name: str) -> None:
    from orchestrator.analysis import tables as tables_
    from orchestrator.scheduling import trial_files
    from trainables.storage.files import Storage

    home = Storage(str(storage / name))
    ends = {trial: end for trial in home.list("trials") if (end := trial_files.read_end(home, trial)) is not None}
    print(f"\n{'trials':>8}{'rows':>10}{'bytes':>12}{'bytes/trial':>13}{'seconds':>10}")
    for share in (0.25, 0.5, 1.0):
        some = list(ends)[: int(share * len(ends))]
        began = time.perf_counter()
        made = tables_.tables(name, [{**ends[t][0], "planned": True} for t in some], {t: ends[t][1] for t in some})
        tables_.write(made, home.sub("scale"))
        seconds = time.perf_counter() - began
        size = home.size("scale")
        print(f"{len(some):8}{len(made.results):10}{size:12}{size / len(some):13.0f}{seconds:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--search", choices=("tpe", "random"), help="points of a search instead of one arm's seeds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="codistill-scale-") as scratch:
        text, study, storage = Path(scratch) / "text.txt", Path(scratch) / "many.yaml", Path(scratch) / "runs"
        draw = random.Random(0)
        documents = [" ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(20)) for _ in range(200)]
        text.write_text("\n\n".join(documents))
        body = STUDY.format(text=text, seeds=1 if arguments.search else arguments.trials, cpus=1, workers=1)
        points = arguments.trials - 1
        study.write_text(body + (SEARCH.format(sampler=arguments.search, points=points) if arguments.search else ""))
        print(f"{arguments.trials} trials on {os.cpu_count()} cores; others keep {busy_cores():.1f} of them busy")
        seen = sweep(study, storage)
        edges = [SKIP + i * (arguments.trials - SKIP) / PARTS for i in range(PARTS + 1)]
        marks = [at(seen, edge) for edge in edges]
        size = (arguments.trials - SKIP) / PARTS
        wall, cpu = ([(b[i] - a[i]) / size for a, b in itertools.pairwise(marks)] for i in (0, 1))
        print(f"{'tenth':>8}{'wall/trial':>12}{'driver CPU/trial':>18}")
        for i in range(PARTS):
            print(f"{i + 1:8}{wall[i]:12.3f}{cpu[i]:18.4f}")
        for name, values in (("wall", wall), ("driver CPU", cpu)):
            print(f"last / first, {name}: {statistics.mean(values[-2:]) / statistics.mean(values[:2]):.2f}")
        print(f"the whole sweep: {seen[-1][0] - seen[0][0]:.0f} s, driver CPU {seen[-1][1]:.0f} s")
        began = time.perf_counter()
        sweep(study, storage)
        print(f"the same command again, which trains nothing: {time.perf_counter() - began:.0f} s")
        tables(storage, study.stem)


if __name__ == "__main__":
    main()
