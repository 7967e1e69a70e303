"""From sources to packed sequences under a fingerprint. Knows no model, mask or step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainables.config.data import Corpora, Data, Instructions, PretrainedTokenizer, SameTokenizer, Tasks, WordPiece
from trainables.config.errors import DataError
from trainables.config.value import digest
from trainables.data import tokenizer
from trainables.data.classification.encode import task_fields, training_texts, write_task
from trainables.data.classification.tasks import Task
from trainables.data.corpus.documents import CHUNK, SPLITS, Splits, chunks, load_documents, split
from trainables.data.corpus.sequences import Corpus
from trainables.data.instructions import rows, templates
from trainables.data.instructions.exchanges import EXCHANGE, ExchangeSet, sample, write_exchanges
from trainables.data.prepared import Prepared, open_data
from trainables.storage import prepared_folders

NONE: Mapping[str, Data] = MappingProxyType({})
PREPARE = 1  # raised whenever the same documents would be split or packed otherwise


def fingerprint(data: Data, others: Mapping[str, Data] = NONE) -> str:
    """16 hex digits over the text and whatever else changes a number; where the data lies does not count.

    `others`: the trial's data by name, of which one may lend its tokenizer.
    """
    of_tokenizer = {"tokenizer": _fields_of_tokenizer(data, others)}
    if isinstance(data, Tasks):
        return digest(task_fields(data) | of_tokenizer, 16)
    if isinstance(data, Instructions):
        return digest(rows.instruction_fields(data) | {"exchange": EXCHANGE} | of_tokenizer, 16)
    fields = {"prepare": PREPARE, "length": data.length, "evaluate": data.evaluate}
    return digest(fields | of_tokenizer | _hashes_of_texts(data), 16)


def lender(data: Data, others: Mapping[str, Data]) -> Data | None:
    """The data set whose tokenizer `data` has, if it has none of its own."""
    if not isinstance(data.tokenizer, SameTokenizer):
        return None
    if data.tokenizer.as_ not in others:
        there = ", ".join(others) or "none"
        raise DataError(f"tokenizer: there is no data set {data.tokenizer.as_!r} to take it from; there is {there}")
    return others[data.tokenizer.as_]


def _fields_of_tokenizer(data: Data, others: Mapping[str, Data]) -> dict[str, Any]:
    """What determines the tokenizer. If it is trained on this very data, the text counts anyway."""
    source = lender(data, others)
    match (source or data).tokenizer:
        case PretrainedTokenizer() as named:
            tok = tokenizer.load_pretrained(named)
            reads_chats = isinstance(data, Instructions) and data.template == "chat"
            chat = {"chat_template": templates.chat_template(tok)} if reads_chats else {}
            return {"kind": "pretrained", "behaviour": tokenizer.behaviour(tok), **chat}
        case WordPiece() as trained:
            fields: dict[str, Any] = trained.model_dump(mode="json")
            if source is None:
                return fields
            return {**fields, "of": {"prepare": PREPARE, **_fields_of_texts(source)}}
        case SameTokenizer():
            raise DataError("tokenizer: the data set that lends it has none of its own; name the one that has it")


def _fields_of_texts(data: Data) -> dict[str, Any]:
    """What determines the texts that a tokenizer is trained on."""
    if isinstance(data, Tasks):
        return task_fields(data)
    return rows.instruction_fields(data) if isinstance(data, Instructions) else _hashes_of_texts(data)


@overload
def prepare(data: Corpora, folder: str, others: Mapping[str, Data] = ...) -> Corpus: ...
@overload
def prepare(data: Tasks, folder: str, others: Mapping[str, Data] = ...) -> Task: ...
@overload
def prepare(data: Instructions, folder: str, others: Mapping[str, Data] = ...) -> ExchangeSet: ...
def prepare(data: Data, folder: str, others: Mapping[str, Data] = NONE) -> Prepared:
    """Makes `<folder>/<fingerprint>/` unless it is there and whole, and opens it. `folder`: a path or any URI.

    A data set whose tokenizer is trained and lent is prepared first.
    """
    return _prepare(data, folder, others)


def _prepare(data: Data, folder: str, others: Mapping[str, Data]) -> Prepared:
    key = fingerprint(data, others)

    def write(home: Path) -> dict[str, Any]:
        if isinstance(data, Tasks):
            return write_task(data, _tokenizer(data, folder, others, lambda: training_texts(data)), home)
        if isinstance(data, Instructions):
            tok = _tokenizer(data, folder, others, lambda: templates.training_texts(data))
            return write_exchanges(data, tok, home)
        splits = split(load_documents(data))
        return _write(data, splits, _tokenizer(data, folder, others, lambda: splits.train), home)

    prepared_folders.publish(folder, key, write)
    return open_data(folder, key)


def _tokenizer(data: Data, folder: str, others: Mapping[str, Data], texts: Callable[[], Sequence[str]]) -> Any:
    """Loaded, borrowed from a data set that is prepared for it, or trained on `texts`."""
    source = lender(data, others)
    match (source or data).tokenizer:
        case PretrainedTokenizer() as named:
            return tokenizer.load_pretrained(named)
        case WordPiece(size=size) if source is None:
            return tokenizer.train_wordpiece(texts(), size)
    assert source is not None
    return _prepare(source, folder, others).tokenizer


def _write(data: Corpora, splits: Splits, tok: Any, home: Path) -> dict[str, Any]:
    """Fills a folder; returns what about.json tells of it."""
    tok.save_pretrained(str(home / "tokenizer"))
    counts = {}
    for name in SPLITS:
        texts: tuple[str, ...] = getattr(splits, name)
        blocks: Iterable[NDArray[np.int32]] = _pack(tok, texts, data.length)
        if name != "train":
            whole = np.concatenate([np.empty((0, data.length), np.int32), *blocks])
            blocks = [whole[sample(len(whole), data.evaluate)]]
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
        "vocab_size": tokenizer.num_ids(tok),
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


def _write_arrow(path: Path, blocks: Iterable[NDArray[np.int32]], length: int) -> int:
    schema = pa.schema([("ids", pa.list_(pa.int32(), length))])
    num = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for block in blocks:
            ids = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), length)
            writer.write_batch(pa.record_batch([ids], schema=schema))
            num += len(block)
    return num


def _hashes_of_texts(data: Corpora) -> dict[str, str | None]:
    documents = load_documents(data)
    return {name: _hash_of_texts(getattr(documents, name)) for name in SPLITS}


def _hash_of_texts(texts: Sequence[str] | None) -> str | None:
    if texts is None:
        return None
    hashed = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        hashed.update(len(encoded).to_bytes(8, "big"))  # "a", "b" is not "ab"
        hashed.update(encoded)
    return hashed.hexdigest()
