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
from orchestrator.analysis.costs import DEARER, costs
from orchestrator.analysis.curves import ended, objective_reading, values_of
from orchestrator.analysis.queries import parsed
from orchestrator.analysis.statistics import ALPHA, Decision
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
    """Recommends a recipe. `points` are what `point_scores` returns."""
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
    params = parsed(own["params"].iloc[0])
    score = float(done.loc[done["point"] == winner, "score"].mean())
    tied = _tied(study, tables, done, winner)
    recipe, ties = _recipe(study, tied)
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
        facts = [("selected on dev", f"{selected}, optimistic"), *ties, ("cost", _cost(study, tables, runs))]
        return Advice(title, lead, "", recipe, facts, command)
    base = study.confirm.against
    difference = _search_difference(study, tables, base, params, winner=done[done["point"] == winner])
    steps, dearer = _rivals(study, tables, winner, params)
    confirmation = confirm_verdict(
        tables.results, tables.trials, (winner, *steps), objective_reading(study, "test"),
        at_cost=study.confirm.at_cost(winner) if dearer else None,
        search_difference=difference if math.isfinite(difference) else None, num_seeds=study.confirm.seeds,
        examples=tables.examples, tasks=curves.task_facts(study),
    )  # fmt: skip
    if confirmation.at_steps == Decision.REFUTED:
        command = export_command(study, f"--arm {shlex.quote(base)}", storage)
    again = list(values_of(tables, objective_reading(study), fresh).values()) if minus is None else []
    confirmed = ended(tables, "confirm")
    facts = [
        *_confirmed(study, confirmation, winner),
        ("selected on dev", f"{selected} ({base}: best of {_num_tuned(study, tables, base, params)}), optimistic"),
        *ties,
        *_shrinkage(confirmation, difference, score, again),
        ("cost", _cost(study, tables, runs, (base, confirmed[confirmed["point"] == base]))),
    ]
    mixed = confirmation.verdict != confirmation.at_steps
    lead = _lead(confirmation, winner, base, is_dearer=dearer)
    return Advice(title, lead, "" if mixed else confirmation.verdict, recipe, facts, command)


def _lead(c: Confirmation, winner: str, base: str, *, is_dearer: bool) -> str:
    if c.at_steps == Decision.REFUTED:
        return f"Stay with {base}: the search’s best, {winner}, was worse on fresh seeds."
    if c.at_steps == Decision.UNDECIDED:
        return f"{winner} is the search’s best, not shown to be better than {base}."
    if c.verdict == Decision.SUPPORTED:
        return f"Use {winner}: better than {base} on fresh seeds, {'at equal cost too' if is_dearer else 'at no more cost'}."
    worse = "worse" if c.verdict == Decision.REFUTED else "not shown to be better"
    return f"{winner} is better than {base} at equal steps, {worse} at equal cost."


