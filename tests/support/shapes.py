"""Studies and shape-only models for tests of the plan."""

from __future__ import annotations

from functools import cache
from typing import Any

from orchestrator.planning.meta_models import Shapes
from orchestrator.study.schema import Study
from tests.support.trials import distillation, model

SPECIAL = {"pad_token_id": 0, "unk_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}


LENGTH = 24


@cache
def shapes() -> Shapes:
    return Shapes(vocab_size=160, special_ids=SPECIAL)


def study(**keys: Any) -> Study:
    data = {"kind": "python_docs", "tokenizer": {"kind": "wordpiece", "size": 160}, "length": LENGTH}
    raw = {
        "name": "mine",
        "file": "mine.yaml",
        "question": "?",
        "trial": {"data": data, **distillation()},
        "objective": {"phase": "distil", "model": "student", "metric": "mlm_loss", "mode": "min"},
    }
    return Study.model_validate({**raw, **keys})


def wide(**changes: Any) -> dict[str, Any]:
    """A trial whose steps need more than its evaluations and its checkpoints; `changes` of each phase."""
    sizes = {"width": 32, "intermediate_size": 128}
    trial = distillation(teacher=model(layers=2, **sizes), student=model(layers=4, **sizes))
    data = {"kind": "python_docs", "tokenizer": {"kind": "wordpiece", "size": 160}, "length": 128, "evaluate": 1}
    for name in trial["phases"]:
        trial["phases"][name] |= {"batch": 64, **changes}
    return {"data": data, **trial}
