"""The numbers that a report or a search compares: by trial, by seed, by point.

A stopped, failed or unplanned trial is in no mean.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.analysis.costs import cost_of_rows
from orchestrator.analysis.queries import MetricQuery, TaskFacts, parsed
from orchestrator.analysis.tables import Tables
from orchestrator.study.claims import Claim
from orchestrator.study.schema import Study, tasks_of
from trainables.metrics.task_scores import score_metric


def planned(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["planned"].eq(True)]


def ended(tables: Tables, kind: str, arm: str | None = None) -> pd.DataFrame:
    """Returns the planned trials of a kind that ended; of one arm, where named."""
    trials = planned(tables.trials)
    trials = trials[(trials["status"] == "ended") & (trials["kind"] == kind)]
    return trials if arm is None else trials[trials["arm"] == arm]


def task_facts(study: Study) -> TaskFacts:
    """Reads the facts about data sets and phases from the base trial."""
    spec = study.spec(seed=0)
    return TaskFacts(
        each={name: study.each_of(name) for name in spec.phases},
        scores={name: score_metric(data.rule) for name, data in spec.data.items() if data.rule is not None},
        glue={name: data.glue_task for name, data in spec.data.items() if data.glue_task is not None},
        trains={name: tuple(phase.train) for name, phase in spec.phases.items()},
        grids={name: study.grid(claim) for name, claim in study.claims.items() if not isinstance(claim, Claim)},
    )


def objective_reading(study: Study, split: str = "dev", at: float = 1.0) -> MetricQuery:
    o = study.objective
    return MetricQuery(o.phase, o.model, o.metric, tasks_of(o, study.each_of(o.phase)), split, at)


def curve_of(tables: Tables, at: MetricQuery, trials: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per trial and progress: value (mean over the data sets, where all have one) and tokens,
    device_seconds, flops of the phase so far."""
    rows = tables.results
    rows = rows[rows["trial"].isin(set(trials["trial"])) & at.matches(rows) & np.isfinite(rows["value"].astype(float))]
    rows = rows.assign(progress=rows["progress"].round(6))
    by = ["trial", "progress"]
    of_task = rows.groupby([*by, "task"])["value"].mean().groupby(by)
    whole = of_task.mean()[of_task.size() == len(at.tasks or rows["task"].unique())]
    return cost_of_rows(rows, trials, by).join(whole, how="inner").astype(float).reset_index()


def values_of(tables: Tables, at: MetricQuery, trials: pd.DataFrame) -> dict[str, float]:
    """Returns each trial's value at the queried progress, a mean over the data sets."""
    curve = curve_of(tables, at, trials)
    here = curve[(curve["progress"] - at.at).abs() <= 1e-6]
    return dict(zip(here["trial"], here["value"].tolist(), strict=True))


def by_seed(tables: Tables, at: MetricQuery, trials: pd.DataFrame) -> dict[int, float]:
    values = values_of(tables, at, trials)
    return {int(row["seed"]): values[row["trial"]] for row in trials.to_dict("records") if row["trial"] in values}


def point_scores(study: Study, tables: Tables) -> pd.DataFrame:
    """Returns a row per planned searched trial: point, trial, seed, each varied axis (None: inactive), score, status.

    The score is the objective on dev at the end; with `minus`, minus that arm's at the same seed and sizes. NaN where
    either is missing.
    """
    trials, minus = planned(tables.trials), study.objective.minus
    searched = trials[trials["arm"].isna() & (trials["kind"] == "trial")].sort_values(["point", "seed"])
    values = values_of(tables, objective_reading(study), searched[searched["status"] == "ended"])
    baseline = baseline_scores(study, tables, minus) if minus else None
    rows = []
    for trial in searched.to_dict("records"):
        params = parsed(trial["params"])
        score = values.get(trial["trial"], np.nan)
        if baseline is not None:
            score -= baseline.get(match(study, trial["seed"], params), np.nan)
        axes = {axis: params.get(axis) for axis in study.vary}
        about = {key: trial[key] for key in ("point", "trial", "seed")}
        rows.append({**about, **axes, "score": score, "status": trial["status"]})
    frame = pd.DataFrame(rows, columns=["point", "trial", "seed", *study.vary, "score", "status"])
    return frame.astype({"score": float})


def match(study: Study, seed: int, params: Mapping[str, Any]) -> Hashable:
    """Returns the key by which a point is paired with its baseline: seed and sizes."""
    return (int(seed), *(params.get(axis) for axis in study.size_axes()))


def baseline_scores(study: Study, tables: Tables, arm: str) -> dict[Hashable, float]:
    """Returns the objective of an arm on dev, by `match`: of a trial of the arm, else of its best tuning trial."""
    found: dict[Hashable, float] = {}
    best = min if study.objective.mode == "min" else max
    for kind in ("trial", "tune"):
        trials = ended(tables, kind, arm)
        values, by_match = values_of(tables, objective_reading(study), trials), dict[Hashable, list[float]]()
        for trial in trials.to_dict("records"):
            if trial["trial"] in values:
                key = match(study, trial["seed"], parsed(trial["params"]))
                by_match.setdefault(key, []).append(values[trial["trial"]])
        found = {key: best(scores) for key, scores in by_match.items()} | found
    return found


def completed(points: pd.DataFrame) -> pd.DataFrame:
    return points[(points["status"] == "ended") & points["score"].notna()]


def score_name(study: Study) -> str:
    o = study.objective
    return f"{o.metric} on dev" + (f", minus paired {o.minus}" if o.minus else "")


def baseline_of(study: Study, arm: str) -> str | None:
    """Returns the arm to compare this one with: the objective's, confirm's, or a claim's."""
    candidates = [study.objective.minus, study.confirm.against if study.confirm else None]
    for claim in study.claims.values():
        candidates += claim.rivals if claim.arm == arm else (claim.arm,) if arm in claim.rivals else ()
    return next((other for other in candidates if other is not None and other != arm), None)
