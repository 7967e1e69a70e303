"""What a trial costs beside its own compute: our sweep against Ray's own way, a `Tuner` over `TorchTrainer`s.

    python -m benchmarks.overhead                 # one worker to a trial, two slots
    python -m benchmarks.overhead --workers 2     # two workers to a trial (DDP over gloo), one slot: kept groups

Both sides run the same trivial trials (`run_trial`: one layer of width 16, one step, one evaluation) in as many slots, in
fresh processes with a Ray of their own, one side after the other; the side that begins alternates with the rounds.
Ours is the command `orchestrator.sweep` as it is: scheduler, slots, files, MLflow mirror. Theirs is Ray's guide followed to
the letter with default settings, one report. It gets a logical CPU more for each slot, since each of its trials wants a
driver function beside its workers.

Definitions. *Steady*: from the end of each slot's first trial to the end of the last, so without the start of Ray, of
processes and imports. *Wall per trial*: steady time / trials that ended in it. *Slot time per trial*: that times the
slots, what one slot spends on one trial. *Own compute*: median of `run_trial` in as many plain processes, by themselves,
warm. *Overhead* = slot time - own compute; contention between slots and driver for cores therefore counts as overhead.
*All / trials*: from the command's start to its exit, by the number of trials. *Busy*: cores that others use, before each
side.

Not shown: GPUs, several nodes, the cost of early stopping, checkpoints of real models; for theirs the restart of trials,
a tracker, or a memoised phase, none of which it does here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainables.config.session import SingleProcess

CORES = 2  # that both sides use
STUDY = """\
question: What does a trial cost that does nothing?
trial:
  data: {{kind: files, train: {text}, tokenizer: {{kind: wordpiece, size: 64}}, length: 16, evaluate: 8}}
  models: {{student: {{family: modernbert, layers: 1, width: 16, heads: 1, dropout: 0}}}}
  phases:
    pretrain:
      train: {{student: full}}
      budget: {{steps: 1}}
      batch: 2
      evaluate: [1]
      optimizer: {{lr: 1e-3}}
      terms: {{student_hard: {{kind: cross_entropy, of: student}}}}
objective: {{phase: pretrain, model: student, metric: mlm_loss, mode: min}}
arms: {{alone: {{}}}}
seeds: {seeds}
slot: {{cpus: {cpus}, workers: {workers}}}
"""


class Listener(SingleProcess):
    """A session of one process that hands the objective's records on."""

    def __init__(self, tell: Any = None) -> None:
        self.tell = tell

    def report(self, records: list[dict[str, Any]]) -> None:
        if self.tell is not None:
            self.tell({r["metric"]: r["value"] for r in records if r["split"] == "dev"})


def session(rank: int, world: int, tell: Any) -> Any:
    from trainables.runtime.worker_group import GroupSession

    class Ranks(GroupSession):
        def report(self, records: list[dict[str, Any]]) -> None:
            Listener(tell).report(records)  # on every rank: Ray's report is a barrier

    return Listener(tell) if world == 1 else Ranks(None, 1, rank, world)


def train(seed: int, study_file: str, folder: str, tell: Any = None, rank: int = 0, world: int = 1) -> None:
    """One trivial trial in this process, or its part of one."""
    from orchestrator.scheduling.trials import Fingerprints
    from orchestrator.study.load import load_study
    from trainables.runtime.trial import run_trial
    from trainables.storage.files import Storage
    from trainables.training.state import Environment

    spec = load_study(study_file).spec(seed=seed)
    storage = Storage(folder)
    at = Environment(storage=storage, folder=f"plain/{seed}", trial=str(seed))
    fingerprints = Fingerprints(storage.sub("data").uri).of(spec)
    started = time.perf_counter()
    run_trial(spec, fingerprints, at, session(rank, world, tell))
    if rank == 0:
        (Path(folder) / f"seconds-{seed}").write_text(str(time.perf_counter() - started))


def plain_rank(rank: int, world: int, study_file: str, folder: str, num: int) -> None:
    """All trials, one after the other, as one of `world` processes without Ray."""
    if world > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for seed in range(num):
        train(seed, study_file, folder, None, rank, world)


def own_compute(study_file: str, folder: str, num: int, workers: int) -> float:
    """Seconds of a warm `run_trial`, median."""
    Path(folder).mkdir(parents=True)
    if workers == 1:
        plain_rank(0, 1, study_file, folder, num + 3)
    else:
        import torch.multiprocessing as mp

        mp.start_processes(plain_rank, (workers, study_file, folder, num + 3), nprocs=workers, start_method="spawn")
    return statistics.median(float((Path(folder) / f"seconds-{seed}").read_text()) for seed in range(3, num + 3))


def ours(study_file: str, folder: str) -> list[tuple[float, float]]:
    """(start, end) of each trial of the study, in seconds, as the sweep's own files have them."""
    command = [sys.executable, "-m", "orchestrator.sweep", study_file, "--storage", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ends = [json.loads(path.read_text()) for path in Path(folder).glob("*/trials/*/end.json")]
    assert all(end["status"] == "ended" for end in ends), ends
    return [(end["started"] / 1000, end["ended"] / 1000) for end in ends]


def theirs(study_file: str, folder: str, num: int, workers: int) -> list[tuple[float, float]]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.overhead",
        "--workers",
        str(workers),
        "--plain",
        study_file,
        folder,
        str(num),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=400)
    return [(start, end) for start, end in json.loads((Path(folder) / "times.json").read_text())]


