"""The command `codistill`: the other commands under one name, and what a person needs around them.

    codistill new mine.yaml --teacher models/big --student models/small --data mine.jsonl
    codistill run mine.yaml

Each command is imported once it is asked for, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cluster.machine import start

PROG = "codistill"


@dataclass(frozen=True)
class Command:
    """A word after `codistill`. `module`: the command in module form that takes the same arguments, and `extra`."""

    about: str
    example: str
    module: str | None = None
    extra: tuple[str, ...] = ()


COMMANDS = {
    "new": Command("write a study of your own models and data",
                   "new mine.yaml --teacher models/big --student models/small --data mine.jsonl"),
    "plan": Command("print what a study would run and cost", "plan mine.yaml", "sweep", ("--dry-run",)),
    "run": Command("run a study, or go on with it", "run mine.yaml --hours 8", "sweep"),
    "watch": Command("show how far a running study is", "watch mine.yaml"),
    "stop": Command("end a running study, or one of its trials", "stop mine.yaml 3f2a"),
    "report": Command("write a study's report again", "report mine.yaml", "report"),
    "compare": Command("print the verdicts of several studies or storages", "compare runs/mine runs/mine-gpu"),
    "export": Command("write a trained model as a folder", "export mine.yaml --arm taught --to my-student", "export"),
    "store": Command("list the storage, and delete what is unused", "store --prune", "store"),
    "check": Command("check your own losses and metrics", "check my_methods.py", "check"),
    "ui": Command("open MLflow on the storage's database", "ui --storage runs"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"error: no command {name!r}; expected {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if command.module is None:
        return OWN[name](words[1:])
    module = importlib.import_module(f"orchestrator.{command.module}")
    if {"-h", "--help"} & set(words[1:]):
        print(f"{PROG} {name}: {command.about}, e.g. {PROG} {command.example}\n"
              f"It takes the arguments of python -m orchestrator.{' '.join((command.module, *command.extra))}:\n")  # fmt: skip
    return int(module.main([*words[1:], *command.extra]))


def overview() -> str:
    """Returns the help of all commands: what each does, an example, and its module form."""
    lines = [f"usage: {PROG} COMMAND …        {PROG} COMMAND --help lists its arguments", ""]
    for name, command in COMMANDS.items():
        form = (
            f"  =  python -m orchestrator.{' '.join((command.module, '…', *command.extra))}" if command.module else ""
        )
        lines += [f"  {name:8}  {command.about}{form}", f"            {PROG} {command.example}"]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------- new


def new(words: Sequence[str]) -> int:
    """Writes a study file from flags; on a terminal it asks for what is missing."""
    parser = _parser("new")
    add = parser.add_argument
    add("file", metavar="STUDY.yaml", type=os.path.expanduser, help="the file to write; it must not exist")
    add("--teacher", metavar="MODEL", help="the model that teaches: a folder, or an id of the hub")
    add("--student", metavar="MODEL", help="the model that learns: a folder, or an id of the hub")
    add("--layers", type=int, metavar="N", help="instead of --student: so many layers of the teacher")
    add("--data", metavar="FILE", help="JSON lines, Parquet, CSV or text: a path or a glob")
    add("--task", choices=("instructions", "classification", "text"), help="by default as the columns are named")
    add("--columns", nargs="+", default=[], metavar="field=column", help="e.g. prompt=q response=a")
    add("--question", metavar="Q", help="what the report shall answer")
    given = parser.parse_args(words)

    def asked(value: str | None, question: str, flag: str) -> str:
        if value is None and sys.stdin.isatty():
            value = input(f"{question}: ").strip()
        if not value:
            parser.error(f"{flag} is missing: {question.lower()}")
        return value

    teacher = asked(given.teacher, "Folder or hub id of the model that teaches", "--teacher")
    student = given.student
    if student is None and given.layers is None:
        student = asked(
            None, "Folder or hub id of the model that learns, or a number of layers of the teacher", "--student"
        )
        given.layers, student = (int(student), None) if student.isdigit() else (None, student)
    data = asked(given.data, "File with the data", "--data")
    if wrong := [pair for pair in given.columns if "=" not in pair]:
        parser.error(f"--columns {wrong[0]}: expected field=column, e.g. prompt=q")
    from orchestrator.study.errors import StudyError
    from orchestrator.study.new import NewStudy

    columns = dict(pair.split("=", 1) for pair in given.columns)
    study = NewStudy(teacher, data, student, given.layers, given.task, columns, given.question)
    try:
        task = study.write(given.file)
    except StudyError as error:
        return _refused(error)
    file = shlex.quote(given.file)
    print(f"{given.file}: a study of {task}\nnext: {PROG} plan {file}\nthen: {PROG} run {file}")
    return 0


# ----------------------------------------------------------------------------------------------- while a study runs, after


def watch(words: Sequence[str]) -> int:
    """Prints a line whenever something changes, until no sweep drives the study; Ctrl-C leaves, and ends nothing."""
    from orchestrator.cli import add_study_arguments, open_storage
    from orchestrator.study.errors import StudyError
    from orchestrator.study.load import load_study

    parser = _parser("watch")
    add_study_arguments(parser)
    given = parser.parse_args(words)
    from orchestrator.scheduling.shutdown import is_driven
    from orchestrator.scheduling.watch import progress

    try:
        study = load_study(given.study, given.profile, given.set, extension=given.extension)
        home = open_storage(given.storage).sub(study.folder)
        before = None
        while True:
            is_open = is_driven(home) is not False  # asked first, so that the last line shows the end
            if (line := progress(study, home)) != before:
                print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            before = line
            if not is_open:
                report = f"; report: {home.uri}/report.html" if home.read("report.html") else ""
                print(f"no sweep of {study.name} is running{report}")
                return 0
            time.sleep(2.0)
    except StudyError as error:
        return _refused(error)


def stop(words: Sequence[str]) -> int:
    """Asks the running sweep to stop one trial for good, or to finish what runs and start nothing new."""
    from orchestrator.cli import add_study_arguments

    parser = _parser("stop")
    add_study_arguments(parser)
    parser.add_argument(
        "trial", nargs="?", metavar="ID", help="a trial by the start of its id; by default the whole study"
    )
    given = parser.parse_args(words)
    what = ["--stop", given.trial] if given.trial else ["--drain"]
    profile = ["--profile", given.profile] if given.profile else []
    sets = [word for override in given.set for word in ("--set", override)]
    sweep = importlib.import_module("orchestrator.sweep")
    own = ["--extension", given.extension] if given.extension else []
    return int(sweep.main([given.study, "--storage", given.storage, *profile, *sets, *own, *what]))


def compare(words: Sequence[str]) -> int:
    """Prints each claim's verdict, effect, interval and seeds side by side, for studies or for whole storages."""
    parser = _parser("compare")
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="of a study (runs/mine), or a storage with studies (runs)"
    )
    folders = parser.parse_args(words).folders
    from orchestrator.notebook import load
    from orchestrator.study.errors import StudyError

    cells: dict[tuple[str, str], dict[str, str]] = {}
    try:
        for folder in folders:
            for name, path in _studies(folder):
                for row in load(path).claims.to_dict("records"):
                    number = "{effect:+.4g} [{low:.4g}, {high:.4g}]" if row["n"] > 1 else "no interval"
                    claim = "{claim}: {arm} against {against}, {metric}".format_map(row)
                    shown = cells.setdefault((name, claim), {})
                    shown[folder] = f"{{verdict}}, {number}, n {{n}}".format_map(row)
    except StudyError as error:
        return _refused(error)
    for (name, claim), shown in cells.items():
        print(f"{name}{': ' if name else ''}{claim}")
        for folder in folders:
            print(f"    {folder:{max(map(len, folders))}}  {shown.get(folder, '-')}")
    return 0


