"""The documents' study of decoders as a user runs it, on folders and a file of their own; and what they may get wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from orchestrator import sweep
from tests.support.sweeps import ROOT, Bench, finish, tables
from trainables.config.models import Model
from trainables.data.instructions.templates import alpaca
from trainables.models import build

DOCUMENT = (ROOT / "docs" / "study.md").read_text()
BLOCK = next(text for text in re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL) if "./mine.jsonl" in text)
COMMANDS = [
    line.partition("#")[0].split() for line in DOCUMENT.splitlines() if re.match(r" {4}python .* mine\.yaml", line)
]
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUICK = ["trial.data.mine.scoring={max_tokens: 8, seeds: [1]}", "trial.data.mine.evaluate=4"]


def rows() -> list[dict[str, Any]]:
    return [{"question": f"What is {a} and {b}?", "answer": f"It is {a} {b}."} for a in NUMBERS for b in NUMBERS]


def write(path: Path, some: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in some))


def tokenizer_of(texts: list[str], size: int = 400) -> Any:
    """Byte-level BPE, with a start and an end, as of Llama."""
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def save(folder: Path, tok: Any, *, length: int = 512, seed: int = 0, **shape: Any) -> None:
    """A Llama with random weights and the tokenizer, as `save_pretrained` leaves them."""
    value = {"family": "llama", "layers": 1, "width": 16, "heads": 2, "intermediate_size": 32, **shape}
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    spec = Model.model_validate(value)
    net = build.build(spec, name="m", seed=seed, vocab_size=len(tok), special_ids=ids, length=length)
    net.save_pretrained(folder)
    tok.save_pretrained(folder)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the document takes for granted: a JSON lines file, and two folders with models."""
    home = tmp_path_factory.mktemp("given")
    write(home / "mine.jsonl", rows())
    tok = tokenizer_of([alpaca(row["question"]) + row["answer"] for row in rows()])
    save(home / "models" / "big", tok, width=32, layers=2)
    save(home / "models" / "small", tok)
    (home / "mine.yaml").write_text(BLOCK)
    return home


# ------------------------------------------------------------------------------------------------------ the whole path


@pytest.mark.slow
def test_the_readmes_study_of_decoders_runs_from_the_block_to_a_folder_that_answers(
    given: Path, tmp_path: Path
) -> None:
    """The block as it stands and the commands as they stand, with less to score; relative paths are the user's."""
    home, bench = tmp_path / "home", Bench(tmp_path)
    shutil.copytree(given, home)
    (sweeping, *of_sweep), (exporting, *of_export) = ((command[2], *command[3:]) for command in COMMANDS)
    assert (sweeping, exporting) == ("orchestrator.sweep", "orchestrator.export")
    quick = [part for change in QUICK for part in ("--set", change)]
    try:
        said = finish(bench.start(*of_sweep, "--seeds", "2", *quick, storage="runs", cwd=home), timeout=480)
        assert "teacher_helps" in said.out and "Traceback" not in said.out + said.err
        report = (home / "runs" / "mine" / "report.md").read_text()
        assert "Does my small model answer better" in report and re.search("supported|refuted|undecided", report)
        found = tables(home / "runs", "mine")
        assert set(found.trials["status"]) == {"ended"}
        assert set(found.trials["arm"].dropna()) == {"alone", "taught", "by_its_own_replies"}
        last = found.results.query("phase == 'distil' and split == 'test' and progress == 1")
        assert {"rougeL", "greedy_rougeL", "unfinished", "lm_loss"} <= set(last["metric"])
        assert last.query("metric == 'unfinished'")["value"].between(0, 100).all()
        command = [sys.executable, "-m", exporting, *of_export, *quick]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
    finally:
        bench.close()
    folder = home / of_export[-1]
    tok, net = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tok.get_vocab() == AutoTokenizer.from_pretrained(home / "models" / "small").get_vocab()
    ids_BT = torch.tensor(
        [[tok.bos_token_id, *tok(alpaca("What is one and two?"), add_special_tokens=False)["input_ids"]]]
    )
    written = net.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=6, do_sample=False)
    assert ids_BT.shape[1] < written.shape[1] <= ids_BT.shape[1] + 6 and tok.decode(written[0]).startswith(
        "<s>Below is"
    )
    before = AutoModelForCausalLM.from_pretrained(home / "models" / "small").state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())  # it has learnt


# ---------------------------------------------------------------------------------------------- what the command says


Planned = Callable[..., tuple[int, str, str]]


