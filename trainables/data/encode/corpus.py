"""From documents to files of packed sequences of tokens. Knows no model, mask or step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainables.config.data import Corpora
from trainables.config.errors import DataError
from trainables.data import tokenizer
from trainables.data.arrow import write_table
from trainables.data.corpus import documents
from trainables.data.corpus.documents import Texts
from trainables.data.near_duplicates import chunks
from trainables.data.order import sample_rows
from trainables.data.sources.read import read_source
from trainables.data.split import SPLITS, Sources, Split, hash_texts

PREPARE = 1  # raised whenever the same documents would be split or packed otherwise
CHUNK = 4_000_000  # characters that are encoded together


def text_fields(data: Corpora) -> dict[str, Any]:
    sources: Sources[Texts] = read_source(data)
    texts = {name: getattr(sources, name) for name in SPLITS}
    return {name: None if own is None else hash_texts(own).hexdigest() for name, own in texts.items()}


def fields(data: Corpora) -> dict[str, Any]:
    return {"prepare": PREPARE, "length": data.length, "evaluate": data.evaluate, **text_fields(data)}


def split(data: Corpora) -> Split[Texts]:
    return documents.split(read_source(data))


def training_texts(_: Corpora, splits: Split[Texts]) -> Sequence[str]:
    return splits.train


def write(data: Corpora, splits: Split[Texts], tok: Any, home: Path) -> dict[str, Any]:
    counts = {}
    schema = pa.schema([("ids", pa.list_(pa.int32(), data.length)), ("document", pa.int32())])
    for name in SPLITS:
        texts: Texts = getattr(splits, name)
        blocks: Iterable[NDArray[np.int32]] = _pack(tok, texts, data.length)
        if name != "train":
            whole = np.concatenate([np.empty((0, data.length + 1), np.int32), *blocks])
            blocks = [whole[sample_rows(len(whole), data.evaluate)]]
        columns = (
            [pa.FixedSizeListArray.from_arrays(pa.array(b[:, :-1].ravel()), data.length), pa.array(b[:, -1])]
            for b in blocks
        )
        num_sequences, num_chars = write_table(home / f"{name}.arrow", schema, columns), sum(map(len, texts))
        if not num_sequences:
            raise DataError(
                f"{name}: {len(texts)} documents, {num_chars} characters, do not fill one sequence of {data.length} "
                f"tokens; give more text, name a source for {name}, or lower `length`"
            )
        counts[name] = {
            "documents": len(texts),
            "characters": num_chars,
            "tokens": data.length * (num_sequences if name == "train" else len(whole)),  # of all sequences, of which
            "sequences": num_sequences,  # so many are evaluated
        }
    return {"prepare": PREPARE, "splits": counts}


def _pack(tok: Any, texts: Sequence[str], length: int) -> Iterator[NDArray[np.int32]]:
    """Yields blocks [n, length + 1]: a start token, if the tokenizer has one, then documents end to end; drops the rest.

    The last column is the number of the document that the middle of the sequence belongs to.
    """
    start, end = tokenizer.ends(tok)
    stop = [] if end is None else [end]
    body = length - (start is not None)
    rest, first = np.empty((2, 0), np.int32), 0
    for chunk in chunks(texts, CHUNK):
        encoded = [[*document, *stop] for document in tokenizer.encode(tok, chunk)]
        owners = np.repeat(np.arange(first, first + len(encoded), dtype=np.int32), [len(ids) for ids in encoded])
        first += len(encoded)
        rest = np.concatenate([rest, [np.fromiter(chain.from_iterable(encoded), np.int32), owners]], axis=1)
        num = rest.shape[1] // body
        block = np.full((num, length + 1), -1 if start is None else start, np.int32)
        block[:, length - body : length], of_body = rest[:, : num * body].reshape(2, num, body)
        block[:, length] = of_body[:, body // 2]
        rest = rest[:, num * body :]
        yield block
