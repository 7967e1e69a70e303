"""Writes a trained model as an ordinary Hugging Face folder, with its model card.

    python -m orchestrator.export search_spaces/dwt.yaml --to best-student

Without `--arm` or `--trial`, the search's winner: at its first confirmed seed, else at the seed of the search.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli import add_study_arguments
from orchestrator.cluster.machine import start
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.export", description="Writes a model as a Hugging Face folder."
    )
    add_study_arguments(parser)
    folder = "a new or empty folder"
    parser.add_argument("--to", required=True, type=lambda to: Path(to).expanduser(), metavar="DIR", help=folder)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--arm", metavar="A", help="an arm, at its first seed")
    which.add_argument("--trial", metavar="ID", help="a trial by its id")
    parser.add_argument("--model", metavar="M", help="by default the objective's model")
    parser.add_argument(
        "--phase", metavar="P", help="as trained by this phase, e.g. finetune[rte]; by default the last that trains it"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="LoRA's pairs alone, as peft loads them; by default merged"
    )
    given = parser.parse_args(argv)
    try:
        study = load_study(given.study, given.profile, given.set, extension=given.extension)
        from orchestrator.model_folder import Wanted, export  # here, so that `--help` and a wrong argument are quick

        which_model = Wanted(given.arm, given.trial, given.model, given.phase, given.adapter)
        export(study, given.storage, given.to, which_model)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    start(main)
