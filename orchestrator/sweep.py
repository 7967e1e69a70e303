"""The command that runs a study: one study file in, a report out.

    python -m orchestrator.sweep search_spaces/dwt.yaml

Exit 0: every planned trial has an outcome, or a limit has passed. 1: a planned seed of an arm failed or was stopped, no
trial ended, or the storage cannot be written. 2: bad file or argument. 130: Ctrl-C; 143: SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli import add_study_arguments, confirm, hours_above_zero, open_storage, positive_count, provenance
from orchestrator.cluster.machine import start
from orchestrator.study.errors import StudyError, redact
from orchestrator.study.load import load_study
from orchestrator.study.paths import sqlite_file, sqlite_uri
from orchestrator.study.schema import Study
from trainables.storage.files import Storage, as_json, check_writable

if TYPE_CHECKING:  # imported where they are used, so that `--help` is quick
    from orchestrator.mlflow_sync import Mirror
    from orchestrator.scheduling.progress import Progress
    from orchestrator.scheduling.scheduler import Scheduler
    from orchestrator.scheduling.shutdown import Ending

Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        study = load_study(
            arguments.study,
            arguments.profile,
            arguments.set,
            points=arguments.points,
            seeds=arguments.seeds,
            extension=arguments.extension,
        )
        if arguments.drain or arguments.stop:
            return _request(study, arguments)
        return _plan_only(study, arguments) if arguments.dry_run else _sweep(study, arguments)
    except StudyError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first trial, or while the report is written
        print("\ninterrupted; no finished trial is lost. The same command again goes on")
        return 130


def _parser() -> argparse.ArgumentParser:
    prog, what = "python -m orchestrator.sweep", "Answers the question of a study file."
    parser = argparse.ArgumentParser(prog=prog, description=what)
    add_study_arguments(parser)
    add = parser.add_argument
    add("--points", type=positive_count, metavar="N", help="points of the search, in total")
    add("--seeds", type=positive_count, metavar="N", help="seeds of each arm, in total")
    add("--address", metavar="A", help="a running Ray, e.g. auto; by default Ray is started on this machine")
    add(
        "--tracking-uri",
        metavar="URI",
        type=os.path.expanduser,
        help="MLflow; by default sqlite in the storage (./runs/mlflow.db)",
    )
    add("--tracking-later", action="store_true", help="go on if MLflow does not answer; the next start catches up")
    add("--dry-run", action="store_true", help="print the plan and stop; writes nothing")
    add("--fresh", action="store_true", help="rename the study's folder and start anew; phases are kept")
    add("--retry-failed", action="store_true", help="run failed trials again, and those stopped by hand")
    hours = "stop after H hours; running trials checkpoint and resume next time"
    add("--hours", type=hours_above_zero, metavar="H", help=hours)
    drain = "ask the running sweep to finish its running trials and start nothing new"
    add("--drain", action="store_true", help=drain)
    add("--stop", metavar="ID", help="ask the running sweep to stop one trial for good")
    return parser


def _request(study: Study, arguments: argparse.Namespace) -> int:
    from orchestrator.scheduling.shutdown import request

    print(request(open_storage(arguments.storage).sub(study.folder), drain=arguments.drain, stop=arguments.stop))
    return 0


def _plan_only(study: Study, arguments: argparse.Namespace) -> int:
    from orchestrator.planning.preview import print_plan
    from orchestrator.scheduling.scheduler import Scheduler
    from orchestrator.scheduling.trials import Fingerprints

    storage = open_storage(arguments.storage)
    print_plan(Scheduler(study, Fingerprints(None), storage, retry_failed=arguments.retry_failed))
    return 0


@dataclass
class Sweep:
    """One start of a study: what runs, who is told, and what ends it early."""

    study: Study
    arguments: argparse.Namespace
    provenance: Mapping[str, str]
    scheduler: Scheduler
    mirror: Mirror
    progress: Progress
    ending: Ending
    at_once: int  # trials that this machine can run at once


def _sweep(study: Study, arguments: argparse.Namespace) -> int:
    from orchestrator.analysis.claim_history import digest_of
    from orchestrator.mlflow_sync import Mirror
    from orchestrator.planning.preview import print_plan
    from orchestrator.scheduling.progress import Progress
    from orchestrator.scheduling.scheduler import Scheduler
    from orchestrator.scheduling.shutdown import Ending, only_driver
    from orchestrator.scheduling.trials import Fingerprints

    started = time.monotonic()  # `--hours` counts the preparation of data, too
    storage = open_storage(arguments.storage)
    home = storage.sub(study.folder)
    _check_storage(arguments.storage)
    with only_driver(home):
        if arguments.fresh and home.list():
            aside = f"{study.folder}-{time.strftime('%Y%m%d-%H%M%S')}"
            storage.move(study.folder, aside)
            print(f"the folder {study.folder} is now {aside}")
        fingerprints = Fingerprints(storage.sub("data").uri)
        scheduler = Scheduler(study, fingerprints, storage, retry_failed=arguments.retry_failed)
        at_once = print_plan(scheduler)
        recorded = provenance(study)
        _keep_study(study, home, recorded)
        tracking = arguments.tracking_uri or _default_tracking(storage)
        mirror = Mirror(tracking, study.folder, tags={"question": study.question, "claims": digest_of(study)})
        progress = Progress(scheduler)
        scheduler.ledger.listeners += [progress.on_trial, mirror.put]
        ending = Ending(scheduler, arguments.hours, progress.say, started)
        sweep = Sweep(study, arguments, recorded, scheduler, mirror, progress, ending, at_once)
        try:
            run(sweep)
        except KeyboardInterrupt:
            ending.signal = None if scheduler.is_broken else ending.signal or signal.SIGINT
        try:
            return _finish(sweep)
        except OSError as error:
            print(f"{error.strerror or error}: tables and report could not be written to {home.uri}; no finished trial is "
                  f"lost. Make room there, then run the same command again", file=sys.stderr)  # fmt: skip
            return 1


def run(sweep: Sweep) -> None:
    """Runs what is left to run. Starts Ray only for that: the same command again trains nothing and is quick."""
    sweep.mirror.start()
    scheduler, slot = sweep.scheduler, sweep.study.slot
    if scheduler.next() is None:
        return
    from orchestrator.cluster import ray_cluster
    from orchestrator.scheduling import tune_runner

    try:
        num_slots = ray_cluster.start_ray(sweep.arguments.address, slot, sweep.arguments.storage)
    except ray_cluster.NotStarted as error:
        scheduler.close(str(error), is_broken=True)
        return
    if sweep.arguments.address is None:
        num_slots = min(num_slots, sweep.at_once)
    if num_slots < 1:
        raise StudyError(f"no slot fits: a trial asks for {slot.cpus:g} cpus and {slot.gpus:g} gpus")
    try:
        _check_tracking(sweep.mirror, sweep.arguments.tracking_later)
        sweep.progress.begin(num_slots)

        def tick() -> None:
            sweep.ending.tick()
            sweep.progress.tick()

        with sweep.ending:
            tune_runner.run_trials(
                scheduler, num_slots, provenance=sweep.provenance, on_tick=tick, say=sweep.progress.say
            )
    finally:
        sweep.progress.done()
        ray_cluster.stop_ray()


def _check_tracking(mirror: Mirror, later: bool) -> None:
    """Lets the user choose where MLflow does not answer at the start: a sweep without it loses nothing, and shows little."""
    problem = mirror.first_answer(12.0)
    if problem is None:
        return
    print(problem)
    if later:
        return
    if sys.stdin.isatty() and confirm("continue without it? The next start catches up. [y/N] "):
        return
    raise StudyError(f"{mirror.advice}; or add --tracking-later: the next start then catches up")


def _finish(sweep: Sweep) -> int:
    """Writes tables and report, closes the mirror, and prints the verdicts and what to do next."""
    from orchestrator.analysis.claim_history import note_report
    from orchestrator.analysis.tables import TABLES, tables, write
    from orchestrator.reporting.page import make_report
    from trainables.storage.phase_store import PhaseStore

    study, scheduler, ledger, mirror = sweep.study, sweep.scheduler, sweep.scheduler.ledger, sweep.mirror
    home, signal_number = ledger.home, sweep.ending.signal
    rows = ledger.all_rows()
    made = tables(study.folder, rows, ledger.records, PhaseStore(scheduler.storage).examples)
    write(made, home)
    evaluator, importance = (scheduler.search and scheduler.search.importance()) or ("", None)
    chance = scheduler.search.importance_by_chance if scheduler.search else None
    more = [
        (o.words(), scheduler.search and scheduler.search.importance(i)) for i, o in enumerate(study.objectives) if i
    ]
    report = make_report(
        study, made, sweep.provenance, importance=importance, evaluator=evaluator, chance=chance,
        storage=sweep.arguments.storage, others={words: found[1] for words, found in more if found},
        history=note_report(home, scheduler.claim_history()),
    )  # fmt: skip
    home.write("report.html", report.html.encode())
    home.write("report.md", report.markdown.encode())
    for row in rows:
        mirror.put(row, ledger.records.get(row["trial"], []))
    names = ("report.html", "report.md", *(f"{table}.parquet" for table in TABLES))
    artifacts = [home.path(name) for name in names] if home.is_local else []
    status = "stopped" if signal_number or scheduler.closed else "ended"
    mirror.finish(status, artifacts, verdicts=report.summary.by_claim)
    undelivered = mirror.close(5.0 if signal_number == signal.SIGTERM else 30.0)
    if undelivered and mirror.problem:
        print(mirror.problem)
    command = f"python -m orchestrator.sweep {' '.join(_same_arguments(sweep.arguments))}"
    if signal_number:
        print(f"\ninterrupted; no finished trial is lost. To go on: {command}")
    else:
        print("\n" + "\n".join(report.summary.lines))
        print(f"report: {home.uri}/report.html   tables: {home.uri}/*.parquet   MLflow: {shown_by(mirror.uri)}")
        for fault, num in Counter(scheduler.disabled_reasons).items():
            print(f"disabled: {num} slot{'s' if num > 1 else ''} on {fault}")
        if scheduler.closed:
            left = scheduler.num_left()
            print(
                f"{scheduler.closed}; no finished trial is lost. Still to run: {left}{_later(scheduler)}. To go on: {command}"
            )
    code = exit_code(rows, signal_number=signal_number, is_closed=bool(scheduler.closed), is_broken=scheduler.is_broken)
    if code == 1 and not scheduler.is_broken:
        for lost in lacking(rows):
            log = f"{home.uri}/trials/{lost['trial']}/log.txt"
            print(f"arm {lost['arm']}, seed {lost['seed']} {lost['status']}: {lost['reason']} ({log})")
    return code


def _later(scheduler: Scheduler) -> str:
    more = scheduler.most_at_later_looks
    return f", and at most {more} at later looks" if more else ""


def lacking(rows: Iterable[Row]) -> list[Row]:
    """Returns the planned trials of arms that are over without a result."""
    over = ("failed", "stopped")
    return [r for r in rows if r["planned"] and r["arm"] and r["kind"] == "trial" and r["status"] in over]


def exit_code(rows: Sequence[Row], *, signal_number: int | None, is_closed: bool, is_broken: bool) -> int:
    """Returns the exit code of a sweep with these trials; the module's docstring lists the codes."""
    if signal_number:
        return 128 + signal_number
    has_ended = any(r["planned"] and r["kind"] != "teacher" and r["status"] == "ended" for r in rows)
    return int(is_broken or bool(lacking(rows)) or not (is_closed or has_ended))


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
    return sqlite_uri(folder / "mlflow.db")


def shown_by(tracking_uri: str) -> str:
    """Returns the command or the address that shows MLflow's runs."""
    file = sqlite_file(tracking_uri)
    if file == Path("runs/mlflow.db").absolute():
        return "python -m orchestrator.command ui"
    return redact(tracking_uri) if file is None else f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}"


def _check_storage(uri: str) -> None:
    try:
        check_writable(uri)
    except Exception as error:
        detail = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StudyError(f"--storage {uri}: cannot be written ({detail}); give a folder or URI that can") from None


def _keep_study(study: Study, home: Storage, provenance: Mapping[str, str]) -> None:
    """Writes the resolved study and its provenance; an older study that differs is kept under a number."""
    text = as_json(study.model_dump(mode="json", by_alias=True))
    old = home.read("study.yaml")
    if old is not None and old != text:
        number = 1 + sum(name.startswith("study-") for name in home.list())
        home.write(f"study-{number}.yaml", old)
    home.write("study.yaml", text)
    home.write("provenance.json", as_json(dict(provenance)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    start(main)
