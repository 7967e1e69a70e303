"""What cluster.yaml asks EC2 for, from `ray up` to `ray down`: checked against moto's EC2, in a network of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
APART = ["unshare", "--net", "--fork", "--pid", "--mount-proc", "--kill-child"]

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What tests/support/aws_launch.py says of the cluster's life (one minute on an idle machine, two on a busy one)."""
    for module in ("moto", "boto3", "flask"):
        pytest.importorskip(module, reason="needs moto, of the extra `dev`")
    try:
        subprocess.run([*APART, "ip", "link", "set", "lo", "up"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {error}")
    command = [
        *APART,
        sys.executable,
        "-m",
        "tests.support.aws_launch",
        str(tmp_path_factory.mktemp("home")),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=400)
    finally:
        process.kill()  # and with it all in its namespace
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


def of(requests: list[dict[str, str]], action: str) -> list[dict[str, str]]:
    return [request for request in requests if request["action"] == f"ec2:{action}"]


def test_while_something_is_to_be_filled_in_no_machine_is_asked_for(asked: Any) -> None:
    unfilled = asked["unfilled"]
    assert [look["code"] for look in unfilled["looks"]] == [2, 2]
    assert [up["code"] for up in unfilled["ups"]] == [1, 1], (
        "Ray itself, without our look, as shipped and with a region"
    )
    assert not of(unfilled["requests"], "RunInstances") and not unfilled["machines"]
    assert asked["look"] == {"code": 0, "said": ""}, "filled in, nothing is amiss"


@pytest.mark.parametrize(
    ("step", "count", "kind", "profile", "gigabytes"),
    [("up", 1, "m6i.xlarge", "codistill-head", "100"), ("workers", 2, "g5.2xlarge", "codistill-worker", "200")],
)
def test_a_machine_is_asked_for_as_the_file_says(
    asked: Any, step: str, count: int, kind: str, profile: str, gigabytes: str
) -> None:
    requests = of(asked[step]["requests"], "RunInstances")
    assert len(requests) == count
    for request in requests:
        assert request["InstanceType"] == kind and request["MaxCount"] == "1"
        assert request["ImageId"] == asked["made"]["image"] and request["IamInstanceProfile.Name"] == profile
        assert request["SecurityGroupId.1"] == asked["made"]["group"] and "SecurityGroupId.2" not in request
        assert request["MetadataOptions.HttpTokens"] == "required"
        assert request["MetadataOptions.HttpPutResponseHopLimit"] == "1"
        disk = {key.rpartition(".")[2]: value for key, value in request.items() if ".Ebs." in key}
        assert disk == {
            "VolumeSize": gigabytes,
            "VolumeType": "gp3",
            "Encrypted": "true",
            "DeleteOnTermination": "true",
        }
        assert request.get("InstanceMarketOptions.MarketType") == (None if step == "up" else "spot")


def test_the_machines_run_with_rays_tags_and_no_group_of_rays(asked: Any) -> None:
    (head,) = asked["up"]["machines"]
    first, *workers = asked["workers"]["machines"]
    assert first["InstanceId"] == head["InstanceId"] and head["State"]["Name"] == "running"
    assert sorted(worker["State"]["Name"] for worker in workers) == ["running", "terminated"], "the idle one has gone"
    for machine, role, kind in ((head, "head", "head"), *((worker, "worker", "gpu") for worker in workers)):
        tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
        assert tags["ray-cluster-name"] == "codistill"
        assert (tags["ray-node-type"], tags["ray-user-node-type"]) == (role, kind)
        assert machine["KeyName"] == "ray-autoscaler_us-east-1"
        assert {group["GroupId"] for group in machine["SecurityGroups"]} == {asked["made"]["group"]}
    assert "InstanceLifecycle" not in head and {worker["InstanceLifecycle"] for worker in workers} == {"spot"}
    groups = asked["workers"]["groups"]
    assert {group["GroupName"] for group in groups} == {"default", "mine"}
    assert not any(group["IpPermissions"] for group in groups), "Ray opened a port of a group"


def test_only_its_owner_can_read_the_key(asked: Any) -> None:
    assert asked["up"]["key_mode"] == 0o600


def test_afterwards_nothing_runs_and_nothing_is_only_stopped(asked: Any) -> None:
    assert asked["down"]["code"] == 0 and len(asked["down"]["machines"]) == 3
    assert {machine["State"]["Name"] for machine in asked["down"]["machines"]} == {"terminated"}


@pytest.mark.parametrize(("who", "steps"), [("you", ("unfilled", "up", "down")), ("codistill-head", ("workers",))])
def test_the_policies_of_the_docs_allow_what_is_asked(asked: Any, who: str, steps: tuple[str, ...]) -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    (policy,) = re.findall(rf"^    {who} +ec2:(.*?);", text, re.MULTILINE)
    allowed = [f"ec2:{action}" for action in policy.split(", ")]
    actions = {request["action"] for step in steps for request in asked[step]["requests"]}
    assert {"ec2:RunInstances", "ec2:TerminateInstances"} <= actions
    assert not [action for action in actions if not any(fnmatch(action, pattern) for pattern in allowed)]
