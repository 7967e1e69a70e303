"""Instructions: what is read from which source, which rows are in which split, and what a template makes of them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import csv, parquet
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainables.config.data import InstructionFiles, InstructionHub
from trainables.config.errors import DataError
from trainables.data.encode import instructions as encode
from trainables.data.instructions.rows import Row, Turn, divide
from trainables.data.instructions.templates import alpaca, render
from trainables.data.prepare import fingerprint, prepare
from trainables.data.sources import read
from trainables.data.sources.read import read_source

REAL = Path(os.environ.get("CODISTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
INSTRUCTIONS = REAL / "instructions"
needs_real_data = pytest.mark.skipif(not INSTRUCTIONS.is_dir(), reason=f"no instructions in {REAL}: set CODISTILL_DATA")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None) -> Any:
    words = {word: i for i, word in enumerate(["[UNK]", "<|im_start|>", "<|im_end|>", "user", "assistant", "system"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tok.chat_template = template
    return tok


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    match path.suffix:
        case ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        case ".csv":
            csv.write_csv(pa.Table.from_pylist(rows), path)
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def instruction_files(train: str | None = None, **more: Any) -> InstructionFiles:
    value = {"kind": "instruction_files", "train": train, "tokenizer": {"kind": "wordpiece", "size": 300}}
    return InstructionFiles.model_validate({**value, **more})


def some_rows(num: int) -> list[dict[str, Any]]:
    return [
        {"instruction": f"Say {i}", "context": f"as {i % 7}" if i % 2 else "", "response": f"I say {i}"}
        for i in range(num)
    ]


def said(rows: tuple[Row, ...]) -> list[str]:
    return [row.turns[-1].content for row in rows]


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_every_suffix_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"q": 'one, "quoted"\nof two', "about": "1984", "a": " an é "},
        {"q": "1984", "about": None, "a": "None"},
        {"q": "two", "about": " ", "a": "1"},
    ]
    columns = {"prompt": "q", "context": "about", "response": "a"}
    found = read_source(instruction_files(written(tmp_path / f"a{suffix}", rows), columns=columns))
    assert found.train == (
        Row((Turn("user", 'one, "quoted"\nof two'),), "1984", ("an é",)),
        Row((Turn("user", "1984"),), "", ("None",)),  # the word is a reply like another
        Row((Turn("user", "two"),), "", ("1",)),
    )
    assert found.dev is None and found.test is None and found.dropped == {"train": {}}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_list_of_replies_is_learnt_by_its_first_and_scored_by_all(tmp_path: Path, suffix: str) -> None:
    rows = [{"instruction": "a", "response": [" one ", "", "two"]}, {"instruction": "b", "response": ["", None]}]
    found = read_source(instruction_files(test=written(tmp_path / f"a{suffix}", rows)))
    assert found.test == (Row((Turn("user", "a"),), "", ("one", "two")),)
    assert found.dropped == {"test": {"an empty reply": 1}}


def test_a_hub_data_set_gives_the_same_rows_by_its_own_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, *, revision: str, split: str) -> Any:
        asked.append((name, config, revision, split))
        return datasets.Dataset.from_list(some_rows(30 if split == "train" else 5))

    monkeypatch.setattr(datasets, "load_dataset", load)
    value = {"kind": "instruction_hub", "name": "some/hub", "revision": "v1", "train": "train", "test": "validation"}
    columns = {"context": "context"}
    found = read_source(InstructionHub.model_validate({**value, "columns": columns}))
    assert asked == [("some/hub", None, "v1", "train"), ("some/hub", None, "v1", "validation")]
    rows = written(tmp_path / "a.jsonl", some_rows(30))
    assert found.train == read_source(instruction_files(rows, columns=columns)).train
    assert len(found.test or ()) == 5 and found.dev is None
    with pytest.raises(DataError, match=r"train: no column 'respons' in 'some/hub'.*did you mean 'response'"):
        read_source(InstructionHub.model_validate({**value, "columns": {"response": "respons"}}))


def test_rows_without_a_prompt_or_a_reply_are_counted(tmp_path: Path) -> None:
    rows = [*some_rows(20), {"instruction": " ", "response": "a"}, {"instruction": "a", "response": "\n"}]
    rows += [{"instruction": "b", "response": None}]
    found = read_source(instruction_files(written(tmp_path / "a.parquet", rows)))
    assert len(found.train or ()) == 20
    assert found.dropped == {"train": {"an empty prompt": 1, "an empty reply": 2}}


def test_conversations_end_with_the_reply(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", " Well ")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    for suffix in (".parquet", ".jsonl"):
        data = instruction_files(
            test=written(tmp_path / f"a{suffix}", rows), template="chat", columns={"messages": "messages"}
        )
        assert read_source(data).test == (Row(tuple(Turn(*turn) for turn in turns[:-1]), "", ("Well",)),)


def test_each_reply_of_a_conversation_is_a_row_of_its_group(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    talk = [message("user", "Hi"), message("assistant", " Hello "), message("user", "Ask f"), call]
    talk += [message("tool", "3"), message("assistant", "Three"), message("user", "Bye"), message("assistant", "Well")]
    others = [{"messages": [message("user", f"Count to {n}"), message("assistant", "One"), message("user", "On"), message("assistant", "Two")]} for n in range(40)]  # fmt: skip
    file = written(tmp_path / "a.jsonl", [{"messages": talk}, *others])
    columns = {"messages": "messages"}
    found = read_source(instruction_files(test=file, template="chat", columns=columns, turns="all")).test or ()
    prompts = [len(row.turns) for row in found[:4]]
    assert prompts == [1, 3, 5, 7] and [row.replies for row in found[:4]] == [("Hello",), ("",), ("Three",), ("Well",)]
    assert found[1].answer == Turn("assistant", None, {"tool_calls": call["tool_calls"]}) and found[0].answer is None
    assert len({row.cluster for row in found[:4]}) == 1 and len({row.cluster for row in found}) == 41
    split = divide(read_source(instruction_files(file, template="chat", columns=columns, turns="all")))
    owners = [{row.group for row in rows} for rows in (split.train, split.dev, split.test)]
    assert all(owners) and not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    with pytest.raises(ValidationError, match="turns: all is for conversations"):
        instruction_files(file, turns="all")


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("column", ["conversations", "messages"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_conversations_of_sharegpt_are_those_of_transformers(
    suffix: str, column: str, is_text: bool, tmp_path: Path
) -> None:
    """Also as a text of JSON, as tables hold them, and with a system message in a column of its own."""
    said = [("human", "Hi"), ("gpt", "Hello"), ("observation", "mild"), ("human", "Bye"), ("gpt", " Well ")]
    talk: Any = [{"from": who, "value": text} for who, text in said]
    roles = ("user", "assistant", "tool", "user")
    turns = tuple(Turn(role, text) for role, (_, text) in zip(roles, said, strict=False))
    for system in (None, "Be brief."):
        rows = [{column: json.dumps(talk) if is_text or suffix == ".csv" else talk, "system": system}]
        data = instruction_files(
            test=written(tmp_path / f"a{bool(system)}{suffix}", rows), template="chat", columns={"messages": column}
        )
        before = () if system is None else (Turn("system", system),)
        assert read_source(data).test == (Row((*before, *turns), "", ("Well",)),)
        own = [{"from": "system", "value": "Be long."}, *talk]
        rows[0][column] = json.dumps(own) if is_text or suffix == ".csv" else own
        data = instruction_files(
            test=written(tmp_path / f"b{bool(system)}{suffix}", rows), template="chat", columns={"messages": column}
        )
        assert read_source(data).test == (Row((Turn("system", "Be long."), *turns), "", ("Well",)),)


SPEAKER = st.sampled_from(["human", "gpt", "system", "tool", "function_call"]) | st.text(max_size=8) | st.none()
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SAID = st.fixed_dictionaries(
    {}, optional={"from": SPEAKER | ANYTHING, "value": st.text(max_size=20) | ANYTHING, "role": ANYTHING}
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=st.lists(SAID, max_size=5) | ANYTHING, system=ANYTHING)
def test_any_conversation_is_read_or_refused_in_one_line(talk: Any, system: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": talk, "system": system}) + "\n")
    data = instruction_files(test=str(tmp_path / "a.jsonl"), template="chat", columns={"messages": "conversations"})
    read._load.cache_clear()
    refused = ""
    try:
        found = read_source(data)
    except DataError as error:
        refused = str(error)
    if refused:
        assert "a.jsonl" in refused and "\n" not in refused
    else:  # a row without a prompt or a reply is counted
        rows = found.test or ()
        assert len(rows) + sum(found.dropped["test"].values()) == 1
        assert {turn.role for row in rows for turn in row.turns} <= {"user", "assistant", "system", "tool"}


def message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([message("user", "a"), message("user", "b")], r"row 1: 'messages' ends with 'user'; expected a list of \{role, con"),
        ([message("assistant", "a")], "has 1 of the 2 messages that it needs; expected a list"),
        ([{"from": "human", "value": "a"}], "has 1 of the 2 messages that it needs; expected a list"),
        ([{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}],
         "row 1: 'messages': message 2: 'from' is str 'bing'; expected .* one of human, gpt, "),
        ([{"from": "human", "value": "a"}, {"from": ["gpt"], "value": "b"}], "message 2: 'from' is list .*; expected"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "content": "b"}], "message 2: has no 'value'; expected"),
        ([{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}], "message 2: 'from' is empty; expected"),
        ([{"from": "human", "value": 5}, {"from": "gpt", "value": "b"}], r"message 1 is dict .* no \{role, content\} of texts"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}],
         "message 2: 'value' of 'function_call' is str .*; expected JSON with name and arguments"),
        ([message("user", 5), message("assistant", 5)], r"message 1 is dict .* no \{role, content\} of texts; expected"),
        ("hello", "'messages' is str 'hello'; expected a list"),
        (None, "'messages' is empty; expected a list"),
    ],
)  # fmt: skip
def test_conversations_of_another_form_are_refused(tmp_path: Path, value: Any, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": value}) + "\n")
    data = instruction_files(test=str(tmp_path / "a.jsonl"), template="chat", columns={"messages": "messages"})
    with pytest.raises(DataError, match=says):
        read_source(data)


def test_conversations_need_a_template_that_tells_turns_apart() -> None:
    with pytest.raises(
        ValidationError, match=r"columns\.messages: conversations have turns, which only `template: chat`"
    ):
        instruction_files("a.jsonl", columns={"messages": "turns"})


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prompt": "instructions"}, "train: no column 'instructions' in .*did you mean 'instruction'"),
        ({"response": "output"}, "train: no column 'output' in .*; set columns.response to one of them"),
        ({"context": "contxt"}, "no column 'contxt' in .*did you mean 'context'"),
        ({"response": "number"}, "row 1: 'number' is int 3; expected a text, or a list of texts"),
        ({"context": "number"}, "row 1: 'number' is int 3; expected a text, or nothing"),
        ({"prompt": "number"}, "line 1 of .*: column 'number' holds int; columns.prompt must name one of strings"),
    ],
)
def test_columns_of_no_use_are_named(tmp_path: Path, columns: dict[str, str], says: str) -> None:
    rows = [{**row, "number": 3} for row in some_rows(3)]
    with pytest.raises(DataError, match=says):
        read_source(instruction_files(written(tmp_path / "a.jsonl", rows), columns=columns))
    with pytest.raises(DataError, match=r"no column 'contxt'.*did you mean 'context'"):
        read_source(instruction_files(written(tmp_path / "a.jsonl", rows), split_by="contxt"))


# --------------------------------------------------------------------------------------------------------------- splits


def test_a_prompt_is_in_one_split_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i % 150}", "response": f"I say {i}"} for i in range(400)]
    one, other = (
        encode.split(instruction_files(written(tmp_path / f"{name}.jsonl", some)))
        for name, some in (("a", rows), ("b", rows[::-1]))
    )
    parts = [set(said(part)) for part in (one.train, one.dev, one.test)]
    assert len(one.train) + len(one.dev) + len(one.test) == 400 and sum(map(len, parts)) == 150
    assert 32 <= len(one.dev) <= 34 and 32 <= len(one.test) <= 34
    for name in ("train", "dev", "test"):
        assert sorted(said(getattr(one, name))) == sorted(said(getattr(other, name)))


def test_rows_are_split_by_the_column_that_is_named(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}", "response": "a", "source": i % 40} for i in range(400)]
    found = encode.split(instruction_files(written(tmp_path / "a.jsonl", rows), split_by="source"))
    sources = [{row.group for row in part} for part in (found.train, found.dev, found.test)]
    assert sum(map(len, sources)) == 40 and min(map(len, sources)) == 4
    holey = written(tmp_path / "b.jsonl", [{**row, "source": None if i == 0 else 1} for i, row in enumerate(rows)])
    with pytest.raises(DataError, match="row 1 has no 'source', by which rows are split"):
        encode.split(instruction_files(holey, split_by="source"))
    one = written(tmp_path / "c.jsonl", [{**row, "source": 1} for row in rows])
    with pytest.raises(
        DataError, match="train: no row is left, since the 400 rows of train have only 1 different values"
    ):
        encode.split(instruction_files(one, split_by="source"))


def test_what_is_in_a_named_split_leaves_train(tmp_path: Path) -> None:
    rows = some_rows(60)
    again = {"instruction": " SAY  3 ", "context": rows[3]["context"], "response": "another reply"}
    test = [again, {"instruction": "Say 4", "context": "as much", "response": "with another context"}]
    columns = {"context": "context"}
    data = instruction_files(
        written(tmp_path / "a.jsonl", rows),
        dev=written(tmp_path / "dev.jsonl", [*rows[10:14], again]),
        test=written(tmp_path / "test.jsonl", test),
        columns=columns,
    )
    found = encode.split(data)
    assert found.removed == {"train": 5, "dev": 1, "test": 0} and len(found.test) == 2
    assert "Say 3" not in said(found.train) and "Say 4" in said(found.train) and "Say 12" not in said(found.train)


def test_at_most_about_five_hundred_are_held_out(tmp_path: Path) -> None:
    found = encode.split(instruction_files(written(tmp_path / "a.parquet", some_rows(9000))))
    assert (len(found.train), len(found.dev), len(found.test)) == (8000, 500, 500)


def test_without_train_there_is_only_test(tmp_path: Path) -> None:
    found = encode.split(instruction_files(test=written(tmp_path / "a.jsonl", some_rows(5))))
    assert (len(found.train), len(found.dev), len(found.test)) == (0, 0, 5)
    empty = written(tmp_path / "b.jsonl", [{"instruction": "a", "response": ""}])
    with pytest.raises(DataError, match=r"test: no row is left \(1 with an empty reply\); name other columns"):
        encode.split(instruction_files(test=empty))


# ------------------------------------------------------------------------------------------------------------ templates


def test_alpaca_stands_in_both_variants_word_by_word() -> None:
    assert alpaca("Add.", "1, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )
    assert alpaca("Add.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )


ROW = Row((Turn("system", "Be brief."), Turn("user", "Hi there")), "at noon", ("Hello you", "Hi"))


def test_a_chat_template_is_asked_for_prompt_and_conversation() -> None:
    found = render(ROW, "chat", chat_tokenizer(CHATML))
    assert found.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there\n\nat noon<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (found.lead, found.reply) == ("", "Hello you")
    thinking = CHATML.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    )
    assert render(ROW, "chat", chat_tokenizer(thinking)).lead == "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("reply", ["a", "channel", "final:", ":", "Hello"])
def test_a_reply_begins_after_what_the_template_writes_though_that_holds_its_words(reply: str) -> None:
    channel = CHATML.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}channel final: {% endif %}{{ m['content'] }}"
    )
    found = render(ROW._replace(replies=(reply,)), "chat", chat_tokenizer(channel))
    assert (found.lead, found.reply) == ("channel final: ", reply)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (CHATML.replace("{{ m['content'] }}", "{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}"),
         r"template: the tokenizer's chat template \(\{% for m in .* loses the reply str 'Hello you'; expected a template"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "loses the reply"),
        (CHATML.replace("{% for m in messages %}", "{{ messages | length }}{% for m in messages %}"), "does not begin a conversation with its own"),
        ("{{ raise_exception('no system here') }}", "refuses a conversation of system, user, assistant: no system here"),
        (None, "template: chat is the tokenizer's own, and this tokenizer has none"),
    ],
)  # fmt: skip
def test_a_template_that_loses_the_reply_is_refused(template: str | None, says: str) -> None:
    with pytest.raises(DataError, match=says):
        render(ROW, "chat", chat_tokenizer(template))


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_content_and_whatever_changes_a_number_is_in_the_fingerprint(tmp_path: Path) -> None:
    rows = some_rows(60)
    one, moved, edited = (
        written(tmp_path / name, some)
        for name, some in (("a.jsonl", rows), ("b.csv", rows), ("c.jsonl", [*rows[1:], {**rows[0], "response": "x"}]))
    )
    columns = {"context": "context"}
    key = fingerprint(instruction_files(one, columns=columns))
    assert fingerprint(instruction_files(moved, columns=columns)) == key
    changes: list[dict[str, Any]] = [
        {"length": 400}, {"prompt_length": 100}, {"examples": 20}, {"evaluate": 3}, {"scoring": {"seeds": [1]}},
        {"scoring": {"top_p": 0.9}}, {"columns": {}}, {"split_by": "response"}, {"test": one},
        {"tokenizer": {"kind": "wordpiece", "size": 200}},
    ]  # fmt: skip
    keys = [fingerprint(instruction_files(one, **{"columns": columns, **change})) for change in changes]
    assert len({key, fingerprint(instruction_files(edited, columns=columns)), *keys}) == len(changes) + 2


def test_a_chat_template_is_in_the_fingerprint(tmp_path: Path) -> None:
    train = written(tmp_path / "a.jsonl", some_rows(30))
    keys = set()
    for name, template in (("one", CHATML), ("two", CHATML.replace("\n", " "))):
        chat_tokenizer(template).save_pretrained(str(tmp_path / name))
        tok = {"kind": "pretrained", "name": str(tmp_path / name)}
        keys |= {fingerprint(instruction_files(train, tokenizer=tok, template=way)) for way in ("chat", "alpaca")}
    assert len(keys) == 3  # alpaca does not ask for it
    with pytest.raises(DataError, match="chat needs a pretrained tokenizer"):
        prepare(instruction_files(train, template="chat"), str(tmp_path / "data"))


# ------------------------------------------------------------------------------------------------------------ real data


@needs_real_data
def test_dolly_is_split_like_the_papers() -> None:
    data = instruction_files(
        str(INSTRUCTIONS / "databricks-dolly-15k" / "train.parquet"), columns={"context": "context"}
    )
    found = encode.split(data)
    assert len(found.train) + len(found.dev) + len(found.test) + sum(found.removed.values()) == 15_011
    assert 500 <= len(found.dev) < 520 and 500 <= len(found.test) < 520
    texts = Counter(text for part in (found.train, found.dev, found.test) for text in {row.text for row in part})
    assert max(texts.values()) == 1


@needs_real_data
def test_files_that_are_only_scored_are_read_with_their_own_columns() -> None:
    instructed = instruction_files(
        test=str(INSTRUCTIONS / "self_instruct_user_oriented" / "test.parquet"),
        columns={"context": "input", "response": "output"},
    )
    assert (
        len(encode.split(instructed).test) == 252
        and sum(not row.context for row in encode.split(instructed).test) == 44
    )
    vicuna = {"test": str(INSTRUCTIONS / "vicuna_bench" / "test.parquet")}
    found = encode.split(instruction_files(**vicuna, columns={"response": "reference_gpt4"}))
    assert len(found.test) == 10 and found.dropped["test"] == {"an empty reply": 70}
    assert len(encode.split(instruction_files(**vicuna, columns={"response": "answer_gpt35"})).test) == 80
    with pytest.raises(DataError, match=re.escape("no column 'response' in")):
        encode.split(instruction_files(**vicuna))
