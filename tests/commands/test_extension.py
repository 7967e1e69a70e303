"""A user's own file: the page's example as it stands there, what is refused, and what enters keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from orchestrator import check, sweep
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from tests.support.source_tree import ROOT
from tests.support.sweeps import Bench
from trainables.config import extension
from trainables.config.trial import trial_id
from trainables.runtime import preflight
from trainables.runtime.preflight import Expected
from trainables.training.phase_graph import phase_key, phase_runs

PAGE = (ROOT / "docs" / "extension.md").read_text()


@pytest.fixture(autouse=True)
def _not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_installed", [])
    monkeypatch.setattr(extension, "_examples", {})


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """The file and the study of the page."""
    code, study = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[1] for kind in ("python", "yaml"))  # type: ignore[index]
    (tmp_path / "my_methods.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(study)
    return str(tmp_path / "my_methods.py"), str(tmp_path / "mine.yaml")


def fresh() -> None:
    extension._installed.clear()
    extension._examples.clear()


def test_the_pages_file_keeps_every_contract(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([files[0]]) == 0
    assert "2 members, every contract is kept" in capsys.readouterr().out


LOSS = """
from typing import Literal
from trainables.config.own import HiddenLoss, LogitLoss, OwnSchedule, ReplyScore
class Mine({base}):
    kind: Literal["mine"]
    {body}
MEMBERS = [Mine(kind="mine"{given})]
"""
FLOW = ', from_="teacher", to="student"'


@pytest.mark.parametrize(
    ("base", "body", "said"),
    [
        ("LogitLoss", "def loss(self, p, q): return ((p - q) ** 2).mean()", "is a sum over rows"),
        ("LogitLoss", "def loss(self, p, q): return ((p - q) ** 2)", "expected a loss of shape"),
        ("LogitLoss", "def loss(self, p, q): return (q ** 2).sum() * q.detach().sum().sign() ** 2 + (q.detach() ** 3).sum() ** 2", "finite differences"),
        ("LogitLoss", "def loss(self, p, q): import torch; return torch.rand(()) + (q ** 2).sum()", "the same each time"),
        ("LogitLoss", "def loss(self, p, q): return 1 / 0", "ZeroDivisionError"),
        ("HiddenLoss", "def loss(self, p, q, mask): return ((p - q) ** 2).mean()", "is a sum over rows"),
        ("OwnSchedule", "def value_at(self, progress, state={}): return (2 * progress - 1) ** 2 - .5", "schedules"),
        ("ReplyScore", "def score(self, reply, references): return 200.0", "expected 0 to 100"),
    ],
)  # fmt: skip
def test_what_a_member_breaks_is_named(
    base: str, body: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.py").write_text(LOSS.format(base=base, body=body, given=FLOW if base.endswith("Loss") else ""))
    assert check.main([str(tmp_path / "my.py")]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"^mine: .*{said}", out, re.MULTILINE), out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (", r"my.py:1: SyntaxError"),
        ("\nraise KeyError('x')", r"my.py:2: KeyError"),
        ("x = 1", "has no members; expected MEMBERS"),
        ("MEMBERS = [3]", "MEMBERS has 3; expected values of the file's own classes"),
        (
            LOSS.format(base="LogitLoss", body="", given=FLOW).replace("mine", "forward_kl"),
            "'forward_kl' exists already",
        ),
        (LOSS.format(base="ReplyScore", body="", given="").replace("mine", "chrf"), "'chrf' exists already"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    text: str | None, said: str, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "my.py").write_text(text)
    own = str(tmp_path / "my.py")
    for start in (lambda: check.main([own]), lambda: sweep.main([files[1], "--extension", own, "--dry-run"])):
        code, err = start(), capsys.readouterr().err
        assert code == 2 and len(err.splitlines()) == 1 and re.search(said, err), err


def test_a_study_that_needs_the_file_says_so(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"mine.yaml:\d+: .*'first_word'.*--extension"):
        load_study(files[1])
    named = tmp_path / "named.yaml"
    named.write_text(Path(files[1]).read_text().replace("trial:\n", "trial:\n  extension: abc\n", 1))
    with pytest.raises(StudyError, match=r"trial.extension: .*expected --extension FILE.py"):
        load_study(named, extension=files[0])


def keys(study: str, own: str | None) -> dict[str, str]:
    fresh()
    found = {}
    loaded = load_study(study, extension=own)
    prints = {"data:ask": "a", "data:corpus": "c"}
    for arm in ("forward", "huber"):
        spec = loaded.spec(arm=arm, seed=0).pruned()
        found |= {f"{arm} {run}": phase_key(spec, run, prints) for run in phase_runs(spec)}
        found[arm] = trial_id(spec, prints)
    return found


def test_the_hash_enters_the_keys_of_what_uses_the_file_and_no_others(files: tuple[str, str]) -> None:
    own, study = (Path(file) for file in files)
    study.write_text(study.read_text().replace("metrics: [first_word]", "metrics: []").replace("first_word", "rougeL"))
    before = keys(files[1], files[0])
    own.write_text(own.read_text() + "\n# another text\n")
    after = keys(files[1], files[0])
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"huber distil", "huber", "forward"}
    study.write_text(
        study.read_text().replace("kind: huber", "kind: reverse_kl").replace("delta: 2", "tau_squared: false")
    )
    with_file, without = keys(files[1], files[0]), keys(files[1], None)
    assert {name for name in without if with_file[name] != without[name]} == {"huber", "forward"}


def test_a_slot_installs_what_the_driver_sends_and_refuses_another(files: tuple[str, str], tmp_path: Path) -> None:
    load_study(files[1], extension=files[0])
    spec = load_study(files[1]).spec(arm="huber", seed=0)  # installed in this process
    again, own = spec.model_dump_json(), extension.installed()
    assert own is not None and type(spec).model_validate_json(again) == spec
    fresh()
    with pytest.raises(ValueError, match=r"expected --extension FILE.py|Input tag"):
        type(spec).model_validate_json(again)
    sent = Expected("x", "y", "", {}, "", "cpu", False, (), (), (own.file, own.text))
    assert preflight._extension(sent) is None  # the classes are new ones, and equal in all that is dumped
    assert type(spec).model_validate_json(again).model_dump_json() == again
    other = Expected("x", "y", "", {}, "", "cpu", False, (), (), (own.file, own.text + "#"))
    assert "expected one file" in (preflight._extension(other) or "")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    try:
        yield bench
    finally:
        bench.close()


@pytest.mark.slow
def test_the_pages_study_runs_in_slots_with_the_pages_file(files: tuple[str, str], bench: Bench) -> None:
    own, study = files
    bench.sweep(study, "--extension", own)
    runs = bench.folder / "runs" / "mine"
    results = pd.read_parquet(runs / "results.parquet")
    measured = results[(results["metric"] == "first_word") & (results["split"] == "test")]
    assert set(measured["arm"].dropna()) == {"forward", "huber"} and measured["value"].between(0, 100).all()
    assert (runs / "report.html").is_file() and "my_methods.py" in (runs / "provenance.json").read_text()
    assert pd.read_parquet(runs / "examples.parquet")["scores"].str.contains("first_word").any()
    refused = bench.sweep(study, expect=2)
    assert "--extension" in refused.err
