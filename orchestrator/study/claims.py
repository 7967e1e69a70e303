"""Claims: statements that a study makes and a report judges, about two arms, or about a curve through several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from orchestrator.study.scaling_grid import Grid, grid_of
from trainables.config.data import GlueTask
from trainables.config.trial import TrialSpec
from trainables.config.value import Name, Positive, Value


def _differ(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"names one twice: {', '.join(names)}")
    return names


# the data sets over which a number is a mean: one, several, or by default all of its phase
Task = str | Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_differ)]


CostAxis = Literal["student_tokens", "flops", "device_seconds"]
AXIS_WORDS: Mapping[CostAxis, str] = {
    "student_tokens": "student tokens",
    "flops": "FLOPs",
    "device_seconds": "device time",
}


class Figure(Value):
    """A paper's effect in our units: an average over these tasks of GLUE, comparable with an average over the same tasks
    only. `glue`: the 8 tasks, or 9 with WNLI."""

    figure: float  # effect that the paper reports
    # the tasks over which the effect is a mean
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


class _Statement(Value):
    """What any claim says of the number that it is about."""

    says: str | None = None  # the claim in words, for the report
    model: Name  # the model that is compared
    metric: str  # e.g. mlm_loss, score, rougeL
    task: Task | None = None  # data sets over which the metric is a mean
    split: Literal["test", "dev"] = "test"  # that the metric is of
    family: str = "main"  # claims of one family share the error rate
    paper: Paper | None = None  # what the paper says

    @property
    def figure(self) -> float | None:
        """The paper's effect, where it is a number."""
        if isinstance(self.paper, Figure):
            return self.paper.figure
        return None if isinstance(self.paper, str) else self.paper

    def judged(self) -> dict[str, Any]:
        """Returns all that decides the verdict: two claims that agree in it say the same."""
        return self.model_dump(exclude={"says", "paper", "family"})


class Claim(_Statement):
    """A statement that the report judges: `arm` is better than `against` (each of them) by more than `margin`.

    A margin below 0 claims non-inferiority within it. With `within` a third verdict is possible: equivalent. `at: equal` compares each pair of seeds at the cheaper arm's total
    cost on `axis`: the dearer arm at its last evaluation within that cost. `less` claims in addition a lower cost on an
    axis, phases that both arms share left out.
    """

    arm: Name
    against: Annotated[
        Name | tuple[Name, ...], BeforeValidator(_one_or_several, json_schema_input_type=Name | list[Name])
    ]
    phase: Name | None = None  # by default the objective's
    against_model: Name | None = None  # in `against`; by default the same
    at: float | Literal["equal"] = 1.0  # of the phase's budget
    margin: float = 0.0  # a gain: positive where the arm is better
    within: Positive | None = None  # equivalent, where the difference is shown to be smaller than this either way
    axis: CostAxis = "student_tokens"  # the cost that `at: equal` makes equal
    less: CostAxis | None = None  # a cost that must be lower, too

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
    def arms(self) -> tuple[str, ...]:
        return (self.arm, *self.rivals)

    @property
    def num_parts(self) -> int:
        """How many comparisons decide the claim: of quality and, with `less`, of cost."""
        return len(self.rivals) * (2 if self.less else 1)

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


class _OfScaling(_Statement):
    """A claim about a curve through arms of several sizes, budgets and teachers, measured at the end of each of `phases`.

    What other code asks of two arms, no such claim has.
    """

    NUM_COEFFICIENTS: ClassVar[int]
    arm: ClassVar[str] = ""
    rivals: ClassVar[tuple[str, ...]] = ()
    at: ClassVar[float] = 1.0
    margin: ClassVar[float] = 0.0
    within: ClassVar[float | None] = None
    axis: ClassVar[CostAxis] = "student_tokens"
    less: ClassVar[CostAxis | None] = None
    against_model: ClassVar[str | None] = None
    is_of_time: ClassVar[bool] = False

    phases: Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_differ)]
    arms: Annotated[tuple[Name, ...], AfterValidator(_differ)] = ()  # by default all

    @property
    def phase(self) -> str:
        """The phase with the largest budget."""
        return self.phases[-1]


class Crossing(_OfScaling):
    """Where, along r or compute, the gain from a teacher falls through 0: below a bound, or above it.

    r: the teacher's loss over that of the student alone, of equal size and budget. `compute`: FLOPs of the student alone.
    """

    NUM_COEFFICIENTS = 4

    crossing: Literal["r", "compute"]  # along which the gain falls through 0
    below: Positive | None = None  # the crossing is claimed to lie below this
    above: Positive | None = None  # the crossing is claimed to lie above this

    @model_validator(mode="after")
    def _has_one_bound(self) -> Crossing:
        if (self.below is None) == (self.above is None):
            raise ValueError("expected one bound, `below` or `above`")
        return self

    @property
    def bound(self) -> float:
        return self.below or self.above or 0.0

    @property
    def num_parts(self) -> int:
        return 1

    def stated(self) -> str:
        what = "r (its loss over the student's alone)" if self.crossing == "r" else "compute (FLOPs of the student)"
        side = "below" if self.below else "above"
        return f"a teacher's help turns into harm at {what} {side} {self.bound:g}"

    def grid(self, specs: Mapping[str, TrialSpec]) -> Grid:
        """Returns what the claim reads. Raises ValueError where that is too little for its curve."""
        found = grid_of(specs, self.phases, self.model)
        found.check(len(found.alone_of), self.NUM_COEFFICIENTS, "of a student with a teacher")
        return found


class HeldOut(Value):
    hold_out: Name = "largest"  # an arm, or that of the largest model


class Foretelling(_OfScaling):
    """A law of size and budget, fitted without one arm, foretells each of that arm's losses within a relative error."""

    NUM_COEFFICIENTS = 5

    foretells: HeldOut  # the losses that the other arms predict
    error_below: float = Field(gt=0, lt=1)  # the relative error of the prediction

    @property
    def num_parts(self) -> int:
        return len(self.phases)

    def stated(self) -> str:
        of = "the largest" if self.foretells.hold_out == "largest" else self.foretells.hold_out
        return f"the other sizes foretell the losses of {of} within {100 * self.error_below:g} %"

    def grid(self, specs: Mapping[str, TrialSpec]) -> Grid:
        """Returns what the claim reads. Raises ValueError where that is too little for its law."""
        found, held_out = grid_of(specs, self.phases, self.model), self.foretells.hold_out
        if held_out not in ("largest", *found.alone):
            raise ValueError(
                f"hold_out {held_out!r} is no arm without a teacher; expected largest, {', '.join(found.alone)}"
            )
        found.check(len(found.alone) - 1, self.NUM_COEFFICIENTS, "of other sizes, without a teacher,")
        return found


def _kind_of(claim: Any) -> str:
    """Tells a claim's kind by the key that only this kind has."""
    named = claim if isinstance(claim, Mapping) else type(claim).model_fields if isinstance(claim, Value) else ()
    return next((key for key in ("crossing", "foretells") if key in named), "arm")


AnyClaim = Annotated[
    Annotated[Claim, Tag("arm")] | Annotated[Crossing, Tag("crossing")] | Annotated[Foretelling, Tag("foretells")],
    Discriminator(_kind_of),
]
