"""The nine tasks of GLUE (Wang et al. 2019), from the hub or from a folder, with the hub's columns and classes."""

from __future__ import annotations

from pathlib import Path

from trainables.config.data import Glue
from trainables.data.classification.labelled import Labelled, Sources, joined, labelled
from trainables.data.sources import files

COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "stsb": (),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}


def splits_of(data: Glue) -> dict[str, tuple[str, ...]]:
    """The official splits that train and test are; dev is cut from train."""
    parts = ("_matched", "_mismatched") if data.task == "mnli" else ("",)
    return {"train": ("train",), "test": tuple(f"validation{part}" for part in parts)}


def find(data: Glue) -> dict[str, tuple[tuple[files.Place, ...], ...]]:
    """The files of each split, if `source` is a folder: `<source>/<task>/<split>*.parquet`; else nothing."""
    folder = data.source if "://" in data.source else str(Path(data.source).expanduser())
    if "://" not in data.source and not Path(folder).is_dir() and not data.source.startswith(("/", ".", "~")):
        return {}
    return {
        name: tuple(files.find(f"{folder}/{data.task}/{split}*.parquet", f"{name} of {data.task}") for split in splits)
        for name, splits in splits_of(data).items()
    }


def load(data: Glue, found: dict[str, tuple[tuple[files.Place, ...], ...]]) -> Sources:
    """Reads `found`, or the hub."""
    tables = {name: _read(data, name, found.get(name)) for name in ("train", "test")}
    test = tables["test"]
    return Sources(joined(tables["train"]), test=joined(test, as_parts=len(splits_of(data)["test"]) > 1))


def _read(data: Glue, name: str, found: tuple[tuple[files.Place, ...], ...] | None) -> list[Labelled]:
    """A table for each official split."""
    what, texts = f"{name} of {data.task}", COLUMNS[data.task]
    tables = []
    for number, split in enumerate(splits_of(data)[name]):
        if found is not None:
            read = list(files.read_columns(found[number], texts, "label", fields={}, what=what))
        else:
            read = [files.read_hub_columns(data.source, data.task, data.revision, split, texts, "label", what=what)]
        classes = range(data.num_labels) if not data.is_regression else None
        tables.append(
            joined([labelled(one.texts, one.labels, classes=classes, where=f"{what}: {one.where}") for one in read])
        )
    return tables
