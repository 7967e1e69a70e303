"""Measures how often verdicts are false where the truth is known: tables are drawn, judged, and counted.

    python -m benchmarks.error_rates                    # 200 repetitions of each row, on all cores
    python -m benchmarks.error_rates --num 2000 holm    # one group of rows, more often

Each row draws the values of arms by seed, writes the tables that a sweep would write, and asks `judge`. Rows named
"coverage" count how often the interval over new seeds and new examples has the true difference inside. A group of rows is one
mapping beside the functions that draw them; `GROUPS` lists them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import choices
from benchmarks.known_curves import What, known_curves
from orchestrator.analysis.new_data import DataSet, intervals
from orchestrator.analysis.pareto import ArmPoint, cheapest_good_enough
from orchestrator.analysis.verdicts import judge
from orchestrator.study.claims import Claim
from trainables.config.data import Rule
from trainables.metrics.language import LM_LOSS
from trainables.metrics.metric import Examples
from trainables.metrics.task_scores import score_metric

Rng = np.random.Generator
Arms = Mapping[
    str, Mapping[int, Sequence[tuple[float, float, float]]]
]  # seed -> (progress, FLOPs, loss) of evaluations
HALVES = (0.25, 0.5, 1.0)
CHUNK = 25  # repetitions of one stream of random numbers
Rows = Mapping[str, tuple[Callable[..., bool], Mapping[str, Any]]]  # name -> what draws one repetition, and its fields


def verdicts(
    arms: Arms,
    claims: Mapping[str, Claim],
    stopped: Mapping[str, Sequence[int]] | None = None,
    looks: Sequence[int] = (),
) -> list[str]:
    """Judges claims on the tables of these arms."""
    rows, trials = list[dict[str, Any]](), list[dict[str, Any]]()
    for arm, by_seed in arms.items():
        for seed, evaluations in by_seed.items():
            about = {"trial": f"{arm}-{seed}", "arm": arm, "point": arm, "seed": seed, "kind": "trial", "planned": True}
            spent = {
                "reused": False,
                "tokens": 0,
                "device_seconds": 1.0,
                "flops": evaluations[-1][1],
                "key": about["trial"],
            }
            is_stopped = seed in (stopped or {}).get(arm, ())
            phases = json.dumps({"train": spent})
            trials.append({**about, "status": "stopped" if is_stopped else "ended", "phases": phases})
            where = {"phase": "train", "model": "m", "metric": "lm_loss", "split": "test", "task": "text", "tokens": 0}
            rows += [
                {**about, **where, "device_seconds": at, "progress": at, "flops": flops, "value": value}
                for at, flops, value in evaluations
            ]
    found = judge(claims, pd.DataFrame(rows), pd.DataFrame(trials), default_phase="train", looks=looks)
    return [str(verdict.verdict) for verdict in found.values()]


def ends(rng: Rng, n: int, *, mean: float = 3.0, sd: float = 0.1, flops: float = 50.0) -> dict[int, Any]:
    """Draws n seeds that are evaluated at their end alone."""
    return {seed: [(1.0, flops, value)] for seed, value in enumerate(rng.normal(mean, sd, n))}


def claim(arm: str, against: Any = "alone", **fields: Any) -> Claim:
    return Claim(arm=arm, against=against, model="m", metric="lm_loss", **fields)


def family(rng: Rng, *, num: int, n: int, fields: Mapping[str, Any]) -> bool:
    """A family of claims about arms that are all alike, and cost 49.9 beside 50 FLOPs: is any verdict decided?"""
    arms = {f"a{i}": ends(rng, n, flops=49.9) for i in range(num)} | {
        name: ends(rng, n) for name in ("alone", "longer")
    }
    found = verdicts(
        arms,
        {name: claim(name, **{"against": "alone", **fields}) for name in arms if name[0] == "a" and name != "alone"},
    )
    return any(verdict != "undecided" for verdict in found)


HOLM: Rows = {
    "holm: 5 claims, n = 4": (family, {"num": 5, "n": 4, "fields": {}}),
    "holm: 5 claims, lists of one": (family, {"num": 5, "n": 4, "fields": {"against": ["alone"]}}),
    "holm: 5 claims, less FLOPs": (family, {"num": 5, "n": 4, "fields": {"less": "flops"}}),
    "holm: 5 claims against two": (family, {"num": 5, "n": 5, "fields": {"against": ["alone", "longer"]}}),
    "holm: 10 claims, n = 5": (family, {"num": 10, "n": 5, "fields": {}}),
}


def equal_cost(rng: Rng, *, ratio: float) -> bool:
    """A loss that depends on the FLOPs alone; one schedule costs `ratio` times the other."""
    arms = {
        name: {
            seed: [(at, cost * at, 3 - 0.5 * math.log(cost * at) + rng.normal(0, 0.02)) for at in HALVES]
            for seed in range(5)
        }
        for name, cost in (("a", 50.0), ("alone", 50.0 * ratio))
    }
    return verdicts(arms, {"c": claim("a", at="equal", axis="flops")}) != ["undecided"]


EQUAL_COST: Rows = {
    f"equal cost: ×{ratio:g}": (equal_cost, {"ratio": ratio}) for ratio in (1.005, 1.1, 1.5, 1.9, 2.0, 3.0)
}


def stops(rng: Rng, *, num: int) -> bool:
    """Two arms that are alike, of one of which the worst of 10 seeds were stopped."""
    arms = {"a": ends(rng, 10), "alone": ends(rng, 10)}
    worst = sorted(range(10), key=lambda seed: arms["alone"][seed][0][2] - arms["a"][seed][0][2])[:num]
    return verdicts(arms, {"c": claim("a")}, {"a": worst}) == ["supported"]


STOPS: Rows = {f"stops: worst {num} of 10": (stops, {"num": num}) for num in (2, 4)}


def equivalence(rng: Rng, *, true: float) -> bool:
    """A family of five, one of which is truly different by its `within`, or all of which are alike: is a verdict false?"""
    arms = {f"a{i}": ends(rng, 8, mean=3.0 + true * (i == 0)) for i in range(5)} | {"alone": ends(rng, 8)}
    found = verdicts(arms, {name: claim(name, within=0.2) for name in arms if name != "alone"})
    allowed = [("undecided", "refuted" if true and i == 0 else "equivalent") for i in range(5)]
    return any(verdict not in fine and verdict != "undecided" for verdict, fine in zip(found, allowed, strict=True))


EQUIVALENT: Rows = {
    "equivalent: 5 alike": (equivalence, {"true": 0.0}),
    "equivalent: one at the limit": (equivalence, {"true": 0.2}),
}


def covers(
    rng: Rng, *, rule: Rule | None = None, seeds: int, clusters: int, spread: tuple[float, float, float]
) -> bool:
    """The interval over new seeds and examples, of clusters of 1 to 8 examples: is the true difference inside?

    Args:
        rule: of a task's score; by default a loss.
        spread: correlation of examples of a cluster; standard deviation of seeds; of pairs of seed and example.
    """
    correlation, of_seeds, of_pairs = spread
    cluster_E = np.repeat(np.arange(clusters), rng.integers(1, 9, clusters))
    E, S = len(cluster_E), seeds
    shared_E, own_E = rng.normal(size=clusters)[cluster_E], rng.normal(size=E)
    d_SE = math.sqrt(correlation) * shared_E + math.sqrt(1 - correlation) * own_E
    d_SE = d_SE + of_seeds * rng.normal(size=(S, 1)) + of_pairs * rng.normal(size=(S, E))
    part_E, ones_E, label_E = np.zeros(E, np.int64), np.ones(E), (rng.random(E) < 0.4).astype(float)
    if rule is None:
        metric, truth, values_ASE = LM_LOSS, 0.2, np.stack([0.2 + d_SE, 0 * d_SE])
    else:  # both arms are right on the examples that are easy for them, equally many
        easy_E = rng.normal(size=E)
        metric, truth = score_metric(rule), 0.0
        values_ASE = np.abs(label_E - (np.stack([easy_E + d_SE / 2, easy_E - d_SE / 2]) < -0.8))
    runs = [[Examples(part_E, label_E, v_E, v_E, ones_E) for v_E in arm] for arm in values_ASE]
    assert metric.left_out is not None
    left_out_ASC = np.array([[metric.left_out(run, cluster_E) for run in arm] for arm in runs])
    low, high = intervals([DataSet(left_out_ASC, np.zeros(clusters, np.int64), np.bincount(cluster_E))]).mean
    return low <= truth <= high


COVERAGE: Rows = {
    f"coverage: {rule or 'loss'}, {seeds} seeds, {clusters} clusters, {name}": (
        covers,
        {"rule": rule, "seeds": seeds, "clusters": clusters, "spread": spread},
    )
    for rule in (None, "accuracy", "f1", "matthews")
    for seeds in (5, 10, 20)
    for clusters in (30, 60, 120)
    for name, spread in (
        ("r .05, seeds alike", (0.05, 0.0, 0.3)),
        ("r .3, seeds alike", (0.3, 0.0, 0.3)),
        ("r .1, some spread", (0.1, 0.1, 0.3)),
        ("r .3, much spread", (0.3, 0.3, 3.0)),
        ("r .3, pairs alone", (0.3, 0.0, 3.0)),
        ("r .3, seeds alone", (0.3, 1.0, 0.3)),
    )
}


def good_enough(rng: Rng, *, means: Sequence[float], n: int) -> bool:
    """Arms by rising cost, of which those at 3.1 are worse than the best by exactly the 0.1 asked for: is one named?"""
    shared = rng.normal(0, 0.3, n)
    arms = [
        ArmPoint(str(i), dict(enumerate(shared + rng.normal(mean, 0.1, n))), dict.fromkeys(range(n), i + 1.0))
        for i, mean in enumerate(means)
    ]
    found = cheapest_good_enough(arms, 0.1, lower_is_better=True)
    return found is not None and found.name is not None and means[int(found.name)] > 3.05


GOOD_ENOUGH: Rows = {
    f"good enough: {words}, n = {n}": (good_enough, {"means": means, "n": n})
    for words, means in (
        ("one of 2 arms is not", (3.1, 3.0)),
        ("3 of 4 are not", (3.1, 3.1, 3.1, 3.0)),
        ("9 of 10 are not", (*[3.1] * 9, 3.0)),
    )
    for n in (4, 8)
}


def tuned(rng: Rng, *, seeds: int, n: int, costs: Sequence[float]) -> bool:
    """Two arms that are alike, each at the rate that tuning chose; a rate costs so many SDs of a paired difference."""
    by_rate = {10.0**i: cost * choices.SD * math.sqrt(2) for i, cost in enumerate(costs)}
    rates, _ = choices.tuned_rates(rng, by_rate, seeds=seeds)
    arms = {arm: ends(rng, n, mean=3.0 + by_rate[rate], sd=choices.SD) for arm, rate in rates.items()}
    return verdicts(arms, {"c": claim("a")}) != ["undecided"]


def rate_search(rng: Rng, *, is_fair: bool) -> bool:
    """A search over the rate alone, where the baseline's own rate costs 2: is its winner supported?"""
    return choices.rate_search(rng, (0.2, 0.0, 0.0))[is_fair]


