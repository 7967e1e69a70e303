"""The claims on the report's first screen: a line per claim with its verdict, effects and intervals; and all verdicts in
one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.analysis.claim_history import ClaimHistory
from orchestrator.analysis.costs import CostPart
from orchestrator.analysis.curves import planned
from orchestrator.analysis.notes import Kind, Scope
from orchestrator.analysis.queries import MetricQuery
from orchestrator.analysis.scaling import Estimate
from orchestrator.analysis.statistics import ALPHA, MIN_PAIRS, Comparison, Decision
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting.document import decimals_beside, fixed, open_span, plural, si, span
from orchestrator.reporting.notes import SCOPE
from orchestrator.reporting.stated import stated
from orchestrator.study.claims import Figure
from trainables.metrics.known import metric_named


@dataclass(frozen=True)
class Forest:
    """Where effect, intervals, margin and the paper's figure are drawn, in pixels."""

    zero: float
    effect: float
    interval: tuple[float, float] | None
    new_data: tuple[float, float] | None
    paper: float | None
    margin: float | None


@dataclass(frozen=True)
class Part:
    """One comparison of a claim; a conjunctive claim has several."""

    arm: str
    against: str
    arm_mean: str = "–"
    against_mean: str = "–"
    effect: str = "–"
    interval: str = "no pair of seeds"
    new_data: str = ""
    cost: str = ""  # the ratio, of a claim with `less`
    n: str = "0"
    forest: Forest | None = None
    is_ratio: bool = False  # of an estimate to its bound

    @property
    def summary(self) -> str:
        if self.is_ratio and self.effect == "–":
            return f"{self.arm} {self.arm_mean}: {self.interval} times {self.against} {self.against_mean}"
        if self.is_ratio:
            return f"{self.arm} {self.arm_mean}, {self.effect} {self.interval} of {self.against} {self.against_mean}"
        return f"{self.arm} − {self.against} {self.effect}, {self.interval}"


@dataclass(frozen=True)
class Line:
    number: str
    says: str
    comparison: str
    about: str
    verdict: str
    more: str
    parts: Sequence[Part]
    paper: str
    judged: str
    stated: str  # when, and whether by plan


def numbered(verdicts: Sequence[Verdict]) -> list[tuple[str, Verdict]]:
    """Returns each verdict with its name in the sections, e.g. `1. helps`."""
    return [(f"{i}. {v.name}", v) for i, v in enumerate(verdicts, 1)]


def word(verdict: Verdict) -> str:
    """Returns the verdict in a word; with another one where seeds are missing that would decide."""
    return f"{verdict.verdict}{', provisional' if _more(verdict).startswith('provisional') else ''}"


def answer(tables: Tables, verdicts: Sequence[Verdict]) -> str:
    """Returns all verdicts in one sentence."""
    if not verdicts:
        return "No verdict: the study states no claims."
    if not (shown := [n for v in verdicts for n in _seeds(v)]):
        begun = "no trial has ended" if not (planned(tables.trials)["status"] == "ended").any() else "no pair of seeds"
        return f"No verdict yet on {plural(len(verdicts), 'claim')}: {begun}."
    if (n := max(shown)) < MIN_PAIRS:
        return (
            f"No verdict: with {'one seed' if n == 1 else plural(n, 'seed')}, the effect of these runs cannot be told from chance; a claim needs at "
            f"least {MIN_PAIRS} seeds."
        )
    num_open = sum(v.is_open for v in verdicts)
    if num_open == len(verdicts):
        return f"No verdict yet on {plural(num_open, 'claim')}: a planned look is still to come."
    later = (
        f" {plural(num_open, 'more claim')} {'waits' if num_open == 1 else 'wait'} for a planned look."
        if num_open
        else ""
    )
    verdicts = [v for v in verdicts if not v.is_open]
    counts = Counter(str(v.verdict) for v in verdicts)
    words = [(counts[word], str(word)) for word in Decision if counts[word]]
    parts = [f"{count} {'is' if count == 1 else 'are'} {word}" for count, word in words]
    decided = [v for v in verdicts if v.holds is not None]
    where = "at this scale and on this evaluation set"
    if on_new_data := sum(v.holds == Scope.NEW_DATA for v in decided):
        some = "" if on_new_data == len(decided) else f" for {on_new_data} of {plural(len(decided), 'verdict')}"
        where = f"at this scale, on new data as well{some}"
    if len(verdicts) == 1:
        the = "One claim" if num_open else "The claim"
        return f"{the} is {verdicts[0].verdict}, {where}.{later}"
    said = f"Of {len(verdicts)} claims, {', '.join(parts[:-1])}{' and ' if parts[1:] else 'all '}{parts[-1]}, {where}."
    return said + later + _on_families(len({v.claim.family for v in verdicts}))


