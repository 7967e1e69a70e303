"""What stands below the report's first screen: the tables -> text, tables and figures. Pure; knows no HTML.

A mean here is over ended, planned trials; a stopped or failed one is in no mean and in no list of the best.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.analysis.arm_values import MetricQuery, parsed
from orchestrator.analysis.curves import (
    baseline_of,
    by_seed,
    completed,
    costs,
    curve_of,
    ended,
    objective_reading,
    planned,
    score_name,
    values_of,  # fmt: skip
)
from orchestrator.analysis.statistics import Comparison, compare, lower_is_better, rank_correlation
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting import figures
from orchestrator.reporting.document import (
    Block,
    Drawing,
    Section,
    Table,
    decimals_for,
    duration,
    fixed,
    mean_and_half,
    mean_text,
    p_value,
    plural,
    setting,
    short_names,
    span,  # fmt: skip
)
from orchestrator.reporting.figures import si
from orchestrator.study.schema import Choice, Study
from trainables.config.phase import makers
from trainables.config.terms import CrossEntropy, is_off
from trainables.config.trial import TrialSpec, parse_start

PER_FACTOR = 10  # completed trials below which neither importance nor a main effect is shown
BEST = 10  # points listed


def teachers(study: Study, tables: Tables) -> Section:
    """Each arm by what its teacher was worth, not by its name."""
    title, at = "Teachers, by measured quality", objective_reading(study, "test")
    lower, rows = lower_is_better(at.metric), []
    for arm in study.arms:
        sources = _teachers(study.spec(arm=arm, seed=0).pruned(), study)
        base = baseline_of(study, arm)
        if not sources:
            rows.append((arm, "none", "learns without a teacher", "–", "–"))
        for teacher, (phase, progress) in sources.items():
            quality = MetricQuery(phase, teacher, at.metric, at.tasks, "test", progress)
            mine = by_seed(tables, quality, ended(tables, "trial", arm))
            theirs = by_seed(tables, at, ended(tables, "trial", base)) if base else {}
            found = compare(mine, theirs, lower_is_better=lower)
            if found is None:
                rows.append((arm, teacher, f"not measured beside {base or 'another arm'}", "–", "–"))
                continue
            places = decimals_for(_half(found), found.effect)
            by = f"{fixed(found.effect, places, sign=True)} {span(found.interval, places)}"
            rows.append((arm, teacher, f"teacher {_standing(found)} {base} at its end, by", by, str(found.n)))
    if not rows:
        return Section(title, ("The study has no arms.",))
    text = (
        f"{at.metric} on test of the teacher as the arm used it (by a loss, or for the replies and labels that it made), minus "
        f"that of the student compared with, at its own end; by seed, {_direction(at.metric)} is better. Level: the 95 % "
        "interval includes 0."
    )
    head = ("arm", "teacher", "measured", "difference, 95 % interval", "n")
    return Section(title, (text, Table("Arms by their teacher", head, rows, "lllrr")))


def _standing(found: Comparison) -> str:
    if found.interval is None:
        return "cannot yet be compared (no interval) with"
    if found.interval[0] <= 0 <= found.interval[1]:
        return "level with"
    return "better than" if found.gain > 0 else "weaker than"


def _half(found: Comparison) -> float | None:
    return (found.interval[1] - found.interval[0]) / 2 if found.interval else None


def _direction(metric: str) -> str:
    return "lower" if lower_is_better(metric) else "higher"


def _teachers(spec: TrialSpec, study: Study) -> dict[str, tuple[str, float]]:
    """Models that teach the objective's -> phase and progress at which each is as good as it was when it taught."""
    phase, taught = study.objective.phase, study.objective.model
    flows = (t for t in spec.phases[phase].terms.values() if not isinstance(t, CrossEntropy) and not is_off(t.weight))
    sources = [term.from_ for term in flows if term.to == taught]
    found: dict[str, tuple[str, float]] = {}
    for source in dict.fromkeys([*sources, *makers(spec.phases[phase].streams)]):
        if source != taught:
            origin = None if source in spec.phases[phase].train else spec.origin(phase, source)
            found[source] = parse_start(origin)[:2] if origin else (phase, 1.0)
    return found


