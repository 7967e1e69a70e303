"""What runs next. Slots here run nothing: they write the files of an attempt, with losses made by a rule."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.analysis.curves import best_first, point_scores
from orchestrator.analysis.tables import tables
from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.search_stage import MIN_AUDITED, SearchStage
from orchestrator.scheduling.trials import CONFIRM_SEED, SEARCH_SEED, Fingerprints, PlannedTrial
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from tests.support.trials import distillation
from trainables.config.phase_run import PhaseRun
from trainables.config.value import digest
from trainables.runtime.outcome import STOPPED_EARLY, Outcome, Status
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore, StoredPhase
from trainables.training.stop_signals import StopReason

SOFT = "phases.distil.terms.teacher_to_student.weight"
LR = "phases.distil.optimizer.lr"
HARD = "phases.teach.optimizer.lr"
Prepared = tuple[Path, dict[str, str], dict[str, Any]]


def lr_of(planned: PlannedTrial) -> float:
    return planned.spec.phases["distil"].optimizer_of("student").lr


def by_hash(planned: PlannedTrial) -> float:
    """A loss that depends on the trial alone."""
    return 3 + int(digest(planned.id, 8), 16) / 16**8


@dataclass
class World:
    """A machine with so many slots. `loss` gives the dev loss of a trial, None where it diverges, "stop" where the
    scheduler ends it half-way."""

    root: Path
    fingerprints: Fingerprints
    slots: int = 2
    loss: Callable[[PlannedTrial], Any] = by_hash
    test: Callable[[PlannedTrial], float] = by_hash
    flops: Callable[[PlannedTrial], float] = lambda _: 10.0  # of each phase
    order: random.Random | None = None  # which of the running trials ends next; by default the first
    started: list[PlannedTrial] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    trained: Counter[str] = field(default_factory=Counter)  # by phase key
    busy: dict[str, set[str]] = field(default_factory=dict)  # trial -> phases that it is training
    scheduler: Scheduler = field(init=False)
    clock: int = 0
    is_last: bool = False  # the scheduler said that nothing follows

    def open(self, study: Study, **options: Any) -> World:
        """A driver starts; whatever one before it had in memory is gone."""
        self.busy.clear()
        self.is_last = False
        self.scheduler = Scheduler(study, self.fingerprints, Storage(str(self.root)), **options)
        self.scheduler.known()  # as the printed plan asks
        return self

    @property
    def ledger(self) -> Ledger:
        return self.scheduler.ledger

    @property
    def search(self) -> SearchStage:
        assert self.scheduler.search is not None
        return self.scheduler.search

    @property
    def store(self) -> PhaseStore:
        return PhaseStore(Storage(str(self.root)))

    def fill(self) -> None:
        while len(self.ledger.running) < self.slots and (planned := self.scheduler.next()) is not None:
            self.clock += 1
            assert planned.id not in self.ledger.running
            assert not self.is_last, "slots were released too early"
            self.scheduler.start(planned, self.clock)
            self.started.append(planned)
            lacking = {key for key in planned.keys.values() if self.store.find(key) is None}
            shared = {key for other in self.busy.values() for key in other} & lacking
            assert not shared, f"{planned.kind} {planned.point} trains a phase that another trial is training"
            self.busy[planned.id] = lacking
        if self.ledger.running and self.scheduler.nothing_follows():
            self.is_last = True

    def finish(self, planned: PlannedTrial) -> None:
        """What trainables.runtime.trial_attempt and the driver leave behind."""
        self.clock += 1
        home = Storage(str(self.root)).sub(self.scheduler.study.folder)
        found = self.loss(planned)
        stopped = found == "stop" and planned.kind == "trial" and planned.arm is None and planned.id not in self.ledger.reopened  # fmt: skip
        diverged, value = found is None, by_hash(planned) if found in ("stop", None) else found
        attempts = len([name for name in home.list(f"trials/{planned.id}") if name.startswith("attempt-")]) + 1
        records, phases = [], {}
        for instance, key in planned.keys.items():
            phase = PhaseRun.parse(instance).phase
            if diverged and phase == planned.spec.order()[-1]:
                continue
            for progress in (0.5,) if stopped and phase == "distil" else (0.5, 1.0):
                for model in planned.spec.phases[phase].train:
                    for split, loss in (("dev", value), ("test", self.test(planned))):
                        records.append(
                            {"phase": phase, "model": model, "task": "corpus", "split": split, "metric": "mlm_loss",
                             "step": int(8 * progress), "progress": progress, "tokens": 9, "seconds": 1.0, "device_seconds": 1.0,
                             "flops": 5.0, "t": self.clock, "value": loss + 1 - progress}
                        )  # fmt: skip
            if self.store.find(key) is None and not (stopped and phase == "distil"):
                cost = {"steps": 8, "tokens": 9, "seconds": 2.0, "device_seconds": 2.0, "flops": 10.0}
                self.store.publish(StoredPhase(key, {}, {}, (), cost, {"trial": planned.id}))
                self.trained[key] += 1
            phases[instance] = {"key": key, "reused": False, "flops": self.flops(planned), "seconds": 2.0, "device_seconds": 2.0, "tokens": 9}  # fmt: skip
        text = "".join(json.dumps(record) + "\n" for record in records)
        home.write(f"trials/{planned.id}/attempt-{attempts}/records.jsonl", text.encode())
        end = Outcome(Status.ENDED, attempts=attempts, node="here", phases=phases, peak_memory=1.0)
        if stopped:
            end = STOPPED_EARLY
        elif diverged:
            end = replace(end, status=Status.FAILED, reason="diverged: nan", phases={})
        self.scheduler.end(planned.id, end, self.clock)
        self.busy.pop(planned.id)
        self.ended.append(planned.id)

    def step(self) -> bool:
        """Starts what can start, and lets one trial end."""
        self.fill()
        running = list(self.ledger.running.values())
        if not running:
            return False
        self.finish(self.order.choice(running) if self.order else running[0])
        return True

    def run(self, steps: int | None = None) -> World:
        while (steps is None or steps > 0) and self.step():
            steps = None if steps is None else steps - 1
            assert len(self.started) < 500
        return self

    def rows(self, *, planned: bool | None = True, kind: str | None = None) -> list[dict[str, Any]]:
        return [
            row
            for row in self.ledger.all_rows()
            if planned in (None, row["planned"]) and (kind is None or row["kind"] == kind)
        ]

    def outcome(self) -> dict[str, Any]:
        """All that a table says, but for times."""
        return {
            row["trial"]: (row["kind"], row["point"], row["arm"], row["seed"], row["status"], row["planned"], json.dumps(row["params"]))
            for row in self.ledger.all_rows()
        }  # fmt: skip


@pytest.fixture
def make(prepared: Prepared, tmp_path: Path) -> Callable[..., Study]:
    """A study over the shared corpus; None takes a key away."""
    raw = {
        "question": "?",
        "trial": {"data": {"corpus": prepared[2]["corpus"]}, **distillation()},
        "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"},
        "arms": {"alone": {SOFT: 0}, "taught": {}, "strong": {SOFT: 4}},
        "seeds": 2,
        "vary": {LR: {"float": [1e-3, 1e-2], "log": True}},
        "search": {"sampler": "random", "points": 4},
        "confirm": {"against": "alone", "seeds": 2},
    }

    def make(changes: Mapping[str, Any] | None = None, **keys: Any) -> Study:
        value = copy.deepcopy(raw) | keys
        for path, part in (changes or {}).items():
            at: Any = value
            *parents, last = path.split("/")
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = part
        file = tmp_path / "study.yaml"
        file.write_text(json.dumps({key: part for key, part in value.items() if part is not None}))
        return load_study(file)

    return make


@pytest.fixture
def world(prepared: Prepared, tmp_path: Path) -> Callable[..., World]:
    numbers = iter(range(1000))
    return lambda **options: World(tmp_path / f"runs{next(numbers)}", Fingerprints(str(prepared[0])), **options)


def num_confirmed(w: World) -> int:
    return sum(row["arm"] is None for row in w.rows(kind="confirm"))


Make, NewWorld = Callable[..., Study], Callable[..., World]
SIZES = {"sizes": {"choice": {"one": {"models.student.layers": 1}, "two": {"models.student.layers": 2}}}}
TUNE = {"grid": {LR: [1e-3, 2e-3, 4e-3]}}


# ---------------------------------------------------------------------------------------------------------------- order


def test_arms_take_turns_seed_by_seed_in_a_drawn_order(make: Make, world: NewWorld) -> None:
    arms = {"alone": {SOFT: 0}, "taught": {}, "strong": {SOFT: 4}}
    orders = []
    for number in (0, 0, 1):
        w = (
            world(slots=1)
            .open(make(arms=arms, seeds=4, tune=None, search={"sampler": "tpe", "points": 1, "seed": number}))
            .run()
        )
        begun = [(p.seed, p.arm) for p in w.started if p.kind == "trial" and p.arm]
        assert [seed for seed, _ in begun] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        orders.append([[arm for seed, arm in begun if seed == own] for own in range(4)])
    assert orders[0] == orders[1] != orders[2] and len({tuple(order) for order in orders[0]}) > 1


def test_arms_come_before_points_and_points_before_the_confirmation(make: Make, world: NewWorld) -> None:
    w = world(slots=1).open(make(tune=TUNE, **{"objective": {**make().objective.model_dump(), "minus": "alone"}})).run()
    kinds = [("arm " if p.arm else "") + p.kind for p in w.started if p.kind != "teacher"]
    assert list(dict.fromkeys(kinds)) == ["arm tune", "arm trial", "trial", "confirm", "arm confirm"]
    assert Counter(kinds)["arm trial"] == 6 and Counter(kinds)["trial"] == 4
    assert Counter(kinds)["confirm"] == 2 and Counter(kinds)["arm confirm"] == 6
    assert [p.point for p in w.started if p.kind == "trial" and p.arm is None] == ["p000", "p001", "p002", "p003"]
    assert w.scheduler.is_complete() and w.scheduler.next() is None and w.scheduler.num_left() == 0


def test_each_trial_begins_once_and_all_end(make: Make, world: NewWorld) -> None:
    for slots in (1, 2, 5):
        w = world(slots=slots).open(make()).run()
        assert len(w.started) == len(set(w.ended)) == len(w.ended)
        assert {row["status"] for row in w.rows(planned=None)} == {"ended"}
        assert all(row["planned"] for row in w.rows(planned=None))


def test_seeds_are_disjoint_by_purpose(make: Make, world: NewWorld) -> None:
    w = world().open(make(tune=TUNE)).run()
    seeds = {kind: {row["seed"] for row in w.rows(kind=kind)} for kind in ("trial", "tune", "confirm")}
    points = {row["seed"] for row in w.rows(kind="trial") if row["arm"] is None}
    assert points == {SEARCH_SEED} and seeds["tune"] == {SEARCH_SEED, SEARCH_SEED + 1, SEARCH_SEED + 2}
    assert seeds["trial"] - points == {0, 1}
    assert seeds["confirm"] == {CONFIRM_SEED, CONFIRM_SEED + 1}


# ------------------------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("tune", [None, TUNE])
def test_a_shared_teacher_is_trained_once_and_before_those_that_share_it(
    make: Make, world: NewWorld, slots: int, tune: Any
) -> None:
    """World.fill refuses two at a time for one key."""
    w = world(slots=slots, order=random.Random(slots)).open(make(tune=tune)).run()
    assert set(w.trained.values()) == {1}
    teachers = [p for p in w.started if p.kind == "teacher"]
    shared = {p.keys["teach"] for p in w.started if p.arm in ("taught", "strong") and p.kind == "trial"}
    assert shared <= {p.keys["teach"] for p in teachers} and len(shared) == 2
    for teacher in teachers:
        users = [
            i for i, p in enumerate(w.started) if p.kind != "teacher" and p.keys.get("teach") == teacher.keys["teach"]
        ]
        assert w.started.index(teacher) < min(users)
    assert {p.point for p in teachers} == {"teach"} and all(p.arm is None for p in teachers)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_chain_of_shared_phases_runs_in_order(make: Make, world: NewWorld, slots: int) -> None:
    trial = copy.deepcopy(make().trial)
    trial["phases"] = {"before": copy.deepcopy(trial["phases"]["teach"]), **trial["phases"]}
    w = world(slots=slots).open(make(trial=trial, vary=None, search=None, confirm=None)).run()
    assert set(w.trained.values()) == {1}
    assert [(p.point, p.seed) for p in w.started if p.kind == "teacher"][:2] in (
        [("before", 0), ("teach", 0)],
        [("before", 0), ("before", 1)],
    )


def test_a_phase_that_no_other_trial_needs_belongs_to_its_trial(make: Make, world: NewWorld) -> None:
    w = world().open(make(arms={"alone": {SOFT: 0}, "taught": {}}, vary=None, search=None, confirm=None)).run()
    assert not [p for p in w.started if p.kind == "teacher"]
    assert set(w.trained.values()) == {1}


def test_a_phase_reached_by_a_continuous_parameter_belongs_to_its_trial(make: Make, world: NewWorld) -> None:
    w = world().open(make(vary={HARD: {"float": [1e-3, 1e-2]}}, arms={"alone": {SOFT: 0}})).run()
    points = [p for p in w.started if p.kind == "trial" and p.arm is None]
    assert len(points) == 4 and len({p.keys["teach"] for p in points}) == 4
    assert not [p for p in w.started if p.kind == "teacher"]


def test_a_teacher_that_failed_does_not_hold_up_the_rest(make: Make, world: NewWorld) -> None:
    w = world(loss=lambda p: None if p.kind == "teacher" else by_hash(p)).open(make()).run()
    assert {row["status"] for row in w.rows(kind="teacher")} == {"failed"}
    assert {row["status"] for row in w.rows() if row["kind"] != "teacher"} == {"ended"}


def test_points_are_not_all_asked_while_their_teacher_is_trained(make: Make, world: NewWorld) -> None:
    """A point that is asked early is asked without the results of running points."""
    study = make(arms={"alone": {SOFT: 0}}, seeds=1, search={"sampler": "tpe", "points": 12})
    w = world(slots=3).open(study)
    while not any(p.kind == "teacher" for p in w.started):
        assert w.step()
    w.fill()
    asked = [p for p in w.ledger.planned.values() if p.arm is None and p.kind == "trial"]
    assert len(asked) <= 2 * w.slots
    w.run()
    assert sum(p.arm is None and p.kind == "trial" for p in w.started) == 12


# --------------------------------------------------------------------------------------------------------------- tuning


def race(w: World, arm: str) -> list[float]:
    return sorted({lr_of(p) for p in w.started if p.kind == "tune" and p.arm == arm})


def close(found: list[float], wanted: list[float]) -> bool:
    return found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("best", "asked", "chosen"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3], 2e-3),
        (4.1e-3, [1e-3, 2e-3, 4e-3, 8e-3], 4e-3),
        (8.1e-3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 8e-3),
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 16e-3),  # at most two steps further
        (0.5e-3, [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3], 0.5e-3),
    ],
)
def test_a_winner_at_an_edge_extends_the_grid(
    make: Make, world: NewWorld, best: float, asked: list[float], chosen: float
) -> None:
    import math

    study = make(tune=TUNE, vary=None, search=None, confirm=None)
    w = world(loss=lambda p: abs(math.log(lr_of(p) / best)) if "distil" in p.keys else 1.0).open(study).run()
    for arm in ("alone", "taught", "strong"):
        assert close(race(w, arm), asked)
        tuned = w.scheduler.tuned(arm)
        assert tuned is not None and tuned[LR] == pytest.approx(chosen)
        assert {lr_of(p) for p in w.started if p.kind == "trial" and p.arm == arm} == {tuned[LR]}


def test_values_that_fail_do_not_win_and_do_not_stop_the_race(make: Make, world: NewWorld) -> None:
    study = make(tune={**TUNE, "extend": 0}, vary=None, search=None, confirm=None)
    w = world(
        loss=lambda p: None if p.kind == "tune" and lr_of(p) > 3e-3 else 1 / lr_of(p) if "distil" in p.keys else 1.0
    )
    w.open(study).run()
    assert w.scheduler.tuned("alone") == {LR: 2e-3}
    w = world(loss=lambda p: None if p.kind == "tune" else 1.0).open(study).run()
    assert w.scheduler.tuned("alone") == {LR: 2e-3}  # the middle; its own trials will tell
    assert w.scheduler.is_complete()


def test_mode_max_takes_the_highest(make: Make, world: NewWorld) -> None:
    study = make(
        tune={**TUNE, "extend": 0},
        objective={"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "max"},
    )
    w = world(loss=lambda p: lr_of(p) if "distil" in p.keys else 1.0).open(study).run()
    assert w.scheduler.tuned("taught") == {LR: 4e-3}
    winner = w.search.winner()
    assert winner and winner.params[LR] == max(p.params[LR] for p in w.search.points)


def test_an_arm_that_sets_the_tuned_path_itself_runs_one_tuning_trial(make: Make, world: NewWorld) -> None:
    study = make(arms={"alone": {SOFT: 0}, "fast": {LR: 9e-3}}, tune=TUNE, vary=None, search=None, confirm=None)
    w = world().open(study).run()
    assert race(w, "fast") == [9e-3] and sum(p.kind == "tune" and p.arm == "fast" for p in w.started) == 1
    assert {lr_of(p) for p in w.started if p.arm == "fast"} == {9e-3}
    assert w.scheduler.is_complete()


def noisy(planned: PlannedTrial) -> float:
    """By the trial alone: 2e-3 is best, 4e-3 costs a little less than noise, and 1e-3 much more."""
    gap = {1e-3: 1.0, 2e-3: 0.0, 4e-3: 0.002}.get(lr_of(planned), 0.0) if "distil" in planned.keys else 0.0
    return 3 + gap + 0.02 * by_hash(planned)


def seeds_of(w: World, arm: str) -> dict[float, list[int]]:
    """The seeds of tuning by value, each beside the first."""
    found: dict[float, list[int]] = {}
    for p in w.started:
        if p.kind == "tune" and p.arm == arm:
            found.setdefault(lr_of(p), []).append(p.seed - SEARCH_SEED)
    return {value: sorted(seeds) for value, seeds in sorted(found.items())}


def test_what_is_clearly_worse_runs_no_further_and_the_best_mean_is_taken(make: Make, world: NewWorld) -> None:
    study = make(tune={**TUNE, "seeds": 5, "extend": 0}, vary=None, search=None, confirm=None)
    w = world(loss=noisy).open(study).run()
    for arm in study.arms:
        seeds = seeds_of(w, arm)
        assert seeds[1e-3] == [0, 1]
        whole = {value: of for value, of in seeds.items() if len(of) == max(map(len, seeds.values()))}
        losses: dict[float, list[float]] = {}
        for p in w.started:
            if p.kind == "tune" and p.arm == arm:
                losses.setdefault(lr_of(p), []).append(noisy(p))
        best = min(whole, key=lambda value: sum(losses[value]) / len(losses[value]))
        assert w.scheduler.tuned(arm) == {LR: best}
    assert max(p.seed for p in w.started if p.kind == "tune") > SEARCH_SEED + 1


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_race_ends_alike_whatever_ends_first_and_wherever_the_driver_dies(
    make: Make, world: NewWorld, seeds: int
) -> None:
    study = make(
        tune={**TUNE, "seeds": seeds}, vary=None, search=None, confirm=None, arms={"alone": {SOFT: 0}, "taught": {}}
    )
    whole = world(slots=1).open(study).run()
    for number in range(3):
        w = world(slots=3, order=random.Random(number)).open(study).run(5 * number)
        assert w.open(study).run().outcome() == whole.outcome()


def test_a_storage_of_one_tuning_seed_runs_the_others_alone(make: Make, world: NewWorld) -> None:
    keys: dict[str, Any] = {"vary": None, "search": None, "confirm": None}
    w = world(loss=noisy).open(make(tune={**TUNE, "seeds": 1, "extend": 0}, **keys)).run()
    begun = edited(w, make(tune={**TUNE, "extend": 0}, **keys))
    assert {p.seed for p in begun if p.kind == "tune"} == {SEARCH_SEED + 1, SEARCH_SEED + 2}


def test_a_value_that_fails_at_one_seed_does_not_win(make: Make, world: NewWorld) -> None:
    study = make(tune={**TUNE, "extend": 0}, vary=None, search=None, confirm=None)
    fails = lambda p: None if lr_of(p) == 2e-3 and p.seed == SEARCH_SEED + 1 else noisy(p)  # noqa: E731
    w = world(loss=lambda p: fails(p) if p.kind == "tune" else 3.0).open(study).run()
    assert w.scheduler.tuned("alone") == {LR: 4e-3} and w.scheduler.is_complete()


# ----------------------------------------------------------------------------------------------- scores and baselines


def searched(make: Make, minus: bool = True, **keys: Any) -> Study:
    objective = {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"}
    return make(**{"objective": objective | ({"minus": "alone"} if minus else {}), **keys})


@pytest.mark.parametrize("tune", [None, TUNE])
def test_a_score_is_the_difference_to_the_best_baseline_of_the_same_sizes(make: Make, world: NewWorld, tune: Any) -> None:  # fmt: skip
    study = searched(
        make, vary={**SIZES, SOFT: {"choice": [1, 2, 4]}}, tune=tune, search={"sampler": "tpe", "points": 6}
    )
    w = world().open(study).run()
    points = w.search.points
    assert len(points) == 6
    first = min(i for i, p in enumerate(w.started) if p.arm is None and p.kind == "trial")
    for size in ("one", "two"):
        of_size = [p for p in w.started if p.kind == "tune" and p.arm == "alone" and p.params.get("sizes") == size]
        assert len({p.id for p in of_size}) >= (3 if tune else 1)
        assert max(w.started.index(p) for p in of_size) < first
        best = min(by_hash(p) for p in of_size if p.seed == SEARCH_SEED)
        for point in points:
            if point.params["sizes"] == size:
                assert w.search.score(point) == pytest.approx(by_hash(point.trial) - best)
    winner = w.search.winner()
    assert winner is not None and w.search.score(winner) == min(w.search.score(p) for p in points)  # type: ignore[type-var]


def test_minus_without_sizes_and_without_tuning_still_has_its_baseline(make: Make, world: NewWorld) -> None:
    w = world().open(searched(make, tune=None)).run()
    baseline = [row for row in w.rows() if row["arm"] == "alone" and row["seed"] == SEARCH_SEED]
    assert len(baseline) == 1
    winner = w.search.winner()
    assert winner is not None
    value = w.ledger.value(baseline[0]["trial"])
    assert value is not None and w.search.score(winner) == pytest.approx(by_hash(winner.trial) - value)
    assert num_confirmed(w) == 2


def test_the_confirmation_takes_the_winner_and_the_tuned_baseline_of_its_sizes(make: Make, world: NewWorld) -> None:
    study = searched(
        make, vary={**SIZES, SOFT: {"choice": [1, 2, 4]}}, tune=TUNE, search={"sampler": "random", "points": 6}
    )
    w = world().open(study).run()
    winner = w.search.winner()
    assert winner is not None
    confirming = [p for p in w.started if p.kind == "confirm"]
    ours, theirs = [p for p in confirming if p.arm is None], [p for p in confirming if p.point == "alone"]
    assert [p.seed for p in ours] == [p.seed for p in theirs] == [CONFIRM_SEED, CONFIRM_SEED + 1]
    layers = {"one": 1, "two": 2}[winner.params["sizes"]]
    assert {p.spec.models["student"].layers for p in confirming} == {layers}
    assert {p.point for p in ours} == {winner.name} and {p.point for p in theirs} == {"alone"}
    tuned = w.scheduler.tuned("alone", {"sizes": winner.params["sizes"]})
    assert tuned is not None and {lr_of(p) for p in theirs} == {tuned[LR]}
    assert {lr_of(p) for p in ours} == {lr_of(winner.trial)}
    assert winner.trial.id not in {p.id for p in confirming}


def test_the_baseline_takes_over_the_winners_rate_and_runs_at_its_cost(make: Make, world: NewWorld) -> None:
    """Without a teacher 10 FLOPs, with it 20: at equal cost twice the steps."""
    study = searched(make, tune=TUNE, vary={LR: {"choice": [1e-3, 6e-3]}, SOFT: {"choice": [1, 2]}},
                     search={"sampler": "grid", "points": 4})  # fmt: skip
    best_rate = lambda p: by_hash(p) - (lr_of(p) == 6e-3 and p.arm is None)  # noqa: E731
    w = world(loss=lambda p: best_rate(p) if "distil" in p.keys else 1.0).open(study).run()
    winner = w.search.winner()
    assert winner is not None and lr_of(winner.trial) == 6e-3
    confirming: dict[str, list[PlannedTrial]] = {}
    for p in w.started:
        if p.kind == "confirm":
            confirming.setdefault(p.point, []).append(p)
    tuned = w.scheduler.tuned("alone")
    assert tuned is not None and tuned[LR] != 6e-3
    assert list(confirming) == [
        winner.name,
        "alone",
        f"alone at settings of {winner.name}",
        f"alone at cost of {winner.name}",
    ]
    assert {tuple(p.seed for p in of) for of in confirming.values()} == {(CONFIRM_SEED, CONFIRM_SEED + 1)}
    as_tuned, as_winner, at_cost = ([*of] for of in list(confirming.values())[1:])
    assert {lr_of(p) for p in as_tuned} == {tuned[LR]} and {lr_of(p) for p in as_winner} == {6e-3}
    mean = lambda of: sum(map(best_rate, of))  # noqa: E731
    better = min((as_winner, as_tuned), key=mean)
    for short, longer in zip(better, at_cost, strict=True):
        before, after = (p.spec.phases["distil"].budget.model_dump() for p in (short, longer))
        assert after == {"steps": 2 * before["steps"]}
        assert longer.spec.phases["distil"].model_copy(update={"budget": None}) == short.spec.phases[
            "distil"
        ].model_copy(update={"budget": None})
        assert longer.arm == "alone" and longer.params["phases.distil.budget.steps"] == after["steps"]
    assert w.scheduler.is_complete() and w.scheduler.num_left() == 0


def test_a_winner_that_costs_no_more_is_compared_at_equal_steps_alone(make: Make, world: NewWorld) -> None:
    w = world().open(make(confirm={"against": "taught", "seeds": 2}, search={"sampler": "random", "points": 2})).run()
    assert not [row for row in w.rows(kind="confirm") if "at cost" in row["point"]]
    assert w.scheduler.is_complete() and w.scheduler.num_left() == 0


def test_a_baseline_that_cannot_take_over_the_winners_settings_is_refused(make: Make) -> None:
    hard = "phases.distil.terms.student_hard.weight"
    vary = {hard: {"choice": [0, 1]}}
    with pytest.raises(
        StudyError, match=rf"confirm.against at the winner's settings, here {hard} '0'.*nothing is learnt"
    ):
        make(vary=vary)
    assert make(vary=vary, arms={"alone": {SOFT: 0, hard: 1}, "taught": {}}).taken_over("alone") == ()


def test_a_failed_baseline_leaves_no_winner_but_ends(make: Make, world: NewWorld) -> None:
    w = world(loss=lambda p: None if p.kind == "tune" else by_hash(p)).open(searched(make)).run()
    assert w.search.winner() is None and w.scheduler.is_complete()
    assert not w.rows(kind="confirm")


def test_a_failed_point_is_no_winner(make: Make, world: NewWorld) -> None:
    w = (
        world(loss=lambda p: None if p.point == "p001" else 9.0 if p.arm else 5.0 - (p.point == "p002"))
        .open(make())
        .run()
    )
    winner = w.search.winner()
    assert winner is not None and winner.name == "p002"
    assert Counter(row["status"] for row in w.rows(kind="trial"))["failed"] == 1


# --------------------------------------------------------------------------------------------------- several objectives

DECAY = "phases.distil.optimizer.weight_decay"
BASE = {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"}
TRADE = {LR: {"float": [1e-3, 1e-2]}, DECAY: {"float": [0, 1]}}


def place_of(planned: PlannedTrial) -> tuple[float, float]:
    """Where a trial is on the front, from 0 (cheap) to 1 (good), and how far it lies behind the front."""
    if planned.kind == "teacher":
        return 0.0, 0.0
    optimizer = planned.spec.phases["distil"].optimizer_of("student")
    return (optimizer.lr - 1e-3) / 9e-3, optimizer.weight_decay


def traded(world: NewWorld) -> World:
    """The more FLOPs, the less loss; weight decay costs both."""
    return world(
        slots=1,
        loss=lambda p: 3 + (1 - place_of(p)[0]) ** 2 + place_of(p)[1],
        flops=lambda p: 50 * place_of(p)[0] ** 2 + 50 * place_of(p)[1],
    )


def trade_study(make: Make, points: int, **search: Any) -> Study:
    return make(
        objective=[BASE, {"metric": "flops", "mode": "min"}], vary=TRADE, arms={"alone": {SOFT: 0}}, seeds=1,
        search={"sampler": "tpe", "points": points, **search},
    )  # fmt: skip


def test_a_search_of_two_objectives_finds_both_ends_of_a_known_front(make: Make, world: NewWorld) -> None:
    w = traded(world).open(trade_study(make, 30)).run()
    places = [place_of(point.trial) for point in w.search.points]
    assert any(along < 0.2 and behind < 0.25 for along, behind in places)
    assert any(along > 0.8 and behind < 0.25 for along, behind in places)
    late = [behind for _, behind in places[15:]]
    assert sum(late) / len(late) < 0.4
    for point in w.search.points:
        scores = w.search.scores(point)
        assert scores is not None and scores.values[0] == w.search.score(point)
        assert scores.values[1] == pytest.approx(2 * w.flops(point.trial))  # the teacher's phase, too
    winner = w.search.winner()
    assert winner is not None and w.search.score(winner) == min(w.search.score(p) for p in w.search.points)  # type: ignore[type-var]
    assert [w.search.importance(), w.search.importance(1)].count(None) == 0


def test_points_within_a_constraint_come_first_and_one_of_them_wins(make: Make, world: NewWorld) -> None:
    study = trade_study(make, 24, constraints=[{"metric": "flops", "at_most": 30}])
    w = traded(world).open(study).run()
    frame = point_scores(study, tables(study.folder, w.ledger.all_rows(), w.ledger.records, lambda _: None))
    for row in frame.to_dict("records"):  # as the report reads the tables
        scores = w.search.scores(w.search.points[int(row["point"][1:])])
        assert scores is not None and scores.is_feasible == row["feasible"]
        assert scores.values == pytest.approx((row["score"], row["score_1"]))
    assert len(frame) == 24 and best_first(study, frame)["point"].iloc[0] == w.search.winner().name  # type: ignore[union-attr]
    spent = {point.name: 2 * w.flops(point.trial) for point in w.search.points}
    winner = w.search.winner()
    assert winner is not None and spent[winner.name] <= 30 < max(spent.values())
    within = [point for point in w.search.points if spent[point.name] <= 30]
    assert w.search.score(winner) == min(w.search.score(point) for point in within)  # type: ignore[type-var]
    assert len(within) > 6 and sum(spent[f"p{i:03d}"] <= 30 for i in range(12, 24)) >= 6
    confirmed = {row["point"] for row in w.rows(kind="confirm")}
    assert {winner.name, "alone"} <= confirmed and all(winner.name in point or point == "alone" for point in confirmed)
    none = traded(world).open(trade_study(make, 6, constraints=[{"metric": "flops", "at_most": -1}])).run()
    assert none.search.winner() is None and none.scheduler.is_complete() and not none.rows(kind="confirm")


def test_a_restart_asks_the_same_with_several_objectives(make: Make, world: NewWorld) -> None:
    study = trade_study(make, 14, constraints=[{"metric": "flops", "at_most": 60}])
    whole = traded(world).open(study).run()
    for steps in (5, 12):
        w = traded(world).open(study).run(steps)
        assert w.open(study).run().outcome() == whole.outcome()


def test_each_objective_is_the_difference_to_the_same_trial_of_the_baseline(make: Make, world: NewWorld) -> None:
    objectives = [{**BASE, "minus": "alone"}, {"metric": "flops", "mode": "min", "minus": "alone"}]
    study = make(objective=objectives, tune=TUNE, arms={"alone": {SOFT: 0}}, seeds=1, search={"points": 4})
    w = world(flops=lambda p: 0.0 if p.kind == "teacher" else 1e4 * lr_of(p)).open(study).run()
    tuned = w.scheduler.tuned("alone")
    assert tuned is not None
    tries = [p for p in w.started if p.kind == "tune" and p.arm == "alone" and p.seed == SEARCH_SEED]
    best = min(tries, key=by_hash)
    for point in w.search.points:
        scores = w.search.scores(point)
        assert scores is not None
        mine, theirs = (1e4 * lr_of(p) * len(p.keys) for p in (point.trial, best))
        assert scores.values == pytest.approx((by_hash(point.trial) - by_hash(best), mine - theirs))


# ------------------------------------------------------------------------------------------------------ used-up spaces


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_used_up_space_ends_the_search_and_nothing_is_asked_twice(
    make: Make, world: NewWorld, sampler: str, slots: int
) -> None:
    vary = {SOFT: {"choice": [1, 2]}, "phases.distil.batch": {"choice": [4, 8]}}
    study = make(vary=vary, search={"sampler": sampler, "points": 9}, exclude=[{SOFT: "2", "phases.distil.batch": "8"}])
    w = world(slots=slots).open(study).run()
    points = [
        (p.params[SOFT], p.params["phases.distil.batch"]) for p in w.started if p.kind == "trial" and p.arm is None
    ]
    assert sorted(points) == [("1", "4"), ("1", "8"), ("2", "4")]
    assert w.scheduler.is_complete() and num_confirmed(w) == 2
    again = world(slots=slots)
    again.root = w.root
    again.open(study)
    assert again.scheduler.next() is None and again.scheduler.is_complete()


def test_two_labels_that_mean_the_same_trial_are_one_point(make: Make, world: NewWorld) -> None:
    study = make(vary={SOFT: {"choice": {"off": 0, "none": {"kind": "linear", "start": 0, "end": 0}, "on": 1}}})
    w = world().open(study).run()
    assert len([p for p in w.started if p.kind == "trial" and p.arm is None]) == 2


# --------------------------------------------------------------------------------------------------------------- resume


STUDIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tuned": {"tune": {**TUNE, "extend": 1}},
    "sizes": {"vary": {**SIZES, SOFT: {"choice": [1, 2, 4]}}, "tune": TUNE, "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min", "minus": "alone"}},
    "grid": {"vary": {SOFT: {"choice": [1, 2, 3, 4]}}, "search": {"sampler": "grid", "points": 4}},
}  # fmt: skip


@pytest.mark.parametrize("name", list(STUDIES))
def test_the_driver_may_die_at_any_point(make: Make, world: NewWorld, name: str) -> None:
    """None lost, none doubled; what was running keeps its id and its point; the outcome is that of one run."""
    study = make(**STUDIES[name])
    whole = world().open(study).run()
    num = len(whole.ended)
    for steps in range(0, num, max(1, num // 12)):  # a dozen points; the next test dies at every one
        w = world().open(study).run(steps)
        w.fill()
        running = {trial: row["point"] for trial, row in ((r["trial"], r) for r in w.ledger.all_rows()) if row["status"] == "running"}  # fmt: skip
        ended = set(w.ended)
        w.started.clear()
        w.open(study).run()
        assert ended & {p.id for p in w.started} == set(), f"done again after {steps} steps"
        assert running.keys() <= {p.id for p in w.started}
        assert all(p.point == running[p.id] for p in w.started if p.id in running)
        assert len(w.ended) == len(set(w.ended))
        assert w.outcome() == whole.outcome(), f"after {steps} steps"
        assert w.trained == whole.trained


def test_the_driver_may_die_at_every_point(make: Make, world: NewWorld) -> None:
    study = make(**STUDIES["sizes"])
    whole, w = world().open(study).run(), world()
    while True:
        w.open(study)
        if not w.step():
            break
        w.fill()
    assert w.outcome() == whole.outcome() and len(w.ended) == len(set(w.ended))


def test_with_a_sampler_that_learns_no_point_is_lost_either(make: Make, world: NewWorld) -> None:
    """What was in flight is known to it as running, so later questions may differ; their number may not."""
    study = make(search={"sampler": "tpe", "points": 12}, arms={"alone": {SOFT: 0}}, seeds=1)
    for steps in range(0, 14, 3):
        w = world(slots=3).open(study).run(steps)
        w.fill()
        begun = {row["trial"]: row["point"] for row in w.ledger.all_rows()}
        w.open(study).run()
        rows = w.rows()
        assert {row["trial"]: row["point"] for row in rows if row["trial"] in begun} == begun
        points = sorted(row["point"] for row in rows if row["kind"] == "trial" and row["arm"] is None)
        assert points == [f"p{i:03d}" for i in range(12)]
        assert {row["status"] for row in rows} == {"ended"}


def test_a_half_written_end_counts_as_none(make: Make, world: NewWorld) -> None:
    study = make()
    w = world().open(study).run()
    trial = next(row["trial"] for row in w.rows() if row["arm"] == "taught")
    end = w.root / "study" / "trials" / trial / "end.json"
    end.write_text(end.read_text()[:40])
    before = w.outcome()
    w.started.clear()
    w.open(study).run()
    assert [p.id for p in w.started] == [trial] and w.outcome() == before


def test_a_complete_study_is_complete_when_opened_again(make: Make, world: NewWorld) -> None:
    for changes in STUDIES.values():
        study = make(**changes)
        w = world().open(study).run()
        before, w.started = w.outcome(), []
        w.open(study)
        assert w.scheduler.next() is None and w.scheduler.is_complete()
        assert w.outcome() == before, "the same rows, planned as before"


def test_a_running_trial_keeps_the_time_it_began(make: Make, world: NewWorld) -> None:
    study = make()
    w = world().open(study)
    w.fill()
    begun = {row["trial"]: row["started"] for row in w.rows()}
    w.clock = 1000
    w.open(study).run()
    assert all(row["started"] == begun[row["trial"]] for row in w.rows() if row["trial"] in begun)


# --------------------------------------------------------------------------------------------------------- edited files


def edited(w: World, study: Study) -> list[PlannedTrial]:
    """Runs an edited study over the same storage; returns what was begun."""
    w.started, w.ended = [], []
    w.open(study).run()
    assert w.scheduler.is_complete()
    return w.started


def test_more_seeds_run_only_what_is_new(make: Make, world: NewWorld) -> None:
    w = world().open(make()).run()
    rows = len(w.rows())
    begun = edited(w, make(seeds=4))
    assert {(p.arm, p.seed) for p in begun if p.kind == "trial"} == {(a, s) for a in ("alone", "taught", "strong") for s in (2, 3)}  # fmt: skip
    assert {p.kind for p in begun} == {"trial", "teacher"}
    assert len(w.rows()) == rows + 6 + 2
    assert not w.rows(planned=False)


def test_fewer_seeds_set_the_rest_aside(make: Make, world: NewWorld) -> None:
    w = world().open(make(seeds=3)).run()
    assert edited(w, make(seeds=2)) == []
    aside = [row for row in w.rows(planned=False) if row["kind"] == "trial"]
    assert {(row["arm"], row["seed"]) for row in aside} == {("alone", 2), ("taught", 2), ("strong", 2)}
    assert edited(w, make(seeds=3)) == [] and not w.rows(planned=False)


def test_a_new_arm_runs_alone(make: Make, world: NewWorld) -> None:
    w = world().open(make()).run()
    begun = edited(w, make(arms={"alone": {SOFT: 0}, "taught": {}, "strong": {SOFT: 4}, "mild": {SOFT: 0.5}}))
    assert {(p.kind, p.arm) for p in begun} == {("trial", "mild")}  # its teachers are there


def test_an_arm_of_another_name_is_the_same_trial(make: Make, world: NewWorld) -> None:
    w = world().open(make()).run()
    assert edited(w, make(arms={"alone": {SOFT: 0}, "guided": {}, "strong": {SOFT: 4}})) == []
    renamed = [row for row in w.rows() if row["kind"] == "trial" and row["arm"] == "guided"]
    assert {row["seed"] for row in renamed} == {0, 1}, "the table speaks of arms as the file does"


def test_a_changed_value_runs_what_depends_on_it(make: Make, world: NewWorld) -> None:
    w = world().open(make()).run()
    begun = edited(w, make(arms={"alone": {SOFT: 0}, "taught": {}, "strong": {SOFT: 3}}))
    assert {(p.kind, p.arm) for p in begun} == {("trial", "strong")}
    assert {row["arm"] for row in w.rows(planned=False) if row["kind"] == "trial"} == {"strong"}
    keys = set(w.trained)
    trial = copy.deepcopy(make().trial)
    trial["phases"]["teach"]["budget"] = {"steps": 9}
    begun = edited(w, make(trial=trial))
    assert "alone" not in {p.arm for p in begun if p.kind == "trial"}, "nothing that `alone` computes has changed"
    assert {p.arm for p in begun if p.kind == "trial"} >= {"taught", "strong", None}
    assert keys < set(w.trained) and set(w.trained.values()) == {1}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_narrower_range_keeps_the_points_inside_with_their_numbers(make: Make, world: NewWorld, sampler: str) -> None:
    search = {"sampler": sampler, "points": 6}
    w = world().open(make(search=search)).run()
    points = {p.name: p.params[LR] for p in w.search.points}
    middle = sorted(points.values())[3]
    narrow = make(search=search, vary={LR: {"float": [1e-3, middle], "log": True}})
    edited(w, narrow)
    now = {p.name: p.params[LR] for p in w.search.points}
    inside = {name: lr for name, lr in points.items() if lr <= middle}
    assert inside.items() <= now.items() and len(now) == 6
    assert all(lr <= middle for lr in now.values())
    assert not (set(now) - set(inside)) & set(points), "no number stands for two points"
    aside = {row["point"] for row in w.rows(planned=False) if row["kind"] == "trial"}
    assert aside == set(points) - set(inside)


def test_a_wider_range_keeps_all_points(make: Make, world: NewWorld) -> None:
    w = world().open(make()).run()
    before = {row["trial"] for row in w.rows() if row["kind"] == "trial"}
    begun = edited(w, make(vary={LR: {"float": [1e-4, 1e-1], "log": True}}))
    assert begun == []
    edited(w, make(vary={LR: {"float": [1e-4, 1e-1], "log": True}}, search={"sampler": "random", "points": 6}))
    points = [row for row in w.rows(kind="trial") if row["arm"] is None]
    assert sorted(row["point"] for row in points) == [f"p{i:03d}" for i in range(6)]
    assert before <= {row["trial"] for row in w.rows()}


@pytest.mark.parametrize("axis", [{"choice": [1e-3, 2e-3, 4e-3, 8e-3]}, {"choice": {"low": 1e-3, "high": 4e-3}}])
def test_a_range_may_become_a_choice_and_back(make: Make, world: NewWorld, axis: Any) -> None:
    study = make(search={"sampler": "random", "points": 2})
    w = world().open(study).run()
    edited(w, make(search={"sampler": "random", "points": 2}, vary={LR: axis}))
    assert len([row for row in w.rows(kind="trial") if row["arm"] is None]) == 2
    assert edited(w, study) == []


def test_a_range_of_whole_numbers_may_change_its_step(make: Make, world: NewWorld) -> None:
    batch = "phases.distil.batch"
    w = world().open(make(vary={batch: {"int": [2, 9]}}, search={"sampler": "random", "points": 6})).run()
    edited(w, make(vary={batch: {"int": [2, 8], "step": 2}}, search={"sampler": "tpe", "points": 4}))
    assert all(p.params[batch] % 2 == 0 for p in w.search.points)


def test_another_axis_sets_points_aside(make: Make, world: NewWorld) -> None:
    w = world().open(make()).run()
    edited(w, make(vary={LR: {"float": [1e-3, 1e-2], "log": True}, SOFT: {"choice": [1, 2]}}))
    points = [row for row in w.rows(kind="trial") if row["arm"] is None]
    assert len(points) == 4 and all(SOFT in row["params"] for row in points)
    names = [row["point"] for row in w.ledger.all_rows() if row["kind"] == "trial" and row["arm"] is None]
    assert len(names) == len(set(names)) == 8


def test_a_new_exclusion_sets_points_aside(make: Make, world: NewWorld) -> None:
    vary = {SOFT: {"choice": [1, 2, 3]}, "phases.distil.batch": {"choice": [4, 8]}}
    w = world().open(make(vary=vary, search={"sampler": "grid", "points": 6})).run()
    edited(w, make(vary=vary, search={"sampler": "grid", "points": 6}, exclude=[{SOFT: "1"}]))
    points = [row for row in w.rows(kind="trial") if row["arm"] is None]
    assert {row["params"][SOFT] for row in points} == {"2", "3"} and len(points) == 4


# -------------------------------------------------------------------------------------------------------- early stopping


ASHA = {"sampler": "random", "points": 12, "stop_early": {"kind": "asha"}}


def half_stopped(planned: PlannedTrial) -> Any:
    return "stop" if int(digest(planned.id, 8), 16) % 3 else by_hash(planned)


def test_stopped_points_are_in_no_score_and_the_spared_run_to_the_end(make: Make, world: NewWorld) -> None:
    w = world(loss=half_stopped).open(make(search=ASHA)).run()
    stopped = [trial for trial in dict.fromkeys(w.ended) if w.ended.count(trial) == 2]
    assert len(stopped) == MIN_AUDITED, "exactly so many go on"
    rows = {row["trial"]: row for row in w.rows(kind="trial") if row["arm"] is None}
    assert Counter(row["status"] for row in rows.values())["stopped"] >= 3
    assert {trial for trial, row in rows.items() if row.get("spared")} == set(stopped)
    assert {rows[trial]["status"] for trial in stopped} == {"ended"}
    for point in w.search.points:
        assert (w.search.score(point) is None) == (rows[point.trial.id]["status"] == "stopped")
    winner = w.search.winner()
    assert winner is not None and rows[winner.trial.id]["status"] == "ended"
    assert w.scheduler.is_complete() and num_confirmed(w) == 2
    confirming = min(i for i, p in enumerate(w.started) if p.kind == "confirm")
    last = max(i for i, p in enumerate(w.started) if p.kind == "trial")
    assert last < confirming, "the winner is known once the spared have ended"


def test_who_is_spared_is_drawn_and_not_chosen_by_score(make: Make, world: NewWorld) -> None:
    """The draw depends on the study's seed alone."""
    spared = []
    for loss in (half_stopped, lambda p: half_stopped(p) if half_stopped(p) == "stop" else 9 - by_hash(p)):
        w = world(loss=loss).open(make(search=ASHA)).run()
        spared.append({row["point"] for row in w.rows(kind="trial") if row.get("spared")})
    assert spared[0] == spared[1]
    w = world(loss=half_stopped).open(make(search={**ASHA, "seed": 5})).run()
    assert len({row["point"] for row in w.rows(kind="trial") if row.get("spared")}) == MIN_AUDITED


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_sparing_survives_a_restart_at_any_point(make: Make, world: NewWorld, slots: int) -> None:
    study = make(search=ASHA, arms={"alone": {SOFT: 0}}, seeds=1)
    whole = world(loss=half_stopped, slots=slots).open(study).run()
    names = {row["point"] for row in whole.rows(kind="trial") if row.get("spared")}
    for steps in range(10, len(whole.ended)):
        w = world(loss=half_stopped, slots=slots).open(study).run(steps)
        w.fill()
        w.open(study).run()
        assert {row["point"] for row in w.rows(kind="trial") if row.get("spared")} == names, f"after {steps}"
        assert w.outcome() == whole.outcome(), f"after {steps}"


