"""What several tests share: a small corpus, tiny models, and a place to run trials of them in this process."""

from __future__ import annotations

import copy
import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from trainables.config.data import Data, Files
from trainables.config.trial import TrialSpec
from trainables.data.prepare import prepare
from trainables.runtime.trial import run_trial
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore
from trainables.training.phase_graph import PhaseRun, phase_key
from trainables.training.state import Environment, SingleProcess

torch.set_num_threads(1)  # sums in one order: tests compare bits

FAMILIES = ("bert", "modernbert", "gpt2", "llama")
TINY = {"layers": 1, "width": 16, "heads": 2, "inner": 32, "dropout": 0}


def _numbers(state: int) -> Any:
    """A linear congruential generator (Knuth's MMIX): the same text under every version of Python."""
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield state >> 33


def wordy_documents(num: int, *, words: int = 60, seed: int = 0) -> list[str]:
    """Text in which a word says much about the next one, so that a tiny model learns something in a few steps."""
    syllables = ("lo", "ra", "mi", "tun", "ske", "por", "ba", "den", "fi", "gol", "hur", "ix", "ta", "ve")
    vocabulary = [a + b for a in syllables[:7] for b in syllables[7:]]
    draw = _numbers(seed)
    texts = []
    for _ in range(num):
        word, text = next(draw) % len(vocabulary), list[str]()
        for _ in range(words):
            text.append(vocabulary[word])
            word = (5 * word + 3 + next(draw) % 3) % len(vocabulary)
        texts.append(" ".join(text) + ".")
    return texts


class Stopped(Exception):
    """A stop from outside: not an error of the trial."""


@dataclass
class Listener(SingleProcess):
    """A session that collects what is reported, and ends the trial where it is told to."""

    stop_at: tuple[str, float] | None = None  # phase, progress
    reports: list[list[dict[str, Any]]] = field(default_factory=list)

    def report(self, records: list[dict[str, Any]]) -> None:
        self.reports.append(records)
        if self.stop_at is not None and any((r["phase"], r["progress"]) == self.stop_at for r in records):
            raise Stopped


@dataclass(frozen=True)
class Ran:
    """A trial that ended: its records as the files tell them, and what became of its phases."""

    lab: Lab
    spec: TrialSpec
    records: list[dict[str, Any]]
    phases: dict[str, Any]

    @property
    def values(self) -> dict[tuple[Any, ...], float]:
        """Every number that the spec determines; times and memory are the machine's."""
        what = ("phase", "model", "task", "split", "metric", "step", "progress", "tokens")
        return {tuple(r[key] for key in what): r["value"] for r in self.records if r["split"] != "system"}

    def of(self, phase: str, model: str, metric: str, split: str = "dev") -> list[float]:
        """A metric's values over the budget."""
        wanted = (phase, model, metric, split)
        return [r["value"] for r in self.records if (r["phase"], r["model"], r["metric"], r["split"]) == wanted]

    def weights(self, phase: str, model: str, item: str | None = None) -> dict[str, torch.Tensor]:
        key = phase_key(self.spec.pruned(), PhaseRun(phase, item), self.lab.fingerprints)
        return self.lab.store.weights(key, model)


