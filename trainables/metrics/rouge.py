"""Metrics of generated replies. ROUGE-L comes from the package that the papers used."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from trainables.metrics.metric import Examples, Metric, of_sums, ratio

CACHED_TEXTS = 16_384  # a few KB each
# Thai, Lao, Burmese, Khmer, kana and Han
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Computes the ROUGE-L F-measure, x 100, of stemmed words (Lin 2004): the best over the references.

    Words are runs of a-z and 0-9, as the papers have them. Where most letters of a reference are of another script than
    Latin, words of it and of the text are runs of letters, marks and digits of any script, each character alone in scripts that
    write no spaces.
    """
    if not references:
        raise ValueError("nothing to compare a reply with: there is no reference")
    scores = (_scorer(_is_latin(reference)).score(reference, text) for reference in references)
    return 100 * max(float(score["rougeL"].fmeasure) for score in scores)


def _is_latin(text: str) -> bool:
    """Returns whether at least half of the letters are Latin."""
    letters = [char for char in text if char.isalpha()]
    return 2 * sum(map(_is_latin_letter, letters)) >= len(letters)


def _is_latin_letter(char: str) -> bool:
    return char < "\u0370" or "\u1e00" <= char <= "\u1eff"


def _words(text: str) -> list[str]:
    """Returns the words of a text in any script."""
    words, is_open = list[str](), False
    for char in unicodedata.normalize("NFC", text.lower()):
        is_word, is_alone = unicodedata.category(char)[0] in "LMN", bool(UNSPACED.match(char))
        if is_word and is_open and not is_alone:
            words[-1] += char
        elif is_word:
            words.append(char)
        is_open = is_word and not is_alone
    return words


@lru_cache(maxsize=2)
def _scorer(is_latin: bool) -> Any:
    # imported here because rouge_score imports nltk, which only scoring needs
    from rouge_score import rouge_scorer
    from rouge_score.tokenizers import DefaultTokenizer

    # each evaluation scores the same references again, and stemming is most of the work
    words = lru_cache(maxsize=CACHED_TEXTS)(DefaultTokenizer(use_stemmer=True).tokenize if is_latin else _words)
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))


def _mean(examples: Examples) -> float:
    return float(examples.prediction_E.mean())


_left_out = of_sums(lambda examples: (examples.prediction_E, np.ones(len(examples.prediction_E))), ratio)
ROUGE_L = Metric("rougeL", "ROUGE-L of sampled replies, x 100", "higher", (0.0, 100.0), ("prediction",), _mean,
                 _left_out)  # fmt: skip
GREEDY_ROUGE_L = Metric("greedy_rougeL", "ROUGE-L of greedy replies, x 100", "higher", (0.0, 100.0))
UNFINISHED = Metric("unfinished", "sampled replies without an end token, %", "lower", (0.0, 100.0))
