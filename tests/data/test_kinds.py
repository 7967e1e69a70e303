"""What every kind of data set must have; runs unchanged on a kind from outside."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest
from pydantic import TypeAdapter

from tests.support.specs import DATA
from trainables.config.data import FORMATS, Corpora, Data, Instructions, Tasks
from trainables.data.prepare import ENCODERS
from trainables.data.sources.read import READERS
from trainables.evaluation.evaluate import EVALUATIONS


@pytest.mark.parametrize("kind", DATA)
def test_a_kind_says_what_it_supports_and_is_read_encoded_and_evaluated(kind: str) -> None:
    data = TypeAdapter(Data).validate_python(DATA[kind])
    assert data.format in FORMATS
    assert data.format.name in ENCODERS and data.format.name in EVALUATIONS and kind in READERS
    assert (data.num_labels is None) == (data.rule is None) == ("labels" not in data.format.supports)
    assert (data.scoring is not None) == ("replies" in data.format.supports)


@pytest.mark.parametrize("kind", DATA)
def test_sets_that_differ_in_their_preparation_alone_read_the_same_text(kind: str) -> None:
    data = TypeAdapter(Data).validate_python(DATA[kind])
    assert set(data.preparation) < set(type(data).model_fields)
    other = TypeAdapter(Data).validate_python({**DATA[kind], "length": 999})
    assert other.unprepared == data.unprepared and hash(other.unprepared) == hash(data.unprepared)


def test_the_lists_have_no_others() -> None:
    assert set(READERS) == set(DATA)
    assert set(ENCODERS) == set(EVALUATIONS) == {data_format.name for data_format in FORMATS}


def test_few_lines_ask_for_the_class_of_a_data_set() -> None:
    """Kinds own their behaviour: at most five `isinstance` in the source name a class of a data set."""
    kinds = {"Corpora", "Tasks", "Instructions", "Corpus", "Task", "ExchangeSet"}
    kinds |= {member.__name__ for union in (Corpora, Tasks, Instructions) for member in get_args(union)}
    lines = []
    root = Path(__file__).parents[2]
    for path in (file for room in ("trainables", "orchestrator") for file in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_check = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            if is_check and kinds & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}:
                lines.append(f"{path.relative_to(root)}:{node.lineno}")
    assert len(lines) <= 5, lines
