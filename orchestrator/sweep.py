"""The command: one study file in, a report out. Parses arguments and calls few functions.

    python -m orchestrator.sweep search_spaces/dwt.yaml

Exit 0: every planned trial has an outcome, or a limit came. 1: an arm lacks a planned seed for good, nothing ended, or
the storage cannot be written. 2: bad file or argument. 130: Ctrl-C; 143: SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cli import add_study_arguments, hours_above_zero, positive_count, provenance
from orchestrator.study.errors import StudyError, redact
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from trainables.storage.files import Storage, as_json, check_writable
from trainables.storage.phase_store import PhaseStore

Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        study = load_study(
            arguments.study, arguments.profile, arguments.set, points=arguments.points, seeds=arguments.seeds
        )
        if arguments.drain or arguments.stop:
            return _request(study, arguments)
        return _plan_only(study, arguments) if arguments.dry_run else _sweep(study, arguments)
    except StudyError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first trial, or while the report is written
        print("\ninterrupted; nothing that finished is lost. The same command again goes on")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.sweep", description="Answers the question of a study file."
    )
    add_study_arguments(parser)
    parser.add_argument("--points", type=positive_count, metavar="N", help="points of the search, in total")
    parser.add_argument("--seeds", type=positive_count, metavar="N", help="seeds of each arm, in total")
    parser.add_argument(
        "--address", metavar="A", help="a running Ray, e.g. auto; by default Ray is started on this machine"
    )
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow; by default sqlite in the storage (./runs/mlflow.db)"
    )
    parser.add_argument(
        "--tracking-later", action="store_true", help="go on where MLflow does not answer; the next start catches up"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; writes nothing")
    parser.add_argument(
        "--fresh", action="store_true", help="rename the study's folder aside and start anew; phases are kept"
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="run trials again that failed or were stopped by hand"
    )
    parser.add_argument(
        "--hours",
        type=hours_above_zero,
        metavar="H",
        help="after so long what runs is left at a checkpoint; the report says what is to do",
    )
    parser.add_argument(
        "--drain", action="store_true", help="ask the sweep that runs to finish what runs and start nothing new"
    )
    parser.add_argument("--stop", metavar="ID", help="ask the sweep that runs to stop one trial for good")
    return parser


def _request(study: Study, arguments: argparse.Namespace) -> int:
    from orchestrator.analysis.tables import open_storage
    from orchestrator.scheduling.shutdown import request

    print(request(open_storage(arguments.storage).sub(study.folder), drain=arguments.drain, stop=arguments.stop))
    return 0


def _plan_only(study: Study, arguments: argparse.Namespace) -> int:
    from orchestrator.analysis.tables import open_storage
    from orchestrator.planning.preview import print_plan
    from orchestrator.scheduling.scheduler import Agenda
    from orchestrator.scheduling.trials import Fingerprints

    agenda = Agenda(study, Fingerprints(None), open_storage(arguments.storage), retry_failed=arguments.retry_failed)
    print_plan(agenda, None)
    return 0


def _sweep(study: Study, arguments: argparse.Namespace) -> int:
    from orchestrator.analysis.tables import open_storage
    from orchestrator.mlflow_sync import Mirror
    from orchestrator.planning.preview import print_plan
    from orchestrator.scheduling.progress import Progress
    from orchestrator.scheduling.scheduler import Agenda
    from orchestrator.scheduling.shutdown import Ending, only_driver
    from orchestrator.scheduling.trials import Fingerprints

    started = time.monotonic()  # preparing data counts, too, where hours are bought
    storage = open_storage(arguments.storage)
    home = storage.sub(study.folder)
    _check_storage(arguments.storage)
    with only_driver(home):
        if arguments.fresh and home.list():
            aside = f"{study.folder}-{time.strftime('%Y%m%d-%H%M%S')}"
            storage.move(study.folder, aside)
            print(f"the folder {study.folder} is now {aside}")
        agenda = Agenda(study, Fingerprints(storage.sub("data").uri), storage, retry_failed=arguments.retry_failed)
        print_plan(agenda, None)
        recorded = provenance(study)
        _keep_study(study, home, recorded)
        mirror = Mirror(
            arguments.tracking_uri or _default_tracking(storage), study.folder, tags={"question": study.question}
        )
        progress = Progress(agenda, storage.uri)
        agenda.listeners += [progress.on_trial, lambda row, records: mirror.put(row, records)]
        ending = Ending(agenda, arguments.hours, progress.say, started)
        try:
            _run(agenda, arguments, recorded, mirror, progress, ending)
        except KeyboardInterrupt:
            ending.signal = None if agenda.broken else ending.signal or signal.SIGINT
        try:
            return _finish(study, agenda, home, mirror, recorded, arguments, ending.signal)
        except OSError as error:
            print(f"{error.strerror or error}: tables and report could not be written to {home.uri}; nothing that finished "
                  f"is lost. Make room there, then run the same command again", file=sys.stderr)  # fmt: skip
            return 1


def _run(agenda: Any, arguments: argparse.Namespace, provenance: Row, mirror: Any, progress: Any, ending: Any) -> None:
    """Starts Ray only where something is left to do: the same command again trains nothing and is quick."""
    mirror_started = False
    if not agenda.is_complete():
        from orchestrator.cluster import ray_cluster
        from orchestrator.scheduling import tune_runner

        mirror.start()
        mirror_started = True
        try:
            num_slots = ray_cluster.start_ray(arguments.address, agenda.study.slot, arguments.storage)
        except ray_cluster.NotStarted as error:
            agenda.closed, agenda.broken = str(error), True
            return
        if num_slots < 1:
            raise StudyError(
                f"no slot fits: a trial asks for {agenda.study.slot.cpus:g} cpus and {agenda.study.slot.gpus:g} gpus"
            )
        try:
            _check_tracking(mirror, arguments.tracking_later)
            progress.begin(num_slots)

            def tick() -> None:
                ending.tick()
                progress.tick()

            with ending:
                tune_runner.run_agenda(agenda, num_slots, provenance=provenance, on_tick=tick, say=progress.say)
        finally:
            progress.done()
            ray_cluster.stop_ray()
    if not mirror_started:
        mirror.start()


def _check_tracking(mirror: Any, later: bool) -> None:
    """Where MLflow does not answer at the start, a person chooses: nothing is lost without it, and little is seen."""
    problem = mirror.first_answer(12.0)
    if problem is None:
        return
    print(problem)
    if later:
        return
    if sys.stdin.isatty() and input("go on without it? The next start catches up. [y/N] ").strip().lower() == "y":
        return
    raise StudyError("MLflow does not answer; start it, or add --tracking-later: the next start then catches up")


def _finish(
    study: Study,
    agenda: Any,
    home: Storage,
    mirror: Any,
    provenance: Row,
    arguments: argparse.Namespace,
    signal_number: int | None,
) -> int:
    """Tables, report, the mirror's end, and what to do next."""
    from orchestrator.analysis import tables as tables_
    from orchestrator.reporting.page import make_report

    rows = agenda.all_rows()
    tables = tables_.tables(study.folder, rows, agenda.records, PhaseStore(agenda.storage).examples)
    tables_.write(tables, home)
    evaluator, importance = agenda.importance() or ("", None)
    report = make_report(study, tables, provenance, importance=importance, evaluator=evaluator)
    home.write("report.html", report.html.encode())
    home.write("report.md", report.markdown.encode())
    for row in rows:
        mirror.put(row, agenda.records.get(row["trial"], []))
    artifacts = (
        [home.path(name) for name in ("report.html", "report.md", *(f"{table}.parquet" for table in tables_.TABLES))]
        if home.is_local
        else []
    )
    mirror.finish("stopped" if signal_number or agenda.closed else "ended", artifacts)
    undelivered = mirror.close(5.0 if signal_number == signal.SIGTERM else 30.0)
    if undelivered and mirror.problem:
        print(mirror.problem)
    command = f"python -m orchestrator.sweep {' '.join(_same_arguments(arguments))}"
    if signal_number:
        print(f"\ninterrupted; nothing that finished is lost. To go on: {command}")
        return 128 + signal_number
    print(
        f"\n{_headline(report.markdown)}\nreport: {home.uri}/report.html   tables: {home.uri}/*.parquet   MLflow: make ui"
    )
    for fault, num in Counter(agenda.unused).items():
        print(f"not used: {num} slot{'s' if num > 1 else ''} on {fault}")
    if agenda.closed:
        print(f"{agenda.closed}; nothing that finished is lost. Still to run: {agenda.num_left()}. To go on: {command}")
    if agenda.broken:
        return 1
    planned = [row for row in rows if row["planned"] and row["kind"] != "teacher"]
    over = ("failed", "stopped")
    lacking = [row for row in planned if row["arm"] and row["kind"] == "trial" and row["status"] in over]
    nothing = not agenda.closed and not any(row["status"] == "ended" for row in planned)
    if lacking or nothing:
        for row in lacking:
            print(
                f"arm {row['arm']} lacks seed {row['seed']}: {row['reason']} ({home.uri}/trials/{row['trial']}/log.txt)"
            )
        return 1
    return 0


