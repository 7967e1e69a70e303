"""What the storage holds, and what can go: phases and data by size, study and last use.

python -m orchestrator.store                 # a line for each
python -m orchestrator.store --prune         # deletes what no study names; asks first, unless --yes
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.analysis.tables import open_storage
from orchestrator.planning.memory import bytes_text
from orchestrator.study.errors import StudyError
from trainables.storage.files import Storage

HOUR_MS = 3_600_000  # what is younger may belong to a sweep that is running


@dataclass
class Entry:
    """A phase or a prepared data set."""

    kind: str  # phases | data
    name: str
    size: int
    studies: set[str] = field(default_factory=set)
    used: int = 0  # UTC, ms


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.store", description="Lists phases and data; prunes.")
    parser.add_argument(
        "--storage", default="./runs", metavar="URI", help="a folder or any fsspec URI (default ./runs)"
    )
    parser.add_argument("--prune", action="store_true", help="delete what no study names")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args(argv)
    try:
        storage = open_storage(arguments.storage)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = entries(storage)
    for entry in sorted(found, key=lambda e: (e.kind, -e.size)):
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.used / 1000)) if entry.used else "never"
        print(
            f"{bytes_text(entry.size):>8}  {entry.kind:6}  {entry.name:32}  {day:16}  {', '.join(sorted(entry.studies)) or '-'}"
        )
    print(f"{bytes_text(sum(e.size for e in found))} in {len(found)} entries of {storage.uri}")
    if not arguments.prune:
        return 0
    orphans = [e for e in found if not e.studies and e.used < time.time() * 1000 - HOUR_MS]
    if not orphans:
        print("nothing to prune: every entry is named by a study, or younger than an hour")
        return 0
    question = f"delete {len(orphans)} entries, {bytes_text(sum(e.size for e in orphans))}, that no study names? [y/N] "
    if not arguments.yes and input(question).strip().lower() != "y":
        print("nothing was deleted")
        return 1
    for entry in orphans:
        storage.delete(f"{entry.kind}/{entry.name}")
    print(f"deleted {len(orphans)} entries")
    return 0


def entries(storage: Storage) -> list[Entry]:
    """Everything under phases/ and data/, with the studies whose trials name it."""
    studies: defaultdict[str, set[str]] = defaultdict(set)
    used: defaultdict[str, int] = defaultdict(int)
    for study in storage.list():
        for trial in storage.list(f"{study}/trials"):
            for name in ("trial.json", "end.json"):
                row = json.loads(storage.read(f"{study}/trials/{trial}/{name}") or b"{}")
                keys = {phase["key"] for phase in row.get("phases", {}).values()} | set(row.get("keys", {}).values())
                for key in keys | set(row.get("fingerprints", {}).values()):
                    studies[key].add(study)
                    used[key] = max(used[key], row.get("ended") or row.get("started") or 0)
    found = []
    for kind in ("phases", "data"):
        for name in storage.list(kind):
            written = _finished(storage, name) if kind == "phases" else 0
            found.append(Entry(kind, name, storage.size(f"{kind}/{name}"), studies[name], max(used[name], written)))
    return found


def _finished(storage: Storage, key: str) -> int:
    try:
        return int(json.loads(storage.read(f"phases/{key}/phase.json") or b"{}")["provenance"]["finished"])
    except (ValueError, KeyError, TypeError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
