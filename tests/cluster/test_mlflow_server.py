"""MLflow's server on a head: its database goes to the storage and comes back on another machine."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import pytest

from orchestrator.cluster import mlflow_server
from tests.support.listening import listening, tree
from trainables.storage.files import Storage


def rows(file: Path) -> list[int]:
    with closing(sqlite3.connect(file)) as database:
        return [number for (number,) in database.execute("select n from t order by n")]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    file = tmp_path / "here" / "mlflow.db"
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as made:
        made.executescript("pragma journal_mode=wal; create table t (n); insert into t values (1)")
    return file


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def test_a_copy_is_whole_while_others_write_and_comes_back_elsewhere(
    database: Path, storage: Storage, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(database)) as live:
        live.execute("insert into t values (2)")
        live.commit()
        live.execute("insert into t values (3)")  # not yet committed
        mlflow_server.keep(storage, database, ())
    there = tmp_path / "there" / "mlflow.db"
    assert mlflow_server.fetch(storage, there) and rows(there) == [1, 2]
    assert [file.name for file in there.parent.iterdir()] == ["mlflow.db"]


def test_what_is_here_is_not_overwritten_and_nothing_comes_from_nothing(database: Path, storage: Storage) -> None:
    assert not mlflow_server.fetch(storage, database.with_name("other.db"))
    mlflow_server.keep(storage, database, ())
    with closing(sqlite3.connect(database)) as live:
        live.execute("insert into t values (2)")
        live.commit()
    assert not mlflow_server.fetch(storage, database) and rows(database) == [1, 2]


def test_only_what_changed_is_written_and_a_storage_that_is_away_is_tried_again(
    database: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(Storage, "write", lambda self, name, content: written.append(name))
    kept = mlflow_server.keep(storage, database, ())
    assert mlflow_server.keep(storage, database, kept) == kept and written == ["mlflow.db"]
    with closing(sqlite3.connect(database)) as live:
        live.execute("insert into t values (2)")
        live.commit()

    def fails(*_: object) -> None:
        raise OSError("away")

    monkeypatch.setattr(Storage, "write", fails)
    assert mlflow_server.keep(storage, database, kept) == kept and "away" in capsys.readouterr().err
    monkeypatch.setattr(Storage, "write", lambda self, name, content: written.append(name))
    assert mlflow_server.keep(storage, database, kept) != kept and len(written) == 2


def test_a_second_server_is_not_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert mlflow_server.main([str(tmp_path / "s"), "--port", str(port)]) == 0
    assert (
        f"127.0.0.1:{port} is in use; no server was started" in capsys.readouterr().out
        and not (tmp_path / "s").exists()
    )


@pytest.mark.slow
def test_the_server_answers_on_loopback_and_its_end_is_kept(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "orchestrator.cluster.mlflow_server", str(tmp_path / "storage"), "--port", str(port), "--database", str(tmp_path / "mlflow.db")]  # fmt: skip
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=os.environ, start_new_session=True)
    try:
        until = time.monotonic() + 400
        while True:
            try:
                assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
                break
            except OSError:
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.5)
        assert {address for pid in tree(process.pid) for address, _ in listening(pid)} == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        with closing(sqlite3.connect(tmp_path / "storage" / "mlflow.db")) as kept:
            assert kept.execute("select count(*) from experiments").fetchone() == (1,)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
