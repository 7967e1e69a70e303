"""Compares the numbers of two storages, as a refactoring needs it: nothing that is computed may have changed.

    python -m benchmarks.same OLD NEW                  # two folders with <study>/results.parquet, trials.parquet, examples.parquet
    python -m benchmarks.same OLD NEW --rtol 1e-12     # equal up to a relative error

Numbers are matched by study, arm, kind, seed, parameters, phase, model, task, split, metric, step and progress (answers to
test examples by part and example), never by trial id: ids and keys may change between versions. Every number of arms,
tuning and shared phases must be in both storages and be equal to the last digit. A search may draw other points, because
trials end in another order: its points, the confirmation of its winner, and phases shared at their seeds are compared
where both storages have them. Several trials may record one shared phase: each distinct value under a key must then be
in both storages. Exit status: 0 all numbers are the same, 1 some differ or are missing, 2 a storage cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

# Metrics that are times or depend on the machine's state. Nobody can reproduce them, not even by running the same code
# twice; for the same reason the columns `seconds`, `device_seconds` and `t` are not among COLUMNS.
NOT_REPRODUCIBLE = {"seconds", "device_seconds", "latency_ms", "tokens_per_second", "peak_memory"}
TRIAL_KEY = ["kind", "arm", "seed", "params"]
KEYS = {
    "results": [*TRIAL_KEY, "phase", "model", "task", "split", "metric", "step", "progress"],
    "trials": TRIAL_KEY,
    "examples": [*TRIAL_KEY, "phase", "model", "task", "split", "part", "example"],
}
COLUMNS = {
    "results": ["value", "tokens", "flops"],
    "trials": ["upstream_flops"],
    "examples": ["label", "prediction", "loss", "count"],
}
SHOWN = 5  # differences of each kind per study


@dataclass(frozen=True)
class Comparison:
    """The numbers of one column of a table: how many keys both storages have, and the rows that have no partner.

    `differing`: keys of both storages, with a value that only one has; `missing`: keys that only one storage has, although
    it must be in both; `drawn_once`: those of a search that only one storage has drawn. The column `side` says which.
    """

    table: str
    column: str
    compared: int
    differing: pd.DataFrame
    missing: pd.DataFrame
    drawn_once: pd.DataFrame

    @property
    def unequal(self) -> int:
        return len(self.differing[KEYS[self.table]].drop_duplicates())

    @property
    def same(self) -> bool:
        return self.differing.empty and self.missing.empty


def studies(storage: Path) -> set[str]:
    return {file.parent.name for file in storage.glob("*/results.parquet")}


def read(study: Path) -> dict[str, pd.DataFrame]:
    """Reads the three tables of planned trials; `params` joined to each, texts without nulls. Old storages have no examples."""
    trials = pd.read_parquet(study / "trials.parquet")
    params = trials[["trial", "params"]].drop_duplicates("trial")
    frames = {}
    for name, key in KEYS.items():
        if not (study / f"{name}.parquet").exists():
            frames[name] = pd.DataFrame(columns=[*key, *COLUMNS[name]])
            continue
        frame = pd.read_parquet(study / f"{name}.parquet")
        frame = frame[frame["planned"].astype(bool)]
        if name == "results":
            frame = frame[~frame["metric"].isin(NOT_REPRODUCIBLE)]
        if name != "trials":
            frame = frame.merge(params, on="trial", how="left")
        frame = frame[[*key, *COLUMNS[name]]].copy()
        for column in set(key) - {"seed", "step", "progress", "part", "example"}:
            frame[column] = frame[column].astype(object).where(frame[column].notna(), "")
        frames[name] = frame
    return frames


def search_seeds(trials: pd.DataFrame) -> set[int]:
    """Returns the seeds of searched points and of confirmations: what trains there depends on what the search drew."""
    return set(trials.loc[_of_search(trials), "seed"])


def _of_search(frame: pd.DataFrame) -> pd.Series[bool]:
    return (frame["kind"] == "confirm") | ((frame["kind"] == "trial") & (frame["arm"] == ""))


def compare(old: Path, new: Path, rtol: float = 0.0) -> Iterator[Comparison]:
    """Compares two studies' folders, column by column."""
    before, after = read(old), read(new)
    seeds = search_seeds(before["trials"]) | search_seeds(after["trials"])
    for table, key in KEYS.items():
        for column in COLUMNS[table]:
            numbers = [frames[table][[*key, column]].drop_duplicates() for frames in (before, after)]
            yield _compare(table, column, numbers[0], numbers[1], seeds=seeds, rtol=rtol)


