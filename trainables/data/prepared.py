"""TODO."""

from __future__ import annotations

from trainables.data.classification.tasks import Task, _task_in
from trainables.data.corpus.sequences import Corpus, corpus_in
from trainables.data.instructions.exchanges import ExchangeSet, exchanges_in
from trainables.storage import prepared_folders

Prepared = Corpus | Task | ExchangeSet


def open_data(folder: str, fingerprint: str) -> Prepared:
    """A prepared corpus, task or set of exchanges, whichever it is; one in remote storage is copied to this machine's cache first."""
    home = prepared_folders.fetch(folder, fingerprint)
    about = prepared_folders.read_about(home)
    if "exchanges" in about:
        return exchanges_in(home, fingerprint, about)
    return _task_in(home, fingerprint, about) if "task" in about else corpus_in(home, fingerprint, about)
