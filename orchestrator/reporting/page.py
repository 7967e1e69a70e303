"""Makes the report, one page of HTML and the same as Markdown, from a study and its tables. Deterministic.

The first screen shows the question, the verdicts with their uncertainty, and a recommendation; sections follow below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from orchestrator.analysis.claim_history import ClaimHistory
from orchestrator.analysis.curves import planned, point_scores
from orchestrator.analysis.statistics import Chance
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import judge_study
from orchestrator.reporting import (
    cost_sections,
    pareto_section,
    scaling_section,
    search_sections,
    sections,
    stated,
    task_sections,
)
from orchestrator.reporting.claim_lines import Line, answer, claim_lines, word
from orchestrator.reporting.commands import DEFAULT_STORAGE, sweep_command
from orchestrator.reporting.document import Block, Command, Drawing, Section, Table, as_markdown, escape, plural
from orchestrator.reporting.figures import LIGHT
from orchestrator.reporting.first_figure import pairs_and_cost
from orchestrator.reporting.recommendation import Advice, advice
from orchestrator.reporting.unfinished import unfinished_replies
from orchestrator.study.schema import Study
from trainables.config.models import Model
from trainables.config.trial import TrialSpec


@dataclass(frozen=True)
class Summary:
    """What the command prints of a report."""

    answer: str
    verdicts: Sequence[str]  # of each claim
    by_claim: Mapping[str, str]  # the word for each verdict
    cautions: Sequence[str] = ()
    good_enough: str | None = None  # the cheapest arm, where the study asks

    @property
    def lines(self) -> list[str]:
        return [self.answer, *self.verdicts, *filter(None, [self.good_enough]), *self.cautions]


@dataclass(frozen=True)
class Report:
    html: str
    markdown: str
    summary: Summary


@dataclass(frozen=True)
class Page:
    name: str
    question: str
    scale: str
    counts: str
    answer: str
    good_enough: str | None
    cautions: Sequence[str]
    lines: Sequence[Line]
    figure: Drawing | None
    advice: Advice
    sections: Sequence[Section]


def make_report(study: Study, tables: Tables, provenance: Mapping[str, str], *, storage: str = DEFAULT_STORAGE,
                importance: Mapping[str, float] | None = None, evaluator: str = "",
                chance: Callable[[], Chance] | None = None,
                others: Mapping[str, Mapping[str, float]] | None = None,
                history: ClaimHistory | None = None) -> Report:  # fmt: skip
    """Makes the report of the trials in the tables, finished or not.

    `importance`: share of each varied factor, computed by the `evaluator` named over the completed points; `chance`:
    computes those of permuted scores; `others`: the shares for each further objective, by its words.
    """
    verdicts = judge_study(study, tables, history.looks if history is not None else ())
    points = point_scores(study, tables)
    below = (
        sections.verdict_details(verdicts),
        scaling_section.scaling(verdicts),
        stated.section(history),
        cost_sections.costs_compared(verdicts),
        cost_sections.time_to_quality(tables, verdicts),
        task_sections.by_task(study, tables, verdicts),
        sections.teachers(study, tables),
        sections.learning_curves(study, tables),
        pareto_section.quality_and_cost(study, tables, points),
        search_sections.search_points(study, points),
        search_sections.effects(study, points),
        search_sections.importances(study, points, importance, evaluator, chance=chance),
        search_sections.other_importances(study, points, others),
        search_sections.early_stopping(study, tables),
        cost_sections.cost_by_arm(study, tables),
        task_sections.models(study, tables),
        search_sections.tuning(study, tables),
        sections.outcomes(tables),
        _how_to_repeat(study, provenance, storage),
    )
    page = Page(
        name=study.folder,
        question=study.question,
        scale=_scale(study),
        counts=_counts(tables),
        answer=" ".join(filter(None, (answer(tables, verdicts), stated.savings(study, tables, verdicts)))),
        good_enough=pareto_section.good_enough_line(study, tables),
        cautions=[*stated.cautions(history), *unfinished_replies(tables)],
        lines=claim_lines(verdicts, history),
        figure=pairs_and_cost(study, tables, verdicts),
        advice=advice(study, tables, points, verdicts, storage=storage),
        sections=[section for section in below if section is not None],
    )
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.j2").render(page=page, light=LIGHT)
    by_claim = {v.name: word(v) for v in verdicts}
    lines, cautions = [_summary_line(line) for line in page.lines], [*page.cautions, *stated.counted(history)]
    summary = Summary(page.answer, lines, by_claim, cautions, page.good_enough)
    return Report(html.lstrip() + "\n", _markdown(page), summary)


def _summary_line(line: Line) -> str:
    effects = "; ".join(part.summary for part in line.parts)
    dated = f"; {line.stated}" if line.stated else ""
    return f"{line.number}. {line.says}: {line.verdict} {line.more} ({effects}{dated})"


def _scale(study: Study) -> str:
    specs = [TrialSpec.model_validate({**study.trial, "seed": 0})]
    specs += [study.spec(point={path: end}, seed=0) for path in study.size_axes() for end in study.vary[path].ends()]
    shapes: dict[str, list[str]] = {}
    for spec in specs:
        for name, model in spec.models.items():
            shapes.setdefault(name, []).append(_shape(model))
    sizes = ", ".join(f"{name} {' or '.join(dict.fromkeys(variants))}" for name, variants in shapes.items())
    profile = f"{study.profile} profile, " if study.profile else ""
    return f"Scale: {profile}{sizes} (layers × width). Results at this scale may not transfer to larger models."


def _shape(model: Model) -> str:
    if isinstance(model.like, Model):
        given = [f"{size} {what}" for what, size in (("layers", model.layers), ("width", model.width)) if size]
        return f"{_shape(model.like)} with {' and '.join(given) or 'other settings'}"
    return model.pretrained or f"{model.layers}×{model.width}"


def _counts(tables: Tables) -> str:
    trials = planned(tables.trials)
    counts = Counter(trials["status"])
    shown = ", ".join(f"{counts[status]} {status}" for status in ("ended", "stopped", "failed", "running"))
    others = len(tables.trials) - len(trials)
    return f"{plural(len(trials), 'trial')}: {shown}" + (f"; {others} no longer planned" if others else "")


def _how_to_repeat(study: Study, provenance: Mapping[str, str], storage: str) -> Section:
    command = Command(provenance.get("command") or sweep_command(study, storage))
    rows = [(key, value) for key, value in provenance.items() if key != "command"]
    origin: Block = Table("Provenance", ("what", "value"), rows, "lm") if rows else "No provenance was recorded."
    return Section("How to repeat", ("The same command again runs only the missing trials.", command, origin))


def _markdown(page: Page) -> str:
    head = ("", "claim", "verdict at this scale", "arm", "against", "arm − against", "95 % interval",
            "new data as well", "n", "paper")  # fmt: skip
    lines = [
        (line.number, f"{line.says} ({line.about})", "; ".join(filter(None, (f"{line.verdict} {line.more}".strip(), line.stated))), f"{p.arm_mean} {p.arm}",
         f"{p.against_mean} {p.against}", p.effect, p.interval + (f"; {p.cost}" if p.cost else ""), p.new_data or "–", p.n,
         f"{line.paper} {line.judged}")
        for line in page.lines
        for p in line.parts
    ]  # fmt: skip
    a = page.advice
    use: list[Block] = [f"{a.lead} {a.verdict}".strip()]
    use += [Table("Recipe", ("factor", "value"), a.recipe, "ll")] if a.recipe else []
    use += [Table("Confidence and cost", ("what", "value"), a.facts, "ll")] if a.facts else []
    use += [Command(a.command)] if a.command else []
    blocks: list[Block] = [page.scale, page.counts, page.answer, *filter(None, [page.good_enough]), *page.cautions]
    blocks += [Table("Claims", head, lines, "lllrrrrrrl")] if lines else []
    blocks += [page.figure] if page.figure else []
    out = [f"# {escape(page.question)}", *map(as_markdown, blocks)]
    for section in (Section(a.title, use), *page.sections):
        out += [f"## {escape(section.title)}", *map(as_markdown, section.blocks)]
    return "\n\n".join(out) + "\n"
