"""Draws the choices of a sweep where the truth is known: tuned rates by `Tuning`, and winners by `confirm_verdict`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd

from orchestrator.analysis.queries import MetricQuery
from orchestrator.analysis.verdicts import Confirmation, confirm_verdict
from orchestrator.scheduling.trials import CONFIRM_SEED
from orchestrator.scheduling.tuning import Tuning
from orchestrator.study.schema import Objective, Study, Tune

Rng = np.random.Generator
SD = 0.1  # of one run; of a paired difference √2 times as much
PATH = "phases.train.optimizer.lr"


@dataclass
class _Ledger:
    """The trials of a race: each is over as soon as its loss is drawn."""

    study: Study
    losses: dict[str, float] = field(default_factory=dict)
    running: dict[str, Any] = field(default_factory=dict)

    def plan(self, planned: Any) -> None:
        pass

    def is_over(self, trial: str) -> bool:
        return trial in self.losses

    def value(self, trial: str) -> float:
        return self.losses[trial]


def tuned_rates(rng: Rng, costs: Mapping[float, float], *, seeds: int) -> tuple[dict[str, float], int]:
    """Tunes two arms that are alike; returns the rate that each takes, and the number of trials.

    `costs`: by rate, what the rate adds to the loss.
    """
    study = Study(
        name="s", file="s.yaml", question="?", trial={}, arms={"a": {}, "alone": {}},
        objective=Objective(phase="train", model="m", metric="lm_loss", mode="min"),
        tune=Tune(grid={PATH: tuple(costs)}, seeds=seeds, extend=0),
    )  # fmt: skip

    def planned(arm: str, sizes: Mapping[str, str], value: Mapping[str, float], *, seed: int) -> Any:
        return SimpleNamespace(id=f"{arm}-{value[PATH]}-{seed}", seed=seed, loss=costs[value[PATH]])

    ledger, of_seed = _Ledger(study), rng.normal(0, SD, 100)
    teachers = SimpleNamespace(before=lambda planned: planned)
    tuning = Tuning(cast(Any, ledger), cast(Any, SimpleNamespace(tuning=planned)), cast(Any, teachers))
    while (next_ := cast(Any, tuning.next())) is not None:
        ledger.losses[next_.id] = next_.loss + of_seed[next_.seed] + rng.normal(0, SD)
        tuning.update(next_.id)
    return {arm: float((tuning.tuned(arm) or {})[PATH]) for arm in study.arms}, len(ledger.losses)


def confirmed(
    losses: Mapping[str, Sequence[float]], *, earlier: int = 0, at_cost: str | None = None
) -> Confirmation:  # fmt: skip
    """Judges the first point against the others. `earlier`: winners that were confirmed before, and are planned no more."""
    rows, trials = list[dict[str, Any]](), list[dict[str, Any]]()
    points = {**losses, **{f"earlier{i}": next(iter(losses.values())) for i in range(earlier)}}
    for point, values in points.items():
        arm = None if point == next(iter(losses)) or point.startswith("earlier") else "alone"
        for seed, value in enumerate(values, CONFIRM_SEED):
            about = {"trial": f"{point}-{seed}", "arm": arm, "point": point, "seed": seed, "kind": "confirm"}
            about["planned"] = not point.startswith("earlier")
            done = {"key": about["trial"], "reused": False, "tokens": 0, "device_seconds": 1.0, "flops": 50.0}
            trials.append({**about, "status": "ended", "phases": json.dumps({"train": done})})
            where = {"phase": "train", "model": "m", "metric": "lm_loss", "split": "test", "task": "text", "tokens": 0}
            rows.append({**about, **where, "device_seconds": 1.0, "progress": 1.0, "flops": 50.0, "value": value})
    names = [name for name in losses if name != at_cost]
    query = MetricQuery("train", "m", "lm_loss")
    return confirm_verdict(pd.DataFrame(rows), pd.DataFrame(trials), names, query, at_cost=at_cost)


def rate_search(rng: Rng, costs: Sequence[float], *, n: int = 5) -> tuple[bool, bool]:
    """Searches the rate of an arm that is no better than the baseline, whose own rate is the first.

    Returns whether the winner is supported against the baseline at that rate, and whether at the winner's rate too.
    """
    best = int(np.argmin(np.array(costs) + rng.normal(0, SD, len(costs))))
    of_seed = rng.normal(0, SD, n)
    means = {"p000": costs[best], "alone": costs[0], "alone at settings of p000": costs[best]}
    losses = {name: 3 + mean + of_seed + rng.normal(0, SD, n) for name, mean in means.items()}
    fixed = confirmed({name: losses[name] for name in ("p000", "alone")})
    return fixed.verdict == "supported", confirmed(losses).verdict == "supported"


def rounds(rng: Rng, *, num: int, n: int = 5) -> bool:
    """Confirms so many winners one after another, none of which is better: is any supported?"""
    alone = 3 + rng.normal(0, SD, n)
    return any(
        confirmed({f"p{i}": 3 + rng.normal(0, SD, n), "alone": alone}, earlier=i).verdict == "supported"
        for i in range(num)
    )
