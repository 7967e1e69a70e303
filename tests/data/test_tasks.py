"""Tasks: which examples are in which split, what a label may be, what is encoded, and batches of similar length."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrator.planning import preview
from orchestrator.scheduling.trials import Fingerprints
from trainables.config.data import Data, Files, Glue, LabelledFiles, PretrainedTokenizer, PythonTask
from trainables.config.errors import DataError
from trainables.config.trial import TrialSpec
from trainables.data.arrow import MappedTable
from trainables.data.classification.labelled import Labelled, divide
from trainables.data.classification.tasks import Task
from trainables.data.corpus.masking import next_token_batch
from trainables.data.corpus.sequences import Corpus
from trainables.data.encode import task as encode
from trainables.data.near_duplicates import all_shingles, repeats
from trainables.data.order import bucketed_indices, by_length, folds, shuffled_indices
from trainables.data.prepare import fingerprint, lender, prepare
from trainables.data.prepared import open_data
from trainables.data.sources import python_tasks
from trainables.data.sources.read import read_source
from trainables.data.split import Sources

REAL = Path(os.environ.get("CODISTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(not (REAL / "glue").is_dir(), reason=f"no data sets in {REAL}: set CODISTILL_DATA")

WORDS = [a + b for a in ("lo", "ra", "mi", "tun", "ske", "por") for b in ("ba", "den", "fi", "gol", "hur", "ix", "ta")]
SMALL = {"kind": "wordpiece", "size": 300}


def some_texts(num: int, *, seed: int = 0, longest: int = 40) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(3, longest))) for _ in range(num)]


def table_file(path: Path, columns: dict[str, Any]) -> str:
    table = pa.table(columns)
    match path.suffix:
        case ".parquet":
            parquet.write_table(table, path)
        case ".csv":
            csv.write_csv(table, path)
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return str(path)


def labelled_files(train: str | Path, **more: Any) -> LabelledFiles:
    value = {"kind": "labelled_files", "train": str(train), "tokenizer": SMALL, "length": 32, "classes": ["no", "yes"]}
    return LabelledFiles.model_validate({**value, **more})


def classified(num: int = 200, *, seed: int = 0) -> dict[str, Any]:
    return {"sentence": some_texts(num, seed=seed), "label": ["no" if i % 4 else "yes" for i in range(num)]}


def labelled(texts: list[str], labels: list[Any]) -> Labelled:
    return Labelled(tuple(texts), None, np.array(labels, np.int64))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def source(home: Path) -> str:
    return table_file(home / "train.parquet", classified())


@pytest.fixture(scope="module")
def task(home: Path, source: str) -> Task:
    return prepare(labelled_files(source), str(home / "data"))


@pytest.fixture(scope="module")
def pairs(home: Path) -> Task:
    columns = {"a": some_texts(60, seed=1), "b": some_texts(60, seed=2, longest=8), "score": np.linspace(0, 5, 60)}
    data = labelled_files(
        table_file(home / "pairs.csv", columns),
        classes=None,
        columns={"first": "a", "second": "b", "label": "score"},
    )
    return prepare(data, str(home / "data"))


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_every_suffix_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    columns = {"sentence": ['one, "quoted"\nof two', "1984", "é"], "label": ["yes", "no", "yes"]}
    found = read_source(labelled_files(table_file(tmp_path / f"a{suffix}", columns)))
    assert found.train.first == tuple(columns["sentence"])
    assert found.train.labels.tolist() == [1, 0, 1] and found.train.labels.dtype == np.int64


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [([3, 1, 3], [1, 3], [1, 0, 1]), ([1.0, 0.0, 1.0], [0, 1], [1, 0, 1]), (["1", "0", "0"], [0, 1], [1, 0, 0]),
     ([True, False, True], [False, True], [1, 0, 1]), ([True, False, True], ["false", "true"], [1, 0, 1]),
     (["True", "FALSE", "true"], [False, True], [1, 0, 1]), (["1.0", "0.0", "1"], [0, 1], [1, 0, 1]),
     ([True, False, True], [0, 1], [1, 0, 1]), (["1", "1.0", "1"], ["1", "1.0"], [0, 1, 0])],
)  # fmt: skip
def test_labels_are_found_however_they_are_stored(
    tmp_path: Path, suffix: str, labels: list[Any], classes: list[Any], expected: list[int]
) -> None:
    path = table_file(tmp_path / f"a{suffix}", {"sentence": ["a b", "c d", "e f"], "label": labels})
    assert read_source(labelled_files(path, classes=classes)).train.labels.tolist() == expected


@pytest.mark.parametrize("labels", [["no", "yes", "no"], [0, 1, 0], [0.0, 1.0, 0.0]])
def test_columns_of_dictionary_type_are_read_as_their_values(tmp_path: Path, labels: list[Any]) -> None:
    """As pandas writes a categorical."""
    columns = {
        "sentence": pa.array(["a b", "c d", "a b"]).dictionary_encode(),
        "label": pa.array(labels).dictionary_encode(),
    }
    path = table_file(tmp_path / "a.parquet", columns)
    found = read_source(labelled_files(path, classes=["no", "yes"] if "no" in labels else [0, 1]))
    assert found.train.first == ("a b", "c d", "a b") and found.train.labels.tolist() == [0, 1, 0]


LABELS: dict[str, st.SearchStrategy[Any]] = {
    "texts": st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8),
    "whole": st.integers(-1000, 1000).filter(lambda label: label != -1),
    "booleans": st.booleans(),
}


@given(data=st.data(), kind=st.sampled_from([*LABELS]), suffix=st.sampled_from([".parquet", ".jsonl", ".csv"]))
def test_each_label_is_found_in_whatever_type_its_file_has(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, suffix: str
) -> None:
    """Where a class is given as it stands, or as a text, and whole numbers are stored as such or as floats."""
    classes = data.draw(st.lists(LABELS[kind], min_size=2, max_size=5, unique_by=lambda label: str(label).lower()))
    if kind == "texts" and len({_number(label) for label in classes}) < len(classes):
        return  # "1" and "1.0" are told apart only by their text
    expected = data.draw(st.lists(st.integers(0, len(classes) - 1), min_size=1, max_size=8))
    labels = [classes[i] for i in expected]
    if kind == "whole" and data.draw(st.booleans()):
        labels = [float(label) for label in labels]
    if data.draw(st.booleans()):
        classes = [str(label).lower() if kind == "booleans" else str(label) for label in classes]
    path = table_file(
        tmp_path_factory.mktemp("any") / f"a{suffix}", {"sentence": ["a b"] * len(labels), "label": labels}
    )
    assert read_source(labelled_files(path, classes=classes)).train.labels.tolist() == expected


def _number(label: str) -> object:
    try:
        return float(label)
    except ValueError:
        return label.lower()


def test_numbers_are_labels_of_a_regression(tmp_path: Path) -> None:
    for suffix in (".parquet", ".csv"):
        path = table_file(tmp_path / f"a{suffix}", {"sentence": ["a b", "c d"], "label": [0.25, 3]})
        found = read_source(labelled_files(path, classes=None)).train
        assert found.labels.tolist() == [0.25, 3.0] and found.labels.dtype == np.float32


SENTENCES = {"sentence": ["a b", "c d", "e f"]}


@pytest.mark.parametrize(
    ("columns", "more", "says"),
    [
        (
            {**SENTENCES, "label": ["no", "yes", "maybe"]},
            {},
            r"train: .*a\.\w+': row 3 has label 'maybe'; expected no, yes",
        ),
        ({**SENTENCES, "label": ["no", None, "yes"]}, {}, r"row 2 has (no label|label ''); expected no, yes"),
        ({**SENTENCES, "label": [0, 1, -1]}, {"classes": [0, 1]}, r"row 3 has label '?-1'?.*; expected 0, 1"),
        ({**SENTENCES, "label": ["1", "x", "2"]}, {"classes": None}, r"row 2 has label 'x'; expected numbers, or list"),
        ({**SENTENCES, "label": ["1", "nan", "2"]}, {"classes": None}, r"row 2 has label 'nan'; expected numbers"),
        ({"sentence": ["a", " ", "b"], "label": ["no"] * 3}, {}, r"row 2 has no text; remove it"),
        ({"sentnce": ["a"], "label": ["no"]}, {}, r"no column 'sentence' in .*; did you mean 'sentnce'"),
        ({**SENTENCES, "gold": ["no"] * 3}, {}, r"no column 'label' in .*; set columns\.label to one of them"),
        (
            {**SENTENCES, "label": ["no"] * 3},
            {"columns": {"second": "hypothesis"}},
            r"no column 'hypothesis' .*; set columns\.second to one of them",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_what_is_wrong_with_a_table_is_named(
    tmp_path: Path, suffix: str, columns: dict[str, Any], more: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        read_source(labelled_files(table_file(tmp_path / f"a{suffix}", columns), **more))


def test_text_must_be_text_and_a_text_file_has_no_labels(tmp_path: Path) -> None:
    path = table_file(tmp_path / "a.parquet", {"sentence": [1, 2], "label": ["no", "yes"]})
    with pytest.raises(DataError, match=r"column 'sentence' .* holds int64; columns.first must name one of strings"):
        read_source(labelled_files(path))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        DataError, match=r"cannot tell the format .* expected one of the suffixes \.parquet, \.jsonl, \.json, \.csv$"
    ):
        read_source(labelled_files(tmp_path / "a.txt"))
    rte = Glue(kind="glue", task="rte", source=str(tmp_path))
    with pytest.raises(DataError, match="train of rte: no file matches"):
        read_source(rte)
    (tmp_path / "rte").mkdir()
    for name in ("train", "validation"):
        table_file(tmp_path / "rte" / f"{name}.parquet", {"sentence": ["a"], "label": [0]})
    with pytest.raises(DataError, match=r"no column 'sentence1' in .*; there is sentence, label$"):
        read_source(rte)


def glue_folder(home: Path, task: str, splits: dict[str, list[int]], *columns: str) -> Glue:
    (home / task).mkdir()
    for number, (name, labels) in enumerate(splits.items()):
        texts = {column: some_texts(len(labels), seed=10 * number + i) for i, column in enumerate(columns)}
        table_file(home / task / f"{name}.parquet", {**texts, "label": labels, "idx": list(range(len(labels)))})
    return Glue.model_validate({"kind": "glue", "task": task, "source": str(home), "tokenizer": SMALL, "length": 32})


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("cola", ["sentence"]),
        ("sst2", ["sentence"]),
        ("mrpc", ["sentence1", "sentence2"]),
        ("qqp", ["question1", "question2"]),
        ("stsb", ["sentence1", "sentence2"]),
        ("mnli", ["premise", "hypothesis"]),
        ("qnli", ["question", "sentence"]),
        ("rte", ["sentence1", "sentence2"]),
        ("wnli", ["sentence1", "sentence2"]),
    ],
)
def test_each_task_of_glue_is_read_by_its_columns(tmp_path: Path, name: str, columns: list[str]) -> None:
    held_out = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    data = glue_folder(tmp_path, name, {"train": [0, 1] * 20, **{key: [1, 0, 1] for key in held_out}}, *columns)
    task = prepare(data, str(tmp_path / "data"))
    assert task.num_labels == data.num_labels == max(1, len(task.class_names))
    assert (len(task.train), len(task.dev), len(task.test)) == (36, 4, 3 * len(held_out))
    assert (task.train.rows([0]).types_BT is not None) == (len(columns) == 2)
    if name == "mnli":
        assert task.part_names == ("matched", "mismatched") and task.test.parts is not None and task.dev.parts is None
        assert task.test.parts.tolist() == [0, 0, 0, 1, 1, 1]
        assert len(prepare(data.model_copy(update={"evaluate": 4}), str(tmp_path / "data")).test) == 4


def test_files_of_a_hub_s_repository_and_hidden_labels(tmp_path: Path) -> None:
    data = glue_folder(
        tmp_path, "rte", {"train-00000-of-00001": [0, 1] * 9, "validation": [0, -1]}, "sentence1", "sentence2"
    )
    with pytest.raises(
        DataError, match=r"test of rte: .*row 2 has label -1, which stands for a hidden one; expected 0, 1"
    ):
        read_source(data)
    table_file(tmp_path / "rte" / "validation.parquet", {"sentence1": ["a"], "sentence2": ["b"], "label": [0]})
    assert len(read_source(data).train) == 18


# --------------------------------------------------------------------------------------------------------------- splits


def test_splits_are_stratified_and_depend_on_no_order() -> None:
    texts, labels = some_texts(500), [0] * 400 + [1] * 100
    there = divide(Sources(labelled(texts, labels)), examples=None, evaluate=None)
    back = divide(Sources(labelled(texts[::-1], labels[::-1])), examples=None, evaluate=None)
    for name in ("train", "dev", "test"):
        found = getattr(there, name)
        assert sorted(found.first) == sorted(getattr(back, name).first)
        assert np.mean(found.labels) == pytest.approx(0.2, abs=0.01)
    assert len(there.dev) == len(there.test) == 50 and len(there.train) == 400
    assert set(there.train.first) | set(there.dev.first) | set(there.test.first) == set(texts)
    assert there.train.first == tuple(text for text in texts if text in set(there.train.first))  # as the source is


def test_no_more_than_a_thousand_are_held_out() -> None:
    texts = [f"text {i}" for i in range(25_000)]
    found = divide(Sources(labelled(texts, [i % 3 for i in range(25_000)])), examples=None, evaluate=None)
    assert len(found.dev) == len(found.test) == 1000 and set(np.bincount(found.dev.labels)) == {333, 334}


def test_a_text_of_dev_or_test_is_not_in_train() -> None:
    texts, named = some_texts(300), some_texts(20, seed=1)
    train = [*texts, named[0].upper(), named[1].replace(" ", "\n "), texts[5], texts[5]]
    found = divide(
        Sources(labelled(train, [0, 1] * 152), test=labelled(named, [0, 1] * 10)), examples=None, evaluate=None
    )
    sets = [set(getattr(found, name).first) for name in ("train", "dev", "test")]
    assert not any(one & other for one, other in itertools.combinations(sets, 2))
    assert sets[2] == set(named)  # whole
    assert found.removed["train"] >= 2 and found.removed["test"] == found.removed["dev"] == 0
    assert len(found.train) + len(found.dev) + found.removed["train"] == len(train)


def test_pairs_are_the_same_only_if_both_texts_are() -> None:
    first, second = ("one text", "one text"), ("its pair", "another")
    train = Labelled((*first, *some_texts(50)), (*second, *some_texts(50, seed=1)), np.zeros(52, np.int64))
    test = Labelled(("One text",), ("its  pair",), np.zeros(1, np.int64))
    found = divide(Sources(train, test=test), examples=None, evaluate=None)
    assert found.removed == {"train": 1, "dev": 0, "test": 0}


def test_a_smaller_number_is_a_stratified_part_of_it(tmp_path: Path) -> None:
    path = table_file(tmp_path / "a.parquet", classified(400))
    whole, few = encode.split(labelled_files(path)), encode.split(labelled_files(path, examples=40, evaluate=12))
    assert (len(few.train), len(few.dev), len(few.test)) == (40, 12, 12)
    assert np.bincount(few.train.labels).tolist() == [30, 10]
    for name in ("train", "dev", "test"):
        assert set(getattr(few, name).first) <= set(getattr(whole, name).first)


def test_a_split_of_nothing_is_refused() -> None:
    texts = some_texts(10)
    with pytest.raises(DataError, match="train: no example is left of 10; give at least one that is in no other split"):
        divide(Sources(labelled(texts, [0] * 10), test=labelled(texts, [0] * 10)), examples=None, evaluate=None)
    for nothing in (Sources(labelled([], [])), Sources(labelled(texts, [0] * 10), dev=labelled([], []))):
        with pytest.raises(DataError, match=r"(train|dev): no example is left of 0"):
            divide(nothing, examples=None, evaluate=None)


# ---------------------------------------------------------------------------------------------------------- fingerprint


def test_what_changes_a_number_changes_the_fingerprint(tmp_path: Path) -> None:
    columns = classified(40)
    (tmp_path / "elsewhere").mkdir()
    path, moved = (table_file(tmp_path / name, columns) for name in ("a.parquet", "elsewhere/b.csv"))
    assert fingerprint(labelled_files(path)) == fingerprint(labelled_files(moved))
    other = {**columns, "label": [*columns["label"][:-1], "yes"]}
    changed = [
        labelled_files(table_file(tmp_path / "c.parquet", other)),
        labelled_files(path, classes=["yes", "no"]),
        labelled_files(path, score="f1"),
        labelled_files(path, length=40),
        labelled_files(path, examples=10),
        labelled_files(path, evaluate=2),
        labelled_files(path, tokenizer={"kind": "wordpiece", "size": 301}),
        labelled_files(path, test=moved),
    ]
    assert len({fingerprint(data) for data in (labelled_files(path), *changed)}) == 1 + len(changed)


def test_a_borrowed_tokenizer_counts_by_what_makes_it(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(some_texts(100, seed=3)))
    (tmp_path / "b.txt").write_text("\n\n".join(some_texts(100, seed=4)))
    corpus = Files.model_validate(
        {"kind": "files", "train": str(tmp_path / "a.txt"), "tokenizer": SMALL, "length": 16, "evaluate": 8}
    )
    task = labelled_files(source, tokenizer={"kind": "same"})

    def with_(**more: Any) -> str:
        return fingerprint(task, {"corpus": Files.model_validate({**corpus.model_dump(mode="json"), **more})})

    assert with_() == with_(length=64) == with_(evaluate=9)  # of packed sequences, not of the vocabulary
    others = {with_(), with_(train=str(tmp_path / "b.txt")), with_(tokenizer={**SMALL, "size": 200})}
    assert len(others) == 3
    with pytest.raises(DataError, match="there is no data set 'corpus' to take it from; there is mine"):
        fingerprint(task, {"mine": corpus})
    with pytest.raises(DataError, match="has none of its own"):
        fingerprint(task, {"corpus": task})


def test_a_task_reads_as_the_corpus_does(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(some_texts(100, seed=3)))
    corpus = {"kind": "files", "train": str(tmp_path / "a.txt"), "tokenizer": SMALL, "length": 16, "evaluate": 8}
    data: dict[str, Data] = {
        "corpus": Files.model_validate(corpus),
        "mine": labelled_files(source, tokenizer={"kind": "same"}),
    }
    mine = prepare(data["mine"], str(tmp_path / "data"), data)
    assert isinstance(mine, Task) and lender(data["mine"], data) == data["corpus"]
    made = open_data(str(tmp_path / "data"), fingerprint(data["corpus"]))  # it was prepared on the way
    assert isinstance(open_data(str(tmp_path / "data"), made.fingerprint), Corpus)
    assert mine.tokenizer_identity == made.tokenizer_identity
    assert mine.tokenizer.encode("loba mifi") == made.tokenizer.encode("loba mifi")
    pretrained = {"kind": "pretrained", "name": str(tmp_path / "data" / made.fingerprint / "tokenizer")}
    own = labelled_files(source, tokenizer=pretrained)
    lent = fingerprint(data["mine"], {"corpus": Files.model_validate({**corpus, "tokenizer": pretrained})})
    assert lent == fingerprint(own)  # who lends it does not count


def test_a_task_and_what_lends_its_tokenizer_go_to_remote_storage(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(some_texts(100, seed=3)))
    corpus = {"kind": "files", "train": str(tmp_path / "a.txt"), "tokenizer": SMALL, "length": 16, "evaluate": 8}
    data: dict[str, Data] = {
        "corpus": Files.model_validate(corpus),
        "mine": labelled_files(source, tokenizer={"kind": "same"}),
    }
    monkeypatch.setenv("CODISTILL_CACHE", str(tmp_path / "driver"))
    made = prepare(data["mine"], "memory://tasks/data", data)
    monkeypatch.setenv("CODISTILL_CACHE", str(tmp_path / "node"))
    there = open_data("memory://tasks/data", fingerprint(data["mine"], data))
    assert isinstance(there, Task) and there.about == made.about
    assert isinstance(open_data("memory://tasks/data", fingerprint(data["corpus"], data)), Corpus)


def test_the_plan_shows_sizes_labels_and_what_was_cut(task: Task, pairs: Task) -> None:
    terms = {"hard": {"kind": "cross_entropy", "of": "m"}}
    spec = TrialSpec.model_validate(
        {
            "data": {name: {"kind": "python_task", "task": "topic", "tokenizer": SMALL} for name in ("mine", "other")},
            "models": {"m": {"family": "bert", "layers": 1, "width": 16, "heads": 2}},
            "phases": {
                "p": {
                    **{"train": {"m": "full"}, "terms": terms, "for_each_dataset": ["mine", "other"]},
                    **{"budget": {"steps": 1}, "batch": 1, "optimizer": {"lr": 1}},
                }
            },
        }
    )
    lines = preview._data(spec, {"mine": task, "other": pairs})
    assert re.search(r"mine: .*train 160 examples \(\d+\.\d% cut, 75% no\); scored by accuracy; 0 near-", lines[0])
    assert "train 48 examples" in lines[1] and lines[1].endswith(
        "scored by pearson and spearman; 0 near-duplicates across splits removed"
    )
    assert [line.partition(" «")[0] for line in lines[3:]] == ["mine, an example:"] * 2 + ["other, an example:"] * 2


def test_the_plan_knows_tasks_apart_by_who_lends_the_tokenizer(tmp_path: Path, source: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(some_texts(100, seed=ord(name))))
    identity = Fingerprints(None)

    def of(name: str) -> str:
        corpus = {"kind": "files", "train": str(tmp_path / f"{name}.txt"), "tokenizer": SMALL, "length": 16}
        mine = {"kind": "labelled_files", "train": source, "classes": ["no", "yes"]}
        phase = {"train": {"m": "full"}, "terms": {"hard": {"kind": "cross_entropy", "of": "m"}}}
        spec = TrialSpec.model_validate(
            {
                "data": {"corpus": corpus, "mine": mine},
                "models": {"m": {"family": "bert", "layers": 1, "width": 16, "heads": 2}},
                "phases": {"p": {**phase, "budget": {"steps": 1}, "batch": 1, "optimizer": {"lr": 1}}},
            }
        )
        return identity.of(spec)["data:mine"]

    assert of("a") == of("a") != of("b")


# -------------------------------------------------------------------------------------------------------------- encoded


def test_a_prepared_task_is_what_its_source_says(task: Task, source: str, home: Path) -> None:
    expected = encode.split(labelled_files(source))
    for name in ("train", "dev", "test"):
        found, wanted = getattr(task, name), getattr(expected, name)
        assert len(found) == len(wanted) == task.about["splits"][name]["examples"]
        assert found.labels.tolist() == wanted.labels.tolist() and found.parts is None
        for i in (0, len(found) - 1):
            ids = task.tokenizer(wanted.first[i], truncation=True, max_length=32)["input_ids"]
            assert found.ids(i).tolist() == ids and found.lengths[i] == len(ids)
    assert (task.num_labels, task.class_names, task.score, task.is_regression) == (2, ("no", "yes"), "accuracy", False)
    assert task.train.length == 32 and task.train.lengths.max() == 32
    about = task.about["splits"]["train"]
    assert about["classes"] == {"no": 120, "yes": 40} and 0 < about["truncated"] < 1
    assert about["truncated"] == pytest.approx(
        np.mean([len(task.tokenizer.encode(text)) > 32 for text in expected.train.first])
    )
    assert open_data(str(home / "data"), task.fingerprint).about == task.about
    with pytest.raises(IndexError):
        task.train.ids(len(task.train))


def test_batches_are_padded_to_the_longest_of_them(task: Task) -> None:
    batch = task.train.rows([5, 0, 9])
    lengths = [len(task.train.ids(i)) for i in (5, 0, 9)]
    assert batch.ids_BT.shape == (3, max(lengths)) and batch.ids_BT.dtype == torch.long
    assert batch.mask_BT.sum(1).tolist() == lengths and batch.num_tokens == sum(lengths)
    assert batch.types_BT is None and batch.labels_N.tolist() == task.train.labels[[5, 0, 9]].tolist()
    for row, index in enumerate((5, 0, 9)):
        assert batch.ids_BT[row][batch.mask_BT[row] == 1].tolist() == task.train.ids(index).tolist()
    assert (batch.ids_BT[batch.mask_BT == 0] == task.tokenizer.pad_token_id).all()


def test_pairs_are_told_apart_and_cut_at_the_longer_text(pairs: Task) -> None:
    assert pairs.is_regression and pairs.score == "pearson_and_spearman" and pairs.train.labels.dtype == torch.float32
    whole = pairs.train.rows(range(len(pairs.train)))
    assert whole.types_BT is not None and whole.ids_BT.shape[1] == 32
    sep = pairs.tokenizer.sep_token_id
    for ids, mask, types in zip(whole.ids_BT, whole.mask_BT, whole.types_BT, strict=True):
        ids, types = ids[mask == 1], types[mask == 1]
        assert (ids == sep).sum() == 2 and ids[-1] == sep and types[-1] == 1
        assert types.diff().sum() == 1 and types[(ids == sep).nonzero()[0, 0]] == 0
        assert not mask[len(ids) :].any()


def test_pairs_are_encoded_as_their_tokenizer_would(pairs: Task, tmp_path: Path) -> None:
    first, second = some_texts(80, seed=5, longest=12), some_texts(80, seed=6, longest=12)
    path = table_file(tmp_path / "a.parquet", {"a": first, "b": second, "label": ["no"] * 80})
    tokenizer = {"kind": "pretrained", "name": str(Path(pairs.tokenizer.name_or_path))}
    data = labelled_files(path, columns={"first": "a", "second": "b"}, tokenizer=tokenizer, length=64)
    found = prepare(data, str(tmp_path / "data"))
    expected = encode.split(data).train
    for i in range(len(found.train)):
        encoding = found.tokenizer(expected.first[i], expected.second[i])
        batch = found.train.rows([i])
        assert batch.ids_BT[0].tolist() == encoding["input_ids"]
        type_ids = found.tokenizer.backend_tokenizer.encode(expected.first[i], expected.second[i]).type_ids
        assert batch.types_BT is not None and batch.types_BT[0].tolist() == type_ids
    for length in (15, 16):
        short = prepare(data.model_copy(update={"length": length}), str(tmp_path / "data"))
        for i in range(len(short.train)):
            texts = expected.first[i], expected.second[i]
            ids = found.tokenizer(*texts, truncation="longest_first", max_length=length)["input_ids"]
            assert short.train.ids(i).tolist() == ids


def test_a_tokenizer_without_special_tokens_will_do(tmp_path: Path, source: str) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "loba": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "tok")
    data = labelled_files(source, tokenizer={"kind": "pretrained", "name": str(tmp_path / "tok")})
    plain = prepare(data, str(tmp_path / "data"))
    batch = plain.train.rows(range(20))
    assert batch.num_tokens == sum(
        len(text.split()) if len(text.split()) < 32 else 32 for text in encode.split(data).train.first[:20]
    )


def test_examples_come_from_many_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: Task, source: str
) -> None:
    monkeypatch.setattr("trainables.data.encode.task.CHUNK", 7)
    pieces = prepare(labelled_files(source), str(tmp_path))
    blocks = MappedTable(tmp_path / pieces.fingerprint / "train.arrow").blocks
    assert len(blocks) > 20
    everything = torch.randperm(len(task.train))
    for one, other in zip(pieces.train.rows(everything), task.train.rows(everything), strict=True):
        assert one is other is None or torch.equal(one, other)
    assert not any(pieces.train.ids(index).flags.owndata for index in range(20))  # views of the map


def test_rows_of_a_batch_lose_the_columns_that_none_uses(pairs: Task, task: Task) -> None:
    for examples_ in (pairs.train, task.train):
        order = np.argsort(examples_.lengths)
        whole = examples_.rows(order)
        short = whole.rows(0, 5)
        assert short.ids_BT.shape[1] == examples_.lengths[order[4]] < whole.ids_BT.shape[1]
        for one, other in zip(short, examples_.rows(order[:5]), strict=True):
            assert one is other is None or torch.equal(one, other)
        assert sum(whole.rows(i, i + 4).num_tokens for i in range(0, len(order), 4)) == whole.num_tokens
        assert all(t is None or t.device.type == "meta" for t in short.to("meta"))


def test_a_corpus_s_batch_has_the_same_methods() -> None:
    batch = next_token_batch(torch.arange(40).view(8, 5))
    assert batch.num_tokens == 40
    assert batch.rows(2, 4).ids_BT.tolist() == batch.ids_BT[2:4].tolist()
    assert batch.rows(2, 4).positions_N.tolist() == batch.rows(0, 2).positions_N.tolist()


def test_examples_are_shown_with_their_label(task: Task, pairs: Task) -> None:
    shown = task.examples(None)
    assert len(shown) == 2 and {text.partition(" ")[0] for text in task.examples(None, num=40)} == {"«no»", "«yes»"}
    assert "[CLS] " in shown[0] and shown[0].count(" ") > 2
    assert pairs.examples(None)[0].startswith(f"«{pairs.train.labels[0].item():g}» [CLS] ")


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("num", "batch"), [(10, 4), (7, 7), (3, 8), (100, 1), (230, 16), (230, 2)])
def test_each_epoch_reads_each_example_once(num: int, batch: int) -> None:
    lengths = np.random.default_rng(0).integers(4, 60, num)
    steps = [bucketed_indices(lengths, batch, step, seed=0, stream="main") for step in range(3 * num)]
    assert all(len(indices) == batch for indices in steps)
    epochs = torch.cat(steps)[: num * (3 * batch)].view(-1, num)
    assert all(sorted(epoch.tolist()) == list(range(num)) for epoch in epochs)
    assert torch.equal(
        bucketed_indices(torch.from_numpy(lengths), batch, num, seed=0, stream="main"), steps[num]
    )  # no state
    if num > 3 and batch != num:
        assert not torch.equal(epochs[0], epochs[1])
        assert any(
            not torch.equal(bucketed_indices(lengths, batch, s, seed=1, stream="main"), steps[s]) for s in range(num)
        )
        assert any(
            not torch.equal(bucketed_indices(lengths, batch, s, seed=0, stream="other"), steps[s]) for s in range(num)
        )


def test_where_all_are_of_a_length_every_example_is_as_likely_at_every_place() -> None:
    lengths, counts = np.full(12, 30), np.zeros((3, 12))
    for seed in range(600):
        for step in range(3):
            counts[step] += np.bincount(bucketed_indices(lengths, 4, step, seed=seed, stream="main"), minlength=12)
    assert counts.sum() == 600 * 12 and (np.abs(counts - 200) < 4.5 * np.sqrt(200)).all()


def test_batches_of_one_step_are_no_longer_or_shorter_than_those_of_another() -> None:
    """Batches change places: a step's mean length says nothing about when it comes."""
    lengths = np.random.default_rng(0).integers(4, 60, 1600)
    means = np.array(
        [
            [lengths[bucketed_indices(lengths, 16, s, seed=seed, stream="m")].mean() for s in range(100)]
            for seed in range(40)
        ]
    )
    assert means.std(1).mean() > 5  # of similar length within a batch
    assert np.abs(means.mean(0) - lengths.mean()).max() < 4.5 * means.std() / 40**0.5


