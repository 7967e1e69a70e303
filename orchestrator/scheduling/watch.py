"""Says how far a study is, from the plain files of its storage: what has ended, what runs, and the best so far."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.scheduling import trial_files
from orchestrator.scheduling.objective import measured
from orchestrator.scheduling.trial_files import Records, Row
from orchestrator.study.schema import Study
from trainables.runtime.outcome import Status
from trainables.storage.files import Storage

BAR = 20  # characters
Found = Mapping[str, tuple[Row, Records | None]]  # records: None while a trial runs


def progress(study: Study, home: Storage) -> str:
    """Returns the stages, what runs and the best so far, in one line."""
    found = trial_files.read_all(home)
    ended = [row for row, records in found.values() if records is not None]
    running = [row for row, records in found.values() if records is None]
    totals = {"arms": study.num_seeds * len(study.arms), "search": study.search.points if study.search else 0}
    totals["confirm"] = 2 * study.confirm.seeds if study.confirm else 0  # further rivals count once they have begun
    parts = []
    for stage in ("teacher", "tune", *totals):
        num, open_ = (sum(_stage(row) == stage for row in rows) for rows in (ended, running))
        if total := max(totals.get(stage, 0), num + open_):
            done = BAR * num // total
            parts.append(f"{stage} {num}/{total} {'#' * done}{'.' * (BAR - done)}")
    failed = sum(row["status"] == Status.FAILED for row in ended)
    parts += [f"{failed} failed"] * bool(failed)
    if running:
        names = [f"{row['point']} seed {row['seed']}" for row in running]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        parts.append(f"running: {', '.join(names[:4])}{more}")
    if best := _best(study, found):
        parts.append(f"best so far: {best[0]}, {study.objective.metric} {best[1]:.4g} on dev")
    return " | ".join(parts) or "no trial has begun"


def _stage(row: Row) -> str:
    return str(row["kind"]) if row["kind"] != "trial" else "arms" if row.get("arm") else "search"


def _best(study: Study, found: Found) -> tuple[str, float] | None:
    """Returns the arm or point with the best objective, a mean over its seeds."""
    values: dict[str, list[float]] = {}
    for row, records in found.values():
        is_over = row["kind"] == "trial" and row["status"] == Status.ENDED
        value = measured(study, study.objective, records or (), row.get("phases") or {}) if is_over else None
        if value is not None:
            values.setdefault(row["point"], []).append(value)
    means = {point: sum(each) / len(each) for point, each in values.items()}
    return min(means.items(), key=lambda item: study.objective.sign * item[1], default=None)
