"""Opens prepared data, whatever their format."""

from __future__ import annotations

from trainables.data.classification.tasks import Task
from trainables.data.corpus.sequences import Corpus
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.storage import prepared_folders

Prepared = Corpus | Task | ExchangeSet


def open_data(folder: str, fingerprint: str) -> Prepared:
    """Opens a corpus, task or set of exchanges; a folder in remote storage is copied to this machine's cache first."""
    home = prepared_folders.fetch(folder, fingerprint)
    about = prepared_folders.read_about(home)
    if "exchanges" in about:
        return ExchangeSet.open(home, fingerprint, about)
    return (Task if "task" in about else Corpus).open(home, fingerprint, about)
