"""The value of an objective or a constraint in what is known of a trial. Imported in slots too, so it imports little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from orchestrator.analysis.queries import spent, where_measured
from orchestrator.study.objectives import Measured
from orchestrator.study.schema import Study
from trainables.config.phase_run import PhaseRun


class Scores(NamedTuple):
    """What a search sees of a point that ended."""

    values: tuple[float, ...]  # of each objective
    excess: tuple[float, ...]  # beyond each constraint; at most 0 within it

    @property
    def is_feasible(self) -> bool:
        return all(excess <= 0 for excess in self.excess)


def measured(
    study: Study, what: Measured, records: Iterable[Mapping[str, Any]], phases: Mapping[str, Any]
) -> float | None:
    """Returns what a trial measured: on dev at the end of the phase, a mean over the data sets; or a cost.

    None where a data set is missing. `phases`: of the trial's row, with what each phase cost.
    """
    query = where_measured(study, what)
    if what.spent is not None:
        return spent(study, what.spent, query, phases) if phases else None
    values: dict[str, list[float]] = {}
    for record in records:
        if (
            record["metric"] == query.metric
            and record["split"] == query.split
            and record["model"] == query.model
            and record["progress"] == query.at
            and PhaseRun.parse(record["phase"]).phase == query.phase
        ):
            values.setdefault(record["task"], []).append(record["value"])
    tasks = query.tasks or tuple(values)
    means = [sum(values[task]) / len(values[task]) for task in tasks if task in values]
    return sum(means) / len(means) if means and len(means) == len(tasks) else None
