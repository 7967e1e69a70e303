"""Verdicts: what the tables say about the claims.

A verdict is decided over seeds. Where answers are stored by example, an interval over new seeds and new examples says
whether the verdict generalises to new data. Where a claim says `less`, the cost is a part beside the quality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import pandas as pd

from orchestrator.analysis.advice import MoreEvidence, more_evidence
from orchestrator.analysis.arm_values import arm_values
from orchestrator.analysis.claim_parts import (
    ClaimContext,
    Pair,
    Part,
    compare_cost,
    compare_quality,
    query_claim,
)
from orchestrator.analysis.costs import Cost, CostPart, cost_pair
from orchestrator.analysis.curves import task_facts
from orchestrator.analysis.looks import level_of
from orchestrator.analysis.new_data import StoredAnswers, stored_answers
from orchestrator.analysis.notes import Kind, Note, Scope, note
from orchestrator.analysis.queries import MetricQuery, Records, TaskFacts
from orchestrator.analysis.scaling import Curve, Estimate, judge_scaling
from orchestrator.analysis.statistics import ALPHA, Comparison, Decision, holm
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.timing import conditions
from orchestrator.study.claims import AnyClaim, Claim, Figure
from orchestrator.study.schema import Slot, Study

PaperJudgement = Literal["inside", "below", "above", "not comparable"]
GLUE = frozenset(("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"))  # its average; with wnli it is over 9


class Progress(NamedTuple):
    """Progress by seed at which two arms were evaluated."""

    arm: Mapping[int, float]
    against: Mapping[int, float]


@dataclass(frozen=True)
class Verdict:
    """What the results say about one claim."""

    name: str
    claim: AnyClaim
    verdict: Decision
    parts: tuple[Comparison, ...]  # one for each `against` that shares a seed with the arm
    cost_parts: tuple[CostPart, ...]  # likewise, where the claim says `less`
    p_adjusted: float  # Holm's, of the claim's p; 1 where nothing can be tested
    leans: Decision  # what more seeds would lead to
    more: MoreEvidence  # an estimate of what would decide; of nothing if decided
    cost_ratios: Mapping[str, Cost]  # by `against`: the arm's mean cost over its mean cost
    paper: PaperJudgement | None  # of the paper's figure, as an effect in our units, against our 95 % interval
    notes: tuple[Note, ...]
    reading: MetricQuery  # with its data sets
    by_task: Mapping[str, tuple[Comparison, ...]]  # as `parts`, of each data set; empty where there is one
    holds: Scope | None  # of a verdict that is decided
    read_at: Mapping[str, Progress]  # by `against`, of claims at equal cost
    conditions: Note | None  # of claims about time
    estimates: tuple[Estimate, ...] = ()  # of claims about scaling
    curve: Curve | None = None  # likewise
    look: PlannedLook | None = None  # where the study plans several

    @property
    def seeds_more(self) -> int | None:
        """Seeds that would decide; None if decided, above 1000, or where seeds would not help."""
        return self.more.seeds

    @property
    def is_open(self) -> bool:
        """Whether a planned look is still to decide the claim."""
        return self.look is not None and self.look.is_open


class PlannedLook(NamedTuple):
    """The planned look at which a claim was decided, or at which it waits to be judged."""

    num_seeds: int
    is_open: bool


@dataclass(frozen=True)
class _Compared:
    """A claim with its comparisons, not decided yet."""

    claim: AnyClaim
    query: MetricQuery
    pairs: list[Pair]
    quality: list[Part]
    cost: list[Part]  # where the claim says `less`
    conditions: Note | None
    looks: tuple[int, ...]  # planned
    curve: Curve | None = None

    @property
    def parts(self) -> list[Part]:
        return self.quality + self.cost


def judge(
    claims: Mapping[str, AnyClaim],
    results: pd.DataFrame,
    trials: pd.DataFrame,
    *,
    default_phase: str,
    looks: Sequence[int] = (),  # planned numbers of seeds; by default one look at all that `trials` has
    examples: pd.DataFrame | None = None,
    tasks: TaskFacts | None = None,
    slot: Slot | None = None,  # of the trials
) -> dict[str, Verdict]:
    """Judges each claim: "`arm` is better than `against` by more than `margin`", see `decide`.

    Claims of one `family` share alpha by Holm, those that cannot be tested yet included. A claim of several parts
    (several `against`, or `less`) is one claim: see `_p_of`. Where several looks are planned, a look judges the claims of a
    family on its seeds alone, once all of them are over; what it decides stays so.
    """
    facts = tasks or TaskFacts()
    answers = stored_answers(examples, Records(results, trials, facts))
    case = _Case(claims, results, trials, answers, facts, default_phase, slot, tuple(looks) or (None,))
    verdicts: dict[str, Verdict] = {}
    for family in dict.fromkeys(claim.family for claim in claims.values()):
        verdicts |= case.judge_family([name for name, claim in claims.items() if claim.family == family])
    return {name: verdicts[name] for name in claims}


def judge_study(study: Study, tables: Tables, looks: Sequence[int] = ()) -> list[Verdict]:
    """Judges the claims of a study on its tables, in their order. `looks`: by default the study's."""
    verdicts = judge(
        study.claims, tables.results, tables.trials, default_phase=study.objective.phase, looks=looks or study.looks,
        examples=tables.examples, tasks=task_facts(study), slot=study.slot,
    )  # fmt: skip
    return list(verdicts.values())


