"""The mirror against real stores: SQLite files here, an `mlflow server` on loopback in the slow test."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator import mlflow_sync
from orchestrator.mlflow_sync import Mirror, redact
from orchestrator.study.paths import sqlite_uri

START = 1_700_000_000_000  # UTC ms
SECRET = "hunter2/secret"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mlflow_sync.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # so that what the mirror sets does not outlive the test


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store with its tables and nothing in them: to make the tables takes seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mirror = Mirror(f"sqlite:///{path}", "other")
    mirror.start()
    assert mirror.close(60) == 0, mirror.problem
    return path


@pytest.fixture
def uri(empty: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(empty, tmp_path / 'mlflow.db')}"


def trial(index: int = 0, status: str = "ended", **changes: Any) -> dict[str, Any]:
    row = {
        "trial": f"{index:012x}",
        "study": "smoke",
        "point": f"p{index}",
        "arm": "both",
        "seed": index,
        "kind": "trial",
        "planned": True,
        "params": {"student.layers": 2, "terms": {"kd": 0.5}},
        "status": status,
        "reason": None,
        "started": START,
        "ended": None if status == "running" else START + 60_000,
    }
    return row | changes


def rows(
    *steps: int, metric: str = "mlm_loss", split: str = "dev", t: int = START, value: float = 0.5
) -> list[dict[str, Any]]:
    where = {"phase": "distil", "model": "student", "task": "corpus", "split": split, "metric": metric}
    return [{**where, "step": step, "t": t + 1000 * step, "value": value + step} for step in steps]


def mirrored(uri: str, *puts: tuple[dict[str, Any], list[dict[str, Any]]], end: str | None = None) -> Mirror:
    mirror = Mirror(uri, "smoke", every=0.05)
    mirror.start()
    for put in puts:
        mirror.put(*put)
    if end:
        mirror.finish(end)
    assert mirror.close(60) == 0, mirror.problem
    assert mirror.problem is None
    return mirror


def runs(uri: str) -> tuple[Any, dict[str, Any]]:
    """The parent and the nested runs by the tag `trial`, read back by MLflow's own client; no run is there twice."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    (parent,) = [run for run in found if run.data.tags["kind"] == "study"]
    nested = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(found) == 1 + len(nested) == 1 + len({run.data.tags["trial"] for run in nested})
    return parent, {run.data.tags["trial"]: run for run in nested}


