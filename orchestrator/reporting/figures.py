"""Draws numbers as inline SVG. Deterministic; knows no results, no study and no HTML.

Lengths are CSS pixels. Colours are placeholders that become the page's CSS variables, so that a drawing serves light, dark
and print. Text stays text: selectable, and in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from orchestrator.reporting.document import si

INK, MUTED, RULE = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0400{i:02x}" for i in range(8))
MARKERS = "osD^vPX*"
LIGHT = {  # the page's colours on white paper, by CSS variable
    "ink": "#16191d", "muted": "#59616b", "rule": "#dfe3e7", "s0": "#5b6470", "s1": "#0072b2", "s2": "#c24e00",
    "s3": "#00805a", "s4": "#9a4b86", "s5": "#8a6d00", "s6": "#2a7fb8", "s7": "#7b3f00",
}  # fmt: skip
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {colour: f"s{i}" for i, colour in enumerate(SERIES)}
_STYLE = {
    "svg.hashsalt": "codistill",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a label from a study starts no formula
    "font.size": 11,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.unicode_minus": True,
}
_LINE = 14  # px between lines of text
MARKED = 20  # a line of more points has no markers
_CHAR = 6.4  # px per character at this size, an upper estimate


class Series(NamedTuple):
    """A named line with a band, single points, or both."""

    name: str
    style: int  # index of colour and marker
    x: Sequence[float] = ()
    y: Sequence[float] = ()
    half: Sequence[float] = ()  # half width of the band around y; NaN where there is none
    points: Sequence[tuple[float, float]] = ()


class Pair(NamedTuple):
    """The values of two arms, joined by seed."""

    title: str  # the number of the claim
    left: str
    right: str
    left_values: Sequence[float]
    right_values: Sequence[float]
    left_style: int
    right_style: int


class Group(NamedTuple):
    """Pairs and costs that share one y axis on the first screen."""

    label: str
    pairs: Sequence[Pair]
    spent: Sequence[Series]
    spent_label: str


def pairs_and_compute(groups: Sequence[Group], *, width: int = 780, height: int = 300) -> str:
    """Returns a row per group: the pairs by seed, and beside them the same values against cost."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(width, height * len(groups))
        for row, group in enumerate(groups):
            top, bottom = height * row + 38, height * (row + 1) - 42
            values = [v for p in group.pairs for v in (*p.left_values, *p.right_values)]
            values += [y for s in group.spent for _, y in s.points]
            limits = _limits(values)
            names = max([_CHAR * len(_short(s.name, 16)) for s in group.spent], default=0.0) + 18
            compute = 190.0
            room = width - 52 - 34 - compute - names
            each = min(150.0, room / max(1, len(group.pairs)))
            compute += room - each * len(group.pairs)
            for i, pair in enumerate(group.pairs):
                axes = _axes(figure, (52 + i * each, top, each - 14, bottom - top))
                _pair(axes, pair, each - 14, limits, first=i == 0)
                if i == 0:
                    figure.text(0, 1 - (top - 28) / figure.bbox.height, group.label, color=MUTED, va="top")
            left = 52 + each * len(group.pairs) + 20
            axes = _axes(figure, (left, top, compute, bottom - top))
            axes.set_ylim(*limits)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.tick_params(labelleft=False)
            _lines(axes, group.spent)
            _number_axis(axes, [x for s in group.spent for x in (*(p[0] for p in s.points), *s.x)])
            axes.set_xlabel(group.spent_label)
            _names(axes, group.spent, bottom - top, 16)
        return _svg(figure, "pairs")


def _pair(axes: Axes, pair: Pair, width: float, limits: tuple[float, float], *, first: bool) -> None:
    for a, b in zip(pair.left_values, pair.right_values, strict=True):
        axes.plot([0, 1], [a, b], color=MUTED, linewidth=1, alpha=0.6, solid_capstyle="round")
    for x, values, style in ((0, pair.left_values, pair.left_style), (1, pair.right_values, pair.right_style)):
        axes.plot([x] * len(values), values, MARKERS[style % 8], color=SERIES[style % 8], markersize=4.5, alpha=0.9)
    if len(pair.left_values) > 1:
        means = [sum(v) / len(v) for v in (pair.left_values, pair.right_values)]
        axes.plot([0, 1], means, color=INK, linewidth=2.4, solid_capstyle="round")
    axes.set_xlim(-0.16, 1.16)
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelleft=first)
    axes.set_xticks([0, 1], ["", ""])
    axes.set_title(
        f"claim {pair.title}" if width > 9 * _CHAR else pair.title, fontsize=11, color=INK, pad=6, fontweight="bold"
    )
    fits = int(width / _CHAR)
    if fits < 6:  # too narrow for names: markers and colours identify the arms
        return
    left, right = _short(pair.left, fits), _short(pair.right, fits)
    below = 0 if len(left) + len(right) + 2 <= fits else _LINE  # names too long for one line take two
    for end, name, align, down in ((0.0, left, "left", 0), (1.0, right, "right", below)):
        axes.annotate(name, (end, 0), (0, -7 - down), ("axes fraction", "axes fraction"), "offset points", ha=align,
                      va="top", color=INK, annotation_clip=False)  # fmt: skip


