"""The command that runs the contract tests on a user's own file of terms, schedules and metrics.

    python -m orchestrator.check my_methods.py

Exit 0: every member keeps its contract. 1: a member does not. 2: the file cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orchestrator.cluster.machine import start
from orchestrator.study.errors import StudyError
from orchestrator.study.load import install_extension
from trainables.config.extension import examples

REPLIES = ("the map", "", "a map of the sun 12", "今天")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.check",
        description="Runs the contract tests on your own terms, schedules and metrics.",
    )
    parser.add_argument("file", metavar="FILE.py", type=os.path.expanduser)
    file = parser.parse_args(argv).file
    try:
        install_extension(file)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from trainables.losses.contract import Broken  # here, so that `--help` is quick

    num_broken = 0
    for kind, value in examples().items():
        for name, check in _checks(value):
            try:
                check(value)
            except Exception as error:  # the file's own functions may raise anything
                num_broken += 1
                about = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
                print(f"{kind}: {name.replace('_', ' ')}: {(about.splitlines() or [''])[0]}")
    num = len(examples())
    kept = "every contract is kept" if not num_broken else f"{num_broken} checks fail"
    print(f"{file}: {num} member{'s' * (num > 1)}, {kept}")
    return int(num_broken > 0)


def _checks(value: Any) -> Iterator[tuple[str, Callable[[Any], None]]]:
    # imported here, so that `--help` is quick
    from trainables.config.reply_metrics import ReplyScore
    from trainables.config.terms import OwnTerm
    from trainables.losses.contract import TERM_CHECKS

    checks: tuple[Callable[[Any], None], ...] = (_keeps_the_contract_of_schedules,)
    if isinstance(value, OwnTerm):
        checks = TERM_CHECKS
    elif isinstance(value, ReplyScore):
        checks = (_keeps_the_contract_of_metrics,)
    yield from ((check.__name__.strip("_"), check) for check in checks)


def _keeps_the_contract_of_metrics(metric: Any) -> None:
    from trainables.losses.contract import expect

    _survives_json(metric)
    for reply in REPLIES:
        value = metric.score(reply, ("the map", "another map"))
        expect(isinstance(value, int | float) and 0 <= value <= 100, f"{reply!r} scores {value!r}; expected 0 to 100")
        expect(value == metric.score(reply, ("the map", "another map")), f"{reply!r} scores another number each time")
    expect(
        metric.score("the map", ("the map",)) > metric.score("", ("the map",)),
        "expected more for the reference itself than for nothing",
    )


def _keeps_the_contract_of_schedules(schedule: Any) -> None:
    from trainables.losses.contract import expect

    _survives_json(schedule)
    low, high = sorted(schedule.ends)
    for percent in range(101):
        value = schedule.value_at(percent / 100)
        expect(value >= 0, f"is {value:g} at {percent} %; expected 0 or more")
        expect(
            low <= value <= high,
            f"is {value:g} at {percent} %; expected a value between its ends, {low:g} and {high:g}",
        )
        expect(value == schedule.value_at(percent / 100), f"is another number each time at {percent} %")


def _survives_json(value: Any) -> None:
    from trainables.losses.contract import expect

    again = type(value).model_validate_json(value.model_dump_json())
    expect(again == value, "is another value after JSON; expected fields that pydantic reads back")


if __name__ == "__main__":
    start(main)
