"""What a plan says that training will cost: steps that are too large are timed by some of their rows."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch

from orchestrator.planning import cost
from orchestrator.planning.cost import StepTimer
from orchestrator.planning.meta_models import Shapes
from tests.support.trials import Lab, distillation
from trainables.config.phase_run import PhaseRun
from trainables.data.prepared import open_data


@pytest.mark.parametrize(("flops", "rows", "seconds"), [(1e18, 8, 2.0), (4e6, 3, 2.0 * 8 / 3), (1.0, 0, None)])
def test_a_step_is_timed_whole_or_by_some_rows(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, flops: float, rows: int, seconds: float | None
) -> None:
    """A batch of 8; a clock that moves by two seconds whenever it is read."""
    data = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"])
    spec, read = lab.spec(distillation()), list[int]()
    shapes = Shapes(vocab_size=data.vocab_size, special_ids={"pad_token_id": 0})
    of_row = 6 * shapes.num_parameters(spec.models["teacher"], 32) * data.train.length

    def loss(net: Any, batch: Any, *, is_task: bool) -> torch.Tensor:
        read.append(len(batch.ids_BT))
        return next(net.parameters()).sum()

    monkeypatch.setattr(cost, "_loss", loss)
    monkeypatch.setattr(cost.time, "monotonic", count(step=2).__next__)
    monkeypatch.setattr(cost, "PROBE_FLOPS", flops)
    monkeypatch.setattr(cost, "PART_FLOPS", 3.5 * of_row)
    assert of_row < 4e6 < 8 * of_row
    assert StepTimer({"corpus": data}, shapes).step_seconds(spec, PhaseRun("teach", None)) == seconds
    assert set(read) == ({rows} if rows else set())
