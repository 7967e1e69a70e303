"""Sections by task and by model: scores on each task, and the size and speed of each model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from orchestrator.analysis.arm_values import arm_values
from orchestrator.analysis.curves import ended, objective_reading, task_facts
from orchestrator.analysis.queries import Records, parsed
from orchestrator.analysis.statistics import Comparison, compare
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting.claim_lines import numbered
from orchestrator.reporting.document import Section, Table, decimals_beside, decimals_for, fixed, si, span
from orchestrator.study.schema import Study
from trainables.config.phase_run import PhaseRun

WEIGHTS = ("parameters", "forward_flops", "latency_ms")


def by_task(study: Study, tables: Tables, verdicts: Sequence[Verdict]) -> Section | None:
    """Returns each arm's score on each task, and each claim's difference there; None with one task.

    With WNLI, whose labels contradict its training set, means are shown with and without WNLI: papers report either.
    """
    query = objective_reading(study, "test")
    facts = task_facts(study)
    tasks, values_of_arms = arm_values(Records(tables.results, tables.trials, facts), tuple(study.arms), query)
    wnli = {name for name, task in facts.glue.items() if task == "wnli"}
    less = tuple(task for task in tasks if task not in wnli)
    means = [tasks, less] if 1 < len(less) < len(tasks) else [tasks]
    rows = [
        (
            arm,
            *(_mean(side.by_task.get(task, {}).values()) for task in tasks),
            *(_mean(_over(some, side.by_task, side.values)) for some in means),
        )
        for arm, side in values_of_arms.items()
        if side.by_task
    ]
    blocks = []
    if len(tasks) > 1 and rows:
        head = ("arm", *tasks, *(f"mean over {len(some)}" for some in means))
        caption = f"{query.metric} of {query.model} on test: mean (SD over seeds, n)"
        blocks.append(Table(caption, head, rows, "l" + "r" * (len(head) - 1)))
    parts = [
        (name, f"{v.claim.arm} − {c.against}", f"{v.claim.metric}, {task}", *_difference(c))
        for name, v in numbered(verdicts)
        for task, compared in [*v.by_task.items(), *_means(v, wnli)]
        for c in compared
    ]
    if parts:
        columns = ("claim", "difference of", "on", "n", "difference", "95 %, new seeds", "95 %, new data as well")
        blocks.append(Table("Each claim’s difference by task", columns, parts, "lllrrrr"))
    if not blocks:
        return None
    text = (
        "A mean over tasks is taken within each seed, and only where every task has a score. Claims are decided on the means "
        "alone: of many differences by task some exclude 0 by chance, and no interval here is corrected for that."
    )
    return Section("By task", (text, *blocks))


def _over(tasks: Sequence[str], by_task: Mapping[str, Mapping[int, float]], seeds: Iterable[int]) -> list[float]:
    """Returns the mean over the tasks at each seed."""
    return [math.fsum(by_task[task][seed] for task in tasks) / len(tasks) for seed in seeds]


def _means(v: Verdict, wnli: Collection[str]) -> Iterator[tuple[str, Sequence[Comparison]]]:
    """Yields the claim's difference of means, and the same without WNLI, which is not tested."""
    less = [task for task in v.by_task if task not in wnli]
    if v.by_task:
        yield "mean", v.parts
    if 1 < len(less) < len(v.by_task):
        yield (
            f"mean over {len(less)}, without WNLI",
            [_without(whole, [v.by_task[task] for task in less]) for whole in v.parts],
        )


def _without(whole: Comparison, of_tasks: Sequence[Sequence[Comparison]]) -> Comparison:
    """Returns the same comparison over some of the tasks."""
    own = {str(i): c for i, compared in enumerate(of_tasks) for c in compared if c.against == whole.against}
    arm, against = (
        {task: dict(zip(c.seeds, getattr(c, side), strict=True)) for task, c in own.items()}
        for side in ("arm_values", "against_values")
    )
    means = [dict(zip(whole.seeds, _over(tuple(own), side, whole.seeds), strict=True)) for side in (arm, against)]
    comparison = compare(*means, lower_is_better=whole.lower_is_better, margin=whole.margin, name=whole.against)
    assert comparison is not None  # `whole` has seeds
    return comparison


def _mean(values: Iterable[float]) -> str:
    """Returns the mean (SD, n)."""
    if not (listed := list(values)):
        return "–"
    mean, sd = float(np.mean(listed)), float(np.std(listed, ddof=1)) if len(listed) > 1 else math.nan
    places = decimals_for(sd, mean)
    return f"{fixed(mean, places)} ({fixed(sd, places)}, {len(listed)})"


def _difference(c: Comparison) -> tuple[str, ...]:
    places = decimals_beside(c.interval, c.effect)
    return str(c.n), fixed(c.effect, places, sign=True), *(span(i, places) for i in (c.interval, c.new_data))


def models(study: Study, tables: Tables) -> Section | None:
    """Tabulates size and speed of each arm's models after the last phase that trained them; None where not recorded."""
    rows = tables.results
    rows = rows[(rows["split"] == "system") & rows["metric"].isin(WEIGHTS)]
    lengths = {name: data.length for name, data in study.spec(seed=0).data.items()}
    shown = []
    for arm in study.arms:
        trials = ended(tables, "trial", arm)
        own = _once(rows[rows["trial"].isin(set(trials["trial"]))], trials)
        for model in study.trial["models"]:
            of_model = own[own["model"] == model]
            if of_model.empty:
                continue
            of_model = of_model[of_model["phase"] == of_model.loc[of_model["t"].idxmax(), "phase"]]
            values = {metric: of_model.loc[of_model["metric"] == metric, "value"].astype(float) for metric in WEIGHTS}
            tokens = sorted({lengths[task] for task in of_model["task"] if task in lengths})
            length = "–".join(map(str, {tokens[0]: 0, tokens[-1]: 0})) if tokens else "–"
            parameters, flops = (si(float(values[metric].mean())) for metric in WEIGHTS[:2])
            name = str(of_model["phase"].iloc[0])
            shown.append((arm, model, name, parameters, length, flops, _mean(values["latency_ms"].tolist())))
    if not shown:
        return None
    text = (
        "Parameters shared by layers count once. FLOPs: one forward pass of one sequence of the stream’s length; ms: the median "
        "time of that pass at batch 1 in eval mode. Mean (SD, n) over measurements, where a phase that trials share counts "
        "once. Other trials ran on the same machine at the time: compare times with care."
    )
    head = ("arm", "model", "after phase", "parameters", "tokens per sequence", "FLOPs per forward", "ms per sequence")
    return Section("Models", (text, Table("Model size and speed", head, shown, "lllrrrr")))


def _once(rows: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Drops the copies of a phase that trials share, and names the runs of a phase by the phase."""
    keys = {
        (trial, name): done["key"]
        for trial, cell in zip(trials["trial"], trials["phases"], strict=True)
        for name, done in parsed(cell).items()
    }
    named = list(zip(rows["trial"], rows["phase"], rows["task"], strict=True))
    own = [keys.get((trial, f"{phase}[{task}]")) or keys.get((trial, phase)) or trial for trial, phase, task in named]
    base = rows["phase"].map(lambda run: PhaseRun.parse(run).phase)
    return rows.assign(key=own, phase=base).drop_duplicates(["key", "phase", "model", "task", "metric"], keep="last")