def _on_families(num: int) -> str:
    """Counts the families, since each may err with the whole alpha."""
    if num == 1:
        return ""
    return f" {num} families of claims: some verdict is false with a chance of up to {num} × {100 * ALPHA:g} %."


def claim_lines(verdicts: Sequence[Verdict], history: ClaimHistory | None = None) -> list[Line]:
    drawn: dict[MetricQuery, list[float]] = {}  # values that share a scale
    for v in verdicts:
        values = drawn.setdefault(v.reading, [0.0])
        for c in v.parts:
            values += [c.effect, *(c.interval or ()), *(c.new_data or ())]
            values += [_margin(c)] if c.margin else []
            values += [] if (figure := _comparable_figure(v)) is None else [figure]
    return [_line(str(i), v, drawn[v.reading], stated(history, v.name)) for i, v in enumerate(verdicts, 1)]


def _line(number: str, v: Verdict, drawn: Sequence[float], stated: str) -> Line:
    claim, costs = v.claim, {c.found.against: c for c in v.cost_parts}
    scale = min(drawn), max(drawn)
    parts = [_part(v, c, scale, costs.get(c.against)) for c in v.parts]
    parts += [Part(claim.arm, other) for other in claim.rivals if other not in {c.against for c in v.parts}]
    parts += [_estimated(estimate) for estimate in v.estimates]
    paper = str(claim.paper or "–") if claim.figure is None else f"{claim.figure:+g}".replace("-", "−")
    if isinstance(claim.paper, Figure):
        paper += f" over {'GLUE' if claim.paper.over == 'glue' else ', '.join(claim.paper.over)}"
    judged = f"{v.paper} our interval" if v.paper in ("inside", "below", "above") else v.paper or "not stated"
    comparison = f"{claim.arm} − {' and '.join(claim.rivals)}" if claim.arm else claim.stated()
    says, more = claim.says or claim.stated(), _more(v)
    return Line(number, says, comparison, _about(v), v.verdict, more, parts, paper, judged, stated)


def _about(v: Verdict) -> str:
    """Returns what is compared, where, and at what cost, so that no gain is shown without its price."""
    claim = v.claim
    models = claim.model if claim.against_model is None else f"{claim.model} against {claim.against_model}"
    about = f"{claim.metric} of {models} on {claim.split}{' (not test: choices are made on dev)' if claim.split == 'dev' else ''}"
    about += f", mean over {', '.join(v.reading.tasks)}" if len(v.reading.tasks) > 1 else ""
    about += f" at {claim.at:g} of the budget" if claim.at not in ("equal", 1) else ""
    if claim.says and (claim.margin or claim.less or claim.at == "equal" or not claim.arm):
        about = f"{claim.stated()}; {about}"
    for other, ratio in v.cost_ratios.items():
        beside = f" of {other}" if len(v.cost_ratios) > 1 else ""
        time = f", ×{fixed(ratio.device_seconds, 2)} device time" if claim.is_of_time else ""
        about += f"; ×{fixed(ratio.student_tokens, 2)} tokens, ×{fixed(ratio.flops, 2)} compute{time}{beside}"
    return f"{about}; {metric_named(claim.metric).better} is better"


