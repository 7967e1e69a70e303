"""Data: what counts as the same text, what is kept apart, what is packed, what is masked, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import torch
from pyarrow import csv, parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainables.config.data import Files, Hub, PretrainedTokenizer, PythonDocs, WordPiece
from trainables.config.errors import DataError
from trainables.config.phase import Masking
from trainables.config.value import random_stream
from trainables.data import tokenizer as tokenizers_
from trainables.data.corpus.documents import split
from trainables.data.corpus.masking import mask_batch, next_token_batch
from trainables.data.corpus.sequences import Corpus
from trainables.data.near_duplicates import normalise
from trainables.data.order import shuffled_indices
from trainables.data.prepare import fingerprint, prepare
from trainables.data.prepared import open_data
from trainables.data.sources import python_docs
from trainables.data.sources.read import read_source
from trainables.data.split import Sources
from trainables.storage import prepared_folders

REAL = Path(os.environ.get("CODISTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(not (REAL / "glue").is_dir(), reason=f"no data sets in {REAL}: set CODISTILL_DATA")

SMALL = WordPiece(kind="wordpiece", size=300)
WORDS = [a + b for a in ("lo", "ra", "mi", "tun", "ske", "por") for b in ("ba", "den", "fi", "gol", "hur", "ix", "ta")]


def some_documents(num: int, *, words: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)).capitalize() + "." for _ in range(num)]


def text_file(path: Path, documents: list[str]) -> str:
    path.write_text("\n\n".join(documents))
    return str(path)


def data_of(train: str | Path, **more: object) -> Files:
    return Files.model_validate(
        {"kind": "files", "train": str(train), "tokenizer": SMALL, "length": 32, "evaluate": 8, **more}
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def source(home: Path) -> str:
    return text_file(home / "text.txt", some_documents(200))


@pytest.fixture(scope="module")
def corpus(home: Path, source: str) -> Corpus:
    return prepare(data_of(source), str(home / "data"))


# ------------------------------------------------------------------------------------------------------- sources


def write_as(path: Path, documents: list[str]) -> None:
    table = pa.table({"text": documents, "label": list(range(len(documents)))})
    match path.suffix:
        case ".parquet":
            parquet.write_table(table, path)
        case ".csv":
            csv.write_csv(table, path)
        case ".txt":
            path.write_text("\n\n".join(documents))
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv", ".txt"])
def test_every_suffix_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    documents = ['one, "quoted"\nof two lines', "1984", "three é"]
    write_as(tmp_path / f"a{suffix}", documents)
    assert read_source(data_of(tmp_path / f"a{suffix}")) == Sources(tuple(documents))


def test_a_glob_and_a_uri_are_read_in_order_of_the_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        text_file(tmp_path / f"{name}.txt", [name])
    assert read_source(data_of(f"file://{tmp_path}/*.txt")).train == ("a", "b", "c")


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.txt", ["old text"])
    assert read_source(data_of(path)) is read_source(data_of(path, length=64))  # read once
    text_file(tmp_path / "a.txt", ["newer text"])
    assert read_source(data_of(path)).train == ("newer text",)


def _bad_column(tmp_path: Path) -> Files:
    write_as(tmp_path / "a.parquet", ["x"])
    return data_of(tmp_path / "a.parquet", columns={"text": "txt"})


def _number_column(tmp_path: Path) -> Files:
    write_as(tmp_path / "a.csv", ["x"])
    parquet.write_table(pa.table({"label": [1, 2]}), tmp_path / "b.parquet")
    return data_of(tmp_path / "b.parquet", columns={"text": "label"})


def _written(name: str, content: str) -> Callable[[Path], Files]:
    def make(tmp_path: Path) -> Files:
        (tmp_path / name).write_text(content)
        return data_of(tmp_path / name)

    return make


def _in_latin_1(tmp_path: Path) -> Files:
    (tmp_path / "a.jsonl").write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    return data_of(tmp_path / "a.jsonl")


def test_json_is_read_as_it_stands_whatever_else_is_in_it(tmp_path: Path) -> None:
    rows = [{"text": "2020-01-01", "id": 1}, {"id": "two", "text": "b"}, {"late": [], "text": "c"}, {"id": None}]
    for name, content in (
        ("a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, rows))),
        ("b.json", json.dumps(rows)),
        ("c.json", json.dumps(rows, indent=2)),
    ):
        (tmp_path / name).write_text(content)
        assert read_source(data_of(tmp_path / name)).train == ("2020-01-01", "b", "c"), name


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_bad_column, r"train: no column 'txt' in .*a\.parquet'; there is text, label; did you mean 'text'"),
        (_number_column, r"column 'label' .* holds int64"),
        (
            _written("a.xml", "<a/>"),
            r"format of .*a\.xml'; expected one of the suffixes \.parquet, \.jsonl, \.json, \.csv, \.txt",
        ),
        (_written("a.txt", " \n\n \n"), r"train: no text in it"),
        (_written("a.csv", ""), r"cannot read .*a\.csv' as its suffix says"),
        (
            _written("a.jsonl", '{"text": "x"}\n\n{"text":\n'),
            r"a\.jsonl' as its suffix says: line 3, column 9: Expecting value",
        ),
        (
            _written("a.json", '[\n{"text": "x"},\n{"text"}]'),
            r"a\.json' as its suffix says: line 3, column 8: Expecting ':'",
        ),
        (
            _written("a.jsonl", '{"text": "x"}\n{"text": 3}'),
            r"train: line 2 of .*: column 'text' holds int; columns\.text must",
        ),
        (
            _written("a.jsonl", '{"text": "x"}\n7'),
            r"line 2 of .* is int; expected an object with a value for each column",
        ),
        (_written("a.jsonl", "\n"), r"a\.jsonl' has no rows; give at least one object with 'text'"),
        (_written("a.jsonl", '{"txt": "x"}'), r"no column 'text' in .*; there is txt; did you mean 'txt'"),
        (_in_latin_1, r"a\.jsonl' as its suffix says: after line 0: 'utf-8' codec can't decode byte 0xe9"),
        (_written("a.parquet", "not parquet"), r"cannot read .*a\.parquet' as its suffix says"),
        (lambda tmp: data_of(tmp / "none.txt"), r"train: no file matches .*none\.txt'"),
        (lambda tmp: data_of(tmp / "*.csv"), r"train: no file matches .*\*\.csv'"),
        (lambda tmp: data_of(tmp), r"it is a folder; name its files, as .*/\*\.parquet"),
        (lambda _: data_of("nowhere://a.txt"), r"train: cannot look into 'nowhere://a.txt'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], Files], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_source(make(tmp_path))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("offline")
def test_a_hub_set_that_cannot_be_had_is_named() -> None:
    with pytest.raises(DataError, match=r"train: cannot load split 'train' of hub data set 'no/such' at 'main': "):
        read_source(Hub(kind="hub", name="no/such", tokenizer=SMALL))


@pytest.mark.usefixtures("offline")
def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder '/no/such'"):
        tokenizers_.load_pretrained(PretrainedTokenizer(kind="pretrained", name="/no/such"))
    with pytest.raises(DataError, match="cannot load 'no/such' at 'v2'"):
        tokenizers_.load_pretrained(PretrainedTokenizer(kind="pretrained", name="no/such", revision="v2"))
    with pytest.raises(DataError, match=f"cannot load '{tmp_path}'"):
        tokenizers_.load_pretrained(PretrainedTokenizer(kind="pretrained", name=str(tmp_path)))


def test_the_embedded_corpus_is_english_and_the_same_each_time() -> None:
    documents = python_docs.documents()
    assert documents == python_docs.documents()
    assert len(documents) > 300
    assert 1_200_000 < sum(map(len, documents)) < 3_000_000
    (json_package,) = [text for text in documents if text.startswith("json\n")]
    assert "json.loads\nDeserialize" in json_package
    assert not any(line and set(line) <= set("*=-~") for text in documents for line in text.split("\n")[:3])


# -------------------------------------------------------------------------------------------------------- splits


def test_splits_share_no_document_and_depend_on_no_order() -> None:
    documents = some_documents(300)
    splits = split(Sources(tuple(documents)))
    backwards = split(Sources(tuple(reversed(documents))))
    assert set(splits.train) | set(splits.dev) | set(splits.test) == set(documents)
    assert len(splits.train) + len(splits.dev) + len(splits.test) == 300
    assert (splits.dev, splits.test, set(splits.train)) == (backwards.dev, backwards.test, set(backwards.train))
    assert 20 <= len(splits.dev) <= 28
    assert 20 <= len(splits.test) <= 28
    assert splits.removed == {"train": 0, "dev": 0, "test": 0}


def test_named_splits_are_used_and_only_what_is_missing_is_cut() -> None:
    train, dev = some_documents(100), some_documents(5, seed=1)
    splits = split(Sources(tuple(train), dev=tuple(dev)))
    assert set(splits.dev) == set(dev)
    assert 0 < len(splits.test) < 15
    assert set(splits.train) | set(splits.test) == set(train)


def test_near_duplicates_leave_train_and_then_dev() -> None:
    train, dev, test = some_documents(50), some_documents(20, seed=1), some_documents(20, seed=2)
    near = test[0].upper().replace(" ", "\n  ") + " and 17 more words"  # case, spaces, a longer end
    numbered = "In the year 1999 there were 12 dogs and 3 cats in the house of my aunt"
    few_words = "Short title"
    splits = split(
        Sources(
            (*train, near, dev[3] + " lo.", numbered, few_words),
            (*dev, test[1].lower(), few_words + " "),
            (*test, numbered.replace("1999", "2003").replace("12", "5"), few_words),
        )
    )
    assert set(splits.train) == set(train)
    assert set(splits.dev) == set(dev)
    assert len(splits.test) == 22
    assert splits.removed == {"train": 4, "dev": 2, "test": 0}


def test_a_part_of_a_longer_training_text_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, longer = some_documents(4), some_documents(40, seed=1)
    train = [" ".join([*parts[:2], *longer[:20]])]
    monkeypatch.setattr(
        "trainables.data.corpus.documents._cut",
        lambda _: {"train": train, "dev": [parts[0], parts[2]], "test": [parts[1], parts[3]]},
    )
    assert split(Sources(())).removed == {"train": 0, "dev": 1, "test": 1}
    named = split(Sources((), dev=(parts[0], parts[2]), test=(parts[1], parts[3])))
    assert named.removed == {"train": 0, "dev": 0, "test": 0}  # who names a test set wants all of it


def test_a_hundred_thousand_short_lines_are_compared_in_seconds() -> None:
    lines = some_documents(100_000, words=9)
    splits = split(Sources(tuple(lines), tuple(lines[:1000]), tuple(some_documents(1000, words=9, seed=1))))
    assert len(splits.dev) == 1000
    assert splits.removed["train"] == 1000


# --------------------------------------------------------------------------------------------------- fingerprint


def test_a_moved_file_has_the_same_fingerprint_and_each_change_another(tmp_path: Path) -> None:
    documents = some_documents(20)
    (tmp_path / "elsewhere").mkdir()
    path, moved = text_file(tmp_path / "a.txt", documents), text_file(tmp_path / "elsewhere" / "b.txt", documents)
    write_as(tmp_path / "a.parquet", documents)
    assert fingerprint(data_of(path)) == fingerprint(data_of(moved)) == fingerprint(data_of(tmp_path / "a.parquet"))
    changed = [*documents[:-1], documents[-1][:-1] + "!"]
    others = [
        data_of(text_file(tmp_path / "c.txt", changed)),
        data_of(text_file(tmp_path / "d.txt", [*documents[:-2], documents[-2] + documents[-1]])),
        data_of(path, length=40),
        data_of(path, evaluate=9),
        data_of(path, tokenizer={"kind": "wordpiece", "size": 301}),
        data_of(path, dev=moved),
        data_of(path, test=moved),
    ]
    assert len({fingerprint(data) for data in (data_of(path), *others)}) == 1 + len(others)


def test_a_pretrained_tokenizer_counts_by_what_it_does(tmp_path: Path, corpus: Corpus, source: str) -> None:
    lower = Tokenizer.from_str(corpus.tokenizer.backend_tokenizer.to_str())
    cased = Tokenizer.from_str(lower.to_str())
    cased.normalizer = None
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    for name, backend in {"one": lower, "two": lower, "cased": cased}.items():
        PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(tmp_path / name)

    def of(name: str) -> str:
        return fingerprint(data_of(source, tokenizer={"kind": "pretrained", "name": str(tmp_path / name)}))

    assert of("one") == of("two") != of("cased")


# ---------------------------------------------------------------------------------------------------- tokenizer

TRAIN_TWICE = """
import sys
from tokenizers.trainers import WordPieceTrainer
from trainables.data.tokenizer import identity; from trainables.data.tokenizer import train_wordpiece
sys.stdout.write(identity(train_wordpiece([line for line in sys.stdin], 400)))
"""


def test_a_vocabulary_is_the_same_in_every_process() -> None:
    text = "\n".join([*some_documents(40), "é ü √ 12 34 a_b x-y"] * 2)  # every count is even: ties all over
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN_TWICE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    for run in runs:
        assert run.stdin
        run.stdin.write(text)
        run.stdin.close()
    assert len({run.stdout.read() if run.stdout else "" for run in runs}) == 1
    here = tokenizers_.identity(tokenizers_.train_wordpiece(text.splitlines(keepends=True), 400))
    assert all(run.wait() == 0 for run in runs)
    assert here == tokenizers_.identity(tokenizers_.train_wordpiece(text.splitlines(keepends=True), 400))


def test_a_trained_tokenizer_is_an_ordinary_one(corpus: Corpus) -> None:
    tok = corpus.tokenizer
    assert corpus.vocab_size == len(tok) <= 300
    assert tok.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert corpus.special_ids == (0, 1, 2, 3, 4)
    assert corpus.mask_id == 4
    assert tok(["LOBA Raden"], ["mifi"])["input_ids"] == tok(["loba raden"], ["mifi"])["input_ids"]
    assert tok.decode(tok("Loba raden")["input_ids"]) == "[CLS] loba raden [SEP]"
    assert corpus.tokenizer_identity == corpus.about["tokenizer_identity"] == tokenizers_.identity(tok)


def test_special_tokens_written_in_a_text_are_text(corpus: Corpus) -> None:
    (ids,) = tokenizers_.encode(corpus.tokenizer, ["loba [MASK] [SEP]"])
    assert not {3, 4} & set(ids)


# ------------------------------------------------------------------------------------------------------ prepared


def test_rows_are_what_was_packed(corpus: Corpus, source: str) -> None:
    splits = split(read_source(data_of(source)))
    tokens = [token for ids in tokenizers_.encode(corpus.tokenizer, splits.train) for token in (*ids, 3)]
    assert len(corpus.train) == len(tokens) // 31 == corpus.about["splits"]["train"]["sequences"]
    expected = torch.tensor(tokens[: 31 * len(corpus.train)]).view(-1, 31)
    wanted = torch.tensor([len(corpus.train) - 1, 0, 5, 5])
    rows = corpus.train.rows(wanted)
    assert rows.dtype == torch.long
    assert rows[:, 0].tolist() == [2, 2, 2, 2]
    assert torch.equal(rows[:, 1:], expected[wanted])
    with pytest.raises(IndexError):
        corpus.train.rows([len(corpus.train)])


def test_dev_and_test_are_cut_to_a_spread_sample(corpus: Corpus, home: Path, source: str) -> None:
    assert len(corpus.dev) == len(corpus.test) == 8
    assert corpus.about["splits"]["dev"]["tokens"] > 8 * 32
    all_of_it = prepare(data_of(source, evaluate=1000), str(home / "data"))
    where = [
        (all_of_it.dev.rows(range(len(all_of_it.dev))) == row).all(1).nonzero().item()
        for row in corpus.dev.rows(range(8))
    ]
    assert where == sorted(where)
    assert where != list(range(8))


def test_rows_are_views_of_the_mapped_file(corpus: Corpus, home: Path) -> None:
    before = pa.total_allocated_bytes()
    again = open_data(str(home / "data"), corpus.fingerprint)
    assert pa.total_allocated_bytes() == before
    assert all(not block.flags.owndata and not block.flags.writeable for block in again.train._blocks)


def test_rows_come_from_many_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Corpus, source: str
) -> None:
    monkeypatch.setattr("trainables.data.encode.corpus.CHUNK", 500)  # characters
    pieces = prepare(data_of(source), str(tmp_path))
    assert len(pieces.train._blocks) > 20
    everything = range(len(corpus.train))
    assert torch.equal(pieces.train.rows(everything), corpus.train.rows(everything))


def test_preparing_again_reuses_and_what_is_broken_is_made_again(
    tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(data_of(source), str(tmp_path))
    folder = tmp_path / first.fingerprint
    about, written = (folder / "about.json").read_text(), (folder / "train.arrow").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("trainables.data.encode.corpus.write", lambda *_: pytest.fail("written again"))
        prepare(data_of(source), str(tmp_path))
    assert (folder / "train.arrow").stat().st_mtime_ns == written

    for breakage in ("a byte", "the end", "a file", "about"):
        match breakage:
            case "a byte":
                content = bytearray((folder / "train.arrow").read_bytes())
                content[1000] ^= 1
                (folder / "train.arrow").write_bytes(content)
            case "the end":
                (folder / "dev.arrow").write_bytes((folder / "dev.arrow").read_bytes()[:-10])
                with pytest.raises(DataError, match=r"dev\.arrow in .* is not as it was written; prepare"):
                    open_data(str(tmp_path), first.fingerprint)
            case "a file":
                (folder / "tokenizer" / "tokenizer.json").unlink()
            case "about":
                (folder / "about.json").write_text(about[:100])
        caplog.clear()
        prepare(data_of(source), str(tmp_path))
        assert "is not whole; it is replaced" in caplog.text
        assert (folder / "about.json").read_text() == about  # the same bytes again: checksums are in it
    assert [path.name for path in tmp_path.iterdir()] == [first.fingerprint]


def test_half_a_folder_is_never_taken(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, whole = data_of(source), prepared_folders._sha256

    def killed(_: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared_folders, "_sha256", killed)  # after the files, before about.json
    with pytest.raises(KeyboardInterrupt):
        prepare(data, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(prepared_folders, "_sha256", whole)
    (tmp_path / f".{fingerprint(data)}-killed" / "tokenizer").mkdir(parents=True)  # what a power cut leaves
    with pytest.raises(DataError, match=r"no prepared data in .*; prepare it first"):
        open_data(str(tmp_path), fingerprint(data))
    assert len(prepare(data, str(tmp_path)).dev) == 8


def test_the_first_to_publish_wins(tmp_path: Path) -> None:
    def slow(temp: Path) -> dict[str, object]:
        prepared_folders.publish(str(tmp_path), "key", lambda other: {"by": (other / "a").write_text("quick")})
        return {"by": (temp / "a").write_text("slow one")}

    prepared_folders.publish(str(tmp_path), "key", slow)
    assert (tmp_path / "key" / "a").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_remote_storage_is_copied_once_to_the_cache(
    tmp_path: Path, source: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODISTILL_CACHE", str(tmp_path / "driver"))
    assert prepare(data_of(source), "memory://bucket/data").about == corpus.about
    monkeypatch.setenv("CODISTILL_CACHE", str(tmp_path / "node"))
    there = open_data("memory://bucket/data", corpus.fingerprint)
    assert torch.equal(there.dev.rows(range(8)), corpus.dev.rows(range(8)))
    remote = fsspec.filesystem("memory")
    remote.pipe_file(f"/bucket/data/{corpus.fingerprint}/dev.arrow", b"broken")
    open_data("memory://bucket/data", corpus.fingerprint)  # from the cache
    monkeypatch.setenv("CODISTILL_CACHE", str(tmp_path / "another"))
    with pytest.raises(DataError, match=r"dev\.arrow in memory:.* is not as it was written"):
        open_data("memory://bucket/data", corpus.fingerprint)
    prepare(data_of(source), "memory://bucket/data")  # mends it
    monkeypatch.setenv("CODISTILL_CACHE", str(tmp_path / "last"))
    open_data("memory://bucket/data", corpus.fingerprint)
    with pytest.raises(DataError, match="no prepared data in memory:"):
        open_data("memory://bucket/data", "0" * 16)


@pytest.mark.parametrize(("num", "says"), [(1, "train: 0 documents"), (6, "do not fill one sequence of 128 tokens")])
def test_too_little_text_is_refused(tmp_path: Path, num: int, says: str) -> None:
    path = text_file(tmp_path / "a.txt", some_documents(num, words=20))
    with pytest.raises(DataError, match=says):
        prepare(data_of(path, length=128), str(tmp_path / "data"))
    assert list((tmp_path / "data").iterdir()) == []


# ------------------------------------------------------------------------------------------------------- masking

MASKED: dict[str, Any] = {"vocab_size": 1000, "mask_id": 4, "special_ids": (0, 1, 2, 3, 4)}


def random_ids(rows: int, length: int) -> torch.Tensor:
    ids_BT = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(1))
    ids_BT[:, 0] = 2
    ids_BT[:, 17::20] = 3
    return ids_BT


def test_a_fixed_share_of_each_row_is_supervised_and_no_special_token() -> None:
    ids_BT = random_ids(500, 100)
    masked = mask_batch(ids_BT, masking=Masking(), **MASKED, seed=7)
    rows = masked.positions_N // 100
    assert torch.equal(torch.bincount(rows), torch.full((500,), 15))
    assert masked.positions_N.tolist() == sorted(set(masked.positions_N.tolist()))
    assert torch.equal(masked.labels_N, ids_BT.flatten()[masked.positions_N])
    assert not torch.isin(masked.labels_N, torch.arange(5)).any()
    elsewhere = torch.ones(500 * 100, dtype=torch.bool).index_fill_(0, masked.positions_N, False)
    assert torch.equal(masked.ids_BT.flatten()[elsewhere], ids_BT.flatten()[elsewhere])
    columns = torch.bincount(masked.positions_N % 100, minlength=100)
    assert columns[0] == columns[17] == 0
    assert columns[1] > 40  # of 500 x 15 / 94 = 80 expected


@pytest.mark.parametrize(("mask", "replaced"), [(0.8, 0.1), (0.5, 0.5), (0.0, 0.0), (1.0, 0.0)])
def test_shares_are_as_stated(mask: float, replaced: float) -> None:
    ids_BT = random_ids(2000, 100)
    masked = mask_batch(ids_BT, masking=Masking(mask=mask, random=replaced), **MASKED, seed=3)
    seen_N, num = masked.ids_BT.flatten()[masked.positions_N], len(masked.labels_N)
    kept = 1 - mask - replaced + replaced / 995  # a drawn token may be the one that was there
    for observed, share in (
        ((seen_N == 4).float().mean().item(), mask),
        ((seen_N == masked.labels_N).float().mean().item(), kept),
    ):
        assert abs(observed - share) <= 4.5 * (share * (1 - share) / num) ** 0.5
    drawn_N = seen_N[(seen_N != 4) & (seen_N != masked.labels_N)]
    assert not torch.isin(drawn_N, torch.arange(5)).any()
    if replaced:
        assert drawn_N.min() < 15
        assert drawn_N.max() > 990


def test_a_row_of_few_words_has_fewer_positions() -> None:
    ids_BT = torch.full((3, 40), 3)
    ids_BT[1, 5:7] = torch.tensor([10, 11])
    ids_BT[2, :30] = 12
    masked = mask_batch(ids_BT, masking=Masking(), **MASKED, seed=0)
    assert torch.bincount(masked.positions_N // 40, minlength=3).tolist() == [0, 2, 6]
    assert masked.labels_N[:2].tolist() == [10, 11]
    assert len(mask_batch(ids_BT[1:2], masking=Masking(probability=0.01), **MASKED, seed=0).labels_N) == 1


def test_the_seed_alone_decides() -> None:
    ids_BT = random_ids(4, 64)
    torch.manual_seed(5)
    one = mask_batch(ids_BT, masking=Masking(), **MASKED, seed=random_stream(0, "mask", "main", 3))
    torch.manual_seed(6)
    two = mask_batch(ids_BT, masking=Masking(), **MASKED, seed=random_stream(0, "mask", "main", 3))
    other = mask_batch(ids_BT, masking=Masking(), **MASKED, seed=random_stream(0, "mask", "main", 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.positions_N, other.positions_N)


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_slices_make_up_the_whole(micro: int, causal: bool) -> None:
    ids_BT = random_ids(8, 50)
    whole = next_token_batch(ids_BT) if causal else mask_batch(ids_BT, masking=Masking(), **MASKED, seed=1)
    parts = [whole.rows(start, min(start + micro, 8)) for start in range(0, 8, micro)]
    assert torch.equal(torch.cat([part.ids_BT for part in parts]), whole.ids_BT)
    assert torch.equal(torch.cat([part.labels_N for part in parts]), whole.labels_N)
    shifted = [part.positions_N + 50 * micro * i for i, part in enumerate(parts)]
    assert torch.equal(torch.cat(shifted), whole.positions_N)


def test_the_next_token_is_the_label_and_padding_is_none() -> None:
    ids_BT = torch.tensor([[5, 6, 7], [8, 9, 0]])
    assert [t.tolist() for t in next_token_batch(ids_BT)] == [ids_BT.tolist(), [0, 1, 3, 4], [6, 7, 9, 0]]


# ------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("num", "batch"), [(10, 4), (7, 7), (3, 8), (100, 1)])
def test_each_epoch_reads_each_sequence_once(num: int, batch: int) -> None:
    steps = [shuffled_indices(num, batch, step, seed=0, stream="main") for step in range(3 * num)]
    assert all(len(indices) == batch for indices in steps)
    epochs = torch.cat(steps)[: num * (3 * batch)].view(-1, num)
    assert all(sorted(epoch.tolist()) == list(range(num)) for epoch in epochs)
    assert torch.equal(shuffled_indices(num, batch, num, seed=0, stream="main"), steps[num])  # no state
    if num > 3:
        assert not torch.equal(epochs[0], epochs[1])
        assert not torch.equal(shuffled_indices(num, batch, 0, seed=1, stream="main"), steps[0]) or batch == 1
        assert not torch.equal(torch.cat([shuffled_indices(num, num, 0, seed=0, stream="other")]), epochs[0])


@pytest.mark.parametrize("masking", [Masking(), None])
def test_evaluation_is_the_same_whatever_its_batch(corpus: Corpus, masking: Masking | None) -> None:
    (whole,) = corpus.evaluation_batches("dev", masking, batch=100)
    parts = list(corpus.evaluation_batches("dev", masking, batch=3))
    assert [len(part.ids_BT) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.ids_BT for part in parts]), whole.ids_BT)
    assert torch.equal(torch.cat([part.labels_N for part in parts]), whole.labels_N)


def test_examples_mark_what_is_supervised(corpus: Corpus) -> None:
    marked = corpus.examples(Masking())
    assert len(marked) == 2
    assert sum(text.count("→") for text in marked) == 2 * 5
    assert "→[MASK]»" in marked[0]
    assert "→" not in corpus.examples(None)[0]


def test_masking_needs_a_mask_token(tmp_path: Path, source: str) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "loba": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "tok")
    plain = prepare(
        data_of(source, tokenizer={"kind": "pretrained", "name": str(tmp_path / "tok")}), str(tmp_path / "data")
    )
    assert plain.train.rows([0]).shape == (1, 32)  # without start and end tokens
    assert len(list(plain.evaluation_batches("test", None, batch=8))) == 1
    with pytest.raises(DataError, match="no mask token; use `corruption: null`"):
        next(plain.evaluation_batches("test", Masking(), batch=8))


# ---------------------------------------------------------------------------------------------------- real data


def test_the_embedded_corpus_fills_its_splits(tmp_path: Path) -> None:
    corpus = prepare(PythonDocs(kind="python_docs", tokenizer=WordPiece(kind="wordpiece")), str(tmp_path))
    assert corpus.vocab_size == 4096
    assert len(corpus.train) > 2000
    assert len(corpus.dev) == len(corpus.test) == 256
    splits = split(read_source(PythonDocs(kind="python_docs", tokenizer=SMALL)))
    texts = [{normalise(text) for text in getattr(splits, name)} for name in ("train", "dev", "test")]
    assert not any(one & other for one, other in itertools.combinations(texts, 2))
    unknown = corpus.train.rows(range(500)) == corpus.tokenizer.unk_token_id
    assert unknown.float().mean() < 0.001


@needs_real_data
@pytest.mark.usefixtures("offline")
def test_a_data_set_with_its_own_columns_and_splits_loads_through_datasets(tmp_path: Path) -> None:
    bert = PretrainedTokenizer(kind="pretrained", name=str(REAL / "tokenizers" / "bert-base-uncased"))
    sst2 = Hub.model_validate(
        {
            "kind": "hub",
            "name": str(REAL / "glue" / "sst2"),
            "test": "validation",
            "columns": {"text": "sentence"},
            "tokenizer": bert,
            "length": 64,
        }
    )
    corpus = prepare(sst2, str(tmp_path))
    assert corpus.vocab_size == 30522
    assert corpus.about["splits"]["test"]["documents"] == 872
    assert corpus.train.rows([0])[0, 0] == 101
    assert corpus.tokenizer.decode(corpus.train.rows([0])[0]).count("[SEP]") > 2
    with pytest.raises(DataError, match=r"cannot load split 'validaton' .*Should be one of \['train', 'validation'\]"):
        read_source(sst2.model_copy(update={"test": "validaton"}))
    with pytest.raises(
        DataError, match=r"no column 'sentnce' .* there is sentence, label, idx; did you mean 'sentence'"
    ):
        read_source(sst2.model_copy(update={"columns": sst2.columns.model_copy(update={"text": "sentnce"})}))


@needs_real_data
def test_wikitext_and_a_causal_tokenizer_fit_together(tmp_path: Path) -> None:
    wiki = REAL / "wikitext2"
    gpt2 = {"kind": "pretrained", "name": str(REAL / "tokenizers" / "gpt2")}
    data = data_of(wiki / "validation.parquet", test=str(wiki / "test.parquet"), tokenizer=gpt2, length=128)
    corpus = prepare(data, str(tmp_path))
    assert corpus.about["removed_duplicates"]["test"] == 0  # a named test set stays whole
    assert corpus.mask_id is None
    assert corpus.train.rows([3])[0, 0] == corpus.tokenizer.bos_token_id
    batch = next(corpus.evaluation_batches("test", None, batch=4))
    assert torch.equal(batch.labels_N[:127], batch.ids_BT[0, 1:])


def test_each_sequence_names_the_document_of_its_middle(tmp_path: Path) -> None:
    """Examples of one document are one cluster; files of before have no such column."""
    found = prepare(data_of(text_file(tmp_path / "text.txt", some_documents(60, words=400))), str(tmp_path / "data"))
    documents = found.test.documents
    assert documents is not None and len(documents) == len(found.test) and len(set(documents)) < len(documents)
    assert max(documents) < found.about["splits"]["test"]["documents"]
