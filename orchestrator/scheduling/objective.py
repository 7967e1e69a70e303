"""The value of a study's objective in the records of a trial. Imported in slots too, so it imports little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.study.schema import Study, tasks_of
from trainables.config.phase_run import PhaseRun


def objective(study: Study, records: Iterable[Mapping[str, Any]]) -> float | None:
    """Computes the mean dev metric over the data sets at the end of the phase; None where a data set is missing."""
    wanted = study.objective
    values: dict[str, list[float]] = {}
    for record in records:
        if (
            record["metric"] == wanted.metric
            and record["split"] == "dev"
            and record["model"] == wanted.model
            and record["progress"] == 1.0
            and PhaseRun.parse(record["phase"]).phase == wanted.phase
        ):
            values.setdefault(record["task"], []).append(record["value"])
    tasks = tasks_of(wanted, study.each_of(wanted.phase)) or tuple(values)
    means = [sum(values[task]) / len(values[task]) for task in tasks if task in values]
    return sum(means) / len(means) if means and len(means) == len(tasks) else None