@dataclass(frozen=True)
class _Case:
    """Claims, and what they are judged on."""

    claims: Mapping[str, AnyClaim]
    results: pd.DataFrame
    trials: pd.DataFrame
    answers: StoredAnswers | None
    facts: TaskFacts
    default_phase: str
    slot: Slot | None
    looks: tuple[int | None, ...]

    def judge_family(self, names: Sequence[str]) -> dict[str, Verdict]:
        """Judges the claims of one family, look by look."""
        size, is_one = sum(self.claims[name].num_parts for name in names), len(self.looks) == 1
        found, of_names = dict[str, Verdict](), dict[str, tuple[float, float]]()
        for look in self.looks:
            waiting = [name for name in names if name not in found]
            is_over = is_one or self._are_over(waiting, look)
            seen = {name: self._compare(name, look, size, with_examples=is_one) for name in waiting}
            of_names |= {name: _ps_of(compared) for name, compared in seen.items()}
            adjusted, alpha = _adjust([of_names[name] for name in names])
            for name, ps in zip(names, adjusted, strict=True):
                if name in found or (is_over and min(ps) > ALPHA and look != self.looks[-1]):
                    continue
                is_whole = is_one or self.answers is None
                compared = seen[name] if is_whole else self._compare(name, look, size, with_examples=True)
                verdict = _verdict(compared, name, self.facts, adjusted=ps if is_over else (1.0, 1.0), alpha=alpha)
                found[name] = (
                    verdict if is_one or look is None else replace(verdict, look=PlannedLook(look, not is_over))
                )
                # what is rejected counts no more in Holm's steps at later looks
                differ, alike = (0.0 if p <= ALPHA else raw for p, raw in zip(ps, of_names[name], strict=True))
                of_names[name] = differ, alike
        return found

    def _are_over(self, names: Sequence[str], look: int | None) -> bool:
        """Returns whether all seeds of a look are over in the arms of these claims."""
        trials = self.trials[(self.trials["kind"] == "trial") & self.trials["planned"].eq(True)]
        over = trials[(trials["seed"] < look) & (trials["status"] != "running")].groupby("arm")["seed"].nunique()
        return all(over.get(arm, 0) == look for name in names for arm in self.claims[name].arms)

    def _compare(self, name: str, look: int | None, family_size: int, *, with_examples: bool) -> _Compared:
        """Compares the arms of a claim on the seeds of a look."""
        claim, plan = self.claims[name], tuple(look for look in self.looks if look is not None)
        results, trials, answers = self.results, self.trials, self.answers if with_examples else None
        if len(plan) > 1:
            results, trials = results[results["seed"] < look], trials[trials["seed"] < look]
        records = Records(results, trials, self.facts, look)
        if not isinstance(claim, Claim):
            found = judge_scaling(claim, records.facts.grids[name], records)
            parts = [Part(a.p, a.beyond, found.notes, found.failed, answer=a).over(plan) for a in found.answers]
            return _Compared(claim, found.query, [], parts, [], None, plan, found.curve)
        query, pairs = query_claim(claim, records, self.default_phase)
        context = ClaimContext(
            query,
            answers,
            records.facts,
            margin=claim.margin,
            within=claim.within,
            against_model=claim.against_model,
            family_size=family_size,
            looks=plan,
        )
        quality = [compare_quality(context, *pair) for pair in pairs]
        cost = [compare_cost(*pair, claim.less) for pair in pairs] if claim.less else []
        timed = conditions(trials, claim.arms, query.phase, self.slot) if claim.is_of_time else None
        if timed is not None and timed.about["is_shared"]:
            quality, cost = ([part.undecidable() for part in parts] for parts in (quality, cost))
        quality, cost = ([part.over(plan) for part in parts] for parts in (quality, cost))
        return _Compared(claim, query, pairs, quality, cost, timed, plan)


