"""Paths as users write them: from the study's file, or the working directory, in folders of any name."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scheduling.trials import Fingerprints, strata_of
from orchestrator.study import paths
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from orchestrator.study.paths import locate, sqlite_file, sqlite_uri
from tests.study.test_load import TEXT
from trainables.config.errors import DataError, ModelError
from trainables.data.prepare import prepare
from trainables.data.sources.files import find
from trainables.models.pretrained import Folder

NAMES = ["run [v2]", "a::b", "what?", "no#1", "c%20d", "50%", "~", "é 中文", "*", "{x}", "a@b", "x=1&y"]
# names of folders: all that Linux takes, without what starts a pattern that another name could match
any_name = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)


def study(folder: Path, changes: dict[str, Any]) -> Any:
    """The study of a file in `folder`, whose trial has these paths set."""
    file = folder / "mine.yaml"
    file.write_text(TEXT.partition("vary:")[0])
    return load_study(file, overrides=[f"trial.{path}={json.dumps(value)}" for path, value in changes.items()])


def texts(folder: Path, name: str = "mine.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("one\n\ntwo")
    return folder / name


FILES = {"kind": "files", "tokenizer": {"kind": "wordpiece", "size": 64}}


@pytest.mark.parametrize("name", NAMES)
def test_data_and_models_are_found_from_the_studys_file_in_a_folder_of_any_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    file = texts(folder / "data")
    (folder / "m" / "small").mkdir(parents=True)
    for train in ("data/mine.txt", "./data/*.txt", "./data/../data/mine.txt", f"../{name}/data/mine.txt"):
        found = study(folder, {"data": {**FILES, "train": train}, "models.student": {"pretrained": "m/small"}})
        spec = found.spec(seed=0)
        assert [place.uri for place in find(spec.data["corpus"].train, "train")] == [str(file)]
        assert spec.models["student"].pretrained == str(folder / "m" / "small")


def test_a_home_directory_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    texts(tmp_path / "home")
    changes = {"data": {**FILES, "train": "~/mine.txt"}, "models.student": {"pretrained": "~/m"}}
    spec = study(tmp_path, changes).spec(seed=0)
    assert (spec.data["corpus"].train, spec.models["student"].pretrained) == (
        str(tmp_path / "home" / "mine.txt"),
        str(tmp_path / "home" / "m"),
    )


def test_what_only_the_working_directory_has_is_read_from_there_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths._warn.cache_clear()
    here, beside = tmp_path / "here", tmp_path / "beside"
    file = texts(here)
    beside.mkdir()
    monkeypatch.chdir(here)
    found = study(beside, {"data": {**FILES, "train": "mine.txt"}})
    assert found.spec(seed=0).data["corpus"].train == found.spec(seed=1).data["corpus"].train == str(file)
    (warning,) = caplog.messages
    assert str(beside) in warning and str(file) in warning
    texts(beside)
    assert found.spec(seed=0).data["corpus"].train == str(beside / "mine.txt"), "the study's file comes first"


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {**FILES, "train": "./mine.jsonl"}},
        {"data": {**FILES, "train": "mine.jsonl"}},
        {"data": {**FILES, "train": "data/*.jsonl"}},
        {"data": {"kind": "python_docs", "tokenizer": {"kind": "pretrained", "name": "./tok"}}},
        {"models.student": {"pretrained": "./m"}},
    ],
)
def test_a_message_about_a_missing_path_names_both_places(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(StudyError) as error:
        Fingerprints(None).of(study(beside, changes).spec(seed=0))
    assert str(beside) in str(error.value) and str(here) in str(error.value) and "\n" not in str(error.value)


def test_ids_of_the_hub_and_uris_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "org/model", "s3://bucket/x", "file:///x", "zip://a.csv::/x.zip"):
        assert locate(str(tmp_path), name, may_be_id=True) == name
    (tmp_path / "gpt2").write_text("a file is no model")
    assert locate(str(tmp_path), "gpt2", may_be_id=True) == "gpt2"


def test_a_size_that_is_varied_by_folders_keeps_its_labels(tmp_path: Path) -> None:
    """A trial has the folder, which is not the text of the choice."""
    for name in ("a", "b"):
        (tmp_path / "m" / name).mkdir(parents=True)
    text = TEXT.partition("vary:")[0].replace("mode: min}", "mode: min, minus: alone}")
    text = text.replace(
        "student: {family: bert, layers: 2, width: 16, heads: 2, dropout: 0}", "student: {pretrained: m/a}"
    )
    axis, file = "models.student.pretrained", tmp_path / "mine.yaml"
    file.write_text(f"{text}vary: {{{axis}: {{choice: [m/a, m/b]}}}}\nsearch: {{sampler: grid, points: 2}}\n")
    found = load_study(file)
    assert strata_of(found, found.spec(point={axis: "m/b"}, seed=0)) == {axis: "m/b"}


@given(name=any_name, file=any_name)
def test_a_file_of_any_name_in_a_folder_of_any_name_is_found(
    tmp_path_factory: pytest.TempPathFactory, name: str, file: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    wanted = texts(folder / name, f"{file}.txt")
    for text in (f"./{name}/{file}.txt", str(wanted)):
        found = locate(str(folder), text, may_be_id=False)
        assert [place.uri for place in find(found, "train")] == [str(wanted)]


@given(name=any_name)
def test_the_uri_of_a_sqlite_file_names_that_file(name: str) -> None:
    from sqlalchemy import make_url

    file = Path("/folder") / name / "mlflow.db"
    assert make_url(sqlite_uri(file)).database == str(file) and sqlite_file(sqlite_uri(file)) == file


def test_uris_that_name_no_sqlite_file() -> None:
    for uri in ("sqlite://", "sqlite:///:memory:", "http://127.0.0.1:5000", "postgresql://x/y"):
        assert sqlite_file(uri) is None
    assert sqlite_file("sqlite:///runs/mlflow.db?timeout=5") == Path(os.getcwd(), "runs", "mlflow.db")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {**FILES, "train": "no/file.txt"}}, "no file matches 'no/file.txt'"),
        ({"data": {**FILES, "train": "./sub"}}, r"no file matches './sub': it is a folder; name its files, as \./sub/"),
        ({"data": {**FILES, "train": "./broken.jsonl"}}, r"cannot read './broken\.jsonl' as its suffix says"),
        ({"data": {**FILES, "train": "sub/other.jsonl"}}, "no column 'text' in 'sub/other.jsonl'"),
        ({"data.tokenizer": {"kind": "pretrained", "name": "./no"}}, r"there is no folder './no'"),
        ({"models.student": {"pretrained": "./no"}}, r"no weights at './no'"),
        ({"models.student": {"pretrained": "sub"}}, "no weights at 'sub'"),
    ],
)
def test_messages_show_a_path_as_the_user_wrote_it(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    texts(tmp_path / "sub")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "sub" / "other.jsonl").write_text('{"words": "a"}\n')
    small = {"kind": "python_docs", "length": 16, "tokenizer": {"kind": "wordpiece", "size": 64}}
    found = study(tmp_path, {"data": small, **changes})
    spec = found.spec(seed=0).pruned()
    model = spec.models["student"].pretrained
    read = partial(Folder.read, model, None) if model else partial(prepare, spec.data["corpus"], str(tmp_path / "data"))
    with pytest.raises((DataError, ModelError), match=says) as caught:
        read()
    assert str(tmp_path) not in str(caught.value).partition("looked for at")[0]
