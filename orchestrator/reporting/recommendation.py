"""The recommendation: what to use, how sure that is, what it costs, and the command that exports it.

Selected on dev alone and, where the study says so, confirmed on fresh seeds: `test` is reported, never selected by.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from orchestrator.analysis import curves
from orchestrator.analysis.costs import costs
from orchestrator.analysis.curves import ended, objective_reading, values_of
from orchestrator.analysis.queries import parsed
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Confirmation, Verdict, confirm_verdict
from orchestrator.reporting.commands import DEFAULT_STORAGE, export_command
from orchestrator.reporting.document import (
    decimals_beside,
    decimals_for,
    duration,
    fixed,
    plural,
    setting,
    short_names,
    si,
    span,
)
from orchestrator.reporting.notes import note_text
from orchestrator.study.schema import Study

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Advice:
    title: str
    lead: str
    verdict: str = ""
    recipe: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    command: str = ""


def advice(study: Study, tables: Tables, points: pd.DataFrame, verdicts: Sequence[Verdict], *,
           storage: str = DEFAULT_STORAGE) -> Advice:  # fmt: skip
    """`points` as `point_scores` returns them."""
    if study.search is None:
        return _best_arm(study, tables, verdicts, storage)
    title, done, trials = "Recommended recipe", curves.best_first(study, points), curves.planned(tables.trials)
    if done.empty and len(curves.completed(points)):
        return Advice(title, "None yet: no point of the search is within the constraints.")
    if done.empty:
        return Advice(title, "None yet: no point of the search has ended.")
    confirming = trials[(trials["kind"] == "confirm") & trials["arm"].isna()]
    winner = str((confirming if len(confirming) else done)["point"].iloc[0])
    own = trials[(trials["point"] == winner) & trials["arm"].isna()]
    params, names = parsed(own["params"].iloc[0]), short_names(tuple(study.vary))
    recipe = [(names[path], setting(params[path])) for path in study.vary if params.get(path) is not None]
    score = float(done.loc[done["point"] == winner, "score"].mean())
    fresh = own[(own["kind"] == "confirm") & (own["status"] == "ended")]
    runs = fresh if len(fresh) else own[own["status"] == "ended"]
    on_dev = values_of(tables, objective_reading(study), runs)
    command = export_command(study, f"--trial {_best(study, dict(sorted(on_dev.items())))}", storage) if on_dev else ""
    minus = study.objective.minus
    shown = fixed(score, decimals_for(None, score), sign=minus is not None) + (f" against {minus}" if minus else "")
    selected = f"{shown}: best of {len(done)}"
    if study.confirm is None or confirming.empty:
        why = "confirm has not run yet" if study.confirm else "the study has no `confirm`"
        lead = f"{winner} is the best so far, not confirmed on fresh seeds: {why}."
        facts = [("selected on dev", f"{selected}, optimistic"), ("cost", _cost(study, tables, runs))]
        return Advice(title, lead, "", recipe, facts, command)
    base = study.confirm.against
    difference = _search_difference(study, tables, base, params, winner=done[done["point"] == winner])
    confirmation = confirm_verdict(
        tables.results, tables.trials, (winner, base), objective_reading(study, "test"),
        search_difference=difference if math.isfinite(difference) else None, num_seeds=study.confirm.seeds,
        examples=tables.examples, tasks=curves.task_facts(study),
    )  # fmt: skip
    lead = {
        "supported": f"Use {winner}: better than {base} on fresh seeds.",
        "refuted": f"Stay with {base}: the search’s best, {winner}, was worse on fresh seeds.",
        "undecided": f"{winner} is the search’s best, not shown to be better than {base}.",
    }[confirmation.verdict]
    if confirmation.verdict == "refuted":
        command = export_command(study, f"--arm {shlex.quote(base)}", storage)
    again = list(values_of(tables, objective_reading(study), fresh).values()) if minus is None else []
    confirmed = ended(tables, "confirm")
    facts = [
        *_confirmed(study, confirmation, base),
        ("selected on dev", f"{selected} ({base}: best of {_num_tuned(study, tables, base, params)}), optimistic"),
        *_shrinkage(confirmation, difference, score, again),
        ("cost", _cost(study, tables, runs, (base, confirmed[confirmed["point"] == base]))),
    ]
    return Advice(title, lead, confirmation.verdict, recipe, facts, command)


def _best(study: Study, scores: Mapping[str, float]) -> str:
    return (min if study.objective.mode == "min" else max)(scores, key=scores.__getitem__)


def _shrinkage(confirmation: Confirmation, difference: float, score: float, again: Sequence[float]) -> Facts:
    """Shrinkage of the difference to the baseline; without one in the search, of the score itself on dev."""
    if confirmation.shrinkage is not None:
        effect = difference - confirmation.shrinkage
        values = (difference, effect, confirmation.shrinkage)
        before, now, less = (fixed(value, decimals_for(None, effect), sign=True) for value in values)
        return [("shrinkage", f"{less}: from {before} in the search to {now} on fresh seeds (dev)")]
    if not again:
        return []
    mean, places = sum(again) / len(again), decimals_for(None, score)
    less, before, now = fixed(score - mean, places, sign=True), fixed(score, places), fixed(mean, places)
    return [("shrinkage", f"{less}: from {before} in the search to {now} on fresh seeds (dev)")]


def _num_tuned(study: Study, tables: Tables, base: str, params: Mapping[str, Any]) -> int:
    """How many trials the baseline was selected from."""
    sizes = curves.match(study, 0, params)
    return max(1, sum(curves.match(study, 0, parsed(cell)) == sizes for cell in ended(tables, "tune", base)["params"]))


def _search_difference(
    study: Study, tables: Tables, base: str, params: Mapping[str, Any], *, winner: pd.DataFrame
) -> float:
    """Winner minus `base` on dev in the search; NaN where the search has no such pair."""
    if winner.empty:
        return math.nan
    score, minus = float(winner["score"].mean()), study.objective.minus
    if minus == base:
        return score
    pair = curves.match(study, int(winner["seed"].iloc[0]), params)
    if minus is not None:
        score += curves.baseline_scores(study, tables, minus).get(pair, math.nan)
    return score - curves.baseline_scores(study, tables, base).get(pair, math.nan)


def _confirmed(study: Study, confirmation: Confirmation, base: str) -> Facts:
    c = confirmation.comparison
    if c is None:
        return [("confirmed", "; ".join(map(note_text, confirmation.notes)) or "no pair of fresh seeds has ended")]
    places = decimals_beside(c.interval, c.effect)
    means = f"{fixed(c.mean_arm, places)} against {fixed(c.mean_against, places)} of {base}, on test"
    difference = f"{fixed(c.effect, places, sign=True)} {span(c.interval, places)}, n = {c.n}"
    new_data = [("new data as well", span(c.new_data, places))] if c.new_data else []
    return [(study.objective.metric, means), ("difference", difference), *new_data]


def _best_arm(study: Study, tables: Tables, verdicts: Sequence[Verdict], storage: str) -> Advice:
    """Without a search, the arm that is best on dev; the claims say whether the arm is better."""
    query, title = objective_reading(study), "Recommended arm"
    scores = {arm: list(values_of(tables, query, ended(tables, "trial", arm)).values()) for arm in study.arms}
    means = {arm: sum(values) / len(values) for arm, values in scores.items() if values}
    if not means:
        return Advice(title, "None yet: no trial of an arm has ended.")
    best = _best(study, means)
    supported = [(i, v.claim) for i, v in enumerate(verdicts, 1) if v.verdict == "supported"]
    better = ", ".join(str(i) for i, claim in supported if claim.arm == best and claim.margin >= 0)
    level = ", ".join(f"{i} ({c.stated()})" for i, c in supported if c.arm == best and c.margin < 0)
    lead = f"{best} has the best mean on dev; no claim shows an advantage{f', but claim {level}' if level else ''}."
    places = decimals_for(None, means[best])
    facts = [
        (arm, f"{fixed(means[arm], places)} {query.metric} on dev, mean of {plural(len(scores[arm]), 'seed')}")
        for arm in (best, curves.baseline_of(study, best))
        if arm in means
    ]
    facts += [("cheaper", f"claim {i}: {c.stated()}") for i, c in supported if c.less and best in c.rivals]
    facts += [("selected on dev", f"best of {len(means)} arms, optimistic")] if len(means) > 1 else []
    facts.append(("cost", _cost(study, tables, ended(tables, "trial", best))))
    command = export_command(study, f"--arm {shlex.quote(best)}", storage)
    if better:
        return Advice(title, f"Use {best}: claim {better}.", "supported", (), facts, command)
    return Advice(title, lead, "", (), facts, command)


def _cost(study: Study, tables: Tables, trials: pd.DataFrame, beside: tuple[str, pd.DataFrame] | None = None) -> str:
    """The mean cost of a trial, teacher included; and its ratio to the cost of an arm beside it."""
    query = objective_reading(study)
    cost = costs(tables, trials[trials["status"] == "ended"], query)
    if cost.empty:
        return "not known yet"
    flops, seconds = _total(cost, "flops"), _total(cost, "device_seconds")
    text = f"{si(flops, 'FLOPs')}, {duration(seconds)} of device time per trial, teacher included"
    if beside is None or (other := costs(tables, beside[1], query)).empty or not _total(other, "flops"):
        return text
    return f"{text}: ×{flops / _total(other, 'flops'):.2f} the FLOPs of {beside[0]}"


def _total(cost: pd.DataFrame, what: str) -> float:
    mean = cost.drop(columns="trial").mean()
    return float(mean[f"own_{what}"] + mean[f"before_{what}"])
