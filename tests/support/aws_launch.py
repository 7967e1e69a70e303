"""cluster.yaml's whole life at a pretended EC2: as shipped, filled in, up, workers, down. Prints what was asked for.

    unshare --net --fork --pid --mount-proc --kill-child python -m tests.support.aws_launch FOLDER

To be run in a network of its own: the machines get addresses that look public, and Ray tries to reach them for ever.
FOLDER becomes its home, and keeps what Ray writes.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from tests.support.s3_server import KEYS

ROOT = Path(__file__).parents[2]
ENDPOINT = "http://127.0.0.1:5000"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def main(home: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for folder in (home / ".ray", home / "tmp"):
        folder.mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("t" * 64)
    (home / ".ray" / "auth_token").chmod(0o600)
    os.environ.update(KEYS, AWS_ENDPOINT_URL=ENDPOINT, HOME=str(home), TMPDIR=str(home / "tmp"),
                      MOTO_RECORDER_FILEPATH=str(home / "requests"), RAY_USAGE_STATS_ENABLED="0")  # fmt: skip
    os.chdir(ROOT)
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    ThreadedMotoServer("127.0.0.1", 5000, verbose=False).start()
    said: dict[str, Any] = {}
    shipped = ROOT / "cluster.yaml"
    filled, region_only = home / "cluster.yaml", home / "region-only.yaml"
    made = furnish()
    region_only.write_text(shipped.read_text().replace("region: null", "region: us-east-1"))
    filled.write_text(fill_in(region_only.read_text(), made))

    with recorded() as requests:
        looks = [
            run(sys.executable, "-m", "orchestrator.cluster.check_config", str(file)) for file in (shipped, region_only)
        ]
        ups = [run(*RAY, "up", "-y", "--no-config-cache", str(file)) for file in (shipped, region_only)]
    said["unfilled"] = {"looks": looks, "ups": ups, "requests": requests, "machines": machines()}
    said["look"] = run(sys.executable, "-m", "orchestrator.cluster.check_config", str(filled))

    with recorded() as requests:
        bootstrap = up(filled, home)
    key = home / ".ssh" / "ray-autoscaler_us-east-1.pem"
    said["up"] = {
        "requests": requests,
        "machines": machines(),
        "groups": groups(),
        "key_mode": key.stat().st_mode & 0o777,
    }

    (home / "ray_bootstrap_key.pem").write_text(key.read_text())  # the head's copy, as Ray's mounts would bring it
    with recorded() as requests:
        scale(bootstrap)
    said["workers"] = {"requests": requests, "machines": machines(), "groups": groups()}

    with recorded() as requests:
        down = run(*RAY, "down", "-y", str(filled))
    said["down"] = {"code": down["code"], "requests": requests, "machines": machines()}
    print(json.dumps({**said, "made": made}, default=str))


def furnish() -> dict[str, str]:
    """What docs/cluster.md has one make by hand: a group and two profiles; and an image."""
    import boto3

    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    for name in ("codistill-head", "codistill-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps({"Statement": [trust]}))
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="mine", Description="mine", VpcId=vpc)["GroupId"]
    return {"group": group, "image": ec2.describe_images()["Images"][0]["ImageId"]}


def fill_in(text: str, made: dict[str, str]) -> str:
    for place, value in (
        ("ami-FILL-IN", made["image"]),
        ("sg-FILL-IN", made["group"]),
        ("s3://FILL-IN", "s3://sweeps"),
    ):
        assert place in text
        text = text.replace(place, value)
    return text


def up(file: Path, home: Path) -> Path:
    """Until the head was asked for and what it would get is written; the rest is ssh to a machine that is not there."""
    log = (home / "up.log").open("w")
    process = subprocess.Popen([*RAY, "up", "-y", "--no-config-cache", str(file)], stdout=log, stderr=log)
    try:
        for_head = until(lambda: next((home / "tmp").glob("ray-bootstrap-*"), None), process, home / "up.log")
        until(lambda: "Waiting for SSH" in (home / "up.log").read_text(), process, home / "up.log")
        kept = home / "ray_bootstrap_config.yaml"
        kept.write_text(for_head.read_text())  # Ray removes its own
    finally:
        process.kill()
        process.wait()
    return kept


def scale(bootstrap: Path) -> None:
    """Two workers and one of them away again, as the head's autoscaler does it, from the file that it is started with."""
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

    reader = FileConfigReader(str(bootstrap))
    config = reader.get_cached_autoscaling_config()
    provider = _get_node_provider(config.get_provider_config(), config.get_config("cluster_name"))
    autoscaler = NodeProviderAdapter(provider, reader)

    def workers() -> list[str]:
        failed = autoscaler.poll_errors()
        assert not failed, failed
        return [name for name, machine in autoscaler.get_non_terminated().items() if machine.node_type == "gpu"]

    for request in ("one", "two"):  # not both at once: moto starts the least that was asked for, 1
        autoscaler.launch({"gpu": 1}, request)
    until(lambda: len(workers()) == 2)
    autoscaler.terminate(workers()[:1], "idle")
    until(lambda: len(workers()) == 1)


def until(what: Callable[[], Any], process: subprocess.Popen[bytes] | None = None, log: Path | None = None) -> Any:
    deadline = time.monotonic() + 150
    while not (found := what()):
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            sys.exit(f"{'it ended' if ended else 'waited too long'}: {log.read_text()[-3000:] if log else ''}")
        time.sleep(0.2)
    return found


def run(*command: str) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return {"code": done.returncode, "said": done.stdout[-3000:] + done.stderr[-3000:]}


@contextmanager
def recorded() -> Iterator[list[dict[str, str]]]:
    """What is asked of the server meanwhile: `action` (ec2:RunInstances) and the request's own fields."""
    from moto.moto_api import recorder

    requests: list[dict[str, str]] = []
    recorder.reset_recording()
    recorder.start_recording()
    yield requests
    recorder.stop_recording()
    for line in recorder.download_recording().splitlines():
        entry = json.loads(line)
        fields = dict(parse_qsl(base64.b64decode(entry["body"]).decode()))
        service = re.search(r"/(\w+)/aws4_request", entry["headers"]["Authorization"])
        assert service is not None
        requests.append({**fields, "action": f"{service[1]}:{fields['Action']}"})


def machines() -> list[dict[str, Any]]:
    import boto3

    return [machine for r in boto3.client("ec2").describe_instances()["Reservations"] for machine in r["Instances"]]


def groups() -> list[dict[str, Any]]:
    import boto3

    found: list[dict[str, Any]] = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
