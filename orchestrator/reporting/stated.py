"""When the claims were stated, what was edited after results, and what planned looks saved."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from orchestrator.analysis.claim_history import ClaimHistory
from orchestrator.analysis.curves import planned
from orchestrator.analysis.queries import parsed
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting.document import Section, Table, plural
from orchestrator.study.schema import Study

SHOWN = 3  # edits on the first screen


def stated(history: ClaimHistory | None, name: str) -> str:
    """Tells when a claim was stated, and whether the seeds are those of the plan."""
    if history is None:
        return ""
    text = history.stated(name).text()
    return f"{text}; seeds changed beyond the plan" if history.is_beyond_plan else text


def cautions(history: ClaimHistory | None) -> list[str]:
    """Returns what a reader must know before the verdicts: edits after results, and what the history cannot tell."""
    if history is None:
        return []
    lines, edits = [], history.edits()
    if edits:
        more = f"; and {len(edits) - SHOWN} more, below" if len(edits) > SHOWN else ""
        lines.append(f"Edited after results: {'; '.join(edit.text() for edit in edits[:SHOWN])}{more}.")
    if history.is_beyond_plan:
        lines.append(
            "The numbers of seeds were changed beyond the plan, after results: verdicts may be false more often than 5 % says."
        )
    if not history.is_whole:
        lines.append(
            "The history of the claims lacks files, or files were changed: it does not tell when claims were stated."
        )
    if not history.is_writable:
        lines.append("The storage cannot be written: this report is not counted, and an edit of claims is not kept.")
    return lines


def counted(history: ClaimHistory | None) -> list[str]:
    return [f"The report was made {plural(history.num_reports, 'time')}."] if history is not None else []


def section(history: ClaimHistory | None) -> Section | None:
    if history is None or not history.entries:
        return None
    rows = [(name, history.stated(name).text()) for name in history.entries[-1].claims]
    edits = [(edit.time, str(edit.num_results), edit.text()) for edit in history.edits()]
    first = history.entries[0]
    text = (
        f"Claims are kept in the storage from the first trial on: first at {first.time} UTC, with {plural(first.num_results, 'result')}. "
        f"A result is a trial of an arm that is over. {counted(history)[0]}"
    )
    blocks = [
        text,
        Table("Claims by when they were stated", ("claim", "stated"), rows, "ll")
        if rows
        else "The study states no claims.",
        Table("Edits after results", ("UTC", "results then", "edit"), edits, "lrl")
        if edits
        else "No edit after results.",
    ]
    return Section("When claims were stated", blocks)


def savings(study: Study, tables: Tables, verdicts: Sequence[Verdict]) -> str:
    """Returns what planned looks saved against as many seeds of each arm as the last look has, or what they may still
    ask for; empty for a single look."""
    if len(study.looks) < 2 or not verdicts:
        return ""
    trials = planned(tables.trials)
    trials = trials[trials["kind"] == "trial"]
    arms = {arm: trials[trials["arm"] == arm] for v in verdicts for arm in v.claim.arms}
    left = {arm: study.num_seeds - len(own) for arm, own in arms.items()}
    if waiting := {arm for v in verdicts if v.is_open for arm in v.claim.arms}:
        return f"Planned looks: at most {plural(sum(left[arm] for arm in waiting), 'trial')} of arms may follow."
    hours = sum(left[arm] * _mean_seconds(own) for arm, own in arms.items()) / 3600
    return (
        f"Planned looks saved {plural(sum(left.values()), 'seed')} and about {hours:.2g} device-hours against "
        f"{study.num_seeds} seeds of each arm."
    )


def _mean_seconds(trials: pd.DataFrame) -> float:
    """Returns the device seconds of a trial that has ended, without phases that it found in the store."""
    ended = trials.loc[trials["status"] == "ended", "phases"]
    done = [phase for cell in ended for phase in parsed(cell).values() if not phase["reused"]]
    return sum(float(phase["device_seconds"]) for phase in done) / max(1, len(ended))
