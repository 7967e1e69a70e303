"""What to use, in words, how sure that is, what it costs, and the command that exports it. Pure.

Chosen on dev alone, and confirmed on fresh seeds where the study says so: `test` is read, never chosen by.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from orchestrator.analysis.arm_values import parsed
from orchestrator.analysis.curves import (
    baseline_of,
    baseline_scores,
    completed,
    costs,
    ended,
    match,
    objective_reading,
    planned,
    task_facts,
    values_of,  # fmt: skip
)
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Confirmation, Verdict, confirm_verdict
from orchestrator.reporting.document import decimals_for, duration, fixed, plural, setting, short_names, span
from orchestrator.reporting.figures import si
from orchestrator.study.schema import Study


@dataclass(frozen=True)
class Advice:
    title: str
    lead: str
    verdict: str = ""
    recipe: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    command: str = ""


def advice(study: Study, tables: Tables, points: pd.DataFrame, verdicts: Sequence[Verdict]) -> Advice:
    """`points` as point_scores gives them."""
    if study.search is None:
        return _best_arm(study, tables, verdicts)
    title, done, trials = "Recommended recipe", completed(points), planned(tables.trials)
    confirming = trials[(trials["kind"] == "confirm") & trials["arm"].isna()]
    if done.empty:
        return Advice(title, "None yet: no point of the search has ended.")
    best = done.sort_values(["score", "point"], ascending=[study.objective.mode == "min", True]).iloc[0]
    winner = str(confirming["point"].iloc[0] if len(confirming) else best["point"])
    own = trials[(trials["point"] == winner) & trials["arm"].isna()]
    params, names = parsed(own["params"].iloc[0]), short_names(tuple(study.vary))
    recipe = [(names[axis], setting(params[axis])) for axis in study.vary if params.get(axis) is not None]
    score = float(done.loc[done["point"] == winner, "score"].mean())
    fresh = own[(own["kind"] == "confirm") & (own["status"] == "ended")]
    runs = fresh if len(fresh) else own[own["status"] == "ended"]
    run = _best_on_dev(study, tables, runs)
    shown = fixed(score, decimals_for(None, score), sign=study.objective.minus is not None)
    paired = f" minus {study.objective.minus}" if study.objective.minus else ""
    facts = [("search", f"{shown} on dev{paired}: optimistic, best of {len(done)}")]
    command = export_command(study, f"--trial {run}") if run else ""
    if study.confirm is None or confirming.empty:
        why = "confirm has not run yet" if study.confirm else "the study asks for no confirm"
        lead = f"{winner} is the best so far, not confirmed on fresh seeds: {why}."
        return Advice(title, lead, "", recipe, [*facts, ("cost", _cost(study, tables, runs))], command)
    base = study.confirm.against
    difference = _search_difference(study, tables, base, params, done[done["point"] == winner])
    found = confirm_verdict(
        tables.results, tables.trials, winner, base, objective_reading(study, "test"),
        search_difference=difference if math.isfinite(difference) else None, num_seeds=study.confirm.seeds,
        examples=tables.examples, tasks=task_facts(study),
    )  # fmt: skip
    lead = {
        "supported": f"Use {winner}: better than {base} on fresh seeds.",
        "refuted": f"Stay with {base}: the search’s best, {winner}, was worse on fresh seeds.",
        "undecided": f"{winner} is the search’s best, not shown to be better than {base}.",
    }[found.verdict]
    if found.verdict == "refuted":
        command = export_command(study, f"--arm {shlex.quote(base)}")
    facts += _shrinkage(study, tables, found, difference, score, fresh)
    facts[0] = (facts[0][0], f"{facts[0][1]}, {base}’s of {max(1, _num_tuned(study, tables, base, params))}")
    confirmed = ended(tables, "confirm")
    cost = ("cost", _cost(study, tables, runs, (base, confirmed[confirmed["point"] == base])))
    return Advice(title, lead, found.verdict, recipe, [*_confirmed(study, found, base), *facts, cost], command)


def _shrinkage(study: Study, tables: Tables, found: Confirmation, difference: float, score: float,
               fresh: pd.DataFrame) -> list[tuple[str, str]]:  # fmt: skip
    """Of the difference to the baseline; where the search saw no pair for it, of the score itself on dev."""
    if found.shrinkage is not None and found.comparison is not None:
        three = (difference, found.comparison.effect, found.shrinkage)
        places = decimals_for(None, found.comparison.effect)
        before, now, less = (fixed(value, places, sign=True) for value in three)
        return [("shrinkage", f"{less}: from {before} in the search (dev) to {now} (test)")]
    again = list(values_of(tables, objective_reading(study), fresh).values())
    if study.objective.minus is not None or not again:
        return []
    mean, places = sum(again) / len(again), decimals_for(None, score)
    less = fixed(score - mean, places, sign=True)
    return [
        (
            "shrinkage",
            f"{less}: from {fixed(score, places)} in the search to {fixed(mean, places)} on fresh seeds (dev)",
        )
    ]


def _num_tuned(study: Study, tables: Tables, base: str, params: dict[str, Any]) -> int:
    """How many trials the other side was chosen from: the search's best is the best of more."""
    sizes = match(study, 0, params)
    return sum(match(study, 0, parsed(cell)) == sizes for cell in ended(tables, "tune", base)["params"])


