"""Two sections of the report: scores by task, and what each model weighs. Pure; knows no HTML."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from orchestrator.analysis.arm_values import arm_values, parsed
from orchestrator.analysis.curves import ended, objective_reading, task_facts
from orchestrator.analysis.statistics import Comparison, compare
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting.document import Section, Table, decimals_for, fixed, span
from orchestrator.reporting.figures import si
from orchestrator.study.schema import Study

WEIGHTS = ("parameters", "forward_flops", "latency_ms")


def by_task(study: Study, tables: Tables, verdicts: Sequence[Verdict]) -> Section | None:
    """Each arm on each task, and each claim's difference there; None where there is but one. With WNLI, whose labels
    contradict those of its training set, means stand beside those without it, as papers have either."""
    at = objective_reading(study, "test")
    facts = task_facts(study)
    tasks, found = arm_values(tables.results, tables.trials, tuple(study.arms), at, "arm", "trial", None, facts.trains)
    wnli = {name for name, task in facts.glue.items() if task == "wnli"}
    less = tuple(task for task in tasks if task not in wnli)
    means = [tasks, less] if 1 < len(less) < len(tasks) else [tasks]
    rows = [
        (
            arm,
            *(_mean(side.by_task.get(task, {}).values()) for task in tasks),
            *(_mean(_over(some, side.by_task, side.values)) for some in means),
        )
        for arm, side in found.items()
        if side.by_task
    ]
    blocks = []
    if len(tasks) > 1 and rows:
        head = ("arm", *tasks, *(f"mean over {len(some)}" for some in means))
        caption = f"{at.metric} of {at.model} on test: mean (SD over seeds, n)"
        blocks.append(Table(caption, head, rows, "l" + "r" * (len(head) - 1)))
    parts = [
        (f"{i}. {v.name}", f"{v.claim.arm} − {c.against}", f"{v.claim.metric}, {task}", *_difference(c))
        for i, v in enumerate(verdicts, 1)
        for task, compared in [*v.by_task.items(), *_means(v, wnli)]
        for c in compared
    ]
    if parts:
        columns = ("claim", "difference of", "on", "n", "difference", "95 %, new seeds", "95 %, new data as well")
        blocks.append(Table("Each claim’s difference by task", columns, parts, "lllrrrr"))
    if not blocks:
        return None
    text = (
        "A mean over tasks is taken inside each seed, and only where all of them are there. The claims were decided on the "
        "means alone: of many differences by task some leave 0 by chance, and no interval here allows for that."
    )
    return Section("By task", (text, *blocks))


def _over(tasks: Sequence[str], by_task: Mapping[str, Mapping[int, float]], seeds: Iterable[int]) -> list[float]:
    """The mean over these tasks at each seed."""
    return [math.fsum(by_task[task][seed] for task in tasks) / len(tasks) for seed in seeds]


def _means(v: Verdict, wnli: Collection[str]) -> Iterator[tuple[str, Sequence[Comparison]]]:
    """The claim's difference of means, and that without WNLI, which is not tested."""
    less = [task for task in v.by_task if task not in wnli]
    if v.by_task:
        yield "mean", v.parts
    if 1 < len(less) < len(v.by_task):
        yield (
            f"mean over {len(less)}, without WNLI",
            [_without(whole, [v.by_task[task] for task in less]) for whole in v.parts],
        )


def _without(whole: Comparison, of_tasks: Sequence[Sequence[Comparison]]) -> Comparison:
    """The same two sides, over these tasks alone."""
    own = {str(i): c for i, found in enumerate(of_tasks) for c in found if c.against == whole.against}
    arm, against = (
        {task: dict(zip(c.seeds, getattr(c, side), strict=True)) for task, c in own.items()}
        for side in ("arm_values", "against_values")
    )
    values = [dict(zip(whole.seeds, _over(tuple(own), of, whole.seeds), strict=True)) for of in (arm, against)]
    found = compare(*values, lower_is_better=whole.lower_is_better, margin=whole.margin, name=whole.against)
    assert found is not None  # `whole` has seeds
    return found


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return "–"
    sd = float(np.std(found, ddof=1)) if len(found) > 1 else math.nan
    places = decimals_for(sd, float(np.mean(found)))
    return f"{fixed(float(np.mean(found)), places)} ({fixed(sd, places)}, {len(found)})"


def _difference(c: Comparison) -> tuple[str, ...]:
    half = (c.interval[1] - c.interval[0]) / 2 if c.interval else None
    places = decimals_for(half, c.effect)
    return str(c.n), fixed(c.effect, places, sign=True), *(span(i, places) for i in (c.interval, c.new_data))


def models(study: Study, tables: Tables) -> Section | None:
    """What each arm's models weigh and take, as they are after the last phase that trained them; None if not recorded."""
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
            shown.append(
                (
                    arm,
                    model,
                    str(of_model["phase"].iloc[0]),
                    si(float(values["parameters"].mean())),
                    "–".join(map(str, {tokens[0]: 0, tokens[-1]: 0})) if tokens else "–",
                    si(float(values["forward_flops"].mean())),
                    _mean(values["latency_ms"].tolist()),
                )
            )
    if not shown:
        return None
    text = (
        "Parameters that several layers share count once. A forward is that of one sequence of the stream’s length, and "
        "the time its median at batch 1 in eval mode; mean (SD, n) over what was measured, a phase that several trials "
        "share once. Times were taken while other trials ran on the same machine: compare them with care."
    )
    head = ("arm", "model", "after phase", "parameters", "tokens a sequence", "FLOPs a forward", "ms a sequence")
    return Section("Models", (text, Table("What each model weighs and takes", head, shown, "lllrrrr")))


def _once(rows: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Without the copies that trials have of a phase which they share; branches called by their phase."""
    keys = {
        (trial, name): done["key"]
        for trial, cell in zip(trials["trial"], trials["phases"], strict=True)
        for name, done in parsed(cell).items()
    }
    named = list(zip(rows["trial"], rows["phase"], rows["task"], strict=True))
    found = [keys.get((trial, f"{phase}[{task}]")) or keys.get((trial, phase)) or trial for trial, phase, task in named]
    base = rows["phase"].str.partition("[")[0] if len(rows) else rows["phase"]
    return rows.assign(key=found, phase=base).drop_duplicates(["key", "phase", "model", "task", "metric"], keep="last")
