"""TODO."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from orchestrator.analysis.arm_values import MetricQuery, with_phases_of
from orchestrator.analysis.curves import costs, curve_of, ended, planned, point_scores, task_facts
from orchestrator.analysis.statistics import Comparison, lower_is_better
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import NEW_DATA, CostPart, Verdict, judge
from orchestrator.reporting import cost_sections, figures, sections, task_sections
from orchestrator.reporting.document import (
    Block,
    Command,
    Drawing,
    Section,
    Table,
    as_markdown,
    decimals_for,
    escape,
    fixed,
    plural,
    span,
)
from orchestrator.reporting.recommendation import Advice, advice, arguments
from orchestrator.study.schema import AXIS_WORDS, CostAxis, Figure, Study
from trainables.config.trial import TrialSpec

_SPENT: Mapping[CostAxis, tuple[str, str]] = {  # column, and how it is called below an axis
    "student_tokens": ("tokens", "tokens of the phase"),
    "flops": ("flops", "total compute, teacher included (FLOPs)"),
    "device_seconds": ("device_seconds", "device time, teacher included (s)"),
}


@dataclass(frozen=True)
class Report:
    html: str
    markdown: str


@dataclass(frozen=True)
class Forest:
    """Where a part's effect, interval and the paper's figure lie, in pixels."""

    zero: float
    effect: float
    low: float | None
    high: float | None
    paper: float | None
    new_low: float | None  # over new data as well
    new_high: float | None
    margin: float | None


@dataclass(frozen=True)
class Part:
    """One comparison of a claim's line; a conjunctive claim has several."""

    arm: str
    against: str
    arm_mean: str = "–"
    against_mean: str = "–"
    effect: str = "–"
    interval: str = "no pair of seeds"
    new_data: str = ""
    cost: str = ""  # the ratio of a claim that says `less`
    n: str = "0"
    forest: Forest | None = None


@dataclass(frozen=True)
class Line:
    number: str
    says: str
    sides: str
    about: str
    verdict: str
    more: str
    parts: Sequence[Part]
    paper: str
    judged: str


@dataclass(frozen=True)
class Page:
    name: str
    question: str
    scale: str
    counts: str
    answer: str
    lines: Sequence[Line]
    figure: Drawing | None
    advice: Advice
    sections: Sequence[Section]


def make_report(study: Study, tables: Tables, provenance: Mapping[str, str], *,
                importance: Mapping[str, float] | None = None, evaluator: str = "") -> Report:  # fmt: skip
    """The report of what the tables hold so far.

    `importance` (varied axis -> share) is computed elsewhere, over the completed points, by the `evaluator` named.
    """
    judged = judge(
        study.claims, tables.results, tables.trials, default_phase=study.objective.phase, num_seeds=study.seeds,
        examples=tables.examples, tasks=task_facts(study), slot=study.slot,
    )  # fmt: skip
    verdicts, points = list(judged.values()), point_scores(study, tables)
    below = (
        sections.verdict_details(verdicts),
        cost_sections.costs_compared(verdicts),
        cost_sections.time_to_quality(tables, verdicts),
        task_sections.by_task(study, tables, verdicts),
        sections.teachers(study, tables),
        sections.learning_curves(study, tables),
        sections.search_points(study, points),
        sections.effects(study, points),
        sections.importances(study, points, importance, evaluator),
        sections.early_stopping(study, tables),
        sections.cost_by_arm(study, tables),
        task_sections.models(study, tables),
        sections.tuning(study, tables),
        sections.outcomes(tables),
        _how_to_repeat(study, provenance),
    )
    page = Page(
        name=study.folder,
        question=study.question,
        scale=_scale(study),
        counts=_counts(tables),
        answer=_answer(tables, verdicts),
        lines=_lines(verdicts),
        figure=_pairs(study, tables, verdicts),
        advice=advice(study, tables, points, verdicts),
        sections=[section for section in below if section is not None],
    )
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.j2").render(page=page)
    return Report(html.lstrip() + "\n", _markdown(page))


