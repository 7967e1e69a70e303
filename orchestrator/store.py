"""Lists the phases and the prepared data in a storage by size, study and last use; deletes those that no study uses.

python -m orchestrator.store                 # a line for each
python -m orchestrator.store --prune         # deletes unused entries; asks first, unless --yes
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cli import add_storage_argument, confirm, open_storage
from orchestrator.cluster.machine import start
from orchestrator.study.errors import StudyError
from trainables.storage.files import Storage, bytes_text

HOUR_MS = 3_600_000  # a running sweep may still need an entry younger than this


@dataclass(frozen=True)
class Entry:
    """A phase or a prepared data set."""

    kind: str  # phases | data
    name: str
    size: int
    studies: set[str]
    used: int  # UTC, ms

    def __str__(self) -> str:
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.used / 1000)) if self.used else "never"
        studies = ", ".join(sorted(self.studies)) or "-"
        return f"{bytes_text(self.size):>8}  {self.kind:6}  {self.name:32}  {day:16}  {studies}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.store", description="Lists phases and data; prunes.")
    add_storage_argument(parser)
    parser.add_argument("--prune", action="store_true", help="delete the entries that no study uses")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args(argv)
    try:
        storage = open_storage(arguments.storage)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    listed = entries(storage)
    for entry in sorted(listed, key=lambda e: (e.kind, -e.size)):
        print(entry)
    print(f"{bytes_text(sum(e.size for e in listed))} in {len(listed)} entries of {storage.uri}")
    return prune(storage, listed, ask=not arguments.yes) if arguments.prune else 0


def prune(storage: Storage, listed: Sequence[Entry], *, ask: bool) -> int:
    """Deletes the entries that no study uses and that are older than an hour; returns the exit code."""
    unused = [e for e in listed if not e.studies and e.used < time.time() * 1000 - HOUR_MS]
    if not unused:
        print("nothing to prune: each entry is used by a study, or younger than an hour")
        return 0
    question = f"delete {len(unused)} entries, {bytes_text(sum(e.size for e in unused))}, that no study uses? [y/N] "
    if ask and not confirm(question):
        print("nothing was deleted")
        return 1
    for entry in unused:
        storage.delete(f"{entry.kind}/{entry.name}")
    print(f"deleted {len(unused)} entries")
    return 0


def entries(storage: Storage) -> list[Entry]:
    """Returns everything under phases/ and data/, with the studies whose trials use the entry."""
    studies: defaultdict[str, set[str]] = defaultdict(set)
    used: defaultdict[str, int] = defaultdict(int)
    for study in storage.list():
        for trial in storage.list(f"{study}/trials"):
            for file in ("trial.json", "end.json"):
                row = json.loads(storage.read(f"{study}/trials/{trial}/{file}") or b"{}")
                phases = [phase["key"] for phase in row.get("phases", {}).values()]
                for key in {*phases, *row.get("keys", {}).values(), *row.get("fingerprints", {}).values()}:
                    studies[key].add(study)
                    used[key] = max(used[key], row.get("ended") or row.get("started") or 0)
    return [
        Entry(
            kind, name, storage.size(f"{kind}/{name}"), studies[name], max(used[name], _finished(storage, kind, name))
        )
        for kind in ("phases", "data")
        for name in storage.list(kind)
    ]


def _finished(storage: Storage, kind: str, name: str) -> int:
    """Returns when a phase was stored, UTC, ms; 0 where that is not known."""
    try:
        return int(json.loads(storage.read(f"{kind}/{name}/phase.json") or b"{}")["provenance"]["finished"])
    except (ValueError, KeyError, TypeError):
        return 0


if __name__ == "__main__":
    start(main)
