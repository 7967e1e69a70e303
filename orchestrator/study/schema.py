"""A study: one question as one typed value."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, ValidationError, field_validator, model_validator

from orchestrator.study.axes import Axis, Choice, Label
from orchestrator.study.claims import AnyClaim, Crossing, Foretelling
from orchestrator.study.errors import StudyError, explain, set_path
from orchestrator.study.objectives import COST_WORDS, Constraint, GoodEnough, Measured, Objective
from orchestrator.study.paths import locate
from orchestrator.study.scaling_grid import Grid
from trainables.config.trial import TrialSpec
from trainables.config.value import Name, Positive, Value
from trainables.metrics.known import OF_SCORES, metric_named


class StopEarly(Value):
    """ASHA: from the fraction `first` of the budget on, the best 1/`reduction` of the points at a rung continue."""

    kind: Literal["asha"]
    first: float = Field(0.5, ge=0.5, lt=1)  # fraction of the budget at the first rung
    reduction: int = Field(2, ge=2)  # one point in so many continues


class Search(Value):
    """Tries points of `vary`; the winner is the point with the best objective."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"  # tpe is Optuna's
    points: PositiveInt  # trials, in total
    constraints: tuple[Constraint, ...] = ()  # points within them come first, and only they can win
    stop_early: StopEarly | None = None  # by default no point stops early
    seed: int = Field(0, ge=0)  # of the sampler


class Tune(Value):
    """One grid for all arms: each takes the value whose mean on dev is best, at seeds that no claim uses.

    Values that are clearly worse at two seeds are dropped; the others run at up to `seeds`.
    """

    # a dotted path of the trial -> the values that are tried
    grid: dict[str, Annotated[tuple[Positive, ...], Field(min_length=3)]] = Field(min_length=1, max_length=1)
    seeds: int = Field(3, ge=1, le=100)
    extend: int = Field(2, ge=0)  # how often a winner at an edge may extend the grid by one step


class Looks(Value):
    """Numbers of seeds of each arm at which the claims are judged; after each look, open claims get more seeds."""

    looks: tuple[PositiveInt, ...] = (5, 8, 12, 20)  # numbers of seeds, rising

    @field_validator("looks")
    @classmethod
    def _looks_rise_from_3(cls, looks: tuple[int, ...]) -> tuple[int, ...]:
        if len(looks) < 2:
            raise ValueError(f"a plan has two looks or more; one look is a plain number, e.g. seeds: {[*looks, 5][0]}")
        if any(later <= earlier for earlier, later in itertools.pairwise(looks)):
            raise ValueError(f"looks must rise, e.g. [5, 8, 12, 20]; got {[*looks]}")
        if looks[0] < 3:  # as `statistics.MIN_PAIRS` says
            raise ValueError(f"a look at {looks[0]} seeds decides nothing; expected 3 or more")
        return looks


def _kind_of_seeds(value: Any) -> str | None:
    return "schedule" if isinstance(value, Mapping | Looks) else None if isinstance(value, list | tuple) else "number"


Seeds = Annotated[
    Annotated[PositiveInt, Tag("number")] | Annotated[Looks, Tag("schedule")],
    Discriminator(
        _kind_of_seeds,
        custom_error_type="seeds",
        custom_error_message="must be a number, or planned looks, e.g. {looks: [5, 8, 12, 20]}",
    ),
]


class Confirm(Value):
    """Compares the winner of the search with an arm of the same student, on fresh seeds, on test.

    The arm runs as it was tuned, at the winner's settings of all that the arm does not set itself, and, where the winner costs
    more, for as long as costs the same.
    """

    against: Name  # an arm with the winner's student
    seeds: int = Field(5, ge=2)  # fresh seeds of both

    def at_settings(self, winner: str) -> str:
        """Names the arm at the winner's settings, as tables call it."""
        return f"{self.against} at settings of {winner}"

    def at_cost(self, winner: str) -> str:
        return f"{self.against} at cost of {winner}"


def tasks_of(what: Measured | AnyClaim, each: Sequence[str]) -> tuple[str, ...]:
    """Returns the data sets that a value needs; (): all that are recorded. The phase fans out over those in `each`."""
    if what.task is not None:
        return (what.task,) if isinstance(what.task, str) else tuple(what.task)
    # a task records only the metrics of its own score
    is_of_scores = what.metric not in COST_WORDS and metric_named(what.metric) in OF_SCORES
    return () if is_of_scores else tuple(each)


class Limits(Value):
    """Limits of a sweep, which change no number in the results."""

    minutes: Positive | None = None  # after which no trial is started; running trials finish
    checkpoint_seconds: Positive = 20  # between two checkpoints of a phase
    checkpoint_gb: Positive | None = None  # of all checkpoints together; a checkpoint that does not fit is not written
    hang_minutes: Positive = 15  # without a step, an evaluation or a record the process is killed; the trial resumes


