"""One forward of a phase's models over a micro-batch, and its terms: each model runs once per stream.

All terms at the logits of one stream are computed together by `losses.chunked`, with the logits of one chunk of
positions at a time. Terms below the logits read what `layer_outputs` captures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.layer_maps import Pairs
from trainables.config.terms import Term
from trainables.config.value import random_stream
from trainables.data.classification.tasks import TaskBatch
from trainables.data.corpus.masking import MaskedBatch
from trainables.data.instructions.packing import ExchangeBatch, PackedBatch
from trainables.generation.context import Autocast
from trainables.losses import hidden
from trainables.losses.chunked import LogitSource, chunked_terms, num_rows
from trainables.losses.terms import term_loss
from trainables.models import configs, output_head
from trainables.training import layer_outputs

GlobalBatch = MaskedBatch | TaskBatch | ExchangeBatch  # of a step
Batch = MaskedBatch | TaskBatch | PackedBatch  # rows of a global batch, as models read them
B = TypeVar("B")


class TermError(ValueError):
    """A term that cannot be computed for its models."""


@dataclass(frozen=True)
class ForwardOutput:
    """The outputs of one model on one micro-batch of a stream; outputs below the logits only if a term reads them."""

    logits: LogitSource
    hidden_LBTD: Sequence[Tensor]  # embeddings, then the output of each executed layer
    attention: Sequence[layer_outputs.AttentionInput]  # of each executed layer


@dataclass(frozen=True)
class Models:
    """The models of a phase, as they are called."""

    nets: Mapping[str, Any]
    trained: frozenset[str]
    heads: Mapping[str, output_head.Head | None]  # of language models whose logits are a linear layer of hidden states
    vocab_sizes: Mapping[str, int] = field(default_factory=dict)  # of the tokenizers; rows beyond are padding
    wrapped: Mapping[str, Any] = field(default_factory=dict)  # `learning`, as called: by several ranks, wrapped in DDP
    projectors: Mapping[str, Projector] = field(default_factory=dict)  # by term

    @property
    def learning(self) -> dict[str, Any]:
        """The trained modules: models by name, projectors by `projector_name`."""
        trained = {name: net for name, net in self.nets.items() if name in self.trained}
        return trained | {projector_name(term): module for term, module in self.projectors.items()}


@dataclass(frozen=True)
class ForwardContext:
    """Where and how a forward runs. `dropout`: the seed of a trained model's dropout on a stream."""

    device: str
    autocast: Autocast
    dropout: Callable[[str, str], int]


def batch_of(batches: Mapping[str, B], stream: str, model: str) -> B:
    """Returns the batch of a stream as a model reads it."""
    return batches.get(f"{stream}/{model}", batches[stream])


