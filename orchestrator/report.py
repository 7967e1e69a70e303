"""Study and tables -> one page of HTML and of Markdown. Pure: the same in, the same bytes out; no number is its own.

The first screen answers: what was asked, what holds, how sure, what to use. Everything below it is in `sections`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from orchestrator.analysis import tables as tables_
from orchestrator.reporting.page import make_report
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report again from the tables that are there; runs nothing."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.report", description=main.__doc__)
    parser.add_argument("study", help="the study file, e.g. search_spaces/smoke.yaml")
    parser.add_argument("--profile", help="a named set of overrides in the file; by default its first")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="as the sweep had it; repeatable"
    )
    parser.add_argument("--storage", default="./runs", metavar="URI", help="where the sweep wrote (default: ./runs)")
    given = parser.parse_args(argv)
    try:
        study = load_study(given.study, given.profile, given.set)
        storage = tables_.open_storage(given.storage)
        tables = tables_.read(storage.sub(study.folder))
        if tables is None:
            where = f"{given.storage.rstrip('/')}/{study.folder}"
            raise StudyError(f"{where}: no tables yet; run python -m orchestrator.sweep {study.file} first")
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    stored = json.loads(storage.read(f"{study.folder}/provenance.json") or b"{}")
    report = make_report(study, tables, {str(key): str(value) for key, value in stored.items()})
    for name, text in (("report.html", report.html), ("report.md", report.markdown)):
        storage.write(f"{study.folder}/{name}", text.encode())
        print(f"{given.storage.rstrip('/')}/{study.folder}/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
