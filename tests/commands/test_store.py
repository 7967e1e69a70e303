"""The storage's list, and what pruning takes away: nothing that a study names, nothing young."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from orchestrator import store
from trainables.storage.files import Storage, as_json

OLD = int(time.time() * 1000) - 5 * store.HOUR_MS


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Phases - of a study, of nobody, of nobody but young, of a trial that runs - and two data sets, one of nobody."""
    found = Storage(str(tmp_path / "runs"))
    for key, finished in (("named", OLD), ("orphan", OLD), ("young", int(time.time() * 1000))):
        found.write(f"phases/{key}/w.safetensors", b"x" * 1000)
        found.write(f"phases/{key}/phase.json", as_json({"provenance": {"finished": finished}}))
    for name in ("read", "unread"):
        found.write(f"data/{name}/train.arrow", b"y" * 500)
    start = {"started": OLD, "fingerprints": {"data:corpus": "read"}, "keys": {"teach": "named"}}
    found.write("mine/trials/t1/trial.json", as_json(start))
    found.write("phases/begun/w.safetensors", b"x")  # of a trial that runs: no end tells of it yet
    found.write("mine/trials/t2/trial.json", as_json({**start, "keys": {"teach": "begun"}}))
    found.write("mine/trials/t1/end.json", as_json({"ended": OLD + 1, "phases": {"teach": {"key": "named"}}}))
    return found


def test_each_entry_stands_with_its_size_its_studies_and_its_last_use(storage: Storage) -> None:
    found = {(e.kind, e.name): e for e in store.entries(storage)}
    assert len(found) == 6 and found["phases", "begun"].studies == {"mine"}
    assert found["phases", "named"].studies == {"mine"} and found["phases", "named"].used == OLD + 1
    assert found["phases", "orphan"].studies == set() and found["data", "read"].studies == {"mine"}
    assert found["phases", "named"].size >= 1000 and found["data", "unread"].size == 500


def test_pruning_takes_what_no_study_names_and_leaves_what_is_young(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store.main(["--storage", storage.uri, "--prune", "--yes"]) == 0
    assert "deleted 2 entries" in capsys.readouterr().out
    assert storage.list("phases") == ["begun", "named", "young"] and storage.list("data") == ["read"]


def test_pruning_asks_first(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert store.main(["--storage", storage.uri, "--prune"]) == 1
    assert len(store.entries(storage)) == 6


def test_a_list_deletes_nothing(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.main(["--storage", storage.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and "mine" in "".join(line for line in lines if "named" in line)
    assert json.loads(storage.read("mine/trials/t1/end.json") or b"")["phases"]["teach"]["key"] == "named"
