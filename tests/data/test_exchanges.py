"""Exchanges: what is encoded and cut, what is packed where, and that models read a packed one as they read it alone."""

from __future__ import annotations

import itertools
import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrator.planning import preview
from trainables.config.data import Data, InstructionFiles
from trainables.config.errors import DataError
from trainables.config.models import Model
from trainables.config.trial import TrialSpec
from trainables.data import tokenizer
from trainables.data.arrow import write_table
from trainables.data.encode.instructions import SCHEMA
from trainables.data.instructions.exchanges import Exchanges, ExchangeSet
from trainables.data.instructions.packing import ExchangeBatch, first_fit
from trainables.data.instructions.rows import Row, Turn
from trainables.data.instructions.templates import alpaca
from trainables.data.order import bucketed_indices
from trainables.data.prepare import fingerprint, prepare
from trainables.data.prepared import open_data
from trainables.evaluation.generation import evaluate_exchanges
from trainables.evaluation.per_example import Placement
from trainables.generation.context import GenerationContext
from trainables.generation.sample import sample
from trainables.models import build, output_head
from trainables.training.setup import supports_packing

REAL = Path(os.environ.get("CODISTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not (REAL / "instructions").is_dir(), reason=f"no instructions in {REAL}: set CODISTILL_DATA"
)
WORDS = ["[UNK]", "<s>", "</s>", "<|user|>", "<|end|>", *(f"w{i}" for i in range(40))]


def tok(*, start: bool = True, end: bool = True, template: str | None = None) -> Any:
    """Words and punctuation apart: its ids can be told by eye, and `<s>` in a text is no start."""
    backend = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]"} | ({"bos_token": "<s>"} if start else {}) | ({"eos_token": "</s>"} if end else {})
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, **special, additional_special_tokens=["<|user|>", "<|end|>"]
    )
    found.chat_template = template
    return found


def instructed(home: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **more: Any) -> InstructionFiles:
    """A data set of these rows that is only scored, unless `train` is asked for."""
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tokenizer or tok()).save_pretrained(str(home / "tok"))
    value = {"kind": "instruction_files", "tokenizer": {"kind": "pretrained", "name": str(home / "tok")}}
    split = "train" if more.pop("train", False) else "test"
    return InstructionFiles.model_validate({**value, split: str(home / "rows.jsonl"), **more})


def opened(home: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **more: Any) -> ExchangeSet:
    return prepare(instructed(home, rows, tokenizer, **more), str(home / "data"))


def rows_of(num: int) -> list[dict[str, Any]]:
    return [{"instruction": f"w{i % 40} " * (i % 5 + 1), "response": "w1 " * (i % 7 + 1)} for i in range(num)]


# -------------------------------------------------------------------------------------------------------------- encoded


def test_prompt_and_reply_are_encoded_apart_and_joined(tmp_path: Path) -> None:
    rows = [{"instruction": "w3 </s>", "response": ["w5 w6"]}, {"instruction": "w4", "response": ["w7", "w8"]}]
    data = opened(tmp_path, rows)
    prompt = data.test.prompt(0).tolist()
    assert prompt == [1, *tokenizer.encode(data.tokenizer, [alpaca("w3 </s>")])[0]]
    assert prompt.count(2) == 0  # an end that is written in a text is text
    assert data.test.reply(0).tolist() == [WORDS.index("w5"), WORDS.index("w6"), data.end_id] and data.end_id == 2
    assert data.test.references(0) == ("w5 w6",) and data.test.references(1) == ("w7", "w8")
    assert data.test.lengths.tolist() == [len(prompt) + 3, len(data.test.prompt(1)) + 2]
    assert (len(data.train), len(data.dev), len(data.test)) == (0, 0, 2) and data.train.lengths.shape == (0,)
    assert data.scoring.seeds == (10, 20, 30, 40, 50) and data.length == 512
    with pytest.raises(IndexError):
        data.test.prompt(2)


