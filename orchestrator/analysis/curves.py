"""The numbers that a report or a search compares: by trial, by seed, by point.

A stopped, failed or unplanned trial is in no mean.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.analysis.costs import cost_of_rows
from orchestrator.analysis.queries import MetricQuery, TaskFacts, parsed, spent, where_measured
from orchestrator.analysis.race import whole
from orchestrator.analysis.statistics import RunNoise, run_noise
from orchestrator.analysis.tables import Tables
from orchestrator.study.claims import Claim
from orchestrator.study.objectives import Measured, Objective
from orchestrator.study.schema import Study
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
    """Returns where the tables have the first objective."""
    return where_measured(study, study.objective, split, at)


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


def measured_of(study: Study, tables: Tables, what: Measured, trials: pd.DataFrame) -> dict[str, float]:
    """Returns what each trial measured for an objective or a constraint."""
    query = where_measured(study, what)
    if what.spent is None:
        return values_of(tables, query, trials)
    cells = zip(trials["trial"], map(parsed, trials["phases"]), strict=True)
    return {trial: spent(study, what.spent, query, phases) for trial, phases in cells if phases}


def score_columns(study: Study) -> list[str]:
    """Returns the columns of `point_scores` with the objectives, in their order."""
    return ["score", *(f"score_{i}" for i in range(1, len(study.objectives)))]


def point_scores(study: Study, tables: Tables) -> pd.DataFrame:
    """Returns a row per planned searched trial: point, trial, seed, each varied axis (None: inactive), the scores, status.

    A score is an objective on dev at the end; with `minus`, minus that arm's at the same seed and sizes. NaN where either
    is missing. With constraints, `feasible` says whether the point is within them.
    """
    trials, columns = planned(tables.trials), score_columns(study)
    searched = trials[trials["arm"].isna() & (trials["kind"] == "trial")].sort_values(["point", "seed"])
    whole = searched[searched["status"] == "ended"]
    values = [measured_of(study, tables, objective, whole) for objective in study.objectives]
    baselines = [baseline_scores(study, tables, o.minus, o) if o.minus else None for o in study.objectives]
    bounded = [(bound, measured_of(study, tables, bound, whole)) for bound in study.constraints]
    rows = []
    for trial in searched.to_dict("records"):
        params, name = parsed(trial["params"]), trial["trial"]
        pair = match(study, trial["seed"], params)
        scores = [
            own.get(name, np.nan) - (0.0 if baseline is None else baseline.get(pair, np.nan))
            for own, baseline in zip(values, baselines, strict=True)
        ]
        feasible = all(bound.excess(own.get(name, np.inf)) <= 0 for bound, own in bounded)
        axes = {axis: params.get(axis) for axis in study.vary}
        about = {key: trial[key] for key in ("point", "trial", "seed")}
        rows.append({**about, **axes, **dict(zip(columns, scores, strict=True)), "status": trial["status"],
                     "feasible": feasible})  # fmt: skip
    more = ["feasible"] if study.constraints else []
    frame = pd.DataFrame(rows, columns=["point", "trial", "seed", *study.vary, *columns, "status", *more])
    return frame.astype(dict.fromkeys(columns, float))


def best_first(study: Study, points: pd.DataFrame) -> pd.DataFrame:
    """Returns the completed points within the constraints, the best on the first objective first."""
    done = completed(points)
    done = done[done["feasible"]] if study.constraints else done
    return done.sort_values(["score", "point"], ascending=[study.objective.mode == "min", True])


def match(study: Study, seed: int, params: Mapping[str, Any]) -> Hashable:
    """Returns the key by which a point is paired with its baseline: seed and sizes."""
    return (int(seed), *(params.get(axis) for axis in study.size_axes()))


def baseline_scores(study: Study, tables: Tables, arm: str, what: Objective | None = None) -> dict[Hashable, float]:
    """Returns an objective of an arm on dev, by `match`: of a trial of the arm, else of its best tuning trial.

    `what`: by default the first objective, by which the trial is the best.
    """
    found: dict[Hashable, float] = {}
    sign = study.objective.sign
    for kind in ("trial", "tune"):
        trials = ended(tables, kind, arm)
        values, by_match = values_of(tables, objective_reading(study), trials), dict[Hashable, list[str]]()
        shown = values if what in (None, study.objective) else measured_of(study, tables, what, trials)
        for trial in trials.to_dict("records"):
            if trial["trial"] in values:
                key = match(study, trial["seed"], parsed(trial["params"]))
                by_match.setdefault(key, []).append(trial["trial"])
        chosen = {key: min(tried, key=lambda trial: sign * values[trial]) for key, tried in by_match.items()}
        found = {key: shown[trial] for key, trial in chosen.items() if trial in shown} | found
    return found


def tuning_scores(study: Study, tables: Tables) -> dict[tuple[str, str], dict[float, dict[int, float]]]:
    """Returns the objective on dev, with the sign that makes lower better: by arm and sizes, tuned value and seed.

    Values of which no trial has ended are empty.
    """
    path = next(iter(study.tune.grid)) if study.tune else ""
    trials, sign = planned(tables.trials), study.objective.sign
    trials = trials[trials["kind"] == "tune"]
    values = values_of(tables, objective_reading(study), trials[trials["status"] == "ended"])
    found: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for trial in trials.sort_values(["arm", "seed"]).to_dict("records"):
        params = parsed(trial["params"])
        if (tried := params.get(path)) is not None:
            sizes = " ".join(str(params[axis]) for axis in study.size_axes() if axis in params)
            by_seed = found.setdefault((str(trial["arm"]), sizes), {}).setdefault(float(tried), {})
            by_seed |= {int(trial["seed"]): sign * values[trial["trial"]]} if trial["trial"] in values else {}
    return {key: dict(sorted(found[key].items())) for key in sorted(found)}


def noise_on_dev(study: Study, tables: Tables) -> RunNoise:
    """Estimates the noise of one run of the objective on dev, from the seeds of tuning and of the confirmation."""
    confirming, query = ended(tables, "confirm"), objective_reading(study)
    fresh = {str(point): by_seed(tables, query, own) for point, own in confirming.groupby("point")}
    groups = [[*whole(scores).values()] for scores in tuning_scores(study, tables).values()]
    return run_noise(runs for runs in (*groups, [*whole(fresh).values()]) if runs)


def completed(points: pd.DataFrame) -> pd.DataFrame:
    """Returns the points that ended with a value of each objective."""
    return points[(points["status"] == "ended") & points.filter(regex=r"^score(_\d+)?$").notna().all(axis=1)]


def score_name(study: Study) -> str:
    return study.objective.words()


def baseline_of(study: Study, arm: str) -> str | None:
    """Returns the arm to compare this one with: the objective's, confirm's, or a claim's."""
    candidates = [study.objective.minus, study.confirm.against if study.confirm else None]
    for claim in study.claims.values():
        candidates += claim.rivals if claim.arm == arm else (claim.arm,) if arm in claim.rivals else ()
    return next((other for other in candidates if other is not None and other != arm), None)
