"""The nine tasks of GLUE (Wang et al. 2019), from the hub or from a folder, with the hub's columns and classes."""

from __future__ import annotations

from pathlib import Path

from trainables.config.data import Glue
from trainables.data.classification.labelled import Labelled, joined, labelled
from trainables.data.sources.files import HubSplit, Places, Wanted, read
from trainables.data.sources.files import find as find_files
from trainables.data.split import Sources

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


def find(data: Glue) -> Places:
    """Finds each official split: files `<source>/<task>/<split>*.parquet` if `source` is a folder, else of the hub.

    dev is cut from train.
    """
    parts = ("_matched", "_mismatched") if data.task == "mnli" else ("",)
    splits = [("train", "train"), *(("test", f"validation{part}") for part in parts)]
    folder = data.source if "://" in data.source else str(Path(data.source).expanduser())
    if "://" in data.source or Path(folder).is_dir() or data.source.startswith(("/", ".", "~")):
        files = ((name, f"{folder}/{data.task}/{own}*.parquet") for name, own in splits)
        return tuple((name, find_files(pattern, f"{name} of {data.task}")) for name, pattern in files)
    return tuple((name, HubSplit(data.source, data.task, data.revision, own)) for name, own in splits)


def load(data: Glue, places: Places) -> Sources[Labelled]:
    texts, classes = COLUMNS[data.task], range(data.num_labels) if CLASSES[data.task] else None
    splits: dict[str, list[Labelled]] = {"train": [], "test": []}
    for name, place in places:
        what = f"{name} of {data.task}"
        tables = read(place, Wanted(texts, ("label",), {}), what=what)
        splits[name].append(joined([labelled(table, texts, "label", classes=classes, what=what) for table in tables]))
    test = joined(splits["test"], as_parts=len(splits["test"]) > 1)
    return Sources(joined(splits["train"]), test=test, class_names=CLASSES[data.task])
