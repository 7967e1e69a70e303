"""Every family of language models that transformers has is planned, trained, exported and loaded by transformers alone with
equal losses; or refused in the plan with one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from orchestrator.model_folder import write_folder
from orchestrator.planning.preview import print_plan
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import Fingerprints
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from tests.support.families import FAMILIES, MULTIMODAL, multimodal_folder, small
from tests.support.trials import Lab, hard, phase
from trainables.data.prepared import open_data
from trainables.models import build, configs

TWELVE = (
    "bert",
    "roberta",
    "electra",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "llama4",
    "llama",
    "qwen3",
    "gemma3",
    "mixtral",
    "mamba",
)


def train_and_export(family: str, lab: Lab, tmp_path: Path, folder: Path | None = None) -> None:
    """Of a shape, or of the weights of a folder. Raises StudyError where the plan refuses the family."""
    masked = configs.is_masked_lm(family) or family in ("modernvbert", "ultravbert")
    terms, budget = {"own": hard("m")}, {"budget": {"steps": 2}, "batch": 4, "evaluate": [1]}
    stream = {} if masked else {"streams": {"main": {"corruption": None}}}
    trial = {"data": {"corpus": lab.data["corpus"]}, "models": {"m": {"family": "bert", "layers": 1, "width": 16}}}
    model = small(family) if folder is None else {"pretrained": str(folder)}
    trial |= {"models": {"m": model}, "phases": {"learn": phase("m", terms, **budget, **stream)}}
    metric = {"phase": "learn", "model": "m", "metric": "mlm_loss" if masked else "lm_loss", "mode": "min"}
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"question": "?", "trial": trial, "objective": metric, "arms": {"a": {}}, "seeds": 1}))
    print_plan(Scheduler(load_study(file), Fingerprints(str(lab.root / "data")), lab.storage))
    if folder is not None:
        own = {"model:m": build.weights_fingerprint(str(folder), None)}
        lab = replace(lab, fingerprints={**lab.fingerprints, **own})
    spec = lab.spec({key: trial[key] for key in ("models", "phases")})
    run = lab.run(spec)
    stored = lab.store.find(run.phases["learn"]["key"])
    assert stored is not None
    net = build.restore(stored.configs["m"], lab.store.weights(stored.key, "m")).eval()
    data = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"])
    write_folder(tmp_path / "to", net, data, spec.models["m"])
    loaded = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(tmp_path / "to").eval()
    ids = data.dev.rows(range(8))
    torch.testing.assert_close(losses(loaded, ids), losses(net, ids), rtol=0, atol=1e-4)


@torch.no_grad()
def losses(net: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    more = {} if configs.is_masked_lm(net.config.model_type) else {"use_cache": False}
    logits = net(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **more).logits
    return (
        cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        .view(len(ids_BT), -1)
        .mean(1)
    )


@pytest.mark.slow
def test_twelve_families_are_trained_exported_and_loaded_with_equal_losses(
    new_lab: Callable[[], Lab], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in TWELVE:
        (tmp_path / family).mkdir()
        train_and_export(family, new_lab(), tmp_path / family)


@pytest.mark.slow
def test_folders_of_models_that_also_read_images_run_on_their_text_part(
    new_lab: Callable[[], Lab], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in MULTIMODAL:
        (tmp_path / family).mkdir()
        train_and_export(family, new_lab(), tmp_path / family, multimodal_folder(family, tmp_path / family / "own"))
        about = json.loads((tmp_path / family / "to" / "config.json").read_text())
        assert about["model_type"].startswith(family) and "vision_config" not in about


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_works_or_is_refused_in_one_line(
    family: str, new_lab: Callable[[], Lab], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = ""
    try:
        train_and_export(family, new_lab(), tmp_path)
    except StudyError as error:
        refused = str(error)
        with capsys.disabled():
            print(f"\n{family}: {refused}")
    assert "\n" not in refused and not (refused and family in TWELVE)