def waste(lengths: np.ndarray, batches: list[torch.Tensor]) -> float:
    """The share of a batch's places that are padding."""
    places = sum(len(b) * lengths[b.numpy()].max() for b in batches)
    return 1 - sum(lengths[b.numpy()].sum() for b in batches) / places


def bucketed_and_plain(lengths: np.ndarray, batch: int) -> tuple[float, float]:
    steps = range(3 * len(lengths) // batch)
    found = [bucketed_indices(lengths, batch, step, seed=0, stream="main") for step in steps]
    plain = [shuffled_indices(len(lengths), batch, step, seed=0, stream="main") for step in steps]
    return waste(lengths, found), waste(lengths, plain)


def test_little_of_a_batch_is_padding() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.6, 2241), 8, 128).astype(np.int32)
    bucketed, plain = bucketed_and_plain(lengths, 32)
    assert bucketed < plain / 3


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_evaluation_goes_by_length_and_comes_back_in_order(task: Task, batch: int) -> None:
    found = torch.full((len(task.train),), -1)
    lengths = []
    for indices, some in by_length(task.train, batch=batch):
        assert len(indices) == len(some.labels_N) <= batch
        found[indices] = some.labels_N
        lengths += some.mask_BT.sum(1).tolist()
    assert torch.equal(found, task.train.labels) and lengths == sorted(lengths)


