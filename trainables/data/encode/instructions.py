"""From rows of prompts and replies to files of tokens. Knows no model and no phase.

Prompt and reply are encoded together, as a model reads them that continues the prompt: the tokens in which the whole begins
as the prompt alone does are the prompt, the others the reply.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainables.config.data import Instructions
from trainables.config.errors import DataError
from trainables.data import tokenizer
from trainables.data.arrow import write_table
from trainables.data.instructions.exchanges import Around, ExchangeSet, end_of
from trainables.data.instructions.packing import ExchangeBatch, Ids
from trainables.data.instructions.rows import Row, Rows, divide, leave_out, nothing_left
from trainables.data.instructions.templates import Rendered, render, shared
from trainables.data.order import sample_rows
from trainables.data.sources.read import read_source
from trainables.data.split import SPLITS, Sources, Split

INSTRUCT = 3  # raised whenever the same rows would be split or put into a template otherwise
EXCHANGE = 2  # raised whenever the same rows would be encoded otherwise
CHUNK = 4_000  # rows that are encoded together
SCHEMA = pa.schema(
    [("prompt", pa.list_(pa.int32())), ("reply", pa.list_(pa.int32())), ("references", pa.list_(pa.string())),
     ("cluster", pa.int64())]
)  # fmt: skip
AROUND = pa.field("around", pa.list_(pa.string()))  # an `Around` of each row, where other tokenizers read the same rows


def text_fields(data: Instructions) -> dict[str, Any]:
    sources: Sources[Rows] = read_source(data)
    fields = {"template", "length", "prompt_length", "examples", "evaluate", "scoring"}
    hashes = {name: _hash_of(getattr(sources, name)) for name in SPLITS}
    return {"instruct": INSTRUCT, **data.model_dump(mode="json", include=fields), **hashes}


def fields(data: Instructions) -> dict[str, Any]:
    return {"exchange": EXCHANGE, **text_fields(data)}


def _hash_of(rows: Rows | None) -> str | None:
    """Hashes rows, wherever they lie."""
    plain = None if rows is None else b"".join(json.dumps(row[:-1], default=str).encode() + b"\n" for row in rows)
    return None if plain is None else hashlib.sha256(plain).hexdigest()


def split(data: Instructions) -> Split[Rows]:
    return divide(read_source(data))


def training_texts(data: Instructions, splits: Split[Rows]) -> Sequence[str]:
    if data.reads_chats:
        raise DataError("template: chat needs a pretrained tokenizer that brings one; expected `template: alpaca`")
    if not splits.train:
        raise DataError(
            "tokenizer: there is no train to train one on; expected pretrained, or that of another data set"
        )
    rendered = (render(row, data.template, None) for row in splits.train)
    return [text.whole for text in rendered]


class Encoded(NamedTuple):
    """A row as tokens."""

    prompt: list[int]
    reply: list[int]  # the token that ends it included
    references: list[str]
    cluster: int
    around: Around
    lead: str
    row: Row


def fitting(data: Instructions, splits: Split[Rows], tok: Any) -> Split[Rows]:
    """Leaves out the rows that another tokenizer, too, would leave out, so that both read the same ones."""
    kept, dropped = dict[str, Rows](), dict[str, Counter[str]]()
    for name, encoded, dropped[name] in _usable(data, splits, tok, whose=" of another tokenizer"):
        kept[name] = tuple(each.row for each in encoded)
    return Split(kept["train"], kept["dev"], kept["test"], splits.removed, dropped, is_shared=True)


def _usable(
    data: Instructions, splits: Split[Rows], tok: Any, *, whose: str = ""
) -> Iterator[tuple[str, list[Encoded], Counter[str]]]:
    """Yields, for each split, the rows that the template takes and whose prompts are short, and counts the others by reason."""
    num_rows, refused = sum(len(getattr(splits, name)) for name in SPLITS), list[DataError]()
    for name in SPLITS:
        rows: Rows = getattr(splits, name)
        dropped, before = Counter(splits.dropped.get(name, {})), len(refused)
        encoded = _encode(rows, data, tok, refused)
        leave_out(refused, num_rows, Counter())
        leave_out(refused[before:], num_rows, dropped)
        short = [each for each in encoded if len(each.prompt) <= data.prompt_length]
        if len(short) < len(encoded):
            dropped[f"a prompt over {data.prompt_length} tokens{whose}"] += len(encoded) - len(short)
        if rows and not short:
            raise nothing_left(name, dropped, hint=f"raise prompt_length {data.prompt_length}, or shorten the prompts")
        yield name, short, dropped


def write(data: Instructions, splits: Split[Rows], tok: Any, home: Path) -> dict[str, Any]:
    counts, leads, tails, ends = {}, set[str](), set[str](), Counter[int]()
    schema = SCHEMA.append(AROUND) if splits.is_shared else SCHEMA
    for name, short, dropped in _usable(data, splits, tok):
        chosen = [short[i] for i in sample_rows(len(short), data.examples if name == "train" else data.evaluate)]
        leads |= {each.lead for each in chosen}
        tails |= {each.around.tail for each in chosen}
        ends.update(each.reply[-1] for each in chosen)
        counts[name] = {**_write(chosen, data.length, home / f"{name}.arrow", schema), "dropped": dict(dropped)}
    facts = {
        "template": data.template,
        "scoring": data.scoring.model_dump(mode="json"),
        "leads": _decoded(sorted(leads), tok),
        "tails": _decoded(sorted(tails), tok),
        "ends": [token for token, _ in ends.most_common()],
    }
    return {"exchange": EXCHANGE, "splits": counts, "exchanges": facts}


def _decoded(leads: Sequence[str], tok: Any) -> list[str]:
    """Returns each lead, or tail, as a decoded reply has it, without special tokens; the longest first."""
    encoded = tokenizer.encode(tok, leads, is_template=True) if leads else []
    texts = {tok.decode(ids, skip_special_tokens=True).strip() for ids in encoded} - {""}
    return sorted(texts, key=lambda text: (-len(text), text))


def _encode(rows: Rows, data: Instructions, tok: Any, refused: list[DataError]) -> list[Encoded]:
    """Encodes the rows that the template takes; adds the errors of the others to `refused`."""
    done = list[Encoded]()
    for first in range(0, len(rows), CHUNK):
        taken = list[tuple[Row, Rendered]]()
        for row in rows[first : first + CHUNK]:
            try:
                taken.append((row, render(row, data.template, tok)))
            except DataError as error:
                refused.append(error)
        texts = [(text.prompt, text.whole, text.tail) for _, text in taken]
        for (row, text), (prompt, reply) in zip(taken, _parted(texts, tok, is_chat=data.reads_chats), strict=True):
            learnt = text.reply or tok.decode(reply[:-1], skip_special_tokens=True).strip()
            around = Around(text.prompt, text.before, text.tail)
            done.append(Encoded(prompt, reply, [learnt, *row.replies[1:]], row.cluster, around, text.lead, row))
    return done


def encode_replies(
    data: ExchangeSet, indices: Sequence[int], replies: Sequence[str], has_ended: Sequence[bool]
) -> ExchangeBatch:
    """Puts texts in place of the replies of these exchanges of train, as if they were the data's own; a text that was cut has
    no end."""
    batch, around = data.train.rows(indices), [data.train.around(index) for index in indices]
    texts = [(row.prompt, row.before + reply + row.tail, row.tail) for row, reply in zip(around, replies, strict=True)]
    prompts, encoded = list[Ids](), list[Ids]()
    for (prompt, reply), is_whole in zip(_parted(texts, data.tokenizer, is_chat=data.is_chat), has_ended, strict=True):
        kept = (reply if is_whole else reply[:-1] or reply)[: max(1, data.length - len(prompt))]
        prompts.append(np.array(prompt, np.int32))
        encoded.append(np.array(kept, np.int32))
    return replace(batch, prompts=tuple(prompts), replies=tuple(encoded))


def _parted(texts: Sequence[tuple[str, str, str]], tok: Any, *, is_chat: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the (prompt, reply) of texts (prompt, whole, tail)."""
    parts = _turn_parts(tok) if is_chat else _text_parts(tok)
    columns = zip(*texts, strict=True)
    encoded = (tokenizer.encode(tok, column, is_template=is_chat) for column in columns)
    yield from (parts(*ids) for ids in zip(*encoded, strict=True))