def _scale(study: Study) -> str:
    specs = [TrialSpec.model_validate({**study.trial, "seed": 0})]
    specs += [study.spec(point={axis: end}, seed=0) for axis in study.size_axes() for end in study.vary[axis].ends()]
    shapes: dict[str, list[str]] = {}
    for spec in specs:
        for name, model in spec.models.items():
            shapes.setdefault(name, []).append(model.pretrained or f"{model.layers}×{model.width}")
    sizes = ", ".join(f"{name} {' or '.join(dict.fromkeys(found))}" for name, found in shapes.items())
    profile = f"{study.profile} profile, " if study.profile else ""
    return f"Scale: {profile}{sizes} (layers × width). A verdict here says nothing yet about yours."


def _counts(tables: Tables) -> str:
    trials = planned(tables.trials)
    by = Counter(trials["status"])
    shown = ", ".join(f"{by[status]} {status}" for status in ("ended", "stopped", "failed", "running"))
    return f"{plural(len(trials), 'trial')}: {shown}; {len(tables.trials) - len(trials)} set aside"


def _answer(tables: Tables, verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "No verdict: the study states no claims."
    if not any(v.parts for v in verdicts):
        begun = "no trial has ended" if not (planned(tables.trials)["status"] == "ended").any() else "no pair of seeds"
        return f"No verdict yet on {plural(len(verdicts), 'claim')}: {begun}."
    if max(c.n for v in verdicts for c in v.parts) == 1:
        return (
            "No verdict: with one seed there is an effect of these runs, but nothing says how much of it is chance; claims "
            "need 2 seeds or more."
        )
    by = Counter(v.verdict for v in verdicts)
    found = ", ".join(f"{by[word]} {word}" for word in ("supported", "refuted", "undecided") if by[word])
    decided = [v for v in verdicts if v.holds is not None]
    there = sum(v.holds == NEW_DATA for v in decided)
    where = ", at this scale and on this evaluation set"
    if there:
        some = "" if there == len(decided) else f" for {there} of {plural(len(decided), 'verdict')}"
        where = f", at this scale, on new data as well{some}"
    return f"Of {plural(len(verdicts), 'claim')}: {found}{where}."


def _lines(verdicts: Sequence[Verdict]) -> list[Line]:
    reach: dict[MetricQuery, list[float]] = {}  # all that is drawn on one scale
    for v in verdicts:
        drawn = reach.setdefault(v.reading, [0.0])
        for c in v.parts:
            drawn += [c.effect, *(c.interval or ()), *(c.new_data or ())]
            drawn += [] if (figure := _marked(v)) is None else [figure]
            drawn += [_margin(c)] if c.margin else []
    lines = []
    for i, v in enumerate(verdicts, 1):
        claim, drawn = v.claim, reach[v.reading]
        costs = {c.found.against: c for c in v.cost_parts}
        parts = [_part(claim.arm, c, drawn, _marked(v), costs.get(c.against)) for c in v.parts]
        others = claim.rivals
        parts += [Part(claim.arm, other) for other in others if other not in {c.against for c in v.parts}]
        whose = claim.model if claim.against_model is None else f"{claim.model} against {claim.against_model}"
        about = f"{claim.metric} of {whose} on {claim.split}"
        about += f", mean over {', '.join(v.reading.tasks)}" if len(v.reading.tasks) > 1 else ""
        about += f" at {claim.at:g} of the budget" if claim.at not in ("equal", 1) else ""
        if claim.says and (claim.margin or claim.less or claim.at == "equal"):
            about = f"{claim.stated()}; {about}"
        for other, ratio in v.cost_ratios.items():  # so that no gain is shown without its price
            whose = f" of {other}" if len(v.cost_ratios) > 1 else ""
            time = f", ×{fixed(ratio.device_seconds, 2)} device time" if claim.is_of_time else ""
            about += f"; ×{fixed(ratio.student_tokens, 2)} tokens, ×{fixed(ratio.flops, 2)} compute{time}{whose}"
        about += f"; {'lower' if lower_is_better(claim.metric) else 'higher'} is better"
        paper = str(claim.paper or "–") if claim.figure is None else f"{claim.figure:+g}".replace("-", "−")
        if isinstance(claim.paper, Figure):
            paper += f" over {'GLUE' if claim.paper.over == 'glue' else ', '.join(claim.paper.over)}"
        judged = f"{v.paper} our interval" if v.paper in ("inside", "below", "above") else v.paper or "not stated"
        lines.append(
            Line(
                str(i),
                claim.says or claim.stated(),
                f"{claim.arm} − {' and '.join(others)}",
                about,
                v.verdict,
                _more(v),
                parts,
                paper,
                judged,
            )
        )
    return lines


def _more(v: Verdict) -> str:
    if any(note.startswith("provisional") for note in v.notes):
        return "provisional: trials are missing"
    if v.holds is not None:
        return v.holds
    if v.seeds_more is not None:
        return f"about {plural(v.seeds_more, 'more seed')}"
    if not v.parts or min(c.n for c in v.parts) < 2:
        return "needs 2 seeds or more"
    return "more seeds would not settle it"


def _margin(c: Comparison) -> float:
    """As an effect."""
    return -c.margin if c.lower_is_better else c.margin


def _cost(c: CostPart) -> str:
    word = {"student_tokens": "tokens", "flops": "compute", "device_seconds": "time"}[c.axis]
    places = max(2, decimals_for((c.found.interval[1] - c.found.interval[0]) / 2) if c.found.interval else 2)
    ends = f" [{fixed(c.found.interval[0], places)}, {fixed(c.found.interval[1], places)}]" if c.found.interval else ""
    return f"×{fixed(c.found.ratio, places)}{ends} {word}"


def _marked(v: Verdict) -> float | None:
    """The paper's figure, where it is of what was measured here."""
    return v.claim.figure if v.paper in ("inside", "below", "above") else None


def _part(arm: str, c: Comparison, drawn: Sequence[float], figure: float | None, cost: CostPart | None) -> Part:
    places = decimals_for((c.interval[1] - c.interval[0]) / 2 if c.interval else None, c.effect)
    low, high = min(drawn), max(drawn)

    def at(value: float) -> float:
        return round(6 + 120 * (value - low) / (high - low), 1) if high > low else 66.0

    left, right = (at(c.interval[0]), at(c.interval[1])) if c.interval else (None, None)
    new_low, new_high = (at(c.new_data[0]), at(c.new_data[1])) if c.new_data else (None, None)
    marked = None if figure is None else at(figure)
    return Part(
        arm,
        c.against,
        fixed(c.mean_arm, places),
        fixed(c.mean_against, places),
        fixed(c.effect, places, sign=True),
        span(c.interval, places),
        span(c.new_data, places) if c.new_data else "",
        _cost(cost) if cost else "",
        str(c.n),
        Forest(at(0.0), at(c.effect), left, right, marked, new_low, new_high, at(_margin(c)) if c.margin else None),
    )


def _pairs(study: Study, tables: Tables, verdicts: Sequence[Verdict]) -> Drawing | None:
    """Each claim's seeds joined, and the same values against total compute; a row per thing measured, two at most."""
    rows: dict[MetricQuery, list[tuple[str, Verdict]]] = {}
    for i, v in enumerate(verdicts, 1):
        if v.parts:
            rows.setdefault(v.reading, []).append((str(i), v))
    styles, groups, alt = sections.styles(study), [], []
    for at, claims in list(rows.items())[:2]:
        pairs, arms = [], dict[str, None]()
        for number, v in claims:
            for c in v.parts:
                sides = (c.against_values, c.arm_values, styles[c.against], styles[v.claim.arm])
                pairs.append(figures.Pair(number, c.against, v.claim.arm, *sides))
                arms |= {c.against: None, v.claim.arm: None}
                better = sum((d < 0) == c.lower_is_better and d != 0 for d in c.differences)
                alt.append(
                    f"claim {number}: {v.claim.arm} better than {c.against} in {better} of {plural(c.n, 'seed')}"
                )
        arrow = "↓" if lower_is_better(at.metric) else "↑"
        label = f"{at.model} {at.metric} on {at.split} ({arrow} better)" + (f", at {at.at:g}" if at.at < 1 else "")
        label += f", at equal {AXIS_WORDS[at.equal]}" if at.equal else ""
        label += f", mean over {plural(len(at.tasks), 'task')}" if len(at.tasks) > 1 else ""
        read = dict[str, set[tuple[int, float]]]()
        for _, v in claims:
            for against, pair in v.read_at.items():
                for arm, progress in ((v.claim.arm, pair.arm), (against, pair.against)):
                    read.setdefault(arm, set()).update(progress.items())
        spent = [_spent(tables, at, arm, styles[arm], read.get(arm, set())) for arm in arms]
        groups.append(figures.Group(label, pairs, spent, _SPENT[at.equal or "flops"][1]))
    if not groups:
        return None
    height = (290 if len(groups) == 1 else 190) - (25 if len(verdicts) > 4 else 0)
    height = max(
        height, 80 + 13 * max(len(group.spent) for group in groups)
    )  # the names beside it, one below the other
    caption = (
        "Left: thin lines join one seed’s two arms, the thick line their means. Right: the same values against all that "
        "was spent, the teacher’s included; lines are the means on the way."
    )
    if len(rows) > len(groups):
        caption += f" Drawn: the first {len(groups)} of {len(rows)} things measured."
    return Drawing(figures.pairs_and_compute(groups, height=height), "Seeds in pairs. " + "; ".join(alt), caption)


def _spent(
    tables: Tables, at: MetricQuery, arm: str, style: int, read: Collection[tuple[int, float]]
) -> figures.Series:  # fmt: skip
    """`read`: seeds and progress at which it was read, where that is at equal cost."""
    column = _SPENT[at.equal or "flops"][0]
    trials = with_phases_of(ended(tables, "trial", arm), at.phase, at.tasks)
    curve = curve_of(tables, at, trials)
    before = costs(tables, trials, at)
    if curve.empty or before.empty:
        return figures.Series(arm, style)
    if column != "tokens":
        curve[column] += curve["trial"].map(before.set_index("trial")[f"before_{column}"])
    end = curve[(curve["progress"] - at.at).abs() <= 1e-6]
    if at.equal is not None:
        seeds = curve["trial"].map(trials.set_index("trial")["seed"])
        end = curve[[(s, p) in read for s, p in zip(seeds.tolist(), curve["progress"].tolist(), strict=True)]]
    mean = curve[curve["progress"] <= at.at + 1e-6].groupby("progress")[[column, "value"]].mean()
    points = list(zip(end[column].tolist(), end["value"].tolist(), strict=True))
    return figures.Series(arm, style, mean[column].tolist(), mean["value"].tolist(), points=points)


def _how_to_repeat(study: Study, provenance: Mapping[str, str]) -> Section:
    command = provenance.get("command") or f"python -m orchestrator.sweep {shlex.quote(study.file)}{arguments(study)}"
    rows = [(key, value) for key, value in provenance.items() if key != "command"]
    origin: Block = Table("Provenance", ("what", "value"), rows, "lm") if rows else "No provenance was recorded."
    return Section("How to repeat it", ("The same command again runs only what is missing.", Command(command), origin))


def _markdown(page: Page) -> str:
    head = ("", "claim", "verdict at this scale", "arm", "against", "arm − against", "95 % interval",
            "new data as well", "n", "paper")  # fmt: skip
    lines = [
        (line.number, f"{line.says} ({line.about})", f"{line.verdict} {line.more}".strip(), f"{p.arm_mean} {p.arm}",
         f"{p.against_mean} {p.against}", p.effect, p.interval + (f"; {p.cost}" if p.cost else ""), p.new_data or "–", p.n,
         f"{line.paper} {line.judged}")
        for line in page.lines
        for p in line.parts
    ]  # fmt: skip
    a = page.advice
    use: list[Block] = [f"{a.lead} {a.verdict}".strip()]
    use += [Table("Recipe", ("factor", "value"), a.recipe, "ll")] if a.recipe else []
    use += [Table("How sure, and at what cost", ("what", "value"), a.facts, "ll")] if a.facts else []
    use += [Command(a.command)] if a.command else []
    blocks: list[Block] = [page.scale, page.counts, page.answer]
    blocks += [Table("Claims", head, lines, "lllrrrrrrl")] if lines else []
    blocks += [page.figure] if page.figure else []
    out = [f"# {escape(page.question)}", *map(as_markdown, blocks)]
    for section in (Section(a.title, use), *page.sections):
        out += [f"## {escape(section.title)}", *map(as_markdown, section.blocks)]
    return "\n\n".join(out) + "\n"
