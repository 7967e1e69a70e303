"""Metrics of replies beside ROUGE-L: against worked examples, and against sacrebleu called by itself."""

from __future__ import annotations

from typing import Any

import pytest
import sacrebleu
from pydantic import TypeAdapter, ValidationError

from trainables.config.data import Scoring
from trainables.config.reply_metrics import ReplyMetric
from trainables.metrics.known import METRICS
from trainables.metrics.replies import NAMED_BY_DATA, SCORES, score_reply


def score(metric: Any, reply: str, *references: str) -> float:
    return score_reply(TypeAdapter(ReplyMetric).validate_python(metric), reply, references)


LAST = {"kind": "exact_match", "extract": "last_number"}


@pytest.mark.parametrize(
    ("metric", "reply", "references", "expected"),
    [
        ("exact_match", " The  Map ", ["the map"], 100),
        ("exact_match", "the map.", ["the map"], 0),
        (LAST, "3 apples and 4 more: 1,007.50 in all.", ["so #### 1007.5"], 100),
        (LAST, "it is 72", ["48 + 24 = 72", "or -72"], 100),
        (LAST, "it is -72", ["it is 72"], 0),
        (LAST, "I do not know", ["there is none"], 0),  # no answer is no right answer
        (LAST, "no number", ["72"], 0),
        ({"kind": "exact_match", "extract": r"#### (\S+)"}, "9 #### 8", ["#### 8.0"], 100),
        ({"kind": "exact_match", "extract": "yes|no"}, "no, no, yes", ["Yes: yes"], 100),
        ("token_f1", "The cat, sat!", ["a cat sat down"], 200 * 2 / 5),
        ("token_f1", "cat cat", ["cat", "dog"], 200 / 3),
        ("token_f1", "", ["cat"], 0),
        ("token_f1", "今天好。", ["今天很好"], 200 * 3 / 7),
    ],
)
def test_a_reply_scores_what_its_definition_says(
    metric: Any, reply: str, references: list[str], expected: float
) -> None:
    assert score(metric, reply, *references) == pytest.approx(expected)


@pytest.mark.parametrize("reply", ["the cat sat on a mat", "A dog.", "", "the the the the the"])
def test_chrf_and_bleu_are_those_of_sacrebleu(reply: str) -> None:
    references = ["the cat sat on the mat", "a cat was sitting on a mat"]
    assert score("chrf", reply, *references) == pytest.approx(sacrebleu.sentence_chrf(reply, references).score)
    bleu = sacrebleu.sentence_bleu(reply, references, use_effective_order=True).score
    assert score("sentence_bleu", reply, *references) == pytest.approx(bleu)


@pytest.mark.parametrize("metric", [metric.name for metric in NAMED_BY_DATA])
def test_a_reference_scores_100_whatever_stands_beside_it_and_there_must_be_one(metric: str) -> None:
    text = "one map of the sun"
    assert score(metric, text, text) == pytest.approx(100) == score(metric, text, "another", text)
    assert score(metric, text, "quick 9") == pytest.approx(0, abs=5)
    with pytest.raises(ValueError, match="no reference"):
        score(metric, text)


def test_each_metric_that_data_may_name_is_known_and_is_named_once() -> None:
    kinds = {cls.model_fields["kind"].annotation.__args__[0] for cls in SCORES}  # type: ignore[union-attr]
    assert kinds == {metric.name for metric in NAMED_BY_DATA} and set(NAMED_BY_DATA) <= set(METRICS)
    with pytest.raises(ValidationError, match="chrf is there twice"):
        Scoring.model_validate({"metrics": ["chrf", {"kind": "chrf"}]})
    with pytest.raises(ValidationError, match="no regular expression"):
        Scoring.model_validate({"metrics": [{"kind": "exact_match", "extract": "("}]})


def test_a_data_set_that_names_no_metric_keeps_its_fingerprint() -> None:
    assert "metrics" not in Scoring().model_dump(mode="json")
    named = Scoring.model_validate({"metrics": ["chrf", LAST]})
    assert Scoring.model_validate_json(named.model_dump_json()) == named