TUNED: Rows = {
    f"tuned on {seeds} seeds, n = {n}{where}": (tuned, {"seeds": seeds, "n": n, "costs": costs})
    for where, costs in (("", (1, 0, 1)), (", best at an edge", (0, 1, 2)))
    for n in (5, 10)
    for seeds in (1, 2, 3, 5)
}
WINNER: Rows = {
    "winner: rate searched, baseline's fixed": (rate_search, {"is_fair": False}),
    "winner: rate searched, baseline's alike": (rate_search, {"is_fair": True}),
    **{f"winner: {num} rounds": (choices.rounds, {"num": num}) for num in (1, 2, 10)},
}


def scaling(rng: Rng, *, what: What) -> bool:
    """A known curve over four sizes, five budgets and two teachers: does the interval have r*, C* or the held-out loss inside?"""
    return known_curves(rng, "r" if what == "loss" else what).covers(what)


SCALING: Rows = {f"scaling: coverage of {what}": (scaling, {"what": what}) for what in ("r", "compute", "loss")}


def planned_looks(rng: Rng, *, num: int, looks: Sequence[int] = (5, 8, 12, 20), effect: float = 0.0) -> bool:
    """A family of claims about arms that are alike, but for the first, which is better by `effect` SDs of the pairs, at
    planned looks: is any verdict decided? Where there is an effect: is the first claim supported?"""
    n, gain = looks[-1], effect * 0.1 * math.sqrt(2)
    arms = {f"a{i}": ends(rng, n, mean=3.0 - gain * (i == 0)) for i in range(num)} | {"alone": ends(rng, n)}
    found = verdicts(arms, {name: claim(name) for name in arms if name != "alone"}, looks=looks)
    return found[0] == "supported" if effect else any(verdict != "undecided" for verdict in found)


