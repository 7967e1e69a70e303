"""MLflow's server beside a cluster's driver, on loopback, with a database that outlives the machine it runs on.

    python -m orchestrator.cluster.mlflow_server s3://bucket/mlflow

Artifacts go to the storage by the server itself. The database is a SQLite file on this machine's disk, which object
stores cannot serve: it is fetched at the start where there is none here, and a whole copy is written back each minute in
which it changed, and at the end (SIGTERM). What a head lost without a word takes along is at most the last minute, which
the next start of the sweep sends again: MLflow is a mirror of the sweep's own files.
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
from typing import Any

from trainables.storage.files import Storage

NAME = "mlflow.db"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.cluster.mlflow_server", description="MLflow, kept in a storage.")  # fmt: skip
    parser.add_argument("storage", metavar="URI", help="a folder or any fsspec URI, e.g. s3://bucket/mlflow")
    parser.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default 5000)")
    parser.add_argument("--database", type=Path, default=Path.home() / NAME, metavar="FILE", help="default ~/mlflow.db")
    parser.add_argument("--every", type=float, default=60.0, metavar="S", help="seconds between copies (default 60)")
    arguments = parser.parse_args(argv)
    if not _is_free(arguments.port):  # `ray up` gives its commands again, and the first server goes on
        print(f"something listens on 127.0.0.1:{arguments.port} already; nothing was started")
        return 0
    return serve(Storage(arguments.storage), arguments.database, arguments.port, arguments.every)


def serve(storage: Storage, database: Path, port: int, every: float) -> int:
    """Runs until the server ends or SIGTERM comes; returns the server's exit code. Raises OSError where nothing can be
    written to the storage."""
    fetch(storage, database)
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", f"{storage.uri}/artifacts"],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven processes for jobs that nobody gives it
    )  # fmt: skip

    def end(*_: Any) -> None:
        server.terminate()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        kept: tuple[int, ...] = ()
        while True:
            try:
                code = server.wait(every)
            except subprocess.TimeoutExpired:
                code = None
            kept = keep(storage, database, kept)
            if code is not None:
                return code
    finally:
        server.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)


def fetch(storage: Storage, database: Path) -> bool:
    """The copy from the storage, where there is none here; says whether it was fetched."""
    if database.exists() or (content := storage.read(NAME)) is None:
        return False
    database.parent.mkdir(parents=True, exist_ok=True)
    temporary = database.with_suffix(f".{time.time_ns()}")
    temporary.write_bytes(content)
    temporary.rename(database)
    return True


def keep(storage: Storage, database: Path, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Writes a whole copy where the file changed since `kept`; returns what the file was. A storage that is away now is
    tried again the next time."""
    state = tuple(
        number
        for file in (database, database.with_name(f"{database.name}-wal"))
        if file.exists()
        for number in (file.stat().st_mtime_ns, file.stat().st_size)
    )
    if not state or state == kept:
        return kept
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / NAME
        with closing(sqlite3.connect(database)) as live, closing(sqlite3.connect(copy)) as whole:
            live.backup(whole)  # consistent, whoever writes meanwhile
        try:
            storage.write(NAME, copy.read_bytes())
        except OSError as error:
            print(f"{storage.uri}: the copy could not be written ({error}); it is tried again", file=sys.stderr)
            return kept
    return state


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


if __name__ == "__main__":
    sys.exit(main())
