"""Documents from data files and from the hub: a document per row, or per block of a text file."""

from __future__ import annotations

from trainables.config.data import Files, Hub
from trainables.data.corpus.documents import Texts
from trainables.data.sources.files import Places, read_documents
from trainables.data.split import Sources


def load(data: Files | Hub, places: Places) -> Sources[Texts]:
    splits = {name: tuple(read_documents(place, data.columns.text, what=name)) for name, place in places}
    return Sources(splits["train"], splits.get("dev"), splits.get("test"))