def test_folds_are_alike_in_size_and_the_same_each_time() -> None:
    found = folds(103, 5)
    assert sorted(Counter(found.tolist()).values()) == [20, 20, 21, 21, 21]
    assert torch.equal(found, folds(103, 5)) and found.tolist() != (torch.arange(103) % 5).tolist()


# ---------------------------------------------------------------------------------------------------------- embedded


@pytest.mark.parametrize("name", ["topic", "signature"])
def test_the_embedded_tasks_are_balanced_and_their_splits_share_no_text(name: str) -> None:
    data = PythonTask.model_validate({"kind": "python_task", "task": name})
    found, again = encode.split(data), getattr(python_tasks, name)()
    assert found.train.first == again.train.first  # the same each time
    assert len(found.train) > 3000 and 500 < len(found.dev) < 1500 and 500 < len(found.test) < 1500
    for split in (found.train, found.dev, found.test):
        share = np.bincount(split.labels, minlength=data.num_labels) / len(split)
        assert (
            len(share) == data.num_labels and share.min() > 0.05 and share.max() < (0.25 if name == "topic" else 0.51)
        )
    texts = {s: list(getattr(found, s).second or getattr(found, s).first) for s in ("train", "dev", "test")}
    assert not repeats(texts["train"], all_shingles([*texts["dev"], *texts["test"]])).any()
    assert not repeats(texts["dev"], all_shingles(texts["test"])).any()