def test_where_fewer_were_stopped_all_of_them_go_on(make: Make, world: NewWorld) -> None:
    w = world(loss=lambda p: "stop" if p.point in ("p001", "p003") else by_hash(p)).open(make(search=ASHA)).run()
    assert {row["point"] for row in w.rows(kind="trial") if row.get("spared")} == {"p001", "p003"}
    assert {row["status"] for row in w.rows()} == {"ended"}


# -------------------------------------------------------------------------------------------------- failures and limits


def test_failed_trials_are_left_alone_unless_asked_for(make: Make, world: NewWorld) -> None:
    study = make()
    w = world(loss=lambda p: None if p.arm == "strong" else by_hash(p)).open(study).run()
    assert Counter(row["status"] for row in w.rows())["failed"] == 2
    w.loss = by_hash
    assert edited(w, study) == []
    w.started, w.ended = [], []
    w.open(study, retry_failed=True)
    assert not w.scheduler.is_complete()
    w.run()
    assert {p.arm for p in w.started} == {"strong"} and len(w.started) == 2
    assert {row["status"] for row in w.rows()} == {"ended"}
    assert edited(w, study) == []


def test_nothing_new_begins_once_closed(make: Make, world: NewWorld) -> None:
    w = world().open(make())
    w.fill()
    w.scheduler.close("the limit came")
    assert w.scheduler.next() is None and not w.scheduler.is_complete()
    w.run()
    assert len(w.started) == len(w.ended) == 2


