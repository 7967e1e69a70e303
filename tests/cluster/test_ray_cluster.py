"""Starting Ray and joining one: who may connect, in which mode, and how many slots there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator import sweep
from orchestrator.cluster import ray_cluster
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Slot
from tests.support.sweeps import write_study

ROOT = Path(__file__).parents[2]


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus, "memory": 1e9, **({"GPU": gpus} if gpus else {})}
    return {"Alive": alive, "Resources": resources}


# --------------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize(
    ("nodes", "slot", "expected"),
    [
        ([node(8)], {"cpus": 1}, 8),
        ([node(8)], {"cpus": 3}, 2),
        ([node(3), node(3)], {"cpus": 2}, 2),  # what is left of two nodes is no third
        ([node(4)], {"cpus": 0.1}, 40),
        ([node(2)], {"cpus": 0.3}, 6),
        ([node(1)], {"cpus": 2}, 0),
        ([node(64, 2)], {"gpus": 1}, 2),
        ([node(64, 2)], {"gpus": 0.6}, 2),  # one on each device
        ([node(64, 2)], {"gpus": 0.5}, 4),
        ([node(64, 2)], {"gpus": 0.3}, 6),
        ([node(64, 1)], {"gpus": 0.1}, 10),
        ([node(64, 1)], {"gpus": 0.2}, 5),
        ([node(4, 2)], {"cpus": 2, "gpus": 0.25}, 2),  # the cores are what is short
        ([node(64), node(1, 8)], {"cpus": 1, "gpus": 1}, 1),  # cores of one node do not serve devices of another
        ([node(8, 1), node(8, 1)], {"cpus": 8, "gpus": 1}, 2),
        ([node(8), node(8, alive=False)], {"cpus": 1}, 8),
        ([], {"cpus": 1}, 0),
        ([{"Alive": True, "Resources": {"memory": 1.0}}], {"cpus": 1}, 0),  # a head that trains nothing
        ([node(4)], {"workers": 2, "cpus": 1}, 2),
        ([node(3), node(3)], {"workers": 2, "cpus": 1}, 3),  # a group may span nodes
        ([node(3), node(3)], {"workers": 2, "cpus": 2}, 1),
        ([node(1)], {"workers": 2, "cpus": 1}, 0),
        ([node(16, 8), node(16, 8)], {"workers": 4, "cpus": 1, "gpus": 1}, 4),
        ([node(16, 3), node(16, 3)], {"workers": 2, "cpus": 1, "gpus": 1}, 3),
        ([node(64, 2)], {"workers": 2, "gpus": 0.6}, 1),
    ],
)
def test_slots_are_counted_node_by_node_and_device_by_device(
    nodes: list[dict[str, Any]], slot: dict[str, Any], expected: int
) -> None:
    assert ray_cluster.num_slots(nodes, Slot(**slot)) == expected


def test_a_worker_uses_one_device() -> None:
    assert Slot(gpus=1).gpus == 1
    with pytest.raises(ValidationError, match=r"at most 1; got 2\.5: give `workers: 3, gpus: 1`"):
        Slot(gpus=2.5)


HEAD = {"Alive": True, "Resources": {"memory": 1e9, "node:__internal_head__": 1.0}}


def scaling(max_workers: int, **kinds: tuple[int, dict[str, float]]) -> dict[str, Any]:
    """As `ray up` leaves it on the head: of each kind of machine how many there may be, and what one has."""
    types = {name: {"min_workers": 0, "max_workers": n, "resources": have} for name, (n, have) in kinds.items()}
    return {"max_workers": max_workers, "head_node_type": "head", "available_node_types": {"head": {"resources": {"CPU": 99, "GPU": 99}}, **types}}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "nodes", "slot", "expected"),
    [
        (scaling(4, g5=(4, {"CPU": 8, "GPU": 1})), [HEAD], {"gpus": 1}, 4),  # none is there yet
        (scaling(4, g5=(4, {"CPU": 8, "GPU": 1})), [HEAD, node(8, 1)], {"gpus": 1}, 4),  # one of the four
        (scaling(3, g5=(9, {"CPU": 8, "GPU": 1})), [HEAD], {"gpus": 1}, 3),  # the bound is over all kinds
        (scaling(3, g5=(9, {"CPU": 8, "GPU": 1}), p5=(2, {"CPU": 192, "GPU": 8})), [HEAD], {"gpus": 1}, 17),
        (scaling(4, cheap=(4, {"CPU": 2})), [HEAD], {"gpus": 1}, 0),
        (scaling(4, g5=(4, {"CPU": 8, "GPU": 1})), [HEAD], {"gpus": 0.5, "workers": 2}, 4),
        (scaling(2, mine=(0, {})), [HEAD, node(8), node(4)], {"cpus": 2}, 6),  # machines that one has: what is there
    ],
)
def test_slots_of_a_cluster_that_grows_are_those_it_could_have(
    config: dict[str, Any], nodes: list[dict[str, Any]], slot: dict[str, Any], expected: int
) -> None:
    wanted = Slot(**slot)
    assert ray_cluster.num_slots(ray_cluster.when_all_are_there(nodes, config, wanted), wanted) == expected


@pytest.mark.parametrize("storage", ["./runs", "runs", "../elsewhere/runs"])
def test_a_folder_of_one_machine_is_refused_where_there_are_more(storage: str) -> None:
    with pytest.raises(StudyError, match=r"the cluster has 3 machines; give a URI"):
        ray_cluster.check_shared(storage, 3, False)
    with pytest.raises(StudyError, match="machines that come and go"):
        ray_cluster.check_shared(storage, 1, True)
    ray_cluster.check_shared(storage, 1, False)


def test_what_all_machines_can_reach_is_taken() -> None:
    for storage in ("s3://bucket/runs", "/mnt/share/runs", None):
        ray_cluster.check_shared(storage, 3, True)


def test_a_cluster_is_waited_for_until_all_are_there_or_too_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later = [[HEAD], [HEAD, node(2)], [HEAD, node(2), node(2)]]
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: later.pop(0) if len(later) > 1 else later[0])
    monkeypatch.setattr(ray_cluster.time, "sleep", lambda _: None)
    config = {"available_node_types": {"local": {"min_workers": 2}}, "head_node_type": "local"}
    assert len(ray_cluster.wait_for_workers(config)) == 3
    assert "waiting for the cluster's machines: 0 of 2 are there" in capsys.readouterr().out
    monkeypatch.setattr(ray_cluster, "JOIN_SECONDS", -1.0)
    later[:] = [[HEAD, node(2), node(2, alive=False)]]
    assert len(ray_cluster.wait_for_workers(config)) == 2
    assert "continuing with 1 of the cluster's 2 machines" in capsys.readouterr().out
    later[:] = [[HEAD]]
    assert len(ray_cluster.wait_for_workers(None)) == 1 and capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------- mode


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, in a process whose Ray has read no mode. Ray's own switches are per process, so they are
    replaced here; the slow tests below set them in processes of their own."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(ray_cluster, "reload_authentication", lambda: None)
    monkeypatch.setattr(ray_cluster, "listen_on_loopback", lambda: None)
    monkeypatch.setattr(ray_cluster, "requires_token", lambda: True)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: None)
    (tmp_path / ".ray").mkdir()
    return tmp_path


def test_a_token_is_found_where_ray_looks_for_one(home: Path) -> None:
    file = home / ".ray" / "auth_token"
    assert not ray_cluster.has_token({}, home) and not ray_cluster.has_token({"RAY_AUTH_TOKEN": ""}, home)
    assert ray_cluster.has_token({"RAY_AUTH_TOKEN": "t"}, home)
    assert not ray_cluster.has_token({"RAY_AUTH_TOKEN_PATH": str(home / "t")}, home)
    file.write_text("\n")
    assert not ray_cluster.has_token({}, home)
    file.write_text("t\n")
    assert ray_cluster.has_token({}, home) and ray_cluster.has_token({"RAY_AUTH_TOKEN_PATH": str(file)}, home)
    assert not ray_cluster.has_token({"RAY_AUTH_TOKEN_PATH": str(home / "t")}, home), (
        "the named file is the one that counts"
    )


@pytest.mark.parametrize(
    ("given", "file", "mode", "warned"),
    [
        ("token", None, "token", False),
        ("disabled", "t", "disabled", False),  # what the user says stands
        (None, "t", "token", False),
        ("", "t", "token", False),
        (None, None, "disabled", True),
    ],
)
def test_the_mode_is_always_explicit(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    given: str | None, file: str | None, mode: str, warned: bool,
) -> None:  # fmt: skip
    if given is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", given)
    if file is not None:
        (home / ".ray" / "auth_token").write_text(file)
    joined = []
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **options: joined.append(os.environ.get("RAY_AUTH_MODE")))
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [node(2)])
    monkeypatch.setattr(ray_cluster, "autoscaler_config", lambda: None)
    assert ray_cluster.start_ray("10.0.0.1:6379", Slot()) == 2
    assert joined == [mode]
    said = capsys.readouterr().err
    assert (said.count("warning: no token for the Ray at 10.0.0.1:6379") == 1) is warned and said.count("\n") == warned
    ray_cluster.stop_ray()
    assert os.environ.get("RAY_AUTH_MODE") == given


def test_where_no_ray_answers_one_line_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at nowhere:1\nand more")

    monkeypatch.setattr(ray_cluster.ray, "init", fails)
    with pytest.raises(
        StudyError, match=r"--address nowhere:1: no Ray answers \(Failed to connect .*nowhere:1\)"
    ) as said:
        ray_cluster.start_ray("nowhere:1", Slot())
    assert "\n" not in str(said.value) and "mode here: disabled" in str(said.value)


def test_a_ray_that_does_not_come_up_is_told_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("The current node timed out during startup.\nand more")

    monkeypatch.setattr(ray_cluster.ray, "init", fails)
    monkeypatch.setattr(ray_cluster.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    before = dict(os.environ)
    with pytest.raises(
        ray_cluster.NotStarted, match=r"Ray did not start \(The current node timed out during startup\.\)"
    ):
        ray_cluster.start_ray(None, Slot())
    assert {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")} == {
        name: before.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    }


@pytest.mark.slow
def test_a_sweep_whose_ray_does_not_come_up_ends_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> int:
        raise ray_cluster.NotStarted("Ray did not start (too slow)")

    monkeypatch.setattr(ray_cluster, "start_ray", fails)
    assert sweep.main([str(write_study(tmp_path)), "--storage", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr()
    assert "Ray did not start (too slow); no finished trial is lost" in said.out and "Traceback" not in said.err


@pytest.mark.parametrize("where", ["10.1.2.3", "::", "192.168.0.9"])
def test_a_ray_that_would_listen_beyond_loopback_is_not_started(
    home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(ray_cluster.ray.util, "get_node_ip_address", lambda: where)
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **options: started.append(options))
    with pytest.raises(StudyError, match=f"would listen at {where}"):
        ray_cluster.start_ray(None, Slot())
    assert not started
    ray_cluster.stop_ray()


# --------------------------------------------------------------------------------------------------------- a real Ray


START = """
import json, os, sys
from orchestrator.cluster import ray_cluster as cluster
from orchestrator.study.schema import Slot
before = dict(os.environ)
slots = cluster.start_ray(None, Slot())
import ray
jobs = ray._private.worker.global_worker.gcs_client.get_all_job_info()
print(json.dumps({"slots": slots, "at": ray.get_runtime_context().gcs_address, "token": os.environ["RAY_AUTH_TOKEN"],
                  "mode": os.environ["RAY_AUTH_MODE"], "jobs": str(jobs)}), flush=True)
