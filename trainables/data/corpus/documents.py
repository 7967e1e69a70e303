"""The documents of a corpus in three splits, without near-duplicates across the splits. Knows no tokenizer."""

from __future__ import annotations

import numpy as np

from trainables.data.near_duplicates import Shingles, all_shingles, common, normalise, repeats
from trainables.data.split import SPLITS, Sources, Split, sha256_hex, split_groups

CUT = 0.08  # of the characters of train, for each of dev and test that the data set does not name


Texts = tuple[str, ...]


def split(documents: Sources[Texts]) -> Split[Texts]:
    """Cuts from train the splits that the data set does not name, and removes near-duplicates across splits.

    dev and test are ordered by the hash of the text, train as its source is.
    """
    cut = _cut(documents)
    in_test = all_shingles(cut["test"])
    dev = _without(cut["dev"], in_test)
    train = _without(cut["train"], np.union1d(in_test, all_shingles(dev)))
    # a part of a longer text of train would leak too; a split that the user names stays whole
    dev = dev if documents.dev is not None else _without(dev, common(dev, train))
    test = cut["test"] if documents.test is not None else _without(cut["test"], common(cut["test"], train))
    removed = {name: len(cut[name]) - len(kept) for name, kept in zip(SPLITS, (train, dev, test), strict=True)}
    return Split(tuple(train), tuple(dev), tuple(test), removed)


def _cut(documents: Sources[Texts]) -> dict[str, list[str]]:
    """Texts by split. Whole documents leave train in the order of a hash of their text.

    A share of the characters: by number, a few long documents would decide how much text there is.
    """
    texts = documents.train or ()
    missing = [name for name in ("dev", "test") if getattr(documents, name) is None]
    held_out = dict.fromkeys(missing, CUT * sum(map(len, texts)))
    named = {name: list(own) for name in ("dev", "test") if (own := getattr(documents, name)) is not None}
    splits = split_groups(texts, held_out, key=normalise, size=len) | named
    return {name: own if name == "train" else sorted(own, key=_hash) for name, own in splits.items()}


def _hash(text: str) -> str:
    return sha256_hex(normalise(text))


def _without(texts: list[str], held_out: Shingles) -> list[str]:
    """Returns the texts that have less than half of their shingles in `held_out`."""
    return [text for text, repeated in zip(texts, repeats(texts, held_out), strict=True) if not repeated]
