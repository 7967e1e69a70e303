"""Tiny models, small data, and a place to run trials of them in this process."""

from __future__ import annotations

import copy
import csv
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.config.phase_run import PhaseRun
from trainables.config.session import SingleProcess
from trainables.config.trial import TrialSpec
from trainables.runtime.trial import run_trial
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore
from trainables.training import loop
from trainables.training.phase_graph import phase_key
from trainables.training.state import Environment

FAMILIES = ("bert", "modernbert", "gpt2", "llama")


TINY = {"layers": 1, "width": 16, "heads": 2, "intermediate_size": 32, "dropout": 0}


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


def write_questions(file: Path, words: str, *, seed: int) -> None:
    """A question names two of the words, and the answer repeats them."""
    pairs = [(a, b) for a in words.split() for b in words.split() if a != b]
    random.Random(seed).shuffle(pairs)
    rows = ({"instruction": f"say {a} {b}", "response": f"{a} {b}"} for a, b in pairs)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def model(family: str = "bert", **more: Any) -> dict[str, Any]:
    tiny = {key: value for key, value in TINY.items() if family != "bloom" or key != "intermediate_size"}  # it has none
    return {"family": family, **tiny, **more}


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


def same_numbers(a: Ran, b: Ran) -> None:
    """Bit-equal records and weights in every phase."""
    assert a.values == b.values and len(a.values) > 0
    for name, one in a.phases.items():
        other = b.phases[name]
        assert (one["key"], one["flops"], one["tokens"]) == (other["key"], other["flops"], other["tokens"])
        ours, theirs = a.lab.store.find(one["key"]), b.lab.store.find(other["key"])
        assert ours is not None and theirs is not None
        assert ours.files == theirs.files  # names of files are hashes of their content


def close_numbers(a: Ran, b: Ran, *, rtol: float) -> None:
    assert a.values.keys() == b.values.keys()
    for key, value in a.values.items():
        if "accuracy" not in key[4]:
            assert b.values[key] == pytest.approx(value, rel=rtol, abs=rtol), key


def break_at(monkeypatch: pytest.MonkeyPatch, phase: str, step: int) -> None:
    """The process dies, as it were, before this step."""
    real = loop.step

    def dying(at: Any) -> None:
        if (at.instance.phase, at.progress.step) == (phase, step):
            raise Stopped
        real(at)

    monkeypatch.setattr(loop, "step", dying)


STEADY = {"lr": 5e-3, "warmup": 0.1, "eps": 1e-3, "weight_decay": 0.1}  # as in test_loop.py


def sampled(by: str, **more: Any) -> dict[str, Any]:
    return {"main": {"data": "ask", "replies": {"kind": "sampled", "by": by, "max_tokens": 6, **more}}}


def interleaved(**more: Any) -> dict[str, Any]:
    made = {"kind": "interleaved", "draft": "student", "teacher": "teacher", "max_tokens": 6, "block": 2, "top": 3}
    return {"main": {"data": "ask", "replies": {**made, **more}}}
