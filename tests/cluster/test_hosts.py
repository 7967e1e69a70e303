"""A cluster of pretend machines, from `ray up` on the shipped file to `ray down`, as a user goes: nothing here is a stand-in
but the machines and, where a bucket is meant, the server behind it."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.hosts import HOME, SHARE, Hosts, end, why_not
from tests.support.s3_server import KEYS
from tests.support.sweeps import ROOT, STUDY, attempts, ended, tables
from tests.support.trials import wordy_documents

pytestmark = pytest.mark.hosts
ADDRESSES = {"laptop": "10.77.0.10", "head": "10.77.0.2", "w1": "10.77.0.3", "w2": "10.77.0.4"}
FILE = f"{HOME}/cluster-local.yaml"
FILLED_IN = {
    "head_ip: FILL-IN": f"head_ip: {ADDRESSES['head']}",
    "[FILL-IN]": f"[{ADDRESSES['w1']}, {ADDRESSES['w2']}]",
    "ssh_user: FILL-IN": "ssh_user: root",
    "ssh_private_key: FILL-IN": "ssh_private_key: ~/.ssh/id",
}
RAY = "raylet|gcs_server|ray::|dashboard|monitor.py|runtime_env|default_worker"
JOB = "export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265; cd {root}; "


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if (reason := why_not()) is not None:
        pytest.skip(f"no pretend machines: {reason}")
    folder = tmp_path_factory.mktemp("hosts")
    bucket = {**KEYS, "AWS_ENDPOINT_URL": f"http://{ADDRESSES['laptop']}:5555", "CODISTILL_CACHE": "/tmp/cache"}
    with Hosts(folder, ADDRESSES, ROOT / ".venv", ROOT / "cluster.lock", environment=bucket) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Iterator[Hosts]:
    """As the README has it: a token, a look at the file, `ray up`, a forwarded dashboard."""
    text = (ROOT / "cluster-local.yaml").read_text()
    for old, new in FILLED_IN.items():
        text = text.replace(old, new)
    hosts.run("laptop", "tee", FILE, text=text)
    look = f"cd {ROOT} && python -m orchestrator.cluster.check_config {FILE}"
    assert "ray get-auth-token --generate" in hosts.sh("laptop", look, check=False).stderr
    hosts.sh("laptop", f"ray get-auth-token --generate && chmod 600 ~/.ray/auth_token && {look}")
    hosts.sh("laptop", f"cd {ROOT} && ray up -y --no-config-cache {FILE}", timeout=400)
    dashboard = hosts.start(
        "laptop", "bash", "-c", f"export RAY_AUTH_MODE=token; ray dashboard {FILE}", stdout=subprocess.DEVNULL
    )
    try:
        _until(lambda: hosts.sh("laptop", f"{JOB.format(root='/')} ray job list", check=False).returncode == 0, 60)
        yield hosts
    finally:
        end(dashboard)


def submit(hosts: Hosts, name: str, study: str, *arguments: str, storage: str = f"{SHARE}/runs") -> None:
    words = " ".join((study, "--address auto", f"--storage {storage}", *arguments))
    hosts.sh(
        "laptop",
        f"{JOB.format(root=ROOT)} ray job submit --no-wait --submission-id {name} --working-dir . -- python -m orchestrator.sweep {words}",
    )


def logs(hosts: Hosts, name: str, *, follow: bool = False, seconds: float = 60) -> str:
    """With `follow`, until the job has ended."""
    flag = "-f" if follow else ""
    return hosts.sh("laptop", f"{JOB.format(root='/')} ray job logs {flag} {name}", timeout=seconds).stdout


def finish(hosts: Hosts, name: str, expect: str = "SUCCEEDED", seconds: float = 400) -> str:
    logs(hosts, name, follow=True, seconds=seconds)
    said = logs(hosts, name)
    status = hosts.sh("laptop", f"{JOB.format(root='/')} ray job status {name}").stdout
    assert expect in status.upper(), f"{status}\n{said}"
    return said


def write_study(hosts: Hosts, name: str, rest: str, *, steps: int = 30) -> str:
    corpus = hosts.share / "corpus.txt"
    corpus.write_text("\n\n".join(wordy_documents(160, seed=1)))
    (hosts.share / f"{name}.yaml").write_text(STUDY.format(corpus=f"{SHARE}/corpus.txt", steps=steps, rest=rest))
    return f"{SHARE}/{name}.yaml"


def arms(seeds: int, more: str = "") -> str:
    return f"arms: {{alone: {{phases.distil.terms.soft.weight: 0}}, taught: {{}}}}\nseeds: {seeds}\n{more}"


def _until(what: Callable[[], Any], seconds: float, say: Callable[[], str] = str, pause: float = 0.5) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited too long\n{say()}"
        time.sleep(pause)
    return found


def nodes(hosts: Hosts, study: str) -> dict[str, int]:
    """Host -> trials that ended there."""
    return tables(hosts.share / "runs", study).trials["node"].value_counts().to_dict()


# ----------------------------------------------------------------------------------------------------------------- tests


def test_a_sweep_as_a_job_uses_both_machines_and_not_the_head(cluster: Hosts) -> None:
    study = write_study(cluster, "both", arms(4), steps=600)  # long enough for each slot to start meanwhile
    submit(cluster, "both", study, f"--tracking-uri sqlite:///{SHARE}/mlflow.db")
    said = finish(cluster, "both")
    assert "4 slots" in said, said
    trials = tables(cluster.share / "runs", "both").trials
    assert (trials["status"] == "ended").all() and len(trials) == 2 * 4
    assert set(nodes(cluster, "both")) == {"w1", "w2"}
    assert (cluster.share / "runs" / "both" / "report.html").stat().st_size > 10_000


@pytest.mark.long
def test_a_folder_of_one_machine_is_refused(cluster: Hosts) -> None:
    study = write_study(cluster, "refused", arms(1))
    submit(cluster, "refused", study, "--tracking-later", storage="./runs")
    said = finish(cluster, "refused", "FAILED")
    assert "the cluster has 3 machines; give a URI" in said and "Traceback" not in said.split("error:")[1]


@pytest.mark.long
def test_a_trial_on_workers_of_two_machines(cluster: Hosts) -> None:
    """Each worker takes both cores of its machine, so that a group lies on two."""
    study = write_study(cluster, "group", arms(1, "slot: {workers: 2, cpus: 2}"), steps=60)
    submit(cluster, "group", study, f"--tracking-uri sqlite:///{SHARE}/mlflow.db")

    def ranks() -> list[int]:
        found = [cluster.run(host, "pgrep", "-fc", "ray::RayTrainWorker", check=False).stdout for host in ("w1", "w2")]
        return [int(number) for number in found] if all(int(number) for number in found) else []

    _until(ranks, 120, lambda: logs(cluster, "group"))
    finish(cluster, "group")
    assert all(end["status"] == "ended" for end in ended(cluster.share / "runs", "group").values())


@pytest.mark.long
def test_a_bucket_is_the_storage_of_all_machines(cluster: Hosts) -> None:
    """Both machines write to it, and keep copies of the data that the driver prepared."""
    pytest.importorskip("moto", reason="needs moto, of the extra `dev`")
    with (cluster.folder / "bucket.txt").open("w") as log:
        command = ("python", str(ROOT / "tests" / "support" / "s3_server.py"), ADDRESSES["laptop"], "5555", "sweeps")
        server = cluster.start("laptop", *command, stdout=log)
        try:
            _until(lambda: "http://" in (cluster.folder / "bucket.txt").read_text(), 60)
            study = write_study(cluster, "bucket", arms(2), steps=600)
            submit(cluster, "bucket", study, f"--tracking-uri sqlite:///{SHARE}/mlflow.db", storage="s3://sweeps/runs")
            said = finish(cluster, "bucket")
            listed = cluster.sh(
                "head", 'python -c \'import fsspec; print(*fsspec.filesystem("s3").find("sweeps/runs/bucket"))\''
            ).stdout
        finally:
            end(server)
    assert "s3://sweeps/runs/bucket/report.html" in said
    names = {name.removeprefix("sweeps/runs/bucket/") for name in listed.split()}
    assert {"report.html", "results.parquet", "trials.parquet"} <= names, listed
    assert sum(name.endswith("end.json") for name in names) == 4
    assert not (cluster.share / "runs" / "bucket").exists()
    for host in ("w1", "w2"):
        assert cluster.run(host, "ls", "/tmp/cache/data").stdout.strip(), f"{host} keeps no copy"


@pytest.mark.long
def test_a_machine_without_the_shared_folder_is_named_and_not_used(cluster: Hosts) -> None:
    study = write_study(cluster, "unfit", arms(2))
    cluster.run("w2", "mount", "-t", "tmpfs", "tmpfs", SHARE)  # as where the real folder was not mounted
    try:
        submit(cluster, "unfit", study, f"--tracking-uri sqlite:///{SHARE}/mlflow.db")
        said = finish(cluster, "unfit")
    finally:
        cluster.run("w2", "umount", SHARE)
    assert re.search(r"disabled: \d slots? on w2: ", said), said
    assert set(nodes(cluster, "unfit")) == {"w1"}
    assert all(end["faults"] == 0 for end in ended(cluster.share / "runs", "unfit").values())


@pytest.mark.long
def test_what_a_lost_machine_ran_goes_on_elsewhere(cluster: Hosts) -> None:
    """One machine's Ray is killed in mid-sweep, as power would go: every trial is done, those that ran there from their
    checkpoints; the autoscaler makes the machine's Ray anew."""
    study = write_study(cluster, "lost", arms(2, "limits: {checkpoint_seconds: 1}"), steps=1500)
    submit(cluster, "lost", study, f"--tracking-uri sqlite:///{SHARE}/mlflow.db")
    home = cluster.share / "runs" / "lost" / "trials"

    def started_on(host: str) -> list[str]:
        found = []
        for file in home.glob("*/attempt-1/attempt.json"):
            has_checkpoint = any((file.parent).glob("*checkpoint*")) or any(file.parent.rglob("*.safetensors"))
            if (
                json.loads(file.read_text()).get("node") == host
                and has_checkpoint
                and not (file.parent.parent / "end.json").exists()
            ):
                found.append(file.parent.parent.name)
        return found

    hit = _until(lambda: started_on("w1"), 240, lambda: logs(cluster, "lost"))
    assert cluster.kill("w1", RAY) > 3
    said = finish(cluster, "lost", seconds=400)
    found = tables(cluster.share / "runs", "lost").trials.set_index("trial")
    assert (found["status"] == "ended").all(), said
    again = attempts(cluster.share / "runs", "lost")
    moved = [trial for trial in hit if len(again[trial]) > 1]
    assert moved, f"{hit}: {again}"
    _until(lambda: cluster.run("w1", "pgrep", "-f", "raylet/raylet", check=False).stdout, 180)  # the autoscaler's work
    for trial in moved:
        log = (home / trial / "log.txt").read_text()
        assert re.search(r"phase \w+: from step [1-9]", log), log


def test_ray_down_ends_all_of_it(cluster: Hosts) -> None:
    cluster.sh("laptop", f"cd {ROOT} && ray down -y {FILE}", timeout=200)
    for host in ("head", "w1", "w2"):
        _until(lambda host=host: cluster.run(host, "pgrep", "-f", "raylet/raylet", check=False).stdout == "", 150)
