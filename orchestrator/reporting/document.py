"""What a report is made of, before it is HTML or Markdown: blocks, and numbers as text. Knows no table and no study."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from orchestrator.analysis.statistics import paired_t


@dataclass(frozen=True)
class Table:
    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str  # a letter for each column: l text, r number, m machine text


@dataclass(frozen=True)
class Drawing:
    kind: ClassVar[str] = "drawing"
    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Command:
    kind: ClassVar[str] = "command"
    text: str


Block = str | Table | Drawing | Command


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


# ----------------------------------------------------------------------------------------------------------- numbers


def fixed(value: float | None, decimals: int, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "−")


def decimals_for(half: float | None, value: float = math.nan) -> int:
    """Two digits of the interval's half width; without one, three of the value."""
    if half and math.isfinite(half):
        return min(8, max(0, 1 - math.floor(math.log10(abs(half)))))
    if value and math.isfinite(value):
        return min(8, max(0, 2 - math.floor(math.log10(abs(value)))))
    return 3


def span(interval: tuple[float, float] | None, decimals: int) -> str:
    if interval is None:
        return "no interval"
    return f"[{fixed(interval[0], decimals, sign=True)}, {fixed(interval[1], decimals, sign=True)}]"


def p_value(p: float | None) -> str:
    return "–" if p is None or not math.isfinite(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half width of its 95 % t interval; NaN for what so few values cannot say."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return (finite[0] if finite else math.nan), math.nan
    test = paired_t(finite)
    return float(test.mean), float(test.half)


def mean_text(values: Sequence[float]) -> str:
    mean, half = mean_and_half(values)
    places = decimals_for(half, mean)
    return fixed(mean, places) + (f" ± {fixed(half, places)}" if math.isfinite(half) else "")


STRUCTURE = ("models", "phases", "terms", "optimizer", "budget")  # words of a path that a reader can do without


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> its telling parts: `phases.teach.budget.steps` is read as `teach steps`; the whole path where two collide."""
    names = {path: " ".join(part for part in path.split(".") if part not in STRUCTURE) for path in paths}
    return {path: name if list(names.values()).count(name) == 1 else path for path, name in names.items()}


def setting(value: Any) -> str:
    """The value of a varied factor."""
    return (
        f"{value:#.3g}".rstrip(".")
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value)
    )


# ---------------------------------------------------------------------------------------------------------- Markdown


def as_markdown(block: Block) -> str:
    match block:
        case str():
            return escape(block)
        case Command():
            return f"```\n{' '.join(block.text.split()).replace('`', '')}\n```"
        case Drawing():
            return f"*Figure.* {escape(block.alt)}. {escape(block.caption)}"
        case Table():
            bars = [":--" if a != "r" else "--:" for a in block.align]
            rows = [[escape(cell) or " " for cell in row] for row in (block.head, *block.rows)]
            table = [f"| {' | '.join(row)} |" for row in (rows[0], bars, *rows[1:])]
            return "\n".join([f"**{escape(block.caption)}**", "", *table])


def escape(text: str) -> str:
    """Text of other people cannot become markup: no tags, links, code, images or columns of a table."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)
