"""What models with different tokenizers may share in a phase: texts and classes, but no tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainables.config.phase import Interleaved, Phase, Stream
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec
from trainables.data.prepared import Prepared
from trainables.training.forward import TermError
from trainables.training.phase_graph import streams_of


def check_readings(spec: TrialSpec, run: PhaseRun, data: Mapping[str, Prepared]) -> None:
    """Raises TermError where models share tokens or positions, and have different tokenizers. `data`: by
    `TrialSpec.readings`."""
    for name, stream in streams_of(spec, run).items():
        supports = spec.data[stream.data].format.supports
        for pair, where, what, expected in _sharing(spec.phases[run.phase], name, stream, supports):
            read = [data[spec.reading(stream.data, model)] for model in pair]
            if read[0].fingerprint != read[1].fingerprint:
                both = " and ".join(
                    f"{model} ({spec.models[model].tokenizer or 'the data'}'s tokenizer of {own.vocab_size:,} tokens)"
                    for model, own in zip(pair, read, strict=True)
                )
                raise TermError(
                    f"phase {run}, {where}: {what} {both}, which differ; expected one tokenizer, or {expected}"
                )


def _sharing(
    phase: Phase, name: str, stream: Stream, supports: frozenset[str]
) -> Iterator[tuple[tuple[str, str], str, str, str]]:
    """Yields each two models that share more of a stream than texts and classes: (models, where, what, what else is valid)."""
    for term_name, term in phase.terms.items():
        shared = term.on == name and ("labels" not in supports or term.inputs != "logits")
        for other in term.reads if shared else ():
            if other == term.target:
                continue
            what = "tokens" if term.inputs == "logits" else "positions"
            text = f"cross_entropy on {other}'s replies, which pass as text (replies: {{kind: sampled, by: {other}}})"
            expected = f"{text}, or a divergence at the classes of a task"
            yield (other, term.target), f"term {term_name!r}", f"{term.kind} compares the {what} of", expected
    where, readers, replies = f"stream {name!r}", phase.readers(name), stream.replies
    for other in readers[1:]:
        if not supports & {"labels", "replies"}:
            yield (
                (readers[0], other),
                where,
                f"{stream.data} has no examples that are the same for",
                "a stream for each",
            )
        if replies is not None:
            yield (readers[0], other), where, "generated replies have one tokenizer, for", "a stream for each"
    if isinstance(replies, Interleaved):
        expected = "replies: {kind: sampled, by: MODEL}"
        yield (replies.draft, replies.teacher), where, "each reply has tokens of", expected
    if replies is not None and replies.replay is not None and readers:
        yield (readers[0], replies.models[0]), where, "replay keeps the tokens of replies, for", "once: true"
