"""From a source to token files in a folder that is named by a fingerprint. Knows no model, mask or step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from trainables.config.data import Data, PretrainedTokenizer, SameTokenizer, WordPiece
from trainables.config.errors import DataError
from trainables.config.value import digest
from trainables.data import tokenizer
from trainables.data.encode import corpus as corpora
from trainables.data.encode import instructions
from trainables.data.encode import task as tasks
from trainables.data.prepared import Prepared, open_data
from trainables.storage import prepared_folders

NONE: Mapping[str, Data] = MappingProxyType({})


class Encoder(Protocol):
    """How data of one format become token files; a module for each format."""

    def text_fields(self, data: Any) -> dict[str, Any]:
        """Returns what determines the texts on which a tokenizer may be trained."""

    def fields(self, data: Any) -> dict[str, Any]:
        """Returns what a fingerprint is made of, except for the tokenizer."""

    def split(self, data: Any) -> Any:
        """Reads the source and splits the examples."""

    def training_texts(self, data: Any, splits: Any) -> Sequence[str]:
        """Returns the texts on which a tokenizer is trained."""

    def write(self, data: Any, splits: Any, tok: Any, home: Path) -> dict[str, Any]:
        """Writes `<split>.arrow` for each split; returns the facts of about.json."""


ENCODERS: Mapping[str, Encoder] = {"corpus": corpora, "task": tasks, "instructions": instructions}  # by format


def fingerprint(data: Data, others: Mapping[str, Data] = NONE) -> str:
    """Returns 16 hex digits over the text and all else that changes a number; the place of the data does not count.

    `others`: the trial's data by name, of which one may lend its tokenizer.
    """
    fields = ENCODERS[data.format.name].fields(data)
    return digest({"tokenizer": _fields_of_tokenizer(data, others), **fields}, 16)


def lender(data: Data, others: Mapping[str, Data]) -> Data | None:
    """Returns the data set whose tokenizer `data` shares, or None if `data` has a tokenizer of its own."""
    if not isinstance(data.tokenizer, SameTokenizer):
        return None
    if data.tokenizer.as_ not in others:
        names = ", ".join(others) or "none"
        raise DataError(f"tokenizer: there is no data set {data.tokenizer.as_!r} to take it from; there is {names}")
    return others[data.tokenizer.as_]


def _fields_of_tokenizer(data: Data, others: Mapping[str, Data]) -> dict[str, Any]:
    """Returns what determines the tokenizer. If it is trained on this very data set, the text counts anyway."""
    source, fields = lender(data, others), dict[str, Any]()
    match (source or data).tokenizer:
        case PretrainedTokenizer() as named:
            tok = tokenizer.load_pretrained(named)
            fields = {"kind": "pretrained", "behaviour": tokenizer.behaviour(tok)}
            if data.reads_chats:
                fields |= {"chat_template": tokenizer.chat_template(tok), "stops": tokenizer.stops(named, tok)}
                fields |= {"templates": tok.chat_template} if isinstance(tok.chat_template, dict) else {}
            return fields
        case WordPiece() as trained:
            fields = trained.model_dump(mode="json")
            if source is None:
                return fields
            return {**fields, "of": {"prepare": corpora.PREPARE, **ENCODERS[source.format.name].text_fields(source)}}
        case SameTokenizer():
            raise DataError("tokenizer: the data set that lends it has none of its own; name the one that has it")


def prepare(data: Data, folder: str, others: Mapping[str, Data] = NONE) -> Prepared:
    """Makes `<folder>/<fingerprint>/` unless it is there and whole, and opens it. `folder`: a path or any URI.

    A data set whose tokenizer is trained and lent is prepared first.
    """
    key, encoder = fingerprint(data, others), ENCODERS[data.format.name]

    def write(home: Path) -> dict[str, Any]:
        splits, source, stops = encoder.split(data), lender(data, others), tuple[int, ...]()
        match (source or data).tokenizer:
            case PretrainedTokenizer() as named:
                tok = tokenizer.load_pretrained(named)
                stops = tokenizer.stops(named, tok)
            case WordPiece(size=size) if source is None:
                tok = tokenizer.train_wordpiece(encoder.training_texts(data, splits), size)
            case _:
                assert source is not None
                tok = prepare(source, folder, others).tokenizer
        tok.save_pretrained(str(home / "tokenizer"))
        return {
            "length": data.length,
            "removed_duplicates": splits.removed,
            "tokenizer_identity": tokenizer.identity(tok),
            "vocab_size": tokenizer.num_ids(tok),
            "stops": stops,
            **encoder.write(data, splits, tok, home),
        }

    prepared_folders.publish(folder, key, write)
    return open_data(folder, key)
