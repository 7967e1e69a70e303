"""A study: one question as one typed value. Knows the trial's schema; no YAML, no Ray, no storage, no tracker."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from orchestrator.study.errors import StudyError, explain, set_path
from trainables.config.data import GlueTask
from trainables.config.trial import TrialSpec
from trainables.config.value import Name, Positive, Value, by_key
from trainables.metrics.task_scores import METRICS

# --------------------------------------------------------------------------------------------------------- its values


def labelled(value: Any) -> Any:
    """A list of choices becomes label -> value; a label is what the report prints."""
    if isinstance(value, list):
        return {label_of(v): v for v in value}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    return value


def label_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


Label = Annotated[str, BeforeValidator(label_of)]


class _Axis(Value):
    when: dict[
        str,
        Annotated[
            tuple[str, ...], BeforeValidator(lambda v: [label_of(x) for x in (v if isinstance(v, list) else [v])])
        ],
    ] = {}


class Choice(_Axis):
    """One of several labelled values. Where the axis is no path of the trial, each value is a mapping path -> value."""

    choice: Annotated[dict[str, Any], BeforeValidator(labelled), Field(min_length=1)]

    def ends(self) -> tuple[Any, ...]:
        return tuple(self.choice)


class FloatRange(_Axis):
    float_: tuple[float, float] = Field(alias="float")
    log: bool = False

    @model_validator(mode="after")
    def _the_range_rises(self) -> FloatRange:
        _check_rising(*self.float_, log=self.log)
        return self

    def ends(self) -> tuple[Any, ...]:
        return self.float_


class IntRange(_Axis):
    int_: tuple[int, int] = Field(alias="int")
    log: bool = False
    step: PositiveInt = 1

    @model_validator(mode="after")
    def _the_range_rises(self) -> IntRange:
        _check_rising(*self.int_, log=self.log)
        return self

    def ends(self) -> tuple[Any, ...]:
        return self.int_


def _check_rising(low: float, high: float, *, log: bool) -> None:
    if not low < high:
        raise ValueError(f"the range must rise; got [{low}, {high}]")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range must lie above 0; got [{low}, {high}]")


Axis = Annotated[
    Annotated[Choice, Tag("choice")] | Annotated[FloatRange, Tag("float")] | Annotated[IntRange, Tag("int")],
    by_key("choice", "float", "int"),
]


def _differ(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"names a data set twice: {', '.join(names)}")
    return names


# Over which data sets a number is a mean: one, several, or (by default) all those of its phase.
Task = str | Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_differ)]
PARTS = {metric for metrics in METRICS.values() for metric in metrics}  # of a score; not every task has each


class Objective(Value):
    """What a search sees: always dev, at the end of `phase`; with `minus`, the paired difference to that arm."""

    phase: Name
    model: Name
    metric: str
    mode: Literal["min", "max"]
    task: Task | None = None
    minus: Name | None = None


class StopEarly(Value):
    """ASHA: from `first` (of the budget) on, only the best 1/`reduction` of the points seen at a rung go on."""

    kind: Literal["asha"]
    first: float = Field(0.5, ge=0.5, lt=1)
    reduction: int = Field(2, ge=2)


class Search(Value):
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    points: PositiveInt
    stop_early: StopEarly | None = None
    seed: int = Field(0, ge=0)


class Tune(Value):
    """The same grid for every arm: each takes the value best on dev, at seeds that no claim uses."""

    grid: dict[str, Annotated[tuple[Positive, ...], Field(min_length=3)]] = Field(min_length=1, max_length=1)
    extend: int = Field(2, ge=0)  # a winner at an edge extends the grid by one step, at most so often


class Confirm(Value):
    """The winner of the search against an arm of the same student, on fresh seeds, on test."""

    against: Name
    seeds: int = Field(5, ge=2)


CostAxis = Literal["student_tokens", "flops", "device_seconds"]
AXIS_WORDS: Mapping[CostAxis, str] = {
    "student_tokens": "student tokens",
    "flops": "FLOPs",
    "device_seconds": "device time",
}


class Figure(Value):
    """What a paper found, as an effect in our units: an average over these tasks of GLUE, comparable with one over
    exactly those. `glue`: its 8, or 9 with WNLI, whichever these are."""

    figure: float
    over: Annotated[tuple[GlueTask, ...], Field(min_length=1), AfterValidator(_differ)] | Literal["glue"]


Paper = Annotated[
    Annotated[str | float, Tag("words")] | Annotated[Figure, Tag("average")],
    Discriminator(lambda value: "average" if isinstance(value, Mapping | Figure) else "words"),
]


class Claim(Value):
    """A sentence that the report judges: `arm` is better than `against` (than each, where several) by more than `margin`.

    A margin below 0 claims that it is no worse by more than that. `at: equal` reads each pair of seeds at what the cheaper
    side spent of `axis`: the dearer one at its last look within that, on its way. `less` claims besides that the arm takes
    less of an axis, what both sides share left out.
    """

    says: str | None = None
    arm: Name
    against: Name | tuple[Name, ...]
    phase: Name | None = None  # by default the objective's
    model: Name
    against_model: Name | None = None  # in `against`; by default the same
    metric: str
    task: Task | None = None
    split: Literal["test", "dev"] = "test"
    at: float | Literal["equal"] = 1.0  # of the phase's budget
    margin: float = 0.0  # a gain: positive where the arm is better
    axis: CostAxis = "student_tokens"
    less: CostAxis | None = None
    family: str = "main"
    paper: Paper | None = None

    @field_validator("at", mode="before")
    @classmethod
    def _at_a_fraction_or_equal(cls, at: Any) -> Any:
        if at != "equal" and (isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= 1):
            raise ValueError("must be a fraction of the budget, from 0 to 1, or 'equal'")
        return at

    @model_validator(mode="after")
    def _what_is_equal_is_not_less(self) -> Claim:
        if self.at == "equal" and self.less is not None:
            raise ValueError(
                "`at: equal` reads both sides at equal cost, which leaves no cost to be `less`; give one of the two"
            )
        return self

    @property
    def rivals(self) -> tuple[str, ...]:
        return (self.against,) if isinstance(self.against, str) else self.against

    @property
    def figure(self) -> float | None:
        """The paper's, where it is a number."""
        if isinstance(self.paper, Figure):
            return self.paper.figure
        return None if isinstance(self.paper, str) else self.paper

    @property
    def is_of_time(self) -> bool:
        """Whether what it says hangs on measured times."""
        return "device_seconds" in (self.axis, self.less)

    def stated(self) -> str:
        """What is judged, whatever `says` says."""
        others = " and ".join(self.rivals)
        text = f"{self.arm} is no worse than {others}" if self.margin < 0 else f"{self.arm} is better than {others}"
        text += f" by more than {abs(self.margin):g}" if self.margin else ""
        text += f" at equal {AXIS_WORDS[self.axis]}" if self.at == "equal" else ""
        return text + (f", with less {AXIS_WORDS[self.less]}" if self.less else "")


