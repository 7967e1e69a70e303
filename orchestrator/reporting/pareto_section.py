"""The section on quality beside cost: a figure of arms and searched points, and the cheapest arm that is good enough."""

from __future__ import annotations

import pandas as pd

from orchestrator.analysis.curves import completed, measured_of, planned, score_name
from orchestrator.analysis.notes import Note
from orchestrator.analysis.pareto import arm_points, cost_of, cost_words, good_enough, non_dominated
from orchestrator.analysis.statistics import mean_and_half
from orchestrator.analysis.tables import Tables
from orchestrator.reporting import figures
from orchestrator.reporting.document import Block, Drawing, Section, Table, mean_text, plural, si
from orchestrator.reporting.first_figure import styles
from orchestrator.study.schema import Study


def good_enough_line(study: Study, tables: Tables) -> str | None:
    """Answers `good_enough` in a sentence; None where the study does not ask."""
    asked, found = study.good_enough, good_enough(study, tables)
    if asked is None:
        return None
    wanted = f"no worse than the best arm by {asked.within:g} {study.objective.metric}"
    if isinstance(found, Note):
        return f"Cheapest arm {wanted}: not told, as trials shared a device, which makes times of arms incomparable."
    if found is None:
        return f"Cheapest arm {wanted}: not told before two arms have ended."
    arms = {arm.name: arm for arm in arm_points(study, tables)}
    seeds = min(len(arm.quality) for arm in arms.values())
    level = f"simultaneous one-sided 95 % over {plural(len(arms), 'arm')}, {plural(seeds, 'seed')}"
    if found.name is None:
        nearest = min(found.p, key=found.p.__getitem__)
        return f"No arm is shown to be {wanted}; {nearest} comes nearest, p = {found.p[nearest]:.2g} ({level})."
    cost, best = arms[found.name].mean_cost, arms[found.best]
    beside = "which has the best mean itself" if found.name == found.best else (
        f"×{cost / best.mean_cost:.2f} those of {found.best}, the best by its mean" if best.mean_cost else ""
    )  # fmt: skip
    return f"{found.name} is the cheapest arm shown to be {wanted}: {si(cost)} {cost_words(study)}, {beside} ({level})."


def quality_and_cost(study: Study, tables: Tables, points: pd.DataFrame) -> Section | None:
    """Compares recipes by quality and cost; `points` are what `point_scores` returns. None before two recipes have ended."""
    lower = study.objective.mode == "min"
    arms, rows = _arms(study, tables, lower_is_better=lower)
    searched = _searched(study, tables, points, lower_is_better=lower)
    better = "↓" if lower else "↑"
    panels = [
        (f"{title} ({better} better)", spots)
        for title, spots in (
            (f"Arms: {study.objective.metric} on test", arms),
            (f"Searched points: {score_name(study)}", searched),
        )
        if len(spots) > 1
    ]
    if not panels:
        return None
    text = (
        f"Cost: {cost_words(study)}. A filled mark is beaten by no other on both axes at once (the Pareto front). Bars of arms "
        "are 95 % t intervals over seeds. A searched point has one seed, and no interval."
    )
    front = [row[0] for row in rows if row[-1]]
    alt = f"Quality against cost. Arms on the front: {', '.join(front) or 'none'}"
    drawing = Drawing(figures.trade_off(panels, cost_words(study)), alt, text)
    head = ("arm", "n", f"{study.objective.metric} on test ± 95 %", f"{cost_words(study)} ± 95 %", "Pareto front")
    line = good_enough_line(study, tables)
    blocks: list[Block] = [line] if line else []
    blocks += [drawing, *([Table("Arms, quality and cost", head, rows, "lrrrl")] if rows else [])]
    return Section("Quality and cost", blocks)


def _arms(study: Study, tables: Tables, *, lower_is_better: bool) -> tuple[list[figures.Spot], list[tuple[str, ...]]]:
    arms, style, sign = arm_points(study, tables), styles(study), 1.0 if lower_is_better else -1.0
    front = non_dominated([(arm.mean_cost, sign * arm.mean_quality) for arm in arms])
    spots, rows = list[figures.Spot](), list[tuple[str, ...]]()
    for arm, is_front in zip(arms, front, strict=True):
        (y, half_y), (x, half_x) = (mean_and_half([*values.values()]) for values in (arm.quality, arm.costs))
        spots.append(figures.Spot(arm.name, style[arm.name], x, y, half_x, half_y, is_front))
        spread = f" ± {si(half_x)}" if half_x > 0 else ""
        rows.append((arm.name, str(len(arm.quality)), mean_text(y, half_y), si(x) + spread, "yes" if is_front else ""))
    return spots, rows


def _searched(study: Study, tables: Tables, points: pd.DataFrame, *, lower_is_better: bool) -> list[figures.Spot]:
    """Returns points within the constraints, of which those on the front are named."""
    done, trials = completed(points), planned(tables.trials)
    done = done[done["feasible"]] if study.constraints else done
    spent = measured_of(study, tables, cost_of(study), trials[trials["trial"].isin(set(done["trial"]))])
    done = done[done["trial"].isin(list(spent))]
    xy = [(spent[trial], float(y)) for trial, y in zip(done["trial"], done["score"], strict=True)]
    front = non_dominated([(x, y if lower_is_better else -y) for x, y in xy])
    return [
        figures.Spot(name if is_front else "", 1, x, y, is_front=is_front)
        for name, (x, y), is_front in zip(done["point"], xy, front, strict=True)
    ]
