"""The printed plan: what is reused and what runs, what the losses come to, what remaps do; and it writes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from orchestrator.planning.preview import print_plan
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import Fingerprints
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from orchestrator.sweep import main
from tests.support.studies import run_trials
from tests.support.trials import Lab, distillation, model
from trainables.config.models import Model
from trainables.data.prepared import open_data
from trainables.models.build import build

SOFT = "phases.distil.terms.teacher_to_student"


@pytest.fixture
def plan(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, list[str]]]:
    """Prints the plan of a study with some keys changed; returns its lines by heading."""

    def make(run_it: bool = False, trial: Mapping[str, Any] | None = None, **keys: Any) -> dict[str, list[str]]:
        raw = {
            "question": "?",
            "trial": {"data": {"corpus": lab.data["corpus"]}, **distillation(), **(trial or {})},
            "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"},
            "arms": {"alone": {f"{SOFT}.weight": 0}, "taught": {}},
            "seeds": 1,
        } | keys
        file = tmp_path / "mine.yaml"
        file.write_text(json.dumps(raw))
        study = load_study(file)
        scheduler = Scheduler(study, Fingerprints(None), lab.storage)
        before = sorted(str(path) for path in lab.root.rglob("*"))
        print_plan(scheduler)
        assert sorted(str(path) for path in lab.root.rglob("*")) == before
        if run_it:
            run_trials(scheduler)
        lines: dict[str, list[str]] = {}
        head = ""
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("  "):
                head = line[2:10].strip() or head
                lines.setdefault(head, []).append(line[10:])
        return lines

    return make


def test_what_an_edit_changes_is_counted(plan: Callable[..., dict[str, list[str]]]) -> None:
    first = plan(run_it=True)
    assert first["trials"][0] == "2 arms x 1 seeds" and first["trials"][1].startswith("0 reused, 2 to run")
    assert plan()["trials"][1].startswith("2 reused, 0 to run") and plan()["cost"][0] == "nothing to train"
    more = plan(seeds=2, arms={"alone": {f"{SOFT}.weight": 0}, "taught": {}, "strong": {f"{SOFT}.weight": 4}})
    assert more["trials"][1].startswith("+1 arm, +1 seed: 2 reused, 4 to run")
    fewer = plan(arms={"alone": {f"{SOFT}.weight": 0}})
    assert fewer["trials"][1].startswith("1 reused, 0 to run") and fewer["trials"][1].endswith("1 set aside")
    assert any("1 to have, 1 in the store" in line for line in plan()["phases"])


def test_coefficients_are_those_that_the_loss_comes_to(plan: Callable[..., dict[str, list[str]]]) -> None:
    trial = distillation()
    term = trial["phases"]["distil"]["terms"]["teacher_to_student"]
    term |= {"temperature": 3, "tau_squared": True, "weight": {"kind": "linear", "start": 4, "end": 1}}
    losses = plan(trial=trial)["losses"]
    assert losses[-1] == (
        "distil.teacher_to_student: 4 → 1 x τ²=9 x forward_kl(teacher → student) at τ=3, gradient into student only"
    )
    assert losses[0] == "teach.teacher_hard: 1 x cross-entropy of teacher"


def test_remaps_stand_with_their_layers_and_a_measured_verdict(plan: Callable[..., dict[str, list[str]]]) -> None:
    init = {"kind": "remap", "from": "teacher", "depth": "copy_last"}
    trial = distillation()
    trial["models"]["student"] = {**trial["models"]["student"], "init": init, "layers": 3}
    assert plan(trial=trial)["remaps"][0].startswith(
        "student from teacher, copy_last 1→3: layers 0 0 0; lossy (logits change by "
    )
    trial["models"]["student"]["layers"] = 1
    assert "exact" in plan(trial=trial)["remaps"][0]


def test_a_remap_from_pretrained_weights_has_a_verdict_by_their_own_shape(
    plan: Callable[..., dict[str, list[str]]], lab: Lab, tmp_path: Path
) -> None:
    rows = open_data(lab.storage.sub("data").uri, lab.fingerprints["data:corpus"]).vocab_size
    shape, special = Model.model_validate(model(layers=2)), {"pad_token_id": 0}
    build(shape, name="m", seed=0, vocab_size=rows, special_ids=special, length=32).save_pretrained(tmp_path / "m")
    init = {"kind": "remap", "from": "teacher", "depth": "first"}
    trial = distillation(teacher={"pretrained": str(tmp_path / "m")}, student=model(layers=2, init=init))
    assert plan(trial=trial)["remaps"] == ["student from teacher, first 2→2: layers 0 1; exact (logits change by 0)"]
    trial["models"]["student"]["layers"] = 1
    assert plan(trial=trial)["remaps"][0].startswith("student from teacher, first 2→1: layers 0; lossy")


def test_the_plan_says_what_the_data_are_and_shows_examples(plan: Callable[..., dict[str, list[str]]]) -> None:
    lines = plan()
    assert any(line.startswith("tokenizer of ") and " tokens, identity " in line for line in lines["data"])
    assert sum("→[MASK]»" in line for line in lines["data"]) >= 1
    assert any("parameters" in line for line in lines["models"]) and "optimizer" in lines["memory"][0]


def test_the_parts_of_memory_add_up_to_what_is_said(plan: Callable[..., dict[str, list[str]]]) -> None:
    line, checkpoints = plan()["memory"]
    units = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}
    total, _, *parts = [float(size) * units[unit] for size, unit in re.findall(r"([\d.e+]+) ([KMG]?B)\b", line)]
    assert len(parts) == 8 and total == pytest.approx(sum(parts), rel=0.01)
    assert "in phase distil of arm taught: process 650 MB, weights " in line and ", teacher " in line
    assert checkpoints.startswith("a checkpoint in phase ")
    bigger = plan(arms={"taught": {}, "big": {"models.student.layers": 6, f"{SOFT}.weight": 0}}, slot={"memory_gb": 4})
    assert " of 4 GB in phase distil of arm big" in bigger["memory"][0] and "teacher" not in bigger["memory"][0]


def test_steps_that_weights_in_bf16_cannot_make_are_told(plan: Callable[..., dict[str, list[str]]]) -> None:
    def lost(*names: str, kind: Any = "full") -> list[str]:
        trial = distillation()
        for name in names:
            trial["models"][name]["dtype"] = "bf16"
        trial["phases"]["distil"]["train"]["student"] = kind
        trial["phases"]["distil"]["optimizer"]["lr"] = 1e-5
        return [line for line in plan(trial=trial)["phases"] if "bf16" in line]

    (line,) = lost("student")
    assert "distil " in line and "at lr 1e-05 no weight beyond 0.0051 moves" in line
    assert len(lost("student", "teacher")) == 2 and not lost()
    assert not lost("student", kind={"kind": "lora"})  # its pairs are in fp32


def test_a_trial_that_fits_no_slot_is_refused_in_one_sentence(
    plan: Callable[..., dict[str, list[str]]], tmp_path: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        StudyError, match=r"needs .* \(process 650 MB, weights .* a slot has 600 MB for a worker; to need less: "
    ):
        plan(slot={"memory_gb": 0.6})
    capsys.readouterr()
    assert main([str(tmp_path / "mine.yaml"), "--dry-run", "--storage", str(lab.root)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out.strip()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_are_planned_like_encoders(plan: Callable[..., dict[str, list[str]]], family: str) -> None:
    trial = distillation(teacher=model(family), student=model(family))
    for phase in trial["phases"].values():
        phase["streams"] = {"main": {"corruption": None}}
    objective = {"phase": "distil", "model": "student", "metric": "lm_loss", "mode": "min"}
    found = plan(trial=trial, objective=objective)
    assert "activations" in found["memory"][0] and "device-hours" in found["cost"][0]


def test_a_search_is_counted_once_before_and_after_it_ran(plan: Callable[..., dict[str, list[str]]]) -> None:
    search = {
        "vary": {"phases.distil.optimizer.lr": {"float": [1e-3, 1e-2]}},
        "search": {"sampler": "random", "points": 2},
        "confirm": {"against": "alone", "seeds": 2},
    }
    first = plan(run_it=True, **search)
    assert "2 points by random over 1 factors; the winner and alone on 2 fresh seeds" in first["trials"][0]
    assert first["trials"][2:] == [
        "early stopping: none",
        "confirmation: the winner against alone as it was tuned and at the winner's lr; if it costs more, also against alone for "
        "as long as costs the same: up to 8 trials",
    ]
    again = plan(**search)
    assert again["trials"][1] == "12 reused, 0 to run of those that can be named now"
    assert again["cost"][0] == "nothing to train"


def test_power_is_told_by_the_number_of_seeds(plan: Callable[..., dict[str, list[str]]]) -> None:
    claim = {"claims": {"helps": {"arm": "taught", "against": "alone", "model": "student", "metric": "mlm_loss"}}}
    assert "no claim can be decided" in plan(**claim)["power"][0]
    assert plan(**claim, seeds=5)["power"][0].startswith("5 paired seeds detect 1.6")
    five = {f"helps{i}": {**claim["claims"]["helps"], "margin": i / 10} for i in range(5)}
    power = plan(claims={**five, "other": {**claim["claims"]["helps"], "family": "side", "split": "dev"}}, seeds=4)[
        "power"
    ]
    assert power[0].startswith("4 paired seeds detect 3.72 SD in the first of 5 claims (Holm), 2.13 in the last")
    assert power[1].startswith("family side: 4 paired seeds detect 2.13 SD;")
    looks = plan(claims={f"helps{i}": five[f"helps{i}"] for i in (0, 1)}, seeds={"looks": [5, 8, 12, 20]})
    assert looks["trials"][0] == "2 arms x 5 seeds at first"
    assert looks["trials"][2].startswith("looks at 5, 8, 12, 20 seeds: ") and "at most 40 trials" in looks["trials"][2]
    assert looks["power"][0].startswith("alpha .05 over 4 looks: level .016")
    assert re.fullmatch(r"1 SD: power by look .*\(mean n 1\d.\d\) in the first of 2 claims \(Holm\); 0.19, 0.4\d, 0.7\d, 0.9\d \(mean n 11.5\) in the last", looks["power"][3])  # fmt: skip
    assert "power" not in plan()


def test_a_batch_that_the_workers_cannot_share_is_refused(plan: Callable[..., dict[str, list[str]]]) -> None:
    with pytest.raises(StudyError, match=r"batch: 8 cannot be shared by slot.workers 3; expected a multiple"):
        plan(slot={"workers": 3})


def instructions(**more: Any) -> dict[str, Any]:
    """A student that learns from a teacher on instructions; `more` of its stream."""
    scoring = {"max_tokens": 8, "seeds": [1]}
    data = {"kind": "python_instructions", "length": 160, "prompt_length": 120, "examples": 40, "evaluate": 4}
    trial = distillation(teacher=model("llama"), student=model("llama"))
    trial["phases"]["distil"]["terms"].pop("student_hard")
    trial["phases"]["distil"]["streams"] = {"main": more}
    tokenizer = {"kind": "wordpiece", "size": 256}
    return {**trial, "data": {**data, "tokenizer": tokenizer, "scoring": scoring}}


SCORED = {
    "objective": {"phase": "distil", "model": "student", "metric": "lm_loss", "mode": "min"},
    "arms": {"taught": {}},
}


def test_instructions_and_replies_are_planned(plan: Callable[..., dict[str, list[str]]]) -> None:
    found = plan(trial=instructions(), **SCORED)
    assert "activations" in found["memory"][0] and found["cost"][0].endswith("(steps timed here)")
    assert any("40 exchanges" in line for line in found["data"])
    made = plan(trial=instructions(replies={"kind": "sampled", "by": "student", "max_tokens": 16}), **SCORED)
    assert made["cost"][0].endswith("(steps timed here, with replies as long as they may be)")


def test_pretrained_weights_must_read_the_data(
    plan: Callable[..., dict[str, list[str]]], lab: Lab, tmp_path: Path
) -> None:
    def saved(length: int) -> dict[str, Any]:
        shape = Model.model_validate(model("llama", width=32))
        special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        build(shape, name="m", seed=0, vocab_size=160, special_ids=special, length=length).save_pretrained(
            tmp_path / "m"
        )
        return {"pretrained": str(tmp_path / "m")}

    def planned(length: int) -> dict[str, list[str]]:
        trial = distillation(teacher=saved(length), student=model("llama"))
        for phase in trial["phases"].values():
            phase["streams"] = {"main": {"corruption": None}}
        return plan(trial=trial, objective={"phase": "distil", "model": "student", "metric": "lm_loss", "mode": "min"})

    assert planned(32)["models"]
    with pytest.raises(
        StudyError, match=r"models\.teacher: .* has 16 positions, .*; expected data\.corpus\.length: 16 at most"
    ):
        planned(16)
    other = Tokenizer(WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=other, unk_token="[UNK]").save_pretrained(tmp_path / "m")
    with pytest.raises(StudyError, match=r"mine\.yaml: models\.teacher: the tokenizers of .* differ in \d+ tokens"):
        planned(32)


def test_a_phase_that_cannot_be_trained_as_it_says_is_refused(
    plan: Callable[..., dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.training.optimizers.find_spec", lambda _: None)
    trial = distillation()
    trial["phases"]["distil"]["optimizer"]["kind"] = "adamw_8bit"
    with pytest.raises(StudyError, match=r"trial\.phases\.distil: optimizer kind adamw_8bit needs bitsandbytes"):
        plan(trial=trial)
