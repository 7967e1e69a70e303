"""From sources to packed sequences under a fingerprint. Knows no model, mask or step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from trainables.data import DataError, folders, tokenizer
from trainables.data.corpus import Corpus, open_corpus
from trainables.data.documents import CHUNK, SPLITS, Splits, chunks, load_documents, split
from trainables.spec import Data, PretrainedTokenizer, WordPiece, digest

PREPARE = 1  # raised whenever the same documents would be split or packed otherwise


def fingerprint(data: Data) -> str:
    """16 hex digits over the text and whatever else changes a number; where the data lies does not count."""
    documents = load_documents(data)
    of_tokenizer = (
        data.tokenizer.model_dump(mode="json")
        if isinstance(data.tokenizer, WordPiece)
        else {"kind": "pretrained", "behaviour": tokenizer.behaviour(tokenizer.load_pretrained(data.tokenizer))}
    )
    fields = {"prepare": PREPARE, "length": data.length, "evaluate": data.evaluate, "tokenizer": of_tokenizer}
    return digest(fields | {name: _hash_of_texts(getattr(documents, name)) for name in SPLITS}, 16)


def prepare(data: Data, folder: str) -> Corpus:
    """Makes `<folder>/<fingerprint>/` unless it is there and whole, and opens it. `folder`: a path or any URI."""
    key = fingerprint(data)
    folders.publish(folder, key, lambda home: _write(data, split(load_documents(data)), home))
    return open_corpus(folder, key)


def _write(data: Data, splits: Splits, home: Path) -> dict[str, Any]:
    """Fills a folder; returns what about.json tells of it."""
    match data.tokenizer:
        case WordPiece(size=size):
            tok = tokenizer.train_wordpiece(splits.train, size)
        case PretrainedTokenizer():
            tok = tokenizer.load_pretrained(data.tokenizer)
    tok.save_pretrained(str(home / "tokenizer"))
    counts = {}
    for name in SPLITS:
        texts: tuple[str, ...] = getattr(splits, name)
        blocks: Iterable[NDArray[np.int32]] = _pack(tok, texts, data.length)
        if name != "train":
            whole = np.concatenate([np.empty((0, data.length), np.int32), *blocks])
            blocks = [_sample(whole, data.evaluate)]
        num_sequences, num_chars = _write_arrow(home / f"{name}.arrow", blocks, data.length), sum(map(len, texts))
        if not num_sequences:
            raise DataError(
                f"{name}: {len(texts)} documents, {num_chars} characters, do not fill one sequence of {data.length} "
                f"tokens; give more text, name a source for {name}, or lower `length`"
            )
        counts[name] = {
            "documents": len(texts),
            "characters": num_chars,
            "tokens": data.length * (num_sequences if name == "train" else len(whole)),  # of which evaluation scores
            "sequences": num_sequences,  # so many sequences
        }
    return {
        "prepare": PREPARE,
        "length": data.length,
        "splits": counts,
        "removed_duplicates": splits.removed,
        "tokenizer_identity": tokenizer.identity(tok),
        "vocab_size": len(tok),
    }


def _pack(tok: Any, texts: Sequence[str], length: int) -> Iterator[NDArray[np.int32]]:
    """Blocks [n, length]: a start token, if the tokenizer has one, then documents end to end; the rest is dropped."""
    start, end = tokenizer.ends(tok)
    stop = [] if end is None else [end]
    body = length - (start is not None)
    rest = np.empty(0, np.int32)
    for chunk in chunks(texts, CHUNK):
        ids = chain.from_iterable(chain(document, stop) for document in tokenizer.encode(tok, chunk))
        rest = np.concatenate([rest, np.fromiter(ids, np.int32)])
        num = len(rest) // body
        block = np.full((num, length), -1 if start is None else start, np.int32)
        block[:, length - body :] = rest[: num * body].reshape(num, body)
        rest = rest[num * body :]
        yield block


def _sample(whole: NDArray[np.int32], num: int) -> NDArray[np.int32]:
    """`num` sequences spread at random over a split, always the same ones."""
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).numpy()
    chosen: NDArray[np.int32] = whole[np.sort(order[:num])]
    return chosen


def _write_arrow(path: Path, blocks: Iterable[NDArray[np.int32]], length: int) -> int:
    schema = pa.schema([("ids", pa.list_(pa.int32(), length))])
    num = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for block in blocks:
            ids = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), length)
            writer.write_batch(pa.record_batch([ids], schema=schema))
            num += len(block)
    return num


def _hash_of_texts(texts: Sequence[str] | None) -> str | None:
    if texts is None:
        return None
    hashed = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        hashed.update(len(encoded).to_bytes(8, "big"))  # "a", "b" is not "ab"
        hashed.update(encoded)
    return hashed.hexdigest()