@pytest.mark.parametrize("keys", [{"vary": None, "search": None, "confirm": None}, {}], ids=["arms", "search"])
def test_slots_are_released_while_the_last_trials_run(make: Make, world: NewWorld, keys: dict[str, Any]) -> None:
    w = world(slots=4).open(make(**keys)).run()
    assert w.is_last and w.scheduler.is_complete()


def test_with_early_stopping_nobody_knows_what_follows(make: Make, world: NewWorld) -> None:
    w = world().open(make(search=ASHA)).run()
    assert not w.is_last


def test_a_trial_that_was_left_goes_on_at_the_next_start(make: Make, world: NewWorld) -> None:
    study = make()
    w = world().open(study)
    w.fill()
    left = list(w.ledger.running)
    heard: list[tuple[str, str]] = []
    w.ledger.listeners.append(lambda row, records: heard.append((row["trial"], row["status"])))
    for trial in left:
        w.scheduler.suspend(trial)
    assert not w.ledger.running and heard == [(trial, "running") for trial in left]
    assert not any(Storage(str(w.root)).read(f"study/trials/{trial}/end.json") for trial in left)
    w.open(study).run()
    assert set(left) <= {p.id for p in w.started} and {row["status"] for row in w.rows()} == {"ended"}


def stop_by_hand(w: World, planned: PlannedTrial) -> None:
    w.scheduler.end(planned.id, Outcome(Status.STOPPED, StopReason.BY_HAND), 9)
    w.busy.pop(planned.id)