def _headline(markdown: str) -> str:
    """The verdicts as the report has them."""
    lines = [
        line for line in markdown.splitlines() if any(word in line for word in ("supported", "refuted", "undecided"))
    ]
    return "\n".join(lines[:6])


def _same_arguments(arguments: argparse.Namespace) -> Iterator[str]:
    yield shlex.quote(arguments.study)
    for name in ("profile", "points", "seeds", "address", "storage", "tracking_uri", "hours"):
        value = getattr(arguments, name)
        if value is not None and (name, value) != ("storage", "./runs"):
            shown = redact(value) if name == "tracking_uri" else str(value)
            yield f"--{name.replace('_', '-')} {shlex.quote(shown)}"
    yield from (f"--set {shlex.quote(override)}" for override in arguments.set)


def _default_tracking(storage: Storage) -> str:
    folder = storage.path() if storage.is_local else Path("runs").absolute()
    return f"sqlite:///{folder}/mlflow.db"


def _check_storage(uri: str) -> None:
    try:
        check_writable(uri)
    except Exception as error:
        detail = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StudyError(f"--storage {uri}: cannot be written ({detail}); give a folder or URI that can") from None


def _keep_study(study: Study, home: Storage, provenance: Row) -> None:
    """The resolved study, before the first trial; an older, different one is kept under a number."""
    text = as_json(study.model_dump(mode="json", by_alias=True))
    old = home.read("study.yaml")
    if old is not None and old != text:
        number = 1 + sum(name.startswith("study-") for name in home.list())
        home.write(f"study-{number}.yaml", old)
    home.write("study.yaml", text)
    home.write("provenance.json", as_json(dict(provenance)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main())
