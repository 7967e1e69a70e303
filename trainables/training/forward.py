"""One pass of a phase's models over a micro-batch, and its terms: each model runs once a stream, whatever reads it.

Terms at the logits of one stream go through `losses.fused` together, from hidden states and head weights, so that no
logits beyond a chunk of positions are there. Terms inside the models (`losses.hidden`) read what hooks and transformers'
own outputs give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.terms import AttentionMSE, HiddenCosine, HiddenMSE, Inner, RelationKL, Term, reads
from trainables.config.value import random_stream
from trainables.data.classification.tasks import TaskBatch
from trainables.data.corpus.masking import MaskedBatch
from trainables.data.instructions.packing import ExchangeBatch, PackedBatch
from trainables.losses import hidden
from trainables.losses.chunked import LogitSource, chunked_terms, num_rows
from trainables.models import build, output_head
from trainables.models.layouts import family_of, place_of

Batch = MaskedBatch | TaskBatch | PackedBatch  # as models read it


@dataclass(frozen=True)
class ForwardOutput:
    """What one model gives on one micro-batch of a stream."""

    side: LogitSource
    hidden_LBTD: tuple[Tensor, ...]  # embeddings, then the output of each layer as executed; () where nothing asks
    attention: tuple[tuple[nn.Module, Tensor], ...]  # each executed layer's attention with what it was given


@dataclass(frozen=True)
class Models:
    """The models of a phase, as they are called."""

    nets: Mapping[str, Any]
    trained: frozenset[str]
    heads: Mapping[str, output_head.Head | None]  # of language models whose logits are a linear layer of hidden states
    vocab_size: int | None = None  # of the tokenizer; rows beyond it are padding
    wrapped: Mapping[str, Any] = field(
        default_factory=dict
    )  # by model, or by term for what it learns beside (`project`)
    projectors: Mapping[str, Projector] = field(default_factory=dict)  # by term

    @property
    def learning(self) -> dict[str, Any]:
        """What is trained, itself and not as it is called; by the names of `wrapped`."""
        trained = {name: net for name, net in self.nets.items() if name in self.trained}
        return {**trained, **{projector_of(term): module for term, module in self.projectors.items()}}


def projector_of(term: str) -> str:
    """What a term's projector is called among the models."""
    return f"project {term}"


