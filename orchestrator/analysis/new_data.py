"""Intervals over new seeds and new examples.

Examples of one document or text are a cluster, which is new or not as a whole. The metric is computed without each cluster in
turn (the jackknife), so that it may be any function of its examples, and no number is drawn. With S seeds and C clusters

    half² = t(S - 1)² · max(0, V_S - V_SC) + t(C' - 1)² · max(0, V_C - V_SC) + z² · V_SC

where V_S is the variance of the mean difference by seeds, V_C that by clusters, and V_SC that of what varies with the pair of
both, which is in either (Cameron, Gelbach and Miller, 2011). C' = (Σ n)² / Σ n² is the number of clusters of one size that
would say as much as clusters of n examples do. docs/statistics.md has the simulated coverage, and why few seeds or clusters
have no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from orchestrator.analysis.notes import Kind, note
from orchestrator.analysis.queries import MetricQuery, Records, TaskFacts, parsed
from orchestrator.analysis.statistics import ALPHA, Interval, t_quantile
from trainables.config.phase_run import PhaseRun
from trainables.metrics.metric import Examples, Floats, Metric

# below these no formula was found that covers 93 to 97 % whatever the spread comes from
MIN_SEEDS = 5
MIN_CLUSTERS = 30
MIN_EFFECTIVE = 15  # clusters of one size


class Stratum(NamedTuple):
    """The clusters C of a data set, or of a part of it, whose number is fixed."""

    moved_SC: Floats  # by how much the difference of the arms moves without each cluster, at each seed
    effective: float  # clusters of one size that would say as much


class Variances(NamedTuple):
    """Variances of a mean difference over new seeds and new examples."""

    num_seeds: int
    seeds: float
    clusters: float
    both: float  # of what varies with the pair of seed and cluster; also in either of the others
    freedom: float  # degrees of freedom of `clusters`
    samples: float = 0.0  # of what varies with the drawn replies; also in `both`

    def half(self, alpha: float) -> float:
        """Returns half of the width of the interval."""
        z2, of_clusters = t_quantile(math.inf, alpha) ** 2, t_quantile(self.freedom, alpha) ** 2
        of_seeds = t_quantile(self.num_seeds - 1, alpha) ** 2 if self.num_seeds > 1 else 0.0
        seeds, clusters = (max(0.0, total - self.both) for total in (self.seeds, self.clusters))
        return math.sqrt(of_seeds * seeds + of_clusters * clusters + z2 * self.both)


def variances(d_S: Floats, strata: Sequence[Stratum]) -> Variances:
    """Estimates the variances of mean(d_S). Of one seed, those of this seed are over new examples alone."""
    S = len(d_S)
    by_stratum, both = list[tuple[float, float]](), 0.0
    for moved_SC, effective in strata:
        mean_C, shrunk = moved_SC.mean(0), 1 - 1 / moved_SC.shape[1]
        by_stratum.append((shrunk * float(mean_C @ mean_C), effective - 1))
        both += shrunk * float(((moved_SC - mean_C) ** 2).sum()) / (S * max(1, S - 1))
    clusters = sum(variance for variance, _ in by_stratum)
    spread = sum(variance**2 / freedom for variance, freedom in by_stratum)
    freedom = clusters**2 / spread if spread else math.inf
    return Variances(S, float(d_S.var(ddof=1)) / S if S > 1 else 0.0, clusters, both, freedom)


class DataSet(NamedTuple):
    """The answers of two arms to one data set, as values of the metric."""

    left_out_ASC: Floats  # of each arm and seed: without each cluster; last, of all examples
    part_C: NDArray[np.int64]  # of the test set, that of each cluster
    num_C: NDArray[np.int64]  # examples
    moved_SKE: Floats | None = None  # of drawn replies k: by how much the difference moves without each example

    @property
    def difference_S(self) -> Floats:
        difference_S: Floats = self.left_out_ASC[0, :, -1] - self.left_out_ASC[1, :, -1]
        return difference_S

    def strata(self, share: float = 1.0) -> list[Stratum]:
        """Returns the parts of the data set, which counts for this share of a mean."""
        moved_SC = self.left_out_ASC[0] - self.left_out_ASC[1]
        moved_SC = share * (moved_SC[:, :-1] - moved_SC[:, -1:])
        parts = [self.part_C == part for part in np.unique(self.part_C)]
        return [Stratum(moved_SC[:, here], _effective(self.num_C[here])) for here in parts]

    @property
    def sample_variance(self) -> float:
        """The variance of the mean difference over seeds that other draws of the replies would change.

        It is what varies with the example, the draw and the seed, since a draw that is the same at all seeds moves none.
        """
        if self.moved_SKE is None or min(self.moved_SKE.shape[:2]) < 2:
            return 0.0
        S, K = self.moved_SKE.shape[:2]
        x_SKE: Floats = self.moved_SKE - self.moved_SKE.mean(0)
        x_SKE = x_SKE - x_SKE.mean(1, keepdims=True)
        return float((x_SKE**2).sum() / ((S - 1) * (K - 1) * K * S))


def _effective(num_C: NDArray[np.int64]) -> float:
    return float(num_C.sum() ** 2 / (num_C**2).sum())


class NewData(NamedTuple):
    """Intervals of arm - against over new seeds and new examples; of one seed, over new examples."""

    mean: Interval  # over the data sets
    each: tuple[Interval, ...]
    variances: Variances  # of the mean

    num_samples: int = 0  # replies that are drawn for each prompt

    @property
    def share(self) -> float | None:
        """Of the variance over seeds: what varies with the example as well. None where seeds do not differ."""
        return min(1.0, self.variances.both / self.variances.seeds) if self.variances.seeds else None

    @property
    def sample_share(self) -> float | None:
        """Of the variance over seeds: what varies with the drawn replies. None where none are drawn, or seeds do not differ."""
        if not self.variances.seeds or self.num_samples < 2:
            return None
        return min(1.0, self.variances.samples / self.variances.seeds, self.variances.both / self.variances.seeds)


def intervals(data: Sequence[DataSet], *, alpha: float = ALPHA) -> NewData:
    def interval(d_S: Floats, found: Variances) -> Interval:
        mean, half = float(d_S.mean()), found.half(alpha)
        return mean - half, mean + half

    mean_S: Floats = np.mean([of_set.difference_S for of_set in data], axis=0)
    whole = variances(mean_S, [stratum for of_set in data for stratum in of_set.strata(1 / len(data))])
    whole = whole._replace(samples=sum(of_set.sample_variance for of_set in data) / len(data) ** 2)
    each = (interval(d.difference_S, variances(d.difference_S, d.strata())) for d in data)
    num_samples = max(0 if d.moved_SKE is None else d.moved_SKE.shape[1] for d in data)
    return NewData(interval(mean_S, whole), tuple(each), whole, num_samples)


# ------------------------------------------------------------------------------------------------------- the table


class Missing(Exception):
    """There is no interval over examples; `note` says why."""

    def __init__(self, why: Kind, **about: str | int) -> None:
        self.note = note(why, **about)
        super().__init__(str(self.note))


class RunAnswers(NamedTuple):
    """The answers of one run to a data set, in the order of the examples."""

    examples: Examples
    number_E: NDArray[np.int64]  # of the example in its part
    cluster_E: Floats  # NaN where unknown
    samples_EK: Floats | None  # the score of each drawn reply, where replies are drawn


class Runs(NamedTuple):
    """The runs whose answers are compared."""

    arms: tuple[str, str]  # arm, against
    queries: tuple[MetricQuery, MetricQuery]
    seeds: Sequence[int]
    recorded: Mapping[str, Floats]  # data set -> the metric [A, S] in the results


_Key = tuple[str, int, str, str, str]  # arm or point, seed, model, data set, phase without its branch


class StoredAnswers:
    """The answers of planned runs to examples of test. A run is read once, however many claims compare it."""

    def __init__(self, examples: pd.DataFrame, records: Records) -> None:
        keep = examples["planned"].eq(True) & (examples["kind"] == records.kind) & (examples["split"] == "test")
        rows = examples if keep.all() else examples[keep]
        self._columns = {
            name: rows[name].to_numpy(dtype=np.int64 if name in ("part", "example") else np.float64)
            for name in ("part", "example", "label", "prediction", "loss", "count", "cluster")
            if name in rows
        }
        # a column of nulls, as of tasks, is not read row by row
        self._scores = rows["scores"].to_numpy() if "scores" in rows and rows["scores"].notna().any() else None
        self._samples = pa.array(rows["samples"], pa.list_(pa.float32())) if "samples" in rows else None
        self._places = dict[_Key, list[NDArray[np.intp]]]()
        keys = [records.column, "seed", "model", "task", "phase"]
        found: Any = rows.groupby(keys, observed=True, sort=False).indices
        for (name, seed, model, task, phase), places in found.items():
            key = (name, int(seed), model, task, PhaseRun.parse(phase).phase)
            self._places.setdefault(key, []).append(places)
        self._runs = dict[_Key, RunAnswers]()
        self._values = dict[tuple[object, ...], tuple[RunAnswers, Floats]]()

    @property
    def num_runs(self) -> int:
        return len(self._places)

    def intervals(self, runs: Runs, facts: TaskFacts, *, alpha: float = ALPHA) -> NewData:
        """Computes the intervals of one comparison. Raises Missing."""
        metric = runs.queries[0].metric
        if 1 < (num := len(runs.seeds)) < MIN_SEEDS:
            raise Missing(Kind.FEW_SEEDS, num=num, least=MIN_SEEDS)
        data = []
        for task, recorded_AS in runs.recorded.items():
            if (own := facts.metric(metric, task)).left_out is None or own.name != metric:
                raise Missing(Kind.NOT_BY_EXAMPLE, metric=metric, task=task)
            found = self._data_set(runs, own, task)
            # the metric of the answers must be the judged one
            if not np.allclose(found.left_out_ASC[..., -1], recorded_AS, rtol=1e-3, atol=1e-3):
                raise Missing(Kind.OTHER_VALUE, task=task)
            if (num := len(found.part_C)) < MIN_CLUSTERS:
                raise Missing(Kind.FEW_CLUSTERS, task=task, num=num, least=MIN_CLUSTERS)
            if (effective := sum(stratum.effective for stratum in found.strata())) < MIN_EFFECTIVE:
                raise Missing(Kind.UNEVEN_CLUSTERS, task=task, num=num, effective=int(effective), least=MIN_EFFECTIVE)
            data.append(found)
        return intervals(data, alpha=alpha)

    def _data_set(self, runs: Runs, metric: Metric, task: str) -> DataSet:
        found = [
            [self._left_out(arm, seed, query, (task, metric)) for seed in runs.seeds]
            for arm, query in zip(runs.arms, runs.queries, strict=True)
        ]
        first = found[0][0][0]
        for arm, of_arm in zip(runs.arms, found, strict=True):
            for seed, (run, _) in zip(runs.seeds, of_arm, strict=True):
                same: list[tuple[Any, Any]] = [
                    (run.number_E, first.number_E),
                    (run.examples.part_E, first.examples.part_E),
                ]
                same += [(run.examples.label_E, first.examples.label_E)] if "label" in metric.needs else []
                if run is not first and not all(np.array_equal(*pair) for pair in same):
                    raise Missing(Kind.OTHER_EXAMPLES, task=task, arm=arm, seed=seed)
                if np.isnan(run.cluster_E).any():
                    raise Missing(Kind.NO_CLUSTERS, task=task)
                if run is not first and not np.array_equal(run.cluster_E, first.cluster_E):
                    raise Missing(Kind.OTHER_EXAMPLES, task=task, arm=arm, seed=seed)
        clusters_E, part_C = clusters(first.examples.part_E, first.cluster_E)
        moved_ASKE = [[_moved(run, metric) for run, _ in of_arm] for of_arm in found]
        is_drawn = len({None if moved is None else moved.shape for of_arm in moved_ASKE for moved in of_arm}) == 1
        return DataSet(
            np.array([[values for _, values in of_arm] for of_arm in found]),
            part_C,
            np.bincount(clusters_E),
            np.subtract(*np.array(moved_ASKE)) if is_drawn and moved_ASKE[0][0] is not None else None,
        )

    def _left_out(self, arm: str, seed: int, query: MetricQuery, what: tuple[str, Metric]) -> tuple[RunAnswers, Floats]:
        """Returns a run, and the metric without each of its clusters."""
        task, metric = what
        key = (arm, seed, query.model, task, query.phase)
        if (*key, metric.name) not in self._values:
            run = self._run(key, arm)
            assert metric.left_out is not None
            values_C = metric.left_out(run.examples, clusters(run.examples.part_E, run.cluster_E)[0])
            self._values[*key, metric.name] = run, values_C
        return self._values[*key, metric.name]

    def _run(self, key: _Key, arm: str) -> RunAnswers:
        if key not in self._runs:
            if key not in self._places:
                raise Missing(Kind.RUN_NOT_STORED, task=key[3], arm=arm, seed=key[1])
            where = np.concatenate(self._places[key])
            where = where[np.lexsort((self._columns["example"][where], self._columns["part"][where]))]
            column = {name: values[where] for name, values in self._columns.items()}
            part_E, number_E = column["part"], column["example"]
            if ((part_E[1:] == part_E[:-1]) & (number_E[1:] == number_E[:-1])).any():
                raise Missing(Kind.SEVERAL_RUNS, arm=arm, seed=key[1])
            examples = Examples(
                part_E, column["label"], column["prediction"], column["loss"], column["count"], self._scores_at(where)
            )
            samples = None if self._samples is None else self._samples.take(pa.array(where))
            samples_EK = None if samples is None or samples.null_count else np.array(samples.to_pylist())
            cluster_E = column.get("cluster", np.full(len(where), np.nan))
            self._runs[key] = RunAnswers(examples, number_E, cluster_E, samples_EK)
        return self._runs[key]

    def _scores_at(self, where: NDArray[np.intp]) -> dict[str, Floats]:
        """Returns the scores of these replies by the metrics that each of them has."""
        rows = [] if self._scores is None else [parsed(row) for row in self._scores[where]]
        names = set(rows[0]).intersection(*rows) if rows else ()
        return {name: np.array([row[name] for row in rows]) for name in names}


def stored_answers(examples: pd.DataFrame | None, records: Records) -> StoredAnswers | None:
    """Reads the answers; None where there are none."""
    found = None if examples is None or examples.empty else StoredAnswers(examples, records)
    return found if found is not None and found.num_runs else None


def _moved(run: RunAnswers, metric: Metric) -> Floats | None:
    """Returns [K, E] by how much the metric of each draw moves without each example; None where the metric is of no drawn
    replies."""
    if run.samples_EK is None or metric.needs != ("prediction",) or metric.left_out is None:
        return None
    drawn = (replace(run.examples, prediction_E=score_E) for score_E in run.samples_EK.T)
    left_out_KE: Floats = np.array([metric.left_out(one, np.arange(len(run.number_E))) for one in drawn])
    moved_KE: Floats = left_out_KE[:, :-1] - left_out_KE[:, -1:]
    return moved_KE


def clusters(part_E: NDArray[np.int64], cluster_E: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers the clusters from 0: [E] that of each example, and [C] the part of each. Parts share no cluster."""
    of_part, of_cluster = (np.unique(values_E, return_inverse=True)[1] for values_E in (part_E, cluster_E))
    both_E = of_part * (int(of_cluster.max()) + 1) + of_cluster
    _, first_C, number_E = np.unique(both_E, return_index=True, return_inverse=True)
    return number_E, part_E[first_C]
