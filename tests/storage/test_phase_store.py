"""Files that are the truth: whole or not there, first publication wins, damage is noticed, set aside and survived."""

from __future__ import annotations

import errno
import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from trainables.storage.checkpoints import drop_checkpoints, load_checkpoint, save_checkpoint
from trainables.storage.files import Storage, StorageError, check_writable
from trainables.storage.phase_store import Corrupt, PhaseStore, StoredPhase

KEY = "0123456789abcdef" * 2


@pytest.fixture(params=["local", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A folder by path, by URI, and an object store (fsspec's, in memory), read from a machine that has no copies yet."""
    monkeypatch.setenv("CODISTILL_CACHE", str(tmp_path / "copies"))
    return Storage(
        {
            "local": str(tmp_path / "runs"),
            "file": f"file://{tmp_path}/runs",
            "memory": f"memory://{uuid.uuid4().hex}/runs",
        }[request.param]
    )


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), value), "b": torch.arange(4.0)}


def published(store: PhaseStore, key: str = KEY, value: float = 1.0, **more: Any) -> StoredPhase:
    fields: dict[str, Any] = {
        "files": {"student": store.put_weights(key, weights(value))},
        "configs": {"student": {"model_type": "bert", "id2label": {"0": "a"}}},
        "records": ({"phase": "teach", "value": 1.5},),
        "cost": {"steps": 2, "flops": 1e9},
        "provenance": {"trial": "t", "finished": 1},
    }
    return store.publish(StoredPhase(key=key, **{**fields, **more}))


# --------------------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_read_and_listed_and_what_is_not_there_is_none(storage: Storage) -> None:
    assert storage.read("a/b.json") is None and storage.list("a") == [] and storage.list() == []
    storage.write("a/b.json", b"1")
    storage.write("a/b.json", b"22")
    storage.write("a/c/d.json", b"3")
    assert storage.read("a/b.json") == b"22"
    assert storage.list("a") == ["b.json", "c"] and storage.list() == ["a"]
    assert storage.sub("a").read("c/d.json") == b"3"
    storage.write("a/a/f.json", b"4")
    assert storage.list("a") == ["a", "b.json", "c"]  # a folder of the name of its parent is there
    storage.move("a/b.json", "a/e.json")
    assert storage.read("a/b.json") is None and storage.read("a/e.json") == b"22"
    storage.delete("a")
    storage.delete("a")
    assert storage.list("a") == []


def test_the_first_to_create_a_name_wins(storage: Storage) -> None:
    assert storage.create("a/b", b"first")
    assert not storage.create("a/b", b"second")
    assert storage.read("a/b") == b"first"


def test_one_of_many_concurrent_writers_of_a_name_wins_and_none_leaves_files(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.create("a/b", bytes([i]) * 10_000), range(32)))
    assert sum(won) == 1
    assert storage.read("a/b") == bytes([won.index(True)]) * 10_000
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a", b"old")

    def full(_descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        storage.write("a", b"new")
    assert storage.read("a") == b"old" and storage.list() == ["a"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Access Denied"), "Access Denied"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("no credentials\nfound"), "no credentials"),
    ],
)
def test_whatever_a_bucket_says_is_one_kind_of_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}")

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    fs = type(fsspec.filesystem("memory"))
    for name in ("cat_file", "pipe_file", "ls", "exists", "mv"):
        monkeypatch.setattr(fs, name, fails)
    for use in (lambda: storage.read("a"), lambda: storage.write("a", b""), lambda: storage.create("a", b""), storage.list,
                lambda: storage.size("a"), lambda: storage.delete("a"), lambda: storage.move("a", "b")):  # fmt: skip
        with pytest.raises(StorageError) as found:
            use()
        assert found.value.strerror == says and found.value.__cause__ is error


def test_a_place_that_cannot_be_written_is_noticed_and_no_probe_stays(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):  # noqa: PT011  # which one depends on the platform
        check_writable(str(tmp_path / "file"))


# -------------------------------------------------------------------------------------------------------------- phases


def test_a_published_phase_is_found_with_everything_it_says(storage: Storage) -> None:
    store = PhaseStore(storage)
    assert store.find(KEY) is None
    put = published(store)
    assert store.find(KEY) == put
    assert all(torch.equal(store.weights(KEY, "student")[name], tensor) for name, tensor in weights().items())


def test_weights_without_a_marker_are_no_phase(storage: Storage) -> None:
    store = PhaseStore(storage)
    store.put_weights(KEY, weights())
    assert store.find(KEY) is None
    with pytest.raises(Corrupt, match="no weights of student"):
        store.weights(KEY, "student")


