"""A study: one question as one typed value."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

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
from orchestrator.study.paths import locate
from trainables.config.data import GlueTask
from trainables.config.trial import TrialSpec
from trainables.config.value import Name, Positive, Value, by_key
from trainables.metrics.known import OF_SCORES, metric_named


def labelled(value: Any) -> Any:
    """Turns a list of choices into label -> value; reports print the label."""
    if isinstance(value, list):
        return {label_of(v): v for v in value}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    return value


def label_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


Label = Annotated[str, BeforeValidator(label_of)]


def _labels(value: Any) -> list[str]:
    return [label_of(label) for label in (value if isinstance(value, list) else [value])]


class _Axis(Value):
    when: dict[str, Annotated[tuple[str, ...], BeforeValidator(_labels)]] = {}


class Choice(_Axis):
    """One of several labelled values. Where the axis is not a path of the trial, each value maps paths to values."""

    choice: Annotated[dict[str, Any], BeforeValidator(labelled), Field(min_length=1)]

    def ends(self) -> tuple[Any, ...]:
        return tuple(self.choice)


class _Range(_Axis):
    log: bool = False

    @model_validator(mode="after")
    def _the_range_rises(self) -> Self:
        low, high = self.ends()
        if not low < high:
            raise ValueError(f"the range must rise; got [{low}, {high}]")
        if self.log and low <= 0:
            raise ValueError(f"a logarithmic range must lie above 0; got [{low}, {high}]")
        return self

    def ends(self) -> tuple[Any, ...]:
        raise NotImplementedError


class FloatRange(_Range):
    float_: tuple[float, float] = Field(alias="float")

    def ends(self) -> tuple[Any, ...]:
        return self.float_


class IntRange(_Range):
    int_: tuple[int, int] = Field(alias="int")
    step: PositiveInt = 1

    @model_validator(mode="after")
    def _equal_steps_are_not_logarithmic(self) -> Self:
        if self.log and self.step > 1:
            raise ValueError("log and step exclude each other; remove one of them, or list the values as a choice")
        return self

    def ends(self) -> tuple[Any, ...]:
        return self.int_


Axis = Annotated[
    Annotated[Choice, Tag("choice")] | Annotated[FloatRange, Tag("float")] | Annotated[IntRange, Tag("int")],
    by_key("choice", "float", "int"),
]


def _differ(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"names a data set twice: {', '.join(names)}")
    return names


# the data sets over which a number is a mean: one, several, or by default all of its phase
Task = str | Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_differ)]


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


class Confirm(Value):
    """Compares the winner of the search with an arm of the same student, on fresh seeds, on test."""

    against: Name
    seeds: int = Field(5, ge=2)


CostAxis = Literal["student_tokens", "flops", "device_seconds"]
AXIS_WORDS: Mapping[CostAxis, str] = {
    "student_tokens": "student tokens",
    "flops": "FLOPs",
    "device_seconds": "device time",
}


class Figure(Value):
    """A paper's effect in our units: an average over these tasks of GLUE, comparable with an average over the same tasks
    only. `glue`: the 8 tasks, or 9 with WNLI."""

    figure: float
    over: Annotated[tuple[GlueTask, ...], Field(min_length=1), AfterValidator(_differ)] | Literal["glue"]


Paper = Annotated[
    Annotated[str | float, Tag("words")] | Annotated[Figure, Tag("average")],
    Discriminator(lambda value: "average" if isinstance(value, Mapping | Figure) else "words"),
]


def _one_or_several(against: Any) -> Any:
    """Takes a list of one arm as the arm, so that wording makes no other kind of claim."""
    if not isinstance(against, list | tuple):
        return against
    if not against or len({*map(str, against)}) < len(against):
        raise ValueError(f"expected one or several arms, each once; got {list(against)}")
    return against[0] if len(against) == 1 else against


class Claim(Value):
    """A statement that the report judges: `arm` is better than `against` (each of them) by more than `margin`.

    A margin below 0 claims non-inferiority within it. With `within` a third verdict is possible: equivalent. `at: equal` compares each pair of seeds at the cheaper arm's total
    cost on `axis`: the dearer arm at its last evaluation within that cost. `less` claims in addition a lower cost on an
    axis, phases that both arms share left out.
    """

    says: str | None = None
    arm: Name
    against: Annotated[Name | tuple[Name, ...], BeforeValidator(_one_or_several)]
    phase: Name | None = None  # by default the objective's
    model: Name
    against_model: Name | None = None  # in `against`; by default the same
    metric: str
    task: Task | None = None
    split: Literal["test", "dev"] = "test"
    at: float | Literal["equal"] = 1.0  # of the phase's budget
    margin: float = 0.0  # a gain: positive where the arm is better
    within: Positive | None = None  # equivalent, where the difference is shown to be smaller than this either way
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
                "`at: equal` compares both arms at equal cost, so no cost can be `less`; give one of the two"
            )
        return self

    @model_validator(mode="after")
    def _what_may_be_equivalent_is_one_comparison(self) -> Claim:
        if self.within is not None and (self.num_parts > 1 or self.margin):
            raise ValueError("`within` is of one comparison: give a single `against`, and neither `less` nor `margin`")
        return self

    @property
    def rivals(self) -> tuple[str, ...]:
        return (self.against,) if isinstance(self.against, str) else self.against

    @property
    def num_parts(self) -> int:
        """How many comparisons decide the claim: of quality and, with `less`, of cost."""
        return len(self.rivals) * (2 if self.less else 1)

    @property
    def figure(self) -> float | None:
        """The paper's effect, where it is a number."""
        if isinstance(self.paper, Figure):
            return self.paper.figure
        return None if isinstance(self.paper, str) else self.paper

    @property
    def is_of_time(self) -> bool:
        """Whether the claim depends on measured times."""
        return "device_seconds" in (self.axis, self.less)

    def stated(self) -> str:
        """Returns the judged statement, which `says` may word otherwise."""
        others = " and ".join(self.rivals)
        text = f"{self.arm} is no worse than {others}" if self.margin < 0 else f"{self.arm} is better than {others}"
        text += f" by more than {abs(self.margin):g}" if self.margin else ""
        text += f" at equal {AXIS_WORDS[self.axis]}" if self.at == "equal" else ""
        text += f", with less {AXIS_WORDS[self.less]}" if self.less else ""
        return text + (f" (equivalent within ±{self.within:g})" if self.within else "")

    def judged(self) -> dict[str, Any]:
        """Returns all that decides the verdict: two claims that agree in it say the same."""
        return self.model_dump(exclude={"says", "paper", "family"})


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
    seeds: PositiveInt = 1
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
