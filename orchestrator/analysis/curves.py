"""The tables -> the numbers that a report or a search compares: by trial, by seed, by point. Pure; draws nothing.

A stopped, failed or unplanned trial is in no mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.analysis.arm_values import MetricQuery, is_at, is_of, parsed, spent_on, with_phases_of
from orchestrator.analysis.arm_values import Tasks as TaskFacts
from orchestrator.analysis.tables import Tables
from orchestrator.study.schema import Study, tasks_of
from trainables.config.data import Glue, Tasks
from trainables.metrics.task_scores import rule_of


def planned(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["planned"].eq(True)]


def ended(tables: Tables, kind: str, arm: str | None = None) -> pd.DataFrame:
    """Planned trials of a kind that came to their end; of one arm, where named."""
    trials = planned(tables.trials)
    trials = trials[(trials["status"] == "ended") & (trials["kind"] == kind)]
    return trials if arm is None else trials[trials["arm"] == arm]


def task_facts(study: Study) -> TaskFacts:
    """What the base trial says of its data sets and its phases."""
    spec = study.spec(seed=0)
    tasks = {name: data for name, data in spec.data.items() if isinstance(data, Tasks)}
    return TaskFacts(
        each={name: study.each_of(name) for name in spec.phases},
        rules={name: rule_of(task) for name, task in tasks.items()},
        glue={name: task.task for name, task in tasks.items() if isinstance(task, Glue)},
        trains={name: tuple(phase.train) for name, phase in spec.phases.items()},
    )


def objective_reading(study: Study, split: str = "dev", at: float = 1.0) -> MetricQuery:
    o = study.objective
    return MetricQuery(o.phase, o.model, o.metric, tasks_of(o, study.each_of(o.phase)), split, at)


def curve_of(tables: Tables, at: MetricQuery, trials: pd.DataFrame) -> pd.DataFrame:
    """A row per trial and progress: value (mean over the data sets, where all are there) and tokens, device_seconds,
    flops of the phase so far."""
    rows = tables.results
    rows = rows[rows["trial"].isin(set(trials["trial"])) & is_at(rows, at) & np.isfinite(rows["value"].astype(float))]
    rows = rows.assign(progress=rows["progress"].round(6))
    by = ["trial", "progress"]
    of_task = rows.groupby([*by, "task"])["value"].mean().groupby(by)
    whole = of_task.mean()[of_task.size() == len(at.tasks or rows["task"].unique())]
    return spent_on(rows, trials, by).join(whole, how="inner").astype(float).reset_index()


def values_of(tables: Tables, at: MetricQuery, trials: pd.DataFrame) -> dict[str, float]:
    """Trial -> value at the reading's progress, mean over tasks."""
    curve = curve_of(tables, at, trials)
    here = curve[(curve["progress"] - at.at).abs() <= 1e-6]
    return dict(zip(here["trial"], here["value"].tolist(), strict=True))


def by_seed(tables: Tables, at: MetricQuery, trials: pd.DataFrame) -> dict[int, float]:
    values = values_of(tables, at, trials)
    return {int(row["seed"]): values[row["trial"]] for row in trials.to_dict("records") if row["trial"] in values}


def point_scores(study: Study, tables: Tables) -> pd.DataFrame:
    """A row per planned searched trial: point, trial, seed, each varied axis (None: inactive), score, status.

    The score is the objective on dev at the end; with `minus`, less that arm's at the same seed and sizes. NaN where
    either is not there yet.
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
    """What a point and its paired baseline have in common."""
    return (int(seed), *(params.get(axis) for axis in study.size_axes()))


def baseline_scores(study: Study, tables: Tables, arm: str) -> dict[Hashable, float]:
    """The objective of an arm on dev, by `match`; a trial of the arm goes before a tuned one, of these the best counts."""
    found: dict[Hashable, float] = {}
    best = min if study.objective.mode == "min" else max
    for kind in ("trial", "tune"):
        trials = ended(tables, kind, arm)
        values, of_kind = values_of(tables, objective_reading(study), trials), dict[Hashable, list[float]]()
        for trial in trials.to_dict("records"):
            if trial["trial"] in values:
                key = match(study, trial["seed"], parsed(trial["params"]))
                of_kind.setdefault(key, []).append(values[trial["trial"]])
        found = {key: best(scores) for key, scores in of_kind.items()} | found
    return found


def completed(points: pd.DataFrame) -> pd.DataFrame:
    return points[(points["status"] == "ended") & points["score"].notna()]


def score_name(study: Study) -> str:
    o = study.objective
    return f"{o.metric} on dev" + (f", minus paired {o.minus}" if o.minus else "")


def costs(tables: Tables, trials: pd.DataFrame, at: MetricQuery) -> pd.DataFrame:
    """A row per trial: tokens of the phase that is read; flops and device_seconds of it (`own`), of the phases before it at
    their recorded cost (`before`), and of these divided by the planned trials that share them (`shared`)."""
    everyone = planned(tables.trials)
    everyone = everyone[everyone["kind"] != "teacher"]
    users = Counter(done["key"] for cell in everyone["phases"] for done in parsed(cell).values())
    rows = []
    for trial in with_phases_of(trials, at.phase, at.tasks).to_dict("records"):
        row: dict[str, Any] = {"trial": trial["trial"], "tokens": 0.0}
        row |= {f"{part}_{what}": 0.0 for part in ("own", "before", "shared") for what in ("flops", "device_seconds")}
        for name, done in trial["phases"].items():
            own = is_of(name, at.phase)
            row["tokens"] += float(done["tokens"]) if own else 0.0
            for what in ("flops", "device_seconds"):
                row[f"{'own' if own else 'before'}_{what}"] += float(done[what])
                row[f"shared_{what}"] += 0.0 if own else float(done[what]) / max(1, users[done["key"]])
        rows.append(row)
    return pd.DataFrame(rows)


def baseline_of(study: Study, arm: str) -> str | None:
    """The arm that this one is measured against: the objective's, confirm's, or a claim's."""
    candidates = [study.objective.minus, study.confirm.against if study.confirm else None]
    for claim in study.claims.values():
        against = (claim.against,) if isinstance(claim.against, str) else claim.against
        candidates += against if claim.arm == arm else (claim.arm,) if arm in against else ()
    return next((other for other in candidates if other is not None and other != arm), None)
