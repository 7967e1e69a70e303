"""A storage in a folder of any name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainables.storage import prepared_folders
from trainables.storage.files import Storage, matching

any_name = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)


@given(name=any_name)
def test_what_is_written_is_read_listed_moved_and_deleted(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp("any")
    storage = Storage(str(root / name))
    storage.write("phases/a/file", b"1")
    assert (root / name / "phases" / "a" / "file").read_bytes() == b"1" and storage.is_local
    assert storage.read("phases/a/file") == b"1" and not storage.create("phases/a/file", b"2")
    assert storage.list("phases") == ["a"] and storage.size("phases") >= 1
    storage.move("phases", "other")
    assert storage.sub("other").list() == ["a"] and storage.list() == ["other"]
    storage.delete("other")
    assert storage.list() == [] and [path.name for path in root.iterdir()] == [name]

    def write(folder: Path) -> dict[str, int]:
        (folder / "x").write_bytes(b"x")
        return {"num": 1}

    prepared_folders.publish(storage.sub("data").uri, "key", write)
    home = prepared_folders.fetch(storage.sub("data").uri, "key")
    assert home == root / name / "data" / "key" and prepared_folders.read_about(home)["num"] == 1


def test_a_pattern_matches_below_the_part_that_exists(tmp_path: Path) -> None:
    for name in ("run [v2]/a.txt", "run [v2]/b/c.txt", "run 2/a.txt", "run [v2]/.hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def found(pattern: str) -> list[str]:
        return [str(Path(path).relative_to(tmp_path)) for path in matching(str(tmp_path / pattern))]

    assert found("run [v2]/*.txt") == ["run [v2]/.hidden.txt", "run [v2]/a.txt"]
    assert found("run [v2]/**/c.txt") == ["run [v2]/b/c.txt"] and found("run [v3]/*.txt") == []
    assert found("run [0-9]/a.txt") == ["run 2/a.txt"] and found("run*/a.txt") == ["run 2/a.txt", "run [v2]/a.txt"]
    assert found("run 2/a.txt") == ["run 2/a.txt"] and found("run 2/b.txt") == []