# ---------------------------------------------------------------------------------------------------------- decide


def _verdict(
    compared: _Compared, name: str, facts: TaskFacts, *, adjusted: tuple[float, float], alpha: float
) -> Verdict:  # fmt: skip
    claim, query, parts = compared.claim, compared.query, compared.parts
    leans = _p_of(parts)[1]
    differ, alike = adjusted
    p, verdict = differ, leans if differ <= ALPHA else Decision.UNDECIDED
    if claim.within and verdict == Decision.UNDECIDED and alike <= ALPHA:
        p, verdict = alike, Decision.EQUIVALENT
    holds = _scope(compared, verdict)
    other = _other_average(claim, query.tasks, facts)
    comparisons = tuple(part.comparison for part in compared.quality if part.comparison is not None)
    by_task = {task: tuple(part.by_task[task] for part in parts if task in part.by_task) for task in query.tasks}
    ratios = {b.name: cost_pair(a.costs, b.costs).ratios() for a, b in compared.pairs}
    return Verdict(
        name=name,
        claim=claim,
        verdict=verdict,
        parts=comparisons,
        cost_parts=tuple(part.cost for part in compared.cost if part.cost is not None),
        p_adjusted=p,
        leans=leans,
        more=_more(compared, leans, alpha) if verdict == Decision.UNDECIDED else MoreEvidence(),
        cost_ratios={against: ratio[0] for against, ratio in ratios.items() if ratio is not None},
        paper=_judge_paper(claim, comparisons if len(compared.pairs) == 1 and other is None else ()),
        notes=tuple(dict.fromkeys(_notes(compared, verdict, holds, other))),
        reading=query,
        by_task=by_task if len(by_task) > 1 else {},
        holds=holds,
        read_at={b.name: Progress(a.progress, b.progress) for a, b in compared.pairs} if query.equal else {},
        conditions=compared.conditions,
        estimates=tuple(p.answer.estimate for p in parts if p.answer is not None and p.answer.estimate is not None),
        curve=compared.curve,
    )


def _ps_of(compared: _Compared) -> tuple[float, float]:
    """Returns the p that arms do not differ (but for the margin), and the p that they differ by `within`."""
    differ = _p_of(compared.parts)[0]
    return differ, compared.parts[0].p_equivalent if compared.claim.within else differ


def _adjust(family: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], float]:
    """Adjusts the p's of a family's claims by Holm; returns in addition the alpha of the next claim that Holm decides."""
    differ, alike = zip(*family, strict=True)
    adjusted = holm([*differ, *alike], [*map(max, differ, alike)])
    both = list(zip(adjusted[: len(family)], adjusted[len(family) :], strict=True))
    return both, ALPHA / max(1, sum(min(each) > ALPHA for each in both))