def run_terms(
    on: Models,
    live: Mapping[str, Term],
    parts: Mapping[str, Batch],
    scale: Mapping[str, float],
    *,
    device: str,
    autocast: Callable[[], AbstractContextManager[Any]],
    dropout: Callable[[str, str], int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all terms, whose backward fills every gradient; and each term's sum over units, detached.

    `scale`: what each term's sum is multiplied by. `dropout`: the seed of a trained model's dropout on a stream.
    """
    loss, sums = torch.zeros((), device=device), dict[str, Tensor]()
    for stream, batch in parts.items():
        terms = {name: term for name, term in live.items() if term.on == stream}
        given = {}
        for model in dict.fromkeys(model for term in terms.values() for model in reads(term)):
            inner = [term for term in terms.values() if isinstance(term, Inner) and model in reads(term)]
            if model in on.trained:  # dropout has a stream of its own, whatever else runs
                torch.manual_seed(dropout(model, stream))
            with torch.set_grad_enabled(model in on.trained), autocast():
                given[model] = _run(on, model, batch, inner)
        soft = {name: term for name, term in terms.items() if not isinstance(term, Inner)}
        if soft:
            sides = {model: given[model].side for term in soft.values() for model in reads(term)}
            with autocast():
                rows = None if isinstance(batch, TaskBatch) else on.vocab_size
                fused = chunked_terms(sides, batch.labels_N, soft, scale, chunk=chunk(sides, device), vocab_size=rows)
            loss, sums = loss + fused.loss, sums | {name: value.detach() for name, value in fused.values.items()}
        mask_BT = batch.mask_BT if isinstance(batch, TaskBatch) else None
        for name, term in terms.items():
            if isinstance(term, Inner):
                project = on.wrapped.get(projector_of(name), on.projectors.get(name))
                with autocast():
                    value = _inside(term, on, given[term.from_], given[term.to], mask_BT, project)
                loss, sums[name] = loss + scale[name] * value, value.detach()
    return loss, sums


def chunk(sides: Mapping[str, LogitSource], device: str) -> int:
    """Positions of the logits that are there at once: a few MB on a CPU, whose caches they should stay near."""
    widest = max(num_rows(side) for side in sides.values())
    return max(64, 2 ** (25 if device.startswith("cuda") else 22) // widest)


def units(term: Term, batch: Batch | ExchangeBatch) -> int:
    """What a term's sum is divided by, in the global batch: supervised positions, or tokens, or sequences."""
    if not isinstance(term, Inner) or isinstance(batch, ExchangeBatch):
        return len(batch.labels_N)
    if isinstance(term, HiddenMSE) and term.positions == "first":
        return len(batch.ids_BT)
    return batch.num_tokens


def _run(on: Models, model: str, batch: Batch, inner: Sequence[Inner]) -> ForwardOutput:
    net, through = on.nets[model], on.wrapped.get(model)
    wants_hidden = any(isinstance(term, HiddenMSE | HiddenCosine) for term in inner)
    wants_attention = any(isinstance(term, AttentionMSE | RelationKL) for term in inner)
    with _watching(net, wants_attention) as attention, _hidden_states(net, wants_hidden) as states:
        if isinstance(batch, TaskBatch):
            side = LogitSource(
                output_head.class_logits(net, batch.ids_BT, batch.mask_BT, batch.types_BT, through=through)
            )
        else:
            how = {"places_BT": getattr(batch, "places_BT", None), "through": through}
            if (head := on.heads.get(model)) is not None:
                side = LogitSource(output_head.head_inputs(net, batch.ids_BT, batch.positions_N, **how), *head)
            else:
                side = LogitSource(output_head.logits_at(net, batch.ids_BT, batch.positions_N, **how))
    return ForwardOutput(side, tuple(states), tuple(attention))


# ------------------------------------------------------------------------------------------------------ inside a model


class SiteError(ValueError):
    """A term that these models cannot bear."""


class Projector(nn.Module):
    """Learnt matrices that take `to`'s states to `from`'s width, one for each pair of layers; no biases."""

    def __init__(self, num: int, width_from: int, width_to: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draws = (torch.randn(width_from, width_to, generator=generator) * width_to**-0.5 for _ in range(num))
        self.weights_LED = nn.ParameterList(draws)

    def forward(self, to_LBTD: Sequence[Tensor]) -> list[Tensor]:
        return [F.linear(side, weight) for side, weight in zip(to_LBTD, self.weights_LED, strict=True)]


def make_projectors(
    terms: Mapping[str, Term], nets: Mapping[str, Any], *, seed: int, phase: str
) -> dict[str, Projector]:
    """For the terms that ask for one; drawn from streams of their own."""
    found = {}
    for name, term in terms.items():
        if isinstance(term, HiddenMSE | HiddenCosine):
            ours, theirs = nets[term.to].config.hidden_size, nets[term.from_].config.hidden_size
            if term.projector:
                drawn = random_stream(seed, "projector", phase, name)
                found[name] = Projector(len(_pairs(term, nets)), theirs, ours, drawn)
            elif ours != theirs:
                raise SiteError(
                    f"term {name!r}: widths differ ({term.from_} {theirs}, {term.to} {ours}); set projector: true"
                )
    return found


def check_inner(terms: Mapping[str, Term], nets: Mapping[str, Any]) -> None:
    """Raises SiteError where layers cannot be paired, or a model's attention cannot be looked into."""
    for name, term in terms.items():
        try:
            if isinstance(term, Inner) and not _pairs(term, nets) and not _has_none_by_rule(term, nets):
                raise ValueError("no layers correspond; expected another map, or explicit pairs")
            if isinstance(term, AttentionMSE | RelationKL):
                for model in reads(term):
                    _check_attention(term, nets[model])
        except ValueError as error:
            raise SiteError(f"term {name!r}: {error}") from None


def _has_none_by_rule(term: Inner, nets: Mapping[str, Any]) -> bool:
    """Patient-KD's maps leave out the last layer, so that a model of one layer has no hints: its term is 0, as published."""
    is_patient = isinstance(term, HiddenMSE) and term.layers in ("even", "last")
    return is_patient and num_executed(nets[term.to].config) == 1


def num_executed(config: Any) -> int:
    """Layers that a forward runs: one that runs twice counts twice."""
    return int(getattr(config, "num_executed_layers", None) or config.num_hidden_layers)


def _pairs(term: Inner, nets: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Layers (from, to), counted from 1 as executed; 0 is the embeddings."""
    num_from, num_to = num_executed(nets[term.from_].config), num_executed(nets[term.to].config)
    match term:
        case HiddenCosine():
            return ((num_from, num_to),)
        case RelationKL(from_layer=source, to_layer=to):
            return hidden.layer_pairs("explicit", num_from, num_to, [(source or num_from, to or num_to)])
        case HiddenMSE(layers=layers) | AttentionMSE(layers=layers):
            named = isinstance(layers, str)
            pairs = hidden.layer_pairs(layers if named else "explicit", num_from, num_to, None if named else layers)  # type: ignore[arg-type]
            return tuple(pair for pair in pairs if 0 not in pair) if isinstance(term, AttentionMSE) else pairs


def _check_attention(term: Inner, net: Any) -> None:
    family = family_of(net.config)
    if not any(_is_attention(family, path, module) for path, module in net.named_modules()):
        raise ValueError(f"the attention of a {family} cannot be looked into; expected bert, modernbert, gpt2, llama")
    if isinstance(term, AttentionMSE) and hasattr(net.config, "rope_parameters"):
        raise ValueError(
            f"scores of a {family} depend on rotations of its queries and keys; expected relation_kl, or bert"
        )


def _inside(
    term: Inner,
    on: Models,
    source: ForwardOutput,
    to: ForwardOutput,
    mask_BT: Tensor | None,
    project: Callable[..., Any] | None,
) -> Tensor:
    """A term's sum over its units."""
    pairs = _pairs(term, on.nets)
    if not pairs:
        return to.hidden_LBTD[0].new_zeros(())
    if isinstance(term, HiddenMSE | HiddenCosine):
        theirs = [source.hidden_LBTD[i] for i, _ in pairs]
        ours = [to.hidden_LBTD[j] for _, j in pairs]
        if project is not None:
            ours = project(ours)
        if isinstance(term, HiddenCosine):
            return hidden.hidden_cosine(theirs[0], ours[0], mask_BT)
        first = term.positions == "first"
        return hidden.hidden_mse(theirs, ours, mask_BT, first=first, normalise=term.normalise)
    sides = []
    for given, which in ((source, 0), (to, 1)):
        with torch.set_grad_enabled(which == 1):
            sides.append([_projections(*given.attention[pair[which] - 1]) for pair in pairs])
    if isinstance(term, RelationKL):
        return hidden.relation_kl(sides[0][0], sides[1][0], mask_BT, num_heads=term.heads)
    heads = [on.nets[model].config.num_attention_heads for model in (term.from_, term.to)]
    if not build.is_masked_lm(on.nets[term.to].config.model_type):  # what a query never looks at is arbitrary
        length = to.attention[0][1].shape[1]
        causal_1TT = torch.ones(1, length, length, dtype=torch.bool, device=to.attention[0][1].device).tril()
        mask_BT = causal_1TT if mask_BT is None else causal_1TT & mask_BT.bool()[:, None] & mask_BT.bool()[:, :, None]
    theirs, ours = ([hidden.scores(q, k, n) for q, k, _ in side] for side, n in zip(sides, heads, strict=True))
    return hidden.attention_mse(theirs, ours, mask_BT)


@contextmanager
def _hidden_states(net: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """Embeddings and each layer's output, as transformers gives them; the trunk is asked for them and keeps its output."""
    states: list[Tensor] = []
    if not wanted:
        yield states
        return

    def ask(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def take(_module: nn.Module, _args: Any, output: Any) -> None:
        states.extend(output.hidden_states)

    asking = net.base_model.register_forward_pre_hook(ask, with_kwargs=True)
    taking = net.base_model.register_forward_hook(take, prepend=True)
    try:
        yield states
    finally:
        asking.remove()
        taking.remove()


@contextmanager
def _watching(net: Any, wanted: bool) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Each attention that runs, in order, with the hidden states that it was given."""
    seen: list[tuple[nn.Module, Tensor]] = []
    handles = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((module, args[0] if args else kwargs["hidden_states"]))

    if wanted:
        for path, module in net.named_modules():
            if _is_attention(family_of(net.config), path, module):
                handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("Wqkv",), ("c_attn",))


def _is_attention(family: str, path: str, module: nn.Module) -> bool:
    """Whether queries, keys and values are made right here; also where they are another module's (shared layers)."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            places = [place_of(family, f"{path}.{name}.weight") for name in names]
            return places in (["q <- x", "k <- x", "v <- x"], ["q k v <- x"])
    return False


def _projections(attention: nn.Module, hidden_BTD: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, made once more from what the attention was given; before any rotation."""
    names = next(names for names in PROJECTIONS if all(hasattr(attention, name) for name in names))
    made = tuple(getattr(attention, name)(hidden_BTD) for name in names)
    return made if len(made) == 3 else made[0].chunk(3, dim=-1)