def test_each_exchange_names_the_text_or_group_that_it_shares(tmp_path: Path) -> None:
    """Prompts on one context, of one group, or from one conversation are no independent examples."""
    rows = [{"instruction": f"w{i}", "response": "w1", "context": f"W3  w{i % 2}"} for i in range(6)]
    rows += [{"instruction": f"w{i % 2}", "response": f"w{i}", "context": ""} for i in range(4)]
    how = {"columns": {"context": "context"}}
    found = opened(tmp_path, rows, **how).test.clusters()
    assert found is not None and found.dtype == np.int64 and max(found) < 2**53
    numbers = np.unique(found, return_inverse=True)[1].tolist()
    assert [numbers.index(n) for n in numbers] == [0, 1, 0, 1, 0, 1, 6, 7, 6, 7]
    grouped = opened(
        tmp_path, [{**row, "book": i // 5} for i, row in enumerate(rows)], split_by="book", **how
    ).test.clusters()
    assert grouped is not None and [len(set(grouped[:5])), len(set(grouped[5:])), len(set(grouped))] == [1, 1, 2]
    user, other = ({"role": "user", "content": text} for text in ("w1", "w2"))
    reply = {"role": "assistant", "content": "w3"}
    one, first, begins_alike, alone = (
        Row(tuple(Turn(**turn) for turn in turns), "", ("w4",)).cluster
        for turns in ([user], [{"role": "system", "content": "w9"}, user, reply, other], [user, reply, user], [other])
    )
    assert one == first == begins_alike != alone
    older = tmp_path / "older.arrow"
    write_table(older, pa.schema(list(SCHEMA)[:3]), [([[1]], [[2]], [["w1"]])])
    assert Exchanges(older, length=8, pad_id=0).clusters() is None


def test_the_boundary_is_that_of_generation(tmp_path: Path) -> None:
    """What follows the prompt's tokens is the reply by itself, also where together they would merge."""
    data = opened(tmp_path, [{"instruction": "w1", "response": "w2"}], tok(start=False))
    assert data.test.prompt(0).tolist() == tokenizer.encode(data.tokenizer, [alpaca("w1")])[0]


def test_long_prompts_are_left_out_and_long_replies_cut(tmp_path: Path) -> None:
    rows = [{"instruction": "w1 " * num, "response": "w2 " * 10} for num in (1, 4, 5, 20)]
    size = len(tok()(alpaca("w1"))["input_ids"]) + 1
    data = opened(tmp_path, rows, prompt_length=size + 3, length=size + 3 + 9)
    assert [len(data.test.prompt(i)) for i in range(len(data.test))] == [size, size + 3]
    assert data.test.reply(0).tolist() == [WORDS.index("w2")] * 10 + [2]  # as long as may be
    assert data.test.reply(1).tolist() == [WORDS.index("w2")] * 9  # without an end
    assert data.test.lengths.tolist() == [size + 11, size + 12]
    about = data.about["splits"]["test"]
    assert about["truncated"] == 0.5 and about["dropped"] == {f"a prompt over {size + 3} tokens": 2}
    assert about["tokens"] == 2 * size + 3 + 20 and about["reply_tokens"] == 20
    with pytest.raises(
        DataError, match=r"test: no row is left \(4 with a prompt over 8 tokens\); raise prompt_length 8"
    ):
        opened(tmp_path, rows, prompt_length=8)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer: it has no token that ends a text"):
        opened(tmp_path, rows_of(3), tok(end=False))


def test_special_tokens_count_where_a_chat_template_puts_them(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} <|user|> {{ m['content'] }} <|end|> "
        "{% else %} {{ m['content'] }} <|end|> {% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 <|user|> w3"}]
    data = opened(
        tmp_path, [{"messages": messages}], tok(template=template), template="chat", columns={"messages": "messages"}
    )
    assert data.test.prompt(0).tolist() == [
        1,
        3,
        WORDS.index("w1"),
        4,
    ]  # the start that the template writes, and no other
    written = data.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert data.test.reply(0).tolist() == written[4:] == [WORDS.index("w2"), 3, WORDS.index("w3"), 4]
    assert data.about["exchanges"]["template"] == "chat"