def learning_curves(study: Study, tables: Tables) -> Section:
    title, at = "Learning curves", objective_reading(study)
    by_tokens, by_time, rows, counts = [], [], [], []
    for arm, i in styles(study).items():
        curve = curve_of(tables, at, ended(tables, "trial", arm))
        if curve.empty:
            continue
        looks = [group for _, group in curve.groupby("progress")]
        means = [mean_and_half(group["value"].tolist()) for group in looks]
        y, half = [mean for mean, _ in means], [h for _, h in means]
        tokens, seconds = ([float(g[what].mean()) for g in looks] for what in ("tokens", "device_seconds"))
        by_tokens.append(figures.Series(arm, i, tokens, y, half))
        by_time.append(figures.Series(arm, i, seconds, y, half))
        counts.append(curve["trial"].nunique())
        end = mean_text(looks[-1]["value"].tolist())
        rows.append((arm, str(counts[-1]), si(tokens[-1]), duration(seconds[-1]), end))
    if not rows:
        return Section(title, ("No trial of an arm has ended: there is no curve yet.",))
    drawing = figures.curves(
        (("tokens of this phase", by_tokens), ("device seconds of this phase", by_time)),
        f"{at.metric} on dev ({_direction(at.metric)} is better)",
    )
    few, many = min(counts), max(counts)
    seeds = plural(many, "seed") if few == many else f"{few} to {many} seeds"
    caption = f"Phase {at.phase}, model {at.model}; mean over {seeds}; bands are 95 % t intervals over seeds."
    alt = f"{at.metric} on dev by tokens and by device time. At the end: "
    alt += "; ".join(f"{arm} {end} (n = {n})" for arm, n, _, _, end in rows)
    head = ("arm", "n", "tokens", "device time", f"{at.metric} on dev at the end ± 95 %")
    return Section(title, (Drawing(drawing, alt, caption), Table("Ends of the curves", head, rows, "lrrrr")))


def styles(study: Study) -> dict[str, int]:
    """Arm -> colour and marker, the same in every figure; the arm that most are compared with is the grey one."""
    base = Counter(filter(None, (baseline_of(study, arm) for arm in study.arms))).most_common(1)
    order = sorted(study.arms, key=lambda arm: bool(base) and arm != base[0][0])
    return {arm: i for i, arm in enumerate(order)}


def _too_few(study: Study, completed: int) -> str | None:
    needed = PER_FACTOR * len(study.vary)
    if completed >= needed:
        return None
    return (
        f"Not shown: {completed} completed trials of the search for {plural(len(study.vary), 'varied factor')}. Below "
        f"{PER_FACTOR} per factor ({needed} here) they would say more about chance than about the factors."
    )


def effects(study: Study, points: pd.DataFrame) -> Section:
    """`points` as point_scores gives them; a stratum is one combination of sizes."""
    title, done = "Effects of what was varied", completed(points)
    if not study.vary:
        return Section(title, ("Nothing was varied by a search.",))
    if reason := _too_few(study, len(done)):
        return Section(title, (reason,))
    sizes, what, names = list(study.size_axes()), score_name(study), short_names(tuple(study.vary))
    stratum = done[sizes].astype(str).agg(" · ".join, axis=1) if sizes else pd.Series("", index=done.index)
    strata = sorted(set(stratum))
    panels, rows = [], []
    for axis, rule in study.vary.items():
        have = done[done[axis].notna()]
        within = {name: have[stratum.loc[have.index] == name] for name in strata}
        labels = list(rule.choice) if isinstance(rule, Choice) else []
        at = {label: float(i) for i, label in enumerate(labels)}
        series, means = [], []
        for i, (name, part) in enumerate(within.items()):
            x = [at[str(v)] if labels else float(v) for v in part[axis]]
            series.append(figures.Series(name, i, points=list(zip(x, part["score"].tolist(), strict=True))))
        for name, part in (("all", have), *(within.items() if len(strata) > 1 and axis not in sizes else ())):
            for label in labels:
                scores = part.loc[part[axis].astype(str) == label, "score"].tolist()
                rows.append((names[axis], label, name, str(len(scores)), mean_text(scores)))
                if name == "all" and scores:
                    means.append((at[label], *mean_and_half(scores)))
            if not labels:
                rho, n = rank_correlation(part[axis].astype(float).tolist(), part["score"].tolist())
                rows.append((names[axis], "range", name, str(n), f"rank correlation {fixed(rho, 2, sign=True)}"))
        panels.append(figures.Effect(names[axis], labels, bool(getattr(rule, "log", False)), series, means))
    text = (
        "A mark is one completed searched trial; a bar is a label’s mean with its 95 % t interval. These scores chose "
        "the winner, so the best of them are optimistic; the other factors vary along."
    )
    alt = f"{what} by varied factor. " + "; ".join(f"{r[0]} {r[1]}: {r[4]} (n = {r[3]})" for r in rows if r[2] == "all")
    head = ("factor", "label", "sizes", "n", f"mean {what} ± 95 %")
    table = Table("Means by label", head, rows, "lllrr")
    return Section(title, (Drawing(figures.effects(panels, what), alt, text), table))


