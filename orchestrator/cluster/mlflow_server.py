"""Runs MLflow's server beside a cluster's driver, on loopback, and keeps its database in a storage.

    python -m orchestrator.cluster.mlflow_server s3://bucket/mlflow

The server itself writes artifacts to the storage. The database is a SQLite file on the local disk, since object stores
cannot serve SQLite: the file is fetched at the start if absent, and copied to the storage each minute in which it changed
and at the end (SIGTERM). A head that is lost suddenly loses at most the last minute, which the next start of the sweep
sends again from its own files.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from orchestrator.cluster.machine import start
from orchestrator.study.paths import sqlite_uri
from trainables.storage.files import Storage

NAME = "mlflow.db"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster.mlflow_server", description="Runs MLflow; keeps its database in a storage."
    )
    parser.add_argument("storage", metavar="URI", help="a folder or any fsspec URI, e.g. s3://bucket/mlflow")
    parser.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default 5000)")
    parser.add_argument("--database", type=Path, default=Path.home() / NAME, metavar="FILE", help="default ~/mlflow.db")
    parser.add_argument("--every", type=float, default=60.0, metavar="S", help="seconds between copies (default 60)")
    given = parser.parse_args(argv)
    if not _is_free(given.port):  # a second `ray up` runs this command again, and the first server keeps running
        print(f"127.0.0.1:{given.port} is in use; no server was started")
        return 0
    return serve(Storage(given.storage), given.database, given.port, given.every)


def serve(storage: Storage, database: Path, port: int, every: float) -> int:
    """Runs until the server ends or SIGTERM comes; returns the server's exit code. Raises OSError where the storage cannot
    be read."""
    fetch(storage, database)
    server = subprocess.Popen(
        server_command(storage, database, port),
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # saves seven idle processes
    )
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: server.terminate()) for number in numbers]
    copied: tuple[int, ...] = ()
    try:
        while True:
            try:
                code = server.wait(every)
            except subprocess.TimeoutExpired:
                code = None
            copied = keep(storage, database, copied)
            if code is not None:
                return code
    finally:
        server.terminate()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def server_command(storage: Storage, database: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", sqlite_uri(database), "--artifacts-destination", f"{storage.uri}/artifacts"]  # fmt: skip


def fetch(storage: Storage, database: Path) -> bool:
    """Fetches the database from the storage, unless there is a local file; returns whether it was fetched."""
    if database.exists() or (content := storage.read(NAME)) is None:
        return False
    database.parent.mkdir(parents=True, exist_ok=True)
    temporary = database.with_suffix(f".{time.time_ns()}")
    temporary.write_bytes(content)
    temporary.rename(database)
    return True


def keep(storage: Storage, database: Path, copied: tuple[int, ...]) -> tuple[int, ...]:
    """Copies the database to the storage if its state differs from `copied`; returns the state that was copied last.

    After a failed write the next call tries again.
    """
    files = [file for file in (database, database.with_name(f"{database.name}-wal")) if file.exists()]
    state = tuple(number for file in files for number in (file.stat().st_mtime_ns, file.stat().st_size))
    if not state or state == copied:
        return copied
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / NAME
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as whole:
            source.backup(whole)  # consistent while others write
        try:
            storage.write(NAME, copy.read_bytes())
        except OSError as error:
            print(f"{storage.uri}: the copy could not be written ({error}); trying again later", file=sys.stderr)
            return copied
    return state


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


if __name__ == "__main__":
    start(main)
