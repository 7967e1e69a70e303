"""Near-duplicates between texts: which share half or more of their runs of words.

Own code rather than MinHash (datasketch): shares are exact, and prepared data keep their fingerprints.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SHINGLE = 8  # words of a run
DUPLICATE = 0.5  # share of a text's shingles that makes the text a duplicate
CHUNK = 4_000_000  # characters that are compared together

Shingles = NDArray[np.uint64]


def normalise(text: str) -> str:
    """Removes what near-identical texts may differ in: case, numbers, spaces."""
    return " ".join(re.sub(r"\d+", "0", text.lower()).split())


def repeats(texts: Sequence[str], held_out: Shingles) -> NDArray[np.bool_]:
    """Marks the texts that have half or more of their shingles in `held_out`."""
    marks = [np.zeros(0, bool)]
    for chunk in chunks(texts, CHUNK):
        hashes, owner = _shingles(chunk)
        marks.append(np.bincount(owner, weights=np.isin(hashes, held_out)) / np.bincount(owner) >= DUPLICATE)
    return np.concatenate(marks)


def common(few: Sequence[str], many: Sequence[str]) -> Shingles:
    """Returns the shingles that both have, sorted. Takes memory in proportion to `few`."""
    shingles = all_shingles(few)
    seen = np.zeros(len(shingles), bool)
    for chunk in chunks(many, CHUNK):
        seen |= np.isin(shingles, _shingles(chunk)[0])
    return shingles[seen]


def all_shingles(texts: Sequence[str]) -> Shingles:
    """Returns the shingles of the texts, sorted and unique."""
    parts = [np.unique(_shingles(chunk)[0]) for chunk in chunks(texts, CHUNK)]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _shingles(texts: Sequence[str]) -> tuple[Shingles, NDArray[np.int64]]:
    """Returns (hash of each run of 8 words, index of its text); a shorter text is one run. Without a loop over words."""
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
    """Yields consecutive texts, about `num_chars` characters at a time."""
    rest = iter(texts)
    while chunk := list(islice(rest, 1)):
        size = len(chunk[0])
        while size < num_chars and (more := next(rest, None)) is not None:
            chunk.append(more)
            size += len(more)
        yield chunk
