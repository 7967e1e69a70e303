"""The report against tables made by hand: every number of a claim's line is computed here a second time."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML
from scipy import stats

from orchestrator.analysis import tables as tables_
from orchestrator.analysis.curves import point_scores, task_facts
from orchestrator.analysis.notes import Scope
from orchestrator.analysis.statistics import Chance
from orchestrator.analysis.tables import RESULTS, TRIALS, Tables
from orchestrator.analysis.verdicts import judge
from orchestrator.report import main
from orchestrator.reporting.notes import SCOPE
from orchestrator.reporting.page import Report, make_report
from orchestrator.study.claims import Claim
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from trainables.metrics.task_scores import scores
from trainables.storage.files import Storage

STUDY = """
question: When does distilling from a weak teacher help a bigger student?
trial:
  data: {kind: python_docs, tokenizer: {kind: wordpiece, size: 1024}, length: 64}
  models:
    teacher: {family: bert, layers: 2, width: 64}
    student: {family: bert, layers: 4, width: 64}
  phases:
    teach:
      train: {teacher: full}
      budget: {steps: 1200}
      batch: 8
      optimizer: {lr: 3e-3}
      terms: {teacher_hard: {kind: cross_entropy, of: teacher}}
    distil:
      train: {student: full}
      budget: {steps: 400}
      batch: 8
      optimizer: {lr: 3e-3}
      terms:
        student_hard: {kind: cross_entropy, of: student}
        teacher_to_student: {kind: forward_kl, from: teacher, to: student, weight: 1, tau_squared: false}
objective: {phase: distil, model: student, metric: mlm_loss, mode: min, minus: alone}
arms:
  alone: {phases.distil.terms.teacher_to_student.weight: 0}
  good: {}
  too_weak: {phases.teach.budget.steps: 100}
seeds: 5
tune: {grid: {phases.distil.optimizer.lr: [1e-3, 3e-3, 1e-2]}}
vary:
  phases.distil.terms.teacher_to_student.weight: {choice: {normal: 1, strong: 4}}
  sizes: {choice: {2_to_4: {models.teacher.layers: 2, models.student.layers: 4}, 1_to_4: {models.teacher.layers: 1, models.student.layers: 4}}}
  phases.distil.terms.teacher_to_student.temperature: {float: [1, 4], log: true}
search: {sampler: tpe, points: 12}
confirm: {against: alone, seeds: 5}
claims:
  good_teacher_helps: {says: A good teacher helps, arm: good, against: alone, model: student, metric: mlm_loss, paper: "+1.44 GLUE"}
  too_weak_hurts: {arm: alone, against: too_weak, model: student, metric: mlm_loss, paper: -0.02}
  accurate: {says: A good teacher helps accuracy early, arm: good, against: alone, model: student, metric: mlm_accuracy, at: 0.25, paper: "not reported"}
profiles: {laptop: {}}
"""
WEIGHT, TEMPERATURE = (f"phases.distil.terms.teacher_to_student.{what}" for what in ("weight", "temperature"))
LR = "phases.distil.optimizer.lr"
LOOKS = (0.25, 0.5, 0.75, 1.0)
TEACHER = {"alone": None, "good": 3.05, "too_weak": 3.9}


def cost(flops: float, seconds: float, tokens: int) -> dict[str, Any]:
    return {"flops": flops, "seconds": seconds, "device_seconds": seconds, "tokens": tokens}


class Maker:
    """Makes the two tables a trial at a time."""

    def __init__(self, study: Study) -> None:
        self.study, self.rng = study, np.random.default_rng(7)
        self.results: list[dict[str, Any]] = []
        self.trials: list[dict[str, Any]] = []

    def trial(self, point: str, arm: str | None, seed: int, kind: str = "trial", *, status: str = "ended",
              loss: float = 3.2, teacher: float | None = 3.05, params: dict[str, Any] | None = None,
              reason: str | None = None, planned: bool = True) -> str:  # fmt: skip
        name = f"{len(self.trials):012x}"
        whose = {"study": self.study.folder, "trial": name, "point": point, "arm": arm, "seed": seed, "kind": kind}
        whose["planned"] = planned
        phases: dict[str, Any] = {}
        if teacher is not None:
            before = cost(9e9, 30.0, 600_000)
            phases["teach"] = {"key": f"t{teacher:g}-{seed}", "reused": point != "good", **before}
            self._look(whose, "teach", "teacher", 1.0, teacher + 0.01 * np.sin(seed), 1200, before)
        for at in {"ended": LOOKS, "stopped": LOOKS[:2], "failed": LOOKS[:1], "running": LOOKS[:2]}[status]:
            here = loss + 1.5 * (1 - at) ** 2 + 0.004 * self.rng.normal()
            self._look(whose, "distil", "student", at, here, round(400 * at), cost(5e9 * at, 14 * at, int(2e5 * at)))
        if status == "ended":
            phases["distil"] = {"key": f"d{name}", "reused": False, **cost(5e9, 14.0, 200_000)}
        row = {"params": json.dumps(params or {}), "status": status, "reason": reason, "attempts": 1, "node": "here"}
        row |= {"started": 1, "ended": 2, "phases": json.dumps(phases), "peak_memory": 4e8}
        row |= {"upstream_flops": 9e9 if teacher else 0.0, "upstream_seconds": 30.0 if teacher else 0.0}
        self.trials.append({**whose, **row})
        return name

    def _look(self, whose: dict[str, Any], phase: str, model: str, at: float, loss: float, step: int,
              spent: dict[str, Any]) -> None:  # fmt: skip
        about = {"model": model, "phase": phase, "task": "corpus", "step": step, "progress": at, "t": 1, **spent}
        for split, shift in (("dev", 0.0), ("test", 0.02)):
            for metric, value in (("mlm_loss", loss + shift), ("mlm_accuracy", 100 * np.exp(-(loss + shift) / 2))):
                self.results.append({**whose, **about, "split": split, "metric": metric, "value": value})

    def tables(self) -> Tables:
        results = pd.DataFrame(self.results, columns=RESULTS.names)
        return Tables(results, pd.DataFrame(self.trials, columns=TRIALS.names))


def study_of(folder: Path, text: str = STUDY, **options: Any) -> Study:
    file = folder / "dwt.yaml"
    file.write_text(text)
    return load_study(file, **options)


def arms(maker: Maker, seeds: int = 5, **losses: float) -> None:
    for arm, loss in {"alone": 3.20, "good": 3.15, "too_weak": 3.206, **losses}.items():
        for seed in range(seeds):
            of_seed = 0.02 * np.random.default_rng(seed).normal()
            maker.trial(arm, arm, seed, loss=loss + of_seed, teacher=TEACHER[arm])


def search(maker: Maker, points: int = 12) -> None:
    """The first point failed, the second was stopped with what would be the best score by far."""
    for rate, loss in ((1e-3, 3.31), (3e-3, 3.2), (1e-2, 3.26)):
        for arm in ("alone", "good", "too_weak"):
            maker.trial(arm, arm, 1000, "tune", loss=loss, params={LR: rate}, teacher=TEACHER[arm])
        for sizes in ("2_to_4", "1_to_4"):
            params = {LR: rate, "sizes": sizes}
            maker.trial("alone", "alone", 1000, "tune", loss=loss - 0.01, params=params, teacher=None)
    for i in range(points):
        weight, sizes = ("normal", "strong")[i % 2], ("2_to_4", "1_to_4")[i // 2 % 2]
        temperature = 4 ** (i / max(1, points - 1))
        loss = 3.16 - 0.03 * (weight == "strong") + 0.01 * (sizes == "1_to_4") + 0.01 * abs(temperature - 2)
        status, reason = {0: ("failed", "out of memory: asked for 3.1 GiB"), 1: ("stopped", None)}.get(
            i, ("ended", None)
        )
        params = {WEIGHT: weight, "sizes": sizes, TEMPERATURE: temperature}
        loss = 2.0 if status == "stopped" else loss
        maker.trial(f"p{i:03d}", None, 1000, loss=loss, status=status, reason=reason, params=params)


def confirm(maker: Maker, winner: str, at_cost: float = 3.17) -> None:
    params = next(json.loads(t["params"]) for t in maker.trials if t["point"] == winner)
    for seed in range(2000, 2005):
        of_seed = 0.02 * np.random.default_rng(seed).normal()
        maker.trial(winner, None, seed, "confirm", loss=3.145 + of_seed, params=params)
        maker.trial("alone", "alone", seed, "confirm", loss=3.19 + of_seed, teacher=None, params={LR: 3e-3})
        maker.trial(
            f"alone at cost of {winner}",
            "alone",
            seed,
            "confirm",
            loss=at_cost + of_seed,
            teacher=None,
            params={LR: 3e-3},
        )


def whole(study: Study, points: int = 12) -> Tables:
    maker = Maker(study)
    arms(maker)
    search(maker, points)
    scores = point_scores(study, maker.tables())
    confirm(maker, str(scores.sort_values("score")["point"].iloc[0]))
    maker.trial("old", "old", 0, planned=False)
    maker.trial("old", "old", 1, planned=False)
    return maker.tables()


PROVENANCE = {"commit": "3f9c2ab", "versions": "torch 2.12.1", "device": "cpu"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_of(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def tables(study: Study) -> Tables:
    return whole(study)


@pytest.fixture(scope="module")
def report(study: Study, tables: Tables) -> Report:
    return make_report(study, tables, PROVENANCE)


class _Text(HTMLParser):
    """The text of each cell of each table, row by row; and every tag that stands in the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()