def _compare(
    table: str, column: str, old: pd.DataFrame, new: pd.DataFrame, *, seeds: set[int], rtol: float
) -> Comparison:
    key = KEYS[table]
    in_both = old[key].drop_duplicates().merge(new[key].drop_duplicates(), on=key)
    joined = old.merge(new, on=[*key, column], how="outer", indicator="side")
    alone = joined[joined["side"] != "both"].copy()
    alone["side"] = alone["side"].map({"left_only": "old", "right_only": "new"}).astype(object)
    alone = alone.merge(in_both.assign(both=True), on=key, how="left")
    known = alone.pop("both").notna()
    differing, once = alone[known], alone[~known]
    if rtol:
        differing = _beyond(differing, key, column, rtol=rtol)
    free = _of_search(once) | ((once["kind"] == "teacher") & once["seed"].isin(seeds))
    return Comparison(table, column, len(in_both), differing, once[~free], once[free])


def _beyond(differing: pd.DataFrame, key: list[str], column: str, *, rtol: float) -> pd.DataFrame:
    """Returns the rows that no value of the other storage under the same key is close to."""
    pairs = differing.reset_index().merge(differing.reset_index(), on=key, suffixes=("", "_other"))
    pairs = pairs[pairs["side"] != pairs["side_other"]]
    close = np.isclose(pairs[column].astype(float), pairs[f"{column}_other"].astype(float), rtol=rtol, atol=0)
    return differing[~differing.index.isin(set(pairs.loc[close, "index"]))]


def describe(comparison: Comparison) -> Iterator[str]:
    """Yields the first differences with their keys, then what only one storage has."""
    key, column = KEYS[comparison.table], comparison.column
    groups = comparison.differing.groupby(key, dropna=False, sort=False)
    for number, (names, rows) in enumerate(groups):
        if number == SHOWN:
            yield f"    … {groups.ngroups - SHOWN} more"
            break
        values = [", ".join(map(repr, rows.loc[rows["side"] == side, column].tolist())) for side in ("old", "new")]
        yield f"    {comparison.table}.{column} differs: {_named(key, names)}: old {values[0] or '-'}, new {values[1] or '-'}"
    for side, rows in comparison.missing.groupby("side"):
        yield f"    {comparison.table}.{column}: {len(rows):,} only in {side}, first {_named(key, rows.iloc[0][key])}"
    for side, rows in comparison.drawn_once.groupby("side"):
        yield f"    {comparison.table}.{column}: {len(rows):,} of search points that only {side} drew, not compared"


def _named(key: list[str], values: object) -> str:
    return " ".join(f"{name}={value}" for name, value in zip(key, list(values), strict=True) if value != "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, help="a storage's folder")
    parser.add_argument("new", type=Path, help="another one's")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative error up to which numbers are equal (0)")
    args = parser.parse_args()
    found = {side: studies(side) for side in (args.old, args.new)}
    for storage, names in found.items():
        if not names:
            parser.error(f"{storage}: expected a folder with <study>/results.parquet")
    differ = False
    for study in sorted(found[args.old] | found[args.new]):
        lacking = [str(storage) for storage, names in found.items() if study not in names]
        if lacking:
            print(f"{study}: not in {lacking[0]}")
            differ = True
            continue
        comparisons = list(compare(args.old / study, args.new / study, args.rtol))
        compared, unequal = sum(c.compared for c in comparisons), sum(c.unequal for c in comparisons)
        missing = sum(len(c.missing) for c in comparisons)
        tail = f", {missing:,} in one storage only" if missing else ""
        print(f"{study}: {compared:,} numbers compared, {compared - unequal:,} equal, {unequal:,} differ{tail}")
        for comparison in comparisons:
            for line in describe(comparison):
                print(line)
        differ |= not all(c.same for c in comparisons)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
