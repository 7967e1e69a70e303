"""What is exported is an ordinary Hugging Face folder that gives the logits of the stored weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from orchestrator import export, model_folder, sweep
from orchestrator.scheduling.ledger import Ledger
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import Fingerprints
from orchestrator.study.load import load_study
from tests.support.studies import run_trials
from tests.support.trials import Lab, distillation, flow, hard, phase, wordy_documents
from trainables.config.models import Model
from trainables.data.prepared import open_data
from trainables.data.tokenizer import encode, ends, train_wordpiece
from trainables.models import build, output_head, tokenizer_check

SOFT = "phases.distil.terms.teacher_to_student.weight"


@pytest.fixture
def file(lab: Lab, tmp_path: Path) -> Path:
    """A study of three arms, run to its end in this process."""
    raw = {
        "question": "?",
        "seeds": 1,
        "trial": {"data": {"corpus": lab.data["corpus"]}, **distillation()},
        "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"},
        "arms": {
            "alone": {SOFT: 0},
            "taught": {},
            "shared": {SOFT: 0, "models.student.sharing": {"order": "twice", "swap": True}},
        },
    }
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(raw))
    run_study(path, lab)
    return path


def run_study(path: Path, lab: Lab) -> None:
    study = load_study(path)
    scheduler = Scheduler(study, Fingerprints(str(lab.root / "data")), lab.storage)
    run_trials(scheduler)


def test_an_arms_student_loads_with_transformers_and_computes_the_same(file: Path, lab: Lab, tmp_path: Path) -> None:
    to = tmp_path / "student"
    assert export.main([str(file), "--storage", lab.storage.uri, "--to", str(to), "--arm", "taught"]) == 0
    net, tokenizer = AutoModelForMaskedLM.from_pretrained(to).eval(), AutoTokenizer.from_pretrained(to)
    corpus = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"])
    assert tokenizer.get_vocab() == corpus.tokenizer.get_vocab() and (to / "model.safetensors").exists()
    ledger = Ledger(load_study(file), lab.storage)
    row = next(row for row in ledger.rows.values() if row["arm"] == "taught")
    key = row["phases"]["distil"]["key"]
    published = lab.store.find(key)
    assert published is not None
    stored = build.restore(published.configs["student"], lab.store.weights(key, "student")).eval()
    ids = corpus.dev.rows(range(4))
    with torch.no_grad():
        torch.testing.assert_close(net(input_ids=ids).logits, stored(input_ids=ids).logits)


def test_loras_pairs_are_exported_as_peft_loads_them(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base and the adapter together compute what the merged weights do; other models are refused in one line."""
    vocabulary = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"]).vocab_size
    shape = LlamaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)  # fmt: skip
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(shape).save_pretrained(base)
    learn = phase("m", {"own": hard("m")}, streams={"main": {"corruption": None}}, optimizer={"lr": 1e-2})
    pairs = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all_linear", "rslora": True}
    raw = {
        "question": "?",
        "seeds": 1,
        "trial": {
            "data": {"corpus": lab.data["corpus"]},
            "models": {"m": {"pretrained": str(base)}},
            "phases": {"learn": {**learn, "train": {"m": pairs}}, "more": {**learn, "train": {"m": pairs}}},
        },
        "objective": {"phase": "more", "model": "m", "metric": "lm_loss", "mode": "min"},
        "arms": {"adapted": {}, "whole": {"phases.learn.train.m": "full"}},
    }
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(raw))
    study = load_study(file)
    prints = Fingerprints(str(lab.root / "data"))
    run_trials(Scheduler(study, prints, lab.storage))

    def exported(to: str, arm: str, *more: str) -> int:
        return export.main([str(file), "--storage", lab.storage.uri, "--to", str(tmp_path / to), "--arm", arm, *more])

    assert exported("merged", "adapted", "--phase", "learn") == 0
    assert exported("pairs", "adapted", "--phase", "learn", "--adapter") == 0
    assert not (tmp_path / "pairs" / "model.safetensors").exists()
    assert "AutoPeftModelForCausalLM" in (tmp_path / "pairs" / "README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "pairs").eval()
    ids = torch.arange(24).reshape(2, 12) % vocabulary
    plain = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert (merged(input_ids=ids).logits - plain).abs().max() > 0.01
    capsys.readouterr()
    assert exported("x", "whole", "--phase", "learn", "--adapter") == 2
    assert "--adapter: phase learn trains all weights of 'm'; leave --adapter out" in capsys.readouterr().err
    assert exported("x", "adapted", "--phase", "more", "--adapter") == 2
    assert "'m' started from what phase learn trained, and an adapter needs a folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_layers_that_run_twice_are_written_twice_so_that_anyone_can_load_them(
    file: Path, lab: Lab, tmp_path: Path
) -> None:
    to = tmp_path / "shared"
    arguments = [str(file), "--storage", lab.storage.uri, "--to", str(to), "--arm", "shared", "--phase", "distil"]
    assert export.main(arguments) == 0
    net, tokenizer = AutoModelForMaskedLM.from_pretrained(to).eval(), AutoTokenizer.from_pretrained(to)
    assert net.config.model_type == "bert" and net.config.num_hidden_layers == 2
    assert tokenizer("lora", "mitun")["token_type_ids"][-1] == 1  # as a task tells the halves of a pair apart
    row = next(row for row in Ledger(load_study(file), lab.storage).rows.values() if row["arm"] == "shared")
    published = lab.store.find(row["phases"]["distil"]["key"])
    assert published is not None
    stored = build.restore(published.configs["student"], lab.store.weights(published.key, "student")).eval()
    ids = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"]).dev.rows(range(4))
    with torch.no_grad():
        torch.testing.assert_close(net(input_ids=ids).logits, stored(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "nobody"], "no arm 'nobody'; expected alone, taught, shared"),
        (["--arm", "alone", "--phase", "teach"], "--phase teach: does not train 'student'; expected distil"),
        (["--trial", "123"], "no ended trial '123'"),
        (["--trial", "123"], "; expected "),
        (["--arm", "alone", "--model", "teacher"], "trains no model 'teacher'; expected student"),
        ([], "no winner of a search to export (yet); give --arm A, of alone, taught, shared, or --trial ID"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    file: Path, lab: Lab, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    assert export.main([str(file), "--storage", lab.storage.uri, "--to", str(to), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1 and not to.exists()


def test_a_folder_that_is_not_empty_is_left_alone(
    file: Path, lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(file), "--storage", lab.storage.uri, "--to", str(tmp_path), "--arm", "alone"]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["place", "storage", "data", "weights", "phase"])
def test_what_is_missing_or_damaged_is_said_without_a_traceback(
    file: Path, lab: Lab, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str], new_lab: Any
) -> None:
    to, storage = tmp_path / "to", lab.storage.uri
    if what == "place":
        to = file / "below-a-file"
    elif what == "storage":
        storage = "gopher://x/y"
    elif what == "data":
        (lab.root / "data").unlink()  # a link: others share it
    else:
        for path in lab.root.glob("phases/*/*.safetensors" if what == "weights" else "phases/*/phase.json"):
            path.write_bytes(path.read_bytes()[:100])
    assert export.main([str(file), "--storage", storage, "--to", str(to), "--arm", "taught"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert not to.exists()


def test_what_an_edited_file_no_longer_plans_is_not_taken_for_the_arm(file: Path, lab: Lab, tmp_path: Path) -> None:
    """Its trial is still there under the arm's name."""
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"arms": {**raw["arms"], "taught": {SOFT: 3}}}))
    assert export.main([str(file), "--storage", lab.storage.uri, "--to", str(tmp_path / "to"), "--arm", "taught"]) == 2
    assert not (tmp_path / "to").exists()


