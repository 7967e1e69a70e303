"""What many machines cost one driver: a Ray of as many node daemons as asked for, all on this machine, each with one slot.

    python -m benchmarks.nodes --nodes 50 --trials 300 --steps 300

Ray's own test cluster starts the daemons (`ray.cluster_utils.Cluster`: a head without slots, and nodes of one fake core
each); the command `orchestrator.sweep` joins it and runs trivial trials, on as many slots as there are trials where those
are fewer than nodes, for a machine without the memory. From outside, once a second, this looks at which slots' processes
are there, how many trials have ended, and the CPU time of the driver.

*Node*: seconds until a node daemon is alive, and what it takes. *Slots*: seconds from the command's start until so many
processes of slots were there. *Driver CPU*: seconds of the driver's process. All processes share this machine's cores, so
times of start say how much CPU a start takes and not how long it takes on 50 machines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.overhead import STUDY, busy_cores
from benchmarks.scale import cpu_seconds, num_ended

SLOT = "ray::ResourceTrainable"  # as Ray names the process of a slot
CLUSTER = """
import json, sys, time
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray would take 127.0.0.1 for the machine's own address
from ray.cluster_utils import Cluster
import ray._private.utils
ray._private.utils.write_ray_address = lambda *_: None  # this is not the machine's Ray
here = {"node_ip_address": "127.0.0.1"}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **here})
began = time.time()
for _ in range(int(sys.argv[1])):
    cluster.add_node(wait=True, num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, **here)
print(json.dumps({"address": cluster.address, "seconds": time.time() - began}), flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


def gigabytes(pids: set[int]) -> float:
    """What the processes take together: shared pages are counted once (PSS)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
    return total / 1e6


def processes(name: str) -> set[int]:
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and name.encode() in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument(
        "--steps", type=int, default=1, help="of a trial: so many that all slots have begun before the end"
    )
    given = parser.parse_args()
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_raylet_start_wait_time_s": "300",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="codistill-nodes-") as scratch:
        text, study, storage = Path(scratch) / "text.txt", Path(scratch) / "many.yaml", Path(scratch) / "runs"
        draw = random.Random(0)
        text.write_text("\n\n".join(" ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(20)) for _ in range(200)))  # fmt: skip
        body = STUDY.format(text=text, seeds=given.trials, cpus=1, workers=1)
        study.write_text(body.replace("steps: 1}", f"steps: {given.steps}}}"))
        print(f"{given.nodes} nodes on {os.cpu_count()} cores; others keep {busy_cores():.1f} of them busy")
        before = {name: processes(name) for name in ("raylet", "Agent", SLOT)}
        cluster = subprocess.Popen([sys.executable, "-c", CLUSTER, str(given.nodes)], env=environment,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert cluster.stdin is not None and cluster.stdout is not None
        try:
            about = json.loads(cluster.stdout.readline())
            daemons = {pid for name in ("raylet", "Agent") for pid in processes(name) - before[name]}
            print(
                f"node daemons: {about['seconds'] / given.nodes:.1f} s and {gigabytes(daemons) / given.nodes:.2f} GB each"
            )
            watch(study, storage, about["address"], environment, min(given.nodes, given.trials), before[SLOT])
        finally:
            cluster.stdin.write("\n")
            cluster.stdin.close()
            cluster.wait(180)


def watch(study: Path, storage: Path, address: str, environment: dict[str, str], most: int, others: set[int]) -> None:
    command = [sys.executable, "-m", "orchestrator.sweep", str(study), "--storage", str(storage), "--address", address]
    began, taken = time.time(), 0.0
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    home = storage / study.stem / "trials"
    marks: list[tuple[float, int, int, float]] = []  # seconds, slots that are there, trials that ended, driver's CPU
    while driver.poll() is None:
        slots = processes(SLOT) - others
        marks.append((time.time() - began, len(slots), num_ended(home), cpu_seconds(driver.pid)))
        if len(slots) == most and not taken:
            taken = gigabytes(slots)
        time.sleep(1)
    assert driver.returncode == 0, driver.communicate()[0]
    for share in (1 / most, 0.5, 0.9, 1.0):
        at = next((mark for mark in marks if mark[1] >= share * most), None)
        when = f"after {at[0]:.0f} s, driver CPU {at[3]:.0f} s, {at[2]} trials had ended" if at else "never"
        print(f"{max(1, round(share * most)):4} slots: {when}")
    print(f"all slots: {taken:.1f} GB, {taken / most:.2f} each")
    full = [mark for mark in marks if mark[1] == most]
    if len(full) > 1 and full[-1][2] > full[0][2]:
        num = full[-1][2] - full[0][2]
        wall, cpu = ((full[-1][i] - full[0][i]) / num for i in (0, 3))
        print(f"while all were there: {num} trials, {wall:.3f} s of wall and {cpu:.3f} s of the driver's CPU each")
    print(f"the whole sweep: {marks[-1][0]:.0f} s, driver CPU {marks[-1][3]:.0f} s, {num_ended(home)} trials")


if __name__ == "__main__":
    main()
