"""ROUGE-L: against worked examples, and against the published definition computed here by itself."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from trainables.metrics.rouge import rouge_l


def by_definition(text: str, reference: str) -> float:
    """Lin 2004, equations 2 to 4 with beta 1, of words that no stemmer changes."""
    a, b = reference.split(), text.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    if not common:
        return 0.0
    recall, precision = common / len(a), common / len(b)
    return 100 * 2 * recall * precision / (recall + precision)


def test_it_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    draw, words = random.Random(0), ["cat", "dog", "hat", "map", "sun"]
    for _ in range(50):
        text, reference = (" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(2))
        assert rouge_l(text, [reference]) == pytest.approx(by_definition(text, reference))


def test_words_count_without_case_punctuation_and_endings() -> None:
    assert rouge_l("The CATS, running!", ["the cat runs"]) == pytest.approx(100)
    assert rouge_l("police killed the gunman", ["police kill the gunman"]) == pytest.approx(100)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(50)


def test_of_several_references_the_best_counts_whatever_their_order() -> None:
    references = ["something else entirely", "a map of the sun", "a map"]
    assert rouge_l("a map", references) == rouge_l("a map", references[::-1]) == pytest.approx(100)
    assert rouge_l("a map of", ["a map", "a"]) == pytest.approx(80)


def test_what_is_remembered_of_a_text_is_what_the_package_makes_of_it_each_time() -> None:
    plain = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    draw, words = random.Random(1), ["Running", "runs,", "ran", "caresses", "ponies", "dying", "NEWS", "a", "é", "x_1"]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(30)]
    for text, reference in [(a, b) for a in texts for b in texts] * 2:  # the second time from memory
        assert rouge_l(text, [reference]) == 100 * plain.score(reference, text)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("今天天气好", "今天天气很好", 200 * 5 / 11),  # five of six characters
        ("मुझे हिन्दी पसंद है", "मुझे हिन्दी पसंद है।", 100),  # vowel signs are parts of words
        ("القطة على السجادة", "القطة تحت السجادة", 200 / 3),
        ("Кот СПИТ, кот.", "кот спит", 80),
        ("καλημέρα", "noch etwas anderes", 0),
        ("ฉัน", "ฉันรัก", 200 * 3 / 9),
    ],
)
def test_words_of_every_script_count(text: str, reference: str, expected: float) -> None:
    assert rouge_l(text, [reference]) == pytest.approx(expected)


LATIN = st.text(st.characters(max_codepoint=0x24F) | st.sampled_from("’“”–—… α中🙂"), max_size=40)


@given(LATIN, LATIN.filter(lambda text: sum(char in "α中" for char in text) <= sum(char in "etaoin" for char in text)))
def test_texts_in_latin_script_score_what_the_papers_package_gives(text: str, reference: str) -> None:
    plain = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    assert rouge_l(text, [reference]) == 100 * plain.score(reference, text)["rougeL"].fmeasure


def test_nothing_scores_nothing_and_needs_a_reference() -> None:
    assert rouge_l("", ["a map"]) == 0 and rouge_l("…", ["a map"]) == 0 and rouge_l("a map", ["!"]) == 0
    with pytest.raises(ValueError, match="no reference"):
        rouge_l("a map", [])