def _p_of(parts: Sequence[Part]) -> tuple[float, Decision]:
    """Returns a claim's p, and the decision to which this p belongs.

    Supported needs each of k parts: the largest p (an intersection-union test). Refuted needs one: k times the smallest p
    (Bonferroni). So each direction errs with at most alpha / 2, whatever k is.
    """
    if all(part.beyond > 0 for part in parts):
        return max(part.p for part in parts), Decision.SUPPORTED
    refuting = [part.p for part in parts if part.beyond < 0]
    if not refuting:
        return 1.0, Decision.UNDECIDED
    return min(1.0, len(parts) * min(refuting)), Decision.REFUTED


def _scope(compared: _Compared, verdict: Decision) -> Scope | None:
    if verdict == Decision.UNDECIDED:
        return None
    if verdict == Decision.EQUIVALENT:
        within = compared.claim.within
        is_on_new = all(p.comparison is not None and p.comparison.holds_on_new_data(within) for p in compared.quality)
        return Scope.NEW_DATA if is_on_new else Scope.THIS_SET
    if verdict == Decision.SUPPORTED:
        return Scope.NEW_DATA if all(part.holds_on_new_data for part in compared.quality) else Scope.THIS_SET
    refuting = [part for part in compared.quality if part.decision == Decision.REFUTED]
    if not refuting:
        return Scope.BY_COST
    return Scope.NEW_DATA if any(part.holds_on_new_data for part in refuting) else Scope.THIS_SET


def _more(compared: _Compared, leans: Decision, alpha: float) -> MoreEvidence:
    level, within = level_of(compared.looks, alpha), compared.claim.within
    return more_evidence(compared.pairs, compared.parts, leans, within=within, level=level, alpha=alpha)


def _judge_paper(claim: AnyClaim, parts: tuple[Comparison, ...]) -> PaperJudgement | None:
    if claim.paper is None:
        return None
    if (figure := claim.figure) is None or not parts or parts[0].interval is None:
        return "not comparable"
    low, high = parts[0].interval
    return "below" if figure < low else "above" if figure > high else "inside"


# --------------------------------------------------------------------------------------------------------- explain


def _notes(compared: _Compared, verdict: Decision, holds: Scope | None, other: Note | None) -> list[Note]:
    claim, tasks = compared.claim, compared.query.tasks
    notes = [note for part in compared.parts for note in part.notes]
    notes += [note for pair in compared.pairs for values in pair for note in values.notes]
    notes += [note for pair in compared.pairs for note in _on_costs(claim, pair)] if claim.less is None else []
    notes += [note(Kind.ON_DEV)] if claim.split == "dev" else []
    notes += [note(Kind.MEAN_OVER, tasks=tasks)] if len(tasks) > 1 else []
    notes += [other] if other is not None else []
    if holds is not None:
        has_interval = any(part.comparison is not None and part.comparison.new_data for part in compared.quality)
        within = claim.within if verdict == Decision.EQUIVALENT else None
        about = {"scope": holds, "margin": claim.margin, "has_interval": has_interval, "within": within}
        notes.append(note(Kind.GENERALISES, **about))
    if claim.margin:
        worse = any(part.decision == Decision.REFUTED for part in compared.quality)
        says = verdict != Decision.REFUTED or worse if claim.margin < 0 else verdict == Decision.REFUTED
        notes += [note(Kind.AGAINST_MARGIN, arm=claim.arm, margin=claim.margin, verdict=verdict)] if says else []
    return [*notes, compared.conditions] if compared.conditions is not None else notes


def _on_costs(claim: AnyClaim, pair: Pair) -> list[Note]:
    arm, against = pair
    spent, notes = cost_pair(arm.costs, against.costs), list[Note]()
    if (ratios := spent.ratios()) is None:
        return []
    own, in_full = ratios
    if not 1 / 1.1 <= (ratio := own.on(claim.axis)) <= 1.1:
        notes.append(note(Kind.UNEQUAL_COST, arm=claim.arm, against=against.name, axis=claim.axis, ratio=ratio))
    if spent.shared and any(abs(a - b) > 0.005 for a, b in zip(own, in_full, strict=True)):
        notes.append(note(Kind.SHARED_COST, against=against.name, phases=spent.shared, in_full=in_full))
    return notes