Parts = Callable[[list[int], list[int], list[int]], tuple[list[int], list[int]]]  # of prompt, whole and tail


def _text_parts(tok: Any) -> Parts:
    """Returns how a text is parted into (prompt, reply): a start token, if the tokenizer has one, before, its end token after
    it."""
    head, end_id = [token for token in tokenizer.ends(tok)[:1] if token is not None], end_of(tok)

    def parts(prompt: list[int], whole: list[int], _: list[int]) -> tuple[list[int], list[int]]:
        num = shared(prompt, whole)
        return [*head, *whole[:num]], [*whole[num:], end_id]

    return parts


def _turn_parts(tok: Any) -> Parts:
    """Returns how a conversation is parted into (prompt, reply), as its template writes it and no token more.

    The reply ends with the first mark after the reply's text; where the template writes none, with the tokenizer's end token.
    """
    marks = tokenizer.marks(tok)

    def parts(prompt: list[int], whole: list[int], tail: list[int]) -> tuple[list[int], list[int]]:
        num = shared(prompt, whole)
        reply, end_id = whole[num:], next((token for token in tail if token in marks), None)
        if end_id is not None and end_id not in reply:  # a call of tools may end otherwise
            end_id = next((token for token in reversed(reply) if token in marks), None)
        if end_id is None:
            return whole[:num], [*reply, end_of(tok)]
        return whole[:num], reply[: len(reply) - reply[::-1].index(end_id)]

    return parts


def _write(rows: Sequence[Encoded], length: int, path: Path, schema: pa.Schema) -> dict[str, Any]:
    cut = [row._replace(reply=row.reply[: length - len(row.prompt)]) for row in rows]
    blocks = (list(zip(*cut[start : start + CHUNK], strict=True)) for start in range(0, len(cut), CHUNK))
    write_table(path, schema, (block[: len(schema)] for block in blocks))
    num_prompt, num_reply = sum(len(row.prompt) for row in cut), sum(len(row.reply) for row in cut)
    num_cut = sum(len(kept.reply) < len(row.reply) for kept, row in zip(cut, rows, strict=True))
    return {
        "exchanges": len(rows),
        "tokens": num_prompt + num_reply,
        "reply_tokens": num_reply,
        "truncated": num_cut / max(1, len(rows)),
    }
