"""This machine's copies of remote files: by checksum, bound in bytes, the longest unused first."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from trainables.storage import cache, prepared_folders
from trainables.storage.files import Storage
from trainables.storage.phase_store import Corrupt, PhaseStore, StoredPhase


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CODISTILL_CACHE", str(tmp_path / "node"))
    monkeypatch.delenv("CODISTILL_CACHE_GB", raising=False)
    return tmp_path / "node"


def keep(content: bytes, age: float = 0.0) -> Path:
    """A copy of so many seconds' disuse."""
    name = hashlib.sha256(content).hexdigest()
    assert cache.read(name, lambda: content) == content
    path = cache.folder("weights") / name
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_is_here_is_not_fetched_again_unless_it_is_broken() -> None:
    path, asked = keep(b"weights"), []

    def fetch() -> bytes:
        asked.append(1)
        return b"weights"

    assert cache.read(path.name, fetch) == b"weights" and not asked
    path.write_bytes(b"broken")
    assert cache.read(path.name, fetch) == b"weights" and len(asked) == 1
    assert path.read_bytes() == b"weights"


def test_what_is_fetched_wrong_is_handed_on_and_not_kept(home: Path) -> None:
    name = hashlib.sha256(b"weights").hexdigest()
    assert cache.read(name, lambda: b"other") == b"other"
    assert cache.read(name, lambda: None) is None
    assert not (home / "weights").exists()


def test_the_longest_unused_go_first_and_what_is_in_use_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODISTILL_CACHE_GB", "4e-6")  # 4,000 bytes
    old, older, new = keep(b"a" * 1000, 3000), keep(b"b" * 1000, 5000), keep(b"c" * 1000)
    keep(b"d" * 1500)
    assert (old.exists(), older.exists(), new.exists()) == (True, False, True)
    keep(b"e" * 1500)
    assert not old.exists() and new.exists()
    unkept = hashlib.sha256(b"f" * 2000).hexdigest()
    assert cache.read(unkept, lambda: b"f" * 2000) == b"f" * 2000  # all that is there was used just now
    assert new.exists() and not (new.parent / unkept).exists()
    assert not [path for path in new.parent.iterdir() if path.name.startswith(".")]


def test_using_a_copy_makes_it_young(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODISTILL_CACHE_GB", "2.5e-6")
    first, second = keep(b"a" * 1000, 5000), keep(b"b" * 1000, 3000)
    cache.read(first.name, lambda: None)
    keep(b"c" * 1000)
    assert first.exists() and not second.exists()


def test_prepared_data_make_room_for_each_other(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODISTILL_CACHE_GB", "5e-6")
    remote = "memory://cache-of-data"
    for name in ("one", "two"):
        prepared_folders.publish(remote, name, lambda temp: {"num": (temp / "file").write_bytes(b"x" * 3000)})
    shutil.rmtree(home)  # another node
    one = prepared_folders.fetch(remote, "one")
    os.utime(one, (0, 0))
    two = prepared_folders.fetch(remote, "two")
    assert two.exists() and not one.exists()
    assert (
        prepared_folders.read_about(prepared_folders.fetch(remote, "one"))["num"] == 3000
    )  # fetched again where it is wanted again


def test_weights_of_remote_phases_are_copied_once_and_local_ones_never(home: Path, tmp_path: Path) -> None:
    weights = {"w": torch.arange(4.0)}
    for uri in ("memory://cache-of-phases", str(tmp_path / "runs")):
        store = PhaseStore(Storage(uri))
        entry = store.put_weights("k", weights)
        store.publish(StoredPhase("k", {"m": entry}, {}, (), {}, {}))
        assert torch.equal(store.weights("k", "m")["w"], weights["w"])
        store.storage.delete(f"phases/k/{entry['file']}")
        if store.storage.is_local:
            with pytest.raises(Corrupt, match="missing"):
                store.weights("k", "m")
        else:
            assert (home / "weights" / entry["sha256"]).exists()
            assert torch.equal(store.weights("k", "m")["w"], weights["w"])
            shutil.rmtree(home)


def test_a_cache_that_cannot_be_written_is_done_without(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    home.write_text("a file where the folder should be")
    assert cache.read(hashlib.sha256(b"x").hexdigest(), lambda: b"x") == b"x"
    assert "no copy is kept in" in caplog.text


def test_a_bound_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODISTILL_CACHE_GB", "plenty")
    with pytest.raises(ValueError, match="CODISTILL_CACHE_GB: 'plenty' is not a number"):
        cache.make_room(1)


def test_without_a_bound_of_its_own_it_takes_half_of_what_the_disk_has(home: Path) -> None:
    free = shutil.disk_usage(home.parent).free
    assert cache.make_room(free // 4) and not cache.make_room(free)