def _more(v: Verdict) -> str:
    """Returns where a verdict holds; of an undecided one, what would decide."""
    if v.look is not None and v.look.is_open:
        return f"provisional: judged at {v.look.num_seeds} seeds"
    if any(note.kind == Kind.PROVISIONAL for note in v.notes):
        return "provisional: trials are missing"
    if v.holds is not None:
        return SCOPE[v.holds]
    if v.conditions is not None and v.conditions.about["is_shared"]:
        return "times were measured on shared devices"
    if any(note.kind == Kind.NEXT_EVALUATION and not note.about["is_alike"] for note in v.notes):
        return "evaluations are too coarse"
    if (more := _more_evidence(v)) is not None:
        return more
    if any(note.kind == Kind.LOST_RUNS for note in v.notes):
        return "runs failed"
    if any(note.kind == Kind.OUTSIDE for note in v.notes):
        return "the bound is outside what was measured"
    if min(_seeds(v), default=0) < MIN_PAIRS:
        return f"provisional: needs {MIN_PAIRS} seeds or more"
    return "more seeds would not help"


def _seeds(v: Verdict) -> list[int]:
    """Returns the seeds of each comparison or estimate."""
    return [*(c.n for c in v.parts), *(e.n for e in v.estimates)]


def _more_evidence(v: Verdict) -> str | None:
    """Returns the cheapest of what would decide an undecided claim, with its cost."""
    more, which = v.more, ""
    if v.leans == Decision.REFUTED:
        which = (
            ", to refute: the effect points the other way"
            if not v.claim.margin
            else ", to refute: the gain is below the margin"
        )
    if more.cheapest in ("examples", "samples"):
        is_examples = more.cheapest == "examples"
        what = (
            f"{more.examples:.2g} times the examples"
            if is_examples
            else f"{more.samples:.2g} times the replies to each prompt"
        )
        return f"about {what}, all trials anew{_hours(more.anew_hours)}{which}"
    return None if more.seeds is None else f"about {plural(more.seeds, 'more seed')}{_hours(more.seeds_hours)}{which}"


def _hours(hours: float) -> str:
    return f" ({hours:.2g} device-hours)" if hours else ""


def _part(v: Verdict, c: Comparison, scale: tuple[float, float], cost: CostPart | None) -> Part:
    places, (low, high) = decimals_beside(c.interval, c.effect), scale

    def x(value: float) -> float:
        return round(6 + 120 * (value - low) / (high - low), 1) if high > low else 66.0

    def ends(interval: tuple[float, float] | None) -> tuple[float, float] | None:
        return (x(interval[0]), x(interval[1])) if interval else None

    figure, margin = _comparable_figure(v), _margin(c) if c.margin else None
    marks = (None if mark is None else x(mark) for mark in (figure, margin))
    return Part(
        v.claim.arm,
        c.against,
        fixed(c.mean_arm, places),
        fixed(c.mean_against, places),
        fixed(c.effect, places, sign=True),
        span(c.interval, places),
        span(c.new_data, places) if c.new_data else "",
        _cost(cost) if cost else "",
        str(c.n),
        Forest(x(0.0), x(c.effect), ends(c.interval), ends(c.new_data), *marks),
    )


def _estimated(e: Estimate) -> Part:
    """Returns an estimate beside its bound, or a foretold loss beside the measured one."""
    ratio = "–" if e.value is None else f"×{e.value / e.against:.3g}"
    value = "not reached" if e.value is None else si(e.value, e.unit)
    return Part(e.name, e.beside, value, si(e.against, e.unit), ratio, open_span(e.ratio), n=str(e.n), is_ratio=True)


def _margin(c: Comparison) -> float:
    """Returns the margin as an effect."""
    return -c.margin if c.lower_is_better else c.margin


def _cost(c: CostPart) -> str:
    word = {"student_tokens": "tokens", "flops": "compute", "device_seconds": "time"}[c.axis]
    places = max(2, decimals_beside(c.found.interval)) if c.found.interval else 2
    ends = f" [{fixed(c.found.interval[0], places)}, {fixed(c.found.interval[1], places)}]" if c.found.interval else ""
    return f"×{fixed(c.found.ratio, places)}{ends} {word}"


def _comparable_figure(v: Verdict) -> float | None:
    """Returns the paper's figure, where the paper measured what is measured here."""
    return v.claim.figure if v.paper in ("inside", "below", "above") else None
