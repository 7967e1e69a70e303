"""Sections below the report's first screen: teachers, learning curves, outcomes of trials, and verdicts in detail.

A mean here is over ended, planned trials; a stopped or failed trial is in no mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from orchestrator.analysis.curves import baseline_of, by_seed, curve_of, ended, objective_reading, planned
from orchestrator.analysis.queries import MetricQuery
from orchestrator.analysis.statistics import Comparison, compare, mean_and_half
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting import figures
from orchestrator.reporting.claim_lines import numbered
from orchestrator.reporting.document import (
    Drawing,
    Section,
    Table,
    decimals_beside,
    duration,
    fixed,
    mean_text,
    p_value,
    plural,
    si,
    span,
)
from orchestrator.reporting.first_figure import styles
from orchestrator.reporting.notes import note_text
from orchestrator.study.schema import Study
from trainables.config.phase_run import Start
from trainables.config.trial import TrialSpec
from trainables.metrics.known import OF_TOKENS, metric_named

STATUSES = ("ended", "stopped", "failed", "running")


def teachers(study: Study, tables: Tables) -> Section:
    """Compares each arm's teacher, as measured, with the model of the arm's baseline."""
    title, query = "Teachers, by measured quality", objective_reading(study, "test")
    metric, rows = metric_named(query.metric), []
    for arm in study.arms:
        base = baseline_of(study, arm)
        spec = study.spec(arm=arm, seed=0).pruned()
        sources = _teachers(spec, study)
        if not sources:
            rows.append((arm, "none", "–", "learns without a teacher", "–", "–"))
        for teacher, (phase, progress) in sources.items():
            quality = MetricQuery(phase, teacher, query.metric, query.tasks, "test", progress)
            mine = by_seed(tables, quality, ended(tables, "trial", arm))
            theirs = by_seed(tables, query, ended(tables, "trial", base)) if base else {}
            c = compare(mine, theirs, lower_is_better=metric.lower_is_better)
            tokenizers = {spec.models[model].tokenizer for model in (teacher, query.model)}
            if len(tokenizers) > 1 and metric in OF_TOKENS:
                rows.append((arm, teacher, base or "–", f"{query.metric} is by token, and tokenizers differ", "–", "–"))
                continue
            if c is None:
                missing = "not measured at the same seeds" if base else "no arm to compare with"
                rows.append((arm, teacher, base or "–", missing, "–", "–"))
                continue
            places = decimals_beside(c.interval, c.effect)
            difference = f"{fixed(c.effect, places, sign=True)} {span(c.interval, places)}"
            rows.append((arm, teacher, base or "–", f"teacher {_standing(c, places)}", difference, str(c.n)))
    if not rows:
        return Section(title, ("The study has no arms.",))
    text = (
        f"Difference: {query.metric} on test of the teacher, at the progress at which the arm learnt from the teacher, minus the "
        f"final score of the model compared with; paired by seed, {metric.better} is better. Level: the 95 % interval includes 0."
    )
    head = ("arm", "teacher", "compared with", "measured", "difference, 95 % interval", "n")
    return Section(title, (text, Table("Arms by their teacher", head, rows, "llllrr")))


def _standing(c: Comparison, places: int) -> str:
    if c.interval is None:
        return "not comparable yet (no interval)"
    if c.interval[0] <= 0 <= c.interval[1]:
        return "level"
    return f"{'better' if c.gain > 0 else 'weaker'} by {fixed(abs(c.effect), places)}"


def _teachers(spec: TrialSpec, study: Study) -> dict[str, tuple[str, float]]:
    """Returns teacher of the objective's model -> phase and progress at which the teacher was as good as when it taught."""
    phase, taught = study.objective.phase, study.objective.model
    flows = (t for t in spec.phases[phase].terms.values() if t.target == taught and not t.weight.is_off)
    sources = [term.source for term in flows if term.source is not None]
    origins: dict[str, tuple[str, float]] = {}
    for source in dict.fromkeys(
        [*sources, *(model for stream in spec.phases[phase].streams.values() for model in stream.models)]
    ):
        if source != taught:
            origin = None if source in spec.phases[phase].train else spec.origin(phase, source)
            start = Start.parse(origin) if origin else None
            origins[source] = (start.run.phase, start.fraction) if start else (phase, 1.0)
    return origins


