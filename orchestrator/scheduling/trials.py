"""What a study will run: trials with their identities, strata, and what each costs. Trains nothing, starts nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Choice, Study
from trainables.config import errors
from trainables.config.data import Data
from trainables.config.errors import DataError
from trainables.config.trial import TrialSpec, trial_id
from trainables.data.prepare import fingerprint, lender, prepare
from trainables.models import build
from trainables.training.phase_graph import phase_key, phase_runs

SEARCH_SEED = 1000  # of tuning and search: disjoint from the arms' seeds 0, 1, 2 …
CONFIRM_SEED = 2000  # the first of the fresh seeds

Kind = Literal["trial", "tune", "teacher", "confirm"]


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to run, and the place it has in the study."""

    id: str
    spec: TrialSpec  # pruned
    kind: Kind
    point: str
    arm: str | None
    params: Mapping[str, Any]
    keys: Mapping[str, str]  # phase instance -> key, in the order in which they run

    @property
    def seed(self) -> int:
        return self.spec.seed

    @property
    def upstream(self) -> tuple[str, ...]:
        """The instances that other phases of this trial start from or read."""
        read = {up for name in self.spec.phases for up in self.spec.upto(name).phases if up != name}
        return tuple(name for name in self.keys if name.partition("[")[0] in read)


@dataclass
class Fingerprints:
    """Fingerprints of data and pretrained weights, each computed once; prepares data where asked to."""

    data_folder: str | None  # None: read only, nothing is written
    _data: dict[tuple[Data, Data | None], str] = field(default_factory=dict)  # with what lends it its tokenizer
    _weights: dict[tuple[str, str | None], str] = field(default_factory=dict)

    def of(self, spec: TrialSpec) -> dict[str, str]:
        found = {}
        for name, data in spec.data.items():
            try:
                which = (data, lender(data, spec.data))
                if which not in self._data:
                    folder, others = self.data_folder, spec.data
                    self._data[which] = (
                        fingerprint(data, others) if folder is None else prepare(data, folder, others).fingerprint
                    )
            except DataError as error:
                raise StudyError(f"data.{name}: {error}") from None
            found[f"data:{name}"] = self._data[which]
        for name, model in spec.models.items():
            if model.pretrained is not None:
                where = (model.pretrained, model.revision)
                if where not in self._weights:
                    try:
                        self._weights[where] = build.weights_fingerprint(*where)
                    except errors.ModelError as error:
                        raise StudyError(f"models.{name}: {error}") from None
                found[f"model:{name}"] = self._weights[where]
        return found

    def plan(
        self, study: Study, spec: TrialSpec, kind: Kind, point: str, arm: str | None, params: Mapping[str, Any]
    ) -> PlannedTrial:
        """What is only searched or tuned ends with the phase that the objective looks at."""
        chosen_by_objective = kind == "tune" or (kind == "trial" and arm is None)
        lean = (spec.upto(study.objective.phase) if chosen_by_objective else spec).pruned()
        found = self.of(lean)
        keys = {str(instance): phase_key(lean, instance, found) for instance in phase_runs(lean)}
        params = {**strata_of(study, spec), **params}
        return PlannedTrial(trial_id(lean, found), lean, kind, point, arm, params, keys)

    def teacher(self, study: Study, planned: PlannedTrial, instance: str) -> PlannedTrial:
        """The trial that makes one phase for all that need it."""
        phase = instance.partition("[")[0]
        spec = planned.spec.upto(phase)
        found = self.of(spec)
        keys = {str(i): phase_key(spec, i, found) for i in phase_runs(spec)}
        return PlannedTrial(
            trial_id(spec, found), spec, "teacher", phase, None, dict(strata_of(study, planned.spec)), keys
        )


def strata_of(study: Study, spec: TrialSpec) -> dict[str, Any]:
    """The labels of the size axes that a trial has, whoever set them."""
    found = {}
    dumped = spec.model_dump(mode="json")
    for axis in study.size_axes():
        choice = study.vary[axis]
        if isinstance(choice, Choice):
            for label, value in choice.choice.items():
                wanted = value.items() if study.is_zip(axis) else [(axis, value)]
                if all(_at(dumped, path) == part for path, part in wanted):
                    found[axis] = label
                    break
    return found


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def strata(study: Study) -> Iterator[dict[str, str]]:
    """Every combination of sizes that a search can meet."""
    axes = study.size_axes()
    labels = []
    for axis in axes:
        choice = study.vary[axis]
        if not isinstance(choice, Choice):
            raise StudyError(f"{study.file}: vary.{axis}: sizes are varied by choice, so that each has its baseline")
        labels.append(list(choice.choice))
    for combination in itertools.product(*labels):
        point = dict(zip(axes, combination, strict=True))
        if not study.is_excluded(point):
            yield point


def arm_trials(study: Study, identity: Fingerprints, arm: str, tuned: Mapping[str, Any]) -> list[PlannedTrial]:
    """An arm at the reporting seeds 0 … seeds - 1."""
    return [
        identity.plan(study, study.spec(arm=arm, seed=seed, tuned=tuned), "trial", arm, arm, dict(tuned))
        for seed in range(study.seeds)
    ]
