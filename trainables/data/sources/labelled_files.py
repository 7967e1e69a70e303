"""A task of one's own from data files."""

from __future__ import annotations

from trainables.config.data import LabelledFiles
from trainables.data.classification.labelled import SPLITS, Labelled, Sources, joined, labelled
from trainables.data.sources import files

Found = dict[str, tuple[files.Place, ...]]


def find(data: LabelledFiles) -> Found:
    named = {name: uri for name in SPLITS if (uri := getattr(data, name)) is not None}
    return {name: files.find(uri, name, files.TABLES) for name, uri in named.items()}


def load(data: LabelledFiles, found: Found) -> Sources:
    """Reads `found`."""
    columns, tables = data.columns, dict[str, Labelled]()
    fields = {column: f"columns.{name}" for name, column in columns if column is not None}
    texts = [text for text in (columns.first, columns.second) if text is not None]
    for name, places in found.items():
        read = files.read_columns(places, texts, columns.label, fields=fields, what=name)
        tables[name] = joined(
            [labelled(one.texts, one.labels, classes=data.classes, where=f"{name}: {one.where}") for one in read]
        )
    return Sources(tables["train"], tables.get("dev"), tables.get("test"))
