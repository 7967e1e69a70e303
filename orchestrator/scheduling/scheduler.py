"""What runs next: the order of tuning, arms, searched points, checks of early stopping, and confirmation.

Pure bookkeeping over plain files: no Ray, no clock, no tracker. What has ended is read from `trials/<id>/end.json`, what
was running from `trials/<id>/trial.json` without an end; nothing else is remembered between two starts.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator.analysis.arm_values import is_of
from orchestrator.scheduling import trial_files
from orchestrator.scheduling.optuna_sampler import Sampler, State
from orchestrator.scheduling.trial_files import Records, Row
from orchestrator.scheduling.trials import CONFIRM_SEED, SEARCH_SEED, Fingerprints, Kind, PlannedTrial, strata
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Choice, FloatRange, IntRange, Study, tasks_of
from trainables.config.value import random_stream
from trainables.runtime.job_queue import EARLY
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore

MIN_SPARED, SPARED_SHARE = 3, 0.1  # of the stopped points, run to the end to see whether stopping was right


@dataclass
class _Point:
    number: int
    params: dict[str, Any]
    trial: PlannedTrial

    @property
    def name(self) -> str:
        return f"p{self.number:03d}"


@dataclass
class Agenda:
    study: Study
    identity: Fingerprints
    storage: Storage
    retry_failed: bool = False
    closed: str | None = None  # why nothing new is started: a limit, an interrupt, a full disk
    broken: bool = False  # closed by a fault that a person must mend
    unused: list[str] = field(default_factory=list)  # why, of each slot that was not fit to be used
    rows: dict[str, Row] = field(default_factory=dict)  # by trial id: all that this study knows of
    running: dict[str, PlannedTrial] = field(default_factory=dict)
    listeners: list[Callable[[Row, Records], None]] = field(default_factory=list)
    records: dict[str, Records] = field(default_factory=dict)
    spared: set[str] = field(default_factory=set)
    _planned: dict[str, PlannedTrial] = field(default_factory=dict)
    _cache: dict[tuple[Any, ...], list[PlannedTrial]] = field(default_factory=dict)
    _points: list[_Point] = field(default_factory=list)  # by number
    _numbers: set[int] = field(default_factory=set)  # of all points ever begun, those set aside included
    _exhausted: bool = False  # the space holds nothing new
    _asked: set[int] = field(default_factory=set)  # points that the sampler knows as running
    _told: set[int] = field(default_factory=set)  # points whose outcome the sampler knows
    _forgotten: set[str] = field(default_factory=set)  # points whose checkpoints nobody needs any more
    _stopped: dict[str, int] = field(default_factory=dict)  # bytes of checkpoints of points that were stopped early
    _uses: Counter[str] = field(default_factory=Counter)  # planned trials by phase key
    _expected: Counter[str] | None = None  # the same for all arms, untuned

    def __post_init__(self) -> None:
        self._home = self.storage.sub(self.study.folder)
        self._store = PhaseStore(self.storage)
        self._sampler = Sampler(self.study) if self.study.search else None
        self._load()

    # --------------------------------------------------------------------------------------------------- the past

    def _load(self) -> None:
        """Ends and beginnings of earlier runs; points that the file still admits keep their numbers."""
        begun: dict[str, Row] = {}
        for trial in self._home.list("trials"):
            start = trial_files.read_start(self._home, trial)
            if start is None:
                continue
            begun[trial] = start
            over = trial_files.read_end(self._home, trial)
            if over is not None and not (self.retry_failed and _may_be_tried_again(over[0])):
                self.rows[trial], self.records[trial] = over
        points = {trial: int(s["point"][1:]) for trial, s in begun.items() if s["kind"] == "trial" and s["arm"] is None}
        self._numbers = set(points.values())
        for trial in sorted(points, key=points.__getitem__):
            self._take_up_point(trial, begun[trial])
        for trial, start in begun.items():
            if trial not in self.rows:
                self.rows[trial] = {**start, "status": "running"}
        self._begun = begun

    def _take_up_point(self, trial: str, start: Row) -> None:
        if self._sampler is None or not self._is_in_space(start["params"]):
            return
        params = {name: start["params"][name] for name in self.study.vary if name in start["params"]}
        try:
            point = self._point(int(start["point"][1:]), params)
        except StudyError:
            return
        if point.trial.id != trial:
            return
        self._points.append(point)
        row = self.rows.get(trial)
        if row is None:
            self._sampler.add(point.number, params, "running", None)
            self._asked.add(point.number)

    def _is_in_space(self, params: Mapping[str, Any]) -> bool:
        seen: dict[str, Any] = {}
        for name, axis in self.study.vary.items():
            if not self.study.is_active(name, seen):
                continue
            if name not in params:
                return False
            value = params[name]
            match axis:
                case Choice():
                    inside = value in axis.choice
                case FloatRange():
                    inside = isinstance(value, int | float) and axis.float_[0] <= value <= axis.float_[1]
                case IntRange():
                    inside = isinstance(value, int) and value in range(axis.int_[0], axis.int_[1] + 1, axis.step)
            if not inside:
                return False
            seen[name] = value
        return not self.study.is_excluded(seen)

    # --------------------------------------------------------------------------------------------------- the future

    def next(self) -> PlannedTrial | None:
        """The next trial to start, or None: nothing now (wait while something runs), or nothing at all."""
        if self.closed:
            return None
        for planned in self._wanted():
            if planned.id in self.running or self._is_over(planned):
                continue
            teacher = self._teacher_of(planned)
            if teacher is planned:
                continue  # blocked: its teacher is running
            return teacher or planned
        return None

    def _is_over(self, planned: PlannedTrial) -> bool:
        row = self.rows.get(planned.id)
        return row is not None and row["status"] != "running" and planned.id not in self.spared

    def _teacher_of(self, planned: PlannedTrial) -> PlannedTrial | None:
        """The trial of an upstream phase that must run first; `planned` itself where one is running; None: go."""
        own = self._own(planned)
        for instance in planned.upstream:
            key = planned.keys[instance]
            if self._store.find(key) is not None:
                continue
            if any(key in other.keys.values() for other in self.running.values()):
                return planned  # as a teacher, or in a trial that had it for itself when it began
            if instance in own:
                continue
            teacher = self.identity.teacher(self.study, planned, instance)
            if self._is_over(teacher):  # it failed, or its files were lost: the trial trains the phase itself
                continue
            first = self._teacher_of(teacher)
            if first is teacher:
                return planned
            self._add(teacher)
            return first or teacher
        return None

    def _own(self, planned: PlannedTrial) -> set[str]:
        """Phases that belong to their trial: reached by a continuous parameter, or needed by no other planned trial."""
        if planned.arm is None and planned.kind == "trial":
            ranges = [name.split(".") for name in planned.params if not isinstance(self.study.vary.get(name), Choice)]
            found = set()
            for name in planned.upstream:
                needs = planned.spec.upto(name.partition("[")[0])
                parts: dict[str, Collection[str]] = {"phases": needs.phases, "models": needs.models}
                if any(path[0] in parts and path[1] in parts[path[0]] for path in ranges):
                    found.add(name)
            return found
        return {name for name in planned.upstream if self._num_uses(planned.keys[name]) < 2}

    def _num_uses(self, key: str) -> int:
        """How many trials need a phase: of those planned by now, or of all arms before they are tuned."""
        if self._expected is None:
            arms = [planned for arm in self.study.arms for planned in self._untuned(arm)]
            self._expected = Counter(key for planned in arms for key in set(planned.keys.values()))
        return max(self._expected[key], self._uses[key])

    def _add(self, planned: PlannedTrial) -> None:
        if planned.id not in self._planned:
            self._planned[planned.id] = planned
            self._uses.update(set(planned.keys.values()) if planned.kind != "teacher" else ())

    def _wanted(self, *, asking: bool = True) -> Iterator[PlannedTrial]:
        """Every trial of the study that can be named by now, in the order in which they are worth running."""
        for arm, stratum in self.subjects():
            yield from self._race(arm, stratum)[0]
        for arm in self.study.arms:
            tuned = self._race(arm, {})[1]
            if tuned is not None:
                yield from self._of(("trial", arm, _frozen(tuned)), partial(self._arm, arm, tuned))
        if self.study.search:
            yield from self._search(asking=asking)

    def _arm(self, arm: str, tuned: Mapping[str, Any]) -> list[PlannedTrial]:
        return [
            self._plan(self.study.spec(arm=arm, seed=seed, tuned=tuned), "trial", arm, arm, tuned)
            for seed in range(self.study.seeds)
        ]

    def _untuned(self, arm: str) -> list[PlannedTrial]:
        """Stand-ins for the trials of an arm that is still being tuned; they are not planned."""
        key = ("untuned", arm)
        if key not in self._cache:
            self._cache[key] = self._arm(arm, {})
        return self._cache[key]

    def _plan(self, spec: Any, kind: Kind, point: str, arm: str | None, params: Mapping[str, Any]) -> PlannedTrial:
        return self.identity.plan(self.study, spec, kind, point, arm, params)

    def _of(self, key: tuple[Any, ...], make: Callable[[], list[PlannedTrial]]) -> list[PlannedTrial]:
        """Plans once; a trial that two parts of a study ask for keeps its first place."""
        if key not in self._cache:
            self._cache[key] = made = make()
            for planned in made:
                self._add(planned)
        return self._cache[key]

    # --------------------------------------------------------------------------------------------------- tuning

    def subjects(self) -> list[tuple[str, dict[str, str]]]:
        """What is tuned: each arm, and each baseline arm at each combination of sizes. Without a grid, the baselines."""
        minus, confirm = self.study.objective.minus, self.study.confirm
        names = sorted({arm for arm in (minus, confirm and confirm.against) if arm}) if self.study.search else []
        baselines = [(arm, s) for arm in names for s in strata(self.study) if s or arm == minus]
        if self.study.tune is None:
            return baselines
        return [*((arm, {}) for arm in self.study.arms), *(subject for subject in baselines if subject[1])]

    def _race(self, arm: str, stratum: Mapping[str, str]) -> tuple[list[PlannedTrial], dict[str, Any] | None]:
        """The trials of an arm's grid so far, and its tuned value once that is known (None: not yet)."""
        if self.study.tune is None:
            if (arm, stratum) not in self.subjects():
                return [], {}
            only = self._of(("tune", arm, _frozen(stratum), None), partial(self._tuning, arm, stratum, {}))
            return only, {} if self._is_over(only[0]) else None
        (path, grid), *_ = self.study.tune.grid.items()
        values = sorted(grid)
        for extension in range(self.study.tune.extend + 1):
            trials = [
                self._of(("tune", arm, _frozen(stratum), v), partial(self._tuning, arm, stratum, {path: v}))[0]
                for v in values
            ]
            if not all(self._is_over(trial) for trial in trials):
                return trials, None
            scores = {v: self.value(t.id) for v, t in zip(values, trials, strict=True)}
            known = {v: score for v, score in scores.items() if score is not None}
            if not known:
                return trials, {path: grid[len(grid) // 2]}  # all failed: the arm's own trials will say so
            best = min(known, key=lambda v: self._sign * known[v])
            if extension == self.study.tune.extend or values[0] < best < values[-1]:
                break
            if len({trial.id for trial in trials}) == 1:
                break  # the arm fixes this path itself
            factor = values[-1] / values[-2]
            values = sorted([*values, best * factor if best == values[-1] else best / factor])
        return trials, {path: best}

    def _tuning(self, arm: str, stratum: Mapping[str, str], value: Mapping[str, Any]) -> list[PlannedTrial]:
        spec = self.study.spec(arm=arm, point=stratum, seed=SEARCH_SEED, tuned=value)
        return [self._plan(spec, "tune", arm, arm, value)]

    def tuned(self, arm: str, stratum: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        return self._race(arm, stratum or {})[1]

    # --------------------------------------------------------------------------------------------------- the search

    def _search(self, *, asking: bool) -> Iterator[PlannedTrial]:
        assert self.study.search is not None and self._sampler is not None
        minus = self.study.objective.minus
        if minus and any(self._race(minus, s)[1] is None for s in ([*strata(self.study)] or [{}])):
            return  # a score needs its baseline
        self._tell_the_past()
        for point in self._points:
            yield point.trial
        while asking and len(self._points) < self.study.search.points and not self._exhausted:
            waiting = sum(p.trial.id not in self.running and not self._is_over(p.trial) for p in self._points)
            if waiting > len(self.running):
                return  # for their teachers: what is asked meanwhile is asked in ignorance
            number = next(n for n in itertools.count() if n not in self._numbers)
            params = self._sampler.ask(number, self._is_new)
            if params is None:
                self._exhausted = True
                break
            point = self._point(number, params)
            self._points = sorted([*self._points, point], key=lambda p: p.number)
            self._numbers.add(number)
            self._asked.add(number)
            yield point.trial
        complete = self._exhausted or len(self._points) >= self.study.search.points
        if complete and all(self._is_over(p.trial) for p in self._points):
            yield from self._spare()
            yield from self._confirmation()

    def _tell_the_past(self) -> None:
        """Points that had ended before this start: they wait until their baselines are known."""
        assert self._sampler is not None
        for point in self._points:
            row = self.rows.get(point.trial.id)
            if point.number not in self._told and row is not None and row["status"] != "running":
                self._told.add(point.number)
                score = self.score(point)
                status: State = row["status"] if score is not None or row["status"] != "ended" else "failed"
                if point.number in self._asked:
                    self._sampler.tell(point.number, status, score)
                else:
                    self._sampler.add(point.number, point.params, status, score)

    def _is_new(self, params: Mapping[str, Any]) -> bool:
        try:
            trial = self._point(-1, params).trial.id
        except StudyError:
            return False
        return all(point.trial.id != trial for point in self._points)

    def _point(self, number: int, params: Mapping[str, Any]) -> _Point:
        spec = self.study.spec(point=params, seed=SEARCH_SEED)
        point = _Point(number, dict(params), self._plan(spec, "trial", f"p{number:03d}", None, params))
        if number >= 0:
            self._add(point.trial)
        return point

    def _spare(self) -> Iterator[PlannedTrial]:
        """Some of the stopped points go on to the end, drawn at random, to see whether stopping was right."""
        assert self.study.search is not None
        seed = self.study.search.seed
        stopped = [p for p in self._points if self._is_stopped(p) or self.rows[p.trial.id].get("spared")]
        wanted = max(MIN_SPARED, math.ceil(SPARED_SHARE * len(stopped)))
        drawn = sorted(stopped, key=lambda p: random_stream(seed, "spared", p.number))[:wanted]
        self.spared |= {point.trial.id for point in drawn if self._is_stopped(point)}
        for trial in {p.trial.id for p in stopped} - {p.trial.id for p in drawn} - self._forgotten:
            self._forgotten.add(trial)
            trial_files.forget_checkpoints(self._home, trial)
        for point in self._points:
            if point.trial.id in self.spared:
                yield point.trial

    def _is_stopped(self, point: _Point) -> bool:
        row = self.rows[point.trial.id]
        return (row["status"] == "stopped" and row["reason"] == EARLY) or point.trial.id in self.spared

    def winner(self) -> _Point | None:
        """The best of the points that ran to their end."""
        scored = [(self.score(p), p) for p in self._points if self.rows.get(p.trial.id, {}).get("status") == "ended"]
        known = [(score, p) for score, p in scored if score is not None]
        return min(known, key=lambda item: (self._sign * item[0], item[1].number))[1] if known else None

    def _confirmation(self) -> Iterator[PlannedTrial]:
        winner = self.winner()
        if self.study.confirm is None or winner is None or self.spared & {p.trial.id for p in self._points}:
            return
        against = self.study.confirm.against
        sizes = {axis: winner.params[axis] for axis in self.study.size_axes()}
        tuned = self.tuned(against, sizes)
        if tuned is None:
            return

        def make() -> list[PlannedTrial]:
            made = []
            assert self.study.confirm is not None and winner is not None
            for seed in range(CONFIRM_SEED, CONFIRM_SEED + self.study.confirm.seeds):
                spec = self.study.spec(point=winner.params, seed=seed)
                made.append(self._plan(spec, "confirm", winner.name, None, winner.params))
                spec = self.study.spec(arm=against, point=sizes, seed=seed, tuned=tuned)
                made.append(self._plan(spec, "confirm", against, against, tuned))
            return made

        yield from self._of(("confirm", winner.name, _frozen(tuned)), make)

    # --------------------------------------------------------------------------------------------------- scores

    @property
    def _sign(self) -> float:
        return 1.0 if self.study.objective.mode == "min" else -1.0

    def value(self, trial: str) -> float | None:
        """The objective's dev metric at the end of its phase; over several tasks their mean."""
        row = self.rows.get(trial)
        return None if row is None or row["status"] != "ended" else objective(self.study, self.records.get(trial, []))

    def score(self, point: _Point) -> float | None:
        """What the search sees: the value, minus the tuned baseline of the same sizes where the study says so."""
        value = self.value(point.trial.id)
        minus = self.study.objective.minus
        if value is None or minus is None:
            return value
        sizes = {axis: point.params[axis] for axis in self.study.size_axes()}
        trials, tuned = self._race(minus, sizes)
        values = [v for v in (self.value(t.id) for t in trials) if v is not None]
        return None if tuned is None or not values else value - min(values, key=lambda v: self._sign * v)

    # --------------------------------------------------------------------------------------------------- events

    def start(self, planned: PlannedTrial, now: int) -> None:
        """Writes that the trial begins, before it does."""
        row: Row = {
            "trial": planned.id, "kind": planned.kind, "point": planned.point, "arm": planned.arm, "seed": planned.seed,
            "params": dict(planned.params), "status": "running", "reason": None, "attempts": 0, "node": None,
            "started": now, "ended": None, "phases": {}, "upstream_flops": 0.0, "upstream_seconds": 0.0, "peak_memory": 0.0,
        }  # fmt: skip
        if planned.id in self.rows and self.rows[planned.id].get("started"):
            row["started"] = self.rows[planned.id]["started"]
        what = {
            "spec": planned.spec.model_dump(mode="json"),
            "fingerprints": self.identity.of(planned.spec),
            "keys": dict(planned.keys),
        }
        trial_files.write_start(self._home, planned.id, {**row, **what})
        self.rows[planned.id] = row
        self.running[planned.id] = planned
        self._tell(planned.id)

    def progress(self, trial: str, records: Records) -> None:
        """Records as they come; the file of the last attempt is what counts in the end."""
        if trial in self.running:
            for listener in self.listeners:
                listener(self.row(trial), records)

    def end(self, trial: str, end: Mapping[str, Any], now: int) -> None:
        """The one place where a trial gets its outcome. The file first, everything else after it."""
        planned = self.running[trial]
        phases = end.get("phases", {})
        upstream = [phases[name] for name in planned.upstream if name in phases]
        row = {
            **self.rows[trial],
            **{key: end.get(key) for key in ("status", "reason", "attempts", "faults", "node", "last_lines")},
            "ended": now,
            "phases": phases,
            "upstream_flops": sum(phase["flops"] for phase in upstream),
            "upstream_seconds": sum(phase["seconds"] for phase in upstream),
            "peak_memory": end.get("peak_memory", 0.0),
        }
        if trial in self.spared:
            row["spared"] = True
        self.records[trial] = trial_files.write_end(self._home, trial, row)
        self.rows[trial] = row
        self.spared.discard(trial)
        del self.running[trial]
        if row["reason"] == EARLY:  # it may be spared, and then goes on
            self._keep_room(trial)
        elif row["status"] != "ended":
            trial_files.forget_checkpoints(self._home, trial)
        if self._sampler is not None and self.study.objective.minus is None:
            self._tell_the_past()
        self._tell(trial)

    def leave(self, trial: str) -> None:
        """It stopped running without an outcome, and goes on at the next start."""
        del self.running[trial]
        self._tell(trial)

    def take_back(self, trial: str) -> None:
        """Its slot could not begin it: it is the next to start, in another, and nobody need hear of it."""
        del self.running[trial]

    def _keep_room(self, trial: str) -> None:
        """Checkpoints of points that were stopped early may take half of the room; the oldest go first."""
        room = self.study.limits.checkpoint_gb
        if room is None:
            return
        self._stopped[trial] = trial_files.checkpoint_bytes(self._home, trial)
        while sum(self._stopped.values()) > room / 2 * 1e9:
            oldest = next(iter(self._stopped))
            del self._stopped[oldest]
            trial_files.forget_checkpoints(self._home, oldest)

    def row(self, trial: str) -> Row:
        """As the table has it. Point, arm and kind are those of the study as it is now, not as it was when the trial ran."""
        row = {"study": self.study.folder, **self.rows[trial], "planned": self.is_planned(trial)}
        if trial in self._planned:
            now = self._planned[trial]
            row |= {"kind": now.kind, "point": now.point, "arm": now.arm, "params": dict(now.params)}
        return row

    def _tell(self, trial: str) -> None:
        for listener in self.listeners:
            listener(self.row(trial), self.records.get(trial, []))

    # --------------------------------------------------------------------------------------------------- overview

    def all_rows(self) -> list[Row]:
        """Planned or not, in the order in which they began."""
        return [self.row(trial) for trial in sorted(self.rows, key=lambda t: (self.rows[t].get("started") or 0, t))]

    def known(self) -> list[PlannedTrial]:
        """The trials that can be named by now (a search's later points and the confirmation cannot)."""
        for _ in self._wanted(asking=False):
            pass
        tuning = [arm for arm in self.study.arms if self._race(arm, {})[1] is None]
        later = (planned for arm in tuning for planned in self._untuned(arm))  # they will be so many
        return [*self._planned.values(), *(planned for planned in later if planned.id not in self._planned)]

    def is_planned(self, trial: str) -> bool:
        if trial in self._planned:
            return True
        start = self._begun.get(trial, {})  # a teacher of before, whose phase is still read
        return start.get("kind") == "teacher" and self._uses[[*start.get("keys", {"": ""}).values()][-1]] > 0

    def is_complete(self) -> bool:
        """Whether nothing is left to run. May ask the next point, to know whether there is one."""
        if not all(self._is_over(planned) for planned in self._wanted(asking=False)):
            return False
        points = self.study.search.points if self.study.search else 0
        if len(self._points) >= points or self._exhausted:
            return True
        return not self.closed and not self.running and self.next() is None

    def nothing_follows(self) -> bool:
        """Whether all that will ever run is running: then a slot that is idle now stays so. False where one cannot know."""
        search = self.study.search
        if search and (search.stop_early or not (self._exhausted or len(self._points) >= search.points)):
            return False
        if self.study.confirm and not any(p.kind == "confirm" for p in self._planned.values()):
            return False
        if any(self._race(arm, stratum)[1] is None for arm, stratum in self.subjects()):
            return False
        return all(self._is_over(p) or p.id in self.running for p in self._wanted(asking=False))

    def num_left(self) -> int:
        """Trials still to come, as far as is known; teachers not counted."""
        known = [p for p in self.known() if p.kind != "teacher"]
        left = sum(not self._is_over(p) for p in known)
        if self.study.search:
            left += max(0, self.study.search.points - len(self._points)) * (not self._exhausted)
        if self.study.confirm and not any(p.kind == "confirm" for p in known):
            left += 2 * self.study.confirm.seeds
        return left

    def importance(self) -> tuple[str, dict[str, float]] | None:
        return self._sampler.importance() if self._sampler else None


def _may_be_tried_again(row: Row) -> bool:
    """Failed, or stopped by a person: `--retry-failed` says that it shall run again."""
    return bool(row["status"] == "failed" or (row["status"] == "stopped" and row["reason"] != EARLY))


def objective(study: Study, records: Records) -> float | None:
    """Over several data sets their mean; None where one of them is missing."""
    wanted = study.objective
    found: dict[str, list[float]] = {}
    for record in records:
        if (
            is_of(record["phase"], wanted.phase)
            and record["model"] == wanted.model
            and record["metric"] == wanted.metric
            and record["split"] == "dev"
            and record["progress"] == 1.0
        ):
            found.setdefault(record["task"], []).append(record["value"])
    tasks = tasks_of(wanted, study.each_of(wanted.phase)) or tuple(found)
    means = [sum(found[task]) / len(found[task]) for task in tasks if task in found]
    return sum(means) / len(means) if means and len(means) == len(tasks) else None


def _frozen(value: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(value.items()))
