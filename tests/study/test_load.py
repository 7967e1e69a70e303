"""Reading a study file: what is valid, the order of overrides, and one clear message for each thing that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from transformers import BertConfig, BertForMaskedLM

from orchestrator import sweep
from orchestrator.study.errors import StudyError
from orchestrator.study.load import KEYS, load_study
from orchestrator.study.schema import Study
from orchestrator.study.validate import metrics_of
from tests.support.trials import wordy_documents
from trainables.data.tokenizer import train_wordpiece

TEXT = """\
question: Does a teacher help?
trial:
  data: {kind: python_docs, tokenizer: {kind: wordpiece, size: 1024}, length: 64, evaluate: 8}
  models:
    teacher: {family: bert, layers: 1, width: 16, heads: 2, dropout: 0}
    student: {family: bert, layers: 2, width: 16, heads: 2, dropout: 0}
  phases:
    teach:
      train: {teacher: full}
      budget: {steps: 40}
      batch: 8
      optimizer: {lr: 5e-3}
      terms: {teacher_hard: {kind: cross_entropy, of: teacher}}
    distil:
      train: {student: full}
      budget: {steps: 20}
      batch: 8
      optimizer: {lr: 5e-3}
      terms:
        student_hard: {kind: cross_entropy, of: student}
        soft: {kind: forward_kl, from: teacher, to: student, weight: 1, tau_squared: false}
objective: {phase: distil, model: student, metric: mlm_loss, mode: min}
arms:
  alone: {phases.distil.terms.soft.weight: 0}
  taught: {}
seeds: 2
vary:
  phases.distil.terms.soft.weight: {choice: {off: 0, on: 1, fade: {kind: linear, start: 4, end: 1}}}
  phases.distil.optimizer.lr: {float: [1e-3, 2e-2], log: true}
search: {sampler: random, points: 4}
confirm: {against: alone, seeds: 3}
claims:
  helps: {arm: taught, against: alone, model: student, metric: mlm_loss}
profiles:
  laptop: {}
  long: {trial.phases.distil.budget.steps: 200, seeds: 5}
"""
SOFT, LR = "phases.distil.terms.soft.weight", "phases.distil.optimizer.lr"


def line_with(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


def changed(old: str, new: str, text: str = TEXT) -> str:
    assert text.count(old) == 1, f"{text.count(old)} times {old!r}"
    return text.replace(old, new)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Study]:
    def load(text: str = TEXT, profile: str | None = None, overrides: Sequence[str] = (), **more: Any) -> Study:
        file = tmp_path / "study.yaml"
        file.write_text(text)
        return load_study(file, profile, overrides, **more)

    return load


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Gives a file to the command and holds it to the rules of a refusal; returns the message."""

    def never(*_: Any) -> None:
        raise AssertionError("a bad study came as far as Ray")

    monkeypatch.setattr(sweep, "run", never)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refused(text: str | bytes | None, *arguments: str, name: str = "study.yaml", storage: str | None = None) -> str:
        file, home = tmp_path / name, Path(storage or tmp_path / "runs")
        if text is not None:
            file.write_bytes(text.encode() if isinstance(text, str) else text)
        capsys.readouterr()
        try:
            code = sweep.main([str(file), "--storage", str(home), *arguments])
        except SystemExit as exit:  # argparse's own
            code = exit.code
        said = capsys.readouterr().err
        assert code == 2
        assert "Traceback" not in said
        if not said.startswith("usage:"):
            assert said.startswith("error: ") and said.count("\n") == 1, said
        assert [p.name for p in home.glob("*") if not p.name.startswith(".")] == []
        return said

    return refused


# ------------------------------------------------------------------------------------------------------------- the file


def test_a_missing_file_is_named(refused: Refused) -> None:
    assert "nowhere.yaml: no such file" in refused(None, name="nowhere.yaml")


def test_a_folder_is_no_study(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "is a folder; expected a YAML file" in refused(None, name="folder")


@pytest.mark.parametrize("text", ["", "\n\n", "# only words\n", "---\n"])
def test_an_empty_file_says_what_a_study_needs(refused: Refused, text: str) -> None:
    assert "is empty; a study needs at least question, trial and objective" in refused(text)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", ": not a text file (UTF-8 YAML is expected)"),
        ("question: x".encode("utf-16"), ": not a text file (UTF-8 YAML is expected)"),
        (b"\x00\x01\x02\x03", ": malformed YAML: "),
    ],
)
def test_a_binary_file_is_refused(refused: Refused, content: bytes, why: str) -> None:
    said = refused(content)
    assert f"study.yaml{why}" in said


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ("question: x\ntrial: {data: [1, 2\n", 3),
        ("question: x\n\tseeds: 2\n", 2),
        ("question: 'x\n", 2),
        ("question: x: y\n", 1),
        ("question: x\n trial: y\n", 2),
        ("question: x\n--- \nquestion: y\n", 2),
        ("question: @x\n", 1),
        ("question: %x\n", 1),
        ("seeds: 2001-99-99\n", 1),
        ("a: &b {c: 1}\nd: *e\n", 1),
    ],
)
def test_malformed_yaml_is_refused_with_its_line(refused: Refused, bad: str, line: int) -> None:
    said = refused(bad)
    assert f"study.yaml:{line}: " in said, said


def test_deeply_nested_brackets_are_malformed_not_a_crash(refused: Refused) -> None:
    assert "study.yaml" in refused("question: " + "[" * 400)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "42\n"])
def test_a_study_is_a_mapping(refused: Refused, text: str) -> None:
    assert "study.yaml:1: expected a mapping" in refused(text)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [touch {0}]", "!!python/name:os.system", "!run [touch {0}]",
                                 "!!binary aGk=", "!include {0}", "!!str x", "!<tag:yaml.org,2002:python/object/apply:os.system> [touch {0}]"])  # fmt: skip
def test_a_tag_is_refused_and_runs_nothing(refused: Refused, tmp_path: Path, tag: str) -> None:
    witness = tmp_path / "witness"
    said = refused(changed("question: Does a teacher help?", f"question: {tag.format(witness)}"))
    assert "study.yaml:1: tag " in said and "refused; only plain data is read" in said
    assert not witness.exists()