def test_what_a_template_writes_before_a_reply_is_learnt_and_not_scored(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %} <|user|> {{ m['content'] }} <|end|> "
        "{% else %}{% if messages[0]['content'] == 'w1' %}w8 <|end|> {% endif %}w9 {{ m['content'] }}{% endif %}{% endfor %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "w2 w3"}]}
        for prompt in ("w1", "w4")
    ]
    data = opened(tmp_path, rows, tok(template=template), template="chat", columns={"messages": "messages"})
    for i, lead in enumerate(("w8 <|end|> w9", "w9")):
        ids = data.test.reply(i).tolist()
        assert ids == [*(WORDS.index(word) for word in f"{lead} w2 w3".split()), 2]
        assert data.text(ids) == "w2 w3" == data.test.references(i)[0]
    assert data.leads == ("w8 w9", "w9")  # special tokens are no text
    assert data.text([WORDS.index("w2"), WORDS.index("w9"), 2]) == "w2 w9" and data.text([2]) == ""
    assert opened(tmp_path, rows_of(3)).leads == ()


def test_a_vocabulary_with_a_gap_has_a_row_for_its_last_token(tmp_path: Path) -> None:
    words = {word: i + 3 * (i > 10) for i, word in enumerate(WORDS)}
    backend = Tokenizer(tokenizer_models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    gappy = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    data = opened(tmp_path, [{"instruction": "w1", "response": WORDS[-1]}], gappy)
    assert data.test.reply(0)[0] == data.vocab_size - 1 == len(WORDS) + 2 > len(gappy)


def test_at_most_so_many_are_kept_and_always_the_same(tmp_path: Path) -> None:
    rows = [{"instruction": f"w{i % 40} w{i // 40}", "response": "w1"} for i in range(300)]
    data = opened(tmp_path, rows, train=True, examples=50, evaluate=10)
    assert (len(data.train), len(data.dev), len(data.test)) == (50, 10, 10)
    more = opened(tmp_path, rows, train=True, examples=60, evaluate=10)
    kept = {tuple(more.train.prompt(i).tolist()) for i in range(60)}
    assert {tuple(data.train.prompt(i).tolist()) for i in range(50)} <= kept


def test_it_is_opened_by_its_fingerprint_whatever_it_is(tmp_path: Path) -> None:
    spec = instructed(tmp_path, rows_of(20))
    made = prepare(spec, str(tmp_path / "data"))
    again = open_data(str(tmp_path / "data"), fingerprint(spec))
    assert isinstance(again, ExchangeSet) and again.fingerprint == made.fingerprint == fingerprint(spec)
    assert again.tokenizer_identity == tokenizer.identity(tok()) and again.special_ids == (0, 1, 2, 3, 4)
    assert all((again.test.reply(i) == made.test.reply(i)).all() for i in range(20))


def test_a_trained_tokenizer_is_lent(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(60)))
    value = {"kind": "instruction_files", "train": str(tmp_path / "a.jsonl")}
    lender = InstructionFiles.model_validate({**value, "tokenizer": {"kind": "wordpiece", "size": 200}})
    scored = InstructionFiles.model_validate(
        {"kind": "instruction_files", "test": str(tmp_path / "a.jsonl"), "tokenizer": {"kind": "same", "as": "mine"}}
    )
    others: dict[str, Data] = {"mine": lender, "scored": scored}
    made, other = (prepare(one, str(tmp_path / "data"), others) for one in (lender, scored))
    assert made.tokenizer_identity == other.tokenizer_identity and made.tokenizer.unk_token_id not in made.train.prompt(
        0
    )
    assert made.train.prompt(0)[0] == made.tokenizer.cls_token_id and made.end_id == made.tokenizer.sep_token_id