def test_what_a_person_stopped_is_not_spared_and_runs_again_only_when_asked_for(make: Make, world: NewWorld) -> None:
    study = make(search=ASHA)
    w = world().open(study)
    while not any(p.arm is None and p.kind == "trial" for p in w.ledger.running.values()):
        assert w.step()
    mine = next(p for p in w.ledger.running.values() if p.arm is None and p.kind == "trial")
    stop_by_hand(w, mine)
    w.run()
    row = next(row for row in w.rows() if row["trial"] == mine.id)
    assert row["status"] == "stopped" and not row.get("spared") and w.scheduler.is_complete()
    assert edited(w, study) == []
    w.started, w.ended = [], []
    w.open(study, retry_failed=True).run()
    assert mine.id in {p.id for p in w.started} and {row["status"] for row in w.rows()} == {"ended"}


def checkpoints(w: World) -> set[str]:
    home = Storage(str(w.root)).sub("study")
    names = home.list("trials")
    return {t for t in names for a in home.list(f"trials/{t}") if home.read(f"trials/{t}/{a}/checkpoint.json")}


def test_checkpoints_of_points_that_will_not_go_on_are_forgotten(make: Make, world: NewWorld) -> None:
    """Of eight that were stopped, those that are drawn go on, and only theirs are kept until then."""
    loss = lambda p: "stop" if p.arm is None and p.kind == "trial" and p.point > "p001" else by_hash(p)  # noqa: E731
    w = world(loss=loss).open(make(search={**ASHA, "points": 10}))
    looks = 0
    while w.step():
        for trial in w.ledger.running:
            Storage(str(w.root)).write(f"study/trials/{trial}/attempt-1/checkpoint.json", b"{}")
        stopped = {row["trial"] for row in w.rows() if row["status"] == "stopped"}
        if w.ledger.reopened:
            looks += 1
            assert checkpoints(w) & stopped == w.ledger.reopened - w.ledger.running.keys()
    assert looks
    assert len([row for row in w.rows() if row["status"] == "stopped"]) == 8 - MIN_AUDITED