def _studies(folder: str) -> Iterator[tuple[str, str]]:
    """Yields (name, path) of the studies in a storage; of a study's own folder, the folder without a name."""
    from orchestrator.cli import open_storage

    storage = open_storage(folder)
    names = [name for name in storage.list() if storage.read(f"{name}/results.parquet") is not None]
    yield from [(name, f"{folder.rstrip('/')}/{name}") for name in names] or [("", folder)]


def ui(words: Sequence[str]) -> int:
    """Runs MLflow on loopback over the database that sweeps of this storage write."""
    from orchestrator.cli import add_storage_argument
    from orchestrator.study.paths import sqlite_uri

    parser = _parser("ui")
    add_storage_argument(parser)
    parser.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default 5000)")
    given = parser.parse_args(words)
    database = Path(given.storage).absolute() / "mlflow.db"
    if "://" in given.storage or not database.is_file():
        print(f"error: no MLflow database at {given.storage}/mlflow.db; give the --storage of a sweep that ran on this machine "
              f"without --tracking-uri", file=sys.stderr)  # fmt: skip
        return 2
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", sqlite_uri(database), "--host", "127.0.0.1"]
    print(f"MLflow on http://127.0.0.1:{given.port}; Ctrl-C ends it", flush=True)
    os.execv(
        sys.executable, [*command, "--port", str(given.port)]
    )  # MLflow takes this process's place, and its signals


OWN: dict[str, Callable[[Sequence[str]], int]] = {
    "new": new,
    "watch": watch,
    "stop": stop,
    "compare": compare,
    "ui": ui,
}


def _parser(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    return argparse.ArgumentParser(
        prog=f"{PROG} {name}", description=f"{command.about.capitalize()}.", epilog=f"example: {PROG} {command.example}"
    )


def _refused(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def script() -> None:
    """Runs the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    start(main)


if __name__ == "__main__":
    script()
