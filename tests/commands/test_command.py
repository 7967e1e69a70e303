"""Tests the command `codistill`: that it is the other commands, is quick to help, and writes studies that plan."""

from __future__ import annotations

import builtins
import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from orchestrator import command, sweep
from orchestrator.scheduling import trial_files
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import Fingerprints
from orchestrator.scheduling.watch import progress
from orchestrator.study.load import load_study
from tests.commands.test_notebook import folder  # noqa: F401
from tests.commands.test_user_path import QUICK, rows, save, tokenizer_of, write
from tests.support.source_tree import ROOT
from tests.support.studies import run_trials
from trainables.data.instructions.templates import alpaca
from trainables.storage.files import Storage

HEAVY = "torch, ray, mlflow, pandas, matplotlib, datasets, transformers"


def test_the_help_of_each_command_imports_nothing_heavy_and_shows_an_example() -> None:
    code = f"""if True:
        import contextlib, io, sys
        from orchestrator import command
        for words in ([], *([name] for name in command.COMMANDS)):
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                command.main([*words, "--help"])
            examples = [command.COMMANDS[words[0]].example] if words else [c.example for c in command.COMMANDS.values()]
            assert all(example in " ".join(out.getvalue().split()) for example in examples), out.getvalue()
        print([name for name in "{HEAVY}".split(", ") if name in sys.modules])"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("name", [name for name, known in command.COMMANDS.items() if known.module])
def test_it_is_the_module_form_with_the_same_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known, said = command.COMMANDS[name], list[list[str]]()
    module = importlib.import_module(f"orchestrator.{known.module}")
    monkeypatch.setattr(module, "main", lambda words: said.append(words) or 7)
    words = shlex.split(known.example)[1:]
    assert command.main([name, *words]) == 7 and said == [[*words, *known.extra]]


def test_the_console_script_is_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["codistill"].partition(":")
    assert module == command.__name__ and callable(getattr(command, name))


def test_an_unknown_command_is_named_with_those_that_are_known(capsys: Any) -> None:
    assert command.main(["train", "x.yaml"]) == 2
    assert "no command 'train'; expected new, plan, run" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- new


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with models, and data of each sort."""
    home = tmp_path_factory.mktemp("mine")
    write(home / "mine.jsonl", rows())
    tok = tokenizer_of([alpaca(row["question"]) + row["answer"] for row in rows()])
    tok.pad_token = tok.eos_token  # tasks pad
    save(home / "big", tok, width=32, layers=3)
    save(home / "small", tok)
    about = json.loads((home / "big" / "config.json").read_text())
    (home / "big" / "config.json").write_text(json.dumps({**about, "pad_token_id": tok.pad_token_id}))
    with (home / "task.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["review", "sentiment"])
        table.writerows((row["question"], "true" if "one" in row["question"] else "no") for row in rows())
    documents = [f"Of {row['question']} {row['answer'] * 3} {number * 7919}" for number, row in enumerate(rows() * 3)]
    (home / "text.txt").write_text("\n\n".join(documents))
    return home


CASES = {
    "instructions": ["--student", "small", "--data", "mine.jsonl"],
    "classification": ["--layers", "2", "--data", "task.csv"],
    "text": ["--layers", "1", "--data", "text.txt"],
}


@pytest.mark.parametrize("task", CASES)
def test_a_new_study_loads_and_names_its_next_commands(
    task: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(home)
    file = str(tmp_path / "it's mine.yaml")  # in another folder: paths in a study start at its file
    assert command.main(["new", file, "--teacher", "big", *CASES[task]]) == 0
    said = capsys.readouterr().out
    assert f"a study of {task}" in said
    assert [shlex.split(line)[1:] for line in said.splitlines()[1:]] == [
        [command.PROG, c, file] for c in ("plan", "run")
    ]
    study = load_study(file)
    spec = study.spec(arm="taught", seed=0)
    assert spec.models["teacher"].pretrained == str(home / "big")
    assert spec.data["mine"].train == str(home / CASES[task][-1])  # type: ignore[union-attr]
    text = Path(file).read_text()
    assert command.main(["new", file, "--teacher", "big", *CASES[task]]) == 2
    assert "is there already" in capsys.readouterr().err and Path(file).read_text() == text
    if task == "classification":
        assert 'classes: [no, "true"]' in text and "{first: review, label: sentiment}" in text


def test_the_tutorials_arms_are_arms_of_a_new_study(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    new, file = tmp_path / "new.yaml", tmp_path / "mine.yaml"
    assert command.main(["new", str(new), "--teacher", "big", "--layers", "2", "--data", "mine.jsonl"]) == 0
    before, _, after = new.read_text().partition("arms:\n")
    file.write_text(before + block + after[after.index("claims:") :])
    study = load_study(file)
    assert len(study.arms) == 6 and study.spec(arm="own_replies", seed=0).pruned().models_of("distil")


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_a_new_study_plans(task: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(home)
    file = str(tmp_path / "mine.yaml")
    assert command.main(["new", file, "--teacher", "big", *CASES[task]]) == 0
    assert command.main(["plan", file, "--storage", str(tmp_path / "runs")]) == 0, capsys.readouterr().err
    assert "teacher_helps: taught is better than alone" in capsys.readouterr().out


@pytest.mark.slow
def test_a_new_study_runs_to_its_end(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    file = tmp_path / "mine.yaml"
    assert command.main(["new", str(file), "--teacher", "big", "--layers", "2", "--data", "mine.jsonl"]) == 0
    short = [*QUICK, *(f"trial.phases.{phase}.budget={{steps: 2}}" for phase in ("teach", "distil"))]
    storage = Storage(str(tmp_path / "runs"))
    scheduler = Scheduler(load_study(file, overrides=short, seeds=1), Fingerprints(storage.sub("data").uri), storage)
    run_trials(scheduler)
    rows_ = scheduler.ledger.all_rows()
    assert [row["status"] for row in rows_] == ["ended"] * len(rows_) and {row["arm"] for row in rows_} >= {
        "alone",
        "taught",
    }
    assert "arms 2/2" in progress(scheduler.study, scheduler.ledger.home)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "none.jsonl", "--student", "small"], "no file matches"),
        (["--data", "mine.jsonl", "--layers", "3"], "the teacher has 3 layers"),
        (["--data", "mine.jsonl", "--student", "small", "--task", "text"], "cannot tell what its columns are: question, answer"),
        (["--data", "task.csv", "--student", "small", "--columns", "label=review"], "has 81 different labels" ),
        (["--data", "odd.jsonl", "--student", "small"], "name messages (instructions) or prompt and response (instructions)"),
        (["--data", "mine.jsonl", "--student", "small", "--teacher", "./nowhere"], "no weights at './nowhere'"),
    ],
)  # fmt: skip
def test_what_makes_no_study_is_refused_and_leaves_no_file(
    words: list[str], said: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(home)
    (home / "odd.jsonl").write_text('{"a": "x", "b": "y"}\n')
    file = tmp_path / "mine.yaml"
    monkeypatch.setattr("orchestrator.study.new.MOST_CLASSES", 20)
    assert command.main(["new", str(file), "--teacher", "big", *words]) == 2
    assert said in (text := capsys.readouterr().err) and text.count("\n") == 1 and not file.exists()


def test_a_model_that_chats_gets_its_own_template(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    words = ["--teacher", "big", "--student", "chatty", "--data", "mine.jsonl"]
    shutil.copytree("small", "chatty")
    Path("chatty/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert command.main(["new", str(tmp_path / "mine.yaml"), *words]) == 0
    assert load_study(tmp_path / "mine.yaml").trial["data"]["mine"]["template"] == "chat"


def test_columns_of_other_names_are_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "odd.jsonl").write_text('{"a": "x", "b": "y"}\n' * 50)
    file = str(tmp_path / "mine.yaml")
    columns = ["--columns", "prompt=a", "response=b"]
    assert command.main(["new", file, "--teacher", "big", "--student", "small", "--data", "odd.jsonl", *columns]) == 0
    assert load_study(file).trial["data"]["mine"]["columns"] == {"prompt": "a", "response": "b"}


def test_on_a_terminal_new_asks_for_what_is_missing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(home)
    answers = iter(["big", "2", "mine.jsonl"])
    monkeypatch.setattr(builtins, "input", lambda _: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert command.main(["new", str(tmp_path / "mine.yaml")]) == 0
    assert load_study(tmp_path / "mine.yaml").trial["models"]["student"]["layers"] == 2
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main(["new", str(tmp_path / "other.yaml")])
    assert "--teacher is missing" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- while a study runs, after


def test_progress_counts_stages_and_names_what_runs(tmp_path: Path) -> None:
    study, home = load_study(ROOT / "search_spaces" / "smoke.yaml"), Storage(str(tmp_path))
    rest = " | search 0/6 .................... | confirm 0/4 ...................."
    assert progress(study, home) == f"arms 0/4 ....................{rest}"
    for number, (arm, value) in enumerate([("alone", 3.0), ("taught", 2.0), ("alone", None)]):
        row = {"kind": "trial", "arm": arm, "point": arm, "seed": number // 2, "status": "running"}
        trial_files.write_start(home, f"t{number}", row)
        if value is not None:
            record = {"metric": "mlm_loss", "split": "dev", "model": "student", "progress": 1.0, "phase": "distil",
                      "task": "corpus", "value": value}  # fmt: skip
            home.write(f"trials/t{number}/attempt-1/records.jsonl", json.dumps(record).encode() + b"\n")
            trial_files.write_end(home, f"t{number}", {**row, "status": "ended", "attempts": 1})
    assert progress(study, home) == (
        f"arms 2/4 ##########..........{rest} | running: alone seed 1 | best so far: taught, mlm_loss 2 on dev"
    )


def test_watch_ends_where_no_sweep_runs(tmp_path: Path, capsys: Any) -> None:
    smoke = str(ROOT / "search_spaces" / "smoke.yaml")
    assert command.main(["watch", smoke, "--storage", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.endswith("no sweep of smoke is running\n")


@pytest.mark.parametrize(("words", "asked"), [(["3f2a"], ["--stop", "3f2a"]), ([], ["--drain"])])
def test_stop_asks_the_sweep(words: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[list[str]]()
    monkeypatch.setattr(sweep, "main", lambda words: said.append(words) or 0)
    assert command.main(["stop", "x.yaml", *words, "--profile", "gpu", "--set", "seeds=3", "--storage", "s"]) == 0
    assert said == [["x.yaml", "--storage", "s", "--profile", "gpu", "--set", "seeds=3", *asked]]


def test_compare_prints_verdicts_side_by_side(folder: Path, capsys: Any) -> None:  # noqa: F811
    assert command.main(["compare", str(folder), str(folder.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "helps: taught against alone, mlm_loss" in lines[0] and f"{folder.name}: helps" in lines[3]
    assert [line.split()[0] for line in lines[1:3]] == [str(folder), str(folder.parent)] and ", n 2" in lines[1]
    assert command.main(["compare", str(folder / "trials")]) == 2
    assert "no tables of a study" in capsys.readouterr().err


def test_ui_opens_the_database_of_the_storage_on_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command.main(["ui", "--storage", str(tmp_path)]) == 2
    assert "no MLflow database" in capsys.readouterr().err
    (tmp_path / "mlflow.db").touch()
    said = list[list[str]]()
    monkeypatch.setattr(os, "execv", lambda _, words: said.append(words))
    command.main(["ui", "--storage", str(tmp_path), "--port", "5999"])
    assert said[0][1:5] == ["-m", "mlflow", "ui", "--backend-store-uri"] and f"{tmp_path}/mlflow.db" in said[0][5]
    assert said[0][6:] == ["--host", "127.0.0.1", "--port", "5999"]