def _other_average(claim: AnyClaim, averaged: Sequence[str], facts: TaskFacts) -> Note | None:
    """Notes an average that is not the paper's: over other tasks than its figure, or over some of GLUE's alone."""
    glue = sorted(facts.glue[name] for name in averaged if name in facts.glue)
    theirs = claim.paper.over if isinstance(claim.paper, Figure) else "glue"
    is_same = set(glue) - {"wnli"} == GLUE if theirs == "glue" else glue == sorted(theirs)
    if is_same and len(glue) == len(averaged):
        return None
    if not isinstance(claim.paper, Figure) and (len(averaged) < 2 or not glue):
        return None
    return note(Kind.OTHER_AVERAGE, tasks=tuple(averaged), papers=theirs)


# --------------------------------------------------------------------------------------------------------- confirm


@dataclass(frozen=True)
class Confirmation:
    """The search's winner against the baseline, on fresh seeds."""

    verdict: Decision  # supported: at equal steps and at equal cost
    at_steps: Decision
    parts: Mapping[str, Part]  # by rival, the baseline as it was tuned first
    shrinkage: (
        float | None
    )  # the difference on dev in the search minus that on dev at fresh seeds, in the metric's units
    notes: tuple[Note, ...]
    num_rounds: int  # winners that were ever confirmed
    level: float  # at which this winner is judged

    @property
    def comparison(self) -> Comparison | None:
        """The winner beside the baseline as it was tuned."""
        return next(iter(self.parts.values())).comparison


def confirm_verdict(
    results: pd.DataFrame,
    trials: pd.DataFrame,
    points: Sequence[str],  # winner, and its rivals at equal steps: the baseline as it was tuned first
    query: MetricQuery,
    *,
    at_cost: str | None = None,  # the rival at the winner's cost; None: the winner costs no more
    search_difference: float | None = None,  # winner - baseline on dev, optimistic: the winner was chosen by it
    num_seeds: int | None = None,
    examples: pd.DataFrame | None = None,
    tasks: TaskFacts | None = None,
) -> Confirmation:
    """Judges over the `confirm` trials whether the winner is better than every rival (an intersection-union test).

    Equal cost is judged only where equal steps is supported, which spends no further alpha. The k-th winner that is confirmed
    is judged at alpha / (k (k - 1)), so that all together are falsely supported with a chance of at most alpha.
    """
    records = Records(results, trials, tasks or TaskFacts(), num_seeds, "point", "confirm")
    names = [*points, *([at_cost] if at_cost else [])]
    answers = stored_answers(examples, records)
    averaged, values = arm_values(records, names, query)
    context = ClaimContext(query._replace(tasks=averaged), answers, records.facts)
    winner, *rivals = names
    parts = {rival: compare_quality(context, values[winner], values[rival]) for rival in rivals}
    num_rounds = rounds_of(trials)
    level = ALPHA if num_rounds < 2 else ALPHA / (num_rounds * (num_rounds - 1))

    def judged(among: Sequence[str]) -> Decision:
        p, leans = _p_of([parts[rival] for rival in among])
        return leans if p <= level else Decision.UNDECIDED

    at_steps = judged(points[1:])
    verdict = judged([at_cost]) if at_cost and at_steps == Decision.SUPPORTED else at_steps
    shrinkage = None
    if search_difference is not None:
        on_dev = arm_values(records, points[:2], query._replace(split="dev"))[1]
        again = context.compare(on_dev[points[0]].values, on_dev[points[1]].values, "dev")
        shrinkage = None if again is None else search_difference - again.effect
    notes = [
        *(note for part in parts.values() for note in part.notes),
        *(n for name in names for n in values[name].notes),
    ]
    return Confirmation(verdict, at_steps, parts, shrinkage, tuple(dict.fromkeys(notes)), num_rounds, level)


def rounds_of(trials: pd.DataFrame) -> int:
    """Counts the winners that were ever confirmed, whether the study still plans them or not."""
    winners = trials[(trials["kind"] == "confirm") & trials["arm"].isna()]
    return int(winners.groupby("seed")["trial"].nunique().max()) if len(winners) else 0
