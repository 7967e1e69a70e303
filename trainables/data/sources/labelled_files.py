"""A user's task from data files."""

from __future__ import annotations

from trainables.config.data import LabelledFiles
from trainables.data.classification.labelled import Labelled, joined, labelled
from trainables.data.sources.files import Places, Wanted, read
from trainables.data.split import Sources


def load(data: LabelledFiles, places: Places) -> Sources[Labelled]:
    columns, tables = data.columns, dict[str, Labelled]()
    fields = {column: f"columns.{name}" for name, column in columns if column is not None}
    texts = tuple(text for text in (columns.first, columns.second) if text is not None)
    for name, place in places:
        read_tables = read(place, Wanted(texts, (columns.label,), fields), what=name)
        tables[name] = joined([labelled(t, texts, columns.label, classes=data.classes, what=name) for t in read_tables])
    names = tuple(map(str, data.classes or ()))
    return Sources(tables["train"], tables.get("dev"), tables.get("test"), class_names=names)