def tasks_of(what: Objective | Claim, each: Sequence[str]) -> tuple[str, ...]:
    """The data sets that must all be there for a value; (): those that there are. `each`: over what the phase fans out."""
    if what.task is not None:
        return (what.task,) if isinstance(what.task, str) else tuple(what.task)
    return () if what.metric.partition("_")[0] in PARTS else tuple(each)


class Limits(Value):
    """What a sweep may take; nothing here changes a number in the results."""

    minutes: Positive | None = None  # then nothing new is started; what runs is finished
    checkpoint_seconds: Positive = 20  # between two checkpoints of a phase
    checkpoint_gb: Positive | None = None  # of all checkpoints together; one that does not fit is not written
    hang_minutes: Positive = 15  # without a step, an evaluation or a record: the process is ended and the trial goes on


class Slot(Value):
    """What one trial gets: `workers` processes that share each batch, each with so many CPUs and GPUs.

    `memory_gb`: memory of one worker, of its GPU where it has one, in 10^9 bytes. The plan asks this machine; it is to be
    stated where another one trains.
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
    """A question and all that it takes to answer it. `trial` is the raw trial, with the profile applied."""

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
    seeds: PositiveInt = 1
    objective: Objective
    claims: dict[Name, Claim] = {}
    confirm: Confirm | None = None
    limits: Limits = Limits()
    slot: Slot = Slot()
    fixed: dict[str, Any] = {}  # paths of the trial given by --set

    @property
    def folder(self) -> str:
        """Its folder in the storage."""
        return self.name if self.is_default_profile else f"{self.name}-{self.profile}"

    def each_of(self, phase: str) -> tuple[str, ...]:
        """The data sets over which a phase fans out; none where it does not."""
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
        """The trial of an arm, of a point, or of an arm put over a point (the paired baseline of that point).

        Precedence: trial < tuned < point < arm, and --set over all. An arm over a point keeps the point's sizes and
        undoes what the arm is about. Raises StudyError naming the arm or point.
        """
        raw = copy.deepcopy(self.trial)
        where = (
            " ".join(filter(None, (f"arm {arm!r}" if arm else "", f"point {dict(point)}" if point else ""))) or "trial"
        )
        for path, value in (tuned or {}).items():
            set_path(raw, path, value, where)
        for name, value in (point or {}).items():
            axis = self.vary[name]
            if isinstance(axis, Choice):
                value = axis.choice[value]
            if self.is_zip(name):
                for path, part in value.items():
                    set_path(raw, path, part, f"{where} {name}")
            else:
                set_path(raw, name, value, where)
        for path, value in (self.arms[arm] if arm else {}).items():
            set_path(raw, path, value, where)
        for path, value in self.fixed.items():
            set_path(raw, path, value, f"--set trial.{path}")
        if "seed" in raw:
            raise StudyError(f"{where}: seed: belongs to no trial, arm or axis; expected seeds: N")
        try:
            return TrialSpec.model_validate({**raw, "seed": seed})
        except ValidationError as error:
            raise StudyError(explain(error, TrialSpec, where, "trial", {})) from None

    def is_zip(self, axis: str) -> bool:
        return "." not in axis and axis not in TrialSpec.model_fields

    def is_active(self, axis: str, point: Mapping[str, Any]) -> bool:
        return all(point.get(other) in labels for other, labels in self.vary[axis].when.items())

    def point_at(self, name: str, end: Any) -> dict[str, Any]:
        """A point that holds this end of an axis, and what the axis' conditions ask for."""
        wanted, todo = {name: end}, [name]
        while todo:
            for other, labels in self.vary[todo.pop()].when.items():
                wanted[other] = labels[0]
                todo.append(other)
        return {key: wanted[key] for key in self.vary if key in wanted}

    def is_excluded(self, point: Mapping[str, Any]) -> bool:
        return any(all(point.get(axis) == label for axis, label in rule.items()) for rule in self.exclude)

    def size_axes(self) -> tuple[str, ...]:
        """The axes that change a model's shape: strata of the report."""

        def resizes(path: str) -> bool:
            whose, _, what = path.partition(".")[2].partition(".")
            is_size = not what or what in ("layers", "width", "intermediate_size", "family", "pretrained")
            return path.startswith("models.") and bool(whose) and is_size

        return tuple(name for name in self.vary if any(resizes(path) for path in self.paths(name)))

    def paths(self, axis: str) -> tuple[str, ...]:
        """The paths of the trial that an axis sets."""
        if not self.is_zip(axis):
            return (axis,)
        return tuple(dict.fromkeys(path for value in self.vary[axis].choice.values() for path in value))  # type: ignore[union-attr]
