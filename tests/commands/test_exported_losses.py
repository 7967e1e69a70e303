"""An exported folder, loaded by transformers alone, reads texts as training did: its losses are those of the trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from orchestrator import export
from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import Fingerprints
from orchestrator.study.load import load_study
from tests.support.trials import Listener, wordy_documents
from trainables.config.models import Model
from trainables.data.instructions.templates import alpaca
from trainables.models import build
from trainables.runtime.trial_attempt import Job, run
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore

pytestmark = pytest.mark.slow
TINY = {"layers": 1, "width": 16, "heads": 2, "intermediate_size": 32, "dropout": 0}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>")


def some_tokenizer(home: Path) -> str:
    """As RoBERTa's: `<s>` before, `</s>` after, `</s></s>` between two texts; and with a chat template that ends otherwise."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    backend.train_from_iterator(wordy_documents(20), trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tok.chat_template = TEMPLATE
    tok.save_pretrained(str(home))
    return str(home)


def exported(home: Path, data: dict[str, Any], student: dict[str, Any]) -> tuple[Path, pd.DataFrame]:
    """Runs a trial of two steps and exports its student; returns the folder and the losses of the examples of test."""
    data |= {"tokenizer": {"kind": "pretrained", "name": some_tokenizer(home / "tok")}, "evaluate": 12}
    phase = {"train": {"student": "full"}, "streams": {"main": {"data": "mine"}}, "budget": {"steps": 2}, "batch": 4}
    phase |= {"optimizer": {"lr": 0.01}, "evaluate": [1], "terms": {"hard": {"kind": "cross_entropy", "of": "student"}}}
    metric = "score" if data["kind"] == "labelled_files" else "rougeL"
    study = {
        "question": "?",
        "trial": {"data": {"mine": data}, "models": {"student": student}, "phases": {"tune": phase}},
    }
    study |= {"objective": {"phase": "tune", "model": "student", "metric": metric, "mode": "max"}, "arms": {"only": {}}}
    file, storage = home / "mine.yaml", Storage(str(home / "runs"))
    file.write_text(json.dumps({**study, "seeds": 1}))
    scheduler = Scheduler(load_study(file), Fingerprints(str(home / "runs" / "data")), storage)
    while (planned := scheduler.next()) is not None:
        scheduler.start(planned, 1)
        spec = planned.spec.model_dump_json()
        job = Job(planned.id, spec, planned.fingerprints, storage.uri, "mine", 1, "cpu", False, {})
        scheduler.end(planned.id, run(job, Listener()), 2)
    assert export.main([str(file), "--storage", storage.uri, "--to", str(home / "out"), "--arm", "only"]) == 0
    (row,) = Ledger(load_study(file), storage).rows.values()
    examples = PhaseStore(storage).examples(row["phases"]["tune"]["key"])
    assert examples is not None
    return home / "out", examples[examples["split"] == "test"].sort_values("example")


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def summed(net: Any, ids: list[int], num_prompt: int) -> float:
    """The loss of the tokens after the prompt."""
    with torch.no_grad():
        logits = net(torch.tensor([ids])).logits[0]
    return float(cross_entropy(logits[num_prompt - 1 : -1], torch.tensor(ids[num_prompt:]), reduction="sum"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_replies_have_the_losses_of_the_trial(family: str, template: str, tmp_path: Path) -> None:
    words = wordy_documents(30, words=6, seed=3)
    rows = [{"instruction": f"{text} {i}", "response": text[::-1]} for i, text in enumerate(words)]
    data: dict[str, Any] = {"kind": "instruction_files", "template": template, "length": 256, "prompt_length": 200}
    data |= {"train": written(tmp_path / "a.jsonl", rows), "test": written(tmp_path / "b.jsonl", rows[18:])}
    data |= {"scoring": {"max_tokens": 2, "seeds": []}}
    out, examples = exported(tmp_path, data, {"family": family, **TINY})
    net, tok = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    for row, loss in zip(rows[18:], examples["loss"], strict=True):
        if template == "chat":
            talk = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["response"]}]
            prompt = tok.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
            ids = tok.apply_chat_template(talk, return_dict=False)[:-1]  # without the template's line end
        else:
            prompt = tok(alpaca(row["instruction"]))["input_ids"]
            ids = [*tok(alpaca(row["instruction"]) + row["response"])["input_ids"], tok.eos_token_id]
        assert summed(net, ids, len(prompt)) == pytest.approx(loss, abs=1e-4, rel=1e-4)
        assert ids[-1] in (
            [net.generation_config.eos_token_id] if template == "alpaca" else net.generation_config.eos_token_id
        )
    about = json.loads((out / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast" and "token_type_ids" not in about["model_input_names"]
    assert not {"is_local", "local_files_only", "backend"} & set(about)


@pytest.mark.parametrize("is_pair", [False, True])
@pytest.mark.parametrize("family", ["bert", "electra", "modernbert", "llama"])
def test_classified_texts_and_pairs_have_the_losses_of_the_trial(family: str, is_pair: bool, tmp_path: Path) -> None:
    words = wordy_documents(24, words=5, seed=4)
    rows = [{"a": f"{text} {i}", "b": text[::-1], "label": i % 2} for i, text in enumerate(words)]
    data: dict[str, Any] = {
        "kind": "labelled_files",
        "classes": [0, 1],
        "length": 100,
        "train": written(tmp_path / "a.jsonl", rows),
    }
    data |= {"dev": written(tmp_path / "c.jsonl", [{**row, "a": f"{row['a']} dev"} for row in rows[:6]])}
    data |= {"test": written(tmp_path / "b.jsonl", rows[12:])}
    data["columns"] = {"first": "a", "label": "label"} | ({"second": "b"} if is_pair else {})
    out, examples = exported(tmp_path, data, {"family": family, **TINY})
    net, tok = AutoModelForSequenceClassification.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    for row, loss in zip(rows[12:], examples["loss"], strict=True):
        encoded = tok(row["a"], row["b"], return_tensors="pt") if is_pair else tok(row["a"], return_tensors="pt")
        with torch.no_grad():
            logits = net(**encoded).logits
        assert float(cross_entropy(logits, torch.tensor([row["label"]]))) == pytest.approx(loss, abs=1e-4)


def test_a_pretrained_students_own_generation_config_is_kept(tmp_path: Path) -> None:
    shape = Model.model_validate({"family": "llama", **TINY})
    net = build.build(shape, name="m", seed=0, vocab_size=320, special_ids={"eos_token_id": 1}, length=256)
    net.save_pretrained(str(tmp_path / "own"))
    some_tokenizer(tmp_path / "own")
    sampling = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1}
    GenerationConfig(eos_token_id=[1, 3], bos_token_id=0, **sampling).save_pretrained(str(tmp_path / "own"))
    rows = [{"instruction": text, "response": "so"} for text in wordy_documents(30, words=5)]
    data = {
        "kind": "instruction_files",
        "train": written(tmp_path / "a.jsonl", rows),
        "scoring": {"max_tokens": 2, "seeds": []},
    }
    out, _ = exported(tmp_path, {**data, "length": 200, "prompt_length": 150}, {"pretrained": str(tmp_path / "own")})
    kept = GenerationConfig.from_pretrained(str(out))
    assert kept.eos_token_id == [1, 3] and kept.bos_token_id == 0 and kept.pad_token_id == 2
    assert (kept.do_sample, kept.temperature, kept.repetition_penalty) == (True, 0.7, 1.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_export_has_the_type_of_the_weights_that_the_student_started_from(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Trained in fp32, and rounded where the source is of 16 bits: the losses are those of the rounded weights."""
    shape = Model.model_validate({"family": "llama", **TINY})
    net = build.build(shape, name="m", seed=0, vocab_size=320, special_ids={"eos_token_id": 1}, length=256)
    net.to(dtype).save_pretrained(str(tmp_path / "own"))
    some_tokenizer(tmp_path / "own")
    rows = [{"instruction": f"{text} {i}", "response": text} for i, text in enumerate(wordy_documents(30, words=5))]
    data: dict[str, Any] = {"kind": "instruction_files", "template": "chat", "length": 256, "prompt_length": 200}
    data |= {"train": written(tmp_path / "a.jsonl", rows), "test": written(tmp_path / "b.jsonl", rows[18:])}
    data |= {"scoring": {"max_tokens": 2, "seeds": []}}
    out, examples = exported(tmp_path, data, {"pretrained": str(tmp_path / "own")})
    about, name = json.loads((out / "config.json").read_text()), str(dtype).removeprefix("torch.")
    assert about["dtype"] == about["torch_dtype"] == name
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    (row,) = Ledger(load_study(tmp_path / "mine.yaml"), Storage(str(tmp_path / "runs"))).rows.values()
    store, key = PhaseStore(Storage(str(tmp_path / "runs"))), row["phases"]["tune"]["key"]
    rounded = {name: tensor.to(dtype).float() for name, tensor in store.weights(key, "student").items()}
    found = store.find(key)
    assert found is not None
    expected = build.restore(found.configs["student"], rounded).eval()
    net, tok = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(out)
    for row, loss in zip(rows[18:], examples["loss"], strict=True):
        talk = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["response"]}]
        prompt = tok.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
        ids = tok.apply_chat_template(talk, return_dict=False)[:-1]
        ours = summed(net, ids, len(prompt))
        assert ours == pytest.approx(summed(expected, ids, len(prompt)), abs=1e-4, rel=1e-5)
        assert ours == pytest.approx(loss, rel={torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype])
