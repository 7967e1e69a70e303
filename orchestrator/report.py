"""Writes a study's report again from the tables in its storage; runs nothing.

python -m orchestrator.report search_spaces/dwt.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from orchestrator.cli import add_study_arguments, open_storage
from orchestrator.cluster.machine import start
from orchestrator.reporting.commands import sweep_command
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.report", description="Writes report.html and report.md again from the tables."
    )
    add_study_arguments(parser)
    return _write(parser.parse_args(argv))


def _write(arguments: argparse.Namespace) -> int:
    # imported here, so that `--help` is quick
    from orchestrator.analysis.claim_history import count_results, note_report, read_history
    from orchestrator.analysis.tables import read
    from orchestrator.reporting.page import make_report

    uri = arguments.storage
    try:
        study = load_study(arguments.study, arguments.profile, arguments.set, extension=arguments.extension)
        home = open_storage(uri).sub(study.folder)
        if (tables := read(home)) is None:
            where = f"{uri.rstrip('/')}/{study.folder}"
            raise StudyError(f"{where}: no tables yet; first run {sweep_command(study, uri)}")
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stored = json.loads(home.read("provenance.json") or b"{}")
    provenance = {str(key): str(value) for key, value in stored.items()}
    history = read_history(home)
    num_results = count_results(tables.trials.to_dict("records"))
    history = note_report(home, history.with_now(study, num_results, history.looks))
    report = make_report(study, tables, provenance, storage=uri, history=history)
    # the paths alone on stdout, for programs
    print("\n".join(report.summary.lines), file=sys.stderr)
    for name, text in (("report.html", report.html), ("report.md", report.markdown)):
        try:
            home.write(name, text.encode())
        except OSError as error:
            print(f"error: {uri}: {name} cannot be written ({error.strerror or error})", file=sys.stderr)
            return 1
        print(f"{uri.rstrip('/')}/{study.folder}/{name}")
    return 0


if __name__ == "__main__":
    start(main)