def _search_difference(study: Study, tables: Tables, base: str, params: dict[str, Any], winner: pd.DataFrame) -> float:
    """Winner minus `base` on dev, as the search saw them; NaN where it did not."""
    if winner.empty:
        return math.nan
    score, minus = float(winner["score"].mean()), study.objective.minus
    if minus == base:
        return score
    same = match(study, int(winner["seed"].iloc[0]), params)
    if minus is not None:
        score += baseline_scores(study, tables, minus).get(same, math.nan)
    return score - baseline_scores(study, tables, base).get(same, math.nan)


def _confirmed(study: Study, found: Confirmation, base: str) -> list[tuple[str, str]]:
    c = found.comparison
    if c is None:
        return [("confirmed", "; ".join(found.notes) or "no pair of fresh seeds has ended")]
    places = decimals_for((c.interval[1] - c.interval[0]) / 2 if c.interval else None, c.effect)
    metric, arm, against = study.objective.metric, fixed(c.mean_arm, places), fixed(c.mean_against, places)
    return [
        (metric, f"{arm} against {against} of {base}, on test"),
        ("difference", f"{fixed(c.effect, places, sign=True)} {span(c.interval, places)}, n = {c.n}"),
        *([("new data as well", span(c.new_data, places))] if c.new_data else []),
    ]


def _best_arm(study: Study, tables: Tables, verdicts: Sequence[Verdict]) -> Advice:
    """Without a search: the arm that is best on dev; whether that means anything is the claims' to say."""
    at, title = objective_reading(study), "Recommended arm"
    scores = {arm: list(values_of(tables, at, ended(tables, "trial", arm)).values()) for arm in study.arms}
    means = {arm: sum(found) / len(found) for arm, found in scores.items() if found}
    if not means:
        return Advice(title, "None yet: no trial of an arm has ended.")
    best = (min if study.objective.mode == "min" else max)(means, key=means.__getitem__)
    held = [(i, v) for i, v in enumerate(verdicts, 1) if v.claim.arm == best and v.verdict == "supported"]
    shown = ", ".join(str(i) for i, v in held if v.claim.margin >= 0)
    level = ", ".join(f"{i} ({v.claim.stated()})" for i, v in held if v.claim.margin < 0)
    if shown:
        lead, verdict = f"Use {best}: claim {shown}.", "supported"
    elif level:
        lead, verdict = f"{best} has the best mean on dev; no claim shows that it is better, but claim {level}.", ""
    else:
        lead, verdict = f"{best} has the best mean on dev; no claim shows that it is better.", ""
    places = decimals_for(None, means[best])
    facts = [
        (arm, f"{fixed(means[arm], places)} {at.metric} on dev, mean of {plural(len(scores[arm]), 'seed')}")
        for arm in (best, baseline_of(study, best))
        if arm in means
    ]
    facts += [
        ("cheaper", f"claim {i}: {v.claim.stated()}")
        for i, v in enumerate(verdicts, 1)
        if v.verdict == "supported" and v.claim.less and best in v.claim.rivals
    ]
    facts += [("chosen", f"the best of {len(means)} arms on dev: optimistic")] if len(means) > 1 else []
    facts.append(("cost", _cost(study, tables, ended(tables, "trial", best))))
    return Advice(title, lead, verdict, (), facts, export_command(study, f"--arm {shlex.quote(best)}"))


def _best_on_dev(study: Study, tables: Tables, trials: pd.DataFrame) -> str | None:
    values = values_of(tables, objective_reading(study), trials)
    ordered = sorted(values)
    return (min if study.objective.mode == "min" else max)(ordered, key=values.__getitem__) if ordered else None


def _cost(study: Study, tables: Tables, trials: pd.DataFrame, beside: tuple[str, pd.DataFrame] | None = None) -> str:
    """Mean of a trial, its teacher included; and over that of an arm beside it, since no axis holds the two equal."""
    at = objective_reading(study)
    cost = costs(tables, trials[trials["status"] == "ended"], at)
    if cost.empty:
        return "not known yet"
    flops, seconds = _spent(cost)
    text = f"{si(flops, 'FLOPs')}, {duration(seconds)} of device time a trial, teacher included"
    if beside is None or (other := costs(tables, beside[1], at)).empty:
        return text
    less, _ = _spent(other)
    return f"{text}: ×{flops / less:.2f} {beside[0]}’s FLOPs" if less else text


def _spent(cost: pd.DataFrame) -> tuple[float, float]:
    mean = cost.drop(columns="trial").mean()
    flops, seconds = (float(mean[f"own_{what}"] + mean[f"before_{what}"]) for what in ("flops", "device_seconds"))
    return flops, seconds


def arguments(study: Study) -> str:
    """What a command needs, beside the file, to mean this study."""
    profile = "" if study.is_default_profile else f" --profile {shlex.quote(str(study.profile))}"
    sets = (shlex.quote(f"trial.{path}={json.dumps(value)}") for path, value in study.fixed.items())
    return profile + "".join(f" --set {given}" for given in sets)


def export_command(study: Study, what: str) -> str:
    model = f"--model {study.objective.model}"
    return f"python -m orchestrator.export {shlex.quote(study.file)} --to best {what} {model}{arguments(study)}"
