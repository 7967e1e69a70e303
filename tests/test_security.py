"""What is loaded runs nothing, what is secret stays so, and what listens is what docs/security.md says."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import BertConfig, BertForMaskedLM

from orchestrator import command, export, report, store, sweep
from orchestrator.cli import open_storage
from orchestrator.cluster import mlflow_server
from orchestrator.mlflow_sync import Mirror
from orchestrator.study.errors import StudyError, has_secret, redact
from orchestrator.study.load import load_study
from orchestrator.study.yaml_reader import read_yaml
from tests.support.listening import command_line, listening, tree
from tests.support.sweeps import Bench, finish, tables, write_study
from trainables.config.data import PretrainedTokenizer
from trainables.config.errors import DataError, ModelError
from trainables.config.models import Model
from trainables.data.sources.files import HubSplit, read_documents
from trainables.data.tokenizer import load_pretrained, open_tokenizer, train_wordpiece
from trainables.models import build
from trainables.runtime import process_group
from trainables.storage.checkpoints import load_checkpoint, save_checkpoint
from trainables.storage.files import Storage

ROOT = Path(__file__).parent.parent
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}


# ------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("text", "shown", "secret"),
    [
        ("./runs", "./runs", False),
        ("/data/runs #3/a=b?", "/data/runs #3/a=b?", False),
        ("s3://bucket/runs", "s3://bucket/runs", False),
        ("http://host:5000/path", "http://host:5000/path", False),
        ("hf://datasets/owner/name@main/x.csv", "hf://***@main/x.csv", False),  # shown too little rather than too much
        ("http://host:8080/x@v1.txt", "http://***@v1.txt", False),
        ("sftp://me@host/runs", "sftp://***@host/runs", False),
        ("http://host/x.csv?page=2", "http://host/x.csv?***", False),
        ("s3://KEY:hunter2@bucket/runs", "s3://***@bucket/runs", True),
        ("s3://KEY:hunt/er+2@bucket/runs", "s3://***@bucket/runs", True),  # AWS's keys hold slashes
        ("mysql+pymysql://user:hunter2@host:3306/db", "mysql+pymysql://***@host:3306/db", True),
        ("http://user:12hunter2@host", "http://***@host", True),
        ("ftp://:hunter2@host", "ftp://***@host", True),
        ("https://hunter2@github.com/owner/name", "https://***@github.com/owner/name", True),
        ("https://host/x?token=hunter2&y=1", "https://host/x?***", True),
        ("https://host/x?y=1&X-Amz-Signature=hunter2", "https://host/x?***", True),
        ("https://host/x?API_KEY=hun@ter2", "https://host/x?***", True),
        ("no answer from http://u:hunter2@h/x?t=hunter2, 2 times", "no answer from http://***@h/x?*** 2 times", True),
        ("with url: /api?token=hunter2 (caused by", "with url: /api?*** (caused by", False),
    ],
)
def test_a_uri_is_shown_without_its_secrets_and_a_secret_is_seen(text: str, shown: str, secret: bool) -> None:
    assert redact(text) == shown
    assert has_secret(text) is secret


STORAGE = "sftp://me:hunter2@127.0.0.1/runs"


def test_a_storage_with_a_password_is_refused_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = str(write_study(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match="FSSPEC_SFTP_PASSWORD"):
        open_storage(STORAGE)
    for main, arguments in (
        (sweep.main, [study]),
        (sweep.main, [study, "--dry-run"]),
        (report.main, [study]),
        (export.main, [study, "--to", str(tmp_path / "best")]),
        (store.main, []),
    ):
        assert main([*arguments, "--storage", STORAGE]) == 2
        said = "".join(capsys.readouterr())
        assert "sftp://***@127.0.0.1/runs" in said and "takes no password" in said and "hunter2" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "study.yaml"]


@pytest.mark.parametrize("where", ["file", "set", "list", "profile"])
def test_a_study_with_a_secret_is_refused(tmp_path: Path, where: str) -> None:
    file, uri, overrides = write_study(tmp_path), "https://me:hunter2@host/train.txt", []
    if where == "file":
        file.write_text(re.sub(r"train: \S+corpus.txt", f"train: {uri}", file.read_text()))
    elif where == "list":
        file.write_text(file.read_text() + f"exclude: [{{a: '{uri}'}}]\n")
    elif where == "profile":
        file.write_text(file.read_text() + f"profiles: {{a: {{trial.data.train: '{uri}'}}}}\n")
    else:
        overrides = [f"trial.data.train={uri}"]
    with pytest.raises(StudyError, match="holds a password or token") as said:
        load_study(file, None, overrides)
    assert "hunter2" not in str(said.value) and "https://***@host/train.txt" in str(said.value)
    # the line of `trial.data.train`, also of a value that a profile or an override sets there; of a list, its own line
    line = next(
        i
        for i, line in enumerate(file.read_text().splitlines(), 1)
        if ("exclude" if where == "list" else "data:") in line
    )
    assert str(said.value).startswith(f"{file}:{line}: ")


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@127.0.0.1:1",
        "http://me:hunter2@127.0.0.1:1/?token=hunter2",
        "sqlite:////proc/no/such/folder/mlflow.db?password=hunter2",
        "postgresql://me:hunter2@127.0.0.1:1/db",
        "mysql+nothing://me:hunter2@127.0.0.1:1/db",
        "nothing://me:hunter2@127.0.0.1:1/db",
    ],
)
def test_what_the_mirror_says_of_a_store_that_does_not_answer_holds_no_secret(
    uri: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    mirror = Mirror(uri, "study", every=0.1)
    mirror.start()
    for _ in range(1200):  # importing MLflow takes its time on a busy machine
        if mirror.problem is not None:
            break
        time.sleep(0.1)
    mirror.close(0.5)
    assert mirror.problem is not None and "MLflow at " in mirror.problem
    assert "hunter2" not in mirror.problem + caplog.text + "".join(capfd.readouterr())


def test_what_the_command_prints_of_its_arguments_holds_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Touches the command's private parts: only a finished or interrupted sweep prints its arguments."""
    study, uri = str(write_study(tmp_path)), "postgresql://me:hunter2@host/db"
    again = " ".join(sweep._same_arguments(sweep._parser().parse_args([study, "--tracking-uri", uri])))
    assert "postgresql://***@host/db" in again and "hunter2" not in again
    assert sweep.main([study, "--set", uri, "--dry-run"]) == 2
    said = "".join(capsys.readouterr())
    assert "must be path=value" in said and "hunter2" not in said