def test_a_topic_does_not_name_its_module() -> None:
    texts = " ".join(encode.split(PythonTask(kind="python_task", task="topic")).train.first).lower()
    assert not {"asyncio", "email", "decimal", "unittest", "ipaddress", "xml"} & set(texts.replace(".", " ").split())
    assert "module" in texts


def test_neither_text_of_a_pair_tells_the_label_alone() -> None:
    found = python_tasks.signature()
    for split in (found.train, found.dev, found.test):
        assert split is not None and split.second is not None
        for column in (split.first, split.second):
            balance: Counter[str] = Counter()
            for text, label in zip(column, split.labels, strict=True):
                balance[text] += 1 if label else -1
            assert not any(balance.values())
        assert len(set(zip(split.first, split.second, strict=True))) == len(split)


def test_the_other_description_is_never_of_a_function_of_the_same_name() -> None:
    draw = np.random.default_rng(0)
    functions = [python_tasks._Function("m", f"name{draw.integers(40)}", f"s{i}", f"d{i}") for i in range(300)]
    name_of = {one.description: one.name for one in functions} | {one.signature: one.name for one in functions}
    pairs = python_tasks._pairs(functions)
    assert pairs.second is not None
    others = [
        (name_of[a], name_of[b]) for a, b, y in zip(pairs.first, pairs.second, pairs.labels, strict=True) if not y
    ]
    assert len(others) == 300 and not any(one == other for one, other in others)  # 7 or 8 by chance


