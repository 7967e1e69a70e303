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
from orchestrator.study.claims import Claim, Task
from orchestrator.study.errors import StudyError, explain, set_path
from orchestrator.study.paths import locate
from trainables.config.trial import TrialSpec
from trainables.config.value import Name, Positive, Value
from trainables.metrics.known import OF_SCORES, metric_named


class Objective(Value):
    """The score of a search: on dev, at the end of `phase`; with `minus`, the paired difference to that arm."""

    phase: Name
    model: Name
    metric: str
    mode: Literal["min", "max"]
    task: Task | None = None
    minus: Name | None = None


class StopEarly(Value):
    """ASHA: from the fraction `first` of the budget on, the best 1/`reduction` of the points at a rung continue."""

    kind: Literal["asha"]
    first: float = Field(0.5, ge=0.5, lt=1)
    reduction: int = Field(2, ge=2)


class Search(Value):
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    points: PositiveInt
    stop_early: StopEarly | None = None
    seed: int = Field(0, ge=0)


class Tune(Value):
    """One grid for all arms: each takes the value that is best on dev, at seeds that no claim uses."""

    grid: dict[str, Annotated[tuple[Positive, ...], Field(min_length=3)]] = Field(min_length=1, max_length=1)
    extend: int = Field(2, ge=0)  # how often a winner at an edge may extend the grid by one step


class Looks(Value):
    """Numbers of seeds of each arm at which the claims are judged; after each look, open claims get more seeds."""

    looks: tuple[PositiveInt, ...] = (5, 8, 12, 20)

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
    """Compares the winner of the search with an arm of the same student, on fresh seeds, on test."""

    against: Name
    seeds: int = Field(5, ge=2)


def tasks_of(what: Objective | Claim, each: Sequence[str]) -> tuple[str, ...]:
    """Returns the data sets that a value needs; (): all that are recorded. The phase fans out over those in `each`."""
    if what.task is not None:
        return (what.task,) if isinstance(what.task, str) else tuple(what.task)
    # a task records only the metrics of its own score
    return () if metric_named(what.metric) in OF_SCORES else tuple(each)


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

    workers: PositiveInt = 1
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    memory_gb: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _a_worker_uses_one_device(self) -> Slot:
        if self.gpus > 1:
            raise ValueError(
                f"gpus is what one worker gets, at most 1; got {self.gpus:g}: give `workers: {math.ceil(self.gpus)}, gpus: 1`"
            )
        return self


class Study(Value):
    """A question, and the experiments that answer it. `trial` is the raw trial, with the profile applied."""

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
    objective: Objective
    claims: dict[Name, Claim] = {}
    confirm: Confirm | None = None
    limits: Limits = Limits()
    slot: Slot = Slot()
    fixed: dict[str, Any] = {}  # paths of the trial given by --set

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
