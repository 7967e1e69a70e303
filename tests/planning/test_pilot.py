"""Planning from a pilot: the spread of pairs that are in the storage, told with its source, and what seeds show by it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from orchestrator.analysis.statistics import detectable_in_sd, sd_interval, seeds_needed
from orchestrator.analysis.tables import RESULTS, TRIALS, Tables, write
from orchestrator.planning.pilot import pilot_lines
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from tests.support.trials import distillation
from trainables.storage.files import Storage

SOFT = "phases.distil.terms.teacher_to_student.weight"
CLAIM = {"arm": "taught", "against": "alone", "model": "student", "metric": "mlm_loss"}


def study_of(folder: Path, claims: Mapping[str, Any], seeds: int = 6) -> Study:
    raw = {
        "question": "?",
        "trial": {"data": {"kind": "python_docs", "tokenizer": {"kind": "wordpiece"}}, **distillation()},
        "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"},
        "arms": {"alone": {SOFT: 0}, "taught": {}},
        "seeds": seeds,
        "claims": dict(claims),
    }
    file = folder / "mine.yaml"
    file.write_text(json.dumps(raw))
    return load_study(file)


def store(home: Storage, arms: Mapping[str, list[float]], metric: str = "mlm_loss") -> None:
    """A study that ran: each trial took 900 s, and 900 s more of a teacher that both arms share at a seed."""
    results, trials = list[dict[str, Any]](), list[dict[str, Any]]()
    for arm, values in arms.items():
        for seed, value in enumerate(values):
            about = {
                "study": "s",
                "trial": f"{arm}-{seed}",
                "point": arm,
                "arm": arm,
                "seed": seed,
                "kind": "trial",
                "planned": True,
            }
            spent = {"reused": False, "flops": 1.0, "seconds": 900.0, "device_seconds": 900.0, "tokens": 5}
            phases = {"teach": {"key": f"t{seed}", **spent}, "distil": {"key": f"{arm}{seed}", **spent}}
            trials.append(
                {
                    **about,
                    "params": "{}",
                    "status": "ended",
                    "attempts": 1,
                    "started": 1,
                    "ended": 2,
                    "phases": json.dumps(phases),
                }
            )
            where = {
                "model": "student",
                "phase": "distil",
                "task": "corpus",
                "split": "test",
                "metric": metric,
                "step": 8,
            }
            results.append(
                {
                    **about,
                    **where,
                    "progress": 1.0,
                    "tokens": 5,
                    "seconds": 1.0,
                    "device_seconds": 1.0,
                    "flops": 1.0,
                    "t": 1,
                    "value": value,
                }
            )
    frames = (pd.DataFrame(rows, columns=schema.names) for rows, schema in ((results, RESULTS), (trials, TRIALS)))
    write(Tables(*frames), home)


GAPS = [0.01, 0.03, 0.05, 0.02, 0.04]
SD = float(np.std(GAPS, ddof=1))
ALONE = [3.0, 3.1, 3.2, 3.05, 3.3]
TAUGHT = [a - gap for a, gap in zip(ALONE, GAPS, strict=True)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "runs"))


def test_without_a_pilot_nothing_is_told(storage: Storage, tmp_path: Path) -> None:
    assert pilot_lines(study_of(tmp_path, {"helps": CLAIM}), storage) == []
    store(storage.sub("other"), {"alone": ALONE, "taught": TAUGHT}, metric="mlm_accuracy")
    store(storage.sub("short"), {"alone": ALONE[:2], "taught": TAUGHT[:2]})
    assert pilot_lines(study_of(tmp_path, {"helps": CLAIM}), storage) == []


def test_earlier_seeds_of_the_study_tell_effects_in_the_metrics_units_and_cost(
    storage: Storage, tmp_path: Path
) -> None:
    store(storage.sub("mine"), {"alone": ALONE, "taught": TAUGHT})
    claims = {
        "helps": {**CLAIM, "paper": -0.05},
        "alike": {**CLAIM, "within": 0.03},
        "no_worse": {**CLAIM, "margin": -0.02},
    }
    lines = pilot_lines(study_of(tmp_path, claims), storage)
    low, high = sd_interval(SD, 5)
    source = f"SD {SD:.2g} [{low:.2g}, {high:.2g}] from 5 pairs of mine in this storage"
    detects = f"6 paired seeds detect {SD * detectable_in_sd(6, alpha=0.05 / 3):.2g} mlm_loss; {source}"
    helps = seeds_needed(0.05 / SD, alpha=0.05 / 3)
    alike = seeds_needed(0.03 / SD, alpha=0.1 / 3, power=0.9)
    no_worse = seeds_needed(0.02 / SD, alpha=0.05 / 3)
    assert helps and alike and no_worse and low < SD < high
    hours = 0.75  # a teacher that both share, and a student of each
    assert lines == [
        f"helps: {detects}",
        f"helps: the paper’s -0.05 is told from 0 by {helps} seeds, about {helps * hours:.2g} device-hours for both arms",
        f"alike: {detects}",
        f"alike: arms that are alike are shown to be within ±0.03 by {alike} seeds, about {alike * hours:.2g} device-hours for both arms",
        f"no_worse: {detects}",
        f"no_worse: arms that are alike are told from the margin -0.02 by {no_worse} seeds, about {no_worse * hours:.2g} device-hours for both arms",
    ]


def test_another_study_is_a_pilot_by_the_same_arms_or_by_all_of_its_pairs(storage: Storage, tmp_path: Path) -> None:
    store(storage.sub("a_few"), {"alone": ALONE[:3], "taught": TAUGHT[:3]})
    third = [3.2, 3.0, 3.4, 3.1, 3.1]
    store(storage.sub("others"), {"x": ALONE, "y": TAUGHT, "z": third})
    (storage.path("broken")).mkdir()
    for table in ("results", "trials"):
        storage.sub("broken").write(f"{table}.parquet", b"no table")
    (line,) = pilot_lines(study_of(tmp_path, {"helps": CLAIM}), storage)
    pairs = [(ALONE, TAUGHT), (ALONE, third), (TAUGHT, third)]
    pooled = math.sqrt(np.mean([np.var(np.subtract(a, b), ddof=1) for a, b in pairs]))
    assert f"SD {pooled:.2g} [" in line and line.endswith("from 5 pairs of others in this storage")
    store(storage.sub("same"), {"alone": ALONE, "taught": TAUGHT})
    store(storage.sub("others"), {"x": ALONE[:4], "y": TAUGHT[:4], "z": third[:4]})
    (line,) = pilot_lines(study_of(tmp_path, {"helps": {**CLAIM, "within": 0.03}}), storage)[:1]
    assert f"SD {SD:.2g} [" in line and "5 pairs of same" in line
    assert all("device-hours" not in line for line in pilot_lines(study_of(tmp_path, {"helps": CLAIM}), storage))
