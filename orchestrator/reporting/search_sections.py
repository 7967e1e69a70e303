"""Sections on the search: its points, effects and importance of the varied factors, early stopping, and tuning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.analysis.curves import (
    best_first,
    completed,
    objective_reading,
    planned,
    score_columns,
    score_name,
    tuning_scores,
    values_of,
)
from orchestrator.analysis.pareto import non_dominated
from orchestrator.analysis.race import choose, whole
from orchestrator.analysis.statistics import ALPHA, PERMUTATIONS, Chance, mean_and_half, rank_correlation, run_noise
from orchestrator.analysis.tables import Tables
from orchestrator.reporting import figures
from orchestrator.reporting.document import (
    Drawing,
    Section,
    Table,
    decimals_for,
    fixed,
    mean_text,
    plural,
    setting,
    short_names,
    si,
)
from orchestrator.study.axes import Choice
from orchestrator.study.schema import Study

PER_FACTOR = 10  # completed trials below which neither importance nor a main effect is shown
BEST = 10  # points listed


def search_points(study: Study, points: pd.DataFrame) -> Section:
    """Tabulates the points of a search. `points` are what `point_scores` returns, here and below."""
    title, done = "Points of the search", completed(points)
    if study.search is None:
        return Section(title, ("The study has no search.",))
    counts = ", ".join(f"{n} {status}" for status, n in sorted(Counter(points["status"]).items()))
    text = f"{study.search.points} planned: {counts or 'none begun'}."
    if done.empty:
        return Section(title, (text,))
    text += f" Scores are optimistic: they selected the best of {len(done)}. Stopped and failed points are not listed."
    ranked = best_first(study, done)
    if study.constraints:
        bounds = ", ".join(bound.words() for bound in study.constraints)
        text += f" {len(ranked)} of {len(done)} are within the constraints ({bounds}); the others are not listed."
    if len(study.objectives) > 1:
        text += (
            " Points are listed by the first objective, by which the winner is chosen. Front: no other point is better "
        )
        text += "on one objective and as good on all."
    return Section(title, (text, _listed(study, ranked, done)))


def _listed(study: Study, ranked: pd.DataFrame, done: pd.DataFrame) -> Table:
    """Returns the best points; with several objectives, each of them, and whether the point is on the front."""
    columns, several = score_columns(study), len(study.objectives) > 1
    places = decimals_for(float(done["score"].std()) if len(done) > 1 else None, float(done["score"].iloc[0]))
    signed = [[o.sign * p[c] for c, o in zip(columns, study.objectives, strict=True)]
              for p in ranked.to_dict("records")]  # fmt: skip
    rows = []
    for p, is_front in zip(ranked.head(BEST).to_dict("records"), non_dominated(signed), strict=False):
        scores = [fixed(p["score"], places, sign=study.objective.minus is not None), *(si(p[c]) for c in columns[1:])]
        front = ["yes" if is_front else ""] if several else []
        rows.append((p["point"], *(_setting(p[path]) for path in study.vary), *scores, *front))
    heads = [o.words() if o.is_cost else f"{o.words()} (optimistic)" for o in study.objectives]
    head = ("point", *short_names(tuple(study.vary)).values(), *heads, *(["front"] if several else []))
    align = "l" + "".join("l" if isinstance(rule, Choice) else "r" for rule in study.vary.values()) + "r" * len(columns)
    return Table(f"The best {len(rows)}", head, rows, align + "l" * several)


def _setting(value: Any) -> str:
    return "–" if value is None or value != value else setting(value)


def _reason_not_shown(study: Study, completed: int) -> str | None:
    if not study.vary:
        return "Nothing was varied by a search."
    needed = PER_FACTOR * len(study.vary)
    if completed >= needed:
        return None
    return (
        f"Not shown: {completed} completed trials of the search for {plural(len(study.vary), 'varied factor')}. With fewer "
        f"than {PER_FACTOR} per factor ({needed} here), chance would dominate."
    )


def effects(study: Study, points: pd.DataFrame) -> Section:
    """Scores by varied factor; a stratum is one combination of sizes."""
    title, done = "Effects of what was varied", completed(points)
    if reason := _reason_not_shown(study, len(done)):
        return Section(title, (reason,))
    sizes, score, names = list(study.size_axes()), score_name(study), short_names(tuple(study.vary))
    stratum = done[sizes].astype(str).agg(" · ".join, axis=1) if sizes else pd.Series("", index=done.index)
    strata = sorted(set(stratum))
    panels, rows = [], []
    for path, rule in study.vary.items():
        present = done[done[path].notna()]
        within = {name: present[stratum.loc[present.index] == name] for name in strata}
        labels = list(rule.choice) if isinstance(rule, Choice) else []
        x = {label: float(i) for i, label in enumerate(labels)}
        series, means = [], []
        for i, (name, part) in enumerate(within.items()):
            xs = [x[str(v)] if labels else float(v) for v in part[path]]
            series.append(figures.Series(name, i, points=list(zip(xs, part["score"].tolist(), strict=True))))
        for name, part in (("all", present), *(within.items() if len(strata) > 1 and path not in sizes else ())):
            for label in labels:
                scores = part.loc[part[path].astype(str) == label, "score"].tolist()
                mean = mean_and_half(scores)
                rows.append((names[path], label, name, str(len(scores)), mean_text(*mean)))
                if name == "all" and scores:
                    means.append((x[label], *mean))
            if not labels:
                rho, n = rank_correlation(part[path].astype(float).tolist(), part["score"].tolist())
                rows.append((names[path], "range", name, str(n), f"rank correlation {fixed(rho, 2, sign=True)}"))
        panels.append(figures.Effect(names[path], labels, bool(getattr(rule, "log", False)), series, means))
    text = (
        "A mark is one completed searched trial; a bar is a label’s mean with its 95 % t interval. These scores selected the "
        "winner, so the best are optimistic; other factors are not held fixed."
    )
    if study.search is not None and study.search.sampler == "tpe":
        text += " TPE asked for most of these points where it expected good scores, so they are no random sample of the space."
    alt = f"{score} by varied factor. " + "; ".join(
        f"{r[0]} {r[1]}: {r[4]} (n = {r[3]})" for r in rows if r[2] == "all"
    )
    head = ("factor", "label", "sizes", "n", f"mean {score} ± 95 %")
    return Section(
        title, (Drawing(figures.effects(panels, score), alt, text), Table("Means by label", head, rows, "lllrr"))
    )


def importances(study: Study, points: pd.DataFrame, importance: Mapping[str, float] | None, evaluator: str,
                *, chance: Callable[[], Chance] | None = None) -> Section:  # fmt: skip
    """Tabulates the importance of each factor. `chance`: computes the importances of permuted scores, which takes seconds."""
    title, done = "Importance", completed(points)
    if reason := _reason_not_shown(study, len(done)):
        return Section(title, (reason,))
    if not importance:
        return Section(title, ("Not shown: none was computed for this report.",))
    names = short_names(tuple(study.vary))
    ranked = sorted(importance.items(), key=lambda item: (-item[1], item[0]))
    text = f"Evaluator: {evaluator or 'not named'}; n = {len(done)} completed trials of the search."
    head, rows = ["factor", "importance"], [[names.get(path, path), fixed(value, 2)] for path, value in ranked]
    if chance is not None:
        found, (top, value) = chance(), ranked[0]
        head.append(f"by chance, up to ({100 * (1 - ALPHA):g} %)")
        for row, (path, _) in zip(rows, ranked, strict=True):
            row.append(fixed(found.each[path], 2) if path in found.each else "–")
        text += (
            f" Where no factor matters (scores permuted {PERMUTATIONS} times), the largest is up to {fixed(found.largest, 2)}; "
            f"that of {names.get(top, top)}, {fixed(value, 2)}, is {'above it' if value > found.largest else 'no more than chance'}."
        )
    table = Table("Importance of each factor for the score", head, rows, "l" + "r" * (len(head) - 1))
    return Section(title, (text, table))


def other_importances(
    study: Study, points: pd.DataFrame, others: Mapping[str, Mapping[str, float]] | None
) -> Section | None:
    """Tabulates `others`: importance for the objectives after the first, by their words. None where there are none to show."""
    if not others or _reason_not_shown(study, len(completed(points))):
        return None
    names = short_names(tuple(study.vary))
    rows = [(names[path], *(fixed(of.get(path), 2) for of in others.values())) for path in study.vary]
    head = ("factor", *(f"for {words}" for words in others))
    table = Table("Importance of each factor for each further objective", head, rows, "l" + "r" * len(others))
    return Section("Importance for further objectives", (table,))


def early_stopping(study: Study, tables: Tables) -> Section | None:
    if study.search is None or study.search.stop_early is None:
        return None
    rung, trials = study.search.stop_early.first, planned(tables.trials)
    searched = trials[trials["arm"].isna() & (trials["kind"] == "trial")]
    whole = searched[searched["status"] == "ended"]
    first = values_of(tables, objective_reading(study, at=rung), whole)
    last = values_of(tables, objective_reading(study), whole)
    both = sorted(first.keys() & last.keys())
    rho, n = rank_correlation([first[t] for t in both], [last[t] for t in both])
    stopped = plural(int((searched["status"] == "stopped").sum()), "trial")
    text = f"{stopped} stopped; first rung at {rung:g} of the budget. "
    if rho is None:
        text += f"No rank correlation of rung and end yet: {plural(n, 'trial')} with both."
    else:
        text += f"Rank correlation of rung and end: {fixed(rho, 2)} (Spearman, n = {n} trials that ran to the end)."
    return Section("Early stopping", (text,))


def tuning(study: Study, tables: Tables) -> Section | None:
    if study.tune is None:
        return None
    ((path, grid),) = study.tune.grid.items()
    rows, sign = [], study.objective.sign
    for (arm, sizes), scores in tuning_scores(study, tables).items():
        chosen, runs = choose(scores, grid[len(grid) // 2]), whole(scores)
        noise = run_noise([[*runs.values()]] if runs else [])
        for value, by_seed in scores.items():
            edge = ", at an edge" if value in (min(scores), max(scores)) else ""
            choice = f"chosen{edge}" if value == chosen else "" if value in runs else f"dropped after {len(by_seed)}"
            gaps = [score - scores[chosen][s] for s, score in by_seed.items() if s in scores[chosen]] if chosen else []
            gap = "–"
            if gaps and value != chosen:
                behind, error = float(np.mean(gaps)), noise.error(len(gaps))
                places = decimals_for(error, behind)
                gap = f"{fixed(behind, places)}{f' ± {fixed(error, places)}' if noise.df else ''}"
            score = mean_text(*mean_and_half([sign * score for score in by_seed.values()]))
            rows.append((arm, sizes or "–", f"{value:g}", str(len(by_seed)), score, gap, choice))
    text = (
        f"{path}: one grid for all arms, chosen by the mean on dev over up to {plural(study.tune.seeds, 'seed')} that no claim "
        "uses, the same for all values and arms. A value that is clearly worse is dropped. A grid is extended at most "
        f"{plural(study.tune.extend, 'time')}. Verdicts hold for the chosen values: a gap of less than about twice its "
        "standard error may be noise, and another value the better one."
    )
    if not rows:
        return Section("Tuning", (text, "No trial of the grid has begun."))
    metric = study.objective.metric
    head = ("arm", "sizes", path.rpartition(".")[2], "n", f"{metric} on dev ± 95 %", "behind the best ± SE", "choice")
    return Section("Tuning", (text, Table("The grid by arm", head, rows, "llrrrrl")))
