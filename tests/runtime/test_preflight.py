"""What a machine must have before it runs trials: each defect is made for real where it can be, and told in one line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.support.trials import distillation, wordy_documents
from trainables.config.trial import TrialSpec
from trainables.data.prepare import prepare
from trainables.runtime import preflight
from trainables.runtime.preflight import MARKER, Expected, expect, fault
from trainables.storage.files import Storage


@pytest.fixture
def expected(tmp_path: Path) -> Expected:
    """Storage with a corpus, and a folder with a model, as a driver has them."""
    (tmp_path / "corpus.txt").write_text("\n\n".join(wordy_documents(60)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    data = {"kind": "files", "train": str(tmp_path / "corpus.txt"), "tokenizer": {"kind": "wordpiece", "size": 160}, "length": 16, "evaluate": 8}  # fmt: skip
    spec = TrialSpec.model_validate(
        {**distillation(teacher={"pretrained": str(tmp_path / "model")}), "data": data, "precision": "bf16"}
    )
    storage = Storage(str(tmp_path / "runs"))
    found = {f"data:{name}": prepare(d, storage.sub("data").uri).fingerprint for name, d in spec.data.items()}
    told = expect(storage, "study", device="cpu", specs=[spec, spec], fingerprints=[found, {**found, "model:m": "x"}])
    assert told.bf16 and len(told.data) == 1 and told.models == (str(tmp_path / "model"),)
    return Expected(**json.loads(json.dumps(asdict(told))))  # as a slot has it


def why(expected: Expected) -> str:
    told = fault(expected)
    assert told is not None and "\n" not in told and "; expected " in told
    name, _, rest = told.partition(": ")
    assert name == socket.gethostname()
    return rest


def test_a_machine_like_the_drivers_is_fit_and_nothing_is_left_on_it(expected: Expected, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert fault(expected) is None
    assert sorted(tmp_path.rglob("*")) == before
    start = time.monotonic()
    fault(expected)
    assert time.monotonic() - start < 5, "a fraction of a second where nobody else computes"


def test_storage_that_is_another_one_or_of_another_sweep_is_noticed(expected: Expected, tmp_path: Path) -> None:
    own = tmp_path / "a folder of its own"
    assert why(replace(expected, storage=str(own))).startswith(f"{own} is not the driver's storage (study/{MARKER}")
    assert not own.exists(), "nothing is begun there"
    assert "is not the driver's storage" in why(replace(expected, token="another"))
    assert "is not the driver's storage" in why(replace(expected, folder="other"))


def test_storage_that_cannot_be_written_or_reached_is_noticed(
    expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(uri: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preflight, "check_writable", full)
    assert "cannot be read and written (OSError: No space left on device)" in why(expected)
    monkeypatch.undo()
    assert "cannot be read and written" in why(replace(expected, storage="nosuchprotocol://bucket/runs"))


def test_storage_that_never_answers_is_not_waited_for(
    expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that never returns, as of a dead network folder: a pipe into which nobody writes."""
    marker = tmp_path / "runs" / "study" / MARKER
    marker.unlink()
    os.mkfifo(marker)
    monkeypatch.setattr(preflight, "SECONDS", 0.5)
    told = fault(expected)
    with marker.open("wb"):  # lets the reader go
        pass
    assert told is not None and told.endswith("its storage or device did not answer within 0.5 s")


def test_other_versions_are_named_with_the_drivers_and_builds_do_not_matter(
    expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{told(name).partition('+')[0]}+other")
    assert fault(expected) is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "peft" else told(name))
    assert why(expected) == f"peft 0.0.1 (the driver has {told('peft')}); expected the driver's versions"
    monkeypatch.undo()
    elsewhere = replace(expected, versions={**expected.versions, "python": "3.99"})
    assert why(elsewhere).startswith("python 3.") and "(the driver has 3.99)" in why(elsewhere)


def test_a_package_that_is_missing_is_named(expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert "PackageNotFoundError" in (fault(expected) or "") and "torch" in (fault(expected) or "")


def test_code_that_differs_by_a_byte_is_noticed(
    expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(preflight.__file__).parents[1]
    copy = tmp_path / "trainables"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(preflight, "__file__", str(copy / "runtime" / "preflight.py"))
    assert fault(expected) is None
    with (copy / "losses" / "logits.py").open("a") as file:
        file.write("#")
    assert why(expected) == f"the files of {copy} are not the driver's; expected a copy of them"


def test_a_device_that_is_missing_or_does_not_compute_is_noticed(
    expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why(replace(expected, device="cuda")).startswith("torch finds no CUDA device")
    told = fault(expected, "meta")  # computes nothing
    assert told is not None and "meta does not compute" in told
    ones = torch.ones

    def wrong(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        return ones(*size, dtype=dtype, device=device) * (2 if dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(torch, "ones", wrong)
    assert "cpu computes a product in torch.bfloat16 wrongly" in why(expected)
    assert fault(replace(expected, bf16=False)) is None, "only what the trials use is tried"


@pytest.mark.parametrize("damage", ["all gone", "cut off", "nobody may read it"])
def test_prepared_data_that_cannot_be_read_are_named(expected: Expected, tmp_path: Path, damage: str) -> None:
    home = tmp_path / "runs" / "data" / expected.data[0]
    largest = max((path for path in home.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    match damage:
        case "all gone":
            shutil.rmtree(home)
        case "cut off":
            os.truncate(largest, 10)
        case "nobody may read it":
            if os.geteuid() == 0:
                pytest.skip("root may read everything")
            largest.chmod(0)
    assert why(expected).startswith(f"prepared data {expected.data[0][:12]} cannot be read in {tmp_path}/runs/data")


def test_prepared_data_in_remote_storage_are_looked_for_there(expected: Expected, tmp_path: Path) -> None:
    remote = Storage("memory://preflight")
    there = replace(expected, storage=remote.uri)
    remote.write(f"study/{MARKER}", expected.token.encode())
    assert why(there).startswith("prepared data")
    remote.write(f"data/{expected.data[0]}/about.json", (tmp_path / "runs" / "data" / expected.data[0] / "about.json").read_bytes())  # fmt: skip
    assert fault(there) is None
    assert remote.list("study") == [MARKER], "what was written for the look is gone"
    remote.delete("")


def test_a_model_that_only_the_driver_has_is_named(expected: Expected, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "model")
    assert why(expected).startswith(f"no model in {tmp_path}/model; expected a folder that every machine has")
