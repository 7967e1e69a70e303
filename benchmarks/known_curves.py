"""Draws the tables of a study over sizes, budgets and teachers whose curves are known, for `error_rates` and for tests."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from orchestrator.analysis.queries import TaskFacts
from orchestrator.analysis.verdicts import Verdict, judge
from orchestrator.study.claims import AnyClaim
from orchestrator.study.scaling_grid import Grid
from trainables.config.phase_run import PhaseRun, Start

SIZES = (20e3, 40e3, 80e3, 160e3)
TOKENS = (30e3, 60e3, 120e3, 210e3, 300e3)
PHASES = tuple(f"d{i}" for i in range(len(TOKENS)))
TEACHERS = {"good": 3.9, "poor": 5.0}  # with their losses
What = Literal["r", "compute", "loss"]


@dataclass(frozen=True)
class Known:
    """Tables beside the truth behind them."""

    results: pd.DataFrame
    trials: pd.DataFrame
    facts: TaskFacts
    crossing: float  # r* or C*
    losses: tuple[float, ...]  # of the largest model alone, by phase

    def judge(self, **claim: Any) -> Verdict:
        fields = {"model": "m", "metric": "lm_loss", "phases": PHASES, **claim}
        asked = {"c": TypeAdapter[AnyClaim](AnyClaim).validate_python(fields)}
        return judge(asked, self.results, self.trials, default_phase=PHASES[-1], tasks=self.facts)["c"]

    def covers(self, what: What) -> bool:
        """Whether the 95 % interval of what is estimated has the truth inside; of the losses, that of the last."""
        if what == "loss":
            estimate, truth = self.judge(foretells={}, error_below=0.02).estimates[-1], self.losses[-1]
        else:
            estimate, truth = self.judge(crossing=what, below=self.crossing).estimates[0], self.crossing
        return estimate.interval[0] <= truth <= estimate.interval[1]


def known_curves(
    rng: np.random.Generator,
    along: Literal["r", "compute"] = "r",
    *,
    seeds: int = 4,
    noise: float = 0.005,
    at: float = 0.05,
) -> Known:
    """Draws losses alone from a law, and gains that fall through 0 along r or compute.

    Args:
        noise: relative SD of three parts each: of a seed, of a run (its budgets are decays from one trunk), of a loss.
        at: where the crossing is, as the logarithm of its ratio to the middle of what is measured.
    """
    cells = list(itertools.product(range(len(SIZES)), range(len(TOKENS))))
    size_K, tokens_K = np.array([SIZES[i] for i, _ in cells]), np.array([TOKENS[j] for _, j in cells])
    alone_K = 3 + 0.4 * (size_K / 57e3) ** -0.5 + (tokens_K / 1e5) ** -0.45
    compute_K = np.log(6 * size_K * tokens_K)
    side = {name: np.log(loss / alone_K) if along == "r" else compute_K for name, loss in TEACHERS.items()}
    other = {
        name: np.log(tokens_K) if along == "r" else np.full_like(tokens_K, math.log(loss))
        for name, loss in TEACHERS.items()
    }
    middle, mean = (float(np.mean([*of.values()])) for of in (side, other))
    slope, curvature = (-0.5, 0.2) if along == "r" else (-0.05, 0.004)
    losses = {"alone": alone_K}
    for name in TEACHERS:
        s_K = side[name] - middle - at
        losses[name] = alone_K - (slope * s_K + curvature * s_K**2 + 0.05 * (other[name] - mean))
    drawn = [
        _trial(rng, name, i, seed=seed, of_seed=of_seed, losses=loss_K[len(TOKENS) * i :][: len(TOKENS)], noise=noise)
        for seed, of_seed in enumerate(rng.normal(0, noise, seeds))
        for name, loss_K in losses.items()
        for i in range(len(SIZES))
    ]
    taught = [f"{name}{i}" for name in TEACHERS for i in range(len(SIZES))]
    arms = [*taught, *(f"alone{i}" for i in range(len(SIZES)))]
    trained = {arm: {phase: (Start(PhaseRun(phase)),) for phase in PHASES} for arm in arms}
    grid = Grid(
        trained, {arm: f"alone{arm[-1]}" for arm in taught}, dict.fromkeys(taught, ("t", Start(PhaseRun("teach"))))
    )
    return Known(
        pd.DataFrame([row for rows, _ in drawn for row in rows]),
        pd.DataFrame([trial for _, trial in drawn]),
        TaskFacts(grids={"c": grid}),
        math.exp(middle + at),
        tuple(alone_K[-len(TOKENS) :].tolist()),
    )


def _trial(
    rng: np.random.Generator, name: str, size: int, *, seed: int, of_seed: float, losses: Any, noise: float
) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    arm, of_run = f"{name}{size}", rng.normal(0, noise)
    about = {"trial": f"{arm}-{seed}", "arm": arm, "point": arm, "seed": seed, "kind": "trial", "planned": True}
    done, rows = {}, []
    for phase, tokens, loss in zip(PHASES, TOKENS, losses, strict=True):
        spent = {"tokens": tokens, "flops": 6 * SIZES[size] * tokens, "device_seconds": 1.0}
        done[phase] = {**spent, "reused": False, "key": f"{arm}{phase}{seed}"}
        where = {**about, "phase": phase, "model": "m", "task": "text", "progress": 1.0, **spent}
        value = loss * math.exp(of_seed + of_run + rng.normal(0, noise))
        rows.append({**where, "metric": "lm_loss", "split": "test", "value": value})
        rows.append({**where, "metric": "parameters", "split": "system", "value": SIZES[size]})
    if name in TEACHERS:
        of_teacher = np.random.default_rng([seed, *map(ord, name)]).normal(0, noise)  # students share it
        teacher = {"phase": "teach", "model": "t", "value": TEACHERS[name] * math.exp(of_teacher)}
        rows.append({**rows[0], **teacher})
    return rows, {**about, "status": "ended", "phases": json.dumps(done)}
