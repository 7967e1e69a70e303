"""From rows of prompts and replies to files of tokens. Knows no model and no phase.

A prompt and its reply are tokenized separately and joined, so that the boundary between them is where it is when a model
continues the prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainables.config.data import Instructions
from trainables.config.errors import DataError
from trainables.data import tokenizer
from trainables.data.arrow import Ids, write_table
from trainables.data.instructions.exchanges import end_of
from trainables.data.instructions.rows import Row, Rows, divide, nothing_left
from trainables.data.instructions.templates import Rendered, render
from trainables.data.order import sample_rows
from trainables.data.sources.read import read_source
from trainables.data.split import SPLITS, Sources, Split

INSTRUCT = 2  # raised whenever the same rows would be split or put into a template otherwise
EXCHANGE = 1  # raised whenever the same rows would be encoded otherwise
CHUNK = 4_000  # rows that are encoded together
SCHEMA = pa.schema(
    [("prompt", pa.list_(pa.int32())), ("reply", pa.list_(pa.int32())), ("references", pa.list_(pa.string()))]
)


def text_fields(data: Instructions) -> dict[str, Any]:
    sources: Sources[Rows] = read_source(data)
    fields = {"template", "length", "prompt_length", "examples", "evaluate", "scoring"}
    hashes = {name: _hash_of(getattr(sources, name)) for name in SPLITS}
    return {"instruct": INSTRUCT, **data.model_dump(mode="json", include=fields), **hashes}


def fields(data: Instructions) -> dict[str, Any]:
    return {"exchange": EXCHANGE, **text_fields(data)}


def _hash_of(rows: Rows | None) -> str | None:
    return rows if rows is None else hashlib.sha256(b"".join(json.dumps(r).encode() + b"\n" for r in rows)).hexdigest()


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
    return [f"{text.prompt}{text.reply}" for text in rendered]


def write(data: Instructions, splits: Split[Rows], tok: Any, home: Path) -> dict[str, Any]:
    counts, leads = {}, set[str]()
    for name in SPLITS:
        rows: Rows = getattr(splits, name)
        dropped = dict(splits.dropped.get(name, {}))
        short = _with_short_prompts(rows, data, tok)
        if len(short) < len(rows):
            dropped[f"a prompt over {data.prompt_length} tokens"] = len(rows) - len(short)
        if rows and not short:
            raise nothing_left(name, dropped, hint=f"raise prompt_length {data.prompt_length}, or shorten the prompts")
        chosen = [short[i] for i in sample_rows(len(short), data.examples if name == "train" else data.evaluate)]
        leads |= {text.lead for _, text, _ in chosen}
        counts[name] = {**_write(chosen, tok, data.length, home / f"{name}.arrow"), "dropped": dropped}
    facts = {
        "template": data.template,
        "scoring": data.scoring.model_dump(mode="json"),
        "leads": _decoded(sorted(leads), tok),
    }
    return {"exchange": EXCHANGE, "splits": counts, "exchanges": facts}


def _decoded(leads: Sequence[str], tok: Any) -> list[str]:
    """Returns each lead as a decoded reply begins with it, without special tokens; the longest first."""
    encoded = tokenizer.encode(tok, leads, is_template=True) if leads else []
    texts = {tok.decode(ids, skip_special_tokens=True).strip() for ids in encoded} - {""}
    return sorted(texts, key=lambda text: (-len(text), text))


def _with_short_prompts(rows: Rows, data: Instructions, tok: Any) -> list[tuple[Row, Rendered, Ids]]:
    """Returns the rows whose prompt is not too long, with their text and the tokens of the prompt."""
    start, _ = tokenizer.ends(tok)
    short = []
    for first in range(0, len(rows), CHUNK):
        some = rows[first : first + CHUNK]
        rendered = [render(row, data.template, tok) for row in some]
        encoded = tokenizer.encode(tok, [text.prompt for text in rendered], is_template=data.reads_chats)
        for row, text, ids in zip(some, rendered, encoded, strict=True):
            if start is not None and ids[:1] != [start]:  # a chat template may have put it there
                ids = [start, *ids]
            if len(ids) <= data.prompt_length:
                short.append((row, text, np.array(ids, np.int32)))
    return short


def _encode_replies(texts: Sequence[Rendered], tok: Any) -> list[list[int]]:
    """Encodes leads and replies, without the end. Special tokens are such only where the template put them."""
    plain = [f"{text.lead}{text.reply}" if text.lead.isspace() else text.reply for text in texts]
    leads = ["" if text.lead.isspace() else text.lead for text in texts]
    heads = tokenizer.encode(tok, leads, is_template=True) if any(leads) else [list[int]()] * len(texts)
    return [[*head, *ids] for head, ids in zip(heads, tokenizer.encode(tok, plain), strict=True)]


def _write(rows: Sequence[tuple[Row, Rendered, Ids]], tok: Any, length: int, path: Path) -> dict[str, Any]:
    end_id, num_prompt, num_reply, num_cut = end_of(tok), 0, 0, 0

    def blocks() -> Iterator[list[Any]]:
        nonlocal num_prompt, num_reply, num_cut
        for start in range(0, len(rows), CHUNK):
            some, texts, prompts = zip(*rows[start : start + CHUNK], strict=True)
            whole = [[*ids, end_id] for ids in _encode_replies(texts, tok)]
            replies = [ids[: length - len(prompt)] for ids, prompt in zip(whole, prompts, strict=True)]
            num_prompt += sum(map(len, prompts))
            num_reply += sum(map(len, replies))
            num_cut += sum(len(kept) < len(ids) for kept, ids in zip(replies, whole, strict=True))
            yield [list(prompts), replies, [row.replies for row in some]]

    write_table(path, SCHEMA, blocks())
    return {
        "exchanges": len(rows),
        "tokens": num_prompt + num_reply,
        "reply_tokens": num_reply,
        "truncated": num_cut / max(1, len(rows)),
    }