# ------------------------------------------------------------------------------------------------- what is loaded runs nothing


class Evil:
    """Pickled, it makes a file when it is read."""

    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self) -> Any:
        return (open, (self.witness, "w"))


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "witness"
    yield path
    assert not path.exists(), "what was loaded has run"


def test_the_witness_would_tell(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "seen"))).close()
    assert (tmp_path / "seen").exists()


def test_a_checkpoint_runs_nothing(tmp_path: Path, witness: Path) -> None:
    storage = Storage(str(tmp_path / "runs"))
    save_checkpoint(storage, "a", {"key": "k" * 16, "step": 3, "weights": torch.ones(2)})
    pointer = json.loads(storage.read("a/checkpoint.json") or b"")
    buffer = io.BytesIO()
    torch.save({"key": "k" * 16, "step": 3, "weights": Evil(witness)}, buffer)
    storage.write(f"a/{pointer['file']}", buffer.getvalue())
    storage.write(
        "a/checkpoint.json", json.dumps({**pointer, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}).encode()
    )
    with contextlib.suppress(pickle.UnpicklingError):
        assert load_checkpoint(storage, ["a"], "k" * 16) is None


def _folder(path: Path, **config: Any) -> Path:
    """A pretrained model, as it could be found anywhere."""
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(path)
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**about, **config}))
    return path


def _build(folder: Path) -> Any:
    return build.build(Model(pretrained=str(folder)), name="m", seed=0, vocab_size=32, special_ids={}, length=8)


def test_pickled_weights_are_refused_and_passed_over(tmp_path: Path, witness: Path) -> None:
    folder = _folder(tmp_path / "model")
    torch.save(Evil(witness), folder / "pytorch_model.bin")
    assert _build(folder).num_parameters() > 0  # the safetensors beside them are what counts
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights at"):
        _build(folder)
    with pytest.raises(ModelError, match="pickled weights are refused"):
        build.weights_fingerprint(str(folder), None)


