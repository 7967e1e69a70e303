"""Metrics of replies, named by a data set. Their functions are in `trainables.metrics.replies`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from trainables.config.extension import OrOwn
from trainables.config.value import Value


class ExactMatch(Value):
    """100 where the answer of a reply is that of a reference, else 0.

    The answer is what `extract` finds last in a text: `last_number`, or a regular expression, of which the first group counts
    where it has one. A text in which nothing is found has no answer, and matches nothing. By default the whole text counts.
    Case and the spaces between words do not count; numbers are compared as numbers.
    """

    kind: Literal["exact_match"]
    extract: str | None = None  # last_number, or a regular expression; by default the whole text

    @field_validator("extract")
    @classmethod
    def _the_expression_can_be_read(cls, extract: str | None) -> str | None:
        try:
            re.compile(extract or "")
        except re.error as error:
            raise ValueError(f"{extract!r} is no regular expression ({error}); expected last_number or one") from None
        return extract


class TokenF1(Value):
    """F1 of the words that reply and reference share, x 100 (SQuAD: Rajpurkar et al. 2016); the best over references."""

    kind: Literal["token_f1"]


class ChrF(Value):
    """chrF of each reply: F2 of its character n-grams up to six (Popović 2015); by sacrebleu, the best over references."""

    kind: Literal["chrf"]


class SentenceBleu(Value):
    """BLEU of each reply by itself, exponentially smoothed (Chen and Cherry 2014); by sacrebleu, against all references.

    Its mean over replies is not BLEU of a corpus, which has no value for one reply, and hence no interval over new examples.
    """

    kind: Literal["sentence_bleu"]


class ReplyScore(Value):
    """A metric of replies that a user's own file brings."""

    kind: str

    @property
    def words(self) -> str:
        """What the metric is, for reports."""
        return self.kind

    def score(self, reply: str, references: Sequence[str]) -> float:
        """Returns the score of one reply, 0 to 100, where more is better."""
        raise NotImplementedError


ReplyMetric = Annotated[
    Annotated[ExactMatch | TokenF1 | ChrF | SentenceBleu, Field(discriminator="kind"), OrOwn(ReplyScore)],
    BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
]