# --------------------------------------------------------------------------------------------------------------- packed


def batch_of(sizes: list[tuple[int, int]], *, length: int = 16, seed: int = 0) -> ExchangeBatch:
    """Random tokens; (prompt, reply) lengths."""
    draw = np.random.default_rng(seed)
    prompts, replies = (tuple(draw.integers(1, 60, size[k]).astype(np.int32) for size in sizes) for k in (0, 1))
    return ExchangeBatch(prompts, replies, length, 0)


def test_each_row_is_filled_with_the_longest_that_fits() -> None:
    assert first_fit([3, 9, 5, 7, 1], 10) == [[1, 4], [3, 0], [2]]
    assert (
        first_fit([12, 3], 10) == [[0], [1]] and first_fit([12, 3, 9], 10) == [[0], [2, 1]] and first_fit([], 10) == []
    )
    draw = np.random.default_rng(0)
    for _ in range(20):
        sizes = draw.integers(1, 60, 40).tolist()
        rows = first_fit(sizes, 60)
        assert (
            sorted(itertools.chain(*rows)) == list(range(40)) and max(sum(sizes[i] for i in row) for row in rows) <= 60
        )
        assert len(rows) <= 11 / 9 * sum(sizes) / 60 + 2  # of the best there can be (Johnson 1973)


def test_a_packed_batch_says_where_everything_is() -> None:
    batch = batch_of([(3, 2), (4, 6), (2, 1), (5, 3)])
    packed = batch.to("cpu")
    assert packed.ids_BT.shape == (2, 15) and packed.num_tokens == batch.num_tokens == 26
    assert packed.labels_N.tolist() == batch.labels_N.tolist() == np.concatenate(batch.replies).tolist()
    flat = packed.ids_BT.flatten()
    assert flat[packed.positions_N + 1].tolist() == packed.labels_N.tolist()
    assert packed.example_ids_N.tolist() == [0] * 2 + [1] * 6 + [2] + [3] * 3
    for i, (prompt, reply) in enumerate(zip(batch.prompts, batch.replies, strict=True)):
        first = int(packed.positions_N[packed.example_ids_N == i][0]) - len(prompt) + 1
        found = slice(first, first + len(prompt) + len(reply))
        assert flat[found].tolist() == [*prompt.tolist(), *reply.tolist()]
        assert packed.position_ids_BT.flatten()[found].tolist() == list(range(len(prompt) + len(reply)))
    begins_B = (packed.position_ids_BT == 0).sum(1)
    assert begins_B.sum() == len(batch) + 2 - 1  # and the padding of the one row that has some


def test_parts_of_a_batch_hold_what_the_batch_holds() -> None:
    batch = batch_of([(3, 2), (4, 6), (2, 1), (5, 3)])
    parts = [batch.rows(0, 1), batch.rows(1, 4)]
    assert [len(part) for part in parts] == [1, 3] and sum(part.num_tokens for part in parts) == batch.num_tokens
    assert torch.cat([part.labels_N for part in parts]).tolist() == batch.labels_N.tolist()
    none = batch.rows(2, 2)
    assert len(none) == 0 and len(none.labels_N) == 0 and none.to("cpu").ids_BT.numel() == 0
    again = batch.with_replies([np.array([i, 2], np.int32) for i in range(4)])
    assert again.labels_N.tolist() == [0, 2, 1, 2, 2, 2, 3, 2] and again.prompts == batch.prompts
    with pytest.raises(ValueError, match="1 replies to 4 prompts"):
        batch.with_replies([batch.replies[0]])


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    data = opened(tmp_path, rows_of(30))
    batch = data.test.rows(torch.tensor([7, 0, 29]))
    assert [reply.tolist() for reply in batch.replies] == [data.test.reply(i).tolist() for i in (7, 0, 29)]
    assert batch.length == 512 and batch.pad_id == data.end_id
    order = torch.cat([bucketed_indices(data.test.lengths, 5, step, seed=0, stream="s") for step in range(6)])
    assert sorted(order.tolist()) == list(range(30))


