"""What must hold between a stream of a phase and the data sets that the stream reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trainables.config.data import FORMATS, Corpora, Feature, Instructions, Tasks
from trainables.config.phase import Masking, Phase, Stream, Tokens
from trainables.config.terms import Term


class StreamRead(NamedTuple):
    """A stream of a phase with the data sets that the stream reads."""

    phase_name: str
    phase: Phase
    stream_name: str
    stream: Stream
    data: Mapping[str, Corpora | Tasks | Instructions]

    @property
    def path(self) -> str:
        return f"phases.{self.phase_name}.streams.{self.stream_name}"

    @property
    def terms(self) -> dict[str, Term]:
        """The terms of the phase on this stream that are not switched off."""
        return {n: t for n, t in self.phase.terms.items() if t.on == self.stream_name and not t.weight.is_off}


def check_stream(read: StreamRead) -> None:
    """Raises ValueError, with the path in the trial, where the data lack what stream, budget or terms ask of them."""
    _check_format(read)
    _check_replies(read)
    _check_unit_weights(read)


def _check_format(read: StreamRead) -> None:
    """Raises ValueError where a phase asks of its data sets what their format does not support."""
    at, on, phase, stream = f"phases.{read.phase_name}", read.path, read.phase, read.stream
    item, form = next((item, data.format) for item, data in read.data.items())
    if any(data.format is not form for data in read.data.values()):
        nouns = ", ".join(f"{item} is {data.format.noun}" for item, data in read.data.items())
        raise ValueError(f"{at}.for_each_dataset: {nouns}; expected data sets of one format")
    asked: list[tuple[bool, Feature, str, str]] = [
        (stream.corruption not in (None, Masking()), "corruption", f"{on}.corruption", "corruption is"),
        (isinstance(phase.budget, Tokens), "token_budget", f"{at}.budget", "a budget of tokens is"),
        (stream.labels is not None, "labels", f"{on}.labels", "labels are"),
        (stream.fold is not None, "fold", f"{on}.fold", "folds are"),
        (stream.replies is not None, "replies", f"{on}.replies", "replies are"),
        (stream.mix is not None, "mix", f"{on}.mix", "mixed examples are"),
    ]
    for is_asked, feature, path, subject in asked:
        if is_asked and feature not in form.supports:
            supporting = " and ".join(other.plural for other in FORMATS if feature in other.supports)
            raise ValueError(f"{path}: {subject} for {supporting}, and {item} is {form.noun}")
    for item, data in read.data.items():
        if not data.has_train:
            raise ValueError(f"{on}: {item} has no train; it can only be scored (`eval_only`)")


def _check_replies(read: StreamRead) -> None:
    if (replies := read.stream.replies) is None:
        return
    if replies.replay is not None and replies.replay.size < read.phase.batch:
        raise ValueError(
            f"{read.path}.replies.replay.size: {replies.replay.size} is less than a batch of {read.phase.batch}"
        )
    learning = set(replies.models) & set(read.phase.train)
    for name, term in read.terms.items():
        if term.source is None and learning:
            raise ValueError(
                f"phases.{read.phase_name}.terms.{name}: replies of {min(learning)!r}, which learns here, are no labels; "
                f"use a flow, or a second stream without `replies`"
            )


def _check_unit_weights(read: StreamRead) -> None:
    for name, term in read.terms.items():
        if term.rule is None:
            continue
        at = f"phases.{read.phase_name}.terms.{name}.unit_weights"
        if item := next((item for item, data in read.data.items() if data.num_labels == 1), None):
            raise ValueError(
                f"{at}: {item} is a regression, whose positions have no probabilities; remove unit_weights"
            )
        if term.rule.reads_labels and not (read.stream.replies is None and read.stream.mix is None):
            what = "generated replies do not have" if read.stream.replies else "mixed examples have two of"
            raise ValueError(f"{at}: {term.rule.kind} reads a label, which {what}; expected overlap")