sys.stdin.readline()
cluster.stop_ray()
names = {name for name in {*before, *os.environ} if name.startswith("RAY_AUTH") or name.endswith(("_IFNAME", "_METRIC_PORT"))}
print(json.dumps([name for name in names if os.environ.get(name) != before.get(name)]), flush=True)
"""
JOIN = """
import sys
from orchestrator.cluster import ray_cluster as cluster
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Slot
try:
    print("joined", cluster.start_ray(sys.argv[1], Slot()))
except StudyError as error:
    print("error:", error)
"""


@pytest.mark.slow
def test_only_who_has_the_token_can_connect(tmp_path: Path) -> None:
    """Also: the token is ours and new although the user has one, nothing of the user's is changed, and Ray keeps no command
    line."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    (tmp_path / ".ray").mkdir()
    theirs = tmp_path / ".ray" / "auth_token"
    theirs.write_text("a" * 64)
    clean |= {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(theirs), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-c", START, "--tracking-uri", "http://me:PASSWORD@host"]
    ours = subprocess.Popen(command, env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert ours.stdin is not None and ours.stdout is not None
    try:
        about = json.loads(ours.stdout.readline())
        assert about["mode"] == "token" and len(about["token"]) == 64 and about["token"] != "a" * 64
        assert about["at"].startswith("127.0.0.1:") and about["slots"] == len(os.sched_getaffinity(0))
        assert "orchestrator.sweep" in about["jobs"] and "PASSWORD" not in about["jobs"]

        def joining(**environment: str) -> subprocess.Popen[str]:
            # else Ray takes 127.0.0.1 for the machine's own address, where ours does not listen
            env = {**clean, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **environment}
            return subprocess.Popen([sys.executable, "-c", JOIN, about["at"]], env=env, stdout=subprocess.PIPE, text=True)  # fmt: skip

        wrong = [joining(), joining(RAY_AUTH_MODE="token"), joining(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="b" * 64)]
        right = joining(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=about["token"])
        assert right.communicate(timeout=120)[0].startswith(f"joined {about['slots']}")
        for process in wrong:
            said = process.communicate(timeout=120)[0]
            assert said.startswith(f"error: --address {about['at']}: no Ray answers") and about["token"] not in said
        ours.stdin.write("\n")
        ours.stdin.flush()
        assert json.loads(ours.stdout.readline()) == [], "the environment is not what it was"
        assert theirs.read_text() == "a" * 64 and [p.name for p in (tmp_path / ".ray").iterdir()] == ["auth_token"]
    finally:
        ours.kill()
        ours.communicate()
