"""Texts as users have them: whatever characters are in a file, each kind of data is read, encoded, or refused in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.support.trials import wordy_documents
from trainables.config.data import Data
from trainables.config.errors import DataError
from trainables.data.prepare import fingerprint, prepare
from trainables.data.sources.read import read_source

ODD = (
    "\ud83d half",
    "whole \ud83d\ude42",
    "\udc00",
    "\x00nul",
    "\ufeffbom",
    "\x1b[31mred",
    "a\u2028b\x85c",
    "\r\n\r",
    "x" * 2_000,
)
TEXTS = st.text(st.characters(), min_size=1, max_size=40) | st.sampled_from(ODD)
WORDPIECE = {"kind": "wordpiece", "size": 128}


def whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def data_of(value: dict[str, Any]) -> Any:
    return TypeAdapter(Data).validate_python(value)


def lines(path: Path, rows: list[dict[str, Any]], **more: Any) -> str:
    path.write_text("".join(json.dumps(row, **more) + "\n" for row in rows))
    return str(path)


@settings(
    max_examples=6, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_every_kind_of_data_takes_any_text(texts: list[str], tmp_path: Path) -> None:
    given = [texts[i % len(texts)] for i in range(24)]
    rows = [
        {"text": f"{document} {text}", "label": i % 2, "answer": text}
        for i, (document, text) in enumerate(zip(wordy_documents(24, words=30), given, strict=True))
    ]
    path = lines(tmp_path / "rows.jsonl", rows)
    kinds: list[dict[str, Any]] = [
        {"kind": "files", "length": 16},
        {"kind": "labelled_files", "classes": [0, 1], "columns": {"first": "text"}},
        {
            "kind": "instruction_files",
            "columns": {"prompt": "text", "response": "answer"},
            "prompt_length": 500,
            "length": 600,
        },
    ]
    for kind in kinds:
        data = data_of({**kind, "train": path, "tokenizer": WORDPIECE})
        made = prepare(data, str(tmp_path / "data"))
        assert made.summary() and made.examples(None) and made.fingerprint == fingerprint(data)
    documents = read_source(data_of({**kinds[0], "train": path, "tokenizer": WORDPIECE})).train
    assert documents == tuple(whole(row["text"]) for row in rows)


def test_half_a_pair_becomes_the_replacement_character_and_whole_ones_stay(tmp_path: Path) -> None:
    rows = [
        {"text": "a \ud83d b", "o\udc00": 1},
        {"text": "\ud83d\ude42"},
        {"text": r"a \ud83d b"},
        {"text": "\\\ud83d"},
    ]
    for name, more in (("a.jsonl", {}), ("b.json", {})):
        path = tmp_path / name
        lines(path, rows, **more) if name == "a.jsonl" else path.write_text(json.dumps(rows))
        found = read_source(data_of({"kind": "files", "train": str(path), "tokenizer": WORDPIECE})).train
        assert found == ("a \ufffd b", "🙂", r"a \ud83d b", "\\\ufffd")


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".json"])
def test_a_byte_order_mark_is_no_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    content = {
        ".txt": "first\n",
        ".csv": "text\nfirst\n",
        ".jsonl": '{"text": "first"}\n',
        ".json": '[{"text": "first"}]',
    }
    path.write_bytes(b"\xef\xbb\xbf" + content[suffix].encode())
    found = read_source(data_of({"kind": "files", "train": str(path), "tokenizer": WORDPIECE})).train
    assert [text.strip() for text in found or ()] == ["first"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ' + "[" * 100_000, r"a\.jsonl' as its suffix says: line 2, column 1: maximum recursion"),
        (
            '{"text": "a", "n": ' + "1" * 5000 + "}",
            r"a\.jsonl' as its suffix says: line 2, column 1: Exceeds the limit",
        ),
        ('{"text": "a\x00', r"a\.jsonl' as its suffix says: line 2, column 12: Invalid control character"),
    ],
)
def test_what_no_parser_takes_is_refused_with_file_and_line(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=says) as caught:
        read_source(data_of({"kind": "files", "train": str(tmp_path / "a.jsonl"), "tokenizer": WORDPIECE}))
    assert "\n" not in str(caught.value)


def test_control_characters_in_a_csv_file_are_text(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["a\x01\x1b[0m\tb"], ["x" * 200_000]])
    found = read_source(data_of({"kind": "files", "train": str(tmp_path / "a.csv"), "tokenizer": WORDPIECE})).train
    assert found == ("a\x01\x1b[0m\tb", "x" * 200_000)
