"""The section on claims about scaling: the fitted curve of each, what was measured beside it, and its coefficients."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.analysis.scaling import Curve, Estimate
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting import figures
from orchestrator.reporting.claim_lines import numbered
from orchestrator.reporting.document import Block, Drawing, Section, Table, open_span, p_value, si


def scaling(verdicts: Sequence[Verdict]) -> Section | None:
    """Draws each claim's curve; None without such a claim."""
    blocks = list[Block]()
    for i, (name, v) in enumerate(numbered(verdicts)):
        if v.curve is None:
            continue
        rows = [
            (e.name, f"{e.value:.4g}" if e.value is not None else "not reached", open_span(e.interval), str(e.n))
            for e in v.estimates
        ]
        coefficients = [
            (what, _signed(value), f"[{_signed(low)}, {_signed(high)}]")
            for what, (value, (low, high)) in v.curve.coefficients.items()
        ]
        p = p_value(v.p_adjusted)
        blocks += [
            _drawing(name, v.curve, v.estimates, i),
            Table(f"{name}: estimates; p by Holm {p}", ("what", "value", "95 %", "seeds"), rows, "lrrr"),
            Table(f"{name}: coefficients", ("coefficient", "value", "95 %"), coefficients, "lrr"),
        ]
    if not blocks:
        return None
    text = (
        "Gain: the loss of the student alone minus that of the student with a teacher, at equal size and tokens; points are "
        "moved along the fitted slope to the mean of the other axis. Intervals are Student’s over the seeds’ pseudo-values: "
        "the curve is fitted again without each seed in turn. Nothing is read outside what was measured."
    )
    return Section("Scaling", (text, *blocks))


def _signed(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _drawing(name: str, curve: Curve, estimates: Sequence[Estimate], number: int) -> Drawing:
    series = [figures.Series(line.name, i, *line[1:]) for i, line in enumerate(curve.lines)]
    svg = figures.curves([(curve.x_name, series)], curve.y_name, name=f"scaling{number}")
    found = "; ".join(
        f"{e.name} {'not reached' if e.value is None else si(e.value, e.unit)} ({open_span(e.interval)})"
        for e in estimates
    )
    caption = f"Claim {name}. Lines: the fit, with its 95 % interval. Points: means over seeds, by phase."
    return Drawing(svg, f"{curve.y_name} against {curve.x_name}: {found}", caption)
