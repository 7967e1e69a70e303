"""Conversations: their ids are those of their chat template, whatever it writes; what it cannot take is refused by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trainables.config.data import InstructionFiles, Sampling
from trainables.config.errors import DataError
from trainables.data import tokenizer
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.data.instructions.templates import render
from trainables.data.prepare import fingerprint, prepare
from trainables.data.sources.read import read_source
from trainables.generation.context import GenerationContext
from trainables.generation.sample import sample

MARKS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool|>",
    "<|end|>",
    "<turn>",
    "</turn>",
    "<think>",
    "</think>",
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # as DeepSeek R1: the prompt opens a thought, and a reply is written without its own
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}</s>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
EMPTY_THOUGHT = (  # as Qwen 3
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n<think>\n{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TEMPLATES = {
    "phi": PHI,
    "gemma": GEMMA,
    "llama": LLAMA,
    "thinking": THINKING,
    "thought": EMPTY_THOUGHT,
    "endless": ENDLESS,
    "text": ENDLESS.replace("\n", "[END]"),
}
ENDS = {
    "phi": "<|end|>",
    "gemma": "</turn>",
    "llama": "</s>",
    "thinking": "</s>",
    "thought": "</turn>",
    "endless": "</s>",
    "text": "</s>",
}
TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.tool_calls %}CALL {{ m.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer(template: str, *, is_sentencepiece: bool = False) -> Any:
    """A token for each byte; or one that writes a space before each text, as Llama 2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*MARKS, "▁", *alphabet])}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>") if is_sentencepiece else BPE(vocabulary, []))
    if is_sentencepiece:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template
    return made


def chats(home: Path, rows: list[dict[str, Any]], tok: Any, **more: Any) -> InstructionFiles:
    home.mkdir(exist_ok=True)
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tok.save_pretrained(str(home / "tok"))
    value: dict[str, Any] = {"kind": "instruction_files", "template": "chat", "columns": {"messages": "messages"}}
    value |= {"tokenizer": {"kind": "pretrained", "name": str(home / "tok")}, "test": str(home / "rows.jsonl")}
    return InstructionFiles.model_validate({**value, "length": 2048, "prompt_length": 1024, **more})


def opened(home: Path, rows: list[dict[str, Any]], tok: Any, **more: Any) -> ExchangeSet:
    return prepare(chats(home, rows, tok, **more), str(home / "data"))


def turns(*texts: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def check(data: ExchangeSet, index: int, messages: list[dict[str, Any]], tok: Any, **more: Any) -> list[int]:
    """Asserts that an exchange is the beginning of what the template writes, up to the end of the reply; returns the rest."""
    whole = tok.apply_chat_template(messages, return_dict=False, **more)
    prompt, reply = data.test.prompt(index).tolist(), data.test.reply(index).tolist()
    written = [*prompt, *reply] if whole[: len(prompt) + len(reply)] == [*prompt, *reply] else [*prompt, *reply[:-1]]
    assert whole[: len(written)] == written
    asked = tok.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False, **more)
    assert asked[: len(prompt)] == prompt
    return list(whole[len(written) :])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("is_sentencepiece", [False, True])
def test_a_conversation_is_what_its_template_writes_up_to_the_end_of_the_reply(
    name: str, is_sentencepiece: bool, tmp_path: Path
) -> None:
    tok = chat_tokenizer(TEMPLATES[name], is_sentencepiece=is_sentencepiece)
    talks = [turns("Hi", "Well"), turns("Hi", "Well", "And", "a reply")]
    data = opened(tmp_path, [{"messages": talk} for talk in talks], tok)
    for i, talk in enumerate(talks):
        rest = check(data, i, talk, tok)
        assert data.test.reply(i)[-1] == tok.convert_tokens_to_ids(ENDS[name]) == data.end_id
        assert tok.decode(rest, skip_special_tokens=True).strip() == ""
        assert data.text(data.test.reply(i).tolist()) == talk[-1]["content"]


TEXTS = st.text(st.characters(), min_size=1, max_size=30).filter(lambda text: bool(text.strip()))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=8, max_size=8), name=st.sampled_from(sorted(TEMPLATES)))
def test_any_text_is_encoded_as_its_template_writes_it_or_refused_by_row(
    pairs: list[tuple[str, str]], name: str, tmp_path: Path
) -> None:
    tok = chat_tokenizer(TEMPLATES[name])
    rows = [{"messages": turns(*pair)} for pair in pairs]
    try:
        data = opened(tmp_path, rows, tok)
    except DataError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "row" in said and "\n" not in said
        return
    assert len(data.test) == len(pairs)
    for i, texts in enumerate(pairs):
        prompt, reply = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
        check(data, i, turns(prompt, reply.strip()), tok)


