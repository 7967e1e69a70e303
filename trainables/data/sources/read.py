"""The source of each kind of data. A new kind is a value in `config/data.py`, a module here, and a row of `READERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from trainables.config.data import Data
from trainables.data.sources import (
    documents,
    glue,
    instruction_rows,
    labelled_files,
    python_docs,
    python_instructions,
    python_tasks,
)
from trainables.data.sources.files import Places, find_files, find_hub, find_tables
from trainables.data.split import Sources


class SourceReader(NamedTuple):
    find: Callable[[Any], Places]  # the files of a data set, with their states
    load: Callable[[Any, Places], Sources[Any]]


def _of_python(_: Data) -> Places:
    return ()


READERS: Mapping[str, SourceReader] = {
    "python_docs": SourceReader(_of_python, python_docs.load),
    "files": SourceReader(find_files, documents.load),
    "hub": SourceReader(find_hub, documents.load),
    "glue": SourceReader(glue.find, glue.load),
    "python_task": SourceReader(_of_python, python_tasks.load),
    "labelled_files": SourceReader(find_tables, labelled_files.load),
    "python_instructions": SourceReader(_of_python, python_instructions.load),
    "instruction_files": SourceReader(find_tables, instruction_rows.load),
    "instruction_hub": SourceReader(find_hub, instruction_rows.load),
}


def read_source(data: Data) -> Sources[Any]:
    """Reads the examples of a data set; they stay in memory as long as the files stay as they are."""
    return _load(data.unprepared, READERS[data.kind].find(data))


@lru_cache(maxsize=8)
def _load(data: Data, places: Places) -> Sources[Any]:
    return READERS[data.kind].load(data, places)