def test_a_trial_by_its_id_and_another_model(file: Path, lab: Lab, tmp_path: Path) -> None:
    rows = Ledger(load_study(file), lab.storage).rows
    trial = next(trial for trial, row in rows.items() if row["arm"] == "taught")
    given = ["--trial", trial, "--model", "teacher", "--storage", lab.storage.uri]
    assert export.main([str(file), "--to", str(tmp_path / "to"), *given]) == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "to").config.num_hidden_layers == 1


def byte_level(texts: list[str]) -> Any:
    """As GPT-2's: one token that starts and ends, and that its tokenizer does not add."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.mark.parametrize("make", [lambda texts: train_wordpiece(texts, 200), byte_level])
def test_a_decoder_reads_a_prompt_as_it_was_trained_and_stops_where_a_reply_ends(make: Any, tmp_path: Path) -> None:
    tokenizer = make(wordy_documents(20, seed=0))
    start, end = ends(tokenizer)
    shape = Model.model_validate({"family": "gpt2", "layers": 1, "width": 16, "heads": 2, "dropout": 0})
    ids = tokenizer_check.special_ids(tokenizer)
    net = build.build(shape, name="m", seed=0, vocab_size=len(tokenizer), special_ids=ids, length=64)
    text = wordy_documents(1, seed=1)[0][:30]
    as_trained = [start, *encode(tokenizer, [text])[0]]
    model_folder.set_generation_tokens(net, tokenizer)
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    net, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(text)["input_ids"] == as_trained and ends(tokenizer) == (start, end)
    assert tokenizer.decode(as_trained, skip_special_tokens=True).split() == text.lower().split()
    asked = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        net.lm_head.weight[:] = 0.0
        net.lm_head.weight[end] = 1.0
        net.transformer.ln_f.weight[:] = 0.0
        net.transformer.ln_f.bias[:] = 1.0  # the end is the likeliest token everywhere
    replied = net.generate(**asked, max_new_tokens=9, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert replied.tolist() == [end]


def test_the_folder_has_a_model_card_that_the_hub_reads(file: Path, lab: Lab, tmp_path: Path) -> None:
    to = tmp_path / "student"
    assert export.main([str(file), "--storage", lab.storage.uri, "--to", str(to), "--arm", "taught"]) == 0
    card = ModelCard.load(to / "README.md")  # parses the metadata as the hub does
    row = next(row for row in Ledger(load_study(file), lab.storage).rows.values() if row["arm"] == "taught")
    assert card.data.pipeline_tag == "fill-mask" and card.data.license is None and card.data.base_model is None
    records = lab.storage.read(f"mine/trials/{row['trial']}/attempt-1/records.jsonl").decode().splitlines()
    ends = [r for r in map(json.loads, records) if r["metric"] == "mlm_loss" and r["progress"] == 1]
    loss = {r["split"]: r["value"] for r in ends if r["phase"] == "distil" and r["model"] == "student"}
    in_card = {r.dataset_split: r.metric_value for r in card.data.eval_results if r.metric_type == "mlm_loss"}
    assert in_card == {split: loss[split] for split in ("dev", "test")}
    spec = json.loads(card.content.partition("```json\n")[2].partition("```")[0])
    assert spec == json.loads(lab.storage.read(f"mine/trials/{row['trial']}/trial.json"))["spec"]
    assert row["trial"] in card.text and "AutoModelForMaskedLM.from_pretrained(folder)" in card.text


FAMILIES = ["bert", "xlm-roberta", "deberta", "deberta-v2", "electra", "albert", "distilbert", "modernbert", "qwen2"]


@pytest.mark.parametrize("family", ["roberta", "llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES)])
def test_language_models_become_classifiers_that_teach_learn_and_are_exported(
    family: str, new_task_lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab: Lab = new_task_lab()
    data = {name: lab.data[name] for name in ("single", "corpus")}
    corpus = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"])
    shape = {"family": family, "layers": 1, "width": 16, "heads": 2, "intermediate_size": 32, "dropout": 0}
    ids, models = tokenizer_check.special_ids(corpus.tokenizer), {}
    for seed, name in enumerate(("teacher", "student")):
        how: dict[str, Any] = {"vocab_size": corpus.vocab_size, "special_ids": ids, "length": 128}
        build.build(Model.model_validate(shape), name=name, seed=seed, **how).save_pretrained(tmp_path / name)
        models[name] = {"pretrained": str(tmp_path / name)}
    common = {"streams": {"main": {"data": "single"}}, "budget": {"steps": 2}}
    flowing = {"hard": hard("student"), "soft": flow("teacher", "student")}
    phases = {
        "teach": phase("teacher", {"h": hard("teacher")}, **common),
        "distil": phase("student", flowing, **common),
        "again": phase("student", flowing, **common),
    }
    raw = {
        "question": "?",
        "trial": {"data": data, "models": models, "phases": phases},
        "objective": {"phase": "again", "model": "student", "metric": "score", "mode": "max"},
        "arms": {"taught": {}},
        "seeds": 1,
    }
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(raw))
    assert sweep.main([str(file), "--dry-run", "--storage", lab.storage.uri]) == 0
    said = capsys.readouterr().out
    assert all(f"phase {at} draws its head for the 2 outputs of data.single anew" in said for at in ("teach", "distil"))
    run_study(file, lab)
    for name, at in (("teacher", "teach"), ("student", "again")):
        to, where = tmp_path / f"{name}-out", ["--model", name, "--phase", at]
        assert export.main([str(file), "--storage", lab.storage.uri, "--to", str(to), "--arm", "taught", *where]) == 0
        row = next(iter(Ledger(load_study(file), lab.storage).rows.values()))
        published = lab.store.find(row["phases"][at]["key"])
        assert published is not None
        stored = build.restore(published.configs[name], lab.store.weights(published.key, name)).eval()
        net = AutoModelForSequenceClassification.from_pretrained(to).eval()
        assert sorted(net.config.id2label.items()) == [(0, "few"), (1, "many")]
        batch = open_data(str(lab.root / "data"), row_data(row, lab)).dev.rows(range(4))
        with torch.no_grad():
            ours = output_head.class_logits(stored, batch.ids_BT, batch.mask_BT, None)
            theirs = net(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
        torch.testing.assert_close(theirs, ours)


def row_data(row: Any, lab: Lab) -> str:
    start = json.loads(lab.storage.read(f"mine/trials/{row['trial']}/trial.json") or b"{}")
    fingerprint: str = start["fingerprints"]["data:single"]
    return fingerprint


def test_rotary_positions_are_named_as_older_loaders_read_them(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    for rope in (
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ):  # fmt: skip
        config = LlamaConfig(num_hidden_layers=1, rope_parameters=rope, dtype="float32")
        config.save_pretrained(tmp_path)
        model_folder.name_for_older_loaders(tmp_path)
        about = json.loads((tmp_path / "config.json").read_text())
        assert about["rope_theta"] == 5e5 and (about["rope_scaling"] or {}).get("factor") == rope.get("factor")
        assert LlamaConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("family", ["gemma3_text", "modernbert"])
def test_rotary_bases_of_each_kind_of_layer_are_named_as_older_loaders_read_them(family: str, tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 7e5}}
    rope |= {"sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}
    if family == "gemma3_text":
        rope["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    config = AutoConfig.for_model(family, rope_parameters=rope, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    model_folder.name_for_older_loaders(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    names = {
        "gemma3_text": ("rope_theta", "rope_local_base_freq"),
        "modernbert": ("global_rope_theta", "local_rope_theta"),
    }
    assert [about[name] for name in names[family]] == [7e5, 3e4] and about["dtype"] == about[
        "torch_dtype"
    ] == "bfloat16"
    assert (about["rope_scaling"] or {}).get("factor") == (8.0 if family == "gemma3_text" else None)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.rope_parameters == config.rope_parameters and loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("Some tensors share memory\n…"),
        SafetensorError("I/O error"),
        ValueError(),
        OSError(28, "No space left"),
    ],
)
def test_an_export_that_fails_leaves_no_half_folder_and_no_traceback(
    raised: Exception, is_there: bool, file: Path, lab: Lab, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    to = tmp_path / "to"
    if is_there:
        to.mkdir()

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)  # after the weights are written
    assert export.main([str(file), "--storage", lab.storage.uri, "--to", str(to), "--arm", "taught"]) == 2
    error = capsys.readouterr().err
    assert f"error: --to {to}: cannot be written (" in error and error.count("\n") == 1 and "Traceback" not in error
    assert (str(getattr(raised, "strerror", None) or raised).split("\n")[0] or "ValueError") in error
    assert to.exists() == is_there and not (is_there and any(to.iterdir()))


def test_a_trial_of_another_version_is_named(
    file: Path, lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in Ledger(load_study(file), lab.storage).rows.values() if row["arm"] == "taught")
    start = lab.root / "mine" / "trials" / row["trial"] / "trial.json"
    start.write_text(start.read_text().replace('"intermediate_size"', '"inner"'))
    to, which = tmp_path / "to", ["--trial", row["trial"]]
    assert export.main([str(file), "--storage", lab.storage.uri, "--to", str(to), *which]) == 2
    error = capsys.readouterr().err
    assert f"trial {row['trial']} was run by another version of codistill; to rebuild it, run" in error
    assert error.count("\n") == 1 and not to.exists()
