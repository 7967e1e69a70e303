"""Tests that documents say what is true of the tree, and that the README's studies are studies."""

from __future__ import annotations

import re
from pathlib import Path

from ruamel.yaml import YAML

from orchestrator.study.load import load_study
from tests.support.source_tree import ROOT, drawing, packages

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_architecture_names_every_package_and_nothing_else() -> None:
    """Each with its line, in the section on rooms; `trainables/` has no modules directly in it, so that it has none."""
    lines = re.findall(r"^\* `([\w/]+)/` - \S.+\.$", ARCHITECTURE, re.MULTILINE)
    assert sorted(lines) == sorted(name.replace(".", "/") for name in packages() - {"trainables"})


def test_the_architectures_drawing_has_the_arrows_of_the_imports() -> None:
    arrows = set(re.findall(r"^  (\S+) --> (\S+)$", ARCHITECTURE, re.MULTILINE))
    true = {(a.replace(".", "/"), b.replace(".", "/")) for a, b in drawing()}
    assert arrows == true, "\n".join(f"  {a} --> {b}" for a, b in sorted(true))


def test_the_architecture_is_ten_steps_long() -> None:
    assert re.findall(r"^(\d+)\. ", ARCHITECTURE, re.MULTILINE) == [str(number) for number in range(1, 11)]


def test_the_readmes_studies_are_studies(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    whole, more = tmp_path / "whole.yaml", tmp_path / "more.yaml"
    whole.write_text(blocks[0])
    more.write_text(blocks[0] + blocks[1])
    assert list(load_study(whole).claims) == ["teacher_helps"] and len(load_study(more).vary) == 4
    value, parts = (YAML(typ="safe").load(block) for block in (blocks[0], blocks[2]))  # these are of a trial
    value["trial"] |= {"data": parts["data"], "phases": value["trial"]["phases"] | parts["phases"]}
    with (tuned := tmp_path / "tuned.yaml").open("w") as file:
        YAML().dump(value, file)
    assert load_study(tuned).each_of("finetune") == ("rte", "mine")
    whole.write_text(blocks[3])
    of_decoders = load_study(whole)
    assert list(of_decoders.claims) == ["teacher_helps", "own_replies_help"]
    assert of_decoders.spec(arm="taught", seed=0).pruned().models_of("distil") == ("teacher", "student")