def points(uri: str, run: Any) -> list[tuple[str, int, int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    history = [client.get_metric_history(run.info.run_id, name) for name in sorted(run.data.metrics)]
    return [(point.key, point.step, point.timestamp, point.value) for metric in history for point in metric]


def reported(rows: list[dict[str, Any]]) -> list[tuple[str, int, int, float]]:
    def name(r: dict[str, Any]) -> str:
        return "/".join(r[key] for key in ("phase", "model", "task", "split", "metric"))

    return sorted((name(r), r["step"], r["t"], r["value"]) for r in rows)


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


# ------------------------------------------------------------------------------------------------------ what arrives


def test_a_trial_is_a_nested_run_with_its_tags_its_parameters_and_every_point(uri: str) -> None:
    some = rows(0, 10, 20) + rows(10, 20, metric="kd", split="train") + rows(10, metric="memory", split="system")
    mirrored(uri, (trial(7), some), end="ended")
    parent, nested = runs(uri)
    (run,) = nested.values()
    wanted = {"study": "smoke", "trial": f"{7:012x}", "point": "p7", "arm": "both", "seed": "7", "kind": "trial"}
    assert {key: run.data.tags.get(key) for key in wanted} == wanted
    assert run.data.tags["status"] == "ended"
    assert run.data.params == {"student.layers": "2", "terms.kd": "0.5"}
    assert points(uri, run) == reported(some)
    assert (run.info.start_time, run.info.end_time) == (START, START + 60_000)
    assert parent.data.tags["study"] == "smoke"
    assert parent.info.status == "FINISHED"


def test_the_parent_has_a_tag_for_the_verdict_on_each_claim(uri: str) -> None:
    mirror = Mirror(uri, "smoke")
    mirror.start()
    mirror.put(trial(1), rows(0))
    mirror.finish("ended", verdicts={"helps": "equivalent", "no (worse)?": "undecided, provisional"})
    assert mirror.close(60) == 0, mirror.problem
    tags = {name: tag for name, tag in runs(uri)[0].data.tags.items() if name.startswith("verdict.")}
    assert tags == {"verdict.helps": "equivalent", "verdict.no _worse__": "undecided, provisional"}


def test_every_status_of_a_trial_has_its_own_in_mlflow(uri: str) -> None:
    failed = trial(3, "failed", reason="diverged at step 20")
    mirrored(uri, *[(trial(i, status), []) for i, status in enumerate(["running", "ended", "stopped"])], (failed, []))
    _, nested = runs(uri)
    assert [nested[f"{i:012x}"].info.status for i in range(4)] == ["RUNNING", "FINISHED", "KILLED", "FAILED"]
    assert nested[f"{3:012x}"].data.tags["reason"] == "diverged at step 20"
    mirrored(uri, (trial(3, "running"), rows(1)))
    assert runs(uri)[1][f"{3:012x}"].info.status == "RUNNING"
    mirrored(uri, (trial(3), rows(1, 2)))
    assert runs(uri)[1][f"{3:012x}"].info.status == "FINISHED"


def test_rows_may_be_all_so_far_or_only_the_new_ones(uri: str) -> None:
    mirror = Mirror(uri, "smoke", every=0.01)
    mirror.start()
    for last in range(1, 5):
        mirror.put(trial(0, "running"), rows(*range(last)))
        mirror.put(trial(1, "running"), rows(last - 1))
        time.sleep(0.05)
    assert mirror.close(60) == 0
    for run in runs(uri)[1].values():
        assert points(uri, run) == reported(rows(0, 1, 2, 3))


def test_numbers_that_are_not_finite_arrive_and_are_not_doubled(uri: str) -> None:
    some = [r | {"value": v} for r, v in zip(rows(0, 1, 2), [math.nan, math.inf, -math.inf], strict=True)]
    mirrored(uri, (trial(0, "running"), some))
    mirrored(uri, (trial(0), some + rows(3)))
    values = [value for *_, value in points(uri, runs(uri)[1][f"{0:012x}"])]
    assert math.isnan(values[0])
    assert values[1:] == [sys.float_info.max, -sys.float_info.max, 3.5]  # as a SQL store keeps infinities


def test_many_points_long_values_and_odd_names_arrive(uri: str) -> None:
    params = {f"p{i}": "x" * 10_000 for i in range(250)} | {"what? %": None, "../up": [1, 2]}
    odd = [*rows(0, metric="recall@5 (α)"), rows(0)[0] | {"task": math.nan, "model": None, "metric": "m" * 300}]
    mirrored(uri, (trial(0, params=params), rows(*range(2100)) + odd))
    run = runs(uri)[1][f"{0:012x}"]
    assert len(points(uri, run)) == 2102
    assert {"distil/student/corpus/dev/recall_5 _α_", ("distil/dev/" + "m" * 300)[:250]} < set(run.data.metrics)
    assert run.data.params == {f"p{i}": "x" * 6000 for i in range(250)} | {"what_ _": "null", "up": "[1, 2]"}


def test_a_row_that_no_store_takes_does_not_hold_up_the_others(uri: str) -> None:
    mirror = Mirror(uri, "smoke", every=0.01)
    mirror.start()
    mirror.put(trial(0), [rows(0)[0] | {"value": "much"}])
    mirror.put(trial(1), rows(0))
    mirror.finish("ended")
    assert mirror.close(60) == 2
    assert mirror.problem is not None
    assert "refused 2 records of trial 000000000000" in mirror.problem
    parent, nested = runs(uri)
    assert points(uri, nested[f"{1:012x}"]) == reported(rows(0))
    assert parent.info.status == "FINISHED"


# ----------------------------------------------------------------------------------------------------- again, and on


def test_a_replay_doubles_nothing_and_sends_nothing(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    puts = [(trial(i), rows(*range(5)) + rows(2, metric="memory", split="system")) for i in range(5)]
    mirrored(uri, *puts)
    before = [points(uri, run) for run in runs(uri)[1].values()]
    requests: list[str] = []
    for name in ("create_run", "log_batch", "get_metric_history", "set_terminated", "update_run", "search_runs"):
        real = getattr(MlflowClient, name)

        def counted(self: Any, *args: Any, _name: str = name, _real: Any = real, **more: Any) -> Any:
            requests.append(_name)
            return _real(self, *args, **more)

        monkeypatch.setattr(MlflowClient, name, counted)
    mirrored(uri, *puts)
    assert requests == ["search_runs"]
    assert [points(uri, run) for run in runs(uri)[1].values()] == before


def test_a_later_command_finds_the_parent_and_the_trials_and_goes_on(uri: str) -> None:
    mirrored(uri, (trial(0), rows(0, 1)), (trial(1, "running"), rows(0)), end="stopped")
    parent, _ = runs(uri)
    assert parent.info.status == "KILLED"
    mirrored(uri)
    assert runs(uri)[0].info.status == "RUNNING"
    mirrored(uri, (trial(0), rows(0, 1)), (trial(1), rows(0, 1)), (trial(2), rows(0, 1)), end="ended")
    again, nested = runs(uri)
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    assert [points(uri, run) for run in nested.values()] == [reported(rows(0, 1))] * 3


def test_a_resumed_trial_that_measures_a_step_again_has_one_point_there(uri: str) -> None:
    machine = rows(1, metric="memory", split="system"), rows(1, metric="memory", split="system", t=START + 500)
    mirrored(uri, (trial(0, "running"), rows(0, 1) + machine[0]))
    mirrored(uri, (trial(0), rows(0) + rows(1, 2, t=START + 99) + machine[0] + machine[1]))
    expected = reported(rows(0, 1) + rows(2, t=START + 99) + machine[0] + machine[1])
    assert points(uri, runs(uri)[1][f"{0:012x}"]) == expected


def test_an_answer_that_is_lost_after_the_store_took_the_points_doubles_nothing(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    lost = {"create_run": 2, "log_batch": 3}
    for name in lost:
        real = getattr(MlflowClient, name)

        def flaky(self: Any, *args: Any, _name: str = name, _real: Any = real, **more: Any) -> Any:
            result = _real(self, *args, **more)
            lost[_name] -= 1
            if lost[_name] >= 0:
                raise ConnectionError("connection reset")
            return result

        monkeypatch.setattr(MlflowClient, name, flaky)
    mirrored(uri, (trial(0), rows(0, 1, 2)), (trial(1), rows(0)), end="ended")
    _, nested = runs(uri)
    assert [points(uri, nested[f"{i:012x}"]) for i in range(2)] == [reported(rows(0, 1, 2)), reported(rows(0))]


def test_a_run_that_someone_deleted_is_made_again_in_full(uri: str) -> None:
    from mlflow import MlflowClient

    mirrored(uri, (trial(0), rows(0, 1)))
    MlflowClient(uri).delete_run(runs(uri)[1][f"{0:012x}"].info.run_id)
    mirrored(uri, (trial(0), rows(0, 1)))
    assert points(uri, runs(uri)[1][f"{0:012x}"]) == reported(rows(0, 1))


# ---------------------------------------------------------------------------------------------- files, quiet, secrets


def test_the_default_store_is_made_with_its_files_beside_it_and_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "report.html"
    report.write_text("<p>report</p>")
    mirror = Mirror("sqlite:///runs/mlflow.db", "smoke", tags={"commit": "abc"})
    mirror.start()
    mirror.finish("ended", [report, tmp_path / "missing.md"])
    assert mirror.close(60) == 0
    parent, _ = runs(mirror.uri)
    assert parent.data.tags["commit"] == "abc"
    (copy,) = (tmp_path / "runs" / "mlartifacts").rglob("report.html")
    assert copy.read_text() == "<p>report</p>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs"]
    assert capfd.readouterr() == ("", "")


def test_to_import_the_module_does_not_import_mlflow() -> None:
    code = "import sys, orchestrator.mlflow_sync; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(mlflow_sync.__file__).parents[1]).returncode == 0


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:///runs/mlflow.db", "sqlite:///runs/mlflow.db"),
        ("http://host:5000/path", "http://host:5000/path"),
        ("https://user:pass@host/path", "https://***@host/path"),
        ("https://user:p@ss:/?#w rd@host/path", "https://***@host/path"),
        ("https://host/path?token=abc&x=1#frag", "https://host/path?***"),
        ("API at http://u:p@h/api?token=abc failed: reset", "API at http://***@h/api?*** failed: reset"),
    ],
)
def test_a_uri_is_shown_without_its_secrets(uri: str, shown: str) -> None:
    assert redact(uri) == shown


# -------------------------------------------------------------------------------------------------- away, slow, back


def test_a_store_that_is_away_blocks_nothing_and_is_named_without_secrets() -> None:
    mirror = Mirror(f"http://user:{SECRET}@127.0.0.1:{closed_port()}/?token={SECRET}", "smoke", every=0.1)
    mirror.start()
    start = time.perf_counter()
    for last in range(20):
        mirror.put(trial(0, "running"), rows(*range(last + 1)))
    mirror.finish("ended")
    assert time.perf_counter() - start < 0.1
    deadline = time.monotonic() + 30
    while mirror.problem is None and time.monotonic() < deadline:
        time.sleep(0.05)  # mlflow is being imported
    start = time.perf_counter()
    assert mirror.close(1.0) == 22  # 20 points, the state of the trial and the end
    assert time.perf_counter() - start < 3
    assert mirror.problem is not None
    assert "did not answer: 22 records wait; run the same command again to catch up" in mirror.problem
    assert "secret" not in mirror.problem
    assert "hunter" not in mirror.problem
    assert "user" not in mirror.problem


def test_an_older_schema_is_to_be_upgraded_and_a_server_to_be_started(uri: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("update alembic_version set version_num = 'acf3f17fdcc7'")
        database.commit()
    mirror = Mirror(uri, "smoke", every=0.05)
    mirror.start()
    problem = mirror.first_answer(60)
    assert problem is not None and "schema" in problem and f"`mlflow db upgrade {uri}`" in problem
    mirror.close(0.1)
    assert f"run `mlflow db upgrade {uri}`" in mirror.advice and str(tmp_path / "mlflow.db") in mirror.advice
    assert Mirror("http://127.0.0.1:5000", "smoke").advice == "MLflow does not answer; start it"


def test_a_mirror_waits_while_another_makes_the_tables(uri: str, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    mirror = Mirror(uri, "smoke", every=0.05)
    mirror.start()
    assert not mirror._answered.wait(1.0) and mirror.problem is None
    os.close(folder)
    assert mirror.first_answer(60) is None and mirror.close(60) == 0


@pytest.mark.slow
def test_two_sweeps_that_begin_at_once_share_a_new_store(tmp_path: Path) -> None:
    code = "import sys; from orchestrator.mlflow_sync import Mirror; m = Mirror(sys.argv[1], sys.argv[2]); m.start(); "
    code += "sys.exit(m.first_answer(100) or m.close(60) and m.problem)"
    folder = tmp_path / "c%20d [v2] what? #1"
    command = [sys.executable, "-c", code, sqlite_uri(folder / "mlflow.db")]
    both = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("one", "two")]
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0)] * 2
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        assert {"one", "two"} <= {name for (name,) in database.execute("select name from experiments")}


