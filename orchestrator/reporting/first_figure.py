"""The figure on the report's first screen: each claim's seeds in pairs, and the same values against total cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from orchestrator.analysis.costs import costs
from orchestrator.analysis.curves import baseline_of, curve_of, ended
from orchestrator.analysis.queries import MetricQuery, with_phases_of
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting import figures
from orchestrator.reporting.document import Drawing, plural
from orchestrator.study.claims import AXIS_WORDS, CostAxis
from orchestrator.study.schema import Study
from trainables.metrics.known import metric_named

NUM_ROWS = 2  # a row is one metric, model and split
_COST: Mapping[CostAxis, tuple[str, str]] = {  # the column, and the label of the axis
    "student_tokens": ("tokens", "tokens of the phase"),
    "flops": ("flops", "total compute, teacher included (FLOPs)"),
    "device_seconds": ("device_seconds", "device time, teacher included (s)"),
}


def styles(study: Study) -> dict[str, int]:
    """Returns arm -> colour and marker, the same in every figure; the most frequent baseline is grey."""
    base = Counter(filter(None, (baseline_of(study, arm) for arm in study.arms))).most_common(1)
    order = sorted(study.arms, key=lambda arm: bool(base) and arm != base[0][0])
    return {arm: i for i, arm in enumerate(order)}


def pairs_and_cost(study: Study, tables: Tables, verdicts: Sequence[Verdict]) -> Drawing | None:
    rows: dict[MetricQuery, list[tuple[str, Verdict]]] = {}
    for i, v in enumerate(verdicts, 1):
        if v.parts:
            rows.setdefault(v.reading, []).append((str(i), v))
    if not rows:
        return None
    drawn = list(rows.items())[:NUM_ROWS]
    groups = [_group(tables, query, claims, styles(study)) for query, claims in drawn]
    height = (290 if len(groups) == 1 else 190) - (25 if len(verdicts) > 4 else 0)
    height = max(height, 80 + 13 * max(len(group.spent) for group in groups))  # room for the names of the arms
    caption = (
        "Left: a thin line joins the two arms at one seed, the thick line their means. Right: the same values against "
        "total cost, teacher included; lines: mean during training."
    )
    if len(rows) > len(groups):
        caption += f" Drawn: the first {len(groups)} of {len(rows)} metrics."
    alt = "; ".join(_in_words(number, v) for _, claims in drawn for number, v in claims)
    return Drawing(figures.pairs_and_compute(groups, height=height), f"Seeds in pairs. {alt}", caption)


def _in_words(number: str, v: Verdict) -> str:
    parts = []
    for c in v.parts:
        better = sum((d < 0) == c.lower_is_better and d != 0 for d in c.differences)
        parts.append(f"claim {number}: {v.claim.arm} better than {c.against} in {better} of {plural(c.n, 'seed')}")
    return "; ".join(parts)


def _group(
    tables: Tables, query: MetricQuery, claims: Iterable[tuple[str, Verdict]], style: Mapping[str, int]
) -> figures.Group:
    pairs, read = [], dict[str, set[tuple[int, float]]]()
    for number, v in claims:
        arm = v.claim.arm
        for c in v.parts:
            values = (c.against_values, c.arm_values, style[c.against], style[arm])
            pairs.append(figures.Pair(number, c.against, arm, *values))
        for against, progress in v.read_at.items():
            read.setdefault(arm, set()).update(progress.arm.items())
            read.setdefault(against, set()).update(progress.against.items())
    arms = dict.fromkeys(name for pair in pairs for name in (pair.left, pair.right))
    label = f"{query.model} {query.metric} on {query.split} ({'↓' if metric_named(query.metric).lower_is_better else '↑'} better)"
    label += f", at {query.at:g}" if query.at < 1 else ""
    label += f", at equal {AXIS_WORDS[query.equal]}" if query.equal else ""
    label += f", mean over {plural(len(query.tasks), 'task')}" if len(query.tasks) > 1 else ""
    spent = [_against_cost(tables, query, figures.Series(arm, style[arm]), read.get(arm, set())) for arm in arms]
    return figures.Group(label, pairs, spent, _COST[query.equal or "flops"][1])


def _against_cost(
    tables: Tables, query: MetricQuery, arm: figures.Series, read: Collection[tuple[int, float]]
) -> figures.Series:
    """Draws values against cost. `read`: (seed, progress) at which the arm was evaluated at equal cost."""
    column = _COST[query.equal or "flops"][0]
    trials = with_phases_of(ended(tables, "trial", arm.name), query.phase, query.tasks)
    curve, before = curve_of(tables, query, trials), costs(tables, trials, query)
    if curve.empty or before.empty:
        return arm
    if column != "tokens":
        curve[column] += curve["trial"].map(before.set_index("trial")[f"before_{column}"])
    end = curve[(curve["progress"] - query.at).abs() <= 1e-6]
    if query.equal is not None:
        seeds = curve["trial"].map(trials.set_index("trial")["seed"])
        end = curve[[pair in read for pair in zip(seeds.tolist(), curve["progress"].tolist(), strict=True)]]
    mean = curve[curve["progress"] <= query.at + 1e-6].groupby("progress")[[column, "value"]].mean()
    points = list(zip(end[column].tolist(), end["value"].tolist(), strict=True))
    return arm._replace(x=mean[column].tolist(), y=mean["value"].tolist(), points=points)
