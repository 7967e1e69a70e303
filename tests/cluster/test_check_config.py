"""The two files of clusters: what Ray's own schema takes, what Ray accepts silently, and what AWS is asked for."""

from __future__ import annotations

import copy
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from orchestrator.cluster import check_config

ROOT = Path(__file__).parents[2]
AWS, LOCAL = ROOT / "cluster.yaml", ROOT / "cluster-local.yaml"
FILLED_IN = {"region: null": "region: us-east-1", "ami-FILL-IN": "ami-0123456789abcdef0", "sg-FILL-IN": "sg-0123456789abcdef0",
             "s3://FILL-IN": "s3://sweeps", "head_ip: FILL-IN": "head_ip: 10.0.0.1", "[FILL-IN]": "[10.0.0.2, 10.0.0.3]",
             "ssh_user: FILL-IN": "ssh_user: me", "ssh_private_key: FILL-IN": "ssh_private_key: ~/.ssh/id"}  # fmt: skip


def read(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def filled(file: Path) -> Any:
    text = file.read_text()
    for old, new in FILLED_IN.items():
        text = text.replace(old, new)
    return read(text)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a token that only its owner reads; commands are given in the project's folder."""
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t" * 64)
    (tmp_path / ".ray" / "auth_token").chmod(0o600)
    return tmp_path


def found(value: Any, home: Path) -> dict[str, str]:
    return {".".join(at): what for at, what in check_config.problems(value, home)}


# -------------------------------------------------------------------------------------------------------- before launch


def test_as_shipped_nothing_is_started_and_each_place_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Path, "home", lambda: home)
    assert check_config.main(["cluster.yaml"]) == 2
    said = capsys.readouterr().err
    for place in ("provider.region", "head.node_config.ImageId", "gpu.node_config.ImageId", "gpu.node_config.SecurityGroupIds.0", "head_start_ray_commands.2"):  # fmt: skip
        assert f"{place}: is still to be filled in" in said
    assert said.count("\n") == 6 and re.search(r"cluster.yaml:\d+: provider.region", said)
    assert check_config.main(["cluster-local.yaml"]) == 2
    assert capsys.readouterr().err.count("is still to be filled in") == 4
    assert check_config.main(["nowhere.yaml"]) == 2


@pytest.mark.parametrize("file", [AWS, LOCAL], ids=lambda file: file.stem)
def test_filled_in_nothing_is_amiss(file: Path, home: Path) -> None:
    assert found(filled(file), home) == {}


def node_config(value: Any, kind: str = "gpu") -> Any:
    return value["available_node_types"][kind]["node_config"]