def test_a_store_that_never_answers_delays_close_no_longer_than_it_may() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        mirror = Mirror(f"http://127.0.0.1:{server.getsockname()[1]}", "smoke")
        mirror.start()
        mirror.put(trial(0), rows(0))
        start = time.perf_counter()
        assert mirror.close(0.5) == 2
        assert time.perf_counter() - start < 2
        assert mirror.problem is not None
        assert "2 records wait" in mirror.problem


@pytest.mark.slow
def test_what_waited_for_a_server_is_delivered_when_it_comes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = closed_port()
    uri = f"http://127.0.0.1:{port}"
    mirror = Mirror(uri, "smoke", every=0.2)
    mirror.start()
    for i in range(3):
        mirror.put(trial(i), rows(*range(10)))
    deadline = time.monotonic() + 30
    while mirror.problem is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert mirror.problem is not None
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", str(tmp_path)]
    report = tmp_path / "report.md"
    report.write_text("report")
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        mirror.finish("ended", [report])
        assert mirror.close(120) == 0, mirror.problem
        assert mirror.problem is None
        mirrored(uri, *[(trial(i), rows(*range(10))) for i in range(3)], end="ended")
        parent, nested = runs(uri)
        assert parent.info.status == "FINISHED"
        assert [points(uri, nested[f"{i:012x}"]) for i in range(3)] == [reported(rows(*range(10)))] * 3
        assert list(tmp_path.rglob("artifacts/report.md"))
        assert capfd.readouterr() == ("", "")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