def claim_rows(page: str) -> list[list[str]]:
    table = page[page.index('<table id="claims"') :]
    return _Text(table[: table.index("</table>")]).rows[1:]


def rows_with(page: str, *words: str) -> list[list[str]]:
    return [row for row in _Text(page).rows if all(any(word in cell for cell in row) for word in words)]


def numbers(text: str) -> list[float]:
    return [float(n.replace("−", "-")) for n in re.findall(r"[+−]?\d+(?:\.\d+)?", text)]


def values(tables: Tables, arm: str, metric: str, split: str, at: float, kind: str = "trial") -> np.ndarray:
    r = tables.results
    keep = (r["arm"] == arm) & (r["metric"] == metric) & (r["split"] == split) & (r["progress"] == at)
    keep &= (r["kind"] == kind) & (r["model"] == "student") & r["planned"].astype(bool)
    return r[keep].sort_values("seed")["value"].to_numpy()


# -------------------------------------------------------------------------------------------------- the first screen


def test_every_number_of_a_claims_line_is_that_of_the_tables(tables: Tables, report: Report) -> None:
    lines = claim_rows(report.html)
    asked = [
        ("good", "alone", "mlm_loss", 1.0),
        ("alone", "too_weak", "mlm_loss", 1.0),
        ("good", "alone", "mlm_accuracy", 0.25),
    ]
    assert len(lines) == len(asked)
    for line, (arm, against, metric, at) in zip(lines, asked, strict=True):
        a, b = (values(tables, side, metric, "test", at) for side in (arm, against))
        d = a - b
        half = stats.t.ppf(0.975, 4) * d.std(ddof=1) / np.sqrt(5)
        _, _, _, arm_cell, against_cell, effect_cell, _, n, _ = line
        places = 1 - np.floor(np.log10(half))  # two digits of the interval's half width
        expected = [d.mean(), d.mean() - half, d.mean() + half]
        assert numbers(effect_cell) == pytest.approx(expected, abs=0.5 * 10**-places + 1e-9)
        assert [numbers(arm_cell)[0], numbers(against_cell)[0]] == pytest.approx(
            [a.mean(), b.mean()], abs=0.5 * 10**-places + 1e-9
        )
        assert n == "5"
        assert arm_cell.endswith(arm)
        assert against_cell.endswith(against)
    p = [
        stats.ttest_rel(values(tables, a, m, "test", t), values(tables, b, m, "test", t)).pvalue for a, b, m, t in asked
    ]
    assert [line[2].split()[1].strip("\xa0") for line in lines] == [
        "supported" if x < 0.05 / 3 else "undecided" for x in p
    ]
    assert re.search(r"about \d+ more seeds", lines[1][2])


def test_the_paper_is_judged_apart_and_the_price_of_a_gain_is_named(report: Report) -> None:
    lines = claim_rows(report.html)
    assert lines[0][-1] == "+1.44 GLUE not comparable"
    assert lines[1][-1] == "−0.02 below our interval"
    assert "×1.00 tokens, ×2.80 compute" in lines[0][1]  # (5 + 9) / 5