def test_a_tag_in_an_override_runs_nothing(refused: Refused, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    refused(TEXT, "--set", f"seeds=!!python/object/apply:os.system [touch {witness}]")
    assert not witness.exists()


@pytest.mark.parametrize(("text", "part", "what"), [
    (changed("teach:\n", "teach: &base\n"), "teach:", "anchors and aliases"),
    (changed("alone: {", "alone: &off {"), "alone:", "anchors and aliases"),
    (changed("taught: {}", "taught: {<<: {seed: 1}}"), "taught:", "merge keys"),
])  # fmt: skip
def test_anchors_and_merges_are_refused(refused: Refused, text: str, part: str, what: str) -> None:
    line = line_with(text, part)
    assert f"study.yaml:{line}: {what} are refused; use profiles, arms or vary" in refused(text)


# ----------------------------------------------------------------------------------------------------- keys and paths


@pytest.mark.parametrize(
    ("text", "part", "wants"),
    [
        (changed("seeds: 2", "sedes: 2"), "sedes", ["unknown key 'sedes'", "'seeds'", "question, trial, profiles"]),
        (changed("precision", "precisoin") if "precision" in TEXT else changed("  models:", "  precisoin: fp32\n  models:"),
         "precisoin", ["trial.precisoin: unknown key 'precisoin'", "'precision'"]),
        (changed("layers: 2, width", "layrs: 2, width"), "layrs", ["trial.models.student.layrs: unknown key 'layrs'", "'layers'"]),
        (changed("from: teacher, to", "fro: teacher, to"), "fro:", ["trial.phases.distil.terms.soft.fro: unknown key 'fro'", "'from'"]),
        (changed("optimizer: {lr: 5e-3}\n      terms: {teacher_hard", "optimizer: {lr: 5e-3, warmpu: 0.1}\n      terms: {teacher_hard"),
         "warmpu", ["unknown key 'warmpu'", "'warmup'"]),
        (changed("sampler: random", "smapler: random"), "smapler", ["search.smapler: unknown key 'smapler'", "'sampler'"]),
        (changed("mode: min}", "mode: min, mins: alone}"), "mins", ["objective.mins: unknown key 'mins'", "'minus'"]),
        (changed("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, margn: 1}\nprofiles"),
         "margn", ["claims.helps.margn: unknown key 'margn'", "'margin'"]),
        (changed("log: true}", "lgo: true}"), "lgo", [f"vary.{LR}.lgo: unknown key 'lgo'", "'log'"]),
        (changed("confirm: {against: alone, seeds: 3}", "confirm: {agianst: alone}"), "agianst", ["confirm.agianst: unknown key 'agianst'", "'against'"]),
        (changed("alone: {phases.distil.terms.soft.weight", "alone: {phases.distil.terms.sotf.weight"), "sotf", ["arm 'alone'", "no 'phases.distil.terms.sotf.weight'", "'soft'"]),
        (changed("taught: {}", "taught: {models.studnet.layers: 3}"), "studnet", ["arm 'taught'", "'studnet'", "'student'"]),
        (changed("taught: {}", "taught: {models.student.layrs: 3}"), "layrs", ["arm 'taught'", "'layrs'", "'layers'"]),
        (changed("taught: {}", "taught: {phases.distill.batch: 4}"), "distill", ["arm 'taught'", "'distill'", "'distil'"]),
        (changed("  phases.distil.optimizer.lr: {float", "  phases.distil.optimizr.lr: {float"), "optimizr", ["optimizr", "'optimizer'"]),
        (changed("  phases.distil.optimizer.lr: {float", "  modles: {float"), "modles", ["modles", "'models'"]),
        (changed("long: {trial.phases.distil.budget.steps: 200", "laptop2: {}\n  long: {trial.phases.distl.budget.steps: 200"),
         "distl", ["profile 'long'", "'distl'", "'distil'"]),
        (changed("  phases.distil.optimizer.lr: {float: [1e-3, 2e-2], log: true}", "  phases.distil.batsch: {int: [4, 8]}"), "batsch", [": trial.phases.distil.batsch: unknown", "'batch'"]),
        (changed("  phases.distil.optimizer.lr: {float: [1e-3, 2e-2], log: true}", "  phases.distl.batch: {int: [4, 8]}"), "distl", ["no 'phases.distl.batch'", "'distil'"]),
        (changed("  phases.distil.optimizer.lr: {float: [1e-3, 2e-2], log: true}", "  trial.phases.distil.batch: {int: [4, 8]}"), "trial.phases", ["mean 'phases.distil.batch'"]),
        (changed("  phases.distil.optimizer.lr: {float: [1e-3, 2e-2], log: true}", "  batch: {int: [4, 8]}"), "  batch: {int", ["did you mean 'phases.", ".batch'"]),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_line_and_the_nearest_valid_one(
    refused: Refused, text: str, part: str, wants: list[str]
) -> None:
    said = refused(text, *(["--profile", "long"] if "laptop2" in text else []))
    assert f"study.yaml:{line_with(text, part)}: " in said, said
    for want in wants:
        assert want in said, said


@pytest.mark.parametrize(
    "text",
    [
        TEXT + "seeds: 3\n",
        changed("taught: {}", "taught: {}\n  alone: {}"),
        changed("{steps: 20}", "{steps: 20, steps: 30}"),
        changed("phases.distil.optimizer.lr: {float", "phases.distil.terms.soft.weight: {float"),
    ],
)
def test_a_duplicate_key_is_refused(refused: Refused, text: str) -> None:
    said = refused(text)
    assert "duplicate key" in said and "study.yaml:" in said


@pytest.mark.parametrize(("override", "wants"), [
    ("trial.phases.distil.budget.steps", ["must be path=value"]),
    ("=3", ["must be path=value"]),
    ("phases.distil.batch=3", ["paths start at the file", "trial"]),
    ("trial.seed=3", ["trial.seed: a study file sets no seed of a trial; expected seeds: N"]),
    ("trial.models.studnet.layers=3", ["studnet", "'student'"]),
    ("trial.models.student.layrs=3", ["layrs", "'layers'"]),
    ("sedes=3", ["paths start at the file", "'seeds'"]),
    ("trial.seed.x=3", ["trial.seed"]),
    ("trial.models.student.layers.x=3", ["has no parts"]),
    ("seeds={a: [", ["not YAML"]),
    ("seeds=many", ["seeds", "many"]),
    ("arms.alone={phases.distil.terms.sotf.weight: 0}", ["sotf", "'soft'"]),
    ("claims.helps.arm=tought", ["tought", "'taught'"]),
    ("search=5", ["search"]),
    ("vary=5", ["vary"]),
    ("arms=5", ["arms"]),
    ("trial=5", ["trial"]),
    ("trial.models=5", ["trial.models"]),
    ("trial.models.student=", ["trial.models.student"]),
    ("objective=", ["objective"]),
    ("claims=[1]", ["claims"]),
    ("limits.minutes=-1", ["limits.minutes", "greater than 0"]),
    ("slot.workers=0", ["slot.workers"]),
    ("slot.cpus=0", ["slot.cpus"]),
    ("slot.gpus=-1", ["slot.gpus"]),
    ("trial.precision=fp8", ["trial.precision", "'fp32' or 'bf16'"]),
    ("trial.precision=bf61", ["trial.precision", "(got 'bf61') (did you mean 'bf16'?)"]),
    ("trial.phases.distil.optimizer.lr=.inf", ["lr"]),
    ("trial.phases.distil.optimizer.lr=.nan", ["lr"]),
    ("trial.phases.distil.terms.soft.weight=.inf", ["weight"]),
])  # fmt: skip
def test_a_bad_override_is_refused(refused: Refused, override: str, wants: list[str]) -> None:
    said = refused(TEXT, "--set", override)
    for want in wants:
        assert want in said, said


OPTIMIZER, DECAY = "phases.distil.optimizer", "'decay' is now called 'weight_decay'"


@pytest.mark.parametrize(("text", "where"), [
    (changed("optimizer: {lr: 5e-3}\n      terms: {", "optimizer: {lr: 5e-3, decay: 0}\n      terms: {"),
     "{line}: trial.phases.teach.optimizer.all.decay: "),
    (changed("taught: {}", f"taught: {{{OPTIMIZER}.decay: 0}}"), f"{{line}}: arms.taught: {OPTIMIZER}.decay: "),
    (changed("vary:\n", f"vary:\n  {OPTIMIZER}.decay: {{choice: [0, 1]}}\n"), f"{{line}}: vary: {OPTIMIZER}.decay: "),
    (changed("vary:\n", f"vary:\n  both: {{choice: {{a: {{{OPTIMIZER}.decay: 0}}, b: {{{OPTIMIZER}.decay: 1}}}}}}\n"),
     f"{{line}}: vary.both.choice.a: {OPTIMIZER}.decay: "),
    (changed("log: true}", f"log: true, when: {{{OPTIMIZER}.decay: 0}}}}"), f"{{line}}: vary.{LR}.when: {OPTIMIZER}.decay: "),
    (changed("search:", f"exclude: [{{{OPTIMIZER}.decay: 0}}]\nsearch:"), f"{{line}}: exclude.0: {OPTIMIZER}.decay: "),
    (changed("search:", f"tune: {{grid: {{{OPTIMIZER}.decay: [0, 0.1, 1]}}}}\nsearch:"), f"{{line}}: tune.grid: {OPTIMIZER}.decay: "),
    (changed("laptop: {}", f"laptop: {{trial.{OPTIMIZER}.decay: 0}}"), f"{{line}}: profiles.laptop: {OPTIMIZER}.decay: "),
    (changed("laptop: {}", f"laptop: {{arms.taught.{OPTIMIZER}.decay: 0}}"), f"{{line}}: profiles.laptop: {OPTIMIZER}.decay: "),
])  # fmt: skip
def test_a_former_name_is_refused_with_the_new_one_wherever_it_stands(refused: Refused, text: str, where: str) -> None:
    said = refused(text)
    assert f"study.yaml:{where.format(line=line_with(text, 'decay'))}" in said and DECAY in said, said


@pytest.mark.parametrize(
    "path", [f"trial.{OPTIMIZER}.decay", f"arms.taught.{OPTIMIZER}.decay", f"vary.{OPTIMIZER}.decay"]
)
def test_a_former_name_in_an_override_is_refused_with_the_new_one(refused: Refused, path: str) -> None:
    assert refused(TEXT, "--set", f"{path}=0") == f"error: --set: {OPTIMIZER}.decay: {DECAY}\n"


def test_a_phase_may_have_the_former_name_of_a_field(load: Callable[..., Study]) -> None:
    text = TEXT.replace("distil", "keep")
    assert load(text, overrides=["trial.phases.keep.batch=4"]).spec(seed=0).phases["keep"].batch == 4


@pytest.mark.parametrize("override", ["search=5", "search="])
def test_a_bad_search_is_refused_with_points_too(refused: Refused, override: str) -> None:
    assert "search" in refused(TEXT, "--set", override, "--points", "3")


@pytest.mark.parametrize("bad", ["vary: 5", "vary: [1]", "vary: words"])
def test_a_bad_vary_is_refused_with_an_override_of_the_trial_too(refused: Refused, bad: str) -> None:
    start = TEXT.index("vary:")
    text = TEXT[:start] + bad + TEXT[TEXT.index("\nsearch:") :]
    assert "vary" in refused(text, "--set", "trial.phases.distil.batch=4")


@pytest.mark.parametrize("profiles", ["profiles: 5", "profiles: [laptop]", "profiles: {laptop: [a]}", "profiles: {laptop: 5}"])  # fmt: skip
def test_profiles_map_names_to_paths(refused: Refused, profiles: str) -> None:
    said = refused(TEXT[: TEXT.index("profiles:")] + profiles + "\n")
    assert "profiles: must map a name to `path: value`" in said


def test_an_unknown_profile_is_refused_with_the_nearest(refused: Refused) -> None:
    said = refused(TEXT, "--profile", "laptob")
    assert "no profile 'laptob' (did you mean 'laptop'?); expected laptop, long" in said


@pytest.mark.parametrize("key", ["question", "trial", "objective"])
def test_what_a_study_needs_is_asked_for(refused: Refused, key: str) -> None:
    lines = TEXT.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
    stop = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    said = refused("".join(lines[:start] + lines[stop:]))
    assert "study.yaml:" in said and f"{key}: is missing" in said


@pytest.mark.parametrize(("old", "path"), [
    (", tau_squared: false", "trial.phases.distil.terms.soft.tau_squared"),
    (", of: student", "trial.phases.distil.terms.student_hard.of"),
    (", metric: mlm_loss, mode", "objective.metric"),
    ("points: 4", "search.points"),
    ("arm: taught, ", "claims.helps.arm"),
])  # fmt: skip
def test_a_missing_field_is_named_by_its_path(refused: Refused, old: str, path: str) -> None:
    said = refused(changed(old, ", mode" if old.endswith("mode") else ""))
    assert f"{path}: is missing" in said


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "many", ""])
@pytest.mark.parametrize(("old", "path"), [
    ("seeds: 2\nvary", "seeds"),
    ("points: 4", "search.points"),
    ("{steps: 20}", "trial.phases.distil.budget.steps"),
    ("{steps: 40}", "trial.phases.teach.budget.steps"),
    ("layers: 2", "trial.models.student"),
    ("alone, seeds: 3", "confirm.seeds"),
])  # fmt: skip
def test_trials_seeds_and_steps_are_counted_from_one(refused: Refused, value: str, old: str, path: str) -> None:
    number = next(part for part in ("20", "40", "4", "3", "2") if old.replace("\nvary", "").rstrip("}").endswith(part))
    new = old[::-1].replace(number[::-1], value[::-1], 1)[::-1]
    text = changed(old, new)
    said = refused(text)
    assert f": {path}" in said and "study.yaml:" in said, said


@pytest.mark.parametrize("option", ["--points", "--seeds"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", ""])
def test_counts_on_the_command_line_are_checked_too(refused: Refused, option: str, value: str) -> None:
    assert f"argument {option}: " in refused(TEXT, f"{option}={value}")


def test_points_need_a_search(refused: Refused) -> None:
    text = TEXT[: TEXT.index("vary:")] + TEXT[TEXT.index("claims:") :]
    assert "--points needs a `search` in the file" in refused(text, "--points", "3")


# ----------------------------------------------------------------------------------------------- ranges and conditions


@pytest.mark.parametrize(
    ("axis", "wants"),
    [
        ("{float: [2e-2, 1e-3]}", ["must rise", "[0.02, 0.001]"]),
        ("{float: [1e-3, 1e-3]}", ["must rise"]),
        ("{float: [0, 1e-2], log: true}", ["must lie above 0"]),
        ("{float: [0, 1e-2]}", ["at 0.0", "greater than 0"]),
        ("{float: [-1, 1]}", ["at -1.0", "greater than 0"]),
        ("{float: [1e-3]}", ["float"]),
        ("{float: [1, 2, 3]}", ["float"]),
        ("{float: 3}", ["float"]),
        ("{float: [a, b]}", ["float"]),
        ("{float: [1e-3, .inf]}", ["finite number"]),
        ("{int: [1.5, 3]}", ["int"]),
        ("{int: [1, 3], step: 0}", ["step"]),
        ("{choice: []}", ["choice"]),
        ("{choice: {}}", ["choice"]),
        ("{choice: {low: 1e-3, none: 0}}", ["at 'none'", "greater than 0"]),
        ("{choice: [1e-3, words]}", ["at 'words'", "number"]),
        ("{flaot: [1, 2]}", ["must have one of the keys: choice, float, int"]),
        ("{float: [1e-3, 1e-2], choice: [1e-3]}", ["choice"]),
        ("5", ["must have one of the keys: choice, float, int"]),
    ],
)
def test_every_end_of_a_range_is_a_valid_trial(refused: Refused, axis: str, wants: list[str]) -> None:
    text = changed("{float: [1e-3, 2e-2], log: true}", axis)
    said = refused(text)
    assert f"study.yaml:{line_with(text, LR)}: " in said, said
    for want in (LR, *wants):
        assert want in said, said


def test_a_width_that_the_heads_do_not_divide_is_found_at_the_end_of_the_range(refused: Refused) -> None:
    text = changed("mode: min}", "mode: min, minus: alone}").replace(
        "vary:\n", "vary:\n  models.student.width: {choice: [16, 17]}\n"
    )
    said = refused(text)
    assert f"study.yaml:{line_with(text, 'models.student.width')}: vary.models.student.width at '17'" in said
    assert "17 is not a multiple of heads 2" in said


@pytest.mark.parametrize(
    ("when", "wants"),
    [
        ("{phases.distil.terms.soft.wieght: on}", ["condition on unknown parameter", "did you mean 'phases.distil.terms.soft.weight'"]),
        ("{phases.distil.terms.soft.weight: onn}", ["no choice 'onn'", "expected off, on, fade"]),
        ("{phases.distil.optimizer.lr: 1}", ["must stand before it"]),
        ("5", ["when"]),
        ("{phases.distil.terms.soft.weight: [on, of]}", ["no choice 'of'"]),
    ],
)  # fmt: skip
def test_a_condition_names_a_choice_that_stands_before_it(refused: Refused, when: str, wants: list[str]) -> None:
    text = changed("log: true}", f"log: true, when: {when}}}")
    said = refused(text)
    assert f"study.yaml:{line_with(text, 'when:')}: vary.{LR}" in said
    for want in wants:
        assert want in said, said


@pytest.mark.parametrize(("rule", "wants"), [
    ("{phases.distil.terms.soft.weight: offf}", ["exclude", "'offf'"]),
    ("{phases.distil.terms.sotf.weight: off}", ["exclude", "phases.distil.terms.sotf.weight"]),
    ("{phases.distil.optimizer.lr: 1e-3}", ["exclude", LR]),
    ("5", ["exclude"]),
])  # fmt: skip
def test_an_exclusion_names_choices(refused: Refused, rule: str, wants: list[str]) -> None:
    text = changed("search:", f"exclude:\n  - {rule}\nsearch:")
    said = refused(text)
    assert "study.yaml:" in said
    for want in wants:
        assert want in said, said


def test_a_zip_needs_paths(refused: Refused) -> None:
    text = changed("vary:\n", "vary:\n  sizes: {choice: [small, big]}\n")
    assert f"study.yaml:{line_with(text, 'sizes')}: vary.sizes: is no path of the trial" in refused(text)


def test_an_unknown_path_in_a_zip_is_named(refused: Refused) -> None:
    text = changed("vary:\n", "vary:\n  pairs: {choice: {a: {models.studnet.dropout: 0.1}}}\n")
    said = refused(text)
    assert f"study.yaml:{line_with(text, 'pairs')}: vary.pairs at 'a'" in said and "'student'" in said


def test_sizes_are_not_searched_on_the_raw_score(refused: Refused) -> None:
    text = changed("vary:\n", "vary:\n  models.student.layers: {choice: [1, 2]}\n")
    said = refused(text)
    assert "the biggest model would win" in said and "minus" in said and "alone, taught" in said


def test_a_whole_model_that_varies_is_a_size_too(refused: Refused) -> None:
    shapes = "{family: bert, layers: 1, width: 32, heads: 2}, big: {family: bert, layers: 2, width: 32, heads: 2}"
    text = changed("vary:\n", f"vary:\n  models.student: {{choice: {{small: {shapes}}}}}\n")
    assert "the biggest model would win" in refused(text)


def test_sizes_cannot_hang_on_a_condition(refused: Refused) -> None:
    text = changed("mode: min}", "mode: min, minus: alone}").replace(
        "vary:\n", "vary:\n  precision: {choice: [fp32, bf16]}\n"
        "  models.student.layers: {choice: [1, 2], when: {precision: bf16}}\n"
    )  # fmt: skip
    assert "vary.models.student.layers: sizes cannot depend on a condition" in refused(text)


def test_two_ends_that_are_valid_alone_but_not_together_are_named(refused: Refused) -> None:
    """Heads 4 divide width 16, width 18 is divided by heads 2; 4 do not divide 18."""
    text = changed("mode: min}", "mode: min, minus: alone}").replace(
        "vary:\n", "vary:\n  models.student.width: {choice: [16, 18]}\n  models.student.heads: {choice: [2, 4]}\n"
    )
    said = refused(text)
    assert "study.yaml" in said and "18 is not a multiple of heads 4" in said


@pytest.mark.parametrize(("grid", "wants"), [
    ("{phases.distil.optimizr.lr: [1e-3, 2e-3, 4e-3]}", ["optimizr", "'optimizer'"]),
    ("{phases.distil.optimizer.lr: [1e-3, 2e-3]}", ["tune.grid"]),
    ("{phases.distil.optimizer.lr: [0, 1e-3, 2e-3]}", ["tune.grid", "greater than 0"]),
    ("{}", ["tune.grid"]),
    ("{phases.distl.batch: [1, 2, 3]}", ["distl", "'distil'"]),
    ("{phases.distil.batch: [1, 2.5, 5]}", ["phases.distil.batch", "2.5"]),
])  # fmt: skip
def test_a_tuning_grid_is_checked_with_its_line(refused: Refused, grid: str, wants: list[str]) -> None:
    text = changed("search:", f"tune: {{grid: {grid}}}\nsearch:")
    said = refused(text)
    assert f"study.yaml:{line_with(text, 'tune:')}: " in said, said
    for want in wants:
        assert want in said, said


def test_a_grid_search_needs_choices(refused: Refused) -> None:
    text = changed("sampler: random", "sampler: grid")
    assert f"study.yaml:{line_with(text, LR)}: a grid needs choices" in refused(text)


def test_early_stopping_is_refused_where_curves_cross(refused: Refused) -> None:
    text = changed("points: 4}", "points: 4, stop_early: {kind: asha}}")
    said = refused(text)
    assert "stop curves that cross" in said and SOFT in said


@pytest.mark.parametrize(
    ("old", "new", "wants"),
    [
        ("points: 4}", "points: 4, stop_early: {kind: pbt}}", ["search.stop_early.kind", "'asha'", "'pbt'"]),
        ("points: 4}", "points: 4, stop_early: {kind: median}}", ["search.stop_early.kind", "'asha'", "'median'"]),
        ("profiles:\n", "slot: {strategy: fsdp}\nprofiles:\n", ["slot.strategy", "expected workers"]),
        ("profiles:\n", "slot: {workers: 2, sharding: full}\nprofiles:\n", ["slot.sharding", "expected workers"]),
    ],
)
def test_other_schedulers_and_ways_of_sharing_are_refused(
    refused: Refused, old: str, new: str, wants: list[str]
) -> None:
    """There is ASHA or nothing, and DDP or one worker."""
    said = refused(changed(old, new))
    for want in wants:
        assert want in said, said


# ---------------------------------------------------------------------------------------------------- what is defined


def test_a_cycle_of_phases_is_shown(refused: Refused) -> None:
    text = changed("train: {teacher: full}", "train: {teacher: full, student: full}").replace(
        "terms: {teacher_hard: {kind: cross_entropy, of: teacher}}",
        "terms: {teacher_hard: {kind: cross_entropy, of: teacher}, h: {kind: cross_entropy, of: student}}\n"
        "      start: {student: distil}",
    )
    said = refused(text)
    assert "phases form a cycle" in said and "teach -> distil -> teach" in said


def test_a_cycle_of_remaps_is_shown(refused: Refused) -> None:
    text = TEXT.replace("layers: 1, ", "init: {kind: remap, from: student, depth: first}, layers: 1, ").replace(
        "layers: 2, ", "init: {kind: remap, from: teacher, depth: stack}, layers: 2, "
    )
    assert "remaps form a cycle: teacher -> student -> teacher" in refused(text)


@pytest.mark.parametrize(("old", "new", "wants"), [
    ("to: student, weight", "to: studnet, weight", ["'studnet'"]),
    ("of: student", "of: pupil", ["'pupil'"]),
    ("train: {student: full}", "train: {studnet: full}", ["'studnet'"]),
    ("train: {student: full}", "train: {student: lora}", ["train.student", "'full'"]),
    ("train: {student: full}", "train: {student: full}\n      start: {student: tech}", ["'tech'"]),
    ("kind: forward_kl", "kind: backward_kl", ["'forward_kl'", "'reverse_kl'"]),
    ("{kind: python_docs,", "{kind: pyton_docs,", ["'python_docs', 'files', 'hub'"]),
    ("length: 64", "length: 4", ["length", "8"]),
    ("weight: 1, tau", "weight: -1, tau", ["weight", "greater than or equal to 0"]),
    ("weight: 1, tau", "weight: {kind: cubic}, tau", ["weight", "'linear', 'cosine'"]),
    ("{steps: 20}", "{stpes: 20}", ["must have one of the keys: steps, tokens, epochs"]),
    ("family: bert, layers: 2", "layers: 2", ["needs family"]),
])  # fmt: skip
def test_the_trial_is_checked_as_the_file_loads(refused: Refused, old: str, new: str, wants: list[str]) -> None:
    said = refused(changed(old, new))
    assert "study.yaml:" in said and ": trial" in said
    for want in wants:
        assert want in said, said


@pytest.mark.parametrize(("old", "new", "wants"), [
    ("arm: taught, ", "arm: tought, ", ["no arm 'tought'", "'taught'", "expected alone, taught"]),
    ("against: alone, model", "against: alon, model", ["no arm 'alon'", "'alone'"]),
    ("against: alone, model", "against: [alone, lone], model", ["no arm 'lone'", "'alone'"]),
    ("against: alone, model", "against: taught, model", ["compared with itself"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: studnet, metric: mlm_loss}\nprofiles", ["no model 'studnet'", "'student'"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: teacher, metric: mlm_loss}\nprofiles", ["does not train 'teacher'", "expected student"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_los}\nprofiles", ["no metric 'mlm_los'", "'mlm_loss'", "mlm_accuracy"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: bleu}\nprofiles", ["no metric 'bleu'", "mlm_loss, mlm_accuracy"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, phase: distl}\nprofiles", ["no phase 'distl'", "'distil'"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, task: corpse}\nprofiles", ["no task 'corpse'", "'corpus'"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, at: 0.3}\nprofiles", ["nothing is recorded at 0.3", "0.25, 0.5, 0.75, 1"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, at: end}\nprofiles", ["claims.helps.at: must be a fraction of the budget, from 0 to 1, or 'equal' (got 'end')"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, within: -1}\nprofiles", ["claims.helps.within"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, at: equal, less: flops}\nprofiles", ["claims.helps: `at: equal` compares both arms at equal cost", "give one of the two"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, less: time}\nprofiles", ["claims.helps.less", "'student_tokens', 'flops' or 'device_seconds'"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, margin: small}\nprofiles", ["claims.helps.margin", "a valid number"]),
    ("model: student, metric: mlm_loss}\nprofiles", "model: student, metric: mlm_loss, split: train}\nprofiles", ["split", "'test' or 'dev'"]),
])  # fmt: skip
def test_a_claim_speaks_of_what_is_there(refused: Refused, old: str, new: str, wants: list[str]) -> None:
    text = changed(old, new)
    said = refused(text)
    assert f"study.yaml:{line_with(text, 'helps:')}: claims.helps" in said, said
    for want in wants:
        assert want in said, said


@pytest.mark.parametrize(("more", "as_what"), [
    ("again: {phases.distil.terms.soft.weight: 1}", "taught"),
    ("again: {phases.distil.terms.soft.weight: 0, phases.teach.batch: 4}", "alone"),  # whose teacher nobody needs
])  # fmt: skip
def test_an_arm_is_there_once(refused: Refused, load: Callable[..., Study], more: str, as_what: str) -> None:
    """Else its trials would be the other's, and the tables could give them to one of the two."""
    text = changed("  taught: {}", f"  taught: {{}}\n  {more}")
    assert f"study.yaml:{line_with(text, 'again:')}: arm 'again' trains the same as arm {as_what!r}" in refused(text)
    tuned = changed("search:", f"tune: {{grid: {{{LR}: [1e-3, 5e-3, 9e-3]}}}}\nsearch:")
    assert "own" in load(changed("  taught: {}", f"  taught: {{}}\n  own: {{{LR}: 5e-3}}", tuned)).arms  # not as tuned
    assert len(load(overrides=[f"trial.{SOFT}=1"]).arms) == 2  # for a quick look one may


def test_two_claims_that_say_the_same_are_refused(refused: Refused) -> None:
    same = "same: {says: other words, arm: taught, against: [alone], model: student, metric: mlm_loss, family: own}"
    text = changed("metric: mlm_loss}\nprofiles", f"metric: mlm_loss}}\n  {same}\nprofiles")
    where = f"study.yaml:{line_with(text, 'same:')}: claims.same"
    assert f"{where}: says the same as claim 'helps'; expected one of them" in refused(text)


def test_equal_cost_is_read_where_something_is_recorded_on_the_way(load: Callable[..., Study], refused: Refused) -> None:  # fmt: skip
    equal = changed("metric: mlm_loss}\nprofiles", "metric: mlm_loss, at: equal, axis: device_seconds}\nprofiles")
    assert load(equal).claims["helps"].at == "equal"
    once = equal.replace("budget: {steps: 20}", "budget: {steps: 20}\n      evaluate: [1.0]")
    said = refused(once)
    assert "claims.helps: at equal device_seconds the dearer arm is compared before its end" in said
    assert "phases.distil.evaluate fractions before the end" in said
    assert load(once.replace("at: equal, ", "")).claims["helps"].at == 1
    assert load(changed("metric: mlm_loss}\nprofiles", "metric: mlm_loss, margin: -0.5, less: flops}\nprofiles")).claims["helps"].margin == -0.5  # fmt: skip


@pytest.mark.parametrize(("old", "new", "wants"), [
    ("objective: {phase: distil", "objective: {phase: distl", ["objective: no phase 'distl'", "'distil'"]),
    ("model: student, metric: mlm_loss, mode", "model: studnet, metric: mlm_loss, mode", ["objective: no model 'studnet'"]),
    ("metric: mlm_loss, mode: min", "metric: lm_loss, mode: min", ["objective: no metric 'lm_loss'", "'mlm_loss'"]),
    ("mode: min", "mode: minimal", ["objective.mode", "'min' or 'max'"]),
    ("mode: min", "mode: min, minus: alon", ["objective.minus", "'alone'"]),
    ("confirm: {against: alone", "confirm: {against: lone", ["confirm.against", "'alone'"]),
    ("confirm: {against: alone, seeds: 3}", "confirm: {against: alone, seeds: 1}", ["confirm.seeds"]),
])  # fmt: skip
def test_objective_and_confirmation_speak_of_what_is_there(refused: Refused, old: str, new: str, wants: list[str]) -> None:  # fmt: skip
    text = changed(old, new)
    said = refused(text)
    assert f"study.yaml:{line_with(text, new.split(',')[0])}: " in said
    for want in wants:
        assert want in said, said


def test_early_stopping_goes_by_a_number_that_is_measured(refused: Refused) -> None:
    stops = "train: {student: full}\n      early_stopping: {metric: mlm_los, patience: 2}"
    assert "phases.distil.early_stopping: no metric 'mlm_los' (did you mean 'mlm_loss'?)" in refused(
        changed("train: {student: full}", stops)
    )
    arm = "taught: {phases.distil.early_stopping: {metric: bleu, patience: 2}}"
    assert "arm 'taught'" in refused(changed("taught: {}", arm))


def test_search_and_vary_need_each_other(refused: Refused) -> None:
    assert "`search` and `vary` need each other" in refused(changed("search: {sampler: random, points: 4}\n", ""))
    without = TEXT[: TEXT.index("vary:")] + TEXT[TEXT.index("search:") :]
    assert "`search` and `vary` need each other" in refused(without)


def test_a_confirmation_needs_a_search_and_a_study_something_to_run(refused: Refused) -> None:
    without = TEXT[: TEXT.index("vary:")] + TEXT[TEXT.index("confirm:") :]
    assert "confirm needs a search" in refused(without)
    nothing = TEXT[: TEXT.index("arms:")]
    assert "nothing to run: give arms, or vary and search" in refused(nothing)


# ------------------------------------------------------------------------------------- data, models, storage: the plan


def with_files(train: object, more: str = "") -> str:
    return changed("{kind: python_docs, tokenizer: {kind: wordpiece, size: 1024}, length: 64, evaluate: 8}",
                   f"{{kind: files, train: '{train}', {more}tokenizer: {{kind: wordpiece, size: 160}}, length: 32, evaluate: 8}}")  # fmt: skip


def small(corpus: Path, old: str, new: str) -> str:
    """A change to the study over a corpus that is read in no time."""
    return changed(old, new, with_files(corpus))


def test_a_data_file_without_the_named_column_names_those_it_has(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "corpus.parquet"
    pd.DataFrame({"body": wordy_documents(40), "id": range(40)}).to_parquet(file)
    said = refused(with_files(file))
    assert "no column 'text'" in said and "corpus.parquet" in said and "there is body, id" in said
    said = refused(with_files(file, "columns: {text: boddy}, "))
    assert "did you mean 'body'" in said
    assert "holds int64" in refused(with_files(file, "columns: {text: id}, "))


@pytest.mark.parametrize(("name", "content"), [("corpus.txt", b""), ("corpus.txt", b" \n\n \n"), ("corpus.jsonl", b""),
                                               ("corpus.jsonl", b'{"text": ""}\n'), ("corpus.csv", b"text\n"),
                                               ("corpus.csv", b""), ("corpus.parquet", b"")])  # fmt: skip
def test_an_empty_data_file_is_refused(refused: Refused, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    said = refused(with_files(tmp_path / name))
    assert "data.corpus: train: " in said, said


@pytest.mark.parametrize(("train", "wants"), [
    ("nowhere.txt", ["no file matches", "nowhere.txt"]),
    ("", ["folder"]),
    ("corpus.docx", ["corpus.docx", "expected one of the suffixes .parquet"]),
    ("few.txt", ["do not fill one sequence"]),
    ("latin.txt", ["latin.txt"]),
])  # fmt: skip
def test_data_that_cannot_be_read_is_refused(refused: Refused, tmp_path: Path, train: str, wants: list[str]) -> None:
    (tmp_path / "corpus.docx").write_bytes(b"PK")
    (tmp_path / "few.txt").write_text("three short words")
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1") * 100)
    said = refused(with_files(tmp_path / train))
    assert "data.corpus: " in said
    for want in wants:
        assert want in said, said


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("pretrained") / "bert"
    tokenizer = train_wordpiece(wordy_documents(40, seed=9), 120)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("\n\n".join(wordy_documents(160, seed=1)))
    return tmp_path / "corpus.txt"


def test_models_of_different_tokenizers_are_refused_by_their_token_to_id_map(
    refused: Refused, corpus: Path, pretrained: Path
) -> None:
    text = changed("{family: bert, layers: 1, width: 16, heads: 2, dropout: 0}", f"{{pretrained: {pretrained}}}", with_files(corpus))  # fmt: skip
    said = refused(text)
    assert "models.teacher: the tokenizers of" in said and "in that of data corpus" in said
    assert f"expected tokenizer: {{kind: pretrained, name: {pretrained}}}" in said
    fixed = changed("{kind: wordpiece, size: 160}", f"{{kind: pretrained, name: {pretrained}}}", text)
    (corpus.parent / "fixed.yaml").write_text(fixed)
    assert sweep.main([str(corpus.parent / "fixed.yaml"), "--storage", str(corpus.parent / "runs"), "--dry-run"]) == 0


def test_data_sets_of_different_tokenizers_are_refused(refused: Refused, corpus: Path) -> None:
    one = "{{kind: files, train: {0}, tokenizer: {{kind: wordpiece, size: {1}}}, length: 32, evaluate: 8}}"
    text = changed(
        "{kind: python_docs, tokenizer: {kind: wordpiece, size: 1024}, length: 64, evaluate: 8}",
        f"{{corpus: {one.format(corpus, 160)}, other: {one.format(corpus, 90)}}}",
    )
    said = refused(text)
    assert "data.other: the tokenizers of data 'other' (90 tokens)" in said and "one tokenizer for all data" in said


def test_a_pretrained_model_that_is_not_there_is_named(refused: Refused, tmp_path: Path, corpus: Path) -> None:
    text = small(
        corpus, "{family: bert, layers: 1, width: 16, heads: 2, dropout: 0}", f"{{pretrained: {tmp_path / 'nothing'}}}"
    )
    said = refused(text)
    assert "nothing" in said and "there is no such folder" in said


@pytest.mark.parametrize(
    ("init", "student", "wants"),
    [
        ("every_other", "layers: 2, width: 16", ["every_other needs at least 3 source layers for 2; there are 1"]),
        ("stack", "layers: 2, width: 32", ["equal hidden_size; source has 16, target 32"]),
        ("stack", "layers: 2, family: gpt2, width: 16", ["equal model_type"]),
    ],
)
def test_a_remap_between_shapes_it_cannot_serve_is_refused(
    refused: Refused, corpus: Path, init: str, student: str, wants: list[str]
) -> None:
    family = "" if "family" in student else "family: bert, "
    text = small(corpus, "{family: bert, layers: 2, width: 16, ", f"{{{family}{student}, init: {{kind: remap, from: teacher, depth: {init}}}, ")  # fmt: skip
    said = refused(text)
    for want in wants:
        assert want in said, said


def test_a_remap_that_only_an_arm_or_a_point_asks_for_is_checked_too(refused: Refused, corpus: Path) -> None:
    bad = "{kind: remap, from: teacher, depth: every_other}"
    assert "every_other needs" in refused(small(corpus, "taught: {}", f"taught: {{models.student.init: {bad}}}"))
    vary = f"vary:\n  models.student.init: {{choice: {{none: {{kind: random}}, half: {bad}}}}}\n"
    assert "every_other needs" in refused(small(corpus, "vary:\n", vary))


def test_an_encoder_does_not_predict_the_next_token(refused: Refused, corpus: Path) -> None:
    text = small(
        corpus, "  phases:\n    teach:\n", "  phases:\n    teach:\n      streams: {main: {corruption: null}}\n"
    )
    assert "'teacher' (bert) is an encoder" in refused(text)


def test_a_family_that_does_not_exist_is_named(refused: Refused, corpus: Path) -> None:
    said = refused(small(corpus, "{family: bert, layers: 2", "{family: brt, layers: 2"))
    assert "'brt'" in said and "expected bert" in said


def test_a_folder_that_cannot_be_written_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said = refused(TEXT, storage=str(tmp_path / "file" / "runs"))
    assert "--storage" in said and "cannot be written" in said and "give a folder or URI that can" in said


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_storage_of_an_unknown_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    (tmp_path / "study.yaml").write_text(TEXT)
    assert sweep.main([str(tmp_path / "study.yaml"), "--storage", "gopher://x/y", *dry]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "--storage" in said and "Traceback" not in said


# --------------------------------------------------------------------------------------------------- what a file means


def test_profile_arm_vary_and_override_come_in_this_order(load: Callable[..., Study]) -> None:
    text = changed("long: {trial", "long: {trial.phases.distil.batch: 4, trial")
    text = changed("taught: {}", "taught: {phases.distil.batch: 2}", text)
    text = changed("vary:\n", "vary:\n  phases.distil.batch: {int: [6, 7]}\n", text)
    base, long = load(text), load(text, "long")
    assert base.spec(seed=0).phases["distil"].batch == 8
    assert long.spec(seed=0).phases["distil"].batch == 4
    assert long.spec(arm="taught", seed=0).phases["distil"].batch == 2
    assert long.spec(arm="alone", seed=0).phases["distil"].batch == 4
    assert long.spec(point={"phases.distil.batch": 6}, seed=0).phases["distil"].batch == 6
    fixed = load(text, "long", ["trial.phases.distil.batch=16"])
    assert "phases.distil.batch" not in fixed.vary
    for how in ({}, {"arm": "taught"}, {"arm": "alone"}, {"point": {SOFT: "on"}}):
        assert fixed.spec(seed=0, **how).phases["distil"].batch == 16  # type: ignore[arg-type]


def test_a_tuned_value_gives_way_to_point_and_arm(load: Callable[..., Study]) -> None:
    study = load(changed("taught: {}", f"taught: {{{LR}: 7e-3}}"))
    tuned = {LR: 1e-3}
    lr = [study.spec(seed=0, tuned=tuned, **how).phases["distil"].optimizer_of("student").lr  # type: ignore[arg-type]
          for how in ({}, {"arm": "alone"}, {"arm": "taught"}, {"point": {LR: 2e-3}})]  # fmt: skip
    assert lr == [1e-3, 1e-3, 7e-3, 2e-3]


def test_an_override_of_a_choice_that_others_depend_on_decides_for_them(load: Callable[..., Study]) -> None:
    text = changed("log: true}", f"log: true, when: {{{SOFT}: [on, fade]}}}}")
    on, off = load(text, overrides=[f"trial.{SOFT}=1"]), load(text, overrides=[f"trial.{SOFT}=0", "search=null", "confirm=null"])  # fmt: skip
    assert list(on.vary) == [LR] and on.vary[LR].when == {}
    assert list(off.vary) == []


def test_an_override_of_a_choice_that_an_exclusion_names_decides_it(load: Callable[..., Study]) -> None:
    text = changed("vary:\n", "vary:\n  phases.distil.batch: {choice: [4, 8]}\n")
    text = changed("search:", f"exclude:\n  - {{{SOFT}: on, phases.distil.batch: 4}}\nsearch:", text)
    assert load(text).is_excluded({SOFT: "on", "phases.distil.batch": "4"})
    assert load(text, overrides=[f"trial.{SOFT}=1"]).is_excluded({"phases.distil.batch": "4"})
    assert load(text, overrides=[f"trial.{SOFT}=0"]).exclude == ()


def test_the_study_may_be_overridden_too(load: Callable[..., Study]) -> None:
    study = load(overrides=["seeds=7", "search.points=9", "limits.minutes=3", "claims.helps.margin=0.5"])
    assert (study.seeds, study.search and study.search.points, study.limits.minutes) == (7, 9, 3)
    assert study.claims["helps"].margin == 0.5
    counted = load(points=11, seeds=1, overrides=["seeds=7"])
    assert (counted.seeds, counted.search and counted.search.points) == (1, 11)


def test_axes_arms_and_claims_are_named_by_their_paths(load: Callable[..., Study]) -> None:
    """Their names hold dots; null takes one away."""
    text = changed("long: {trial", f"long: {{vary.{SOFT}: null, vary.{LR}: {{choice: [1e-3, 2e-3]}}, arms.taught.{LR}: 7e-3,\n"
                   "         claims.helps: null, arms.slow: {phases.distil.batch: 4}, trial")  # fmt: skip
    study = load(text, "long", [f"arms.alone.{LR}=1e-3"])
    assert list(study.vary) == [LR] and study.vary[LR].ends() == ("0.001", "0.002")
    assert study.claims == {} and list(study.arms) == ["alone", "taught", "slow"]
    lr = [study.spec(arm=arm, seed=0).phases["distil"].optimizer_of("student").lr for arm in study.arms]
    assert lr == [1e-3, 7e-3, 5e-3]
    assert study.spec(arm="alone", seed=0).phases["distil"].terms["soft"].weight.is_off


def test_words_of_yaml_1_1_are_text_and_exponents_are_numbers(load: Callable[..., Study]) -> None:
    text = changed("{off: 0, on: 1,", "{off: 0, on: 1, no: 2, yes: 3, y: 5,")
    text = changed("question: Does a teacher help?", "question: no", text)
    study = load(changed("lr: 5e-3}\n      terms:\n", "lr: 5e-4}\n      terms:\n", text))
    assert list(study.vary[SOFT].choice) == ["off", "on", "no", "yes", "y", "fade"]  # type: ignore[union-attr]
    assert study.question == "no"
    assert study.spec(seed=0).phases["distil"].optimizer_of("student").lr == 5e-4
    assert study.spec(seed=0).phases["distil"].terms["soft"].tau_squared is False  # type: ignore[union-attr]


def test_labels_are_what_is_printed_and_kept(load: Callable[..., Study]) -> None:
    text = changed("vary:\n", "vary:\n  phases.distil.batch: {choice: [4, 8]}\n  phases.distil.optimizer.schedule: {choice: [linear, cosine]}\n"
                              "  phases.distil.optimizer.max_grad_norm: {choice: [1, null, 0.5]}\n")  # fmt: skip
    study = load(text)
    assert study.vary["phases.distil.batch"].ends() == ("4", "8")
    assert study.vary["phases.distil.optimizer.schedule"].ends() == ("linear", "cosine")
    assert study.vary["phases.distil.optimizer.max_grad_norm"].ends() == ("1", "null", "0.5")
    spec = study.spec(
        point={"phases.distil.batch": "4", SOFT: "fade", "phases.distil.optimizer.max_grad_norm": "null"}, seed=3
    )
    phase = spec.phases["distil"]
    assert (phase.batch, phase.optimizer_of("student").max_grad_norm, spec.seed) == (4, None, 3)
    assert phase.terms["soft"].weight.kind == "linear"  # type: ignore[union-attr]


def test_conditions_and_exclusions_take_values_as_they_are_written(load: Callable[..., Study]) -> None:
    text = changed("vary:\n", "vary:\n  phases.distil.batch: {choice: [4, 8]}\n  phases.distil.optimizer.max_grad_norm: {choice: [1, null]}\n")  # fmt: skip
    text = changed(
        "log: true}", "log: true, when: {phases.distil.batch: 4, phases.distil.optimizer.max_grad_norm: null}}", text
    )
    text = changed("search:", f"exclude: [{{phases.distil.batch: 4, {SOFT}: on}}]\nsearch:", text)
    study = load(text)
    point = {"phases.distil.batch": "4", "phases.distil.optimizer.max_grad_norm": "null"}
    assert study.is_active(LR, point) and not study.is_active(LR, {**point, "phases.distil.batch": "8"})
    assert study.is_excluded({**point, SOFT: "on"}) and not study.is_excluded({**point, SOFT: "off"})


def test_a_zip_sets_several_paths_at_once(load: Callable[..., Study]) -> None:
    zipped = "{choice: {a: {models.teacher.layers: 1, models.student.layers: 2}, b: {models.teacher.layers: 2, models.student.layers: 3}}}"
    text = changed("vary:\n", f"vary:\n  sizes: {zipped}\n", changed("mode: min}", "mode: min, minus: alone}"))
    study = load(text)
    assert study.is_zip("sizes") and not study.is_zip(SOFT)
    assert study.size_axes() == ("sizes",)
    spec = study.spec(point={"sizes": "b"}, seed=0)
    assert (spec.models["teacher"].layers, spec.models["student"].layers) == (2, 3)
    baseline = study.spec(arm="alone", point={"sizes": "b"}, seed=0)
    assert baseline.models["student"].layers == 3
    assert baseline.pruned().models.keys() == {"student"}


def test_an_axis_is_active_only_under_its_condition(load: Callable[..., Study]) -> None:
    study = load(changed("log: true}", f"log: true, when: {{{SOFT}: [on, fade]}}}}"))
    assert study.is_active(LR, {SOFT: "on"}) and study.is_active(LR, {SOFT: "fade"})
    assert not study.is_active(LR, {SOFT: "off"}) and not study.is_active(LR, {})


def test_only_a_profile_that_is_not_the_default_has_a_folder_of_its_own(load: Callable[..., Study]) -> None:
    assert (load().profile, load().folder) == ("laptop", "study")
    assert load(profile="laptop").folder == "study"
    assert (load(profile="long").profile, load(profile="long").folder) == ("long", "study-long")
    assert load(profile="long").seeds == 5
    assert load(TEXT[: TEXT.index("profiles:")]).folder == "study"


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path: Path, load: Callable[..., Study]) -> None:
    plain = load()
    (tmp_path / "study.yaml").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert load_study(tmp_path / "study.yaml") == plain


def test_a_study_is_a_frozen_value(load: Callable[..., Study]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().seeds = 3  # type: ignore[misc]
    with pytest.raises(StudyError):
        load(overrides=["seeds=0"])


def test_an_arm_that_learns_nothing_is_named(refused: Refused) -> None:
    off = "{phases.distil.terms.soft.weight: 0, phases.distil.terms.student_hard.weight: 0}"
    text = changed("  taught: {}\n", f"  taught: {{}}\n  idle: {off}\n")
    said = refused(text)
    assert f"study.yaml:{line_with(text, 'idle:')}: arm 'idle'" in said and "nothing is learnt" in said


def test_an_arm_that_tuning_cannot_look_at_is_named(refused: Refused) -> None:
    text = changed("      train: {student: full}", "      train: {student: full, teacher: full}")
    text = changed("      terms:\n", "      terms:\n        own: {kind: cross_entropy, of: teacher}\n", text)
    text = changed("search:", f"tune: {{grid: {{{LR}: [1e-3, 2e-3, 4e-3]}}}}\nsearch:", text)
    off = "{phases.distil.terms.soft.weight: 0, phases.distil.terms.student_hard.weight: 0}"
    text = changed("  taught: {}\n", f"  taught: {{}}\n  other: {off}\n", text)
    said = refused(text)
    assert f"study.yaml:{line_with(text, 'other:')}: arm 'other'" in said
    assert "does not train 'student' in phase 'distil', by which `tune` chooses" in said


def test_agreement_may_be_claimed_with_a_teacher_as_it_is_and_as_it_was() -> None:
    names = set(
        metrics_of(
            load_study(Path(__file__).parents[2] / "search_spaces" / "okd.yaml").spec(arm="okd", seed=0),
            "distil",
            ("ask",),
        )
    )
    assert {f"teacher{then}_{what}" for then in ("", "_original") for what in ("agreement", "kl")} <= names
    assert "student_agreement" in names and not [name for name in names if name.startswith("student_original")]


@pytest.mark.parametrize(
    ("text", "part", "says"),
    [
        (changed("objective: {phase: distil, model: student, metric: mlm_loss, mode: min}",
                 "objective: [{phase: distil, model: student, metric: mlm_loss, mode: min}]"),
         "objective", "objective: expected one mapping (`key: value`); found a list"),
        (changed("  student: {family: bert", "  student: [bert]\n    other: {family: bert"), "student: [bert]",
         "trial.models.student: expected one mapping (`key: value`); found a list"),
        (changed("phases.distil.optimizer.lr: {float: [1e-3, 2e-2], log: true}", "phases.distil.batch: {int: [4, 32], log: true, step: 4}"),
         "step: 4", "vary.phases.distil.batch: log and step exclude each other"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_in_one_line(refused: Refused, text: str, part: str, says: str) -> None:
    assert f"study.yaml:{line_with(text, part)}: {says}" in refused(text)


def test_replies_have_no_more_tokens_than_a_prompt_and_its_reply(refused: Refused, tmp_path: Path) -> None:
    data = "data: {kind: python_instructions, tokenizer: {kind: wordpiece, size: 1024}, length: 64, prompt_length: 32, scoring: {max_tokens: 65}}"
    text = changed("data: {kind: python_docs, tokenizer: {kind: wordpiece, size: 1024}, length: 64, evaluate: 8}", data)
    text = text.replace("family: bert", "family: gpt2").replace("metric: mlm_loss", "metric: lm_loss")
    said = refused(text)
    assert "trial.data.corpus.scoring.max_tokens: 65 is beyond length 64" in said
    replies = "streams: {main: {data: corpus, replies: {kind: sampled, by: teacher, max_tokens: 70}}}"
    text = text.replace("{max_tokens: 65}", "{max_tokens: 64}")
    said = refused(text.replace("train: {student: full}", f"train: {{student: full}}\n      {replies}"))
    assert "trial.phases.distil.streams.main.replies.max_tokens: 70 is beyond length 64" in said


names = st.text("abcdefghij_.", min_size=1, max_size=8) | st.sampled_from(
    [*KEYS, "kind", "data", "models", "phases", "lr", "x.y"]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["student", "files", "asha"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@given(data=st.data())
def test_whatever_stands_in_a_study_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = YAML(typ="safe").load(TEXT)
    at: Any = raw
    while isinstance(at, dict) and at:
        key = data.draw(st.sampled_from(sorted(at)))
        if not isinstance(at[key], dict) or data.draw(st.booleans()):
            at[data.draw(st.just(key) | names)] = data.draw(values)
            break
        at = at[key]
    file = tmp_path_factory.mktemp("any") / "study.yaml"
    file.write_text(json.dumps(raw))
    said = ""
    try:
        load_study(file)
    except StudyError as error:
        said = str(error)
    assert "\n" not in said
