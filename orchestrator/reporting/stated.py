"""When the claims were stated, what was edited after results, and what planned looks saved."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.analysis.claim_history import ClaimHistory
from orchestrator.analysis.curves import planned
from orchestrator.analysis.queries import parsed
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting.document import Section, Table, plural
from orchestrator.study.schema import Study

SHOWN = 3  # edits on the first screen


def stated(history: ClaimHistory | None, name: str) -> str:
    """When a claim was stated, and whether the seeds are those of the plan."""
    if history is None:
        return ""
    text = history.stated(name).text()
    return f"{text}; seeds changed beyond the plan" if history.is_beyond_plan else text


def cautions(history: ClaimHistory | None) -> list[str]:
    """What a reader must know before the verdicts: edits after results, and what the history cannot tell."""
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
    """What planned looks saved so far, against as many seeds of each arm as the last look has; empty for a single look."""
    looks = study.looks
    if len(looks) < 2 or not verdicts:
        return ""
    trials = planned(tables.trials)
    seeds, hours, num = 0, 0.0, 0
    for arm in {arm for v in verdicts for arm in v.claim.arms}:
        own = trials[(trials["arm"] == arm) & (trials["kind"] == "trial")]
        ended = own[own["status"] == "ended"]
        spent = sum(
            float(done["device_seconds"])
            for cell in ended["phases"]
            for done in parsed(cell).values()
            if not done["reused"]
        )
        num += len(own)
        seeds += study.num_seeds - len(own)
        hours += (study.num_seeds - len(own)) * spent / max(1, len(ended)) / 3600
    num_open = sum(v.is_open for v in verdicts)
    state = f"so far, with {plural(num_open, 'claim')} open" if num_open else "in all"
    return (
        f"Planned looks: {plural(num, 'trial')} of arms {state}; {study.num_seeds} seeds of each would take {seeds} more, about "
        f"{hours:.2g} device-hours."
    )
