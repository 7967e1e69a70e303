"""A spot machine that is taken away: what EC2 says of it, by a server here that speaks as EC2's does, and what follows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from orchestrator.cluster import spot_node, spot_watcher
from orchestrator.scheduling import slot
from orchestrator.study.load import load_study
from orchestrator.study.schema import Slot
from tests.support.sweeps import (
    MARK,
    RARELY,
    ROOT,
    Bench,
    attempts,
    began_at,
    checkpoints,
    ended,
    finish,
    marked,
    run_alone,
    same_numbers,
    tell,
    until,
    write_study,
)
from trainables.runtime.outcome import Outcome, Status
from trainables.runtime.trial_attempt import Job
from trainables.training.stop_signals import StopReason

SPOT = {"instance-life-cycle": "spot"}


@dataclass
class Metadata:
    """EC2's metadata service, version 2: a token by PUT, then answers by GET; 404 for what it does not know."""

    answers: dict[str, str] = field(default_factory=dict)
    silent: bool = False  # takes requests and never answers
    asked: list[str] = field(default_factory=list)
    refused: int = 0
    endpoint: str = ""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    told = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, code: int, text: str = "") -> None:
            if told.silent:
                time.sleep(3)
            with suppress(OSError):
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

        def do_PUT(self) -> None:
            has_ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit()
            self.answer(200 if self.path == "/latest/api/token" and has_ttl else 400, "a token")

        def do_GET(self) -> None:
            path = self.path.removeprefix("/latest/meta-data/")
            told.asked.append(path)
            if self.headers.get("X-aws-ec2-metadata-token") != "a token":
                told.refused += 1
                self.answer(401)
            elif path in told.answers:
                self.answer(200, told.answers[path])
            else:
                self.answer(404, "<html>not found</html>")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield told
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def surroundings(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.endpoint)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # asked there, nobody would answer


def notice(seconds: float = 120) -> str:
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})


# ------------------------------------------------------------------------------------------------------ what EC2 says


def test_it_asks_with_a_token_and_knows_what_is_not_there(metadata: Metadata) -> None:
    metadata.answers |= SPOT
    assert spot_watcher.read(metadata.endpoint, "instance-life-cycle") == "spot"
    assert spot_watcher.read(metadata.endpoint + "/", "spot/instance-action") is None and not metadata.refused
    assert spot_watcher.why_not(metadata.endpoint, 0) is None


def test_a_notice_is_waited_for_through_silence_and_nonsense(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spot_watcher, "ANSWER_SECONDS", 0.2)
    found: list[float] = []
    waiting = threading.Thread(target=lambda: found.append(spot_watcher.wait(metadata.endpoint, 0.05)), daemon=True)
    waiting.start()
    time.sleep(0.3)
    metadata.silent = True
    time.sleep(0.6)
    metadata.silent = False
    assert waiting.is_alive() and set(metadata.asked) == {"spot/instance-action"}, "nothing else is heeded"
    metadata.answers["spot/instance-action"] = notice(100)
    waiting.join(10)
    assert found and found[0] - time.time() == pytest.approx(100, abs=5)
    assert capsys.readouterr().err.count("does not answer") == 1


