"""Claims about scaling on tables whose curves are known: the answers, their verdicts, and what leaves them open."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.known_curves import PHASES, SIZES, TOKENS, Known, known_curves
from orchestrator.analysis.notes import Kind
from orchestrator.analysis.scaling import fit_law, law
from orchestrator.analysis.statistics import holm
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict, judge, judge_study
from orchestrator.notebook import Results
from orchestrator.reporting.claim_lines import claim_lines
from orchestrator.reporting.notes import note_text
from orchestrator.reporting.page import make_report
from orchestrator.reporting.scaling_section import scaling
from orchestrator.study.claims import Claim, Crossing
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study


def drawn(seed: int = 0, along: str = "r", **how: float) -> Known:
    return known_curves(np.random.default_rng(seed), along, **how)  # type: ignore[arg-type]


R, COMPUTE = drawn(), drawn(along="compute")
HELPS, HARMS = drawn(at=0.6), drawn(at=-0.6)  # throughout what is measured


def kinds(verdict: Verdict) -> set[Kind]:
    return {note.kind for note in verdict.notes}


# ------------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("theta", [(3.0, 0.4, 1.0, 0.5, 0.45), (1.8, 1.2, 0.3, 0.25, 0.9)])
def test_the_coefficients_of_a_known_law_are_recovered(theta: tuple[float, ...]) -> None:
    """From losses without noise, and by a refit from another optimum."""
    grid = [(math.log(n / 57e3), math.log(d / 1e5)) for n in SIZES for d in TOKENS]
    sizes, tokens = np.array(grid).T
    losses = law(np.log(theta), sizes, tokens)
    assert losses[0] == pytest.approx(
        theta[0] + theta[1] * (SIZES[0] / 57e3) ** -theta[3] + theta[2] * (0.3) ** -theta[4]
    )
    found = fit_law(sizes, tokens, losses)
    assert np.exp(found) == pytest.approx(theta, rel=1e-3)
    assert np.exp(fit_law(sizes, tokens, losses, found + 0.1)) == pytest.approx(theta, rel=1e-3)


def test_one_loss_that_is_far_off_moves_the_law_little() -> None:
    sizes, tokens = np.array([(math.log(n / 57e3), math.log(d / 1e5)) for n in SIZES for d in TOKENS]).T
    losses = law(np.log([3.0, 0.4, 1.0, 0.5, 0.45]), sizes, tokens)
    off = np.where(np.arange(len(losses)) == 7, 1.3 * losses, losses)
    again = law(fit_law(sizes, tokens, off), sizes, tokens)
    assert np.abs(again / losses - 1).max() < 0.02


@pytest.mark.parametrize("along", ["r", "compute"])
def test_a_known_crossing_is_recovered(along: str) -> None:
    known = drawn(along=along, noise=1e-6)
    (estimate,) = known.judge(crossing=along, below=1).estimates
    assert estimate.value == pytest.approx(known.crossing, rel=0.002)
    slopes = [value for value, _ in known.judge(crossing=along, below=1).curve.coefficients.values()]  # type: ignore[union-attr]
    assert slopes[2:] == pytest.approx((0.2, 0.05) if along == "r" else (0.004, 0.05), rel=0.02)


def test_the_losses_of_a_held_out_size_are_foretold() -> None:
    known = drawn(noise=1e-6)
    verdict = known.judge(foretells={"hold_out": "largest"}, error_below=0.005)
    assert verdict.verdict == "supported"
    assert [estimate.value for estimate in verdict.estimates] == pytest.approx(known.losses, rel=1e-3)
    assert [estimate.against for estimate in verdict.estimates] == pytest.approx(known.losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["r", "compute", "loss"])
def test_intervals_have_the_truth_inside(what: str) -> None:
    """Of 14 tables at least 11: fewer have a chance of 0.4 % where the coverage is 95 %."""
    tables = (drawn(seed, "compute" if what == "compute" else "r") for seed in range(14))
    assert sum(known.covers(what) for known in tables) >= 11  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(("known", "along", "far"), [(R, "r", 1.2), (COMPUTE, "compute", 3.0)])
def test_a_bound_away_from_the_crossing_is_decided(known: Known, along: str, far: float) -> None:
    asked = {("below", far): "supported", ("below", 1 / far): "refuted", ("above", far): "refuted", ("above", 1 / far): "supported"}  # fmt: skip
    for (side, ratio), expected in asked.items():
        assert known.judge(**{"crossing": along, side: known.crossing * ratio}).verdict == expected, (side, ratio)
    near = known.judge(crossing=along, below=known.crossing)
    assert near.verdict == "undecided" and near.leans != "undecided"


def test_a_crossing_that_is_not_reached_is_an_answer() -> None:
    for known, side, holds in ((HELPS, "above", "helps"), (HARMS, "below", "harms")):
        verdict = known.judge(**{"crossing": "r", side: 1.0})
        (estimate,) = verdict.estimates
        assert verdict.verdict == "supported" and estimate.value is None
        assert (math.isinf(estimate.interval[1]), estimate.interval[0] == 0) == (holds == "helps", holds == "harms")
        assert any(note_text(note).startswith(f"r* is not reached: the teacher {holds}") for note in verdict.notes)
        assert re.search(rf"r\* not reached: {side} [\d.]+ times the bound 1$", answer_line(verdict))


def answer_line(verdict: Verdict) -> str:
    (line,) = claim_lines([verdict])
    return " ".join([line.says, *(part.summary for part in line.parts)])


@pytest.mark.parametrize(
    ("known", "bound", "side"), [(HELPS, 3.0, "above"), (HARMS, 0.2, "above"), (HELPS, 3.0, "below")]
)
def test_nothing_is_read_outside_what_was_measured(known: Known, bound: float, side: str) -> None:
    verdict = known.judge(**{"crossing": "r", side: bound})
    assert verdict.verdict == "undecided" and Kind.OUTSIDE in kinds(verdict)


def test_a_bound_outside_is_decided_where_the_crossing_lies_on_its_near_side() -> None:
    assert HARMS.judge(crossing="r", below=3.0).verdict == "supported"
    assert HELPS.judge(crossing="r", below=0.2).verdict == "refuted"


def test_a_size_that_departs_from_the_law_refutes_it() -> None:
    largest = R.results["arm"].eq("alone3") & R.results["metric"].eq("lm_loss")
    worse = dataclasses.replace(
        R, results=R.results.assign(value=R.results["value"].where(~largest, 1.2 * R.results["value"]))
    )
    assert worse.judge(foretells={}, error_below=0.02).verdict == "refuted"
    assert worse.judge(foretells={}, error_below=0.9).verdict == "supported"
    assert R.judge(foretells={"hold_out": "alone0"}, error_below=0.2).estimates[0].name == "alone0 d0, foretold"


def test_a_run_that_failed_leaves_the_claim_open() -> None:
    lost = R.trials["trial"].eq("poor1-2")
    trials = R.trials.assign(status=R.trials["status"].where(~lost, "failed"))
    results = R.results[~R.results["trial"].eq("poor1-2")]
    verdict = dataclasses.replace(R, trials=trials, results=results).judge(crossing="r", below=R.crossing * 1.2)
    assert verdict.verdict == "undecided" and Kind.LOST_RUNS in kinds(verdict) and not verdict.estimates
    assert (
        dataclasses.replace(R, trials=trials, results=results).judge(foretells={}, error_below=0.2).verdict
        == "supported"
    )


def test_two_seeds_decide_nothing() -> None:
    verdict = drawn(seeds=2).judge(crossing="r", below=2)
    assert verdict.verdict == "undecided" and Kind.TOO_FEW_PAIRS in kinds(verdict)


def test_too_few_values_along_an_axis_make_no_curve() -> None:
    one = COMPUTE.facts.grids["c"]
    few = dataclasses.replace(
        one,
        trained={arm: {"d0": of["d0"]} for arm, of in one.trained.items() if arm[-1] in "01"},
        alone_of={arm: other for arm, other in one.alone_of.items() if arm[-1] in "01"},
        teacher={arm: teacher for arm, teacher in one.teacher.items() if arm[-1] in "01"},
    )
    facts = dataclasses.replace(COMPUTE.facts, grids={"c": few})
    verdict = dataclasses.replace(COMPUTE, facts=facts).judge(crossing="compute", below=1e10, phases=("d0",))
    assert verdict.verdict == "undecided" and Kind.NO_CURVE in kinds(verdict)


def test_all_kinds_of_claims_share_one_family() -> None:
    bound = R.crossing * 1.2
    claims = {
        "c": Crossing(crossing="r", below=bound, model="m", metric="lm_loss", phases=PHASES),
        "other": Claim(arm="poor0", against="poor1", phase="d0", model="m", metric="lm_loss"),
    }
    both, each = (
        [
            verdict
            for part in parts
            for verdict in judge(part, R.results, R.trials, default_phase="d4", tasks=R.facts).values()
        ]
        for parts in ([claims], [{name: claim} for name, claim in claims.items()])
    )
    assert [v.p_adjusted for v in both] == pytest.approx(holm([v.p_adjusted for v in each]))
    assert both[0].verdict == "supported"


# ------------------------------------------------------------------------------------------------------------- report


def test_the_report_shows_estimates_curves_and_coefficients() -> None:
    verdicts = [R.judge(crossing="r", below=R.crossing * 1.2), R.judge(foretells={}, error_below=0.05)]
    section = scaling(verdicts)
    assert section is not None
    captions = [block.caption for block in section.blocks if not isinstance(block, str) and block.kind == "table"]
    assert [caption.partition(":")[2].split(";")[0] for caption in captions] == [" estimates", " coefficients"] * 2
    assert captions[0].startswith("1. c: estimates; p by Holm 0.00")
    drawings = [block for block in section.blocks if not isinstance(block, str) and block.kind == "drawing"]
    assert len({drawing.svg[:400] for drawing in drawings}) == 2 and all("r* 1.0" in d.alt for d in drawings[:1])
    lines = claim_lines(verdicts)
    assert lines[0].parts[0].summary.startswith("r* 1.0") and len(lines[1].parts) == len(PHASES)
    assert lines[1].parts[0].against_mean == "4.96" or lines[1].parts[0].against_mean.startswith("4.9")

    assert scaling([]) is None


@pytest.mark.slow
def test_the_shipped_study_is_judged_and_reported_from_its_tables() -> None:
    """Losses that a law and a gain along r give to the arms of the study, with the tokens of trunks and decays."""
    study = load_study(Path(__file__).parents[2] / "search_spaces/scaling.yaml")
    tables = drawn_tables(study, np.random.default_rng(0))
    verdicts = {verdict.name: verdict for verdict in judge_study(study, tables)}
    (crossing,) = verdicts["weak_helps"].estimates
    assert crossing.value == pytest.approx(1.05, rel=0.01)
    assert [str(verdict.verdict) for verdict in verdicts.values()][::2] == ["supported", "supported"]
    report = make_report(study, tables, {})
    assert ">Scaling</h2>" in report.html and "## Scaling" in report.markdown
    assert any("(r* 1.04, ×1.04 [1.04, 1.05] of the bound 1)" in line for line in report.summary.lines), (
        report.summary.lines
    )
    assert Results(study, tables).claims.set_index("claim").loc["weak_helps", "effect"] == crossing.value


def drawn_tables(study: Study, rng: np.random.Generator) -> Tables:
    steps = {name: phase["budget"]["steps"] for name, phase in study.trial["phases"].items()}
    row = {"study": study.name, "kind": "trial", "planned": True, "split": "test", "progress": 1.0, "task": "corpus"}
    row |= {"step": 1, "seconds": 1.0, "device_seconds": 1.0, "t": 0}
    rows, trials = list[dict[str, Any]](), list[dict[str, Any]]()
    for arm, seed in itertools.product(study.arms, range(study.seeds)):
        spec, whose = (
            study.spec(arm=arm, seed=seed).pruned(),
            {"trial": f"{arm}{seed}", "arm": arm, "point": arm, "seed": seed},
        )
        size, teacher = 1000.0 * (spec.models["student"].width or 0), {"good": 4.2, "poor": 5.6}.get(arm.split("_")[0])
        done = {name: {"key": f"{arm}{name}{seed}", "reused": False, "tokens": 1024 * n, "flops": 6e3 * size * n,
                       "seconds": 1.0, "device_seconds": 1.0} for name, n in steps.items() if name in spec.phases}  # fmt: skip
        trials.append(
            {**row, **whose, "status": "ended", "phases": json.dumps(done), "params": "{}", "peak_memory": 1e9}
        )
        for name in done:
            if name == "teach":
                rows.append(
                    {
                        **row,
                        **whose,
                        **done[name],
                        "phase": name,
                        "model": "teacher",
                        "metric": "lm_loss",
                        "value": teacher,
                    }
                )
                continue
            tokens = 1024 * (steps[name] * (6 if name != "trunk" else 1))  # a decay takes a fifth of its trunk's steps
            alone = 3 + 0.4 * (size / 3e4) ** -0.5 + (tokens / 1e5) ** -0.3
            gain = 0.0 if teacher is None else -0.5 * math.log(teacher / alone / 1.05)
            value = (alone - gain) * math.exp(rng.normal(0, 0.002))
            rows.append(
                {**row, **whose, **done[name], "phase": name, "model": "student", "metric": "lm_loss", "value": value}
            )
            rows.append({**rows[-1], "split": "dev"})
            rows.append({**rows[-2], "split": "system", "metric": "parameters", "value": size})
    return Tables(pd.DataFrame(rows), pd.DataFrame(trials))
