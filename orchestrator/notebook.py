"""Opens a study's results in a notebook: data frames, and figures that show themselves.

from orchestrator.notebook import load
results = load("runs/dwt")
results.claims
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import ValidationError

from orchestrator.analysis import tables as stored
from orchestrator.analysis.curves import curve_of, objective_reading, planned
from orchestrator.analysis.verdicts import Verdict, judge_study
from orchestrator.cli import open_storage
from orchestrator.reporting import figures, first_figure
from orchestrator.reporting.document import Drawing
from orchestrator.reporting.page import make_report
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Study


@dataclass(frozen=True)
class Figure:
    """A drawing that a notebook shows, in the report's light colours."""

    drawing: Drawing

    def _repr_html_(self) -> str:
        svg = re.sub(r"var\(--(\w+)\)", lambda match: figures.LIGHT[match[1]], self.drawing.svg)
        return f"<figure>{svg}<figcaption>{html.escape(self.drawing.caption)}</figcaption></figure>"


@dataclass(frozen=True)
class Results:
    """The results of a study as its tables have them, whether it has ended or still runs."""

    study: Study
    tables: stored.Tables

    @property
    def trials(self) -> pd.DataFrame:
        """A row per trial that the study plans."""
        return planned(self.tables.trials).reset_index(drop=True)

    @property
    def examples(self) -> pd.DataFrame:
        """A row per answer to an example of test, of the trials that a claim or a confirmation compares."""
        return self.tables.examples

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """The verdicts as values, with every comparison, interval and note."""
        return judge_study(self.study, self.tables)

    @property
    def claims(self) -> pd.DataFrame:
        """A row per claim and arm that it is compared with; `effect` is arm minus against, with its 95 % interval over seeds;
        of a claim about scaling, the estimate itself."""
        rows = [
            {
                "claim": v.name, "says": v.claim.stated(), "verdict": str(v.verdict), "arm": v.claim.arm, "against": c.against,
                "metric": v.claim.metric, "split": v.reading.split, "effect": c.effect, "low": low, "high": high, "n": c.n,
                "p": c.p, "p_adjusted": v.p_adjusted, "notes": len(v.notes),
            }
            for v in self.verdicts
            for c in v.parts
            for low, high in (c.interval or (np.nan, np.nan),)
        ]  # fmt: skip
        rows += [
            {
                "claim": v.name, "says": v.claim.stated(), "verdict": str(v.verdict), "arm": e.name, "against": e.beside,
                "metric": v.claim.metric, "split": v.reading.split, "effect": e.value, "low": e.interval[0],
                "high": e.interval[1], "n": e.n, "p_adjusted": v.p_adjusted, "notes": len(v.notes),
            }
            for v in self.verdicts
            for e in v.estimates
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def curves(self, split: str = "dev") -> pd.DataFrame:
        """Returns the objective's metric on `split` over training: a row per trial and evaluation, with the cost so far."""
        trials = self.trials
        curve = curve_of(self.tables, objective_reading(self.study, split), trials)
        return trials[["trial", "point", "arm", "seed", "kind"]].merge(curve, on="trial")

    def figure(self) -> Figure | None:
        """Draws the seeds of each claim in pairs, and their values against cost; None before two arms share a seed."""
        drawing = first_figure.pairs_and_cost(self.study, self.tables, self.verdicts)
        return None if drawing is None else Figure(drawing)

    def _repr_markdown_(self) -> str:
        return make_report(self.study, self.tables, {}).markdown


def load(path: str | Path) -> Results:
    """Loads the results of a study from its folder in the storage, e.g. `runs/dwt` or `s3://bucket/runs/dwt`.

    Raises StudyError where no study lies there, or one of another version.
    """
    uri, _, name = str(path).rstrip("/").rpartition("/")
    home = open_storage(uri or ".").sub(name)
    tables, text = stored.read(home), home.read("study.yaml")
    if tables is None or text is None:
        raise StudyError(f"{path}: no tables of a study; expected the folder of a study that ran, e.g. runs/smoke")
    try:
        study = Study.model_validate(json.loads(text))
    except ValidationError as error:
        raise StudyError(
            f"{path}: the study was stored by another version of codistill ({error.errors()[0]['msg']})"
        ) from None
    return Results(study, tables)
