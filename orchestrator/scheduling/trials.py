"""The trials of a study with their identities, and the model sizes that a search can meet. Trains and starts nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.study.axes import Choice
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Study
from trainables.config import errors
from trainables.config.data import Data
from trainables.config.errors import DataError
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec, trial_id
from trainables.data.prepare import fingerprint, lender, prepare
from trainables.models import build
from trainables.training.phase_graph import phase_key, phase_runs

SEARCH_SEED = 1000  # of the search, and the first of tuning: disjoint from the arms' seeds 0, 1, 2 …
CONFIRM_SEED = 2000  # the first seed of the confirmation

Kind = Literal["trial", "tune", "teacher", "confirm"]


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to run, and its place in the study."""

    id: str
    spec: TrialSpec  # pruned
    kind: Kind
    point: str
    arm: str | None
    params: Mapping[str, Any]
    keys: Mapping[str, str]  # phase run -> key, in the order in which the phases run
    fingerprints: Mapping[str, str]  # of the spec's data and pretrained weights

    @property
    def seed(self) -> int:
        return self.spec.seed

    @property
    def is_point(self) -> bool:
        return self.kind == "trial" and self.arm is None

    @property
    def upstream(self) -> tuple[str, ...]:
        """The phase runs that other phases of this trial start from or read."""
        read = {up for name in self.spec.phases for up in self.spec.upto(name).phases if up != name}
        return tuple(name for name in self.keys if PhaseRun.parse(name).phase in read)


@dataclass
class Fingerprints:
    """Fingerprints of data and pretrained weights, each computed once; prepares the data if it has a folder."""

    data_folder: str | None  # None: nothing is written
    _data: dict[str, str] = field(default_factory=dict)  # by data, data with its tokenizers, and tokenizer
    _weights: dict[tuple[str, str | None], str] = field(default_factory=dict)

    def of(self, spec: TrialSpec) -> dict[str, str]:
        """Returns `data:<name>` and `model:<name>` -> fingerprint. Raises StudyError naming the data or the model."""
        prints = {}
        for name, (item, tokenizer) in spec.readings().items():
            try:
                prints[f"data:{name}"] = self._of_data(spec.data[item], spec.data, tokenizer)
            except DataError as error:
                raise StudyError(f"data.{name}: {error}") from None
        for name, model in spec.models.items():
            if (source := model.folder) is not None:
                if source not in self._weights:
                    try:
                        self._weights[source] = build.weights_fingerprint(*source)
                    except errors.ModelError as error:
                        raise StudyError(f"models.{name}: {error}") from None
                prints[f"model:{name}"] = self._weights[source]
        return prints

    def _of_data(self, data: Data, others: Mapping[str, Data], by: str | None) -> str:
        source = repr((data, lender(data, others), by))
        if source not in self._data:
            folder = self.data_folder
            self._data[source] = (
                fingerprint(data, others, by=by) if folder is None else prepare(data, folder, others, by=by).fingerprint
            )
        return self._data[source]