def test_a_text_that_merges_with_what_follows_is_still_the_whole(tmp_path: Path) -> None:
    """A byte pair of the prompt's end and the reply's beginning belongs to the reply."""
    tok = chat_tokenizer(
        "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    vocabulary = {**tok.get_vocab(), "ab": len(tok)}
    backend = Tokenizer(BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    merging.chat_template = tok.chat_template.replace(
        "{{ m.content }}|", "{{ 'a' if m.role == 'assistant' }}{{ m.content }}|"
    )
    data = opened(tmp_path, [{"messages": turns("x", "by")}], merging)
    assert merging.convert_ids_to_tokens(data.test.prompt(0)) == ["x", "|"]
    assert merging.convert_ids_to_tokens(data.test.reply(0)) == ["ab", "y", "|", "</s>"]


def test_calls_tools_and_thoughts_reach_the_template(tmp_path: Path) -> None:
    tok = chat_tokenizer(TOOLS)
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    schema = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    asks = [{"role": "user", "content": "Weather?"}]
    calls: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": call}
    answers = {"role": "tool", "content": "mild", "tool_call_id": "1", "name": "weather"}
    says = {"role": "assistant", "content": "Mild.", "reasoning_content": "It says mild."}
    rows = [
        {"messages": [*asks, calls], "tools": json.dumps(schema)},
        {"messages": [*asks, calls, answers, says], "tools": None},
    ]
    rows.append({"messages": [{**asks[0], "content": [{"type": "text", "text": "Weather?"}]}, says], "tools": schema})
    tok.chat_template = TOOLS.replace(
        "m.content or ''", "(m.content if m.content is string else m.content[0].text) or ''"
    )
    tok.chat_template = tok.chat_template.replace("{{ (m.content if", "{{ '' if not m.content else (m.content if")
    data = opened(tmp_path, rows, tok)
    for i, row in enumerate(rows):
        tools = schema if row["tools"] else None
        assert check(data, i, row["messages"], tok, tools=tools) == []
    assert "weather" in data.test.references(0)[0] and "CALL" in tok.decode(data.test.reply(0))
    assert "CALL" in tok.decode(data.test.prompt(1)) and "It says mild." in tok.decode(data.test.reply(1))
    assert "parameters" in tok.decode(data.test.prompt(0)) and "parameters" not in tok.decode(data.test.prompt(1))


def test_a_conversation_of_sharegpt_with_calls_is_rendered_as_one_of_transformers(tmp_path: Path) -> None:
    tok = chat_tokenizer(TOOLS)
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    said = [("human", "Weather?"), ("function_call", json.dumps(call)), ("observation", "mild"), ("gpt", "Mild.")]
    row = {"messages": [{"from": who, "value": text} for who, text in said], "tools": json.dumps([call])}
    data = opened(tmp_path, [row], tok)
    calls = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
    talk = [turns("Weather?")[0], calls, {"role": "tool", "content": "mild"}, {"role": "assistant", "content": "Mild."}]
    assert check(data, 0, talk, tok, tools=[call]) == []


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ({"messages": [*turns("a"), {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]}]}, PHI,
         r"row 1: message 2: .* has no place for 'tool_calls'"),
        ({"messages": [*turns("a"), {"role": "assistant", "content": "b", "thinking": "c"}]}, PHI, "row 1: message 2: .*'thinking'"),
        ({"messages": [{**turns("a")[0], "images": ["x"]}, turns("a", "b")[1]]}, PHI, "row 1: message 1: .*'images'"),
        ({"messages": turns("a", "b"), "tools": [{"name": "f"}]}, PHI, "row 1: .* has no place for 'tools'"),
        ({"messages": turns("a", "b"), "tools": "a tool"}, TOOLS, "row 1: 'tools' is str 'a tool'; expected a list of objects"),
        ({"messages": turns([{"type": "text", "text": "a"}], "b")}, ENDLESS, "row 1: .*takes no content in parts"),
        ({"messages": turns([{"type": "image", "url": "x"}], "b")}, PHI, "row 1: 'messages': message 1 has a part str 'image'"),
        ({"messages": [{"from": "human", "value": "a"}, {"from": "alien", "value": "b"}]}, PHI, r"row 1: .*message 2: 'from' is str 'alien'"),
        ({"messages": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, LLAMA,
         "row 1: message 1: .* leaves out a message of 'system'; expected"),
        ({"messages": [{"role": "tool", "content": "s"}, *turns("a", "b")]}, LLAMA, "row 1: message 1: .* leaves out a message of 'tool'"),
        ({"messages": turns("a", "b")}, "{{ 1 // 0 }}", "row 1: template: .*refuses a conversation of user, assistant: integer"),
        ({"messages": turns("a", "b")}, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "row 1: template: .*recursion"),
        ({"messages": turns("a", "b")}, "{{ messages[7].content.x.y }}", "row 1: template: .*refuses a conversation"),
        ({"messages": turns("a", "b")}, "{{ nothing() }}", "row 1: template: .*refuses a conversation"),
    ],
)  # fmt: skip
def test_what_a_template_would_drop_or_cannot_take_is_refused_by_row_and_key(
    row: dict[str, Any], template: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        opened(tmp_path, [row], chat_tokenizer(template))
    assert "rows.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_few_bad_conversations_are_left_out_and_named_and_many_are_not(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": turns(f"question {i}", "a reply")} for i in range(200)]
    template = PHI.replace("{{ m.content }}", "{{ m.content }}{{ raise_exception('no cats') if 'cat' in m.content }}")
    rows[3], rows[7] = {"messages": turns("a")}, {"messages": turns("cat", "b")}
    data = opened(tmp_path, rows, chat_tokenizer(template))
    said = data.summary()
    assert len(data.test) == 198 and "row 4" in said and "row 8" in said and "no cats" in said
    rows[11:14] = [{"messages": turns("a")}] * 3
    with pytest.raises(DataError, match=r"row 4: 'messages' has 1 of the 2 .* \(and 3 more of 200 rows\)"):
        opened(tmp_path, rows, chat_tokenizer(template))


