"""The words of notes: each kind has some, and numbers and names stand in them."""

from __future__ import annotations

from orchestrator.analysis.notes import Kind, Scope, note
from orchestrator.analysis.queries import MetricQuery
from orchestrator.analysis.statistics import Decision
from orchestrator.reporting.notes import SCOPE, WORDS, note_text
from orchestrator.study.schema import Slot


def test_each_kind_and_each_scope_has_words() -> None:
    assert set(WORDS) == set(Kind) and set(SCOPE) == set(Scope)


def test_a_text_has_the_names_and_numbers_of_its_note() -> None:
    query = MetricQuery("distil", "student", "mlm_loss", split="dev", at=0.5)
    assert note_text(note(Kind.NO_VALUE, arm="a", query=query, recorded=(0.25, 1.0))) == (
        "'a' has no dev mlm_loss of 'student' in phase 'distil' at progress 0.5; it has 0.25, 1"
    )
    assert note_text(note(Kind.TOO_LATE, arm="a", axis="flops", seeds=(1, 3), progress=0.25, ratio=1.2)) == (
        "'a' has no value at seed 1, 3: its first evaluation, at 0.25 of its schedule, came after 1.2 times the total "
        "FLOPs of the other arm"
    )
    following = note(
        Kind.NEXT_EVALUATION, arm="a", against="b", effect=-1.5, interval=(-2.0, 1.0), decision=Decision.UNDECIDED
    )
    assert note_text(following) == (
        "evaluations are sparse: at the next one, beyond equal cost, 'a' − 'b' is −1.5 [−2, +1], undecided without Holm"
    )
    margin = note(Kind.AGAINST_MARGIN, arm="a", margin=-0.5, verdict=Decision.REFUTED)
    assert note_text(margin) == "refuted: 'a' is worse by more than 0.5"
    timed = note(Kind.CONDITIONS, side_by_side=0, nodes=(), slot=Slot(), phase="p", num_runs=3, num_elsewhere=3)
    assert note_text(timed) == (
        "timing conditions: a slot was 1 worker with 1 CPU and no GPU each; 3 of 3 runs of phase 'p' were trained by trials "
        "that are not in these tables, under unknown conditions"
    )
