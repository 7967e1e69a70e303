"""Finds private terms: words that this project once used in a sense of its own, and that readers had to guess.

    python -m tests.support.words        # file:line: word -> what to use instead; exit status 1 where there is one

Four short lists, kept by hand: names of variables, functions and modules, and phrases of messages, comments, docstrings and
documents. A word goes on a list when a reviewer had to ask what it means; ordinary English stays off the lists.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.source_tree import ROOT

SEARCHED = ("orchestrator", "trainables", "tests", "docs", "search_spaces", "README.md", "CONTRIBUTING.md")
ENDINGS = {".py", ".md", ".yaml", ".sbatch", ".j2"}

NAMES = {  # identifiers of Python, whole and with this case, with or without underscores before; variables of tests aside
    "at_B": "uniforms_B",
    "hidden_at": "head_inputs",
    "keeps_apart": "supports_packing",
    "live": "active",
    "looking": "records, or evaluation",
    "owners_N": "example_ids_N",
    "places_BT": "position_ids_BT",
    "sides": "arm_values, or the nouns of both sides",
    "take_back": "requeue",
    "told": "reported",
}

CLASSES = {  # only where the source defines a class: most are ordinary words, and libraries have classes of these names
    "Agenda": "Scheduler",
    "Alone": "SingleProcess",
    "Bill": "TrialCost",
    "Drawn": "Generation",
    "Given": "ForwardOutput",
    "Held": "ModelMemory",
    "Identity": "Fingerprints",
    "Instance": "PhaseRun",
    "Live": "StorageTracker",
    "Look": "Evaluation",
    "Made": "GeneratedReplies",
    "Makers": "GenerationContext",
    "Need": "MemoryEstimate",
    "Paid": "CostPair",
    "Planned": "PlannedTrial",
    "Published": "StoredPhase",
    "Reached": "ReachableTrial",
    "Reader": "StreamLoader",
    "Reading": "MetricQuery",
    "Run": "TrialContext",
    "Running": "PhaseState",
    "Side": "ArmValues, or LogitSource",
    "Surroundings": "Environment",
    "Taken": "ForwardMemory",
}

MODULES = {  # as `orchestrator.agenda` or `orchestrator/agenda.py`, in code and in text
    "orchestrator": "advice agenda blocks claims cluster_file ending messages outcomes overview plan preemption readings "
    "results search shapes sides slots study_file times time_sections tracking tracking_server",
    "trainables": "attempt beginning evaluate fused generate importance labels looking mailbox notice passes phases ranking "
    "ranks replies running sharing spec width worker",
}

PHRASES = {  # regular expressions, in any text, parts of names included, and in any case
    r"agenda": "scheduler, or ledger",
    r"befel?ls?|befallen": "failed, or happened to",
    r"foresees?|foreseen|foresaw": "predict, or preview",
    r"in ignorance": "without the results of …",
    r"nobody (?:was told|knows)": "name what is unknown, or which process was not notified",
    r"one's own": "your own",
    r"parked": "disabled",
    r"skeletons?": "model built from its config",
    r"spare": "audit_stopped, or name what is left over",
    r"starved": "capture_head_input, or name what is missing",
    r"subjects": "tuning targets",
    r"that one(?! \w+s\b)": "(repeat the noun)",
    r"unsealed": "verify_checksum, or without a checksum",
    r"valid:": "expected",
    r"weighs": "has so many parameters, or takes so many bytes",
    r"what is not": "(name what is missing)",
    r"whom": "(name the model, process or person)",
    r"without a word": "with a message",
}

_PHRASE = re.compile(
    "|".join(rf"(?P<p{number}>(?<![A-Za-z0-9])(?:{text})(?![A-Za-z0-9]))" for number, text in enumerate(PHRASES)),
    re.IGNORECASE,
)
_MODULE = re.compile(
    "|".join(rf"\b{top}[./](?:{'|'.join(names.split())})(?:\.py\b|\b(?![\w/]))" for top, names in MODULES.items())
)


@dataclass(frozen=True, order=True)
class Finding:
    file: str
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word} -> {self.instead}"


def searched() -> Iterator[Path]:
    for name in SEARCHED:
        paths = sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]
        yield from (path for path in paths if path.suffix in ENDINGS and path != Path(__file__).resolve())


def findings() -> list[Finding]:
    return sorted(finding for path in searched() for finding in find(path.read_text(), str(path.relative_to(ROOT))))


def find(text: str, file: str) -> set[Finding]:
    """Searches one file's text; names and classes only where the file is Python."""
    found = set[Finding]()
    instead = list(PHRASES.values())
    for match in _PHRASE.finditer(text):
        number = int((match.lastgroup or "p0")[1:])
        found.add(Finding(file, text.count("\n", 0, match.start()) + 1, match[0], instead[number]))
    for match in _MODULE.finditer(text):
        found.add(Finding(file, text.count("\n", 0, match.start()) + 1, match[0], "what the module is called now"))
    if file.endswith(".py"):
        is_test = file.startswith("tests/")
        for node in ast.walk(ast.parse(text)):
            line = getattr(node, "lineno", 0)
            if isinstance(node, ast.ClassDef) and node.name in CLASSES and not is_test:
                found.add(Finding(file, line, node.name, CLASSES[node.name]))
            for field in ("attr", "arg", "name", "asname", *(() if is_test else ("id",))):
                name = getattr(node, field, None)
                if isinstance(name, str) and name.lstrip("_") in NAMES:
                    found.add(Finding(file, line, name, NAMES[name.lstrip("_")]))
    return found


def main() -> int:
    found = findings()
    for finding in found:
        print(finding)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