def run_terms(
    models: Models,
    active: Mapping[str, Term],
    batches: Mapping[str, Batch],
    scale: Mapping[str, float],
    *,
    context: ForwardContext,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the weighted sum of all terms, whose backward fills every gradient, and each term's own sum, detached.

    `batches`: by stream, and by `stream/model` for each model with another tokenizer. `scale`: the factor of each term's sum.
    """
    loss, sums = torch.zeros((), device=context.device), dict[str, Tensor]()
    for stream in batches:
        terms = {name: term for name, term in active.items() if term.on == stream}
        outputs, read = {}, partial(batch_of, batches, stream)
        for model in dict.fromkeys(model for term in terms.values() for model in term.reads):
            if model in models.trained:  # its dropout has a random stream of its own, whatever else runs
                torch.manual_seed(context.dropout(model, stream))
            inputs = {term.inputs for term in terms.values() if model in term.reads}
            with torch.set_grad_enabled(model in models.trained), context.autocast():
                outputs[model] = _run_model(models, model, read(model), inputs)
        at_logits = {name: term for name, term in terms.items() if term.inputs == "logits"}
        for batch in {id(own): own for own in (read(term.target) for term in at_logits.values())}.values():
            alike = {name: term for name, term in at_logits.items() if read(term.target) is batch}
            sources = {model: outputs[model].logits for term in alike.values() for model in term.reads}
            sizes = [models.vocab_sizes.get(term.target) for term in alike.values()]
            rows = None if isinstance(batch, TaskBatch) else sizes[0]
            second = batch.partners[1:] if isinstance(batch, TaskBatch) and batch.partners else None
            with context.autocast():
                size = chunk(sources, context.device)
                fused = chunked_terms(sources, batch.labels_N, alike, scale, chunk=size, vocab_size=rows, second=second)
            loss, sums = loss + fused.loss, sums | {name: value.detach() for name, value in fused.values.items()}
        for name, term in terms.items():
            if name not in at_logits:
                project = models.wrapped.get(projector_name(name), models.projectors.get(name))
                with context.autocast():
                    value = _inner_loss(term, models.nets, outputs, read(term.target), project=project)
                loss, sums[name] = loss + scale[name] * value, value.detach()
    return loss, sums


def chunk(sources: Mapping[str, LogitSource], device: str) -> int:
    """Positions whose logits are computed at once: a few MB on a CPU, to stay within its caches."""
    widest = max(num_rows(side) for side in sources.values())
    return max(64, 2 ** (25 if device.startswith("cuda") else 22) // widest)


def normaliser(term: Term, batch: GlobalBatch) -> int:
    """Counts the divisor of a term's sum in the global batch."""
    if term.averaged_over == "labels":
        return len(batch.labels_N)
    if term.averaged_over == "tokens":
        return batch.num_tokens
    return len(batch) if isinstance(batch, ExchangeBatch) else len(batch.ids_BT)


def _run_model(models: Models, model: str, batch: Batch, inputs: Collection[str]) -> ForwardOutput:
    net, through = models.nets[model], models.wrapped.get(model)
    with ExitStack() as stack:
        reads_attention = "attention_scores" in inputs or "relations" in inputs
        attention = stack.enter_context(layer_outputs.attention_inputs(net)) if reads_attention else ()
        states = stack.enter_context(layer_outputs.hidden_states(net)) if "hidden_states" in inputs else ()
        if isinstance(batch, TaskBatch):
            second = batch.partners and (batch.partners.ids_BT, batch.partners.shares_N)
            read = (batch.ids_BT, batch.mask_BT, batch.types_BT)
            logits = output_head.class_logits(net, *read, through=through, mixed_with=second)
            return ForwardOutput(LogitSource(logits), states, attention)
        rows: dict[str, Any] = {"position_ids_BT": getattr(batch, "position_ids_BT", None), "through": through}
        if (head := models.heads.get(model)) is not None:
            source = LogitSource(output_head.head_inputs(net, batch.ids_BT, batch.positions_N, **rows), *head)
        else:
            source = LogitSource(output_head.logits_at(net, batch.ids_BT, batch.positions_N, **rows))
        return ForwardOutput(source, states, attention)


def _inner_loss(
    term: Term,
    nets: Mapping[str, Any],
    outputs: Mapping[str, ForwardOutput],
    batch: Batch,
    *,
    project: Callable[..., Any] | None,
) -> Tensor:
    """Computes the sum of a term below the logits. Packed exchanges get a row each first, so that none reads another one."""
    assert term.source is not None
    mask_BT = batch.mask_BT if isinstance(batch, TaskBatch) else None
    if isinstance(batch, PackedBatch):
        indices_BT, mask_BT = batch.by_exchange()
        outputs = {model: _in_rows(outputs[model], indices_BT) for model in term.reads}
    pairs, source, to = _pairs(term, nets), outputs[term.source], outputs[term.target]
    if not pairs:
        return to.hidden_LBTD[0].new_zeros(())
    if term.inputs == "hidden_states":
        ours = [to.hidden_LBTD[j] for _, j in pairs]
        theirs = [source.hidden_LBTD[i] for i, _ in pairs]
        return term_loss(term, theirs, ours if project is None else project(ours), mask_BT)
    with torch.no_grad():
        from_qkv = [layer_outputs.projections(*source.attention[i - 1]) for i, _ in pairs]
    to_qkv = [layer_outputs.projections(*to.attention[j - 1]) for _, j in pairs]
    if term.inputs == "relations":
        return term_loss(term, from_qkv, to_qkv, mask_BT)
    if not configs.is_masked_lm(nets[term.target].config.model_type):  # a query never sees later keys
        length, device = to.attention[0][1].shape[1], to.attention[0][1].device
        causal_1TT = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
        mask_BT = causal_1TT if mask_BT is None else causal_1TT & mask_BT.bool()[:, None] & mask_BT.bool()[:, :, None]
    from_LBHTT, to_LBHTT = (
        [hidden.scores(query, key, nets[model].config.num_attention_heads) for query, key, _ in qkv]
        for model, qkv in ((term.source, from_qkv), (term.target, to_qkv))
    )
    return term_loss(term, from_LBHTT, to_LBHTT, mask_BT)


def _in_rows(output: ForwardOutput, indices_BT: Tensor) -> ForwardOutput:
    """Returns the outputs below the logits at `indices_BT`, which count positions over all rows of the batch."""
    attention = [(module, states_BTD.flatten(0, 1)[indices_BT]) for module, states_BTD in output.attention]
    return replace(
        output, hidden_LBTD=[states.flatten(0, 1)[indices_BT] for states in output.hidden_LBTD], attention=attention
    )


def check_layers(terms: Mapping[str, Term], nets: Mapping[str, Any]) -> None:
    """Raises TermError where layers cannot be paired, widths differ without a projector, or attention is not
    readable."""
    for name, term in terms.items():
        try:
            _pairs(term, nets)
            if term.inputs in ("attention_scores", "relations"):
                for model in term.reads:
                    layer_outputs.check_attention(nets[model], scores=term.inputs == "attention_scores")
        except ValueError as error:
            raise TermError(f"term {name!r}: {error}") from None
        if term.inputs == "hidden_states" and not term.has_projector:
            assert term.source is not None
            widths = [(model, nets[model].config.hidden_size) for model in (term.source, term.target)]
            if widths[0][1] != widths[1][1]:
                about = ", ".join(f"{model} {width}" for model, width in widths)
                raise TermError(f"term {name!r}: widths differ ({about}); set projector: true")


def _pairs(term: Term, nets: Mapping[str, Any]) -> Pairs:
    if term.source is None or term.inputs == "logits":
        return ()
    return term.layer_pairs(*(layer_outputs.num_executed(nets[model].config) for model in (term.source, term.target)))


class Projector(nn.Module):
    """Learnt matrices that take the states of `to` to the width of `from`, one for each pair of layers; no biases."""

    def __init__(self, num: int, width_from: int, width_to: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draws = (torch.randn(width_from, width_to, generator=generator) * width_to**-0.5 for _ in range(num))
        self.weights_LED = nn.ParameterList(draws)

    def forward(self, to_LBTD: Sequence[Tensor]) -> list[Tensor]:
        return [F.linear(side, weight) for side, weight in zip(to_LBTD, self.weights_LED, strict=True)]


def projector_name(term: str) -> str:
    """Returns the name of a term's projector among the learning modules."""
    return f"project {term}"


def make_projectors(
    terms: Mapping[str, Term], nets: Mapping[str, Any], *, seed: int, phase: str
) -> dict[str, Projector]:
    """Draws the projectors of the terms that have one, each from a random stream of its own."""
    projectors = {}
    for name, term in terms.items():
        if term.has_projector:
            assert term.source is not None
            width_from, width_to = (nets[model].config.hidden_size for model in (term.source, term.target))
            drawn = random_stream(seed, "projector", phase, name)
            projectors[name] = Projector(len(_pairs(term, nets)), width_from, width_to, drawn)
    return projectors
