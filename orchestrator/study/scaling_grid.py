"""What a claim about scaling reads of each arm: the phases that trained the student, its teacher, and its baseline."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from trainables.config.phase_run import PhaseRun, Start
from trainables.config.trial import TrialSpec

POINTS_PER_COEFFICIENT = 3


@dataclass(frozen=True)
class Grid:
    """The arms of one claim. A configuration is an arm at the end of one of the phases."""

    # arm -> phase -> what trained the student up to the end of the phase, the first first
    trained: Mapping[str, Mapping[str, tuple[Start, ...]]]
    alone_of: Mapping[str, str]  # an arm with a teacher -> the arm that trains the same student without
    teacher: Mapping[str, tuple[str, Start]]  # an arm with a teacher -> the teacher, and where it was trained

    @property
    def alone(self) -> tuple[str, ...]:
        """The arms without a teacher."""
        return tuple(arm for arm in self.trained if arm not in self.teacher)

    def check(self, num_arms: int, num_coefficients: int, what: str) -> None:
        """Raises ValueError where these arms have fewer configurations than the coefficients of a curve need."""
        num_phases = len(next(iter(self.trained.values()), ()))
        least, num = POINTS_PER_COEFFICIENT * num_coefficients, num_arms * num_phases
        if num < least:
            raise ValueError(
                f"{num_coefficients} coefficients need {least} configurations {what} or more; "
                f"{num_arms} arms x {num_phases} phases are {num}"
            )


def grid_of(specs: Mapping[str, TrialSpec], phases: Sequence[str], model: str) -> Grid:
    """Reads the pruned trials of a claim's arms. Raises ValueError naming the arm that is at fault."""
    trained, teacher, students = dict[str, dict[str, tuple[Start, ...]]](), dict[str, tuple[str, Start]](), {}
    for arm, spec in specs.items():
        if lacking := [p for p in phases if p not in spec.phases or model not in spec.phases[p].train]:
            raise ValueError(f"arm {arm!r} does not train {model!r} in phase {lacking[0]!r}; name the `arms` that do")
        trained[arm] = {phase: _history(spec, phase, model) for phase in phases}
        if found := _teacher_of(arm, spec, {s.run.phase for starts in trained[arm].values() for s in starts}, model):
            teacher[arm] = found
        students[arm] = (
            spec.models[model].model_dump(exclude={"init"}),
            [(s.fraction, spec.phases[s.run.phase].budget) for starts in trained[arm].values() for s in starts],
        )
    alone_of = dict[str, str]()
    for arm in teacher:
        alike = [other for other in specs if other not in teacher and students[other] == students[arm]]
        if not alike:
            raise ValueError(f"arm {arm!r}: no arm trains the same student for the same budgets without a teacher")
        alone_of[arm] = alike[0]
    return Grid(trained, alone_of, teacher)


def _history(spec: TrialSpec, phase: str, model: str) -> tuple[Start, ...]:
    starts, origin = [Start(PhaseRun(phase))], spec.origin(phase, model)
    while origin is not None:
        starts.insert(0, Start.parse(origin))
        origin = spec.origin(starts[0].run.phase, model)
    return tuple(starts)


def _teacher_of(arm: str, spec: TrialSpec, phases: Collection[str], model: str) -> tuple[str, Start] | None:
    """Returns the one model that teaches the student in these phases, and where it was trained; None without any."""
    sources = {
        (term.source, spec.origin(phase, term.source))
        for phase in phases
        for term in spec.phases[phase].terms.values()
        if term.target == model and term.source is not None
    }
    if len(sources) > 1:
        raise ValueError(f"arm {arm!r} has several teachers; expected one")
    for source, origin in sources:
        if origin is None or any(source in spec.phases[phase].train for phase in phases):
            raise ValueError(f"arm {arm!r}: expected a teacher that an earlier phase trains, so that its loss is known")
        return source, Start.parse(origin)
    return None