def test_names_are_split_into_words() -> None:
    names = ["HTTPConnection.get_response", "__init__", "formatTime", "a", "UUID", "Http2Server"]
    split = ["HTTP Connection.get response", "init", "format Time", "a", "UUID", "Http2 Server"]
    assert [python_tasks._split_words(name) for name in names] == split


# ----------------------------------------------------------------------------------------------------------- real data

BERT = PretrainedTokenizer(kind="pretrained", name=str(REAL / "tokenizers" / "bert-base-uncased"))


def glue(task: str, **more: Any) -> Glue:
    return Glue.model_validate({"kind": "glue", "task": task, "source": str(REAL / "glue"), "tokenizer": BERT, **more})


@needs_real_data
@pytest.mark.parametrize(
    ("name", "train", "test"), [("cola", 8551, 1043), ("mrpc", 3668, 408), ("rte", 2490, 277), ("stsb", 5749, 1500)]
)
def test_glue_is_split_as_the_protocol_says(name: str, train: int, test: int) -> None:
    found = encode.split(glue(name))
    official = parquet.read_table(REAL / "glue" / name / "validation.parquet")
    assert found.test.labels.tolist() == official["label"].to_pylist() and len(found.test) == test
    num_dev = min(1000, train // 10)
    assert len(found.dev) == num_dev
    assert len(found.train) == train - num_dev - found.removed["train"] and found.removed["train"] < 30
    if name != "stsb":
        shares = [np.bincount(split.labels) / len(split) for split in (found.train, found.dev)]
        assert np.abs(shares[0] - shares[1]).max() < 0.005


@needs_real_data
def test_rte_is_encoded_as_bert_reads_it_and_little_of_it_is_padding(tmp_path: Path) -> None:
    rte = prepare(glue("rte"), str(tmp_path))
    assert (rte.num_labels, rte.class_names, rte.score) == (2, ("entailment", "not_entailment"), "accuracy")
    first = encode.split(glue("rte")).train
    bert = AutoTokenizer.from_pretrained(BERT.name)
    encoding = bert(first.first[0], first.second[0])  # type: ignore[index]
    batch = rte.train.rows([0])
    assert batch.ids_BT[0].tolist() == encoding["input_ids"]
    assert batch.types_BT is not None and batch.types_BT[0].tolist() == encoding["token_type_ids"]
    for size in (16, 32):
        bucketed, plain = bucketed_and_plain(rte.train.lengths, size)
        print(f"RTE, batch {size}: {bucketed:.1%} of the places are padding; shuffled plainly {plain:.1%}")
        assert bucketed < plain / 3


@needs_real_data
def test_glue_goes_through_datasets_as_the_hub_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked, real = list[tuple[str, ...]](), datasets.load_dataset

    def load(name: str, config: str, *, revision: str, split: str) -> Any:
        asked.append((name, config, revision, split))
        files = {split: str(REAL / "glue" / config / f"{split}.parquet")}
        return real("parquet", data_files=files, split=split, cache_dir=str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load)
        hub = read_source(Glue(kind="glue", task="stsb", revision="abc"))
    assert asked == [("nyu-mll/glue", "stsb", "abc", split) for split in ("train", "validation")]
    here = read_source(glue("stsb"))
    assert hub.train.first == here.train.first and hub.train.labels.tolist() == here.train.labels.tolist()
    assert hub.train.labels.dtype == np.float32


def test_pairs_that_share_a_text_are_one_cluster(pairs: Task) -> None:
    clusters, rows = pairs.test.clusters(), pairs.test
    firsts = [rows.ids(i)[: rows._second[i]].tobytes() for i in range(len(rows))]
    seconds = [rows.ids(i)[rows._second[i] :].tobytes() for i in range(len(rows))]
    fewer = min((firsts, seconds), key=lambda texts: len(set(texts)))
    assert len(clusters) == len(rows) and len(set(clusters)) == len(set(fewer))
    assert len(set(zip(clusters.tolist(), fewer, strict=True))) == len(set(fewer))