def model(family: str, **more: Any) -> Any:
    lacks = {"bloom": ("intermediate_size",), "mamba": ("heads", "dropout")}.get(family, ())
    shape = {"family": family, "layers": 2, "width": 16, "heads": 2, "intermediate_size": 32, "dropout": 0, **more}
    spec = Model.model_validate({key: value for key, value in shape.items() if key not in lacks})
    net = build.build(spec, name="m", seed=0, vocab_size=64, special_ids={"eos_token_id": 2}, length=32)
    for parameter in net.parameters():  # far from uniform, so that a wrong mask shows
        parameter.data.mul_(3)
    return net.double().eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_a_packed_exchange_is_read_as_if_alone(family: str, attention: str) -> None:
    """Logits and gradients of the packed batch are those of its exchanges one by one."""
    net = model(family)
    net.set_attn_implementation(attention)
    batch = batch_of([(3, 2), (4, 6), (2, 1), (5, 3), (1, 1)], length=12)
    packed = batch.to("cpu")
    assert len(packed.ids_BT) < len(batch)
    logits_NV = net(input_ids=packed.ids_BT, position_ids=packed.position_ids_BT, use_cache=False).logits.flatten(0, 1)[
        packed.positions_N
    ]
    alone = []
    for prompt, reply in zip(batch.prompts, batch.replies, strict=True):
        ids_1T = torch.from_numpy(np.concatenate([prompt, reply]).astype(np.int64))[None]
        alone.append(net(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1])
    expected_NV = torch.cat(alone)
    assert expected_NV.std() > 0.01
    torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-10, atol=1e-11)
    grads = [
        torch.autograd.grad(
            F.cross_entropy(found, batch.labels_N, reduction="sum"), list(net.parameters()), allow_unused=True
        )
        for found in (logits_NV, expected_NV)
    ]
    for here, there in zip(*grads, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-10)


def test_no_exchange_reads_another(tmp_path: Path) -> None:
    net, batch = model("llama"), batch_of([(3, 2), (4, 6), (2, 3)], length=32)
    other = batch.with_replies([batch.replies[0], batch.replies[1], batch.replies[2] + 1])
    one, two = (
        net(input_ids=b.ids_BT, position_ids=b.position_ids_BT, use_cache=False).logits.flatten(0, 1)[b.positions_N]
        for b in (batch.to("cpu"), other.to("cpu"))
    )
    assert len(batch.to("cpu").ids_BT) == 1
    same = batch.to("cpu").example_ids_N < 2
    assert torch.equal(one[same], two[same]) and not torch.allclose(one[~same], two[~same])


@pytest.mark.parametrize(("family", "keeps"), [("gpt2", True), ("llama", True), ("qwen3", True), ("bloom", False), ("opt", False), ("mamba", False)])  # fmt: skip
def test_where_a_model_would_read_on_over_a_border_each_exchange_has_its_own_row(family: str, keeps: bool) -> None:
    """Then, too, its logits are those of the exchanges one by one."""
    net = model(family)
    assert supports_packing(net, nullcontext) is keeps and not net.training
    batch = batch_of([(3, 2), (4, 6), (2, 1)], length=32)
    seen = {}
    for is_packed in (True, False):
        packed = replace(batch, is_packed=is_packed).to("cpu")
        assert packed.ids_BT.shape == ((1, 18) if is_packed else (3, 10))
        assert packed.example_ids_N.tolist() == [0] * 2 + [1] * 6 + [2] and packed.num_tokens == 18
        with torch.no_grad():
            seen[is_packed] = output_head.logits_at(
                net, packed.ids_BT, packed.positions_N, position_ids_BT=packed.position_ids_BT
            )
    alone = []
    for prompt, reply in zip(batch.prompts, batch.replies, strict=True):
        ids_1T = torch.from_numpy(np.concatenate([prompt, reply]).astype(np.int64))[None]
        with torch.no_grad():
            alone.append(net(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1])
    torch.testing.assert_close(seen[False], torch.cat(alone), rtol=1e-8, atol=1e-9)
    assert torch.allclose(seen[True], torch.cat(alone), rtol=1e-6) is keeps