@dataclass(frozen=True)
class Planner:
    """Plans the trials of a study."""

    study: Study
    fingerprints: Fingerprints
    _untuned: dict[str, list[PlannedTrial]] = field(default_factory=dict)

    def arm(self, arm: str, tuned: Mapping[str, Any], seeds: Iterable[int]) -> list[PlannedTrial]:
        """Plans an arm at reporting seeds."""
        specs = (self.study.spec(arm=arm, seed=seed, tuned=tuned) for seed in seeds)
        return [self.plan(spec, "trial", arm, arm=arm, params=tuned) for spec in specs]

    def untuned(self, arm: str) -> list[PlannedTrial]:
        """Plans an arm without its tuned value up to the first look: as many trials, which need the same phases unless a
        grid changes them."""
        if arm not in self._untuned:
            self._untuned[arm] = self.arm(arm, {}, range(self.study.looks[0]))
        return self._untuned[arm]

    def tuning(self, arm: str, sizes: Mapping[str, str], value: Mapping[str, Any], *, seed: int) -> PlannedTrial:
        """Plans the trial of one value of an arm's grid at one combination of sizes. `seed`: 0, 1, … of tuning."""
        spec = self.study.spec(arm=arm, point=sizes, seed=SEARCH_SEED + seed, tuned=value)
        return self.plan(spec, "tune", arm, arm=arm, params=value)

    def point(self, name: str, params: Mapping[str, Any]) -> PlannedTrial:
        """Plans a searched point. Raises StudyError where its parameters make no valid trial."""
        return self.plan(self.study.spec(point=params, seed=SEARCH_SEED), "trial", name, params=params)

    def confirmation(self, name: str, params: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[list[PlannedTrial]]:
        """Plans the best point, the tuned baseline of its sizes, and the baseline at the point's settings, at fresh seeds."""
        study, confirm = self.study, self.study.confirm
        assert confirm is not None
        own = {path: params[path] for path in study.taken_over(confirm.against) if path in params}
        arm, runs = confirm.against, list[list[PlannedTrial]]()
        for seed in range(CONFIRM_SEED, CONFIRM_SEED + confirm.seeds):
            at_sizes, at_point = (
                study.spec(arm=arm, point=p, seed=seed, tuned=tuned) for p in (study.sizes_of(params), params)
            )
            winner = self.plan(study.spec(point=params, seed=seed), "confirm", name, params=params)
            as_tuned = self.plan(at_sizes, "confirm", arm, arm=arm, params=tuned)
            as_point = self.plan(at_point, "confirm", confirm.at_settings(name), arm=arm, params={**tuned, **own})
            runs.append([winner, as_tuned, as_point])
        return runs

    def at_cost(self, planned: PlannedTrial, name: str, factor: float) -> PlannedTrial:
        """Plans the baseline of a confirmation with another budget in the objective's phase. `name`: of the best point."""
        assert self.study.confirm is not None
        which, point = self.study.objective.phase, self.study.confirm.at_cost(name)
        phase = planned.spec.phases[which]
        longer = phase.model_copy(update={"budget": phase.budget.scaled(factor)})
        spec = planned.spec.model_copy(update={"phases": {**planned.spec.phases, which: longer}})
        budget = {f"phases.{which}.budget.{unit}": much for unit, much in longer.budget.model_dump().items()}
        return self.plan(spec, "confirm", point, arm=planned.arm, params={**planned.params, **budget})

    def teacher(self, planned: PlannedTrial, phase_run: str) -> PlannedTrial:
        """Plans the trial that trains one phase for all trials that need it."""
        phase = PhaseRun.parse(phase_run).phase
        params = strata_of(self.study, planned.spec)
        return self._planned(planned.spec.upto(phase), "teacher", phase, arm=None, params=params)

    def plan(
        self, spec: TrialSpec, kind: Kind, point: str, *, arm: str | None = None, params: Mapping[str, Any]
    ) -> PlannedTrial:
        """Plans a trial; one that is only searched or tuned ends with the phases by which it is chosen."""
        is_chosen = kind == "tune" or (kind == "trial" and arm is None)
        lean = (spec.upto(*self.study.phases_chosen_by) if is_chosen else spec).pruned()
        return self._planned(lean, kind, point, arm=arm, params={**strata_of(self.study, spec), **params})

    def _planned(
        self, spec: TrialSpec, kind: Kind, point: str, *, arm: str | None, params: Mapping[str, Any]
    ) -> PlannedTrial:
        prints = self.fingerprints.of(spec)
        keys = {str(run): phase_key(spec, run, prints) for run in phase_runs(spec)}
        return PlannedTrial(trial_id(spec, prints), spec, kind, point, arm, params, keys, prints)


def strata_of(study: Study, spec: TrialSpec) -> dict[str, Any]:
    """Returns the labels of the size axes that a trial has, whether a point or an arm set the sizes."""
    labels: dict[str, Any] = {}
    axes = study.size_axes()
    dumped = spec.model_dump(mode="json") if axes else {}
    for axis in axes:
        choice = study.vary[axis]
        if isinstance(choice, Choice):
            for label, value in choice.choice.items():
                wanted = value.items() if study.is_zip(axis) else [(axis, value)]
                if all(_at(dumped, path) in (part, _located(study, part)) for path, part in wanted):
                    labels[axis] = label
                    break
    return labels


def _located(study: Study, value: Any) -> Any:
    """Returns the folder that a choice names, as a trial has it."""
    return study.locate(value, may_be_id=True) if isinstance(value, str) else value


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def strata(study: Study) -> Iterator[dict[str, str]]:
    """Yields every combination of sizes that a search can meet."""
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
