"""Several workers on one trial: the same numbers as one, stops and failures that leave a working group."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tests.support.trials import Lab, flow, hard, inner, model, phase

pytestmark = pytest.mark.slow  # every process imports torch and transformers


CO_TRAINING = {
    "models": {"big": model(layers=2), "small": model(), "frozen": model("modernbert")},
    "phases": {
        "teach": phase("frozen", {"hard": hard("frozen")}),
        "both": phase(
            ("big", "small"),
            {
                "big_hard": hard("big"),
                "small_hard": hard("small"),
                "big_to_small": flow("big", "small"),
                "small_to_big": flow("small", "big", "jeffreys", weight={"kind": "linear", "start": 0, "end": 2}),
                "frozen_to_small": flow("frozen", "small", "reverse_kl", temperature=2, weight={"kind": "off_when_better", "weight": 1}),
            },
            save_at=[0.5],
        ),
    },
}  # fmt: skip


TASKS: dict[str, Any] = {
    "models": {"teacher": model(layers=2, width=32), "student": model()},
    "phases": {
        "teach": phase("teacher", {"h": hard("teacher")}, for_each_dataset=["single", "number"]),
        "distil": phase(
            "student",
            {
                "h": hard("student"),
                "soft": flow("teacher", "student", temperature=2),
                "states": inner("teacher", "student", "hidden_mse", layers=[[2, 1]], projector=True),
                "relations": inner("teacher", "student", "relation_kl", heads=4),
            },
            for_each_dataset=["single", "number"],
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(("micro", "only"), [(None, None), (2, None), (None, "states")])
def test_two_workers_give_the_numbers_of_one_on_tasks(
    new_task_lab: Callable[[], Lab], micro: int | None, only: str | None
) -> None:
    """Also where nothing but a term inside the models teaches, and what is above it learns nothing."""
    one_lab, two_lab = new_task_lab(), new_task_lab()
    trial = copy.deepcopy(TASKS)
    if only is not None:
        trial["phases"]["distil"]["terms"] = {only: TASKS["phases"]["distil"]["terms"][only]}
    spec = one_lab.spec(trial)
    one, two = one_lab.run(spec), run_on_ranks(two_lab, two_lab.spec(trial), 2, micro)
    assert one.values.keys() == two.values.keys()
    for key, value in one.values.items():
        if key[4].endswith("_loss") or key[3] == "train":
            assert two.values[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    frames = [lab.store.examples(lab.key(spec, "distil", "number")) for lab in (one_lab, two_lab)]
    torch.testing.assert_close(
        *(torch.tensor(frame["prediction"].to_numpy()) for frame in frames), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("micro", [None, 1])
def test_two_workers_give_the_numbers_of_one(new_lab: Callable[[], Lab], micro: int | None) -> None:
    one_lab, two_lab = new_lab(), new_lab()
    spec = one_lab.spec(CO_TRAINING)
    one, two = one_lab.run(spec), run_on_ranks(two_lab, two_lab.spec(CO_TRAINING), 2, micro)
    assert one.values.keys() == two.values.keys()
    for key, value in one.values.items():
        assert two.values[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key
    for name in ("big", "small"):
        ours, theirs = one.weights("both", name), two.weights("both", name)
        for path, tensor in ours.items():
            torch.testing.assert_close(theirs[path], tensor, rtol=2e-3, atol=2e-4)
    costs = {(r["phase"], r["progress"]): r["flops"] for r in one.records}
    assert {(r["phase"], r["progress"]): r["flops"] for r in two.records} == pytest.approx(costs)


def test_a_batch_that_the_workers_cannot_share_is_refused(new_lab: Callable[[], Lab]) -> None:
    lab = new_lab()
    spec = lab.spec(CO_TRAINING, {"phases.teach.batch": 7})
    with pytest.raises(Exception, match="a batch of 7 cannot be shared by 2 workers"):
        run_on_ranks(lab, spec, 2)


@pytest.mark.parametrize("scene", ["leave", "sigterm of rank 1"])
def test_all_ranks_leave_together_and_one_worker_goes_on(new_lab: Callable[[], Lab], scene: str) -> None:
    """Whoever is asked, the checkpoint is that of all; what goes on from it ends with the numbers of a whole run."""
    lab, whole = new_lab(), new_lab()
    changes = {"phases.both.budget.steps": 40}
    if scene == "leave":
        lab.storage.write("leave", b"leave")
    run_on_ranks(lab, lab.spec(CO_TRAINING, changes), 2, scene=scene)
    asked = "leave" if scene == "leave" else "terminated"
    assert [(lab.root / f"left-{rank}").read_text() for rank in (0, 1)] == [asked, asked]
    assert lab.storage.read("study/trials/t/attempt-1/checkpoint.json") is not None
    again = lab.run(lab.spec(CO_TRAINING, changes), attempt=2)
    plain = whole.run(whole.spec(CO_TRAINING, changes))
    assert again.values.keys() == plain.values.keys()
    for key, value in plain.values.items():
        assert again.values[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key


def test_ranks_agree_on_a_micro_batch_that_fits_on_all(new_lab: Callable[[], Lab]) -> None:
    lab, plain = new_lab(), new_lab()
    two = run_on_ranks(lab, lab.spec(CO_TRAINING), 2, scene="little memory")
    for rank in (0, 1):
        assert lab.storage.read(f"micro-{rank}-both") == b"2"
    one = plain.run(plain.spec(CO_TRAINING))
    for key, value in one.values.items():
        assert two.values[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key


def test_a_slot_keeps_its_group_until_it_dies_or_has_served_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainables.runtime import worker_group

    class Fake:
        def __init__(self, *_: Any) -> None:
            self.served, self.is_alive, self.is_closed = 0, False, False

        def start(self) -> None:
            self.is_alive = True

        def close(self) -> None:
            self.is_closed = True

    monkeypatch.setattr(worker_group, "Group", Fake)
    monkeypatch.setattr(worker_group, "_GROUP", None)
    first: Any = worker_group.group(2, 1, 0, folder="x", expected="")
    first.served = worker_group.RENEW_AFTER - 1
    assert worker_group.group(2, 1, 0, folder="x", expected="") is first
    first.served += 1
    second: Any = worker_group.group(2, 1, 0, folder="x", expected="")
    assert second is not first and first.is_closed
    second.is_alive = False
    third: Any = worker_group.group(2, 1, 0, folder="x", expected="")
    assert third is not second
    worker_group.close()
    assert third.is_closed and worker_group._GROUP is None