def test_exchanges_apart_are_the_same_exchanges(tmp_path: Path) -> None:
    data = opened(tmp_path, rows_of(6))
    batch, other = (one.test.rows([4, 1, 2]) for one in (data, data.unpacked()))
    assert batch.is_packed and not other.is_packed and not other.rows(1, 2).is_packed
    assert [p.tolist() for p in other.prompts] == [p.tolist() for p in batch.prompts]
    assert len(other.to("cpu").ids_BT) == 3 and len(data.unpacked().test) == 6 and data.test.is_packed


# ------------------------------------------------------------------------------------------------- several references


def test_a_reply_is_scored_against_the_best_of_its_references(tmp_path: Path) -> None:
    """A file as of Super-NaturalInstructions: a definition, an input, and outputs of which any will do."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    spec = Model.model_validate({"family": "llama", "layers": 2, "width": 16, "heads": 2, "intermediate_size": 32})
    net = build.build(spec, name="m", seed=0, vocab_size=45, special_ids={"eos_token_id": 2}, length=512).eval()
    for parameter in net.parameters():
        parameter.data.mul_(3)
    asked = [{"definition": f"Say w{i} and w{i + 9}.", "inputs": f"w{2 * i} w{i}"} for i in range(6)]
    how: dict[str, Any] = {
        "columns": {"prompt": "definition", "context": "inputs", "response": "output"},
        "scoring": {"max_tokens": 9, "seeds": []},
    }
    data = opened(tmp_path, [{**row, "output": ["nothing of it"]} for row in asked], **how)
    drawn = [
        sample(net, [data.test.prompt(i)], data.scoring, GenerationContext((2,), 2, 45, "cpu"), seed=0, greedy=True)
        for i in range(6)
    ]  # fmt: skip
    said = [data.tokenizer.decode(one.replies[0].tolist(), skip_special_tokens=True) for one in drawn]
    assert all(len(text.split()) > 2 for text in said)
    outputs = [["nothing of it", *[" ".join(text.split()[:num]) for num in range(1, 1 + i % 4)]] for i, text in enumerate(said)]  # fmt: skip
    rows = [{**row, "output": output} for row, output in zip(asked, outputs, strict=True)]
    data = opened(tmp_path, rows, **how)
    expected = [
        100 * max(scorer.score(reference, text)["rougeL"].fmeasure for reference in output)
        for text, output in zip(said, outputs, strict=True)
    ]
    scored = evaluate_exchanges(net, data, "test", on=Placement("cpu"))
    assert scored.predictions_E is not None and scored.predictions_E.tolist() == pytest.approx(expected)
    assert scored.clusters_E is not None and scored.clusters_E.tolist() == data.test.clusters().tolist()  # type: ignore[union-attr]
    assert scored.metrics["rougeL"] == pytest.approx(np.mean(expected)) == scored.metrics["greedy_rougeL"]
    assert [expected[i] > 0 for i in range(6)] == [i % 4 > 0 for i in range(6)]  # the first one says nothing
    assert "scored against the best of up to 4 references" in data.summary()
    assert "references" not in opened(tmp_path, rows_of(4)).summary()


# ----------------------------------------------------------------------------------------------------------- the plan


def test_the_plan_says_what_is_left_out_and_cut_and_marks_what_is_learnt(tmp_path: Path) -> None:
    size = len(tok()(alpaca("w1 w1"))["input_ids"]) + 1
    rows = [{"instruction": f"w{i % 40} w{i // 40}", "response": "w1 " * (i % 3)} for i in range(200)]
    rows += [{"instruction": f"w{i} " * 9, "response": "w1"} for i in range(5)]
    spec = instructed(tmp_path, rows, train=True, prompt_length=size, length=size + 2)
    trial = TrialSpec.model_validate({
        "data": {"mine": spec.model_dump(by_alias=True)},
        "models": {"m": {"family": "gpt2", "layers": 1, "width": 16, "heads": 2}},
        "phases": {"p": {
            "train": {"m": "full"}, "terms": {"hard": {"kind": "cross_entropy", "of": "m"}},
            "streams": {"main": {"data": "mine"}}, "budget": {"steps": 1}, "batch": 1, "optimizer": {"lr": 1},
        }},
    })  # fmt: skip
    data = prepare(spec, str(tmp_path / "data"))
    lines = preview._data(trial, {"mine": data})
    share = 100 * sum(i % 3 == 2 for i in range(200) if i % 3) / 133
    found = re.fullmatch(
        rf"mine: train (\d+) exchanges, dev (\d+) exchanges, test (\d+) exchanges; alpaca template; {share:.1f}% of the "
        rf"replies cut at {size + 2} tokens of prompt and reply; rows left out: 5 with a prompt over {size} tokens, 67 with "
        r"an empty reply; 0 duplicates across splits removed",
        lines[0],
    )
    assert found, lines[0]
    assert sum(map(int, found.groups())) == 133
    assert re.fullmatch(r"mine, an example: <s> .*\[UNK\] «w1 (w1|</s>)»", lines[2]), lines[2]


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exchanges")


@needs_real_data
@pytest.mark.parametrize("where", ["tokenizers/gpt2", "models/stories260K"])
def test_real_instructions_are_whole_under_real_tokenizers(home: Path, where: str) -> None:
    data = InstructionFiles.model_validate({
        "kind": "instruction_files",
        "test": str(REAL / "instructions" / "self_instruct_user_oriented" / "test.parquet"),
        "columns": {"context": "input", "response": "output"},
        "tokenizer": {"kind": "pretrained", "name": str(REAL / where)},
    })  # fmt: skip
    made = prepare(data, str(home))
    counts = made.about["splits"]["test"]
    assert len(made.test) + sum(counts["dropped"].values()) == 252 and len(made.test) > 150
    start, end = tokenizer.ends(AutoTokenizer.from_pretrained(str(REAL / where)))
    assert made.end_id == end
    num_cut = 0
    for i in range(len(made.test)):
        prompt, reply = made.test.prompt(i), made.test.reply(i)
        assert prompt[0] == start and len(prompt) <= 256 and made.test.lengths[i] <= 512
        text = made.tokenizer.decode(prompt[1:].tolist())
        assert text.strip().startswith("Below is an instruction") and text.endswith("### Response:\n")
        if reply[-1] == end:
            assert made.tokenizer.decode(reply[:-1].tolist()).strip() == made.test.references(i)[0]
        else:
            num_cut += 1
            assert made.test.lengths[i] == 512
    assert num_cut == round(counts["truncated"] * len(made.test))


@needs_real_data
def test_the_plans_examples_mark_what_is_learnt(home: Path) -> None:
    data = InstructionFiles.model_validate({
        "kind": "instruction_files",
        "test": str(REAL / "instructions" / "self_instruct_user_oriented" / "test.parquet"),
        "columns": {"context": "input", "response": "output"},
        "tokenizer": {"kind": "pretrained", "name": str(REAL / "tokenizers" / "gpt2")},
    })  # fmt: skip
    first, second = prepare(data, str(home)).examples(None)
    assert first.startswith("<|endoftext|>Below is an instruction") and " … " in first
    assert second.endswith("### Response: «Confident<|endoftext|>»")