def search_points(study: Study, points: pd.DataFrame) -> Section:
    title, done = "Points of the search", completed(points)
    if study.search is None:
        return Section(title, ("The study has no search.",))
    counts = ", ".join(f"{n} {status}" for status, n in sorted(Counter(points["status"]).items()))
    text = f"{study.search.points} planned: {counts or 'none begun'}."
    if done.empty:
        return Section(title, (text,))
    text += f" Scores are optimistic: they chose the best of {len(done)}. Stopped and failed points are not listed."
    best = done.sort_values(["score", "point"], ascending=[study.objective.mode == "min", True]).head(BEST)
    places = decimals_for(float(done["score"].std()) if len(done) > 1 else None, float(done["score"].iloc[0]))
    sign = study.objective.minus is not None
    rows = [
        (p["point"], *(_setting(p[axis]) for axis in study.vary), fixed(p["score"], places, sign=sign))
        for p in best.to_dict("records")
    ]
    head = ("point", *short_names(tuple(study.vary)).values(), f"{score_name(study)} (optimistic)")
    align = "l" + "".join("l" if isinstance(axis, Choice) else "r" for axis in study.vary.values()) + "r"
    return Section(title, (text, Table(f"The best {len(rows)}", head, rows, align)))


def _setting(value: Any) -> str:
    return "–" if value is None or value != value else setting(value)


def importances(study: Study, points: pd.DataFrame, importance: Mapping[str, float] | None, evaluator: str) -> Section:
    title, done = "Importance", completed(points)
    if not study.vary:
        return Section(title, ("Nothing was varied by a search.",))
    if reason := _too_few(study, len(done)):
        return Section(title, (reason,))
    if not importance:
        return Section(title, ("Not shown: none was computed for this report.",))
    names = short_names(tuple(study.vary))
    ranked = sorted(importance.items(), key=lambda item: (-item[1], item[0]))
    rows = [(names.get(axis, axis), fixed(value, 2)) for axis, value in ranked]
    text = f"Evaluator: {evaluator or 'not named'}; n = {len(done)} completed trials of the search."
    return Section(
        title, (text, Table("Importance of each factor for the score", ("factor", "importance"), rows, "lr"))
    )


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


def cost_by_arm(study: Study, tables: Tables) -> Section:
    title, rows = "What it cost", []
    for arm in study.arms:
        cost = costs(tables, ended(tables, "trial", arm), objective_reading(study))
        if cost.empty:
            continue
        mean = cost.drop(columns="trial").mean()
        row = [arm, str(len(cost)), si(mean["tokens"])]
        for what, as_text in (("flops", si), ("device_seconds", duration)):
            row += [as_text(mean[f"own_{what}"] + more) for more in (0, mean[f"shared_{what}"], mean[f"before_{what}"])]
        rows.append(row)
    trials = planned(tables.trials)
    reused = [done for cell in trials["phases"] for done in parsed(cell).values() if done.get("reused")]
    flops, seconds = (sum(float(done[what]) for done in reused) for what in ("flops", "device_seconds"))
    saved = (
        f"Sharing saved {plural(len(reused), 'run')} of a phase: {si(flops, 'FLOPs')} and {duration(seconds)} of "
        "device time at their recorded cost."
        if reused
        else "No phase was reused."
    )
    memory = float(trials["peak_memory"].astype(float).max())
    saved += f" Peak memory of a trial: {si(memory, 'B')}." if math.isfinite(memory) else ""
    if not rows:
        return Section(title, ("No trial of an arm has ended.", saved))
    ways = ("teacher as 0", "amortised", "in full")
    head = (
        "arm",
        "n",
        f"{study.objective.model} tokens",
        *(f"FLOPs, {w}" for w in ways),
        *(f"time, {w}" for w in ways),
    )
    text = (
        f"Mean per trial, up to the end of phase {study.objective.phase}. What came before it (the teacher) counts as nothing, "
        "divided by the trials that share it, or in full; a reused phase counts at its recorded cost. Tokens are those of "
        f"phase {study.objective.phase}; time is device time."
    )
    return Section(title, (text, Table("Cost by arm", head, rows, "l" + "r" * 8), saved))