@pytest.fixture
def planned(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Planned:
    """Plans the document's study with some paths set otherwise, from a folder where `given` lies: (exit code, out, err)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in given.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def plan(*changes: str) -> tuple[int, str, str]:
        capsys.readouterr()
        sets = [part for change in (*QUICK, *changes) for part in ("--set", change)]
        code = sweep.main(["mine.yaml", "--dry-run", "--storage", str(tmp_path / "runs"), *sets])
        said = capsys.readouterr()
        return code, said.out, said.err

    return plan


def refusal(found: tuple[int, str, str]) -> str:
    """The message of a command that refused, by the rules: exit 2, one line, no traceback, nothing else."""
    code, out, err = found
    assert code == 2 and not out.strip() and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err[len("error: ") : -1]


def test_the_readmes_study_of_decoders_is_planned(planned: Planned) -> None:
    assert len(BLOCK.splitlines()) == 20
    code, out, err = planned()
    assert code == 0, err
    assert "3 arms x 5 seeds" in out and "distil.soft: 1 x forward_kl(teacher → student)" in out
    assert re.search(r"mine: train 69 exchanges, dev 4 exchanges, test 4 exchanges; alpaca template; 0\.0% of the", out)
    assert re.search(r"mine, an example: <s>Below is .* Response: «It is \w+ \w+\.</s>»", out)


def test_a_context_that_is_shorter_than_what_is_read_is_refused(planned: Planned, tmp_path: Path) -> None:
    save(tmp_path / "short", AutoTokenizer.from_pretrained("models/small"), length=64)
    assert refusal(planned("trial.models.student.pretrained=./short")) == (
        "mine.yaml: models.student: './short' has 64 positions, and sequences of data.mine have up to 512 tokens; expected "
        "data.mine.length: 64 at most"
    )


def test_prompts_that_are_too_long_are_left_out_and_counted(planned: Planned, tmp_path: Path) -> None:
    write(tmp_path / "long.jsonl", [*rows(), *({"question": "why " * 300 + str(i), "answer": "So."} for i in range(7))])
    code, out, _ = planned("trial.data.mine.train=./long.jsonl")
    assert code == 0 and "rows left out: 7 with a prompt over 256 tokens" in out
    assert refusal(planned("trial.data.mine.prompt_length=8")) == (
        "data.mine: train: no row is left (69 with a prompt over 8 tokens); raise prompt_length 8, or shorten the prompts"
    )


def test_empty_replies_are_left_out_and_counted(planned: Planned, tmp_path: Path) -> None:
    empty = [{"question": f"Why {i}?", "answer": "  "} for i in range(5)]
    write(tmp_path / "some.jsonl", [*rows(), *empty])
    code, out, _ = planned("trial.data.mine.train=./some.jsonl")
    assert code == 0 and "rows left out: 5 with an empty reply" in out
    write(tmp_path / "none.jsonl", empty)
    assert refusal(planned("trial.data.mine.train=./none.jsonl")) == (
        "data.mine: train: no row is left (5 with an empty reply); name other columns, or give rows that have a prompt and "
        "a reply"
    )


TEMPLATES = {
    "{% for m in messages %}<s>{{ m['role'] }}: {% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}": " loses the reply str 'It is ",
    "{{ messages[0]['content'] }}{% if add_generation_prompt %} So:{% endif %}": " loses the reply str 'It is ",
    "{{ raise_exception('only tools') }}": " refuses a conversation of user, assistant: only tools",
}


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_a_template_that_loses_the_reply_is_refused(planned: Planned, tmp_path: Path, template: str | None) -> None:
    tok = AutoTokenizer.from_pretrained("models/small")
    tok.chat_template = template
    tok.save_pretrained(tmp_path / "tok")
    said = refusal(planned("trial.data.mine.tokenizer.name=./tok", "trial.data.mine.template=chat"))
    if template is None:
        assert said == (
            "data.mine: template: chat is the tokenizer's own, and this tokenizer has none; expected `template: alpaca`, or "
            "the tokenizer of a chat model"
        )
    else:
        row = "data.mine: train: './mine.jsonl': row 1: template: the tokenizer's chat template "
        assert said.startswith(row) and TEMPLATES[template] in said


def test_tokenizers_that_differ_are_both_named(planned: Planned, tmp_path: Path) -> None:
    save(tmp_path / "other", tokenizer_of(["quite another text, with words of its own"], 300), width=32)
    tokens = len(AutoTokenizer.from_pretrained("models/small"))
    said = refusal(planned("trial.models.teacher.pretrained=./other"))
    assert said.startswith(
        f"mine.yaml: models.teacher: the tokenizers of './other' ({len(AutoTokenizer.from_pretrained('other'))} tokens) and of "
        f"data 'mine' ({tokens}) differ in "
    )
    assert said.endswith("; expected tokenizer: {kind: pretrained, name: './other'}")
    further = "{kind: instruction_files, test: ./mine.jsonl, columns: {prompt: question, response: answer}, tokenizer: {kind: pretrained, name: ./other}}"  # fmt: skip
    said = refusal(planned(f"trial.data.more={further}", "trial.phases.distil.eval_only=[more]", "objective.task=mine"))
    assert said.startswith("mine.yaml: data.more: the tokenizers of data 'more' (")
    assert f" and of data 'mine' ({tokens}) differ in " in said and said.endswith(
        "one tokenizer for all data of a trial"
    )


def test_a_model_with_fewer_rows_than_the_tokenizer_has_tokens_is_refused(planned: Planned, tmp_path: Path) -> None:
    tok = AutoTokenizer.from_pretrained("models/small")
    save(tmp_path / "few", tokenizer_of(["few"], 260))
    for path in (tmp_path / "few").glob("tokenizer*"):
        path.unlink()
    expected = (
        f"mine.yaml: models.student: './few' has 260 rows of embeddings, and the data's tokenizer has {len(tok)} tokens; "
        f"expected the tokenizer of the model"
    )
    assert expected == refusal(planned("trial.models.student.pretrained=./few"))


@pytest.mark.parametrize("path", ["models.student.dtype", "precision"])
def test_a_type_that_is_none_of_ours_is_refused(planned: Planned, path: str) -> None:
    said = refusal(planned(f"trial.{path}=fp16"))
    assert said.endswith(f"trial.{path}: input should be 'fp32' or 'bf16' (got 'fp16') (did you mean 'bf16'?)")


def test_a_model_that_cannot_go_on_from_a_cache_is_refused_before_it_is_trained(planned: Planned) -> None:
    said = refusal(planned("trial.models.student={family: mamba, layers: 1, width: 16}"))
    assert said == "mine.yaml: models: generation unsupported for a mamba: no standard KV cache; expected llama, gpt2 …"


def test_a_type_that_this_gpu_lacks_is_found_in_the_plan(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    lacks = "device cuda (Tesla T4) does not compute in bf16; expected fp32"
    gpu = "slot={cpus: 1, gpus: 1, memory_gb: 10}"
    assert refusal(planned(gpu, "trial.precision=bf16")) == f"mine.yaml: trial.precision: {lacks}"
    assert refusal(planned(gpu, "trial.models.teacher.dtype=bf16")) == f"mine.yaml: trial.models.teacher.dtype: {lacks}"
    assert planned("trial.precision=bf16")[0] == 0  # no GPU is asked for


# --------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub on loopback that shows no model, and of which `some/gated` is gated: it answers as the real one does."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_gated = "some/gated" in self.path
            code = "GatedRepo" if is_gated else "RepoNotFound"
            message = "Access to model some/gated is restricted." if is_gated else "Repository not found"
            self.send_response(403 if is_gated else 404)
            for name, value in (("X-Error-Code", code), ("X-Error-Message", message), ("Content-Length", "0")):
                self.send_header(name, value)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


GATED = "it is gated; accept its terms at https://huggingface.co/some/gated and set HF_TOKEN to a token of that account"
MISSING = "the hub shows no such {}; if it is private, set HF_TOKEN to a token that may read it"
NO_WEIGHTS = "models.{}: no weights at 'some/{}' (expected a folder, or a hub id that can be reached): "
ASKED = {  # a change of the study -> how the message ends
    "models.student.pretrained=some/gated": NO_WEIGHTS.format("student", "gated") + GATED,
    "models.teacher.pretrained=some/none": NO_WEIGHTS.format("teacher", "none") + MISSING.format("model"),
    "data.mine.tokenizer.name=some/gated": f"data.mine: tokenizer: cannot load 'some/gated' from a folder or the hub: {GATED}",
    "data.mine.tokenizer.name=some/none": "data.mine: tokenizer: cannot load 'some/none' from a folder or the hub: "
    + MISSING.format("tokenizer"),
    "data.mine={kind: instruction_hub, name: some/gated, train: train, tokenizer: {kind: pretrained, name: ./models/small}}": (
        "data.mine: train: cannot load split 'train' of hub data set 'some/gated' at 'main': "
        + GATED.replace("co/some", "co/datasets/some")
    ),
    "data.mine={kind: instruction_hub, name: some/none, train: train, tokenizer: {kind: pretrained, name: ./models/small}}": (
        "data.mine: train: cannot load split 'train' of hub data set 'some/none' at 'main': "
        + MISSING.format("data set")
    ),
}


@pytest.mark.slow
def test_what_the_hub_does_not_give_is_one_message_that_names_the_variable(
    given: Path, hub: str, tmp_path: Path
) -> None:
    """In a process of its own, as a user starts it: the hub's address is read when its client is imported."""
    said = refusals(hub, list(ASKED), given, tmp_path)
    for found, ends in zip(said, ASKED.values(), strict=True):
        assert found.endswith(ends), found


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_message_with_what_helps(given: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, and listening to nobody
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        said = refusals(nowhere, [change for change in ASKED if "hub, name: some/none" in change], given, tmp_path)
    helps = "set HTTPS_PROXY if there is a proxy, HF_ENDPOINT to a mirror, or name a local folder"
    for found in said:
        assert found.endswith(f": {nowhere} does not answer; {helps}"), found


def refusals(hub: str, changes: list[str], given: Path, tmp_path: Path) -> list[str]:
    """The message for each change of the study, from a process of its own with this hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}  # fmt: skip
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    script = """if True:
        import sys, time
        from orchestrator.sweep import main
        time.sleep = lambda _: None  # the hub's client tries again for minutes
        for change in sys.argv[2:]:
            print(main(["mine.yaml", "--dry-run", "--storage", sys.argv[1], "--set", f"trial.{change}"]), flush=True)
    """
    command = [sys.executable, "-c", script, str(tmp_path / "runs"), *changes]
    done = subprocess.run(command, cwd=given, capture_output=True, text=True, timeout=480, env=environment)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stdout.split() == ["2"] * len(changes) and "Traceback" not in done.stderr, done.stderr
    return errors