def test_rows_are_grouped_by_all_that_the_model_reads(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": turns(f"question {i}", f"reply {i}", "Go on.", "More.")} for i in range(60)
    ]
    columns = {"messages": "messages"}
    data = opened(tmp_path, rows, chat_tokenizer(PHI), train=str(tmp_path / "rows.jsonl"), test=None, columns=columns)
    assert (len(data.train), len(data.dev), len(data.test)) == (52, 4, 4)


def test_one_question_about_many_texts_is_split_by_the_texts(tmp_path: Path) -> None:
    rows = [{"question": "What is this about?", "text": f"text {i}", "answer": f"reply {i}"} for i in range(60)]
    columns = {"prompt": "question", "context": "text", "response": "answer"}
    more = {"train": str(tmp_path / "rows.jsonl"), "test": None, "columns": columns, "template": "alpaca"}
    data = opened(tmp_path, rows, chat_tokenizer(PHI), **more)
    assert (len(data.train), len(data.dev), len(data.test)) == (52, 4, 4)


def test_a_template_prints_the_same_date_every_day(tmp_path: Path) -> None:
    tok = chat_tokenizer("{{ strftime_now('%d %b %Y, %A') }}" + PHI)
    row = (read_source(chats(tmp_path, [{"messages": turns("a", "b")}], tok)).test or ())[0]
    assert render(row, "chat", tok).whole.startswith("26 Jul 2024, Friday<|user|>\na<|end|>")


def test_all_tokens_that_end_a_reply_stop_generation_and_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    tok = chat_tokenizer(PHI)
    end, other, eos = tok.convert_tokens_to_ids(["<|end|>", "</turn>", "</s>"])
    spec = chats(tmp_path, [{"messages": turns("a", "b")}], tok)
    before = fingerprint(spec)
    GenerationConfig(eos_token_id=[other]).save_pretrained(str(tmp_path / "tok"))
    assert fingerprint(spec) != before
    data = prepare(spec, str(tmp_path / "data"))
    assert data.end_ids == (end, eos, other) and data.end_id == end
    context = GenerationContext(data.end_ids, data.end_id, data.vocab_size, "cpu")
    assert [context.has_ended(np.array([9, last])) for last in (end, eos, other, 20)] == [True, True, True, False]
    assert data.text([*tok("an answer")["input_ids"], end]) == "an answer"


@pytest.mark.parametrize("end", [3, 5])
def test_generation_stops_at_any_of_several_ends(end: int) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=32, n_embd=8, n_layer=1, n_head=1)).eval()
    with torch.no_grad():
        net.lm_head.weight[:] = 0.0
        net.lm_head.weight[end] = 1.0
        net.transformer.ln_f.weight[:] = 0.0
        net.transformer.ln_f.bias[:] = 1.0  # the end is the likeliest token everywhere
    context = GenerationContext((3, 5), 0, 8, "cpu")
    drawn = sample(net, [np.array([1, 2], np.int32)], Sampling(max_tokens=9), context, seed=0, greedy=True)
    assert drawn.replies[0].tolist() == [end]


def test_a_tokenizer_without_a_generation_config_stops_at_its_own_end(tmp_path: Path) -> None:
    assert tokenizer.generation_config(str(tmp_path), None) is None
    assert tokenizer.listed(None) == [] and tokenizer.listed(3) == [3] and tokenizer.listed([3, 4]) == [3, 4]
