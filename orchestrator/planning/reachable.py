"""The trials that a study can reach: its arms, and the ends of every range that a search draws from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.scheduling.trials import strata
from orchestrator.study.schema import Study
from trainables.config.trial import TrialSpec


@dataclass(frozen=True)
class ReachableTrial:
    """A trial that the study can ask for."""

    spec: TrialSpec  # pruned
    name: str  # as messages call the trial
    point: Mapping[str, Any]
    end: tuple[str, str] | None = None  # of a search: the sizes, and the factor that is at one end of its range


def reachable(study: Study) -> Iterator[ReachableTrial]:
    """Yields each arm, each end of each range at all sizes, and the arms that points are compared with at those sizes."""
    for arm in study.arms:
        yield ReachableTrial(study.spec(arm=arm, seed=0).pruned(), f"arm {arm}", {})
    baselines = {study.objective.minus, study.confirm.against if study.confirm else None} - {None}
    for sizes in strata(study):
        for factor in study.vary:
            for end in study.vary[factor].ends():
                point = {**sizes, **study.point_at(factor, end)}
                if (trial := reached_at(study, point, (str(sizes), factor))) is not None:
                    yield trial
        for arm in sorted(filter(None, baselines)) if sizes else ():
            name = f"arm {arm} at {_point_text(sizes)}"
            yield ReachableTrial(study.spec(arm=arm, point=sizes, seed=0).pruned(), name, sizes)
    if not study.arms and not study.vary:
        yield ReachableTrial(study.spec(seed=0).pruned(), "the trial", {})


def reached_at(study: Study, point: Mapping[str, Any], end: tuple[str, str] | None = None) -> ReachableTrial | None:
    """Returns the trial at a point, or None where the study excludes the point."""
    point = {factor: point[factor] for factor in study.vary if factor in point}
    if study.is_excluded(point):
        return None
    return ReachableTrial(study.spec(point=point, seed=0).pruned(), f"point {_point_text(point)}", point, end)


def _point_text(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{factor.rsplit('.', 1)[-1]} {value}" for factor, value in point.items())
