"""Measures how often verdicts are false where the truth is known: tables are drawn, judged, and counted.

    python -m benchmarks.error_rates                    # 200 repetitions of each row, some minutes
    python -m benchmarks.error_rates --num 2000 holm    # one group of rows, more often

Each row draws the values of arms by seed, writes the tables that a sweep would write, and asks `judge`. Rows named
"coverage" count how often the interval over new seeds and new examples has the true difference inside.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.analysis.bootstrap import Answers, crossed
from orchestrator.analysis.verdicts import judge
from orchestrator.study.claims import Claim
from trainables.metrics.language import LM_LOSS
from trainables.metrics.metric import Examples

Rng = np.random.Generator
Arms = Mapping[
    str, Mapping[int, Sequence[tuple[float, float, float]]]
]  # seed -> (progress, FLOPs, loss) of evaluations
HALVES = (0.25, 0.5, 1.0)


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


def stops(rng: Rng, *, num: int) -> bool:
    """Two arms that are alike, of one of which the worst of 10 seeds were stopped."""
    arms = {"a": ends(rng, 10), "alone": ends(rng, 10)}
    worst = sorted(range(10), key=lambda seed: arms["alone"][seed][0][2] - arms["a"][seed][0][2])[:num]
    return verdicts(arms, {"c": claim("a")}, {"a": worst}) == ["supported"]


def equivalence(rng: Rng, *, true: float) -> bool:
    """A family of five, one of which is truly different by its `within`, or all of which are alike: is a verdict false?"""
    arms = {f"a{i}": ends(rng, 8, mean=3.0 + true * (i == 0)) for i in range(5)} | {"alone": ends(rng, 8)}
    found = verdicts(arms, {name: claim(name, within=0.2) for name in arms if name != "alone"})
    allowed = [("undecided", "refuted" if true and i == 0 else "equivalent") for i in range(5)]
    return any(verdict not in fine and verdict != "undecided" for verdict, fine in zip(found, allowed, strict=True))


def covers(rng: Rng, *, num_clusters: int, correlation: float) -> bool:
    """The interval over new seeds and examples of 5 seeds and clusters of 1 to 8 examples: is the truth inside?"""
    clusters_E = np.repeat(np.arange(num_clusters), rng.integers(1, 9, num_clusters))
    shared, own = rng.normal(size=num_clusters)[clusters_E], rng.normal(size=len(clusters_E))
    d_SE = 0.2 + math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    d_SE = d_SE + 0.1 * rng.normal(size=(5, 1)) + 0.3 * rng.normal(size=(5, len(clusters_E)))
    none_E, one_E = np.full(len(clusters_E), np.nan), np.ones(len(clusters_E))
    part_E = np.zeros(len(clusters_E), np.int64)
    runs = [[Examples(part_E, none_E, none_E, loss_E, one_E) for loss_E in arm_SE] for arm_SE in (d_SE, 0 * d_SE)]
    low, high = crossed([Answers(LM_LOSS, runs, clusters_E)], seed=int(rng.integers(2**31)), num=1000).mean
    return low <= 0.2 <= high


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


ROWS: Mapping[str, tuple[Callable[..., bool], Mapping[str, Any]]] = {
    "holm: 5 claims, n = 4": (family, {"num": 5, "n": 4, "fields": {}}),
    "holm: 5 claims, lists of one": (family, {"num": 5, "n": 4, "fields": {"against": ["alone"]}}),
    "holm: 5 claims, less FLOPs": (family, {"num": 5, "n": 4, "fields": {"less": "flops"}}),
    "holm: 5 claims against two": (family, {"num": 5, "n": 5, "fields": {"against": ["alone", "longer"]}}),
    "holm: 10 claims, n = 5": (family, {"num": 10, "n": 5, "fields": {}}),
    **{f"equal cost: ×{ratio:g}": (equal_cost, {"ratio": ratio}) for ratio in (1.005, 1.1, 1.5, 1.9, 2.0, 3.0)},
    **{f"stops: worst {num} of 10": (stops, {"num": num}) for num in (2, 4)},
    "equivalent: 5 alike": (equivalence, {"true": 0.0}),
    "equivalent: one at the limit": (equivalence, {"true": 0.2}),
    **{
        f"coverage: {num} clusters, correlation {correlation:g}": (
            covers,
            {"num_clusters": num, "correlation": correlation},
        )
        for num in (30, 60)
        for correlation in (0.0, 0.1, 0.3)
    },
    "looks: seeds added without a plan": (added_seeds, {}),
    "looks: 1 claim": (planned_looks, {"num": 1}),
    "looks: 5 claims": (planned_looks, {"num": 5}),
    **{
        f"looks: power at {effect:g} SD": (planned_looks, {"num": 1, "effect": effect})
        for effect in (0.5, 0.7, 1.0, 1.5)
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.error_rates", description=__doc__.split("\n")[0])
    parser.add_argument("group", nargs="?", default="", help="beginning of the names of rows; by default all rows")
    parser.add_argument("--num", type=int, default=200, help="repetitions of each row")
    arguments = parser.parse_args(argv)
    for name, (draw, fields) in ROWS.items():
        if name.startswith(arguments.group):
            rng = np.random.default_rng(0)
            share = sum(draw(rng, **fields) for _ in range(arguments.num)) / arguments.num
            error = math.sqrt(share * (1 - share) / arguments.num)
            print(f"{name:42} {100 * share:5.1f} % ± {100 * error:.1f} of {arguments.num}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
