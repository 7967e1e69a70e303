"""Measures what it takes to judge claims: CPU seconds of this process.

    python -m benchmarks.judging                          # 20 claims, 20 seeds, 5,000 examples
    python -m benchmarks.judging --metric score --clusters 500

One baseline, an arm for each claim, all answers stored; tables are built before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from orchestrator.analysis.queries import TaskFacts
from orchestrator.analysis.tables import EXAMPLES
from orchestrator.analysis.verdicts import judge
from orchestrator.study.claims import Claim
from trainables.metrics.task_scores import score_metric


def drawn(arms: Sequence[str], seeds: int, num: int, clusters: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Draws the tables of results, trials and examples of a task with two classes."""
    rng, results, trials, answers = np.random.default_rng(0), list[object](), list[object](), list[pa.Table]()
    label_E, cluster_E = rng.integers(0, 2, num), rng.integers(0, clusters, num)
    about_set = {"model": "m", "phase": "train", "task": "text", "split": "test"}
    for arm in arms:
        for seed in range(seeds):
            about = {"trial": f"{arm}-{seed}", "arm": arm, "point": arm, "seed": seed, "kind": "trial", "planned": True}
            spent = {"reused": False, "tokens": 0, "device_seconds": 1.0, "flops": 1.0, "key": about["trial"]}
            trials.append({**about, "status": "ended", "phases": json.dumps({"train": spent})})
            loss_E, right_E = rng.gamma(2.0, 1.0, num), rng.random(num) < 0.8
            for metric, value in (("task_loss", loss_E.mean()), ("score", 100 * right_E.mean())):
                cost = {"tokens": 0, "device_seconds": 1.0, "progress": 1.0, "flops": 1.0}
                results.append({**about, **about_set, **cost, "metric": metric, "value": value})
            whole = {name: pa.array([value] * num) for name, value in (about | about_set | {"part": 0}).items()}
            columns = {"example": range(num), "label": label_E, "prediction": np.where(right_E, label_E, 1 - label_E)}
            columns |= {"loss": loss_E, "count": np.ones(num, np.int64), "cluster": cluster_E}
            table = whole | {name: pa.array(values) for name, values in columns.items()}
            answers.append(pa.table(table).select(EXAMPLES.names).cast(EXAMPLES))
    examples = pa.concat_tables(answers).unify_dictionaries().to_pandas()
    return pd.DataFrame(results), pd.DataFrame(trials), examples


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judging", description=__doc__.split("\n")[0])
    parser.add_argument("--claims", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--clusters", type=int, default=5000)
    parser.add_argument("--metric", choices=("task_loss", "score"), default="task_loss")
    asked = parser.parse_args(argv)
    arms = [f"a{i}" for i in range(asked.claims)]
    results, trials, examples = drawn(["alone", *arms], asked.seeds, asked.examples, asked.clusters)
    claims = {arm: Claim(arm=arm, against="alone", model="m", metric=asked.metric) for arm in arms}
    facts = TaskFacts(scores={"text": score_metric("accuracy")})
    begun = time.process_time()
    verdicts = judge(claims, results, trials, default_phase="train", examples=examples, tasks=facts)
    took = time.process_time() - begun
    with_interval = sum(part.new_data is not None for verdict in verdicts.values() for part in verdict.parts)
    print(
        f"{asked.claims} claims, {asked.seeds} seeds, {asked.examples:,} examples, {asked.metric}: {took:.2f} s; "
        f"{with_interval} intervals over new examples"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
