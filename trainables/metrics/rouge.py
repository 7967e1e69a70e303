"""How much of a reply's words stand, in their order, in a reference: ROUGE-L, by the package that the papers used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

REMEMBERED = 16_384  # texts, a few KB each


def rouge_l(text: str, references: Sequence[str]) -> float:
    """x 100: F-measure of the longest common subsequence of stemmed words (Lin 2004); of several references the best.

    Words are runs of a-z and 0-9, so that text without any, and text in another script, scores 0.
    """
    if not references:
        raise ValueError("nothing to compare a reply with: there is no reference")
    score = _scorer().score
    return 100 * max(float(score(reference, text)["rougeL"].fmeasure) for reference in references)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score import rouge_scorer  # here, since it brings nltk along, and only scoring needs it
    from rouge_score.tokenizers import DefaultTokenizer

    # references come again for each sample and at each look, and stemming is most of the work
    words = lru_cache(maxsize=REMEMBERED)(DefaultTokenizer(use_stemmer=True).tokenize)
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
