"""Blocks of a report before they are HTML or Markdown, and numbers as text. Knows no results and no study."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

STRUCTURE = ("models", "phases", "terms", "optimizer", "budget")  # parts of a path that `short_names` leaves out
PREFIXES = "kMGTPEZY"


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


def fixed(value: float | None, decimals: int, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "−")


def decimals_for(half: float | None, value: float = math.nan) -> int:
    """Returns two digits of the interval's half width; without one, three of the value."""
    if half and math.isfinite(half):
        return min(8, max(0, 1 - math.floor(math.log10(abs(half)))))
    if value and math.isfinite(value):
        return min(8, max(0, 2 - math.floor(math.log10(abs(value)))))
    return 3


def decimals_beside(interval: tuple[float, float] | None, value: float = math.nan) -> int:
    return decimals_for((interval[1] - interval[0]) / 2 if interval else None, value)


def span(interval: tuple[float, float] | None, decimals: int) -> str:
    if interval is None:
        return "no interval"
    return f"[{fixed(interval[0], decimals, sign=True)}, {fixed(interval[1], decimals, sign=True)}]"


def open_span(interval: tuple[float, float]) -> str:
    """Returns an interval of positive numbers; an end that is 0 or infinite was not reached."""
    low, high = interval
    if math.isinf(high):
        return f"above {low:.3g}" if low > 0 else "no bound"
    return f"[{low:.3g}, {high:.3g}]" if low > 0 else f"below {high:.3g}"


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


def mean_text(mean: float, half: float) -> str:
    """Returns a mean and the half width of its interval, which may be NaN."""
    places = decimals_for(half, mean)
    return fixed(mean, places) + (f" ± {fixed(half, places)}" if math.isfinite(half) else "")


def si(value: float, unit: str = "") -> str:
    """Returns at most three digits and an SI prefix: 1234567 -> '1.23 M'; 0.00021 -> '2.1e−4'."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    size, sign, power = abs(value), "−" if value < 0 else "", 0
    while size >= 999.5 and power < len(PREFIXES):
        size, power = size / 1000, power + 1
    digits = f"{size:.3g}".replace("e-0", "e−").replace("e-", "e−").replace("e+", "e")
    prefix = PREFIXES[power - 1] if power else ""
    return f"{sign}{digits}" + (f"\u202f{prefix}{unit}" if prefix or unit else "")


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Shortens paths: `phases.teach.budget.steps` to `teach steps`; keeps the whole path where two short names are equal."""
    names = {path: " ".join(part for part in path.split(".") if part not in STRUCTURE) for path in paths}
    return {path: name if list(names.values()).count(name) == 1 else path for path, name in names.items()}


def setting(value: Any) -> str:
    """Returns the value of a varied factor."""
    if isinstance(value, float):
        return f"{value:#.3g}".rstrip(".")
    return value if isinstance(value, str) else json.dumps(value)


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
    """Keeps text from a study or a log from becoming markup: tags, links, code, images, columns of a table."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)