@dataclass(frozen=True)
class Lab:
    """A storage with prepared data in it."""

    root: Path
    fingerprints: Mapping[str, str]
    data: Mapping[str, Any]  # as a spec says it

    @property
    def storage(self) -> Storage:
        return Storage(str(self.root))

    @property
    def store(self) -> PhaseStore:
        return PhaseStore(self.storage)

    def spec(self, trial: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> TrialSpec:
        """A trial over this lab's data, with some dotted paths set otherwise."""
        value = copy.deepcopy({"data": self.data, **trial})
        for path, part in (changes or {}).items():
            *parents, last = path.split(".")
            at = value
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = part
        return TrialSpec.model_validate(value)

    def key(self, spec: TrialSpec, phase: str, item: str | None = None) -> str:
        return phase_key(spec.pruned(), PhaseRun(phase, item), self.fingerprints)

    def run(
        self, spec: TrialSpec, *, attempt: int = 1, trial: str = "t", session: Listener | None = None, **more: Any
    ) -> Ran:
        """Runs an attempt at a trial; earlier ones are known to it."""
        home = f"study/trials/{trial}"
        more.setdefault("checkpoint_seconds", 1e9)
        at = Environment(
            storage=self.storage,
            folder=f"{home}/attempt-{attempt}",
            earlier=tuple(f"{home}/attempt-{n}" for n in range(1, attempt)),
            trial=trial,
            **more,
        )
        end = run_trial(spec, self.fingerprints, at, session or Listener())
        return Ran(self, spec, self.records(trial, attempt), end["phases"])

    def records(self, trial: str = "t", attempt: int = 1) -> list[dict[str, Any]]:
        text = self.storage.read(f"study/trials/{trial}/attempt-{attempt}/records.jsonl") or b""
        return [json.loads(line) for line in text.splitlines()]


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


def write_task(file: Path, num: int, *, pair: bool, number: bool, seed: int) -> None:
    """Texts whose label is how many of a few words they hold (a number), or whether they hold more than usual."""
    draw = random.Random(seed)
    words = sorted(set(" ".join(wordy_documents(20, seed=1)).split()))
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["first", "second", "label"])
        for _ in range(num):
            text = draw.choices(words, k=draw.randint(4, 14))
            share = sum(word in words[:12] for word in text) / len(text)
            label: Any = round(5 * share, 3) if number else ("many" if share > 0.2 else "few")
            rows.writerow([" ".join(text), " ".join(draw.choices(words, k=3)) if pair else "", label])


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


def write_questions(file: Path, words: str, *, seed: int) -> None:
    """A question names two of the words, and the answer repeats them."""
    pairs = [(a, b) for a in words.split() for b in words.split() if a != b]
    random.Random(seed).shuffle(pairs)
    rows = ({"instruction": f"say {a} {b}", "response": f"{a} {b}"} for a, b in pairs)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


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


def model(family: str = "bert", **more: Any) -> dict[str, Any]:
    return {"family": family, **TINY, **more}


def phase(train: str | tuple[str, ...], terms: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    names = (train,) if isinstance(train, str) else train
    return {
        "train": dict.fromkeys(names, "full"),
        "terms": dict(terms),
        "budget": {"steps": 8},
        "batch": 8,
        "optimizer": {"lr": 5e-3, "warmup": 0.1},
        **more,
    }


def hard(of: str, **more: Any) -> dict[str, Any]:
    return {"kind": "cross_entropy", "of": of, **more}


def flow(source: str, to: str, kind: str = "forward_kl", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "from": source, "to": to, "tau_squared": False, **more}


def inner(source: str, to: str, kind: str, **more: Any) -> dict[str, Any]:
    """A flow inside the models: no temperature."""
    return {"kind": kind, "from": source, "to": to, **more}


def distillation(**models: Any) -> dict[str, Any]:
    """A teacher is trained, then a student from it: the smallest trial in which everything happens."""
    return {
        "models": {"teacher": model(), "student": model(), **models},
        "phases": {
            "teach": phase("teacher", {"teacher_hard": hard("teacher")}),
            "distil": phase(
                "student",
                {"student_hard": hard("student"), "teacher_to_student": flow("teacher", "student", temperature=2)},
            ),
        },
    }


def answering(family: str = "gpt2", **distil: Any) -> dict[str, Any]:
    """A teacher learns to answer, then a student from it; `distil` says more of that phase."""
    stream = {"main": {"data": "ask"}}
    return {
        "models": {"teacher": model(family, width=32), "student": model(family)},
        "phases": {
            "teach": phase(
                "teacher",
                {"teacher_hard": hard("teacher")},
                streams=stream,
                budget={"steps": 12},
                evaluate=[1],
                optimizer={"lr": 1e-2},
            ),
            "distil": phase(
                "student",
                {"teacher_to_student": flow("teacher", "student")},
                **{"streams": stream, "batch": 6, "evaluate": [0.5, 1], **distil},
            ),
        },
    }


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Any]:
    """Starts sweeps; nothing of them may be left behind."""
    from sweeping import Bench

    bench = Bench(tmp_path)
    yield bench
    bench.close()
