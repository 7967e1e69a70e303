"""From no worker to as many as there may be and back, while a sweep runs. The autoscaler is Ray's own, of the version that
`ray up` on AWS gets; the machines that it starts and ends are node daemons on one pretend host (Ray's `fake_multinode`)."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.hosts import HOME, SHARE, Hosts, why_not
from tests.support.sweeps import ROOT, STUDY, tables, until
from tests.support.trials import wordy_documents

pytestmark = pytest.mark.hosts
MOST = 3  # machines beside the head
HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # as the provider expects the head to be called
CONFIG = {
    "cluster_name": "fake",
    "max_workers": MOST,
    "upscaling_speed": 4.0,
    "idle_timeout_minutes": 0.1,
    "provider": {"type": "fake_multinode", "head_node_id": HEAD, "launch_multiple": True, "disable_node_updaters": True},
    "head_node_type": "ray.head.default",  # what the provider calls its head
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}, "min_workers": 0, "max_workers": 9},
    },
}  # fmt: skip
START = (
    f"export RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1 RAY_CLOUD_INSTANCE_ID={HEAD} RAY_OVERRIDE_NODE_ID_FOR_TESTING={HEAD} "
    "AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_AUTH_MODE=token RAY_raylet_start_wait_time_s=120; "
    "ray get-auth-token --generate && ray start --head --port=6379 --num-cpus=0 --object-store-memory=100000000 "
    f"--dashboard-host=127.0.0.1 --disable-usage-stats --autoscaling-config={HOME}/ray_bootstrap_config.yaml"
)
REST = """\
arms: {long: {phases.distil.terms.soft.weight: 0}, short: {phases.distil.terms.soft.weight: 0, phases.distil.budget.steps: 60},
       shorter: {phases.distil.terms.soft.weight: 0, phases.distil.budget.steps: 50}}
seeds: 1
"""


def test_machines_come_when_trials_wait_and_go_when_nothing_does(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(f"no pretend machine: {reason}")
    with Hosts(tmp_path, {"one": "10.79.0.1"}, ROOT / ".venv", ROOT / "cluster.lock") as hosts:
        (hosts.share / "corpus.txt").write_text("\n\n".join(wordy_documents(160, seed=1)))
        (hosts.share / "study.yaml").write_text(STUDY.format(corpus=f"{SHARE}/corpus.txt", steps=20_000, rest=REST))
        hosts.run("one", "tee", f"{HOME}/ray_bootstrap_config.yaml", text=json.dumps(CONFIG))
        missing = "_private/fake_multi_node/example.yaml"  # Ray's wheel lacks this provider's defaults; another's do
        hosts.sh("one", f"cd ~/venv/lib/python3*/site-packages/ray/autoscaler && cp aws/defaults.yaml {missing}")
        hosts.sh("one", START, timeout=200)

        def machines() -> int:
            """Beside the head."""
            return int(hosts.run("one", "pgrep", "-fc", "raylet/raylet --raylet_socket_name", check=False).stdout) - 1

        assert machines() == 0
        sweep = f"export RAY_AUTH_MODE=token; cd {ROOT}; python -m orchestrator.sweep {SHARE}/study.yaml --address auto --storage {SHARE}/runs"
        log = (tmp_path / "driver.txt").open("w")
        driver = hosts.start("one", "bash", "-c", f". ~/.bashrc; {sweep}", stdout=log)
        try:
            until(lambda: machines() == MOST, driver, 240)  # all at once, though none was there
            until(lambda: len(list(hosts.share.glob("runs/study/trials/*/end.json"))) == 2, driver, 240)
            # those that nothing needs any more have gone; the long trial runs
            until(lambda: machines() == 1, driver, 120)
            driver.wait(400)
        finally:
            driver.kill()
            log.close()
        said = (tmp_path / "driver.txt").read_text()
        assert driver.returncode == 0 and f"{MOST} slots" in said, said
        assert (tables(hosts.share / "runs").trials["status"] == "ended").all()
        deadline = time.monotonic() + 120
        while machines():
            assert time.monotonic() < deadline, f"{machines()} machines are idle and cost money"
            time.sleep(0.5)
