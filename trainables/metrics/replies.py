"""Metrics of a generated reply and its references, beside ROUGE-L: a table from the config value to its function.

Each gives a number from 0 to 100 for one reply, so that models are compared on each example; the metric of a data set is
the mean.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from trainables.config.reply_metrics import ChrF, ExactMatch, ReplyMetric, ReplyScore, SentenceBleu, TokenF1
from trainables.metrics.metric import Examples, Floats, Metric, of_sums, ratio
from trainables.metrics.rouge import UNSPACED

NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def score_reply(metric: ReplyMetric, reply: str, references: Sequence[str]) -> float:
    """Computes a metric of one reply, 0 to 100. Raises ValueError where there is no reference."""
    if not references:
        raise ValueError("nothing to compare a reply with: there is no reference")
    if isinstance(metric, ReplyScore):
        return metric.score(reply, references)
    return SCORES[type(metric)](metric, reply, references)


def _exact_match(metric: ExactMatch, reply: str, references: Sequence[str]) -> float:
    answer = _answer(metric, reply)
    return 100.0 * (answer is not None and answer in [_answer(metric, reference) for reference in references])


def _answer(metric: ExactMatch, text: str) -> str | float | None:
    """Returns what a text answers: a number, or words; None where there is no answer."""
    if metric.extract is not None:
        found = list(re.finditer(NUMBER if metric.extract == "last_number" else metric.extract, text))
        if not found:
            return None
        text = found[-1][1 if found[-1].re.groups else 0] or ""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return float(text.replace(",", "")) if re.fullmatch(NUMBER, text) else text


def _token_f1(_: TokenF1, reply: str, references: Sequence[str]) -> float:
    return max(_f1(_words(reply), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    """Returns the words as SQuAD's scorer has them: without case, punctuation and articles; in scripts that write no spaces each
    character is one."""
    kept = "".join(char for char in text.lower() if unicodedata.category(char)[0] != "P")
    return [word for word in UNSPACED.sub(r" \g<0> ", kept).split() if word not in ("a", "an", "the")]


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return 100.0 * (ours == theirs)
    return 200 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def _chrf(_: ChrF, reply: str, references: Sequence[str]) -> float:
    return min(100.0, float(_sacrebleu("CHRF").sentence_score(reply, list(references)).score))


def _sentence_bleu(_: SentenceBleu, reply: str, references: Sequence[str]) -> float:
    return min(100.0, float(_sacrebleu("BLEU").sentence_score(reply, list(references)).score))


@cache
def _sacrebleu(name: str) -> Any:
    from sacrebleu import metrics  # imported here, as only scoring needs it

    # of one reply most have no common run of four words: BLEU without them would be that of other words
    return metrics.BLEU(effective_order=True) if name == "BLEU" else metrics.CHRF()


def _mean(name: str, examples: Examples) -> float:
    return float(examples.scores[name].mean())


def _column(name: str, examples: Examples) -> tuple[Floats, Floats]:
    return examples.scores[name], np.ones(len(examples.scores[name]))


def metric_of_replies(name: str, words: str) -> Metric:
    """Returns a metric that is the mean of the scores of replies."""
    left_out = of_sums(partial(_column, name), ratio)
    return Metric(name, words, "higher", (0.0, 100.0), ("scores",), partial(_mean, name), left_out)


SCORES: Mapping[type, Callable[[Any, str, Sequence[str]], float]] = {
    ExactMatch: _exact_match,
    TokenF1: _token_f1,
    ChrF: _chrf,
    SentenceBleu: _sentence_bleu,
}
EXACT_MATCH = metric_of_replies("exact_match", "replies whose answer is that of a reference, %")
TOKEN_F1 = metric_of_replies("token_f1", "F1 of the words of replies and references, x 100")
CHRF = metric_of_replies("chrf", "chrF of each reply, its mean")
SENTENCE_BLEU = metric_of_replies("sentence_bleu", "smoothed BLEU of each reply, its mean")
NAMED_BY_DATA = (EXACT_MATCH, TOKEN_F1, CHRF, SENTENCE_BLEU)
