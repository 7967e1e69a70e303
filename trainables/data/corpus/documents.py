"""The documents of a data set in three splits, without near-duplicates across them. Knows no tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainables.config.data import Corpora, Files, Hub, PythonDocs, WordPiece
from trainables.data.sources import files, python_docs

CUT = 0.08  # of the characters of train, for each of dev and test that the data set does not name
SHINGLE = 8  # words
DUPLICATE = 0.5  # a document with this share of its shingles in another split leaves
CHUNK = 4_000_000  # characters that are looked at together
SPLITS = ("train", "dev", "test")

Shingles = NDArray[np.uint64]


@dataclass(frozen=True)
class Documents:
    """Texts as the sources have them; None where the data set names no source."""

    train: tuple[str, ...]
    dev: tuple[str, ...] | None = None
    test: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Splits:
    """Texts by split. dev and test are ordered by the hash of the text, train as its source is."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]
    removed: dict[str, int]  # split -> documents left out because another split has nearly the same text


def load_documents(data: Corpora) -> Documents:
    """Reads the sources; what was read stays in memory as long as the files stay as they are."""
    found: dict[str, tuple[files.Place, ...]] = {}
    if isinstance(data, Files):
        found = {name: files.find(uri, name) for name in SPLITS if (uri := getattr(data, name)) is not None}
    # only what says where the text is belongs to the key
    source = data.model_copy(update={"tokenizer": WordPiece(kind="wordpiece"), "length": 128, "evaluate": 256})
    return _load(source, tuple(found.items()))


@lru_cache(maxsize=4)
def _load(source: Corpora, found: tuple[tuple[str, tuple[files.Place, ...]], ...]) -> Documents:
    match source:
        case PythonDocs():
            return Documents(tuple(python_docs.documents()))
        case Files():
            return Documents(**{name: tuple(files.read(at, text=source.columns.text, what=name)) for name, at in found})
        case Hub():
            splits = {name: split for name in SPLITS if (split := getattr(source, name)) is not None}
            return Documents(
                **{name: tuple(files.read_hub(source, split, what=name)) for name, split in splits.items()}
            )


def split(documents: Documents) -> Splits:
    """Cuts from train what the data set does not name, and removes near-duplicates across splits."""
    cut_train, dev, test = _cut(documents)
    in_test = all_shingles(test)
    kept_dev = _without(dev, in_test)
    train = _without(cut_train, np.union1d(in_test, all_shingles(kept_dev)))
    # what is a part of a longer text of train would leak too; a test set that the user names stays as it is
    kept_dev = kept_dev if documents.dev is not None else _without(kept_dev, _common(kept_dev, train))
    kept_test = test if documents.test is not None else _without(test, _common(test, train))
    removed = {
        "train": len(cut_train) - len(train),
        "dev": len(dev) - len(kept_dev),
        "test": len(test) - len(kept_test),
    }
    return Splits(tuple(train), tuple(kept_dev), tuple(kept_test), removed)


def _cut(documents: Documents) -> tuple[list[str], list[str], list[str]]:
    """(train, dev, test). Whole documents go, in the order of a hash of their text, until a split has its share.

    A share of the characters: by number, a few long documents would decide how much text there is.
    """
    split_of = ["train"] * len(documents.train)
    rest = iter(sorted((_hash(text), index) for index, text in enumerate(documents.train)))
    for name in ("dev", "test"):
        missing = CUT * sum(map(len, documents.train)) if getattr(documents, name) is None else 0
        while missing > 0 and (found := next(rest, None)) is not None:
            split_of[found[1]] = name
            missing -= len(documents.train[found[1]])
    cut = {name: [text for text, at in zip(documents.train, split_of, strict=True) if at == name] for name in SPLITS}
    held_out = {name: cut[name] if (named := getattr(documents, name)) is None else named for name in ("dev", "test")}
    return cut["train"], sorted(held_out["dev"], key=_hash), sorted(held_out["test"], key=_hash)


def normalise(text: str) -> str:
    """What two near-identical texts have in common: no case, no numbers, single spaces."""
    return " ".join(re.sub(r"\d+", "0", text.lower()).split())


def _hash(text: str) -> str:
    return hashlib.sha256(normalise(text).encode()).hexdigest()


def _without(texts: list[str], held_out: Shingles) -> list[str]:
    """The texts that have less than half of their shingles in `held_out` (sorted)."""
    return [text for text, there in zip(texts, repeats(texts, held_out), strict=True) if not there]


def repeats(texts: Sequence[str], held_out: Shingles) -> NDArray[np.bool_]:
    """Which texts have half or more of their shingles in `held_out` (sorted)."""
    found = [np.zeros(0, bool)]
    for chunk in chunks(texts, CHUNK):
        hashes, owner = _shingles(chunk)
        found.append(np.bincount(owner, weights=_find(hashes, held_out)[1]) / np.bincount(owner) >= DUPLICATE)
    return np.concatenate(found)


def _common(few: Sequence[str], many: Sequence[str]) -> Shingles:
    """Shingles in both, sorted; memory is that of the few."""
    shingles = all_shingles(few)
    seen = np.zeros(len(shingles), bool)
    for chunk in chunks(many, CHUNK):
        index, there = _find(_shingles(chunk)[0], shingles)
        seen[index[there]] = True
    return shingles[seen]


def _find(hashes: Shingles, among: Shingles) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(where in the sorted `among`, whether there)."""
    if not len(among):
        return np.zeros(len(hashes), np.int64), np.zeros(len(hashes), bool)
    index = np.minimum(np.searchsorted(among, hashes), len(among) - 1)
    return index, among[index] == hashes


def all_shingles(texts: Sequence[str]) -> Shingles:
    """Sorted and unique."""
    parts = [np.unique(_shingles(chunk)[0]) for chunk in chunks(texts, CHUNK)]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _shingles(texts: Sequence[str]) -> tuple[Shingles, NDArray[np.int64]]:
    """(hash of each run of 8 words, index of its text); a shorter text is one run. Without a loop over words."""
    words = pc.split_pattern(pa.array(map(normalise, texts), pa.large_string()), " ")
    coded = words.flatten().dictionary_encode()
    digests = b"".join(hashlib.blake2b(word.encode(), digest_size=8).digest() for word in coded.dictionary.to_pylist())
    codes = np.frombuffer(digests, np.uint64)[coded.indices.to_numpy()]
    num_words = np.diff(words.offsets.to_numpy())
    text = np.arange(len(texts))
    # each text is followed by 7 zeros, so that a run never reaches into the next one
    first = words.offsets.to_numpy()[:-1] + (SHINGLE - 1) * text
    padded = np.zeros(len(codes) + (SHINGLE - 1) * len(texts), np.uint64)
    padded[np.arange(len(codes)) + (SHINGLE - 1) * np.repeat(text, num_words)] = codes
    num_runs = np.maximum(1, num_words - SHINGLE + 1)
    start = np.repeat(first - np.cumsum(num_runs) + num_runs, num_runs) + np.arange(num_runs.sum())
    hashes = np.zeros(len(start), np.uint64)
    for word in range(SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + padded[start + word]  # modulo 2^64
    return hashes, np.repeat(text, num_runs)


def chunks(texts: Sequence[str], num_chars: int) -> Iterator[list[str]]:
    """Consecutive texts, about so many characters at a time."""
    rest = iter(texts)
    while chunk := list(islice(rest, 1)):
        size = len(chunk[0])
        while size < num_chars and (more := next(rest, None)) is not None:
            chunk.append(more)
            size += len(more)
        yield chunk