class Slot(Value):
    """The resources of one trial: `workers` processes that share each batch, each with these CPUs and GPUs.

    `memory_gb`: memory of one worker, of its GPU where it has one, in 10^9 bytes; by default this machine's. State it where
    another machine trains.
    """

    workers: PositiveInt = 1  # processes that share each batch
    cpus: float = Field(1, gt=0)  # of each worker
    gpus: float = Field(0, ge=0)  # of each worker; below 1: trials share a GPU
    memory_gb: float | None = Field(None, gt=0)  # of each worker; by default this machine's

    @model_validator(mode="after")
    def _a_worker_uses_one_device(self) -> Slot:
        if self.gpus > 1:
            raise ValueError(
                f"gpus is what one worker gets, at most 1; got {self.gpus:g}: give `workers: {math.ceil(self.gpus)}, gpus: 1`"
            )
        return self


class Study(Value):
    """A question, and the experiments that answer it.

    `question`: what the report answers. `trial`: data, models and phases of the base trial, which arms and points change; raw,
    with the profile applied. `vary`: what the search may change, as dotted path of the trial -> choice or range; a name without
    a dot changes several paths at once. `exclude`: combinations of labels that the search leaves out. `search`: how points are
    chosen. `tune`: a grid of learning rates for each arm. `arms`: name -> {dotted path of the trial: value}, the recipes that
    are compared. `seeds`: seeds of each arm. `objective`: the number that tuning and search improve. `claims`: name -> a
    statement about arms that the report judges. `confirm`: repeats the search's winner on fresh seeds. `limits`: of time and
    disk. `slot`: the devices of one trial.
    """

    name: str
    file: str
    profile: str | None = None
    is_default_profile: bool = True
    question: str
    trial: dict[str, Any]
    vary: dict[str, Axis] = {}
    exclude: tuple[Annotated[dict[str, Label], Field(min_length=1)], ...] = ()
    search: Search | None = None
    tune: Tune | None = None
    arms: dict[Name, dict[str, Any]] = {}
    seeds: Seeds = Looks()
    objective_: Annotated[
        Annotated[Objective, Tag("one")] | Annotated[tuple[Objective, ...], Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, list | tuple) and value else "one"),
    ] = Field(alias="objective")
    good_enough: GoodEnough | None = None  # asks for the cheapest arm that is good enough
    claims: dict[Name, AnyClaim] = {}
    confirm: Confirm | None = None
    limits: Limits = Limits()
    slot: Slot = Slot()
    fixed: dict[str, Any] = {}  # paths of the trial given by --set
    overrides: tuple[str, ...] = ()  # path=value of what else --set, --seeds and --points gave

    @model_validator(mode="before")
    @classmethod
    def _others_measure_what_the_first_objective_does(cls, raw: Any) -> Any:
        """Gives further objectives and the constraints the first objective's phase and model, where they name none."""
        given, search = raw.get("objective"), raw.get("search")
        first = given[0] if isinstance(given, list) and given else given
        if not isinstance(first, Mapping):
            return raw
        own = {key: first[key] for key in ("phase", "model") if key in first}

        def filled(listed: Any) -> Any:
            return [{**own, **what} if isinstance(what, Mapping) else what for what in listed]

        if isinstance(given, list):
            raw = {**raw, "objective": filled(given)}
        if isinstance(search, Mapping) and isinstance(bounds := search.get("constraints"), list):
            raw = {**raw, "search": {**search, "constraints": filled(bounds)}}
        return raw

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.objective_ if isinstance(self.objective_, tuple) else (self.objective_,)

    @property
    def objective(self) -> Objective:
        """The first objective: arms are tuned and compared by it, and a search's winner is the best on it."""
        return self.objectives[0]

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return self.search.constraints if self.search else ()

    @property
    def phases_chosen_by(self) -> tuple[str, ...]:
        """The phases in which objectives and constraints are measured."""
        return tuple(dict.fromkeys(what.phase for what in (*self.objectives, *self.constraints)))

    @property
    def folder(self) -> str:
        """The study's folder in the storage."""
        return self.name if self.is_default_profile else f"{self.name}-{self.profile}"

    @property
    def looks(self) -> tuple[int, ...]:
        """After how many seeds of each arm the claims are judged."""
        return self.seeds.looks if isinstance(self.seeds, Looks) else (self.seeds,)

    @property
    def num_seeds(self) -> int:
        """The most seeds that an arm gets: those of the last look."""
        return self.looks[-1]

    def each_of(self, phase: str) -> tuple[str, ...]:
        """Returns the data sets over which a phase fans out; () where it does not."""
        path = f"phases.{phase}.for_each_dataset"
        return tuple(self.fixed.get(path, self.trial.get("phases", {}).get(phase, {}).get("for_each_dataset", ())))

    def trains(self, phase: str) -> tuple[str, ...]:
        """Returns the models that a phase trains."""
        return tuple(self.trial["phases"][phase]["train"])

    def spec(
        self,
        *,
        arm: str | None = None,
        point: Mapping[str, Any] | None = None,
        seed: int,
        tuned: Mapping[str, Any] | None = None,
    ) -> TrialSpec:
        """Builds the trial of an arm, of a point, or of an arm put over a point (the paired baseline of the point).

        Precedence: trial < tuned < point < arm < --set. Raises StudyError naming the arm or point.
        """
        raw = copy.deepcopy(self.trial)
        named = [f"arm {arm!r}"] * bool(arm) + [f"point {dict(point or {})}"] * bool(point)
        where = " ".join(named) or "trial"
        changes = [(path, value, where) for path, value in (tuned or {}).items()]
        for name, value in (point or {}).items():
            axis = self.vary[name]
            chosen = axis.choice[value] if isinstance(axis, Choice) else value
            parts = chosen.items() if self.is_zip(name) else [(name, chosen)]
            changes += [(path, part, f"{where} {name}" if self.is_zip(name) else where) for path, part in parts]
        changes += [(path, value, where) for path, value in (self.arms[arm] if arm else {}).items()]
        changes += [(path, value, f"--set trial.{path}") for path, value in self.fixed.items()]
        for path, value, blamed in changes:
            if path.startswith("trial."):
                raise StudyError(
                    f"{path}: starts inside the trial; did you mean {path.removeprefix('trial.')!r}?", blamed
                )
            set_path(raw, path, value, blamed)
        if "seed" in raw:
            raise StudyError("seed: belongs to no trial, arm or axis; expected seeds: N", where)
        try:
            return TrialSpec.model_validate({**raw, "seed": seed}, context={"locate": self.locate})
        except ValidationError as error:
            raise StudyError(explain(error, TrialSpec, "", root="trial"), where) from None

    def grid(self, claim: Crossing | Foretelling) -> Grid:
        """Returns what a claim about scaling reads of its arms. Raises ValueError where that is too little."""
        return claim.grid({arm: self.spec(arm=arm, seed=0).pruned() for arm in claim.arms or self.arms})

    @property
    def locate(self) -> Callable[..., str]:
        """Finds the study's paths, which start at its file."""
        return partial(locate, os.path.dirname(self.file))

    def is_zip(self, axis: str) -> bool:
        return "." not in axis and axis not in TrialSpec.model_fields

    def is_active(self, axis: str, point: Mapping[str, Any]) -> bool:
        return all(point.get(other) in labels for other, labels in self.vary[axis].when.items())

    def point_at(self, name: str, end: Any) -> dict[str, Any]:
        """Returns a point with this end of an axis, and the choices that make the axis active."""
        wanted, todo = {name: end}, [name]
        while todo:
            for other, labels in self.vary[todo.pop()].when.items():
                wanted[other] = labels[0]
                todo.append(other)
        return {key: wanted[key] for key in self.vary if key in wanted}

    def sizes_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the part of a point's parameters that sets model sizes."""
        return {axis: params[axis] for axis in self.size_axes()}

    def taken_over(self, arm: str) -> tuple[str, ...]:
        """Returns the axes that change an arm which is put over a point: those that the arm does not set itself, no sizes."""

        def changes(axis: str) -> bool:
            points = (self.point_at(axis, end) for end in self.vary[axis].ends())
            specs = [self.spec(arm=arm, point=p, seed=0).pruned() for p in points if not self.is_excluded(p)]
            return any(spec != specs[0] for spec in specs)

        return tuple(axis for axis in self.vary if axis not in self.size_axes() and changes(axis))

    def is_excluded(self, point: Mapping[str, Any]) -> bool:
        return any(all(point.get(axis) == label for axis, label in rule.items()) for rule in self.exclude)

    def size_axes(self) -> tuple[str, ...]:
        """Returns the axes that change a model's shape: strata of the report."""

        def resizes(path: str) -> bool:
            whose, _, what = path.partition(".")[2].partition(".")
            is_size = not what or what in ("layers", "width", "intermediate_size", "family", "pretrained")
            return path.startswith("models.") and bool(whose) and is_size

        return tuple(name for name in self.vary if any(resizes(path) for path in self.paths(name)))

    def paths(self, axis: str) -> tuple[str, ...]:
        """Returns the paths of the trial that an axis sets."""
        if not self.is_zip(axis):
            return (axis,)
        return tuple(dict.fromkeys(path for value in self.vary[axis].choice.values() for path in value))  # type: ignore[union-attr]
