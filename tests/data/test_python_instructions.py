"""The embedded instructions: plain sentences, each said once, a module in one split only."""

from __future__ import annotations

import re
from pathlib import Path

from trainables.config.data import PythonInstructions
from trainables.data.encode import instructions as encode
from trainables.data.prepare import prepare
from trainables.data.sources.python_docs import Definition
from trainables.data.sources.python_instructions import PROMPT, _described, descriptions
from trainables.data.sources.read import read_source

DATA = PythonInstructions.model_validate(
    {"kind": "python_instructions", "tokenizer": {"kind": "wordpiece", "size": 1024}, "examples": 300, "evaluate": 40}
)


def test_there_are_enough_plain_sentences_and_none_twice() -> None:
    found = descriptions()
    assert len(found) > 2000
    assert len({one.description for one in found}) == len({one.signature for one in found}) == len(found)
    for one in found:
        assert re.fullmatch(r"[A-Z][^\n]{8,159}\.", one.description), one
        assert re.fullmatch(r"[\w.]+\([^\n]*\)", one.signature) and len(one.signature) <= 120, one
        assert ">>>" not in one.description and "`" not in one.description


def test_what_is_no_description_is_left_out() -> None:
    def described(docstring: str, signature: str | None = "f(x)") -> list[str]:
        return [one.description for one in _described(Definition("m", "m.C.f", docstring, signature))]

    assert described("Return the sum of x.  Then more.\n\nAnd more.") == ["Return the sum of x."]
    assert described("Return the sum\nof x") == ["Return the sum of x."]
    assert [one.signature for one in _described(Definition("m", "m.C.f", "Return the sum of x.", "f(x)"))] == ["C.f(x)"]
    for bad in ("f(x) -> sum", "Sum it.", "return the sum of x", "Return the sum of:", "Use `g` instead of f.", ""):
        assert described(bad) == [], bad
    assert described("Return the sum of x.", None) == []
    assert described("Return the sum of x.", f"f({'x, ' * 60})") == []


def test_a_module_is_in_one_split_and_no_reply_in_two() -> None:
    splits = encode.split(DATA)
    modules = [{row.group for row in part} for part in (splits.train, splits.dev, splits.test)]
    replies = [{row.replies for row in part} for part in (splits.train, splits.dev, splits.test)]
    assert not modules[0] & modules[1] and not modules[0] & modules[2] and not modules[1] & modules[2]
    assert not replies[0] & (replies[1] | replies[2]) and not replies[1] & replies[2]
    total = len(read_source(DATA).train or ())
    assert 0.07 <= len(splits.dev) / total <= 0.16 and 0.07 <= len(splits.test) / total <= 0.16
    assert all(row.turns[-1].content == PROMPT and row.context for row in splits.train)


def test_it_is_prepared_without_anything_from_outside(tmp_path: Path) -> None:
    data = prepare(DATA, str(tmp_path))
    assert (len(data.train), len(data.dev), len(data.test)) == (300, 40, 40)
    text = data.tokenizer.decode(data.train.prompt(0))
    assert "below is an instruction" in text and "describe this function" in text
    assert data.train.lengths.max() < 200 and data.train.lengths.mean() < 110
    assert all(data.train.reply(i)[-1] == data.end_id for i in range(300))
