"""Claims at equal cost, at less cost, with a margin below 0; conditions of times; time to equal quality: all against tables
whose answers are known."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from orchestrator.analysis.curves import point_scores
from orchestrator.analysis.equal_cost import equal_cost_values
from orchestrator.analysis.notes import Scope
from orchestrator.analysis.queries import MetricQuery, Records
from orchestrator.analysis.statistics import censored_median, compare_costs, holm
from orchestrator.analysis.tables import RESULTS, TRIALS, Tables
from orchestrator.analysis.timing import ReachTime, conditions, time_to_equal_quality
from orchestrator.analysis.verdicts import Verdict, judge
from orchestrator.planning.preview import claim_lines
from orchestrator.reporting.cost_sections import costs_compared, time_to_quality
from orchestrator.reporting.document import Section, as_markdown
from orchestrator.reporting.notes import note_text
from orchestrator.reporting.page import make_report
from orchestrator.reporting.recommendation import advice
from orchestrator.study.claims import Claim
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from orchestrator.study.schema import Slot, Study

LOOKS = (0.25, 0.5, 0.75, 1.0)
NOISE = np.array([0.03, -0.04, 0.01, -0.02, 0.02, -0.01, 0.04, -0.03])


class Run(NamedTuple):
    """One trial of an arm: what it scored at its looks, and what its phase took in all."""

    values: Sequence[float]  # at LOOKS, or at the first of them
    seconds: float
    status: str = "ended"
    start: float | None = None  # s; by default after the run before
    reused: bool = False
    key: str = ""
    more: float = 0.0  # seconds of a phase that no other arm has
    after: float = 0.0  # of one that comes later
    node: str | None = "here"


def tables(arms: Mapping[str, Sequence[Run]], tasks: Sequence[str] = ("ask",), *, teach: float = 4.0) -> Tables:
    """Phase `distil` after a phase `teach` of `teach` seconds that all arms share by seed; 10 FLOPs and 1 token a second.
    With several tasks the phase fans out, and each branch takes an equal part; each task scores a point more."""
    rows, trials, clock = list[dict[str, Any]](), list[dict[str, Any]](), 0.0
    for arm, runs in arms.items():
        for seed, run in enumerate(runs):
            name, start = f"{arm}{seed}", clock if run.start is None else run.start
            clock = start + run.seconds
            whose = {
                "study": "s",
                "trial": name,
                "point": arm,
                "arm": arm,
                "seed": seed,
                "kind": "trial",
                "planned": True,
            }
            phases: dict[str, Any] = {"teach": _done(f"t{seed}", teach, reused=arm != next(iter(arms)))}
            if run.more:
                phases["prepare"] = _done(f"p{name}", run.more)
            for i, task in enumerate(tasks):
                branch = f"distil[{task}]" if len(tasks) > 1 else "distil"
                part = run.seconds / len(tasks)
                phases[branch] = _done(f"{run.key or name}{i}", part, reused=run.reused)
                for at, value in zip(LOOKS, run.values, strict=False):
                    spent = {"tokens": round(at * part), "seconds": at * part, "device_seconds": at * part}
                    about = {"model": "student", "phase": branch, "task": task, "metric": "rougeL", "value": value + i}
                    for split in ("dev", "test"):
                        where = {
                            "split": split,
                            "step": round(100 * at),
                            "progress": at,
                            "flops": 10 * at * part,
                            "t": 1,
                        }
                        rows.append({**whose, **spent, **about, **where})
            if run.after:
                phases["finetune"] = _done(f"f{name}", run.after)
            ended = run.status == "ended"
            when = {
                "node": run.node,
                "started": round(1000 * start),
                "attempts": 1,
                "peak_memory": 1e8,
                "params": "{}",
            }
            when["ended"] = round(1000 * (start + run.seconds)) if run.status != "running" else None
            trials.append({**whose, **when, "status": run.status, "phases": json.dumps(phases if ended else {})})
    return Tables(pd.DataFrame(rows, columns=RESULTS.names), pd.DataFrame(trials, columns=TRIALS.names))


def _done(key: str, seconds: float, *, reused: bool = False) -> dict[str, Any]:
    cost = {"flops": 10 * seconds, "seconds": seconds, "device_seconds": seconds, "tokens": round(seconds)}
    return {"key": key, "reused": reused, **cost}


def claim(arm: str = "okd", against: str | tuple[str, ...] = "gkd", **fields: Any) -> Claim:
    return Claim(arm=arm, against=against, **{"model": "student", "metric": "rougeL", **fields})


def verdict_of(found: Tables, of: Claim, **more: Any) -> Verdict:
    return judge({"c": of}, found.results, found.trials, default_phase="distil", **more)["c"]


def seconds(found: Tables, *, tasks: tuple[str, ...] = (), axis: Any = "device_seconds") -> dict[str, float]:
    """Mean device seconds of okd and gkd at equal cost."""
    query = MetricQuery("distil", "student", "rougeL", tasks, equal=axis)
    arms = equal_cost_values(Records(found.results, found.trials), {"okd": query, "gkd": query}, axis)[1]
    return {n: float(np.mean([c.total().device_seconds for c in arm.costs.values()])) for n, arm in arms.items()}


def rising(end: float, n: int = 5, **run: Any) -> list[Run]:
    """Runs that end near `end`, each look a point below the next; the noise is that of the seed."""
    return [Run([end + NOISE[i] - 3 + k for k in range(4)], **run) for i in range(n)]


def flat(mean: float, n: int = 5, *, spread: float = 0.0, **run: Any) -> list[Run]:
    return [Run([mean + spread * NOISE[i]] * 4, **run) for i in range(n)]


def said(verdict: Verdict, text: str) -> bool:
    return any(text in note_text(note) for note in verdict.notes)


EQUAL = {"at": "equal", "axis": "device_seconds"}


# ------------------------------------------------------------------------------------------------------- equal cost


@pytest.mark.parametrize("axis", ["device_seconds", "flops", "student_tokens"])
def test_the_dearer_side_is_read_where_the_cheaper_one_ends(axis: str) -> None:
    found = tables({"okd": rising(20, seconds=20), "gkd": rising(23, seconds=48)})
    verdict = verdict_of(found, claim(at="equal", axis=axis))
    (c,) = verdict.parts
    assert c.arm_values == pytest.approx(20 + NOISE[:5])  # at its end
    assert c.against_values == pytest.approx(20 + NOISE[:5])  # 23 - 3: its first look, after 12 of 48 s
    assert verdict.read_at["gkd"].arm == dict.fromkeys(range(5), 1.0)
    assert verdict.read_at["gkd"].against == dict.fromkeys(range(5), 0.25)
    assert verdict.reading.equal == axis
    assert said(verdict, "'gkd' was evaluated mid-schedule (at 0.25 of its budget)")
    assert said(verdict, "40 % of the ")  # 8 of 20 s, and nothing of what came before
    assert not said(verdict, "'okd' was evaluated")
    assert seconds(found, axis=axis) == {"okd": 24, "gkd": 16}
    assert said(verdict, "no interval over new examples: answers are stored for test at the end of a phase only")


def test_the_sides_change_places_from_seed_to_seed() -> None:
    okd = [Run([1.0, 2.0, 3.0, 4.0], seconds) for seconds in (10, 10, 40)]
    gkd = [Run([5.0, 6.0, 7.0, 8.0], seconds) for seconds in (20, 14, 10)]
    verdict = verdict_of(tables({"okd": okd, "gkd": gkd}), claim(**EQUAL))
    assert verdict.parts[0].arm_values == (4, 4, 1) and verdict.parts[0].against_values == (6, 6, 8)
    assert verdict.read_at["gkd"].against == {0: 0.5, 1: 0.5, 2: 1.0}
    assert said(verdict, "'gkd' was evaluated mid-schedule (at 0.67 of its budget, mean of 0.5 to 1 over 3 seeds)")
    assert said(verdict, "'okd' was evaluated mid-schedule (at 0.75 of its budget, mean of 0.25 to 1 over 3 seeds)")


def test_the_look_after_shows_what_coarse_looks_hide() -> None:
    gkd = [
        run._replace(values=[v, v + 3, v + 3, v + 3])
        for run in flat(19, seconds=48, spread=-1.0)
        for v in run.values[:1]
    ]
    verdict = verdict_of(tables({"okd": rising(20.5, seconds=20), "gkd": gkd}), claim(**EQUAL))
    d = 1.5 + 2 * NOISE[:5] - 3  # at its second look `gkd` is 3 better
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    text = f"'okd' − 'gkd' is {d.mean():+.3g} [{low:+.3g}, {high:+.3g}], refuted without Holm".replace("-", "−")
    assert (verdict.verdict, verdict.seeds_more) == ("undecided", None) and said(verdict, text)
    assert said(verdict, "the evaluations before and after equal cost do not agree, so undecided")


@pytest.mark.parametrize("ratio", [1.005, 1.1, 1.5, 1.9, 2.0, 3.0])
def test_no_schedule_is_better_at_equal_cost_by_the_grid_of_evaluations(ratio: float) -> None:
    """The loss is one function of the cost, so no schedule is better. The one evaluated earlier once was worse in 8 of 8."""
    rng, false, num = np.random.default_rng(round(1000 * ratio)), 0, 12
    for _ in range(num):
        okd, gkd = (
            [Run([20 + 5 * math.log(cost * at) + 0.02 * rng.normal() for at in LOOKS], cost) for _ in range(5)]
            for cost in (20, 20 * ratio)
        )
        false += (
            verdict_of(tables({"okd": okd, "gkd": gkd}, teach=0.0), claim(at="equal", axis="flops")).verdict
            != "undecided"
        )
    assert false <= 1
    better = tables({"okd": flat(40, spread=1.0, seconds=20), "gkd": rising(20.0, seconds=20 * ratio)[::-1]})
    assert verdict_of(better, claim(at="equal", axis="flops")).verdict == "supported"


def test_an_evaluation_just_after_the_budget_is_read_as_at_the_budget() -> None:
    found = tables({"okd": flat(20, spread=1.0, seconds=20), "gkd": rising(20.2, seconds=20.1)[::-1]}, teach=0.0)
    verdict = verdict_of(found, claim(at="equal", axis="flops"))
    assert verdict.read_at["gkd"].against == dict.fromkeys(range(5), 1.0) and verdict.verdict == "refuted"


def test_a_look_that_comes_just_when_the_budget_ends_counts() -> None:
    for seconds, at in ((40.0, 0.25), (40.1, None), (20.0, 0.5), (10.0, 1.0)):
        found = tables({"okd": rising(20, seconds=10), "gkd": rising(20, seconds=seconds)})
        verdict = verdict_of(found, claim(**EQUAL))
        assert set(verdict.read_at["gkd"].against.values()) == ({at} if at else set())
        assert said(verdict, " 0 % of the device time is unused") == (at not in (None, 1.0))


def test_a_seed_without_a_look_in_time_has_no_value_and_is_named() -> None:
    gkd = [Run([1.0, 2.0, 3.0, 4.0], seconds) for seconds in (20, 50, 20, 52, 20)]
    verdict = verdict_of(tables({"okd": rising(20, seconds=10), "gkd": gkd}), claim(**EQUAL), looks=(5,))
    assert verdict.parts[0].seeds == (0, 2, 4)
    assert said(
        verdict, "'gkd' has no value at seed 1, 3: its first evaluation, at 0.25 of its schedule, came after 1.2 times"
    )
    assert not said(verdict, "provisional")
    none = verdict_of(tables({"okd": rising(20, seconds=10), "gkd": rising(20, seconds=100)}), claim(**EQUAL))
    assert (none.verdict, none.parts) == ("undecided", ())
    assert said(none, "'gkd' has no value at seed 0, 1, 2, 3, 4") and said(none, "no seed has a value in both")


def test_what_came_before_is_part_of_what_is_equal() -> None:
    """An arm that had to prepare for 10 s may train for 10 s less."""
    found = tables({"okd": rising(20, seconds=20, more=10.0), "gkd": rising(20, seconds=20)})
    verdict = verdict_of(found, claim(**EQUAL))
    assert verdict.read_at["gkd"].arm == dict.fromkeys(range(5), 0.5)


def test_what_comes_later_is_no_part_of_it() -> None:
    plain = tables({"okd": rising(20, seconds=10), "gkd": rising(20, seconds=40)})
    later = tables({"okd": rising(20, seconds=10, after=500.0), "gkd": rising(20, seconds=40)})
    for of in (claim(**EQUAL), claim(**LESS)):
        assert verdict_of(later, of) == verdict_of(plain, of)


def test_a_seed_that_did_not_end_has_no_value_at_equal_cost() -> None:
    okd, gkd = rising(20, seconds=10), rising(20, seconds=40)
    gkd[1], gkd[2] = gkd[1]._replace(status="running"), gkd[2]._replace(status="failed", values=[17.0])
    verdict = verdict_of(tables({"okd": okd, "gkd": gkd}), claim(**EQUAL))
    assert verdict.parts[0].seeds == (0, 3, 4)
    assert said(verdict, "provisional: 1 of 5 planned seeds of 'gkd'") and said(verdict, "'gkd' failed at seed 2")
    assert not said(verdict, "planned seeds of 'okd'")
    lacking = tables({"okd": rising(20, seconds=10), "gkd": rising(20, seconds=40)}, tasks=("a", "b"))
    gone = (lacking.results["trial"] == "gkd3") & (lacking.results["task"] == "b")
    lacking = Tables(lacking.results[~gone], lacking.trials)
    judged = verdict_of(lacking, claim(**EQUAL))
    assert judged.parts[0].seeds == (0, 1, 2, 4) and said(judged, "'gkd' has no b at seed 3")


def test_a_look_that_is_no_number_is_a_failed_seed_and_a_later_one_is_not_read() -> None:
    okd, gkd = rising(20, seconds=10), rising(20, seconds=20)
    gkd[1] = gkd[1]._replace(values=[1.0, math.nan, 3.0, 4.0])
    gkd[2] = gkd[2]._replace(values=[1.0, 2.0, math.nan, 4.0])
    verdict = verdict_of(tables({"okd": okd, "gkd": gkd}), claim(**EQUAL))
    assert verdict.parts[0].seeds == (0, 2, 3, 4)
    assert said(verdict, "'gkd' failed at seed 1")


def test_a_phase_that_fans_out_is_read_at_one_look_of_all_branches() -> None:
    found = tables({"okd": rising(20, seconds=20), "gkd": rising(23, seconds=60)}, tasks=("a", "b"))
    verdict = verdict_of(found, claim(**EQUAL))
    (c,) = verdict.parts
    assert verdict.reading.tasks == ("a", "b")
    assert c.against_values == pytest.approx(20.5 + NOISE[:5]) and c.arm_values == pytest.approx(20.5 + NOISE[:5])
    one = verdict_of(found, claim(task="b", **EQUAL))
    assert one.parts[0].against_values == pytest.approx(21 + NOISE[:5])
    assert seconds(found, tasks=("b",))["gkd"] == 4 + 7.5  # of that branch alone


def test_each_against_of_a_conjunctive_claim_has_a_budget_of_its_own() -> None:
    found = tables({"okd": rising(20, seconds=20), "gkd": rising(20, seconds=40), "fast": rising(20, seconds=10)})
    verdict = verdict_of(found, claim(against=("gkd", "fast"), **EQUAL))
    gkd, fast = verdict.parts
    assert gkd.arm_values == pytest.approx(20 + NOISE[:5]) and fast.arm_values == pytest.approx(18 + NOISE[:5])
    assert verdict.cost_ratios["fast"].device_seconds == 1


# ---------------------------------------------------------------------------------------------------------- margins


@pytest.mark.parametrize(
    ("difference", "verdict"), [(-0.4, "supported"), (-0.5, "undecided"), (-0.6, "refuted"), (0.3, "supported")]
)
def test_no_worse_by_more_than_a_margin(difference: float, verdict: str) -> None:
    found = tables({"okd": flat(20 + difference, seconds=10, spread=1.0), "gkd": flat(20, seconds=10)})
    of = claim(margin=-0.5)
    judged = verdict_of(found, of)
    d = difference + NOISE[:5]
    assert judged.verdict == verdict
    assert judged.p_adjusted == pytest.approx(stats.ttest_1samp(d, -0.5).pvalue)
    assert of.stated() == "okd is no worse than gkd by more than 0.5"
    words = {
        "supported": "would be another claim",
        "undecided": "worse by more than 0.5",
        "refuted": "'okd' is worse by more than 0.5",
    }
    assert said(judged, words[verdict])


def test_no_worse_is_no_worse_where_less_is_better() -> None:
    found = tables({"okd": flat(20.4, seconds=10, spread=1.0), "gkd": flat(20, seconds=10)})
    results = found.results.assign(metric="lm_loss")
    for margin, verdict in ((-0.5, "supported"), (-0.3, "refuted")):
        of = claim(metric="lm_loss", margin=margin)
        assert judge({"c": of}, results, found.trials, default_phase="distil")["c"].verdict == verdict


# --------------------------------------------------------------------------------------------------------- less cost

LESS = {"less": "device_seconds", "margin": -0.5}


def timed(okd: Sequence[float], gkd: Sequence[float], *, gain: float = 0.0, **more: Any) -> Tables:
    mine = [run._replace(seconds=s, **more) for run, s in zip(flat(20 + gain, spread=1.0, seconds=1), okd, strict=True)]
    return tables(
        {"okd": mine, "gkd": [run._replace(seconds=s) for run, s in zip(flat(20, seconds=1), gkd, strict=True)]}
    )


FAST, SLOW = (10.0, 11.0, 9.0, 10.5, 10.0), (24.0, 26.0, 25.0, 23.0, 25.0)


@pytest.mark.parametrize(
    ("gain", "okd", "gkd", "verdict"),
    [
        (0.0, FAST, SLOW, "supported"),
        (-1.0, FAST, SLOW, "refuted"),  # cheaper, but worse
        (0.0, SLOW, FAST, "refuted"),  # as good, but dearer
        (5.0, FAST, FAST[::-1], "undecided"),  # better, and about as dear
        (-0.5, FAST, SLOW, "undecided"),
    ],
)
def test_less_is_a_part_of_its_own(gain: float, okd: Any, gkd: Any, verdict: str) -> None:
    judged = verdict_of(timed(okd, gkd, gain=gain), claim(**LESS))
    assert judged.verdict == verdict
    (part,) = judged.cost_parts
    logs = np.log(okd) - np.log(gkd)
    test = stats.ttest_1samp(logs, 0)
    assert part.found.ratio == pytest.approx(np.exp(logs.mean()))
    assert part.found.interval == pytest.approx(tuple(np.exp(test.confidence_interval(0.95))))
    assert part.found.p == pytest.approx(test.pvalue)
    assert part.in_full == pytest.approx(stats.gmean((np.array(okd) + 4) / (np.array(gkd) + 4)))
    assert part.shared == ("teach",)
    assert said(judged, "excludes shared phases (teach)") and said(judged, f"in full ×{part.in_full:.3g}")
    assert not said(judged, "axis not equal")
    assert judged.holds == (None if verdict == "undecided" else Scope.BY_COST if okd is SLOW else Scope.THIS_SET)
    assert said(judged, "refuted by its cost alone") == (okd is SLOW)


def test_a_part_that_is_undecided_says_how_many_more_seeds() -> None:
    judged = verdict_of(timed((10.0, 12.0, 9.0, 11.0, 10.0), (11.0, 11.0, 11.0, 10.0, 12.0), gain=5), claim(**LESS))
    assert judged.verdict == "undecided" and judged.seeds_more is not None and judged.seeds_more > 1
    assert judged.p_adjusted == judged.cost_parts[0].found.p


def test_a_phase_that_the_other_does_not_have_counts() -> None:
    judged = verdict_of(timed(FAST, SLOW, more=20.0), claim(**LESS))
    assert judged.verdict == "refuted" and judged.cost_parts[0].shared == ("teach",)
    assert judged.cost_parts[0].found.arm_values == pytest.approx(np.array(FAST) + 20)


def test_a_claim_with_less_is_one_claim_of_its_family() -> None:
    found = timed(FAST, SLOW, gain=1.0)
    claims = {"a": claim(), "b": claim(**LESS), "c": claim("gkd", "okd")}
    judged = judge(claims, found.results, found.trials, default_phase="distil")
    assert {v.parts[0].family_size for v in judged.values()} == {4}  # comparisons
    p = max(judged["b"].parts[0].p or 0, judged["b"].cost_parts[0].found.p or 0)
    expected = holm([judged["a"].parts[0].p or 0, p, judged["c"].parts[0].p or 0])
    assert [v.p_adjusted for v in judged.values()] == pytest.approx(expected)


@pytest.mark.parametrize(("axis", "verdict"), [("flops", "supported"), ("student_tokens", "supported"), ("device_seconds", "undecided")])  # fmt: skip
def test_what_is_counted_needs_no_spread_and_what_is_measured_does(axis: str, verdict: str) -> None:
    judged = verdict_of(timed([10.0] * 5, [25.0] * 5), claim(less=axis, margin=-0.5))
    assert judged.verdict == verdict
    assert said(judged, "are counted") == (axis != "device_seconds")
    assert said(judged, "without spread there is no test") == (axis == "device_seconds")
    same = verdict_of(timed([10.0] * 5, [10.0] * 5), claim(less=axis, margin=-0.5))
    assert same.verdict == "undecided"
    more = verdict_of(timed([25.0] * 5, [10.0] * 5), claim(less=axis, margin=-0.5))
    assert more.verdict == ("refuted" if axis != "device_seconds" else "undecided")


def test_a_failed_seed_leaves_the_cost_open() -> None:
    found = timed(FAST, SLOW, gain=60)
    trials = found.trials.copy()
    lost = trials["trial"] == "gkd3"
    trials.loc[lost, "status"] = "failed"
    results = found.results[found.results["trial"] != "gkd3"]
    judged = judge({"c": claim(**LESS)}, results, trials, default_phase="distil")["c"]
    assert judged.verdict == "undecided" and said(judged, "are unknown: that part is undecided")


def test_one_seed_or_none_decides_no_cost() -> None:
    found = timed(FAST, SLOW)
    one = judge({"c": claim(**LESS)}, found.results[found.results["seed"] == 0], found.trials, default_phase="distil")[
        "c"
    ]
    assert one.verdict == "undecided" and one.cost_parts[0].found.interval is None
    none = judge({"c": claim(**LESS)}, found.results.head(0), found.trials.head(0), default_phase="distil")["c"]
    assert (none.verdict, none.cost_parts) == ("undecided", ()) and said(
        none, "no seed has recorded device time for both"
    )
    assert compare_costs({0: 0.0}, {0: 1.0}, name="x") is None


def test_a_paper_may_say_it_in_words() -> None:
    judged = verdict_of(timed(FAST, SLOW), claim(paper="-0.5 in 1/2.5 of the time", **LESS))
    assert judged.paper == "not comparable"
    assert verdict_of(timed(FAST, SLOW), claim(paper=0.0, **LESS)).paper == "inside"


# ------------------------------------------------------------------------------------------------------- conditions


def words(found: Tables, slot: Slot | None = None) -> str:
    return text_at(found.trials, slot)


def text_at(trials: pd.DataFrame, slot: Slot | None = None) -> str:
    note = conditions(trials, ("okd", "gkd"), "distil", slot)
    return "" if note is None else note_text(note)


def test_trials_one_after_the_other_had_the_node_for_themselves() -> None:
    okd = [Run([1.0] * 4, 10, start=20 * i) for i in range(3)]
    gkd = [Run([1.0] * 4, 10, start=20 * i + 10) for i in range(3)]
    text = words(tables({"okd": okd, "gkd": gkd}), Slot(cpus=2))
    assert text == (
        "timing conditions: one trial at a time per node, on one node (here); a slot was 1 worker with 2 CPUs and no GPU each"
    )


@pytest.mark.parametrize(
    ("gpus", "says"),
    [(0, "sharing its processors and memory"), (0.25, "sharing its GPUs"), (1, "each with its own GPUs")],
)
def test_trials_side_by_side_are_counted_on_their_node(gpus: float, says: str) -> None:
    okd = [Run([1.0] * 4, 10, start=5 * i) for i in range(3)]  # 0-10, 5-15, 10-20: two at a time
    gkd = [Run([1.0] * 4, 10, start=100, node="there"), Run([1.0] * 4, 10, start=0, node="there")]
    found = tables({"okd": okd, "gkd": gkd})
    text = words(found, Slot(gpus=gpus))
    assert "up to 2 trials side by side per node, on 2 nodes" in text and says in text
    assert ("needs one slot per device" in text) == (gpus < 1)
    other = found.trials.iloc[[0]].assign(trial="x", kind="tune", arm="z", planned=False, started=6000, ended=7000)
    assert "up to 3 trials" in text_at(pd.concat([found.trials, other]))
    running = other.assign(status="running", node=None, ended=np.nan, phases="{}")
    assert "up to 3 trials" in text_at(pd.concat([found.trials, running]))


def test_runs_that_other_tables_hold_are_owned_up_to() -> None:
    okd = [Run([1.0] * 4, 10, start=20 * i, reused=i > 0) for i in range(3)]
    text = words(tables({"okd": okd}))
    assert (
        "one trial at a time" in text
        and "2 of 3 runs of phase 'distil' were trained by trials that are not in these tables" in text
    )
    shared = [Run([1.0] * 4, 10, start=20 * i, reused=i > 0, key="one") for i in range(3)]
    assert "not in these tables" not in words(tables({"okd": shared}))
    assert words(tables({"okd": [Run([], 10, status="running")]})) == ""


def test_only_claims_about_time_name_their_conditions() -> None:
    found = tables({"okd": rising(20, seconds=20), "gkd": rising(20, seconds=40)})
    for fields, of_time in ((EQUAL, True), (LESS, True), ({"axis": "device_seconds"}, True), ({"at": "equal"}, False)):
        judged = verdict_of(found, claim(**fields), slot=Slot())
        assert (judged.conditions is not None) == of_time == said(judged, "timing conditions: one trial at a time")


def test_times_on_shared_devices_decide_nothing() -> None:
    """Two arms of equal work, one of which ran while more trials shared its processors."""
    found = timed(FAST, SLOW, gain=3.0, start=0.0)
    for fields in (LESS, EQUAL, {"axis": "device_seconds"}):
        own, shared = (verdict_of(found, claim(**fields), slot=Slot(gpus=gpus)) for gpus in (1, 0))
        assert (own.verdict, shared.verdict, shared.seeds_more) == ("supported", "undecided", None)
        assert said(shared, "so undecided") and all(part.verdict == "undecided" for part in shared.cost_parts)
    assert verdict_of(found, claim(margin=-0.5), slot=Slot()).verdict == "supported"


# ----------------------------------------------------------------------------------------------- time to equal quality


def test_the_median_of_times_that_are_not_all_known() -> None:
    assert censored_median([3.0, 1.0, 2.0], 0) == 2
    assert censored_median([1.0, 2.0], 1) == 2
    assert censored_median([9.0, 1.0, 1.0, 3.0], 0) == 2
    assert censored_median([1.0, 4.0], 2) is None  # half have it: the middle lies beyond what was seen
    assert censored_median([1.0], 4) is None  # however late the one was
    assert censored_median([], 2) is None and censored_median([], 0) is None


def reached(okd: Sequence[Run], gkd: Sequence[Run], metric: str = "rougeL") -> ReachTime:
    found = tables({"okd": okd, "gkd": gkd})
    at = MetricQuery("distil", "student", metric, ("ask",))
    results = found.results.assign(metric=metric)
    answer = time_to_equal_quality(results, found.trials, ("okd", "gkd"), (at, at))
    assert answer is not None
    return answer


def test_the_time_is_that_of_the_first_look_that_is_as_good() -> None:
    okd = [Run([1.0, 5.0, 4.0, 9.0], 20), Run([9.0, 9.0, 9.0, 9.0], 20), Run([1.0, 2.0, 3.0, 5.0], 24)]
    got = reached(okd, [Run([9.0, 9.0, 9.0, 5.0], 40)] * 3)
    assert got.seconds == {0: 10, 1: 5, 2: 24} and got.reached == {0, 1, 2}
    assert got.median == 10 and got.ratio == pytest.approx(10 / 40)
    assert got.took == {0: 40, 1: 40, 2: 40}
    lower = reached(okd, [Run([9.0, 9.0, 9.0, 5.0], 40)] * 3, metric="lm_loss")
    assert lower.seconds == {0: 5, 1: 20, 2: 6} and lower.reached == {0, 2} and lower.median == 6


def test_what_is_never_reached_is_censored() -> None:
    okd = [Run([1.0, 5.0, 4.0, 9.0], 20), Run([1.0] * 4, 20), Run([1.0] * 4, 24)]
    got = reached(okd, [Run([9.0, 9.0, 9.0, 5.0], 40)] * 3)
    assert got.reached == {0} and got.seconds[2] == 24 and (got.median, got.ratio) == (None, None)
    none = reached([Run([1.0] * 4, 20)] * 3, [Run([9.0] * 4, 40)] * 3)
    assert none.reached == frozenset() and none.median is None


def test_seeds_that_cannot_be_compared_are_left_out_and_broken_ones_reach_nothing() -> None:
    okd = [
        Run([math.nan] * 4, 20),
        Run([1.0, 6.0], 20, status="failed"),
        Run([], 20, status="failed"),
        Run([6.0] * 4, 20),
    ]
    gkd = [Run([5.0] * 4, 40)] * 3 + [Run([5.0] * 2, 40, status="failed")]
    got = reached(okd, gkd)
    assert got.reached == {1} and got.seconds == {0: 20, 1: 10} and got.left_out == (2,)


def test_what_only_one_side_had_to_do_before_counts_in_its_time() -> None:
    got = reached([Run([5.0] * 4, 20, more=7.0)] * 3, [Run([5.0] * 4, 40)] * 3)
    assert got.seconds == {0: 12, 1: 12, 2: 12} and got.took[0] == 40


# --------------------------------------------------------------------------------------- what is said, and where

TRIAL = {
    "data": {"kind": "python_docs", "tokenizer": {"kind": "wordpiece", "size": 1024}, "length": 64},
    "models": {name: {"family": "bert", "layers": 2, "width": 64} for name in ("teacher", "student")},
    "phases": {
        "distil": {
            "train": {"student": "full"}, "budget": {"steps": 100}, "batch": 8, "optimizer": {"lr": 3e-3},
            "terms": {"hard": {"kind": "cross_entropy", "of": "student"}},
        }
    },
}  # fmt: skip
CLAIMS: Mapping[str, Mapping[str, Any]] = {
    "in_time": {"against": "gkd", **EQUAL},
    "cheap": {
        "against": "gkd",
        "paper": "-0.5 in 1/2.5 of the time",
        "says": "OKD is as good as GKD, and faster",
        **LESS,
    },
    "dear": {"against": "forward", "less": "device_seconds"},
    "plain": {"against": "forward"},
}


def study(claims: Mapping[str, Mapping[str, Any]] = CLAIMS, **more: Any) -> Study:
    about = {"arm": "okd", "model": "student", "metric": "rougeL"}
    whole = {"name": "okd", "file": "okd.yaml", "question": "Is adapting the teacher worth its time?", "trial": TRIAL}
    objective = {"phase": "distil", "model": "student", "metric": "rougeL", "mode": "max"}
    arms: dict[str, Any] = {"forward": {}, "gkd": {}, "okd": {}}
    stated = {name: {**about, **fields} for name, fields in claims.items()}
    return Study.model_validate({**whole, "objective": objective, "arms": arms, "claims": stated, "seeds": 5, **more})


def three_arms() -> Tables:
    def runs(end: float, seconds: float) -> list[Run]:
        luck = np.random.default_rng(int(end * 100))
        scores = [[end + NOISE[i] - 2 * (1 - at) ** 2 + 0.05 * luck.normal() for at in LOOKS] for i in range(5)]
        return [
            Run(values, seconds * (1 + 0.03 * luck.normal()), start=200 * i + 2 * seconds)
            for i, values in enumerate(scores)
        ]

    return tables({"forward": runs(19.5, 10), "okd": runs(20.4, 16), "gkd": runs(20.3, 40)})


@pytest.fixture(scope="module")
def page() -> str:
    return html.unescape(make_report(study(), three_arms(), {}).html)


def verdicts(of: Study, found: Tables) -> list[Verdict]:
    judged = judge(of.claims, found.results, found.trials, default_phase="distil", slot=of.slot)
    return list(judged.values())


def test_the_report_shows_both_parts_and_the_equal_reading(page: str) -> None:
    judged = verdicts(study(), three_arms())
    part = judged[1].cost_parts[0]
    assert part.found.interval is not None
    ratio, low, high = (f"{x:.3f}" for x in (part.found.ratio, *part.found.interval))
    assert f"×{ratio} [{low}, {high}] time" in page
    assert [v.verdict for v in judged] == ["supported", "supported", "refuted", "supported"]
    assert judged[2].holds == Scope.BY_COST and page.count("by its cost") >= 1
    assert "okd is better than gkd at equal device time" in page
    assert "okd is no worse than gkd by more than 0.5, with less device time; rougeL of student on test" in page
    assert "'gkd' was evaluated mid-schedule (at 0.25 of its budget)" in page
    assert "rougeL on test (↑ better), at equal device time" in page and "device time, teacher included (s)" in page
    assert page == html.unescape(make_report(study(), three_arms(), {}).html)


def test_the_report_has_a_section_on_time_to_equal_quality(page: str) -> None:
    section = page[page.index(">Time to equal quality</h2>") :]
    section = section[: section.index("</section>")]
    assert "Timing conditions: one trial at a time per node, on one node (here)" in section
    assert section.count("rougeL of gkd") == 2 and section.count("seed 0: not reached by") == 2
    found = three_arms()
    at = MetricQuery("distil", "student", "rougeL", ("ask",))
    got = time_to_equal_quality(found.results, found.trials, ("okd", "gkd"), (at, at))
    assert got is not None and got.median is not None and f"{got.median:.3g} s" in section
    back = study({"back": {"arm": "forward", "against": "okd", **LESS}})
    never = text_of(time_to_quality(found, verdicts(back, found)))
    assert never.count(": not reached by") == 5 and "| 5 | 0 | not reached |" in never
    assert time_to_quality(found, verdicts(study({"plain": {"against": "forward"}}), found)) is None


def text_of(section: Section | None) -> str:
    assert section is not None
    return "\n".join(map(as_markdown, section.blocks))


def test_sections_on_cost_bear_tables_in_which_nothing_has_ended() -> None:
    found = three_arms()
    running = Tables(found.results, found.trials.assign(status="running", phases="{}", ended=np.nan))
    for tables in (Tables(found.results.head(0), found.trials.head(0)), running):
        judged = verdicts(study(), tables)
        for section in (costs_compared(judged), time_to_quality(tables, judged)):
            assert section is None or not re.search(r"\bnan\b", text_of(section))
    nothing = Tables(found.results.head(0), found.trials.head(0))
    assert text_of(time_to_quality(nothing, verdicts(study(), nothing))) == "No seed of these arms has ended yet."


def test_advice_does_not_take_no_worse_for_better() -> None:
    level = study({"cheap": {"against": "gkd", **LESS}})

    def advised(found: Tables) -> str:
        given = advice(level, found, point_scores(level, found), verdicts(level, found))
        return f"{given.lead} {given.facts}"

    text = advised(three_arms())
    assert "no claim shows an advantage, but claim 1 (okd is no worse than gkd by more than 0.5, with less" in text
    slow = [run._replace(seconds=s) for run, s in zip(flat(20.2, seconds=1), SLOW, strict=True)]
    fast = [run._replace(seconds=s) for run, s in zip(flat(20, seconds=1, spread=1.0), FAST, strict=True)]
    text = advised(tables({"forward": flat(1, seconds=9), "okd": fast, "gkd": slow}))
    assert "gkd has the best mean on dev" in text
    assert "claim 1: okd is no worse than gkd by more than 0.5, with less device time" in text


def test_the_plan_says_what_is_judged() -> None:
    lines = claim_lines(study())
    assert lines == [
        "in_time: okd is better than gkd at equal device time (rougeL of student on test)",
        "cheap: okd is no worse than gkd by more than 0.5, with less device time (rougeL of student on test)",
        "dear: okd is better than forward, with less device time (rougeL of student on test)",
        "plain: okd is better than forward (rougeL of student on test)",
        "device time is judged: trials side by side on a device slow each other; give it one slot",
    ]
    assert len(claim_lines(study(slot={"gpus": 1}))) == 4
    early = claim_lines(study({"early": {"against": ["gkd", "forward"], "at": 0.25, "margin": 0.2}}))
    assert early == [
        "early: okd is better than gkd and forward by more than 0.2 (rougeL of student on test at 0.25 of the budget)"
    ]


@pytest.mark.parametrize(
    ("fields", "wants"),
    [
        ({"at": "end"}, "from 0 to 1, or 'equal'"),
        ({"at": 1.5}, "from 0 to 1, or 'equal'"),
        ({"at": True}, "from 0 to 1, or 'equal'"),
        ({"at": "equal", "less": "flops"}, "so no cost can be `less`"),
        ({"less": "money"}, "'student_tokens', 'flops' or 'device_seconds'"),
        ({"margin": math.inf}, "finite"),
    ],
)
def test_a_claim_about_cost_is_checked(fields: dict[str, Any], wants: str) -> None:
    with pytest.raises(ValueError, match=wants):
        claim(**fields)


def test_new_data_are_asked_for_the_quality_alone() -> None:
    found = timed(FAST, SLOW, gain=1.0)
    draw, rows = np.random.default_rng(0), []
    for row in found.results[(found.results["progress"] == 1) & (found.results["split"] == "test")].to_dict("records"):
        scores = row["value"] + 0.1 * draw.normal(size=100)
        about = {
            k: row[k] for k in ("trial", "point", "arm", "seed", "kind", "planned", "model", "phase", "task", "split")
        }
        prediction = scores - scores.mean() + row["value"]
        rows.append(pd.DataFrame({**about, "part": 0, "example": range(100), "label": np.nan, "prediction": prediction, "loss": 1.0, "count": 1, "cluster": range(100)}))  # fmt: skip
    judged = verdict_of(found, claim(**LESS), examples=pd.concat(rows))
    assert (judged.verdict, judged.holds) == ("supported", Scope.NEW_DATA)


def test_what_is_scored_at_the_end_alone_cannot_be_read_on_the_way(tmp_path: Path) -> None:
    data: dict[str, Any] = {"ask": {"kind": "python_instructions", "tokenizer": {"kind": "wordpiece", "size": 1024}}}
    columns = {"prompt": "q", "response": "a"}
    data["more"] = {**data["ask"], "kind": "instruction_files", "train": "more.jsonl", "columns": columns}
    distil = {**TRIAL["phases"]["distil"], "streams": {"main": {"data": "ask"}}, "eval_only": ["more"]}
    trial = {
        "data": data,
        "models": {"student": {"family": "llama", "layers": 1, "width": 16}},
        "phases": {"distil": distil},
    }

    def said(*, objective: Any = (("task", "ask"),), **fields: Any) -> str:
        about = {"arm": "okd", "against": "gkd", "model": "student", "metric": "rougeL", **fields}
        raw = {"question": "?", "trial": trial, "arms": {"okd": {}, "gkd": {"phases.distil.batch": 3}}, "seeds": 2}
        raw["claims"] = {"c": about}
        raw["objective"] = {"phase": "distil", "model": "student", "metric": "rougeL", "mode": "max", **dict(objective)}
        file = tmp_path / "okd.yaml"
        file.write_text(json.dumps(raw))
        try:
            load_study(file)
        except StudyError as error:
            return str(error)
        return ""

    for fields in (EQUAL, {"task": "more", **EQUAL}, {"task": ["ask", "more"], "at": 0.5}):
        assert "more (of eval_only) is scored at the end only" in said(**fields)
        assert said(**fields).endswith("name a task that is scored before the end: ask")
    unnamed = said(objective=(), task="ask")
    assert "objective: more (of eval_only) is scored on test only" in unnamed and unnamed.endswith("`task: ask`")
    assert not any(said(**f) for f in ({"task": "ask", **EQUAL}, {"task": "more"}, LESS, {"at": 0.5, "task": "ask"}))