def _rivals(study: Study, tables: Tables, winner: str, params: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Names the baselines at equal steps, and says whether the winner costs more than the better of them on dev."""
    assert study.confirm is not None
    base, query, confirmed = study.confirm.against, objective_reading(study), ended(tables, "confirm")
    of_point = {str(point): own for point, own in confirmed.groupby("point")}
    rivals = [base]
    tuned = parsed(of_point[base]["params"].iloc[0]) if base in of_point else {}
    at = {path: tuned[path] for path in (study.tune.grid if study.tune else ()) if path in tuned}
    specs = [study.spec(arm=base, point=p, seed=0, tuned=at).pruned() for p in (study.sizes_of(params), params)]
    rivals += [study.confirm.at_settings(winner)] if specs[0] != specs[1] else []
    scores = {
        r: sum(v) / len(v) for r in rivals if r in of_point and (v := [*values_of(tables, query, of_point[r]).values()])
    }
    if winner not in of_point or not scores:
        return rivals, study.confirm.at_cost(winner) in of_point
    mine, theirs = (costs(tables, of_point[p], query) for p in (winner, _best(study, scores)))
    return rivals, bool(_total(theirs, "flops")) and _total(mine, "flops") > DEARER * _total(theirs, "flops")


def _tied(study: Study, tables: Tables, done: pd.DataFrame, winner: str) -> pd.DataFrame:
    """Returns the winner, and the points whose score on dev lies within the noise of two runs of it."""
    noise, is_winner = curves.noise_on_dev(study, tables), done["point"] == winner
    gap = (done["score"] - float(done.loc[is_winner, "score"].mean())).abs()
    return done[is_winner | (gap <= noise.clear())] if noise.df else done[is_winner]


def _recipe(study: Study, tied: pd.DataFrame) -> tuple[Facts, Facts]:
    """Returns what the tied points share, and which they are."""
    names, shared, others = short_names(tuple(study.vary)), Facts(), list[str]()
    for path in study.vary:
        values = [value for value in tied[path] if value is not None and value == value]
        if len(set(values)) == 1 and len(values) == len(tied):
            shared.append((names[path], setting(values[0])))
        elif values:
            others.append(names[path])
    if len(tied) < 2:
        return shared, []
    differ = f"; they differ in {', '.join(others)}" if others else ""
    return shared, [
        ("ties", f"{', '.join(tied['point'])} tie within noise on dev: the recipe is what they share{differ}")
    ]


def _best(study: Study, scores: Mapping[str, float]) -> str:
    return min(scores, key=lambda name: study.objective.sign * scores[name])


def _shrinkage(confirmation: Confirmation, difference: float, score: float, again: Sequence[float]) -> Facts:
    """Returns the shrinkage of the difference to the baseline; without one in the search, of the score itself on dev."""
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
    """Returns how many values the baseline was selected from."""
    sizes, tried = curves.match(study, 0, params), ended(tables, "tune", base)["params"]
    return max(1, len({cell for cell in tried if curves.match(study, 0, parsed(cell)) == sizes}))


def _search_difference(
    study: Study, tables: Tables, base: str, params: Mapping[str, Any], *, winner: pd.DataFrame
) -> float:
    """Returns the winner minus `base` on dev in the search; NaN where the search has no such pair."""
    if winner.empty:
        return math.nan
    score, minus = float(winner["score"].mean()), study.objective.minus
    if minus == base:
        return score
    pair = curves.match(study, int(winner["seed"].iloc[0]), params)
    if minus is not None:
        score += curves.baseline_scores(study, tables, minus).get(pair, math.nan)
    return score - curves.baseline_scores(study, tables, base).get(pair, math.nan)


def _confirmed(study: Study, confirmation: Confirmation, winner: str) -> Facts:
    c, confirm = confirmation.comparison, study.confirm
    assert confirm is not None
    facts: Facts = []
    if c is None:
        facts.append(("confirmed", "; ".join(map(note_text, confirmation.notes)) or "no pair of fresh seeds has ended"))
    else:
        places = decimals_beside(c.interval, c.effect)
        means = f"{fixed(c.mean_arm, places)} against {fixed(c.mean_against, places)} of {confirm.against}, on test"
        facts.append((study.objective.metric, means))
    words = {
        confirm.at_settings(winner): f"{confirm.against} at its settings",
        confirm.at_cost(winner): "at equal cost",
    }
    for rival, part in confirmation.parts.items():
        name = words.get(rival, "difference")
        if (found := part.comparison) is not None:
            places = decimals_beside(found.interval, found.effect)
            facts.append(
                (name, f"{fixed(found.effect, places, sign=True)} {span(found.interval, places)}, n = {found.n}")
            )
            facts += [("new data as well", span(found.new_data, places))] if found.new_data and found is c else []
        elif rival in words:
            facts.append((name, "not compared yet"))
    if confirmation.num_rounds > 1:
        spent = f"{confirmation.num_rounds} winners were confirmed here: this one is judged at {confirmation.level:.2g}"
        facts.append(
            ("rounds", f"{spent}, so that all together are falsely supported with a chance of at most {ALPHA:g}")
        )
    return facts


def _best_arm(study: Study, tables: Tables, verdicts: Sequence[Verdict], storage: str) -> Advice:
    """Recommends, without a search, the arm that is best on dev; the claims say whether the arm is better."""
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
    """Returns the mean cost of a trial, teacher included; and its ratio to the cost of an arm beside it."""
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