def plain_tuner(study_file: str, folder: str, num: int, workers: int) -> None:
    """Ray's guide to tuning with Train: a Tune function that makes a trainer, which makes a group of workers."""
    import ray
    import ray.train
    from ray import tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    def train_fn(config: dict[str, Any]) -> None:
        rank = ray.train.get_context().get_world_rank()
        train(config["seed"], study_file, folder, ray.train.report, rank, workers)

    def driver_fn(config: dict[str, Any]) -> None:
        run_config = ray.train.RunConfig(
            name=ray.tune.get_context().get_trial_id(), storage_path=f"{folder}/ray", callbacks=[TuneReportCallback()]
        )
        scaling = ray.train.ScalingConfig(num_workers=workers)
        TorchTrainer(train_fn, train_loop_config=config, scaling_config=scaling, run_config=run_config).fit()

    class Clock(tune.Callback):  # type: ignore[misc]
        times: dict[str, list[float]] = {}

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.times[trial.trial_id] = [time.time()]

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.times[trial.trial_id].append(time.time())

    slots = CORES // workers

    def set_address() -> None:  # else Train's cleaners look for it among all Rays of the machine, for 12 s a trial
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address

    ray.init(address="local", num_cpus=CORES + slots, runtime_env={"worker_process_setup_hook": set_address})
    results = tune.Tuner(
        tune.with_resources(driver_fn, {"cpu": 0.01}),
        param_space={"seed": tune.grid_search(list(range(num)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=slots),
        run_config=tune.RunConfig(storage_path=f"{folder}/ray", name="tune", callbacks=[Clock()]),
    ).fit()
    assert not results.errors and all(result.metrics["mlm_loss"] > 0 for result in results), results.errors
    (Path(folder) / "times.json").write_text(json.dumps(list(Clock.times.values())))


def busy_cores(seconds: float = 2.0) -> float:
    """How many cores other programs keep busy before a side begins (Linux)."""

    def idle() -> float:
        fields = Path("/proc/stat").read_text().split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")

    before = idle()
    time.sleep(seconds)
    return (os.cpu_count() or 1) - (idle() - before) / seconds


def wall_per_trial(times: list[tuple[float, float]], slots: int) -> float:
    """Seconds in steady state: after the first trial of each slot."""
    in_order = sorted(times)
    begun = max(end for _, end in in_order[:slots])
    later = [end for _, end in in_order if end > begun]
    return (max(later) - begun) / len(later)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1, help="to a trial")
    parser.add_argument("--trials", type=int, default=60, help="of ours, per round")
    parser.add_argument("--plain-trials", type=int, default=4, help="of Tuner + TorchTrainer, per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    workers = arguments.workers
    if arguments.plain:
        file, folder, num = arguments.plain
        plain_tuner(file, folder, int(num), workers)
        return
    slots = CORES // workers
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "mlflow")))
    with tempfile.TemporaryDirectory(prefix="codistill-overhead-") as scratch:
        text = Path(scratch) / "text.txt"
        draw = random.Random(0)  # documents that are not alike: near-duplicates across splits are dropped
        documents = [" ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(20)) for _ in range(200)]
        text.write_text("\n\n".join(documents))
        file = Path(scratch) / "trivial.yaml"
        cpus = max(1, (os.cpu_count() or CORES) // CORES)  # the machine then has just these slots
        file.write_text(STUDY.format(text=text, seeds=arguments.trials, cpus=cpus, workers=workers))
        compute = own_compute(str(file), f"{scratch}/own", 20, workers)
        print(f"{slots} slots of {workers}; own compute of a trial: {compute:.3f} s")
        print(f"{'':22}{'wall/trial':>11}{'slot time':>11}{'overhead':>10}{'all/trials':>12}   busy   (s per trial)")
        steady: dict[str, list[float]] = {"ours": [], "Tuner + TorchTrainer": []}
        for i in range(arguments.rounds):
            for side in sorted(steady, reverse=i % 2 == 0):  # ours first in even rounds
                time.sleep(5)  # what the other side leaves behind ends
                busy = busy_cores()
                folder, began = f"{scratch}/{i}-{side[:4]}", time.time()
                num = arguments.plain_trials
                times = ours(str(file), folder) if side == "ours" else theirs(str(file), folder, num, workers)
                wall, whole = wall_per_trial(times, slots), (time.time() - began) / len(times)
                steady[side].append(wall)
                slot = slots * wall
                print(f"{side:22}{wall:11.3f}{slot:11.3f}{slot - compute:10.3f}{whole:12.3f}   {busy:.1f}", flush=True)
        mine, plain = (statistics.median(values) for values in steady.values())
        overhead = slots * mine - compute
        print(
            f"medians: overhead {overhead:.3f} s against {slots * plain - compute:.2f} s; wall ratio {plain / mine:.0f}x"
        )


if __name__ == "__main__":
    main()
