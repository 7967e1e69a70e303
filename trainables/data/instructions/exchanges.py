"""Prompts and replies as memory-mapped tokens, and packed batches of them. Knows no model and no phase.

A prompt and its reply are tokenized each by itself and joined, so that the boundary between them is where it is when a
model continues the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.config.data import Instructions, Scoring
from trainables.config.errors import DataError
from trainables.data import tokenizer
from trainables.data.instructions.packing import ExchangeBatch, Ids
from trainables.data.instructions.rows import SPLITS, Row, divided, nothing_left
from trainables.data.instructions.templates import Rendered, render

EXCHANGE = 1  # raised whenever the same rows would be encoded otherwise


CHUNK = 4_000  # rows that are encoded together


COLUMNS = pa.schema(
    [("prompt", pa.list_(pa.int32())), ("reply", pa.list_(pa.int32())), ("references", pa.list_(pa.string()))]
)


class Exchanges:
    """The exchanges of a split, memory-mapped; there may be none."""

    def __init__(self, path: Path, *, length: int, pad_id: int) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        blocks = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._prompts = [_views(block.column("prompt")) for block in blocks]
        self._replies = [_views(block.column("reply")) for block in blocks]
        self._references = [block.column("references") for block in blocks]
        self._starts = np.cumsum([0, *(len(block) for block in blocks)])
        sizes = [np.diff(p.offsets) + np.diff(r.offsets) for p, r in zip(self._prompts, self._replies, strict=True)]
        self._pad_id = pad_id
        self.is_packed = True
        self.length = length  # tokens of prompt and reply at most
        self.lengths: Ids = np.concatenate([np.empty(0, np.int32), *sizes])  # tokens of prompt and reply

    def __len__(self) -> int:
        return int(self._starts[-1])

    def prompt(self, index: int) -> Ids:
        """Start token and template included; a view of the mapped file, as `reply`."""
        block, at = self._find(index)
        return self._prompts[block].at(at)

    def reply(self, index: int) -> Ids:
        """The end token included, unless the reply was cut."""
        block, at = self._find(index)
        return self._replies[block].at(at)

    def references(self, index: int) -> tuple[str, ...]:
        """Replies as they were written, of which any will do."""
        block, at = self._find(index)
        return tuple(self._references[block][at].as_py())

    def rows(self, indices: Tensor | Sequence[int]) -> ExchangeBatch:
        """These exchanges; only they are read."""
        wanted = np.asarray(indices, dtype=np.int64).tolist()
        prompts, replies = (tuple(column(i) for i in wanted) for column in (self.prompt, self.reply))
        return ExchangeBatch(prompts, replies, self.length, self._pad_id, self.is_packed)

    def apart(self) -> Exchanges:
        """The same, of which a batch has a row for each: for models that would read those of a row as one."""
        found = copy.copy(self)
        found.is_packed = False
        return found

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"exchange {index} of {len(self)}")
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        return block, int(index - self._starts[block])


class _Views(NamedTuple):
    """A column of lists, as views of the map."""

    values: Ids
    offsets: Ids

    def at(self, row: int) -> Ids:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


def _views(column: Any) -> _Views:
    return _Views(column.values.to_numpy(), column.offsets.to_numpy())


@dataclass(frozen=True)
class ExchangeSet:
    fingerprint: str
    train: Exchanges  # none, as in dev, where a data set is only there to be scored
    dev: Exchanges
    test: Exchanges
    tokenizer: Any
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_id: int | None
    tokenizer_identity: str
    end_id: int
    pad_id: int  # never read, so any will do: the end token, as a padding token makes some models warn
    scoring: Scoring
    leads: tuple[str, ...]  # what the template has before replies, as it is decoded; the longest first
    length: int  # tokens of prompt and reply at most
    about: dict[str, Any]  # counts by split, rows that were left out and why, checksums

    def text(self, reply: Sequence[int]) -> str:
        """What is compared with references: without special tokens, and without what the template has before a reply,
        such as an empty thought, which is learnt with it and no answer."""
        text: str = self.tokenizer.decode(list(reply), skip_special_tokens=True).strip()
        return text.removeprefix(next((lead for lead in self.leads if text.startswith(lead)), "")).lstrip()

    def apart(self) -> ExchangeSet:
        """The same with a row for each exchange: see `Exchanges.apart`."""
        return replace(self, train=self.train.apart(), dev=self.dev.apart(), test=self.test.apart())


def exchanges_in(home: Path, fingerprint: str, about: dict[str, Any]) -> ExchangeSet:
    """The exchanges in a folder of this machine, of which `about` is told."""
    tok = tokenizer.open_tokenizer(str(home / "tokenizer"))
    end_id = _end_of(tok)
    train, dev, test = (Exchanges(home / f"{s}.arrow", length=about["length"], pad_id=end_id) for s in SPLITS)
    return ExchangeSet(
        fingerprint=fingerprint,
        train=train,
        dev=dev,
        test=test,
        tokenizer=tok,
        vocab_size=about["vocab_size"],
        special_ids=tokenizer.special_ids(tok),
        mask_id=tok.mask_token_id,
        tokenizer_identity=about["tokenizer_identity"],
        end_id=end_id,
        pad_id=end_id,
        scoring=Scoring.model_validate(about["exchanges"]["scoring"]),
        leads=tuple(about["exchanges"]["leads"]),
        length=about["length"],
        about=about,
    )


def write_exchanges(data: Instructions, tok: Any, home: Path) -> dict[str, Any]:
    """Fills a folder; returns what about.json tells of it."""
    end_id, splits = _end_of(tok), divided(data)
    tok.save_pretrained(str(home / "tokenizer"))
    counts, leads = {}, set[str]()
    for name in SPLITS:
        rows: tuple[Row, ...] = getattr(splits, name)
        dropped = dict(splits.dropped.get(name, {}))
        found, prompts = _with_short_prompts(rows, data, tok)
        if len(found) < len(rows):
            dropped[f"a prompt over {data.prompt_length} tokens"] = len(rows) - len(found)
        if rows and not found:
            raise nothing_left(name, dropped, hint=f"raise prompt_length {data.prompt_length}, or shorten the prompts")
        most = data.examples if name == "train" else data.evaluate
        chosen = np.arange(len(found)) if most is None else sample(len(found), most)
        some = [(found[i], prompts[i]) for i in chosen]
        leads |= {text.lead for (_, text), _ in some}
        counts[name] = {**_write(some, tok, end_id, data.length, home / f"{name}.arrow"), "dropped": dropped}
    return {
        "exchange": EXCHANGE,
        "length": data.length,
        "splits": counts,
        "removed_duplicates": splits.removed,
        "tokenizer_identity": tokenizer.identity(tok),
        "vocab_size": tokenizer.num_ids(tok),
        "exchanges": {
            "template": data.template,
            "scoring": data.scoring.model_dump(mode="json"),
            "leads": _decoded(sorted(leads), tok),
        },
    }


def _decoded(leads: Sequence[str], tok: Any) -> list[str]:
    """Each as it begins a reply that is decoded without special tokens, the longest first."""
    encoded = tokenizer.encode(tok, leads, is_template=True) if leads else []
    texts = {tok.decode(ids, skip_special_tokens=True).strip() for ids in encoded} - {""}
    return sorted(texts, key=lambda text: (-len(text), text))


def sample(num_rows: int, num: int) -> NDArray[np.int64]:
    """`num` rows spread at random, in their order, always the same ones."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)).numpy()
    chosen: NDArray[np.int64] = np.sort(order[:num])
    return chosen