def test_the_recommendation_is_the_winner_on_fresh_seeds(study: Study, tables: Tables, report: Report) -> None:
    scores = point_scores(study, tables)
    best = scores.sort_values("score").iloc[0]
    card = html.unescape(report.html[report.html.index('id="recommendation"') : report.html.index("</aside>")])
    assert f"Use {best['point']}" in card
    r = tables.results[
        (tables.results["kind"] == "confirm")
        & (tables.results["progress"] == 1)
        & (tables.results["model"] == "student")
    ]
    r = r[(r["metric"] == "mlm_loss") & (r["split"] == "test")].sort_values("seed")
    d = r[r["arm"].isna()]["value"].to_numpy() - r[r["point"] == "alone"]["value"].to_numpy()
    shown = numbers(re.search(r"<dt>difference</dt><dd>(.*?)</dd>", card)[1])  # type: ignore[index]
    half = stats.t.ppf(0.975, 4) * d.std(ddof=1) / np.sqrt(5)
    assert shown[:3] == pytest.approx([d.mean(), d.mean() - half, d.mean() + half], abs=1e-3)
    assert numbers(re.search(r"<dt>selected on dev</dt><dd>(.*?)</dd>", card)[1])[0] == pytest.approx(
        best["score"], abs=1e-3
    )  # type: ignore[index]
    assert "optimistic" in card
    assert numbers(re.search(r"<dt>shrinkage</dt><dd>(.*?)</dd>", card)[1])[0] == pytest.approx(
        best["score"] - d.mean(), abs=1e-3
    )  # type: ignore[index]
    run = re.search(r"--trial (\w+) --model student", card)[1]  # type: ignore[index]
    row = tables.trials.set_index("trial").loc[run]
    assert (row["kind"], row["point"]) == ("confirm", best["point"])


def test_scale_and_counts_come_from_the_study_and_the_tables(report: Report) -> None:
    page = html.unescape(report.html)
    assert "laptop profile, teacher 2×64 or 1×64, student 4×64" in page
    assert "57 trials: 55 ended, 1 stopped, 1 failed, 0 running; 2 no longer planned" in page
    assert "Results at this scale may not transfer to larger models." in page


