"""A trial's end is believed only where its checksum, and that of its records, agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.scheduling import trial_files
from trainables.storage.files import Storage

ROW = {"trial": "abc", "status": "ended", "params": {"x": 1.5}, "phases": {}}
RECORD = {"metric": "mlm_loss", "value": 3.25}


@pytest.fixture
def home(tmp_path: Path) -> Storage:
    home = Storage(str(tmp_path))
    home.write("trials/abc/attempt-1/records.jsonl", json.dumps(RECORD).encode() + b"\n")
    assert trial_files.write_end(home, "abc", ROW) == [RECORD]
    return home


def test_an_end_is_read_back_with_its_records(home: Storage) -> None:
    assert trial_files.read_end(home, "abc") == (ROW, [RECORD])
    assert trial_files.read_end(home, "unknown") is None and trial_files.read_start(home, "unknown") is None


@pytest.mark.parametrize("damage", ["half", "flipped", "other", "list", "records", "no records", "no checksum"])
def test_a_damaged_end_counts_as_none(home: Storage, damage: str) -> None:
    text = home.read("trials/abc/end.json") or b""
    match damage:
        case "half":
            home.write("trials/abc/end.json", text[: len(text) // 2])
        case "flipped":
            home.write("trials/abc/end.json", text.replace(b"1.5", b"1.6"))
        case "other":
            home.write("trials/abc/end.json", b"\xff\x00")
        case "list":
            home.write("trials/abc/end.json", b"[]")
        case "records":
            home.write("trials/abc/attempt-1/records.jsonl", json.dumps({**RECORD, "value": 3.0}).encode() + b"\n")
        case "no records":
            home.delete("trials/abc/attempt-1/records.jsonl")
        case "no checksum":
            home.write("trials/abc/end.json", json.dumps(ROW).encode())
    assert trial_files.read_end(home, "abc") is None


def test_checkpoints_of_a_trial_that_will_not_go_on_are_counted_and_forgotten(home: Storage) -> None:
    home.write("trials/abc/attempt-1/checkpoint-x.pt", b"12345")
    home.write("trials/abc/attempt-2/checkpoint.json", b"123")
    assert trial_files.checkpoint_bytes(home, "abc") == 8
    trial_files.forget_checkpoints(home, "abc")
    assert trial_files.checkpoint_bytes(home, "abc") == 0 and home.read("trials/abc/attempt-1/records.jsonl")
