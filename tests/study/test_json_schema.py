"""Tests the JSON schema of a study file: every study that loads fits it, and what no study may have does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from orchestrator.study.json_schema import FILE, as_text, study_schema
from tests.support.source_tree import ROOT

SCHEMA = Draft202012Validator(study_schema())
STUDIES = sorted((ROOT / "search_spaces").glob("*.yaml"))
PRINTED = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "study.md").read_text(), re.DOTALL)


def faults(text: str) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in SCHEMA.iter_errors(YAML(typ="safe").load(text))]


def test_the_schema_is_that_of_the_classes() -> None:
    """Where it is not: python -m orchestrator.study.json_schema."""
    assert FILE.read_text() == as_text()
    Draft202012Validator.check_schema(study_schema())


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_fits_the_schema_that_its_first_line_names(file: Any) -> None:
    line, _, text = file.read_text().partition("\n")
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", line)
    assert match and (file.parent / match[1]).resolve() == FILE
    assert not faults(text)


def test_the_studies_that_the_documents_print_fit() -> None:
    assert PRINTED and not any(faults(text) for text in PRINTED if text.startswith("question"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("sweeps: 3", "$"),
        ("seeds: many", "$.seeds"),
        ("arms: [alone]", "$.arms"),
        ("trial: {models: {student: {layer: 3}}}", "$.trial.models.student"),
        ("trial: {phases: {distil: {budget: {step: 3}}}}", "$.trial.phases.distil.budget"),
        ("trial: {phases: {distil: {terms: {soft: {kind: forward}}}}}", "$.trial.phases.distil.terms.soft"),
        ("trial: {data: {kind: filez, train: x}}", "$.trial.data"),
        ("trial: {seed: 1}", "$.trial"),
        ("objective: {mode: less}", "$.objective"),
        ("profiles: {laptop: [1]}", "$.profiles.laptop"),
    ],
)
def test_what_no_study_may_have_does_not_fit(text: str, place: str) -> None:
    assert [fault.partition(": ")[0] for fault in faults(text)] == [place]


@pytest.mark.parametrize(
    "text",
    [
        "trial: {data: {kind: files, train: a.txt}}",
        "trial: {data: {corpus: {kind: files, train: a.txt}, task: {kind: labelled_files, classes: [true, 0, ham]}}}",
        "trial: {phases: {distil: {optimizer: {lr: 1}}}}",
        "trial: {phases: {distil: {optimizer: {all: {lr: 1}, student: {lr: 0.5}}, batch: 8}}}",
        "trial: {phases: {distil: {terms: {soft: {kind: jsd, weight: {kind: linear, start: 1, end: 0}}}}}}",
        "trial: {models: {student: {like: teacher, layers: 10, init: {kind: remap, from: teacher}}}}",
        "trial: {phases: {p: {streams: {main: {labels: {kind: prediction_quality, of: teacher}, corruption: null}}}}}",
        "trial: {phases: {p: {streams: {main: {replies: {kind: sampled, by: student, top_k: 0}}}}}}",
        "claims: {helps: {arm: taught, against: [alone, copied], at: equal, task: [rte, mrpc], paper: 0.3}}",
        "vary: {a.b: {choice: [1, {kind: x}], when: {c: 3}}, c: {int: [1, 4]}, d: {float: [0.1, 1], log: true}}",
        "{exclude: [{a.b: 3}], profiles: null}",
    ],
)
def test_every_way_to_write_a_value_fits(text: str) -> None:
    assert not faults(text)
