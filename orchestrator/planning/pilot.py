"""Planning from a pilot: pairs of trials that are in the storage already tell the spread, and with it what seeds can show."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import pandas as pd

from orchestrator.analysis.curves import by_seed, ended
from orchestrator.analysis.looks import level_of
from orchestrator.analysis.queries import MetricQuery, parsed
from orchestrator.analysis.statistics import ALPHA, MIN_PAIRS, detectable_in_sd, paired_t, sd_interval, seeds_needed
from orchestrator.analysis.tables import Tables, read
from orchestrator.study.claims import Claim
from orchestrator.study.schema import Study, tasks_of
from trainables.metrics.known import metric_named
from trainables.storage.files import Storage


@dataclass(frozen=True)
class Pilot:
    """The spread of paired differences in a study that has run."""

    sd: float
    n: int  # pairs by seed
    source: str
    hours: float | None = (
        None  # device-hours of both arms at one seed; None of another study, whose trials cost otherwise
    )

    def words(self) -> str:
        low, high = sd_interval(self.sd, self.n)
        return f"SD {self.sd:.2g} [{low:.2g}, {high:.2g}] from {self.n} pairs of {self.source} in this storage"


def pilot_lines(study: Study, storage: Storage) -> list[str]:
    """Tells of each claim what the planned seeds can detect in the metric's units, and how many an effect that matters takes.

    At power .8 and the level of the first claim that Holm decides. The spread is that of the same arms in this study's
    earlier trials; else of a study in the same storage with the same phase, model and metric.
    """
    sizes, lines = Counter(claim.family for claim in study.claims.values()), list[str]()
    stored = Stored(storage)
    for name, claim in ((n, c) for n, c in study.claims.items() if isinstance(c, Claim)):  # of two arms
        pilot = _pilot(study, claim, stored)
        if pilot is None:
            continue
        seeds, alpha = study.num_seeds, level_of(study.looks, ALPHA / sizes[claim.family])
        effect = f"{pilot.sd * detectable_in_sd(seeds, alpha=alpha):.2g} {claim.metric}"
        lines.append(f"{name}: {seeds} paired seeds detect {effect}; {pilot.words()}")
        lines += [f"{name}: {_takes(wanted, pilot, alpha)}" for wanted in _effects_that_matter(study, claim)]
    return lines


@dataclass(frozen=True)
class Stored:
    """The studies of a storage, each read once and only if it is needed."""

    storage: Storage
    _read: dict[str, Tables | None] = field(default_factory=dict)

    @cached_property
    def names(self) -> list[str]:
        return sorted(self.storage.list())

    def tables(self, folder: str) -> Tables | None:
        if folder not in self._read:
            try:
                self._read[folder] = read(self.storage.sub(folder), ("results", "trials"))
            except (KeyError, ValueError):  # of another version, or damaged: no pilot
                self._read[folder] = None
        return self._read[folder]


class _Wanted(NamedTuple):
    words: str
    effect: float
    is_equivalence: bool = False


def _effects_that_matter(study: Study, claim: Claim) -> Iterator[_Wanted]:
    if claim.within:
        yield _Wanted(f"arms that are alike are shown to be within ±{claim.within:g}", claim.within, True)
    if claim.margin:
        yield _Wanted(f"arms that are alike are told from the margin {claim.margin:g}", abs(claim.margin))
    if isinstance(claim.paper, float):  # an average over tasks of GLUE may be over others than the claim's
        gain = -claim.paper if metric_named(claim.metric).lower_is_better else claim.paper
        if gain != claim.margin:
            yield _Wanted(f"the paper’s {claim.paper:+g} is told from {claim.margin:g}", abs(gain - claim.margin))


def _takes(wanted: _Wanted, pilot: Pilot, alpha: float) -> str:
    """Says how many seeds an effect takes. Two one-sided tests at power .9 each make .8 together, where the arms are alike."""
    level, power = (2 * alpha, 0.9) if wanted.is_equivalence else (alpha, 0.8)
    seeds = seeds_needed(wanted.effect / pilot.sd, alpha=level, power=power)
    if seeds is None:
        return f"{wanted.words} by more than 1000 seeds"
    seeds = max(seeds, MIN_PAIRS)
    cost = f", about {seeds * pilot.hours:.2g} device-hours for both arms" if pilot.hours else ""
    return f"{wanted.words} by {seeds} seeds{cost}"


# ------------------------------------------------------------------------------------------------------------- pilots


def _pilot(study: Study, claim: Claim, stored: Stored) -> Pilot | None:
    """Returns the widest spread over the arms that the claim is against; of other studies, the pilot with the most pairs."""
    phase = claim.phase or study.objective.phase
    at = 1.0 if claim.at == "equal" else claim.at
    query = MetricQuery(phase, claim.model, claim.metric, tasks_of(claim, study.each_of(phase)), claim.split, at)
    for is_own in (True, False):
        found = list[Pilot]()
        for folder in stored.names:
            if (folder == study.folder) is not is_own or (tables := stored.tables(folder)) is None:
                continue
            same = _of_arms(tables, claim, query, folder)
            found += same if is_own else [replace(p, hours=None) for p in same] or _of_all_arms(tables, query, folder)
        if found:
            most = max(pilot.n for pilot in found)
            return max((pilot for pilot in found if pilot.n == most), key=lambda pilot: pilot.sd)
    return None


def _of_arms(tables: Tables, claim: Claim, query: MetricQuery, source: str) -> list[Pilot]:
    """Returns the spread of the claim's arm against each other one."""
    rival, found = query._replace(model=claim.against_model or claim.model), list[Pilot]()
    own = ended(tables, "trial", claim.arm)
    for against in claim.rivals:
        other = ended(tables, "trial", against)
        gaps = _gaps(by_seed(tables, query, own), by_seed(tables, rival, other))
        if len(gaps) >= MIN_PAIRS and (sd := float(paired_t([*gaps.values()]).sd)) > 0:
            both = pd.concat([own, other])
            hours = [_device_hours(both[both["seed"] == seed]) for seed in gaps]
            found.append(Pilot(sd, len(gaps), source, math.fsum(hours) / len(hours)))
    return found


def _of_all_arms(tables: Tables, query: MetricQuery, source: str) -> list[Pilot]:
    """Returns the spread pooled over all pairs of arms, with as many pairs as the arms have seeds."""
    arms = sorted(ended(tables, "trial")["arm"].dropna().unique())
    values = [by_seed(tables, query, ended(tables, "trial", arm)) for arm in arms]
    gaps = [[*_gaps(a, b).values()] for a, b in itertools.combinations(values, 2)]
    gaps = [each for each in gaps if len(each) >= MIN_PAIRS]
    variances = [float(paired_t(each).sd) ** 2 for each in gaps]
    if not any(variances):
        return []
    return [Pilot(math.sqrt(math.fsum(variances) / len(variances)), min(map(len, gaps)), source)]


def _gaps(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def _device_hours(trials: pd.DataFrame) -> float:
    """Adds up the phases of these trials, a phase that they share once."""
    phases = {done["key"]: done["device_seconds"] for cell in trials["phases"] for done in parsed(cell).values()}
    return math.fsum(map(float, phases.values())) / 3600
