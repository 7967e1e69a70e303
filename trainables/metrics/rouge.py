"""Metrics of generated replies. ROUGE-L comes from the package that the papers used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from trainables.metrics.metric import Examples, Floats, Metric

CACHED_TEXTS = 16_384  # a few KB each


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Computes the ROUGE-L F-measure, x 100, of stemmed words (Lin 2004): the best over the references.

    Words are runs of a-z and 0-9, so a text without any, or in another script, scores 0.
    """
    if not references:
        raise ValueError("nothing to compare a reply with: there is no reference")
    score = _scorer().score
    return 100 * max(float(score(reference, text)["rougeL"].fmeasure) for reference in references)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    # imported here because rouge_score imports nltk, which only scoring needs
    from rouge_score import rouge_scorer
    from rouge_score.tokenizers import DefaultTokenizer

    # each evaluation scores the same references again, and stemming is most of the work
    words = lru_cache(maxsize=CACHED_TEXTS)(DefaultTokenizer(use_stemmer=True).tokenize)
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))


def _mean(examples: Examples) -> float:
    return float(examples.prediction_E.mean())


def _resampled_mean(examples: Examples, weights_RE: Floats) -> Floats:
    mean_R: Floats = (weights_RE @ examples.prediction_E) / weights_RE.sum(1)
    return mean_R


ROUGE_L = Metric("rougeL", "ROUGE-L of sampled replies, x 100", "higher", (0.0, 100.0), ("prediction",), _mean,
                 _resampled_mean)  # fmt: skip
GREEDY_ROUGE_L = Metric("greedy_rougeL", "ROUGE-L of greedy replies, x 100", "higher", (0.0, 100.0))
UNFINISHED = Metric("unfinished", "sampled replies without an end token, %", "lower", (0.0, 100.0))