def test_points_that_were_stopped_keep_checkpoints_as_far_as_there_is_room(make: Make, world: NewWorld) -> None:
    """Half of 2,000 bytes is theirs: one of 600 has to go when the second comes."""
    loss = lambda p: "stop" if p.arm is None and p.kind == "trial" else by_hash(p)  # noqa: E731
    w = world(slots=1, loss=loss).open(make(search=ASHA, limits={"checkpoint_gb": 2e-6}))
    stopped: list[str] = []
    while len(stopped) < 2:
        w.fill()
        (planned,) = w.ledger.running.values()
        Storage(str(w.root)).write(f"study/trials/{planned.id}/attempt-1/checkpoint.json", b"0" * 600)
        w.finish(planned)
        stopped += [planned.id] * (w.ledger.rows[planned.id]["status"] == "stopped")
    assert checkpoints(w) & set(stopped) == {stopped[1]}


def test_listeners_hear_each_beginning_and_each_end(make: Make, world: NewWorld) -> None:
    w = world().open(make())
    heard: list[tuple[str, str]] = []
    w.ledger.listeners.append(lambda row, records: heard.append((row["trial"], row["status"])))
    w.run()
    for planned in w.started:
        assert [status for trial, status in heard if trial == planned.id] == ["running", "ended"]


