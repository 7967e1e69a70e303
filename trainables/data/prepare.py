"""From a source to token files in a folder that is named by a fingerprint. Knows no model, mask or step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

from trainables.config.data import Data, Instructions, PretrainedTokenizer, SameTokenizer, TokenizerOrSame, WordPiece
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


def fingerprint(data: Data, others: Mapping[str, Data] = NONE, *, by: str | None = None) -> str:
    """Returns 16 hex digits over the text and all else that changes a number; the place of the data does not count.

    `others`: the trial's data by name, of which one may lend its tokenizers. `by`: the name of that of `tokenizers` with which
    the data are read; None: their own.
    """
    fields = ENCODERS[data.format.name].fields(data)
    return digest({**_fields_of_tokenizers(data, others, by), **fields}, 16)


def lender(data: Data, others: Mapping[str, Data]) -> Data | None:
    """Returns the data set whose tokenizers `data` shares, or None if `data` has tokenizers of its own."""
    if not isinstance(data.tokenizer, SameTokenizer):
        return None
    if data.tokenizer.as_ not in others:
        names = ", ".join(others) or "none"
        raise DataError(f"tokenizer: there is no data set {data.tokenizer.as_!r} to take it from; there is {names}")
    return others[data.tokenizer.as_]


def _named(data: Data, others: Mapping[str, Data], by: str | None) -> TokenizerOrSame:
    owner = lender(data, others) or data
    if by is not None and by not in owner.tokenizers:
        raise DataError(f"tokenizers: there is no {by!r}; there is {', '.join(owner.tokenizers) or 'none'}")
    return owner.tokenizer if by is None else owner.tokenizers[by]


def _beside(data: Data, others: Mapping[str, Data], by: str | None) -> dict[str | None, dict[str, Any]]:
    """Returns the other tokenizers, by name, and what determines each; two that read alike are one.

    Only of instructions, whose rows are left out where a prompt is too long: all tokenizers are to read the same rows.
    """
    names = (lender(data, others) or data).tokenizers if "replies" in data.format.supports else {}
    if not names:
        return {}
    own = _fields_of_tokenizer(data, others, by)
    found = {name: _fields_of_tokenizer(data, others, name) for name in (None, *names)}
    return {name: fields for name, fields in found.items() if fields != own}


def _fields_of_tokenizers(data: Data, others: Mapping[str, Data], by: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"tokenizer": _fields_of_tokenizer(data, others, by)}
    beside = sorted({digest(each) for each in _beside(data, others, by).values()})
    return {**fields, "beside": beside} if beside else fields


def _fields_of_tokenizer(data: Data, others: Mapping[str, Data], by: str | None) -> dict[str, Any]:
    """Returns what determines a tokenizer. If it is trained on this very data set, the text counts anyway."""
    source, fields = lender(data, others), dict[str, Any]()
    match _named(data, others, by):
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


def prepare(data: Data, folder: str, others: Mapping[str, Data] = NONE, *, by: str | None = None) -> Prepared:
    """Makes `<folder>/<fingerprint>/` unless it is there and whole, and opens it. `folder`: a path or any URI.

    `others`, `by`: as of `fingerprint`. A data set whose tokenizer is trained and lent is prepared first.
    """
    key, encoder = fingerprint(data, others, by=by), ENCODERS[data.format.name]

    def write(home: Path) -> dict[str, Any]:
        splits, source = encoder.split(data), lender(data, others)

        def opened(by: str | None) -> tuple[Any, tuple[int, ...]]:
            """Returns a tokenizer, and the ids that end a reply whatever the template."""
            match _named(data, others, by):
                case PretrainedTokenizer() as named:
                    tok = tokenizer.load_pretrained(named)
                    return tok, tokenizer.stops(named, tok)
                case WordPiece(size=size) if source is None:
                    return tokenizer.train_wordpiece(encoder.training_texts(data, splits), size), ()
                case _:
                    assert source is not None
                    return prepare(source, folder, others, by=by).tokenizer, ()

        (tok, stops), kept = opened(by), splits
        for other in _beside(data, others, by):
            kept = instructions.fitting(cast(Instructions, data), kept, opened(other)[0])
        tok.save_pretrained(str(home / "tokenizer"))
        return {
            "length": data.length,
            "removed_duplicates": splits.removed,
            "tokenizer_identity": tokenizer.identity(tok),
            "vocab_size": tokenizer.num_ids(tok),
            "stops": stops,
            **encoder.write(data, kept, tok, home),
        }

    prepared_folders.publish(folder, key, write)
    return open_data(folder, key)
