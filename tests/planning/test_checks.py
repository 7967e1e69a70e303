"""What the plan says and refuses of pretrained weights: heads drawn anew, classes, special tokens; one line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from orchestrator import sweep
from tests.support.trials import Lab, flow, hard, inner, phase
from trainables.config.models import Model
from trainables.data.prepared import open_data
from trainables.models import build, tokenizer_check

Planned = Callable[..., tuple[int, str]]
ON_TASK: dict[str, Any] = {"streams": {"main": {"data": "single"}}, "budget": {"steps": 2}}


@pytest.fixture
def folder(new_task_lab: Callable[[], Lab], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Saves a small model for the data's tokenizer; returns it as a trial names it."""
    lab = new_task_lab()
    corpus = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"])
    ids = tokenizer_check.special_ids(corpus.tokenizer)

    def make(
        name: str, family: str = "bert", *, trunk: bool = False, config: dict[str, Any] | None = None, **how: Any
    ) -> Any:
        shape = {"family": family, "layers": 1, "width": 16, "heads": 2, "intermediate_size": 32, "dropout": 0}
        sizes: dict[str, Any] = {"vocab_size": corpus.vocab_size, "special_ids": ids, "length": 32}
        net = build.build(Model.model_validate(shape), name=name, seed=0, **sizes, **how)
        net.save_pretrained(tmp_path / name)
        if trunk:
            AutoModel.from_pretrained(tmp_path / name).save_pretrained(tmp_path / name)
        about = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(about | (config or {})))
        return {"pretrained": str(tmp_path / name)}

    return make


@pytest.fixture
def planned(new_task_lab: Callable[[], Lab], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Planned:
    """Plans a study of these models and phases; returns the exit code, and the plan or the error."""

    def make(models: dict[str, Any], phases: dict[str, Any], **objective: Any) -> tuple[int, str]:
        lab = new_task_lab()
        data = {name: lab.data[name] for name in ("single", "pair", "corpus")}
        aim = {"phase": list(phases)[-1], "model": "student", "metric": "score", "mode": "max", **objective}
        raw = {"question": "?", "trial": {"data": data, "models": models, "phases": phases}, "objective": aim}
        (tmp_path / "mine.yaml").write_text(json.dumps(raw | {"arms": {"only": {}}, "seeds": 1}))
        code = sweep.main([str(tmp_path / "mine.yaml"), "--dry-run", "--storage", lab.storage.uri])
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == (code != 0) and "Traceback" not in said.err
        return code, lines[0] if lines else said.out

    return make


def distilling(**more: Any) -> dict[str, Any]:
    terms = {"hard": hard("student"), "soft": flow("teacher", "student")}
    return {"distil": phase("student", terms, **{**ON_TASK, **more})}


def test_a_head_that_nothing_trains_is_refused(planned: Planned, folder: Any) -> None:
    models = {"teacher": folder("big"), "student": folder("small")}
    code, said = planned(models, distilling())
    assert code == 2 and said.endswith(
        "mine.yaml: models.teacher: has no head for the outputs of data.single, and phase distil reads it without training; "
        "expected a classifier of these, or an earlier phase on data.single with train: {teacher: full}"
    )
    taught = {"teach": phase("teacher", {"h": hard("teacher")}, **ON_TASK), **distilling()}
    code, said = planned(models, taught)
    assert code == 0 and said.count(" draws its head for the 2 outputs of data.single anew") == 2
    models["teacher"] = folder("classifier", num_labels=2, class_names=("many", "few"))
    code, said = planned(models, distilling())
    assert code == 0 and "student      phase distil draws its head" in said and "teacher      phase" not in said
    pairs: dict[str, Any] = {"kind": "lora"}
    lora = phase("student", {"hard": hard("student")}, **ON_TASK) | {"train": {"student": pairs}}
    code, said = planned({"student": folder("small")}, {"tune": lora})
    assert code == 0 and "student      phase tune draws its head" in said  # which then learns, too
    pairs["head"] = False
    code, said = planned({"student": folder("small")}, {"tune": lora})
    assert code == 2 and "phase tune trains LoRA's pairs alone; expected a classifier" in said
    earlier = {"pretrain": phase("student", {"h": hard("student")}) | {"train": {"student": {**pairs, "head": True}}}}
    code, said = planned(
        {"student": folder("small")}, {**earlier, "tune": phase("student", {"h": hard("student")}, **ON_TASK)}
    )
    assert code == 2 and "`head: true` is for classifiers, and phase pretrain trains a language model" in said


def test_a_head_of_an_earlier_phase_on_other_data_is_not_read_as_if_it_were_trained(
    planned: Planned, folder: Any
) -> None:
    models = {"teacher": folder("big"), "student": folder("small")}
    on_pair = ON_TASK | {"streams": {"main": {"data": "pair"}}}
    code, said = planned(models, {"teach": phase("teacher", {"h": hard("teacher")}, **on_pair), **distilling()})
    assert code == 2 and "models.teacher: has no head for the outputs of data.single, and phase distil reads" in said


def test_classes_that_differ_are_refused_by_their_names(planned: Planned, folder: Any) -> None:
    for num, names, words in (
        (2, ("ham", "spam"), "has the classes ham, spam, and the data have few, many; expected the same names"),
        (3, (), "is a classifier of 3 classes, and the data have 2; expected as many"),
    ):
        models = {"teacher": folder("big", num_labels=num, class_names=names), "student": folder("small")}
        code, said = planned(models, distilling())
        assert code == 2 and "mine.yaml: models.teacher: " in said and words in said


def test_a_trunk_teaches_what_lies_below_the_head_and_nothing_else(planned: Planned, folder: Any) -> None:
    models = {"teacher": folder("big", trunk=True), "student": folder("small")}
    terms = {"hard": hard("student"), "deep": inner("teacher", "student", "hidden_mse")}
    on_text = {"streams": {"main": {"data": "corpus"}}, "budget": {"steps": 2}}
    aim = {"metric": "mlm_loss", "mode": "min"}
    code, said = planned(models, {"distil": phase("student", terms, **on_text)}, **aim)
    assert code == 0, said
    terms["soft"] = flow("teacher", "student")
    code, said = planned(models, {"distil": phase("student", terms, **on_text)}, **aim)
    assert code == 2 and "(BertModel) has other tensors than BertForMaskedLM with this config" in said


def test_a_classifier_like_a_decoder_without_padding_pads_as_the_tokenizer_does(planned: Planned, folder: Any) -> None:
    teacher = folder("big", "llama", config={"pad_token_id": None})
    like = {"like": "teacher", "layers": 1, "init": {"kind": "remap", "from": "teacher", "depth": "first"}}
    teach = phase("teacher", {"h": hard("teacher")}, **ON_TASK)
    code, said = planned({"teacher": teacher, "student": like}, {"teach": teach, **distilling()})
    assert code == 0, said


def test_special_tokens_are_the_tokenizers_and_where_the_config_differs_it_is_said(
    planned: Planned, folder: Any
) -> None:
    tune = {"tune": phase("student", {"hard": hard("student")}, **ON_TASK)}
    for pad, words in ((7, "student      its config.json has pad_token_id 7, the tokenizer 0;"), (None, ""), (0, "")):
        code, said = planned({"student": folder("small", "llama", config={"pad_token_id": pad})}, tune)
        assert code == 0 and (words in said if words else "its config.json has" not in said), said