def test_the_markdown_has_the_same_verdict_lines(report: Report) -> None:
    table = report.markdown[report.markdown.index("**Claims**") :].splitlines()[4:7]
    for line, row in zip(claim_rows(report.html), table, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert numbers(" ".join(line[3:6])) == numbers(" ".join(c for i, c in enumerate(cells) if i in (3, 4, 5, 6)))
        assert cells[2].split()[0] in line[2]
        assert cells[-1] == line[-1]


# -------------------------------------------------------------------------------------------------- quality and cost

ONE = "objective: {phase: distil, model: student, metric: mlm_loss, mode: min, minus: alone}"
TWO = (
    "objective: [{phase: distil, model: student, metric: mlm_loss, mode: min, minus: alone}, {metric: COST, mode: min}]"
)


def asking(folder: Path, cost: str, bound: str = "flops, at_most: 2e10", within: float = 0.1) -> Study:
    text = STUDY.replace(ONE, TWO.replace("COST", cost)).replace(
        "points: 12}", f"points: 12, constraints: [{{metric: {bound}}}]}}"
    )
    return study_of(
        folder, text.replace("seeds: 5\ntune", f"good_enough: {{within: {within}, cost: {cost}}}\nseeds: 5\ntune")
    )


def test_the_page_shows_quality_beside_cost_and_names_the_cheapest_good_enough_arm(tmp_path: Path) -> None:
    study = asking(tmp_path, "flops")
    tables = whole(study, 32)
    report = make_report(study, tables, PROVENANCE, importance={WEIGHT: 1.0}, others={"FLOPs": {WEIGHT: 0.25}})
    assert rows_with(report.html, "teacher_to_student weight", "1.00")
    assert rows_with(report.html, "teacher_to_student weight", "0.25") and "for FLOPs" in report.html
    line = next(line for line in report.summary.lines if "cheapest" in line)
    assert line.startswith("alone is the cheapest arm shown to be no worse than the best arm by 0.1 mlm_loss: 5")
    assert "×0.36 those of good, the best by its mean (simultaneous one-sided 95 % over 3 arms, 5 seeds)" in line
    section = report.html[report.html.index("Quality and cost</h2>") :]
    section = section[: section.index("</section>")]
    assert line in html.unescape(section) and line in html.unescape(report.html[: report.html.index("<nav")])
    assert "<script" not in section and '<svg style="max-width: 560px"' in section
    test = {arm: values(tables, arm, "mlm_loss", "test", 1.0).mean() for arm in study.arms}
    rows = {row[0]: row for row in rows_with(section, " ± ") if row[0] != "arm"}
    assert {arm: numbers(row[2])[0] for arm, row in rows.items()} == pytest.approx(test, abs=1e-3)
    assert {arm: row[4] for arm, row in rows.items()} == {"alone": "yes", "good": "yes", "too_weak": ""}
    assert [row[-1] for row in rows_with(report.html, "−0.0", "14\u202fG")].count(
        "yes"
    ) == 1  # of equal FLOPs, the best
    assert "Quality and cost" in report.markdown and line.split(":")[0] in report.markdown.replace("\\", "")
    assert "cheapest" not in make_report(study_of(tmp_path), tables, PROVENANCE).html


def test_times_of_trials_that_shared_a_device_name_no_cheapest_arm(tmp_path: Path) -> None:
    study = asking(tmp_path, "device_seconds")
    (line,) = (text for text in make_report(study, whole(study), PROVENANCE).summary.lines if "Cheapest" in text)
    assert line.endswith("not told, as trials shared a device, which makes times of arms incomparable.")


def test_points_beyond_a_constraint_are_neither_listed_nor_recommended(tmp_path: Path) -> None:
    study = asking(tmp_path, "flops", bound="mlm_loss, at_most: 3.15")
    maker = Maker(study)
    arms(maker)
    search(maker)
    tables = maker.tables()
    scores = point_scores(study, tables)
    assert 0 < scores["feasible"].sum() < (scores["status"] == "ended").sum()
    assert list(scores.columns)[-4:] == ["score", "score_1", "status", "feasible"]
    page = make_report(study, tables, PROVENANCE).html
    listed = {row[0] for row in rows_with(page, "yes") + rows_with(page, "14") if re.fullmatch(r"p\d{3}", row[0])}
    assert listed == set(scores[scores["feasible"]]["point"])
    none = asking(tmp_path, "flops", bound="flops, at_most: 1")
    assert "no point of the search is within the constraints" in make_report(none, tables, PROVENANCE).html


# ------------------------------------------------------------------------------------------------------- the search


def test_a_points_score_is_its_difference_to_the_paired_baseline_of_the_same_sizes(
    study: Study, tables: Tables
) -> None:
    r = tables.results[(tables.results["split"] == "dev") & (tables.results["metric"] == "mlm_loss")]
    last = r[(r["progress"] == 1) & (r["model"] == "student")].set_index("trial")["value"]
    params = tables.trials.set_index("trial")["params"].map(json.loads)
    tuned = tables.trials[(tables.trials["kind"] == "tune") & (tables.trials["arm"] == "alone")]["trial"]
    scores = point_scores(study, tables)
    assert list(scores.columns) == ["point", "trial", "seed", *study.vary, "score", "status"]
    assert len(scores) == 12
    for row in scores.to_dict("records"):
        if row["status"] == "ended":
            base = min(last[t] for t in tuned if params[t].get("sizes") == row["sizes"])
            assert row["score"] == pytest.approx(last[row["trial"]] - base)
        else:
            assert np.isnan(row["score"])


def test_a_stopped_point_is_in_no_list_however_good_it_looked(report: Report) -> None:
    assert not rows_with(report.html, "p001")
    assert not rows_with(report.html, "p000", "−")
    assert rows_with(report.html, "p000", "out of memory", "/log.txt")


def test_below_ten_trials_a_factor_neither_importance_nor_effects_are_shown(study: Study) -> None:
    importance = {WEIGHT: 0.71, "sizes": 0.19, TEMPERATURE: 0.1}
    few = make_report(study, whole(study, 31), PROVENANCE, importance=importance, evaluator="PED-ANOVA").html
    assert few.count("29 completed trials of the search for 3 varied factors") == 2
    assert "0.71" not in few
    many = make_report(study, whole(study, 32), PROVENANCE, importance=importance, evaluator="PED-ANOVA").html
    assert "Evaluator: PED-ANOVA; n = 30 completed trials" in many
    assert rows_with(many, "teacher_to_student weight", "0.71")
    assert "Not shown" not in many


def test_equivalent_is_said_wherever_verdicts_are(study: Study, tables: Tables) -> None:
    same = Claim(arm="too_weak", against="alone", model="student", metric="mlm_loss", within=0.05)
    asked = study.model_copy(update={"claims": {"same": same, "more": same.model_copy(update={"within": None})}})
    results = tables.results.assign(
        value=tables.results["value"] + np.random.default_rng(0).normal(0, 0.003, len(tables.results))
    )
    found = make_report(asked, Tables(results, tables.trials, tables.examples), PROVENANCE)
    assert found.summary.by_claim == {"same": "equivalent", "more": "undecided"}
    assert "equivalent" in found.summary.verdicts[0] and "1 is equivalent" in found.summary.answer
    assert "equivalent on this evaluation set" in claim_rows(found.html)[0][2]
    assert "equivalent on this evaluation set" in found.markdown and "1 is equivalent" in found.markdown
    few = make_report(asked, Tables(results[results["seed"].isin([0, 1])], tables.trials, tables.examples), PROVENANCE)
    assert few.summary.by_claim["same"] == "undecided, provisional"


@pytest.mark.parametrize(("largest", "says"), [(0.8, "is no more than chance"), (0.4, "is above it")])
def test_importance_has_beside_it_what_chance_gives(study: Study, largest: float, says: str) -> None:
    importance = {WEIGHT: 0.71, "sizes": 0.19, TEMPERATURE: 0.1}
    by_chance = Chance({WEIGHT: 0.42, "sizes": 0.43, TEMPERATURE: 0.44}, largest)
    how: Any = {"importance": importance, "evaluator": "PED-ANOVA", "chance": lambda: by_chance}
    report = make_report(study, whole(study, 32), PROVENANCE, **how)
    for text in (report.html, report.markdown):
        assert f"the largest is up to {largest:.2f}; that of " in text and f"weight, 0.71, {says}." in text
    assert rows_with(report.html, "teacher_to_student weight", "0.71", "0.42")
    assert "no random sample of the space" in report.html
    few = make_report(study, whole(study, 31), PROVENANCE, importance=importance, chance=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert "Where no factor matters" not in few.html


def test_effects_are_means_of_completed_points_by_label_and_by_sizes(study: Study) -> None:
    tables = whole(study, 40)
    scores = point_scores(study, tables)
    page = make_report(study, tables, PROVENANCE).html
    for sizes in ("all", "2_to_4", "1_to_4"):
        of = scores[(scores[WEIGHT] == "strong") & ((scores["sizes"] == sizes) | (sizes == "all"))]["score"].dropna()
        (row,) = (r for r in rows_with(page, "teacher_to_student weight", "strong") if r[1:3] == ["strong", sizes])
        assert row[3] == str(len(of))
        assert numbers(row[4])[0] == pytest.approx(of.mean(), abs=1e-3)


def test_without_a_paired_objective_the_score_itself_shrinks(tmp_path: Path) -> None:
    study = load_study(Path(__file__).parents[2] / "search_spaces" / "smoke.yaml")
    maker = Maker(study)
    for i in range(6):
        maker.trial(f"p{i:03d}", None, 1000, loss=3 + 0.1 * i, params={LR: 1e-3 * (i + 1)})
    for seed in (2000, 2001):
        maker.trial("p000", None, seed, "confirm", loss=3.2, params={LR: 1e-3})
        maker.trial("alone", "alone", seed, "confirm", loss=3.1, teacher=None)
    tables = maker.tables()
    page = html.unescape(make_report(study, tables, {}).html)
    r = tables.results
    r = r[(r["point"] == "p000") & (r["split"] == "dev") & (r["metric"] == "mlm_loss") & (r["model"] == "student")]
    r = r[r["progress"] == 1]
    search, fresh = (r[r["kind"] == kind]["value"].mean() for kind in ("trial", "confirm"))
    shown = numbers(re.search(r"<dt>shrinkage</dt><dd>(.*?)</dd>", page)[1])  # type: ignore[index]
    assert shown == pytest.approx([search - fresh, search, fresh], abs=0.01)
    assert "Use p000" not in page


def test_the_recipe_says_of_how_many_each_side_is_the_best_and_what_it_costs(report: Report) -> None:
    names = ("selected on dev", "cost")
    (selected,), (cost,) = (re.findall(rf"<dt>{name}</dt><dd>(.*?)</dd>", report.html) for name in names)
    assert selected.endswith(" against alone: best of 10 (alone: best of 3), optimistic")
    assert cost.endswith(": ×2.80 the FLOPs of alone")


def card_of(study: Study, *, at_cost: float | None = 3.17, earlier: int = 0) -> str:
    """The recommendation where the longer baseline has this loss (None: it has not run), after so many earlier winners."""
    maker = Maker(study)
    search(maker)
    confirm(maker, "p003", at_cost=at_cost or 0.0)
    if at_cost is None:
        for table in (maker.trials, maker.results):
            table[:] = [row for row in table if "at cost" not in row["point"]]
    for i in range(earlier):
        for seed in range(2000, 2005):
            maker.trial(f"p{5 + i:03d}", None, seed, "confirm", params={}, planned=False)
    markdown = make_report(study, maker.tables(), PROVENANCE).markdown
    return markdown[markdown.index("## Recommended recipe") : markdown.index("## Verdicts in detail")]


def test_a_winner_is_to_be_used_only_if_it_is_better_at_equal_cost_too(study: Study) -> None:
    assert "Use p003: better than alone on fresh seeds, at equal cost too. supported" in card_of(study)
    worse = card_of(study, at_cost=3.1)
    assert "p003 is better than alone at equal steps, worse at equal cost.\n" in worse and "Use" not in worse
    assert re.search(r"\| at equal cost \| \+0\.04\d+ \\\[\+", worse)
    unknown = card_of(study, at_cost=None)
    assert "not shown to be better at equal cost" in unknown and "| at equal cost | not compared yet |" in unknown


def test_points_that_tie_share_the_recipe_and_rounds_are_counted(study: Study) -> None:
    card = card_of(study, earlier=2)
    (tied,) = re.findall(r"\| ties \| (.*?) tie within noise on dev.*temperature", card)
    assert {"p003", "p007"} <= set(tied.split(", ")) and "p002" not in tied
    assert "teacher_to_student weight | strong |" in card and "| distil teacher_to_student temperature |" not in card
    assert "3 winners were confirmed here: this one is judged at 0.0083" in card


def test_the_gap_between_tuned_values_stands_beside_its_noise(study: Study) -> None:
    maker = Maker(study)
    for rate, loss in ((1e-3, 3.31), (3e-3, 3.20), (1e-2, 3.201)):
        for seed in range(1000, 1002 if rate == 1e-3 else 1003):
            maker.trial("alone", "alone", seed, "tune", loss=loss, params={LR: rate, "sizes": "2_to_4"}, teacher=None)
    page = make_report(study, maker.tables(), PROVENANCE).html
    rows = {row[2]: row[3:] for row in rows_with(page, "alone", "2_to_4")}
    assert [rows[rate][0] for rate in ("0.001", "0.003", "0.01")] == ["2", "3", "3"]
    assert rows["0.001"][-1] == "dropped after 2" and sorted(rows[rate][-1] for rate in ("0.003", "0.01"))[
        1
    ].startswith("chosen")
    assert re.fullmatch(r"0\.1\d+ ± 0\.00\d+", rows["0.001"][2])


def test_without_a_confirm_the_winner_is_called_unconfirmed(study: Study) -> None:
    maker = Maker(study)
    arms(maker)
    search(maker)
    page = make_report(study, maker.tables(), PROVENANCE).html
    assert "not confirmed on fresh seeds: confirm has not run yet" in page


# ------------------------------------------------------------------------------------------------------ what is below


def test_arms_are_labelled_by_the_measured_quality_of_their_teacher(tables: Tables, report: Report) -> None:
    page = report.html
    (good,) = rows_with(page, "good", "alone", "teacher better by")
    (weak,) = rows_with(page, "too_weak", "alone", "teacher weaker by")
    alone = values(tables, "alone", "mlm_loss", "test", 1.0)
    teacher = np.array([3.05 + 0.01 * np.sin(seed) + 0.02 for seed in range(5)])
    assert (good[2], weak[2]) == ("alone", "alone")
    difference = (teacher - alone).mean()
    assert numbers(good[4])[0] == pytest.approx(difference, abs=1e-3)
    assert numbers(good[3]) == pytest.approx([-difference], abs=1e-3)


def test_costs_show_the_teacher_as_nothing_amortised_and_in_full(tables: Tables, report: Report) -> None:
    page = report.html
    (row,) = (r for r in rows_with(page, "good", "200\u202fk") if len(r) == 9)
    phases = [json.loads(p) for p in tables.trials[tables.trials["planned"]]["phases"]]
    keys = [p["teach"]["key"] for p in phases if "teach" in p]
    shared = np.mean([9 / keys.count(f"t3.05-{seed}") for seed in range(5)])
    assert [numbers(cell)[0] for cell in row[3:6]] == pytest.approx([5, 5 + shared, 14], abs=0.06)
    reused = sum(p["teach"]["reused"] for p in phases if "teach" in p)
    assert f"Sharing saved {reused} runs of a phase: {reused * 9}\u202fGFLOPs" in page


def test_the_grid_the_failures_and_what_was_set_aside_are_listed(report: Report) -> None:
    page = report.html
    assert [r[2] for r in rows_with(page, "chosen")] == ["0.003"] * 5
    assert "No longer planned by the study file, and excluded from every figure: 2 trials." in page
    assert rows_with(page, "(searched points)", "trial", "12", "10", "1")


def test_early_stopping_comes_with_its_rank_correlation(tmp_path: Path) -> None:
    smoke = Path(__file__).parents[2] / "search_spaces" / "smoke.yaml"
    study = load_study(smoke)
    maker = Maker(study)
    for i in range(6):
        params = {LR: 1e-3 * (i + 1)}
        maker.trial(f"p{i:03d}", None, 1000, loss=3 + 0.1 * i, status="stopped" if i > 3 else "ended", params=params)
    page = make_report(study, maker.tables(), {}).html
    assert "2 trials stopped; first rung at 0.5 of the budget" in page
    assert "Rank correlation of rung and end: 1.00 (Spearman, n = 4" in page


# ------------------------------------------------------------------------------------- data sets, new data, and models


TASKS = """
data:
  cola: {kind: glue, task: cola, length: 64, tokenizer: {kind: wordpiece, size: 1024}}
  rte: {kind: glue, task: rte, tokenizer: {kind: wordpiece, size: 1024}}
  sst2: {kind: glue, task: sst2, tokenizer: {kind: wordpiece, size: 1024}}
models:
  teacher: {family: bert, layers: 4, width: 64}
  student: {family: bert, layers: 2, width: 64}
phases:
  teach:
    train: {teacher: full}
    for_each_dataset: [cola, rte, sst2]
    streams: {main: {data: cola}}
    budget: {steps: 100}
    batch: 8
    optimizer: {lr: 3e-3}
    terms: {teacher_hard: {kind: cross_entropy, of: teacher}}
  finetune:
    train: {student: full}
    for_each_dataset: [cola, rte, sst2]
    streams: {main: {data: cola}}
    budget: {steps: 100}
    batch: 8
    optimizer: {lr: 3e-3}
    terms:
      student_hard: {kind: cross_entropy, of: student}
      teacher_to_student: {kind: forward_kl, from: teacher, to: student, tau_squared: true}
"""
NUM = {"cola": 400, "rte": 277, "sst2": 300}
RULES: dict[str, Any] = {"cola": "matthews", "rte": "accuracy", "sst2": "accuracy"}
OFF = {"phases.finetune.terms.teacher_to_student.weight": 0}


def study_of_tasks(seeds: int = 5, more: int = 0) -> Study:
    about = {"arm": "taught", "against": "alone", "model": "student", "metric": "score"}
    claims = {
        "teaching_helps": {"says": "A teacher helps over three tasks", "paper": 2.5, **about},
        "on_cola": {
            "says": "A teacher helps on CoLA",
            "task": "cola",
            "paper": {"figure": 0.1, "over": ["cola"]},
            **about,
        },
        "on_rte": {"says": "A teacher helps on RTE", "task": ["rte"], **about},
    }
    claims |= {f"again_{i}": {"task": "sst2", **about} for i in range(more)}
    objective = {"phase": "finetune", "model": "student", "metric": "score", "mode": "max"}
    arms = {"alone": OFF, "taught": {}}
    whole = {
        "name": "tasks",
        "file": "tasks.yaml",
        "question": "Does a teacher help on tasks?",
        "trial": YAML(typ="safe").load(TASKS),
    }
    return Study.model_validate({**whole, "objective": objective, "arms": arms, "claims": claims, "seeds": seeds})


def tables_of_tasks(study: Study, *, lack: tuple[str, str, int] | None = None) -> Tables:
    """Each run is right about an example with a chance that the example, the arm and the seed set; `lack`: arm, data set
    and seed that has not been run."""
    draw, rows, trials, files = np.random.default_rng(2), list[dict[str, Any]](), [], dict[str, pd.DataFrame]()
    hard = {task: draw.normal(1.0, 1.2, num) for task, num in NUM.items()}
    gold = {task: draw.integers(0, 2, num) for task, num in NUM.items()}
    for arm, gain in (("alone", 0.0), ("taught", 0.5)):
        for seed in range(study.seeds):
            trial, phases, luck = f"{arm}{seed}", dict[str, Any](), np.random.default_rng(seed).normal(0, 0.08)
            whose = {"study": "tasks", "trial": trial, "point": arm, "arm": arm, "seed": seed, "kind": "trial"}
            whose |= {"planned": True}
            for task in NUM if lack is None or (arm, seed) != (lack[0], lack[2]) else set(NUM) - {lack[1]}:
                if arm == "taught":
                    phases[f"teach[{task}]"] = {"key": f"teach{task}", "reused": seed > 0, **cost(9e9, 30.0, 60_000)}
                phases[f"finetune[{task}]"] = {"key": f"{trial}{task}", "reused": False, **cost(5e9, 14.0, 20_000)}
                right = draw.random(NUM[task]) < 1 / (1 + np.exp(-(hard[task] + gain + luck)))
                predicted = np.where(right, gold[task], 1 - gold[task])
                columns = {
                    "model": "student",
                    "task": task,
                    "part": 0,
                    "example": range(NUM[task]),
                    "count": 1,
                    "cluster": range(NUM[task]),
                }
                files[f"{trial}{task}"] = pd.DataFrame(
                    {
                        **columns,
                        "split": "test",
                        "label": 1.0 * gold[task],
                        "prediction": 1.0 * predicted,
                        "loss": 1.0 - right,
                    }
                )
                about = {"model": "student", "phase": "finetune", "task": task, "step": 100, "progress": 1.0, "t": 1}
                found = scores(RULES[task], predicted, gold[task])
                for split, metric, value in [
                    *((split, *item) for split in ("dev", "test") for item in found.items()),
                    ("system", "parameters", 1.5e6),
                    ("system", "forward_flops", 2e8 if task == "cola" else 4e8),
                    ("system", "latency_ms", 3.0 + 0.1 * seed),
                ]:
                    rows.append(
                        {**whose, **about, **cost(5e9, 14.0, 20_000), "split": split, "metric": metric, "value": value}
                    )
            row = {"params": "{}", "status": "ended", "attempts": 1, "node": "here", "started": 1, "ended": 2}
            trials.append({**whose, **row, "phases": phases, "params": {}, "peak_memory": 4e8})
    made = tables_.tables("tasks", trials, {}, files.get)
    return Tables(pd.DataFrame(rows, columns=RESULTS.names), made.trials, made.examples)


@pytest.fixture(scope="module")
def by_task() -> tuple[Study, Tables, str]:
    study = study_of_tasks()
    tables = tables_of_tasks(study)
    return study, tables, make_report(study, tables, PROVENANCE).html


def test_scores_stand_by_data_set_and_their_mean_is_what_is_judged(by_task: tuple[Study, Tables, str]) -> None:
    _, tables, page = by_task
    r = tables.results[(tables.results["metric"] == "score") & (tables.results["split"] == "test")]
    (row,) = (row for row in rows_with(page, "taught") if len(row) == 5 and row[0] == "taught" and "5)" in row[1])
    table = r[r["arm"] == "taught"].pivot(index="seed", columns="task", values="value")
    for cell, values in zip(
        row[1:], (*(table[task] for task in ("cola", "rte", "sst2")), table.mean(axis=1)), strict=True
    ):
        assert numbers(cell) == pytest.approx([values.mean(), values.std(), 5], abs=0.06)
    line = claim_rows(page)[0]
    assert "mean over cola, rte, sst2" in line[1]
    assert numbers(line[3])[0] == pytest.approx(table.mean(axis=1).mean(), abs=0.06)
    differences = [row for row in rows_with(page, "teaching_helps") if len(row) == 7]
    assert [row[2] for row in differences] == ["score, cola", "score, rte", "score, sst2", "score, mean"]
    assert "the average is not comparable with the papers" in html.unescape(page)


def test_both_intervals_are_shown_and_labelled(by_task: tuple[Study, Tables, str]) -> None:
    study, tables, page = by_task
    verdicts = judge(
        study.claims, tables.results, tables.trials, default_phase="finetune", examples=tables.examples,
        tasks=task_facts(study),
    )  # fmt: skip
    for line, v in zip(claim_rows(page), verdicts.values(), strict=True):
        (c,) = v.parts
        assert c.interval is not None and c.new_data is not None
        assert re.search(r"\] seeds .*\] new data$", line[5])
        places = 1 - np.floor(np.log10((c.interval[1] - c.interval[0]) / 2))
        shown = pytest.approx([c.effect, *c.interval, *c.new_data], abs=0.5 * 10**-places + 1e-9)
        assert numbers(line[5]) == shown
        assert line[2].endswith(SCOPE[v.holds] if v.holds else "more seeds")
    assert [v.holds for v in verdicts.values()] == [Scope.NEW_DATA] * 3
    assert "at this scale, on new data as well." in page


def test_with_wnli_means_stand_with_it_and_without_it(by_task: tuple[Study, Tables, str]) -> None:
    study, tables, before = by_task
    trial = YAML(typ="safe").load(TASKS.replace("task: sst2", "task: wnli"))
    page = make_report(study.model_copy(update={"trial": trial}), tables, PROVENANCE).html
    assert "mean over 3" in before and "mean over 2" not in before
    r = tables.results[(tables.results["metric"] == "score") & (tables.results["split"] == "test")]
    table = r.pivot(index=["arm", "seed"], columns="task", values="value")
    less = table[["cola", "rte"]].mean(axis=1)
    (row,) = (row for row in rows_with(page, "taught") if len(row) == 6 and row[0] == "taught" and "5)" in row[1])
    assert numbers(row[-1]) == pytest.approx([less["taught"].mean(), less["taught"].std(), 5], abs=0.06)
    (row,) = rows_with(page, "teaching_helps", "without WNLI")
    assert row[2] == "score, mean over 2, without WNLI"
    assert numbers(row[4]) == pytest.approx([(less["taught"] - less["alone"]).mean()], abs=0.06)


def test_models_are_weighed_by_arm_and_a_shared_one_once(by_task: tuple[Study, Tables, str]) -> None:
    study, tables, page = by_task
    (row,) = rows_with(page, "taught", "student", "finetune", "1.5\u202fM")
    assert row[4:6] == ["64–128", "333\u202fM"]
    mean, sd, n = numbers(row[6])
    assert (mean, n) == (pytest.approx(3.2, abs=0.01), 15) and sd == pytest.approx(0.146, abs=0.01)
    shared = json.dumps({f"finetune[{task}]": {"key": task, **cost(1, 1, 1)} for task in NUM})
    trials = tables.trials.assign(phases=shared)
    again = make_report(study, Tables(tables.results, trials, tables.examples), {}).html
    (row,) = rows_with(again, "taught", "student", "finetune", "1.5\u202fM")
    assert numbers(row[6])[2] == 3
    assert "Model size and speed" in page
    assert "Model size and speed" not in make_report(study, Tables(tables.results.head(0), trials), {}).html


def test_a_seed_without_one_of_the_data_sets_is_in_no_mean() -> None:
    study = study_of_tasks()
    page = make_report(study, tables_of_tasks(study, lack=("taught", "rte", 2)), {}).html
    lines = claim_rows(page)
    assert [line[7] for line in lines] == ["4", "5", "4"]
    assert "’taught’ has no rte at seed 2" in html.unescape(page).replace("'", "’")
    assert any(
        row[1].endswith("5)") and row[2].endswith("4)") and row[4].endswith("4)")
        for row in rows_with(page, "taught")
        if len(row) == 5
    )


def test_one_seed_of_tasks_says_what_it_can() -> None:
    study = study_of_tasks(seeds=1)
    page = html.unescape(make_report(study, tables_of_tasks(study), {}).html)
    assert "No verdict: with one seed, the effect of these runs cannot be told from chance" in page
    assert "of these two runs alone, on new examples: 95 % interval [" in page
    assert "new data as well for" not in page


# --------------------------------------------------------------------------------------------- nothing to say, and worse


def test_the_same_tables_give_the_same_bytes(study: Study) -> None:
    first, second = (make_report(study, whole(study, 32), PROVENANCE) for _ in range(2))
    assert first == second
    assert not re.search(r"20\d\d-\d\d-\d\d", first.html)


def test_the_page_needs_nothing_from_elsewhere(study: Study) -> None:
    page = make_report(study, whole(study, 32), PROVENANCE).html
    assert "script" not in _Text(page).tags
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']+""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_other_peoples_text_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    text = STUDY.replace("says: A good teacher helps,", f"says: '{evil} | $x$',")
    text = text.replace("question: When", f"question: {evil} When").replace("strong: 4", f"'{evil}': 4")
    study = study_of(tmp_path, text)
    maker = Maker(study)
    arms(maker)
    for i in range(40):
        maker.trial("alone", "alone", 1000 + i, "tune", params={LR: 1e-3, "sizes": "2_to_4"})
        params = {WEIGHT: evil, "sizes": "2_to_4", TEMPERATURE: 2.0}
        maker.trial(f"p{i:03d}", None, 1000 + i, params=params)
    maker.trial("good", "good", 9, status="failed", reason=f"{evil}`[x](javascript:1)")
    report = make_report(study, maker.tables(), {"commit": evil, "command": f"run `{evil}`\n```"})
    assert "script" not in _Text(report.html).tags
    assert report.html.count("&lt;script&gt;") >= 5
    outside_code = re.sub(r"```\n.*?\n```", "", report.markdown, flags=re.DOTALL)
    assert "<script" not in outside_code
    assert r"\[x\](javascript:1)" in outside_code
    assert report.markdown.count("```") % 2 == 0
    assert r"\| $x$" in outside_code


def test_without_anything_ended_the_page_says_so(study: Study) -> None:
    for tables in (Maker(study).tables(), tables_.tables("dwt", [], {})):
        report = make_report(study, tables, {})
        assert "No verdict yet on 3 claims: no trial has ended." in report.html
        assert "None yet: no point of the search has ended." in report.html
        assert len(claim_rows(report.html)) == 3
        assert 'id="pairs"' not in report.html
        assert not re.search(r"\bnan\b", report.markdown)


def test_one_seed_gives_an_effect_and_no_verdict(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=1)
    maker = Maker(study)
    arms(maker, seeds=1)
    page = make_report(study, maker.tables(), {}).html
    assert "No verdict: with one seed, the effect of these runs cannot be told from chance" in page
    for line in claim_rows(page):
        assert "undecided" in line[2]
        assert "needs 3 seeds or more" in line[2]
        assert "no interval" in line[5]
        assert line[7] == "1"


def test_a_study_of_arms_alone_recommends_the_best_on_dev_and_says_when_that_is_all(tmp_path: Path) -> None:
    gone = ("tune", "vary", "search", "confirm", "claims", "  phases.", "  sizes", "  good_t", "  too_weak_h", "  acc")
    text = "\n".join(line for line in STUDY.splitlines() if not line.startswith(gone))
    study = study_of(tmp_path, text)
    maker = Maker(study)
    arms(maker)
    page = make_report(study, maker.tables(), {}).html
    assert "No verdict: the study states no claims." in page
    assert "good has the best mean on dev; no claim shows an advantage." in page
    assert "--arm good --model student" in page
    assert 'id="claims"' not in page


def test_a_number_that_is_none_is_no_number(study: Study) -> None:
    maker = Maker(study)
    arms(maker)
    maker.trials[5]["status"] = "failed"  # good, seed 0: it diverged
    for row in maker.results:
        if row["trial"] == maker.trials[5]["trial"] and row["model"] == "student":
            row["value"] = float("nan")
    report = make_report(study, maker.tables(), {})
    line = claim_rows(report.html)[0]
    assert "undecided" in line[2]
    assert line[7] == "4"
    assert not re.search(r"\bnan\b", report.markdown)


def test_arms_that_still_run_make_a_verdict_provisional(study: Study) -> None:
    maker = Maker(study)
    arms(maker, seeds=4)
    maker.trial("good", "good", 4, status="running")
    assert "provisional" in claim_rows(make_report(study, maker.tables(), {}).html)[0][2]


# ----------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_both_files_into_the_studys_folder(study: Study, tmp_path: Path, capsys: Any) -> None:
    storage = Storage(str(tmp_path / "runs"))
    tables_.write(whole(study), storage.sub(study.folder))
    assert main([study.file, "--storage", storage.uri]) == 0
    printed = capsys.readouterr().out.split()
    assert [Path(p).name for p in printed] == ["report.html", "report.md"]
    assert all(Path(p).read_text().count("A good teacher helps") for p in printed)


def test_the_command_says_what_is_wrong_in_one_line(study: Study, tmp_path: Path, capsys: Any) -> None:
    for arguments in (
        ["none.yaml"],
        [study.file, "--storage", str(tmp_path / "runs")],
        [study.file, "--profile", "big"],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1


def test_printed_commands_name_profile_overrides_and_storage(tmp_path: Path, capsys: Any) -> None:
    text = STUDY.replace("laptop: {}", "laptop: {}, long: {seeds: 9}")
    study = study_of(tmp_path, text, profile="long", overrides=["trial.phases.distil.batch=4"])
    given = f"{study.file} --profile long --set trial.phases.distil.batch=4"
    assert main([study.file, "--profile", "long", "--storage", str(tmp_path / "a b")]) == 2
    assert (
        f"first run python -m orchestrator.sweep {study.file} --profile long --storage '{tmp_path}/a b'"
        in capsys.readouterr().err
    )
    maker = Maker(study)
    arms(maker)
    search(maker)
    report = make_report(study, maker.tables(), {}, storage="s3://bucket/runs")
    assert f"python -m orchestrator.sweep {given} --storage s3://bucket/runs\n" in report.markdown
    assert "--profile long --set trial.phases.distil.batch=4 --storage s3://bucket/runs</pre>" in report.html
    assert re.search("orchestrator.export [^<]*--storage s3://bucket/runs<", report.html)
    assert "--storage" not in make_report(study, maker.tables(), {}).markdown


@pytest.mark.parametrize("module", ["report", "store"])
def test_the_help_of_a_light_command_does_not_import_torch(module: str) -> None:
    program = f"import sys, orchestrator.{module} as m\ntry: m.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--storage" in run.stdout and run.stdout.endswith("False\n")


# ------------------------------------------------------------------------------------------------------------ a browser


LOOK = """<!doctype html><meta charset=utf-8><iframe id=f style="width:1280px;height:900px;border:0"></iframe>
<script>
const f = document.getElementById("f");
f.onload = () => {
  const d = f.contentDocument, found = {overflow: d.documentElement.scrollWidth - 1280, height: d.documentElement.scrollHeight};
  for (const id of ["question", "counts", "claims", "pairs", "recommendation"])
    found[id] = Math.round(d.getElementById(id).getBoundingClientRect().bottom);
  const boxes = [...d.querySelectorAll("#pairs text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  found.collisions = [];
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3) found.collisions.push(a + " / " + b);
  }));
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = JSON.stringify(found); document.body.append(out);
};
f.srcdoc = PAGE;
</script>"""


def chromium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if binary is None:
        pytest.skip("no chromium: give its path as CHROMIUM")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --window-size=1280,900"
    command = [binary, *flags.split(), f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def look(folder: Path, page: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Where the parts of the first screen end, in pixels; and what else a browser found."""
    file = folder / "look.html"
    file.write_text(LOOK.replace("PAGE", json.dumps(page).replace("</", "<\\/")))
    dom = chromium(folder, "--dump-dom", "--virtual-time-budget=4000", file.as_uri()).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))  # type: ignore[index]
    return {name: found[name] for name in ("question", "counts", "claims", "pairs", "recommendation")}, found


@pytest.mark.browser
@pytest.mark.parametrize(("points", "more"), [(12, 0), (32, 0), (12, 3)])
def test_the_first_screen_holds_question_claims_pairs_and_advice(tmp_path: Path, points: int, more: int) -> None:
    extra = "".join(
        f"  x{i}: {{arm: good, against: too_weak, model: student, metric: mlm_loss, margin: {i / 1000}}}\n"
        for i in range(more)
    )
    study = study_of(tmp_path, STUDY.replace("profiles:", f"{extra}profiles:"))
    bottoms, found = look(tmp_path, make_report(study, whole(study, points), PROVENANCE).html)
    assert max(bottoms.values()) <= 900, bottoms
    assert found["overflow"] <= 0
    assert found["collisions"] == []


@pytest.mark.browser
@pytest.mark.parametrize("more", [0, 1, 3])
def test_the_first_screen_has_room_for_intervals_over_new_data(tmp_path: Path, more: int) -> None:
    study = study_of_tasks(more=more)
    bottoms, found = look(tmp_path, make_report(study, tables_of_tasks(study), PROVENANCE).html)
    assert max(bottoms.values()) <= 900, bottoms
    assert found["overflow"] <= 0
    assert found["collisions"] == []


@pytest.mark.browser
def test_the_page_opens_without_a_complaint(study: Study, tmp_path: Path) -> None:
    file, picture = tmp_path / "report.html", tmp_path / "first.png"
    file.write_text(make_report(study, whole(study), PROVENANCE).html)
    run = chromium(tmp_path, "--enable-logging=stderr", "--v=0", f"--screenshot={picture}", file.as_uri())
    assert "CONSOLE" not in run.stderr
    assert picture.read_bytes()[16:24] == (1280).to_bytes(4, "big") + (900).to_bytes(4, "big")


def test_replies_without_an_end_are_said_first_and_in_the_terminal(study: Study, tables: Tables) -> None:
    ended = tables.results[tables.results["split"] == "test"].drop_duplicates("trial").head(4)
    rows = [
        ended.assign(metric="unfinished", task="ask", step=step, value=value)
        for step, value in ((400, 55.0), (800, 30.0))
    ]
    rows.append(ended.assign(metric="unfinished", task="other", step=400, value=20.0))
    found = make_report(study, Tables(pd.concat([tables.results, *rows]), tables.trials, tables.examples), PROVENANCE)
    (caution,) = found.summary.cautions
    assert "30 % of the replies of student" in caution and "ask, test" in caution and caution in found.summary.lines
    assert caution in html.unescape(found.html) and "30 % of the replies" in found.markdown
    assert not make_report(study, tables, PROVENANCE).summary.cautions