def _module(folder: Path, witness: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: pass\nclass Net: pass\nclass Tok: pass\n")  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "evil"])
def test_code_beside_a_model_is_not_run(tmp_path: Path, witness: Path, kind: str) -> None:
    own = {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Net", "AutoModelForCausalLM": "own.Net"}
    folder = _folder(tmp_path / "model", model_type=kind, auto_map=own)
    _module(folder, witness, "own")
    if kind == "bert":  # transformers has its own
        assert type(_build(folder)).__module__.startswith("transformers.")
    else:
        with pytest.raises(ModelError, match="needs code of its own"):
            _build(folder)


@pytest.mark.parametrize("field", ["attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ModelError, match="asks for code of the hub"):
        _build(_folder(tmp_path / "model", **{field: "kernels-community/evil"}))
    shape = Model(family="bert", layers=1, width=16, heads=2, config={f"_{field}": "kernels-community/evil"})
    with pytest.raises(ModelError, match=r"asks for code of the hub"):
        build.build(shape, name="m", seed=0, vocab_size=32, special_ids={}, length=8)


@pytest.mark.parametrize("kind", ["BertTokenizer", "EvilTokenizer"])
def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path, witness: Path, kind: str) -> None:
    folder = tmp_path / "tokenizer"
    train_wordpiece(["some words of a text"] * 9, 60).save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": ["own.Tok", "own.Tok"]}, "tokenizer_class": kind}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, **own}))
    _module(folder, witness, "own")
    for load in (lambda: load_pretrained(PretrainedTokenizer(kind="pretrained", name=str(folder))), lambda: open_tokenizer(str(folder))):  # fmt: skip
        with contextlib.suppress(DataError, ValueError):
            assert type(load()).__module__.startswith("transformers.")


def test_the_script_of_a_data_set_is_not_run(tmp_path: Path, witness: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    _module(folder, witness, "evil")
    with pytest.raises(DataError):
        read_documents(HubSplit(str(folder), None, "main", "train"), "text", what="train")


# ------------------------------------------------------------------------------------------------------- what listens


def documented(column: str) -> set[tuple[str, str]]:
    """(process, address) of the table in docs/security.md."""
    text = (ROOT / "docs" / "security.md").read_text().partition("## What listens")[2].partition("\n## ")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]  # fmt: skip
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert len(table) > 5 and {row[column] for row in table} <= {"yes", "no"}
    return {(row["process"].strip("`"), row["address"]) for row in table if row[column] == "yes"}


def process_kind(command: str) -> str:
    """As the table calls it. A process has Python's name until it gives itself its own."""
    names = {
        "/dashboard/agent.py": "ray::DashboardAgent",
        "/runtime_env/agent/main.py": "ray::RuntimeEnvAgent",
        "/dashboard/dashboard.py": "dashboard.py",
        "/monitor.py": "monitor.py",
        "/workers/default_worker.py": "ray::",
    }
    if command.startswith("ray::"):
        kept = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::RayTrainWorker")
        return next((name for name in kept if command.startswith(name)), "ray::")
    program = command.partition(" ")[0].rsplit("/", 1)[-1]
    if program in ("gcs_server", "raylet"):
        return program
    found = next((name for path, name in names.items() if path in command), None)
    return found or ("sweep" if "orchestrator.sweep" in command else command)


@pytest.mark.parametrize("column", ["one worker", "several workers"])
def test_all_that_is_documented_is_on_loopback(column: str) -> None:
    assert {address for _, address in documented(column)} == {"127.0.0.1"}


def test_the_store_of_a_group_listens_at_one_address() -> None:
    before = listening(os.getpid())
    port = process_group.listen("127.0.0.1")
    process_group.join(0, 1, "127.0.0.1", port, backend="gloo", timeout=process_group.timedelta(seconds=30))
    try:
        total = torch.ones(1)
        dist.all_reduce(total)
        opened = listening(os.getpid()) - before
        assert ("127.0.0.1", port) in opened and {address for address, _ in opened} == {"127.0.0.1"}
    finally:
        dist.destroy_process_group()


START_RAY = """
import json, os, sys
import ray
started = []
def init(**options):
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    started.append({"options": options, "node": ray.util.get_node_ip_address(), **{name: os.environ[name] for name in names}})
ray.init, ray.nodes, ray.shutdown = init, lambda: [], lambda: None
from orchestrator.cluster.ray_cluster import start_ray
from orchestrator.study.schema import Slot
start_ray(None, Slot(workers=int(sys.argv[1])))
print(json.dumps(started, default=str))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_is_started_on_loopback_with_a_token(workers: int) -> None:
    run = subprocess.run([sys.executable, "-c", START_RAY, str(workers)], capture_output=True, text=True, check=True)
    (started,) = json.loads(run.stdout)
    options = started["options"]
    assert (options["address"], options["dashboard_host"], started["node"]) == ("local", "127.0.0.1", "127.0.0.1")
    assert options["include_dashboard"] is (workers > 1)
    assert started["RAY_AUTH_MODE"] == "token" and len(started["RAY_AUTH_TOKEN"]) == 64
    assert started["GLOO_SOCKET_IFNAME"] == started["NCCL_SOCKET_IFNAME"] == "lo"


def test_mlflow_is_started_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the servers for a cluster's head and for `make ui`."""
    started: list[list[str]] = []

    class Server:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

        def wait(self, _: float) -> int:
            return 0

        def terminate(self) -> None:
            pass

    make = subprocess.run(["make", "-n", "ui"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(mlflow_server.subprocess, "Popen", Server)
    assert mlflow_server.serve(Storage(str(tmp_path)), tmp_path / "mlflow.db", 5001, 1.0) == 0
    (tmp_path / "mlflow.db").touch()
    (words,) = re.findall(r"-m orchestrator\.command (ui .*)", make)
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    command.main([*words.split(), "--storage", str(tmp_path)])
    assert len(started) == 2
    for each in started:
        assert re.findall(r"--host[ =](\S+)", " ".join(each)) == ["127.0.0.1"], each


@pytest.mark.parametrize("file", ["cluster.yaml", "cluster-local.yaml"])
def test_the_dashboard_of_a_cluster_is_on_loopback_and_each_ray_asks_for_a_token(file: str) -> None:
    config, _ = read_yaml(str(ROOT / file))
    starts = [
        c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in config[key] if "ray start" in c
    ]
    assert [re.findall(r"--dashboard-host=(\S+)", start) for start in starts] == [["127.0.0.1"], []]
    assert all(start.startswith("export RAY_AUTH_MODE=token") for start in starts)


def test_no_socket_of_ours_is_opened_at_every_address() -> None:
    """No text in the code is an address of every interface, and no socket is bound to the empty one."""
    for file in (file for room in ("orchestrator", "trainables") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant):
                assert node.value not in ("0.0.0.0", "::", "[::]"), f"{file}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("bind", "create_server"):
                (address,) = node.args
                assert isinstance(address, ast.Tuple) and ast.unparse(address.elts[0]) != "''", f"{file}:{node.lineno}"


SECRETS = {
    name: f"CANARY-{name}" for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "FSSPEC_SFTP_PASSWORD")
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_what_listens_is_what_the_document_says_and_no_secret_gets_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    arms = "arms: {short: {phases.distil.budget.steps: 30}, alone: {phases.distil.terms.soft.weight: 0}, taught: {}}"
    study = write_study(tmp_path, steps=100, rest=f"{arms}\nseeds: 1\nslot: {{workers: {workers}}}")
    bench = Bench(tmp_path)
    away = ("--tracking-uri", "http://someone:CANARY-uri@127.0.0.1:1/?token=CANARY-query", "--tracking-later")
    driver = bench.start(study, *(away if workers == 1 else ()))
    while not (own := command_line(driver.pid)):  # what the user typed; empty while the process begins
        time.sleep(0.01)
    seen: set[tuple[str, str]] = set()
    commands: set[str] = set()
    begun: set[tuple[int, str]] = set()
    tokens: set[str] = set()
    logs: set[Path] = set()
    try:
        while driver.poll() is None:
            for pid, command in tree(driver.pid).items():
                seen |= {(process_kind(command), address) for address, _ in listening(pid)}
                if process_kind(command) == "gcs_server":
                    logs |= {Path(path) for path in re.findall(r"--log_dir=(\S+)/logs", command)}
                    with contextlib.suppress(OSError):
                        environment = Path(f"/proc/{pid}/environ").read_text()
                        tokens |= set(re.findall(r"(?:^|\0)RAY_AUTH_TOKEN=(\w+)", environment))
                if command == own:  # a process that is just being started still shows the driver's
                    continue
                if command in own and (pid, command) not in begun:  # or a part of it; seen again, it is its own
                    begun.add((pid, command))
                    continue
                commands.add(command)
            time.sleep(0.3)
        said = finish(driver)
    finally:
        bench.close()
    column = "one worker" if workers == 1 else "several workers"
    assert seen == documented(column), (
        f"not documented: {seen - documented(column)}; not seen: {documented(column) - seen}"
    )
    (token,), (session,) = tokens, logs
    assert len(token) == 64
    ends = tables(tmp_path / "runs").trials
    assert set(ends["status"]) == {"ended"}
    text = said.out + said.err + "\n".join(commands) + "".join(frame.to_json() for frame in vars(tables(tmp_path / "runs")).values())  # fmt: skip
    assert not (shown := [command for command in commands if "CANARY" in command]), shown
    assert "CANARY" not in text and token not in text
    assert ("http://***@127.0.0.1:1/?***" in said.out) is (workers == 1)
    for folder in (tmp_path, session):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 5
        for path in files:
            content = path.read_bytes()
            assert b"CANARY" not in content and token.encode() not in content, path
    shutil.rmtree(session, ignore_errors=True)