DAMAGE: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "no image": (lambda v: node_config(v).pop("ImageId"), "gpu.node_config.ImageId", "an image of 2022"),
    "no group": (lambda v: node_config(v, "head").pop("SecurityGroupIds"), "head.node_config.SecurityGroupIds", "every address"),
    "no profile": (lambda v: node_config(v).pop("IamInstanceProfile"), "gpu.node_config.IamInstanceProfile", "cannot write"),
    "the head's profile": (lambda v: node_config(v).update(node_config(v, "head")), "gpu.node_config.IamInstanceProfile", "could start machines"),
    "old metadata": (lambda v: node_config(v)["MetadataOptions"].update(HttpTokens="optional"), "gpu.node_config.MetadataOptions", "HttpTokens"),
    "never idle": (lambda v: v.update(idle_timeout_minutes=0), "idle_timeout_minutes", "from 1 on"),
    "no bound": (lambda v: v.pop("max_workers"), "max_workers", "bounds the cost of a forgotten cluster"),
    "a path": (lambda v: v["file_mounts"].update({"~/x": "no/such/folder"}), "file_mounts.~/x", "no/such/folder does not exist"),
    "no mode": (lambda v: v.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]), "worker_start_ray_commands", "RAY_AUTH_MODE=token"),
    "open": (lambda v: v.update(head_start_ray_commands=[v["head_start_ray_commands"][1].replace("127.0.0.1", "::")]), "head_start_ray_commands", "--dashboard-host"),
    "Ray's commands": (lambda v: v.pop("head_start_ray_commands"), "head_start_ray_commands", "without a token"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_ray_takes_without_a_word_is_refused(damage: str, home: Path) -> None:
    do, at, what = DAMAGE[damage]
    value = filled(AWS)
    do(value)
    said = found(value, home)
    assert len(said) == 1 and next(iter(said)).endswith(at) and what in next(iter(said.values())), said


def test_a_token_that_is_missing_or_that_others_can_read_is_refused(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.chmod(0o644)
    assert "chmod 600" in found(filled(LOCAL), home)["file_mounts.~/.ray/auth_token"]
    token.unlink()
    assert "ray get-auth-token --generate" in found(filled(LOCAL), home)["file_mounts.~/.ray/auth_token"]


def test_make_looks_at_the_file_before_ray_gets_it() -> None:
    said = subprocess.run(
        ["make", "-n", "cluster", "CLUSTER=mine.yaml"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert (
        0
        < said.index("-m orchestrator.cluster.check_config mine.yaml")
        < said.index("ray up --no-config-cache mine.yaml")
    )


# ------------------------------------------------------------------------------------------------------- the files' own


def test_the_aws_file_costs_nothing_while_nothing_waits_and_has_a_bound() -> None:
    value = filled(AWS)
    kinds = dict(value["available_node_types"])
    head = kinds.pop(value["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    assert kinds and value["max_workers"] <= 4 and 0 < value["idle_timeout_minutes"] <= 10
    for kind in kinds.values():
        assert kind["min_workers"] == 0 and kind["resources"]["GPU"] >= 1
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert value["provider"]["cache_stopped_nodes"] is False
    assert "security_group" not in value["provider"], "Ray would only add to a group that is open to the world"


def test_each_spot_worker_waits_for_its_notice_with_the_token_and_nobody_else_does() -> None:
    value = filled(AWS)
    *_, last = value["worker_start_ray_commands"]
    assert (
        last.startswith("export RAY_AUTH_MODE=token;")
        and "nohup setsid python -m orchestrator.cluster.spot_watcher" in last
    )
    assert last.endswith("2>&1 < /dev/null &"), "else the command of `ray up` waits for it"
    others = [*value["head_start_ray_commands"], *filled(LOCAL)["worker_start_ray_commands"]]
    assert not [command for command in others if "preemption" in command]


def test_the_local_file_asks_for_the_autoscaler_that_starts_all_machines() -> None:
    (start,) = (command for command in filled(LOCAL)["head_start_ray_commands"] if "--head" in command)
    assert 0 <= start.index("RAY_enable_autoscaler_v2=0") < start.index("ray start") and "--num-cpus=0" in start


@pytest.mark.parametrize("file", [AWS, LOCAL], ids=lambda file: file.stem)
def test_every_command_of_ray_says_the_mode_and_none_reports_usage(file: Path) -> None:
    value = filled(file)
    starts = [
        c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in value[key] if "ray start" in c
    ]
    assert len(starts) == 2
    assert all(command.startswith("export RAY_AUTH_MODE=token") for command in starts)
    assert "--disable-usage-stats" in starts[0]
    assert any("RAY_AUTH_MODE=token" in command and ".bashrc" in command for command in value["setup_commands"])
    assert any("cluster.lock" in command for command in value["setup_commands"])


# ---------------------------------------------------------------------------------------------------------- Ray's schema


def check(value: Any) -> Any:
    """Checks as `ray up` does. Uses a private module of Ray, which has no public function for that."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(value))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("file", [AWS, LOCAL], ids=lambda file: file.stem)
def test_rays_own_schema_takes_the_files(file: Path) -> None:
    prepared = check(filled(file))
    workers = {name: kind for name, kind in prepared["available_node_types"].items() if kind.get("min_workers")}
    assert bool(workers) is (file == LOCAL)
    assert len(prepared["head_setup_commands"]) == len(prepared["worker_setup_commands"]) == 3


def test_rays_own_schema_would_say_no() -> None:
    with pytest.raises(Exception, match="None is not of type 'string'"):  # so plain `ray up` refuses it as shipped
        check(read(AWS.read_text()))
    for key in ("max_workrs", "idle_timeout"):
        with pytest.raises(Exception, match=key):
            check({**filled(AWS), key: 1})


def ask_for(config: Any) -> str:
    """What botocore's own model of the call finds wrong with a machine's description."""
    session = pytest.importorskip("botocore.session", reason="needs the extra `aws`").get_session()
    from botocore.validate import ParamValidator

    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    return str(ParamValidator().validate({**config, "MinCount": 1, "MaxCount": 1}, shape).generate_report())


@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_what_is_asked_of_aws_has_the_names_that_aws_knows(kind: str) -> None:
    config = node_config(filled(AWS), kind)
    assert ask_for(config) == ""
    assert "InstanceTyp" in ask_for({**config, "InstanceTyp": "g5.2xlarge"})
    assert "HttpToken" in ask_for({**config, "MetadataOptions": {"HttpToken": "required"}})


# --------------------------------------------------------------------------------------------------------------- the lock


def locked() -> dict[str, list[str]]:
    """Package -> the versions of its lines; several where they differ between versions of Python."""
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "cluster.lock").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition(";")[0].strip().partition("==")
            assert version, f"{line}: not one version"
            pins.setdefault(canonicalize_name(name), []).append(version)
    return pins


def wanted() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["aws"]])


def test_the_lock_holds_what_the_project_asks_for() -> None:
    pins = locked()
    for requirement in wanted():
        versions = pins.get(canonicalize_name(requirement.name), [])
        assert versions and all(requirement.specifier.contains(version) for version in versions), f"{requirement}: {versions}"  # fmt: skip
    assert "boto3" in pins, "Ray's on AWS"
    assert "setuptools" in pins, "the project itself is installed without a build environment of its own"