def test_when_the_machine_goes() -> None:
    at = datetime(2017, 9, 18, 8, 22, tzinfo=UTC).timestamp()
    assert spot_watcher.taken_at('{"action": "terminate", "time": "2017-09-18T08:22:00Z"}', 0) == at
    assert spot_watcher.taken_at('{"action": "stop", "time": "2017-09-18T08:22:00"}', 0) == at
    for odd in ("", "{}", "[]", '{"time": 7}', '{"time": "soon"}'):
        assert spot_watcher.taken_at(odd, 1000) == 1000 + spot_watcher.NOTICE_SECONDS


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"instance-life-cycle": "on-demand"}, "no spot machine (on-demand)"),
        ({}, "no spot machine (unknown kind)"),
        (None, "no metadata service answers"),
        ("silent", "no metadata service answers"),
    ],
)
def test_where_no_notice_can_come_it_ends_with_a_line(
    metadata: Metadata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    answers: Any, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(spot_watcher, "ANSWER_SECONDS", 0.2)
    if answers is None:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    elif answers == "silent":
        metadata.silent = True
    else:
        metadata.answers |= answers
    assert spot_watcher.main(["--lock", str(tmp_path / "lock"), "--every", "0.05"]) == 0
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == 1
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert spot_watcher.main(["--lock", str(tmp_path / "lock")]) == 0
    assert "AWS_EC2_METADATA_DISABLED" in capsys.readouterr().out


def test_a_machine_is_watched_once_and_again_after_a_kill(metadata: Metadata, tmp_path: Path) -> None:
    metadata.answers |= SPOT
    lock = str(tmp_path / "lock")
    command = [sys.executable, "-m", "orchestrator.cluster.spot_watcher", "--lock", lock, "--every", "0.1"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = start()
    try:
        assert first.stdout is not None and "waiting for the termination notice" in first.stdout.readline()
        second = start()
        assert "watched already" in second.communicate(timeout=60)[0] and second.returncode == 0
        assert first.poll() is None
        first.kill()
        first.wait()
        first = start()
        assert first.stdout is not None and "waiting for the termination notice" in first.stdout.readline()
    finally:
        first.kill()
        first.communicate()


# ------------------------------------------------------------------------------------------------------ processes that are asked


def test_ranks_are_told_before_slots_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(spot_node.os, "kill", lambda pid, number: sent.append((pid, number)))
    ranks, slots = {11, 12}, {21}
    told = spot_node.tell({spot_node.RANK: ranks, spot_node.SLOT: slots}, set())
    assert told == ranks
    assert spot_node.tell({spot_node.RANK: {12}, spot_node.SLOT: slots}, told) == set(), "one still writes"
    told |= spot_node.tell({spot_node.RANK: set(), spot_node.SLOT: slots}, told)
    assert spot_node.tell({spot_node.RANK: set(), spot_node.SLOT: slots}, told) == set()
    assert sorted(sent) == [(pid, signal.SIGTERM) for pid in (11, 12, 21)]


def test_the_node_is_the_one_with_this_machines_address(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"NodeID": name, "Alive": alive, "NodeManagerAddress": at}
            for name, alive, at in (("old", False, "10.0.0.2"), ("mine", True, "10.0.0.2"), ("other", True, "10.0.0.3"))]  # fmt: skip
    monkeypatch.setattr(spot_node.GlobalState, "_initialize_global_state", lambda *_: None)
    monkeypatch.setattr(spot_node.GlobalState, "node_table", lambda _: rows)
    monkeypatch.setattr(spot_node, "get_node_ip_address", lambda _: "10.0.0.2")
    assert spot_node.RayNode.join("10.0.0.1:6379", None).node == "mine"
    rows[2]["NodeManagerAddress"] = "10.0.0.2"
    with pytest.raises(LookupError, match=r"2 nodes of the Ray at 10.0.0.1:6379 have the address 10.0.0.2"):
        spot_node.RayNode.join("10.0.0.1:6379", None)


def test_a_ray_that_does_not_answer_is_asked_again_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Busy(spot_node.RayNode):
        tries = 0

        def drain(self, taken: float) -> None:
            Busy.tries += 1
            if Busy.tries < 3:
                raise RuntimeError("not now")

        def processes(self) -> dict[str, set[int]]:
            return {spot_node.SLOT: set(), spot_node.RANK: set()}

        def is_alive(self) -> bool:
            return Busy.stays

        stays = False

    monkeypatch.setattr(spot_node.RayNode, "join", lambda *_: Busy("10.0.0.1:6379", "mine"))
    assert spot_node.leave("auto", None, time.time() + 60) == 0 and Busy.tries == 3
    said = capsys.readouterr()
    assert "node mine has ended" in said.out and said.err.count("not now; trying again") == 2
    Busy.stays = True
    assert spot_node.leave("auto", None, time.time() + 1) == 0
    assert "deadline passed; 0 processes" in capsys.readouterr().out
    Busy.tries = -100
    assert spot_node.leave("auto", None, time.time() + 1) == 1
    assert "deadline passed; Ray unreachable, trials not notified" in capsys.readouterr().err
    Busy.stays, Busy.tries = False, 3
    assert spot_node.leave("auto", None, time.time() - 5) == 0  # over by this clock, and the machine is still there
    assert "node mine has ended" in capsys.readouterr().out


def test_tune_does_not_count_a_process_that_was_told_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.experiment import Trial

    job = Job(trial="t", spec="", fingerprints={}, storage="", folder="", threads=1, device="cpu", checkpoint_at_reports=False, provenance={})  # fmt: skip
    monkeypatch.setattr(slot, "run", lambda *_: Outcome(Status.SUSPENDED, StopReason.TERMINATED))
    monkeypatch.setattr(slot, "own_fault", lambda _: None)
    monkeypatch.setattr(slot.tune, "report", lambda _: None)
    with pytest.raises(RayActorError, match="its checkpoint is written") as told:
        slot.run_in_slot(
            {"study": "", "slot": Slot().model_dump_json(), "job": json.dumps(asdict(job)), "expected": ""}
        )
    monkeypatch.setattr(Trial, "local_path", None)
    trial = Trial("x", stub=True)
    for error, counted in ((told.value, 0), (RuntimeError("an error"), 1), (told.value, 1)):
        trial.handle_error(RayTaskError("train", "the traceback", error))
        assert trial.run_metadata.num_failures == counted


# --------------------------------------------------------------------------------------------------------- a real Ray


CLUSTER = """
import json, sys
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray would take 127.0.0.1 for the machine's own address
from ray.cluster_utils import Cluster
import ray._private.utils
ray._private.utils.write_ray_address = lambda *_: None  # this is not the machine's Ray
here, num_cpus = {"node_ip_address": "127.0.0.1"}, int(sys.argv[1])
head = {"num_cpus": 0, "include_dashboard": num_cpus > 1, "dashboard_host": "127.0.0.1"}  # groups need its state API
cluster = Cluster(initialize_head=True, head_node_args={**head, **here})
nodes = [cluster.add_node(num_cpus=num_cpus, include_dashboard=False, **here).node_id for _ in range(2)]
print(json.dumps({"address": cluster.address, "nodes": nodes}), flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@dataclass
class TwoMachines:
    """A head that trains nothing and two nodes of one Ray, all on loopback."""

    address: str
    nodes: list[str]

    def processes(self) -> list[dict[str, set[int]]]:
        return [spot_node.RayNode.join(self.address, node).processes() for node in self.nodes]


@pytest.fixture
def machines(bench: Bench, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoMachines]:
    from orchestrator.cluster.ray_internals import reload_authentication

    secret = os.urandom(32).hex()
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    reload_authentication()
    process = subprocess.Popen([sys.executable, "-c", CLUSTER, str(request.param)], env={**os.environ, MARK: bench.mark},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        yield TwoMachines(**json.loads(process.stdout.readline()))
    finally:
        with suppress(subprocess.TimeoutExpired):
            process.communicate("\n", timeout=60)
        process.kill()
        process.communicate()
        bench.left(60)


def watch(bench: Bench, metadata: Metadata, machines: TwoMachines, node: str) -> subprocess.Popen[str]:
    metadata.answers |= SPOT
    command = [sys.executable, "-m", "orchestrator.cluster.spot_watcher", "--lock", str(bench.folder / "lock"), "--every", "0.5",
               "--address", machines.address, "--node", node]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, MARK: bench.mark}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert process.stdout is not None and "waiting for the termination notice" in process.stdout.readline()
    return process


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("machines", [1], indirect=True)
def test_a_trial_leaves_a_machine_that_is_taken_away_and_nothing_begins_there(
    bench: Bench, metadata: Metadata, machines: TwoMachines
) -> None:
    """No checkpoint is due in this study, so those that are there were written on notice."""
    arms = "arms: {one: {phases.distil.terms.soft.weight: 0}, two: {phases.distil.optimizer.lr: 4e-3}}\nseeds: 1\n"
    study, storage = write_study(bench.folder, steps=5000, rest=arms + RARELY), bench.folder / "runs"
    driver = bench.start(study, "--address", machines.address)
    until(lambda: len(list(storage.glob("study/trials/*/attempt-1/records.jsonl"))) > 1, driver, 300)
    until(lambda: all(len(found[spot_node.SLOT]) == 1 for found in machines.processes()), driver, 300)
    (taken,) = machines.processes()[0][spot_node.SLOT]
    watcher = watch(bench, metadata, machines, machines.nodes[0])
    assert not [path for trial in attempts(storage) for path in storage.glob(f"study/trials/{trial}/*/checkpoint.json")]
    since = time.monotonic()
    metadata.answers["spot/instance-action"] = notice()
    until(lambda: checkpoints(storage, 1), driver)
    tell("spot notice: the checkpoint was written", since)
    said = watcher.communicate(timeout=130)[0]
    assert watcher.returncode == 0 and "1 processes of trials were asked to stop" in said
    until(lambda: taken not in marked(bench.mark), driver)
    assert machines.processes()[0] == {spot_node.SLOT: set(), spot_node.RANK: set()}
    (trial,) = checkpoints(storage, 1)
    until(lambda: "attempt-2" in attempts(storage)[trial], driver, 240)
    tell("spot notice, with the wait for the other slot", since)
    assert len(machines.processes()[1][spot_node.SLOT]) == 1
    finish(driver, timeout=300, quiet=False)  # Tune tells of the slot at length
    assert {end["status"] for end in ended(storage).values()} == {"ended"}
    assert ended(storage)[trial]["attempts"] == 2
    begun = began_at(storage, trial)
    assert len(begun) == 2 and begun[1] > 0
    arm = json.loads((storage / "study" / "trials" / trial / "trial.json").read_text())["arm"]
    run_alone(load_study(study).spec(arm=arm, seed=0), bench.folder / "plain")
    assert same_numbers(storage, trial, bench.folder / "plain"), "no step was lost, none done twice"


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("machines", [2], indirect=True)
def test_a_group_leaves_a_machine_that_is_taken_away(bench: Bench, metadata: Metadata, machines: TwoMachines) -> None:
    """Both ranks lie on one machine, and the slot that holds them on any of the three (Ray chooses)."""
    rest = "arms: {alone: {phases.distil.terms.soft.weight: 0}}\nseeds: 1\nslot: {workers: 2}\n"
    study, storage = write_study(bench.folder, steps=2000, rest=rest + RARELY), bench.folder / "runs"
    driver = bench.start(study, "--address", machines.address)
    until(lambda: list(storage.glob("study/trials/*/attempt-1/records.jsonl")), driver, 300)
    before = machines.processes()
    taken = max((0, 1), key=lambda at: len(before[at][spot_node.RANK]))
    watcher = watch(bench, metadata, machines, machines.nodes[taken])
    since = time.monotonic()
    metadata.answers["spot/instance-action"] = notice()
    (trial,) = until(lambda: checkpoints(storage, 1), driver)
    tell("spot notice to a group: the checkpoint was written", since)
    said = watcher.communicate(timeout=130)[0]
    assert watcher.returncode == 0 and "were asked to stop" in said
    until(lambda: "attempt-2" in attempts(storage)[trial], driver, 240)
    tell("spot notice to a group", since)
    assert len(machines.processes()[1 - taken][spot_node.RANK]) == 2
    finish(driver, timeout=300, quiet=False)
    end, begun = ended(storage)[trial], began_at(storage, trial)
    assert end["status"] == "ended" and begun[0] == 0 < begun[-1]