def curves(panels: Sequence[tuple[str, Sequence[Series]]], label: str, *, width: int = 1000, height: int = 300,
           name: str = "curves") -> str:  # fmt: skip
    """Panels of lines with bands; `label` names the common y axis, `name` is the figure's own on its page."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(width, height)
        names = max([_CHAR * len(_short(s.name, 24)) for s in panels[0][1]], default=0.0) + 18
        each = (width - 52 - names - 24 * len(panels)) / len(panels)
        values = [y for _, series in panels for s in series for y in (*s.y, *(p[1] for p in s.points))]
        for i, (title, series) in enumerate(panels):
            axes = _axes(figure, (52 + i * (each + 24), 30, each, height - 74))
            axes.set_ylim(*_limits(values))
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.tick_params(labelleft=i == 0)
            _lines(axes, series)
            _number_axis(axes, [x for s in series for x in (*s.x, *(p[0] for p in s.points))])
            axes.set_xlabel(title)
            if i == len(panels) - 1:
                _names(axes, series, height - 74, 24)
        figure.text(0, 1, label, color=MUTED, va="top")
        return _svg(figure, name)


class Effect(NamedTuple):
    """One varied factor: a choice with `labels`, into which x is an index, or a range without labels."""

    name: str
    labels: Sequence[str]
    log: bool
    series: Sequence[Series]  # one for each stratum
    means: Sequence[tuple[float, float, float]] = ()  # x, mean, half of the interval (NaN: none)


def effects(panels: Sequence[Effect], label: str, *, width: int = 1000, height: int = 230) -> str:
    """Draws small multiples, three per row: a point per completed trial, and each label's mean with its interval."""
    with matplotlib.rc_context(_STYLE):
        rows = math.ceil(len(panels) / 3)
        figure = _figure(width, height * rows + 16)
        names = max([_CHAR * len(_short(s.name, 18)) for s in panels[0].series if s.name], default=-18.0) + 18
        each = (width - 52 - names - 24 * 3) / 3
        limits = _limits([y for p in panels for s in p.series for _, y in s.points])
        for i, panel in enumerate(panels):
            axes = _axes(figure, (52 + i % 3 * (each + 24), 44 + height * (i // 3), each, height - 64))
            axes.set_ylim(*limits)
            axes.tick_params(labelleft=i % 3 == 0)
            axes.set_title(_short(panel.name, int(each / _CHAR)), fontsize=11, loc="left", pad=6)
            for k, s in enumerate(panel.series):
                aside = 0.14 * (k - (len(panel.series) - 1) / 2) if panel.labels else 0.0
                xs, ys = [p[0] + aside for p in s.points], [p[1] for p in s.points]
                axes.plot(xs, ys, MARKERS[s.style % 8], color=SERIES[s.style % 8], markersize=4.5, alpha=0.65)
            for x, mean, half in panel.means:
                axes.errorbar([x + 0.3], [mean], [0 if math.isnan(half) else half], fmt="_", color=INK, linewidth=1.6,
                              markersize=12, markeredgewidth=2)  # fmt: skip
            if panel.labels:
                fits = max(3, int(each / len(panel.labels) / _CHAR))
                axes.set_xticks(range(len(panel.labels)), [_short(text, fits) for text in panel.labels])
                axes.set_xlim(-0.5, len(panel.labels) - 0.5)
            else:
                _number_axis(axes, [p[0] for s in panel.series for p in s.points], log=panel.log)
            if i == min(2, len(panels) - 1):
                _names(axes, [s for s in panel.series if s.name], height - 64, 18)
        figure.text(0, 1, label, color=MUTED, va="top")
        return _svg(figure, "effects")


class Spot(NamedTuple):
    """A recipe on two axes; half widths of its intervals are NaN where there are none."""

    name: str  # written beside the axes; empty: a mark alone
    style: int
    x: float
    y: float
    half_x: float = math.nan
    half_y: float = math.nan
    is_front: bool = False


def trade_off(panels: Sequence[tuple[str, Sequence[Spot]]], label: str, *, width: int = 440, height: int = 290) -> str:
    """Returns a panel below the other: quality against cost. Marks that no other dominates are filled, and joined by a
    line.

    Narrow, so that the text stays legible on a phone; `label` names the x axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(width, height * len(panels))
        for i, (title, spots) in enumerate(panels):
            named = [Series(s.name, s.style, points=[(s.x, s.y)]) for s in spots if s.name]
            names = max([_CHAR * len(_short(s.name, 16)) for s in named], default=0.0) + 18
            top = height * i + 30
            axes = _axes(figure, (52, top, width - 60 - names, height - 76))
            axes.set_ylim(*_limits([s.y + sign * _known(s.half_y) for s in spots for sign in (-1, 1)]))
            axes.yaxis.set_major_locator(MaxNLocator(6))
            front = sorted((s.x, s.y) for s in spots if s.is_front)
            axes.plot([x for x, _ in front], [y for _, y in front], "--", color=MUTED, linewidth=1)
            for s in spots:
                colour = SERIES[s.style % 8]
                axes.errorbar([s.x], [s.y], [_known(s.half_y)], [_known(s.half_x)], fmt=MARKERS[s.style % 8], color=colour,
                              linewidth=1.2, markersize=6, markerfacecolor=colour if s.is_front else "none")  # fmt: skip
            _number_axis(axes, [s.x for s in spots])
            axes.set_xlabel(label)
            _names(axes, named, height - 76, 16)
            figure.text(0, 1 - (top - 28) / figure.bbox.height, title, color=MUTED, va="top")
        return _svg(figure, "trade").replace("<svg ", '<svg style="max-width: 560px" ', 1)


def _known(half: float) -> float:
    return half if math.isfinite(half) else 0.0


# ------------------------------------------------------------------------------------------------------------- parts


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    return figure


def _axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    w, h = figure.bbox.width, figure.bbox.height
    left, top, width, height = box
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    pad = (high - low or abs(high) or 1.0) * 0.07
    return low - pad, high + pad


def _lines(axes: Axes, series: Sequence[Series]) -> None:
    for s in series:
        colour, marker = SERIES[s.style % 8], MARKERS[s.style % 8]
        if len(s.x):
            marked = "" if s.points or len(s.x) > MARKED else marker
            axes.plot(s.x, s.y, color=colour, linewidth=1.8, marker=marked, markersize=4)
        if any(math.isfinite(h) for h in s.half):
            low, high = ([y + sign * h for y, h in zip(s.y, s.half, strict=True)] for sign in (-1, 1))
            axes.fill_between(list(s.x), low, high, color=colour, alpha=0.16, linewidth=0)
        if s.points:
            x, y = [p[0] for p in s.points], [p[1] for p in s.points]
            axes.plot(x, y, marker, color=colour, markersize=5, alpha=0.85)


def _names(axes: Axes, series: Sequence[Series], height: float, most: int) -> None:
    """Writes names with their markers right of the axes, at the height of the last value, without overlap."""
    low, high = axes.get_ylim()

    def end(s: Series) -> float:
        value = sum(y for _, y in s.points) / len(s.points) if s.points else s.y[-1] if len(s.y) else low
        return (value - low) / (high - low) * height

    ordered = sorted(series, key=end)
    places: list[float] = []
    for i, s in enumerate(ordered):
        place = min(max(end(s), places[-1] + _LINE if places else 0), height - _LINE * (len(ordered) - 1 - i))
        places.append(max(place, places[-1] + _LINE) if places else place)
    for s, place in zip(ordered, places, strict=True):
        outside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        x = 8 / axes.bbox.width
        axes.plot([1 + x], [place / height], MARKERS[s.style % 8], color=SERIES[s.style % 8], markersize=5, **outside)
        axes.text(1 + 2 * x, place / height, _short(s.name, most), va="center_baseline", color=INK, **outside)


def _number_axis(axes: Axes, values: Sequence[float], *, log: bool | None = None) -> None:
    """Formats x with SI prefixes; logarithmic if `log`, by default where values span more than a factor of six."""
    finite = [v for v in values if math.isfinite(v)]
    if log is None:
        log = bool(finite) and min(finite) > 0 and max(finite) > 6 * min(finite)
    if log:
        axes.set_xscale("log")
        ratio = max(finite) / min(finite) if finite else 1.0
        subs = (1, 1.5, 2, 3, 4, 6, 8) if ratio < 5 else (1, 2, 5) if ratio < 100 else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: si(x)))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def _svg(figure: Figure, name: str) -> str:
    """Renders a bare <svg> element: no prolog, no date, and ids that are unique on a page of several figures."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    space = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {box[0] if box else ""} {space} aria-hidden="true" focusable="false"'
    rest = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", rest)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, f"var(--{variable})")
    return f"{head}>{rest}".strip()