def test_costs_upstream_are_those_of_the_phases_that_others_read(make: Make, world: NewWorld) -> None:
    w = world().open(make()).run()
    flops = {(row["arm"], row["upstream_flops"]) for row in w.rows(kind="trial") if row["arm"]}
    assert flops == {("alone", 0.0), ("taught", 10.0), ("strong", 10.0)}


# -------------------------------------------------------------------------------------------------------------- dev only


@pytest.mark.parametrize("name", list(STUDIES))
def test_values_on_test_change_no_choice(make: Make, world: NewWorld, name: str) -> None:
    study = make(**STUDIES[name])
    found = [world(test=test).open(study).run() for test in (by_hash, lambda p: -by_hash(p), lambda p: float("nan"))]
    assert found[0].outcome() == found[1].outcome() == found[2].outcome()
    assert [p.id for p in found[0].started] == [p.id for p in found[1].started] == [p.id for p in found[2].started]
    winners = [w.search.winner() for w in found]
    assert len({winner.name for winner in winners if winner}) == 1


# ------------------------------------------------------------------------------------------- points that are also arms


def test_a_point_that_equals_a_tuned_trial_is_not_lost_to_the_search(make: Make, world: NewWorld) -> None:
    """One trial, asked for by two parts of the study, runs once; the search knows its score all the same."""
    study = searched(make, arms={"alone": {SOFT: 0}, "taught": {}}, tune={**TUNE, "extend": 0},
                     vary={LR: {"choice": [1e-3, 2e-3, 4e-3]}, SOFT: {"choice": [1, 2]}}, search={"sampler": "grid", "points": 6})  # fmt: skip
    w = world().open(study).run()
    assert len(w.ended) == len(set(w.ended))
    assert len(w.search.points) == 6
    assert all(w.search.score(point) is not None for point in w.search.points)
    before = {p.name: p.params for p in w.search.points}
    winner = w.search.winner()
    assert edited(w, study) == []
    again = w.search.winner()
    assert {p.name: p.params for p in w.search.points} == before
    assert winner and again and winner.name == again.name