def _end_of(tok: Any) -> int:
    end = tokenizer.ends(tok)[1]
    if end is None:
        raise DataError(
            "tokenizer: it has no token that ends a text (eos_token or sep_token), so that no reply could end; expected one "
            "whose tokenizer_config.json names it"
        )
    return end


def _with_short_prompts(
    rows: Sequence[Row], data: Instructions, tok: Any
) -> tuple[list[tuple[Row, Rendered]], list[Ids]]:
    """(rows whose prompt is not too long, with their texts; tokens of these prompts)."""
    start, _ = tokenizer.ends(tok)
    found, prompts = list[tuple[Row, Rendered]](), list[Ids]()
    for first in range(0, len(rows), CHUNK):
        some = rows[first : first + CHUNK]
        rendered = [render(row, data.template, tok) for row in some]
        encoded = tokenizer.encode(tok, [text.prompt for text in rendered], is_template=data.template == "chat")
        for row, text, ids in zip(some, rendered, encoded, strict=True):
            if start is not None and ids[:1] != [start]:  # a chat template may have put it there
                ids = [start, *ids]
            if len(ids) <= data.prompt_length:
                found.append((row, text))
                prompts.append(np.array(ids, np.int32))
    return found, prompts


def _encode_replies(texts: Sequence[Rendered], tok: Any) -> list[list[int]]:
    """What is to be written, without the end. Special tokens are such only where the template put them."""
    plain = [f"{one.lead}{one.reply}" if one.lead.isspace() else one.reply for one in texts]
    leads = ["" if one.lead.isspace() else one.lead for one in texts]
    heads = tokenizer.encode(tok, leads, is_template=True) if any(leads) else [list[int]()] * len(texts)
    return [[*head, *ids] for head, ids in zip(heads, tokenizer.encode(tok, plain), strict=True)]


def _write(
    rows: Sequence[tuple[tuple[Row, Rendered], Ids]], tok: Any, end_id: int, length: int, path: Path
) -> dict[str, Any]:
    num_prompt, num_reply, num_cut = 0, 0, 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, COLUMNS) as writer:
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            prompts = [prompt for _, prompt in some]
            whole = [[*ids, end_id] for ids in _encode_replies([text for (_, text), _ in some], tok)]
            replies = [ids[: length - len(prompt)] for ids, prompt in zip(whole, prompts, strict=True)]
            columns = (prompts, replies, [row.replies for (row, _), _ in some])
            writer.write_batch(
                pa.record_batch(
                    [pa.array(column, kind.type) for column, kind in zip(columns, COLUMNS, strict=True)], schema=COLUMNS
                )
            )
            num_prompt += sum(map(len, prompts))
            num_reply += sum(map(len, replies))
            num_cut += sum(len(kept) < len(ids) for kept, ids in zip(replies, whole, strict=True))
    return {
        "exchanges": len(rows),
        "tokens": num_prompt + num_reply,
        "reply_tokens": num_reply,
        "truncated": num_cut / max(1, len(rows)),
    }