def test_the_first_complete_publication_counts(storage: Storage) -> None:
    store = PhaseStore(storage)
    first = published(store, value=1.0)
    assert published(store, value=2.0) == first
    assert store.weights(KEY, "student")["a"][0, 0] == 1.0


def test_a_marker_whose_content_changed_is_set_aside_not_deleted(storage: Storage) -> None:
    store = PhaseStore(storage)
    published(store)
    name = f"phases/{KEY}/phase.json"
    text = storage.read(name)
    assert text is not None
    for damaged in (text.replace(b"1.5", b"1.6"), text[:-20], b"", b"[]", b"{}", b"\xff"):
        storage.write(name, damaged)
        assert store.find(KEY) is None
        assert storage.read(name) is None
    aside = [n for n in storage.list(f"phases/{KEY}") if n.startswith("corrupt-")]
    assert len(aside) == 6
    assert published(store).key == KEY and store.find(KEY) is not None


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_weights_that_differ_from_their_checksum_are_never_handed_out(storage: Storage, damage: str) -> None:
    store = PhaseStore(storage)
    name = f"phases/{KEY}/{published(store).files['student']['file']}"
    content = storage.read(name)
    assert content is not None
    if damage == "gone":
        storage.delete(name)
    else:
        storage.write(name, content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Corrupt, match="missing" if damage == "gone" else "corrupt") as error:
        store.weights(KEY, "student")
    assert error.value.key == KEY
    store.set_aside(KEY, error.value.why)
    published(store)
    assert torch.equal(store.weights(KEY, "student")["a"], weights()["a"])


def test_tied_and_sliced_tensors_are_stored_whole(storage: Storage) -> None:
    store = PhaseStore(storage)
    grid = torch.arange(6.0).view(2, 3)
    put = store.put_weights(KEY, {"t": grid.T, "column": grid[:, 1]})
    published(store, files={"student": put})
    found = store.weights(KEY, "student")
    assert torch.equal(found["t"], grid.T) and torch.equal(found["column"], grid[:, 1])


# --------------------------------------------------------------------------------------------------------- checkpoints


def state(step: int, key: str = KEY) -> dict[str, Any]:
    return {"key": key, "step": step, "models": {"m": weights(step)}, "latched": {"f": True}, "sums": {"f": 0.5}}


def test_a_checkpoint_comes_back_whole_and_replaces_the_one_before(storage: Storage) -> None:
    for step in (3, 7):
        save_checkpoint(storage, "attempt-1", state(step))
    found = load_checkpoint(storage, ["attempt-1"], KEY)
    assert found is not None and found["step"] == 7 and found["latched"] == {"f": True}
    assert torch.equal(found["models"]["m"]["a"], weights(7)["a"])
    assert len(storage.list("attempt-1")) == 2  # the state and its pointer


def test_the_furthest_checkpoint_of_the_phase_counts_whatever_the_order_of_attempts(storage: Storage) -> None:
    for attempt, step in ((1, 5), (2, 9), (3, 2)):
        save_checkpoint(storage, f"attempt-{attempt}", state(step))
    for order in ((1, 2, 3), (3, 2, 1)):
        found = load_checkpoint(storage, [f"attempt-{n}" for n in (*order, 4)], KEY)
        assert found is not None and found["step"] == 9


def test_a_checkpoint_of_another_phase_is_none(storage: Storage) -> None:
    save_checkpoint(storage, "attempt-1", state(5, "f" * 32))
    assert load_checkpoint(storage, ["attempt-1"], KEY) is None


@pytest.mark.parametrize("damage", ["state", "no state", "pointer", "not a pointer"])
def test_a_damaged_checkpoint_is_passed_over_for_an_earlier_one(storage: Storage, damage: str) -> None:
    save_checkpoint(storage, "attempt-1", state(5))
    save_checkpoint(storage, "attempt-2", state(9))
    file = json.loads(storage.read("attempt-2/checkpoint.json") or b"")["file"]
    match damage:
        case "state":
            storage.write(f"attempt-2/{file}", (storage.read(f"attempt-2/{file}") or b"")[:-9])
        case "no state":
            storage.delete(f"attempt-2/{file}")
        case "pointer":
            storage.write("attempt-2/checkpoint.json", b"{")
        case "not a pointer":
            storage.write("attempt-2/checkpoint.json", b"[1]")
    found = load_checkpoint(storage, ["attempt-2", "attempt-1"], KEY)
    assert found is not None and found["step"] == 5


def test_checkpoints_go_and_records_stay(storage: Storage) -> None:
    save_checkpoint(storage, "attempt-1", state(5))
    storage.write("attempt-1/records.jsonl", b"{}\n")
    drop_checkpoints(storage, "attempt-1")
    assert storage.list("attempt-1") == ["records.jsonl"]
    assert load_checkpoint(storage, ["attempt-1"], KEY) is None