def added_seeds(rng: Rng) -> bool:
    """No difference, and five seeds more at a time until the claim is decided, without a plan: is the claim decided?"""
    arms = {name: ends(rng, 15) for name in ("a", "alone")}
    seen = ({arm: {seed: own[seed] for seed in range(n)} for arm, own in arms.items()} for n in (5, 10, 15))
    return any(verdicts(some, {"c": claim("a")}) != ["undecided"] for some in seen)


LOOKS: Rows = {
    "looks: seeds added without a plan": (added_seeds, {}),
    "looks: 1 claim": (planned_looks, {"num": 1}),
    "looks: 5 claims": (planned_looks, {"num": 5}),
    **{
        f"looks: power at {effect:g} SD": (planned_looks, {"num": 1, "effect": effect})
        for effect in (0.5, 0.7, 1.0, 1.5)
    },
}


# ---------------------------------------------------------------------------------------------------------- all rows

GROUPS: Sequence[Rows] = (
    HOLM,
    EQUAL_COST,
    STOPS,
    EQUIVALENT,
    COVERAGE,
    GOOD_ENOUGH,
    TUNED,
    WINNER,
    SCALING,
    LOOKS,
)
ROWS: Rows = {name: row for group in GROUPS for name, row in group.items()}


def count(name: str, first: int, num: int) -> int:
    """Counts over repetitions `first` to `first + num`, which are the same however many others there are."""
    draw, fields = ROWS[name]
    rng = np.random.default_rng([*name.encode(), first])
    return sum(draw(rng, **fields) for _ in range(num))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.error_rates", description=__doc__.split("\n")[0])
    parser.add_argument("group", nargs="?", default="", help="beginning of the names of rows; by default all rows")
    parser.add_argument("--num", type=int, default=200, help="repetitions of each row")
    arguments = parser.parse_args(argv)
    chunks = [(first, min(CHUNK, arguments.num - first)) for first in range(0, arguments.num, CHUNK)]
    with ProcessPoolExecutor() as pool:
        rows = [name for name in ROWS if name.startswith(arguments.group)]
        counts = {name: [pool.submit(count, name, *chunk) for chunk in chunks] for name in rows}
        for name, parts in counts.items():
            share = sum(part.result() for part in parts) / arguments.num
            error = math.sqrt(share * (1 - share) / arguments.num)
            print(f"{name:42} {100 * share:5.1f} % ± {100 * error:.1f} of {arguments.num}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
