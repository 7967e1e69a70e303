"""Planned looks through the scheduler: which arms get more seeds, when the sweep ends, and that restarts change nothing."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np

from orchestrator.analysis.claim_history import read_history
from orchestrator.analysis.tables import tables
from orchestrator.analysis.verdicts import Verdict, judge_study
from orchestrator.scheduling.trials import PlannedTrial
from tests.scheduling.test_scheduler import SOFT, TUNE, Make, NewWorld, World, make, world  # noqa: F401

ARMS = {"alone": {SOFT: 0}, "taught": {}, "strong": {SOFT: 4}, "other": {SOFT: 2}}
LOOKS = (3, 5, 8)
GAINS = {"taught": 0.0, "strong": 9.0}  # in SDs of an arm
CLAIM = {"against": "alone", "model": "student", "metric": "mlm_loss"}
CLAIMS = {name: {"arm": name, **CLAIM} for name in GAINS}
ALONE = {"vary": None, "search": None, "confirm": None}


def test_loss(planned: PlannedTrial) -> float:
    arm = planned.arm or ""
    rng = np.random.default_rng([planned.seed, *map(ord, arm)])
    return 3 + 0.1 * (float(rng.normal()) - GAINS.get(arm, 0.0))


test_loss.__test__ = False  # type: ignore[attr-defined]


def study(make: Make, **keys: Any) -> Any:  # noqa: F811
    return make(**{"arms": ARMS, "claims": CLAIMS, "seeds": {"looks": [*LOOKS]}, **ALONE, **keys})


def seeds_of(w: World) -> dict[str, int]:
    return dict(Counter(str(row["arm"]) for row in w.rows(kind="trial") if row["arm"]))


def verdicts(w: World) -> dict[str, Verdict]:
    made = tables(w.ledger.study.folder, w.ledger.all_rows(), w.ledger.records)
    return {v.name: v for v in judge_study(w.ledger.study, made)}


def test_only_arms_of_open_claims_get_more_seeds(make: Make, world: NewWorld) -> None:  # noqa: F811
    w = world(test=test_loss).open(study(make)).run()
    assert seeds_of(w) == {"alone": 8, "taught": 8, "strong": 3, "other": 3}
    found = verdicts(w)
    assert (found["strong"].verdict, found["strong"].look) == ("supported", (3, False))
    assert found["strong"].parts[0].n == 3, "later seeds of the other arm change nothing"
    assert (found["taught"].verdict, found["taught"].look, found["taught"].parts[0].n) == ("undecided", (8, False), 8)
    assert w.scheduler.is_complete() and w.scheduler.num_left() == w.scheduler.most_at_later_looks == 0


def test_without_claims_an_arm_has_the_seeds_of_the_first_look(make: Make, world: NewWorld) -> None:  # noqa: F811
    w = world(test=test_loss).open(study(make, claims={}, seeds=None)).run()
    assert {*seeds_of(w).values()} == {5}, "where a study gives no seeds, looks at 5, 8, 12 and 20 are planned"
    assert w.scheduler.is_complete() and w.is_last


def test_order_slots_and_restarts_change_no_decision(make: Make, world: NewWorld) -> None:  # noqa: F811
    of = study(make, tune=TUNE, claims=CLAIMS | {"other": {"arm": "other", "family": "own", **CLAIM}})
    plain = world(test=test_loss, slots=1).open(of).run()
    wanted = {row["trial"] for row in plain.rows()}, [(v.verdict, v.look) for v in verdicts(plain).values()]
    w = world(test=test_loss, slots=5, order=random.Random(1))
    for _ in range(7):
        w.open(of).run(9)
        for trial in [*w.ledger.running]:  # as where a driver is killed
            w.scheduler.suspend(trial)
    w.open(of).run()
    assert ({row["trial"] for row in w.rows()}, [(v.verdict, v.look) for v in verdicts(w).values()]) == wanted
    assert w.scheduler.next() is None and w.scheduler.is_complete()


def test_slots_stay_while_a_later_look_may_need_them(make: Make, world: NewWorld) -> None:  # noqa: F811
    w = world(test=test_loss, slots=20).open(study(make))
    assert w.scheduler.most_at_later_looks == 3 * (8 - 3) and w.scheduler.num_left() == 4 * 3
    w.run()
    assert w.is_last, "at the last look nothing follows (World.fill refuses what is started after that was said)"


def test_a_limit_leaves_open_claims_provisional(make: Make, world: NewWorld) -> None:  # noqa: F811
    w = world(test=test_loss).open(study(make)).run(16)
    w.scheduler.close("limit")
    w.run()
    found = verdicts(w)
    assert found["strong"].verdict == "supported" and found["strong"].look == (3, False)
    assert found["taught"].verdict == "undecided" and found["taught"].look == (5, True)
    assert w.scheduler.num_left() > 0 and w.scheduler.most_at_later_looks == 2 * (8 - 5)
    assert seeds_of(w.open(study(make)).run()) == {"alone": 8, "taught": 8, "strong": 3, "other": 3}


def test_a_failed_seed_does_not_hold_up_a_look(make: Make, world: NewWorld) -> None:  # noqa: F811
    def loss(planned: PlannedTrial) -> float | None:
        return None if planned.arm == "taught" and planned.seed == 1 else 3.0

    w = world(test=test_loss, loss=loss).open(study(make)).run()
    assert seeds_of(w)["taught"] == 8 and verdicts(w)["taught"].look == (8, False)


def test_what_a_study_claims_is_kept_when_its_first_trial_begins(make: Make, world: NewWorld) -> None:  # noqa: F811
    w = world(test=test_loss).open(study(make))
    home = w.ledger.home
    assert not home.list("claims")
    w.run(1)
    assert home.list("claims") == ["000.json"] and read_history(home).fixed is not None
    w.run()
    assert home.list("claims") == ["000.json"], "later looks change nothing of what was claimed"
    w.open(study(make, seeds=9)).run()
    history = w.scheduler.claim_history()
    assert home.list("claims") == ["000.json", "001.json"] and history.is_beyond_plan and not history.is_new
    assert [edit.text() for edit in history.edits()] == ["seeds: [3, 5, 8] → 9"]


def test_a_folder_that_is_new_beside_stored_results_knows_nothing(make: Make, world: NewWorld) -> None:  # noqa: F811
    """As after `--fresh`, or where the folder was deleted: the phases, and so the results, are in the store."""
    w = world(test=test_loss).open(study(make)).run()
    assert w.scheduler.claim_history().stated("taught").text() == "fixed before results"
    w.scheduler.storage.move(w.scheduler.study.folder, "aside")
    again = w.open(study(make, claims={"taught": {**CLAIMS["taught"], "margin": -1}})).run()
    assert again.scheduler.claim_history().stated("taught").num_results is None
