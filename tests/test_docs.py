"""Tests that documents say what is true of the tree, and that the studies which they print are studies."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from docs.pages import SITE, Reference, systems, verdicts
from orchestrator.study.load import load_study
from orchestrator.study.new import STUDY
from tests.support.source_tree import ROOT, drawing, packages, sources

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


def test_the_studies_that_the_documents_print_are_studies(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "study.md").read_text(), re.DOTALL)
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


def test_the_readme_fits_on_two_screens_and_shows_what_new_writes() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    (block,) = re.findall(r" *```yaml\n(.*?)```", text, re.DOTALL)
    written = STUDY.template.replace("$metric", "rougeL")
    assert all(line.strip() in written for line in block.splitlines()) and "codistill new" in text


def test_every_key_of_a_study_has_a_meaning_and_an_example() -> None:
    """The meaning is the comment beside the field, or its docstring's; an example is in a study, a page or docs/keys.yaml."""
    reference = Reference()
    rows = [(part, *row) for part in reference.order() for row in reference.rows(part)]
    assert len(rows) > 200
    assert not [f"{part}.{key}" for part, key, kind, _, meaning, example in rows if not (kind and meaning and example)]


def messages() -> list[str]:
    """The texts of the source, with … in place of what is filled in."""
    found = []
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [re.sub(r"%[sdrg]", "…", text) for text in found]


def test_every_message_in_troubleshooting_is_one_of_the_source() -> None:
    told = re.findall(
        r"^\| `([^`]+(?:`[^`|]+`[^`]*)*)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE
    )
    known = messages()
    assert len(told) >= 30
    assert not [text for text in told if not any(_is_part(text, message) for message in known)]


def _is_part(text: str, message: str) -> bool:
    """Whether the words between the gaps of a text stand in a message, in this order."""
    return re.search(".*".join(map(re.escape, re.split("…+", text.strip("… ")))), message, re.DOTALL) is not None


def test_the_page_of_systems_tells_the_verdicts_that_were_measured() -> None:
    found = verdicts("skd")
    assert len(found) == 2 and found[0] == "replies written together beat both others - undecided"
    assert all(verdict in systems() for verdict in found) and not verdicts("smoke")


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    subprocess.run([sys.executable, "-m", "docs.pages"], cwd=ROOT, check=True)
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "-f",
        "docs/mkdocs.yml",
        "-d",
        str(tmp_path),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert {page.stem for page in SITE.glob("*.md")} <= {page.stem for page in tmp_path.glob("*.html")}
    shutil.rmtree(SITE)