def learning_curves(study: Study, tables: Tables) -> Section:
    title, query = "Learning curves", objective_reading(study)
    by_tokens, by_time, rows, counts = [], [], [], []
    for arm, style in styles(study).items():
        curve = curve_of(tables, query, ended(tables, "trial", arm))
        if curve.empty:
            continue
        evaluations = [group for _, group in curve.groupby("progress")]
        means = [mean_and_half(group["value"].tolist()) for group in evaluations]
        y, half = [mean for mean, _ in means], [half for _, half in means]
        tokens, seconds = ([float(g[what].mean()) for g in evaluations] for what in ("tokens", "device_seconds"))
        by_tokens.append(figures.Series(arm, style, tokens, y, half))
        by_time.append(figures.Series(arm, style, seconds, y, half))
        counts.append(curve["trial"].nunique())
        rows.append((arm, str(counts[-1]), si(tokens[-1]), duration(seconds[-1]), mean_text(*means[-1])))
    if not rows:
        return Section(title, ("No trial of an arm has ended: there is no curve yet.",))
    panels = (("tokens of this phase", by_tokens), ("device seconds of this phase", by_time))
    drawing = figures.curves(panels, f"{query.metric} on dev ({metric_named(query.metric).better} is better)")
    few, many = min(counts), max(counts)
    seeds = plural(many, "seed") if few == many else f"{few} to {many} seeds"
    caption = f"Phase {query.phase}, model {query.model}; mean over {seeds}; bands are 95 % t intervals over seeds."
    alt = f"{query.metric} on dev by tokens and by device time. At the end: "
    alt += "; ".join(f"{arm} {end} (n = {n})" for arm, n, _, _, end in rows)
    head = ("arm", "n", "tokens", "device time", f"{query.metric} on dev at the end ± 95 %")
    return Section(title, (Drawing(drawing, alt, caption), Table("Ends of the curves", head, rows, "lrrrr")))


def outcomes(tables: Tables) -> Section:
    trials = planned(tables.trials)
    named = trials.assign(what=trials["arm"].where(trials["arm"].notna(), "(searched points)"))
    rows = []
    for (kind, what), group in named.groupby(["kind", "what"], sort=True):
        counts = Counter(group["status"])
        rows.append((str(what), str(kind), str(len(group)), *(str(counts[status]) for status in STATUSES)))
    head = ("arm", "kind", "planned", *STATUSES)
    failures = [
        (
            t["trial"],
            t["point"],
            str(t["seed"]),
            t["kind"],
            t["reason"] or "not recorded",
            f"trials/{t['trial']}/log.txt",
        )
        for t in trials[trials["status"] == "failed"].sort_values(["kind", "point", "seed"]).to_dict("records")
    ]
    columns = ("trial", "point", "seed", "kind", "reason", "log")
    blocks = [
        Table("By arm and outcome", head, rows, "ll" + "r" * 5) if rows else "No trial has begun.",
        Table("Failures", columns, failures, "mlrllm") if failures else "No trial failed.",
    ]
    if others := len(tables.trials) - len(trials):
        blocks.append(
            f"No longer planned by the study file, and excluded from every figure: {plural(others, 'trial')}."
        )
    return Section("Trials and failures", blocks)


def verdict_details(verdicts: Sequence[Verdict]) -> Section:
    title = "Verdicts in detail"
    if not verdicts:
        return Section(title, ("The study states no claims.",))
    rows, notes = [], []
    for name, v in numbered(verdicts):
        for c in v.parts:
            places = decimals_beside(c.interval, c.effect)
            effect = fixed(c.effect, places, sign=True)
            intervals = [span(interval, places) for interval in (c.interval, c.new_data, c.simultaneous, c.welch)]
            chances = [*map(p_value, (c.p, v.p_adjusted, c.p_signflip, c.p_floor)), fixed(c.correlation, 2)]
            rows.append((name, v.claim.arm, c.against, str(c.n), effect, *intervals, *chances))
        notes += [(name, note_text(note)) for note in v.notes]
    text = (
        "Effect: arm − against. Test: Student’s t on pairs by seed, two-sided, with Holm’s correction within a family of "
        "claims, and over all planned looks. A claim of k comparisons has the largest p if it is supported, k times the smallest if it is refuted. The exact sign-flip p and its floor, 2^(1−n), "
        "decide nothing. Welch: unpaired; r: correlation of the pairs. New data as well: over new seeds and new clusters of test examples, "
        "simultaneous over the family; the other intervals are over new seeds on this evaluation set."
    )
    head = ("claim", "arm", "against", "n", "effect", "95 %, unadjusted", "simultaneous, new data as well", "95 %, simultaneous",
            "95 %, Welch", "p", "p, Holm", "p, sign-flip", "its floor", "r")  # fmt: skip
    table = Table("Effects and intervals", head, rows, "lll" + "r" * 11)
    remarks = Table("Notes and departures", ("claim", "note"), notes, "ll")
    return Section(title, (text, table if rows else "No comparison of two arms has a pair of seeds yet.",
                           remarks if notes else "No verdict carries a note."))  # fmt: skip
