"""How long the driver takes to read the trials of earlier starts from object storage.

    python -m benchmarks.start --trials 1000 --milliseconds 20
    python -m benchmarks.start --trials 1000 --serial      # only the old way

Finished trials are written to moto's S3 server on this machine, whose answers are delayed by what a request to a real bucket
takes (moto answers in one or two milliseconds, and is one process: it shows the number of requests, not their wait). Then
two starts are timed over the same bucket: one trial after another, each by the requests of the old way (trial.json,
end.json, a listing of the attempts, records.jsonl), and `Ledger`, which reads trials side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

from tests.support.s3_server import serving

RECORD = {"phase": "distil", "model": "student", "task": "corpus", "split": "dev", "metric": "mlm_loss", "step": 8,
          "progress": 1.0, "tokens": 9, "seconds": 1.0, "device_seconds": 1.0, "flops": 5.0, "t": 1, "value": 3.0}  # fmt: skip


def write_trials(home: Any, num: int) -> None:
    from orchestrator.scheduling import trial_files
    from trainables.storage.files import as_json, with_checksum

    records = "".join(f"{json.dumps({**RECORD, 'step': step})}\n" for step in range(20)).encode()
    phases = {"distil": {"key": "0" * 32, "reused": False, "flops": 1.0, "seconds": 1.0, "tokens": 9}}

    def write(trial: str) -> None:
        row = {"trial": trial, "kind": "trial", "point": "taught", "arm": "taught", "seed": int(trial), "params": {},
               "status": "ended", "reason": None, "attempts": 1, "node": "n", "started": 1, "ended": 2, "phases": phases}  # fmt: skip
        start = {**row, "spec": {"padding": "x" * 3000}, "fingerprints": {}, "keys": {"distil": "0" * 32}}
        home.write(f"trials/{trial}/trial.json", as_json(start))
        home.write(f"trials/{trial}/attempt-1/records.jsonl", records)
        home.write(f"trials/{trial}/end.json", with_checksum({**row, "records": sha256(records).hexdigest()}))

    list(trial_files.side_by_side(write, [f"{number:06d}" for number in range(num)]))


def read_serially(home: Any) -> int:
    """The old way: everything of one trial after everything of the one before."""
    from orchestrator.analysis.tables import parse_records, records_file
    from orchestrator.scheduling import trial_files
    from trainables.storage.files import verify_checksum

    rows = {}
    for trial in home.list("trials"):
        trial_files.read_start(home, trial)
        row = verify_checksum(home.read(f"trials/{trial}/end.json"))
        rows[trial] = (row, parse_records(records_file(home, trial)))
    return len(rows)


def delay(seconds: float) -> None:
    """Makes each request of botocore's asynchronous client wait as long as one to a real bucket."""
    import asyncio

    from aiobotocore.client import AioBaseClient

    plain = AioBaseClient._make_api_call

    async def slow(self: Any, *arguments: Any) -> Any:
        await asyncio.sleep(seconds)
        return await plain(self, *arguments)

    AioBaseClient._make_api_call = slow


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--milliseconds", type=float, default=0.0, help="that each request waits before it is sent")
    parser.add_argument("--serial", action="store_true", help="time only the old way, one trial after another")
    arguments = parser.parse_args()
    with serving("sweeps") as environment:
        os.environ.update(environment)
        from orchestrator.scheduling.ledger import Ledger
        from trainables.storage.files import Storage

        storage = Storage("s3://sweeps/runs")
        home = storage.sub("study")
        write_trials(home, arguments.trials)
        delay(arguments.milliseconds / 1000)
        seconds = {}
        began = time.perf_counter()
        assert read_serially(home) == arguments.trials
        seconds["one after another"] = time.perf_counter() - began
        if not arguments.serial:
            study: Any = SimpleNamespace(folder="study")
            began = time.perf_counter()
            assert len(Ledger(study, storage).records) == arguments.trials
            seconds["side by side"] = time.perf_counter() - began
        for name, value in seconds.items():
            print(f"{arguments.trials} trials, {name}: {value:.1f} s")
        if len(seconds) == 2:
            print(f"ratio: {seconds['one after another'] / seconds['side by side']:.1f}")


if __name__ == "__main__":
    main()
