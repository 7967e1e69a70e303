"""What several tests share: a small corpus, tiny models, and a place to run trials of them in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from pydantic import TypeAdapter

from tests.support.trials import Lab, wordy_documents, write_questions, write_task
from trainables.config.data import Data, Files
from trainables.data.prepare import prepare

torch.set_num_threads(1)  # sums in one order: tests compare bits
settings.register_profile(
    "ours", deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("ours")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, Any]]:
    """(folder of prepared data, fingerprints, what a spec says of it): two data sets with one tokenizer."""
    home = tmp_path_factory.mktemp("shared")
    tokenizer: dict[str, Any] = {"kind": "wordpiece", "size": 160}
    data, fingerprints = {}, {}
    for name, seed in (("corpus", 1), ("other", 2)):
        (home / f"{name}.txt").write_text("\n\n".join(wordy_documents(160, seed=seed)))
        value = {"kind": "files", "train": str(home / f"{name}.txt"), "tokenizer": tokenizer, "length": 32}
        data[name] = {**value, "evaluate": 12}
        corpus = prepare(Files.model_validate(data[name]), str(home / "data"))
        fingerprints[f"data:{name}"] = corpus.fingerprint
        tokenizer = {"kind": "pretrained", "name": str(home / "data" / corpus.fingerprint / "tokenizer")}
    return home / "data", fingerprints, data


@pytest.fixture(scope="session")
def new_lab(
    prepared: tuple[Path, dict[str, str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Lab]:
    """Makes labs with empty stores over the shared data."""

    def make() -> Lab:
        root = tmp_path_factory.mktemp("lab")
        (root / "data").symlink_to(prepared[0])
        return Lab(root, prepared[1], prepared[2])

    return make


@pytest.fixture(scope="session")
def tasks(prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Any]]:
    """(fingerprints, what a spec says): two classifications, one of pairs, and a regression, beside the corpora."""
    folder, fingerprints, data = prepared
    home = tmp_path_factory.mktemp("tasks")
    fingerprints, data = dict(fingerprints), dict(data)
    adapter: Any = TypeAdapter(Data)
    for seed, (name, pair, number) in enumerate(
        (("single", False, False), ("pair", True, False), ("number", True, True))
    ):
        write_task(home / f"{name}.csv", 150, pair=pair, number=number, seed=seed)
        columns = {"first": "first", "label": "label"} | ({"second": "second"} if pair else {})
        data[name] = {"kind": "labelled_files", "train": str(home / f"{name}.csv"), "columns": columns, "length": 32, "tokenizer": {"kind": "same", "as": "corpus"}}  # fmt: skip
        data[name] |= {} if number else {"classes": ["few", "many"]}
        others = {other: adapter.validate_python(value) for other, value in data.items()}
        fingerprints[f"data:{name}"] = prepare(others[name], str(folder), others).fingerprint
    return fingerprints, data


@pytest.fixture
def new_task_lab(new_lab: Callable[[], Lab], tasks: Any) -> Callable[[], Lab]:
    return lambda: replace(new_lab(), fingerprints=tasks[0], data=tasks[1])


@pytest.fixture(scope="session")
def instructed(prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Any]]:
    """(fingerprints, what a spec says): `ask` to learn from, and `more`, which is only there to be scored."""
    home, fingerprints = tmp_path_factory.mktemp("instructions"), {}
    write_questions(home / "ask.jsonl", "red blue green one two three cat dog fish sun moon", seed=0)
    write_questions(home / "more.jsonl", "red two fish tree", seed=1)
    common = {"kind": "instruction_files", "length": 80, "prompt_length": 72}
    scoring = {"max_tokens": 6, "seeds": [10, 20]}
    data = {
        "ask": {**common, "train": str(home / "ask.jsonl"), "tokenizer": {"kind": "wordpiece", "size": 220}, "evaluate": 8, "scoring": scoring},
        "more": {**common, "test": str(home / "more.jsonl"), "tokenizer": {"kind": "same", "as": "ask"}, "evaluate": 6, "scoring": scoring},
    }  # fmt: skip
    adapter: Any = TypeAdapter(Data)
    others = {name: adapter.validate_python(value) for name, value in data.items()}
    for name, one in others.items():
        fingerprints[f"data:{name}"] = prepare(one, str(prepared[0]), others).fingerprint
    return fingerprints, data


@pytest.fixture(scope="session")
def new_instructed_lab(new_lab: Callable[[], Lab], instructed: Any) -> Callable[[], Lab]:
    return lambda: replace(new_lab(), fingerprints=instructed[0], data=instructed[1])


@pytest.fixture
def lab(new_lab: Callable[[], Lab]) -> Lab:
    return new_lab()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Any]:
    """Starts sweeps; nothing of them may be left behind."""
    from tests.support.sweeps import Bench

    bench = Bench(tmp_path)
    yield bench
    bench.close()
