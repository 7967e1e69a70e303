"""Inputs and results of generation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Autocast = Callable[[], AbstractContextManager[Any]]


class GenerationError(ValueError):
    """A prompt that is empty or too long, or a model that cannot generate; the message says which and why."""


@dataclass(frozen=True)
class GenerationContext:
    """Token ids, limits, and where and how the models run."""

    end_ids: tuple[int, ...]  # any ends a reply
    pad_id: int
    vocab_size: int  # no token at or beyond this id is drawn
    device: str
    autocast: Autocast = nullcontext
    length: int | None = None  # most tokens of prompt and reply together
    rows: int | None = None  # prompts at a time; by default all

    def has_ended(self, reply: Tokens) -> bool:
        """Returns whether a reply was not cut."""
        return int(reply[-1]) in self.end_ids


@dataclass(frozen=True)
class Generation:
    """Replies in the order of their prompts, the end token included where there is one.

    `num_tokens`, `teacher_tokens`: positions that the model (`interleave`: the draft) and the teacher computed, padding
    and dropped tokens included.
    """

    replies: tuple[Tokens, ...]
    num_tokens: int
    teacher_tokens: int = 0