def tuning(study: Study, tables: Tables) -> Section | None:
    if study.tune is None:
        return None
    (path,), rows, at = study.tune.grid, [], objective_reading(study)
    trials = planned(tables.trials)
    trials = trials[trials["kind"] == "tune"]
    values = values_of(tables, at, trials[trials["status"] == "ended"])
    axes = study.size_axes()
    sizes = [" ".join(str(given[a]) for a in axes if a in given) for given in map(parsed, trials["params"])]
    for (arm, size), group in trials.assign(size=sizes).groupby(["arm", "size"], sort=True):
        grid: dict[float, list[float]] = {}
        for trial in group.to_dict("records"):
            if (tried := parsed(trial["params"]).get(path)) is not None:
                grid.setdefault(float(tried), []).extend([values[trial["trial"]]] if trial["trial"] in values else [])
        means = {tried: float(np.mean(found)) for tried, found in sorted(grid.items()) if found}
        best = (min if study.objective.mode == "min" else max)(means, key=means.__getitem__) if means else None
        for tried, found in sorted(grid.items()):
            edge = ", at an edge" if tried in (min(grid), max(grid)) else ""
            choice = f"chosen{edge}" if tried == best else ""
            rows.append((str(arm), str(size) or "–", f"{tried:g}", str(len(found)), mean_text(found), choice))
    text = f"{path}: one grid for all arms, judged on dev at seeds that no claim uses, "
    text += f"extended at most {plural(study.tune.extend, 'time')}."
    if not rows:
        return Section("Tuning", (text, "No trial of the grid has begun."))
    head = ("arm", "sizes", path.rpartition(".")[2], "n", f"{at.metric} on dev ± 95 %", "choice")
    return Section("Tuning", (text, Table("The grid by arm", head, rows, "llrrrl")))


def outcomes(tables: Tables) -> Section:
    trials = planned(tables.trials)
    blocks: list[Block] = []
    rows = []
    named = trials.assign(what=trials["arm"].where(trials["arm"].notna(), "(searched points)"))
    for (kind, what), group in named.groupby(["kind", "what"], sort=True):
        by = Counter(group["status"])
        rows.append(
            (str(what), str(kind), str(len(group)), *(str(by[s]) for s in ("ended", "stopped", "failed", "running")))
        )
    head = ("arm", "kind", "planned", "finished", "stopped", "failed", "running")
    blocks.append(Table("By arm and outcome", head, rows, "ll" + "r" * 5) if rows else "No trial has begun.")
    failed = trials[trials["status"] == "failed"].sort_values(["kind", "point", "seed"])
    lost = [
        (
            t["trial"],
            t["point"],
            str(t["seed"]),
            t["kind"],
            t["reason"] or "not recorded",
            f"trials/{t['trial']}/log.txt",
        )
        for t in failed.to_dict("records")
    ]
    columns = ("trial", "point", "seed", "kind", "reason", "log")
    blocks.append(Table("Failures", columns, lost, "mlrllm") if lost else "No trial failed.")
    aside = plural(len(tables.trials) - len(trials), "trial")
    blocks.append(f"Set aside, as the file no longer plans them: {aside}, in no other number here.")
    return Section("Trials and failures", blocks)


def verdict_details(verdicts: Sequence[Verdict]) -> Section:
    title = "Verdicts in detail"
    if not verdicts:
        return Section(title, ("The study states no claims.",))
    rows, notes = [], []
    for i, v in enumerate(verdicts, 1):
        for c in v.parts:
            places = decimals_for(_half(c), c.effect)
            intervals = [span(interval, places) for interval in (c.interval, c.new_data, c.simultaneous, c.welch)]
            chances = (
                p_value(c.p),
                p_value(v.p_adjusted),
                p_value(c.p_signflip),
                f"{c.p_floor:.2g}",
                fixed(c.correlation, 2),
            )
            effect = fixed(c.effect, places, sign=True)
            rows.append((f"{i}. {v.name}", v.claim.arm, c.against, str(c.n), effect, *intervals, *chances))
        notes += [(f"{i}. {v.name}", note) for note in v.notes]
    text = (
        "Effect: arm − against. Student’s t on pairs by seed, two-sided; Holm within a family of claims, each part of "
        "a conjunctive claim at the full level. The exact sign-flip p and its floor, 2^(1−n), never decide. Welch: as if "
        "not paired; r: the correlation of the pairs. New data as well: seeds and examples of test drawn anew, crossed; the "
        "other intervals are over new seeds on this evaluation set."
    )
    head = ("claim", "arm", "against", "n", "effect", "95 %, unadjusted",
            "95 %, new data as well", "95 %, simultaneous", "95 %, Welch",
            "p", "p, Holm", "p, sign-flip", "its floor", "r")  # fmt: skip
    table = (
        Table("Effects and intervals", head, rows, "lll" + "r" * 11) if rows else "No claim has a pair of seeds yet."
    )
    said = Table("Notes and departures", ("claim", "note"), notes, "ll") if notes else "No verdict carries a note."
    return Section(title, (text, table, said))
