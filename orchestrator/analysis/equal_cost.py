"""Two arms at equal cost: the cheaper one at its end, the dearer one at its evaluations before and after that cost.

Neither evaluation is at equal cost, so a claim is decided where both decide it alike: then any curve that runs between them
does, too. An evaluation within 1 % after the budget is read as at the budget, beside the value that a straight line in log
cost has at the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from orchestrator.analysis.arm_values import ArmValues, Evaluation, evaluations, values_in
from orchestrator.analysis.notes import Kind, Note, note
from orchestrator.analysis.queries import MetricQuery, Records
from orchestrator.study.claims import CostAxis

TOLERANCE = 0.01  # of the budget


def equal_cost_values(
    records: Records, queries: Mapping[str, MetricQuery], axis: CostAxis
) -> tuple[tuple[str, ...], dict[str, ArmValues]]:
    """Returns what `arm_values` does, for two arms (whose queries may differ in the model) at equal cost.

    At each seed the budget is the total cost of the cheaper arm. So this arm is evaluated at its end, and the dearer one
    on its way: `values` has its last evaluation within the budget, `beyond` the next one. A seed at which either arm did
    not come to its end has no value.
    """
    query = next(iter(queries.values()))
    selected = {name: records.select([name], of_arm) for name, of_arm in queries.items()}
    tasks = query.tasks or tuple(sorted({task for _, rows in selected.values() for task in rows["task"]}))
    seen = {name: evaluations(records, name, of_arm, tasks, only_ended=True) for name, of_arm in queries.items()}
    ends = [{seed: each[-1] for seed, each in of_arm.items() if each[-1].progress == 1} for of_arm in seen.values()]
    seeds = sorted(set.intersection(*map(set, ends)))
    budgets = {seed: min(_spent(of_arm[seed], axis) for of_arm in ends) for seed in seeds}
    arms = {}
    for (name, (trials, rows)), ended in zip(selected.items(), ends, strict=True):
        chosen, late, beyond = dict[int, Evaluation](), dict[int, Evaluation](), dict[int, float]()
        for seed, budget in budgets.items():
            each = seen[name][seed]
            within = [evaluation for evaluation in each if _spent(evaluation, axis) <= budget * (1 + 1e-9)]
            if not within:
                late[seed] = each[0]
                continue
            before, after = within[-1], each[min(len(within), len(each) - 1)]
            chosen[seed], beyond[seed] = before, after.value
            if _spent(after, axis) <= budget * (1 + TOLERANCE):
                chosen[seed], beyond[seed] = after, _between(before, after, budget, axis)
        # rows of trials that lack a data set at their end count as partial values, on which `values_in` makes a note
        lacking = set(trials.loc[(trials["status"] == "ended") & ~trials["seed"].isin(list(ended)), "trial"])
        wanted = {(e.trial, e.progress) for e in chosen.values()} | {(trial, 1.0) for trial in lacking}
        here = [key in wanted for key in zip(rows["trial"], rows["progress"], strict=True)]
        values = values_in(
            records, name, (trials, rows[np.array(here, dtype=bool)]), queries[name]._replace(tasks=tasks),
            excluded={*late, *ended} - {*chosen},
        )  # fmt: skip
        arms[name] = replace(
            values,
            notes=(*values.notes, *_on_equal_cost(name, chosen, budgets, axis), *_on_late(name, late, budgets, axis)),
            progress={seed: evaluation.progress for seed, evaluation in chosen.items()},
            beyond={s: value for s, value in beyond.items() if math.isfinite(value) and s in values.values},
        )
    return tasks, arms


def _between(before: Evaluation, after: Evaluation, budget: float, axis: CostAxis) -> float:
    """Interpolates the value at the budget, linearly in log cost."""
    low, high = _spent(before, axis), _spent(after, axis)
    return after.value if low <= 0 or low == high else float(
        np.interp(math.log(budget), (math.log(low), math.log(high)), (before.value, after.value))
    )  # fmt: skip


def _spent(evaluation: Evaluation, axis: CostAxis) -> float:
    return evaluation.cost.total().on(axis)


def _on_equal_cost(
    name: str, chosen: Mapping[int, Evaluation], budgets: Mapping[int, float], axis: CostAxis
) -> list[Note]:
    """Notes an arm that was evaluated mid-schedule, and how much of the budget its evaluations leave unused."""
    if all(evaluation.progress == 1 for evaluation in chosen.values()):
        return []
    unused = []
    for seed, evaluation in chosen.items():
        spent, own = _spent(evaluation, axis), evaluation.cost.phase.on(axis)
        room = budgets[seed] - (spent - own)  # what the budget leaves for the compared phase
        unused.append(max(0.0, (budgets[seed] - spent) / room) if room > 0 else 0.0)
    progress = tuple(evaluation.progress for evaluation in chosen.values())
    return [note(Kind.EVALUATED_EARLY, arm=name, axis=axis, progress=progress, unused=float(np.mean(unused)))]


def _on_late(name: str, late: Mapping[int, Evaluation], budgets: Mapping[int, float], axis: CostAxis) -> list[Note]:
    """Notes the seeds whose first evaluation came after the budget was spent."""
    if not late:
        return []
    ratios = [_spent(late[seed], axis) / budgets[seed] if budgets[seed] else math.inf for seed in late]
    first = min(evaluation.progress for evaluation in late.values())
    seeds, ratio = tuple(sorted(late)), float(np.mean(ratios))
    return [note(Kind.TOO_LATE, arm=name, axis=axis, seeds=seeds, progress=first, ratio=ratio)]
