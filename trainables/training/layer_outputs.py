"""Outputs below the logits of a model during a forward: hidden states, and the inputs of each attention.

A layer that runs twice counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trainables.models.layouts import family_of, place_of

AttentionInput = tuple[nn.Module, Tensor]  # an attention, and the hidden states [B, T, D] that it was given
PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("Wqkv",), ("c_attn",))


def num_executed(config: Any) -> int:
    """Layers that a forward runs."""
    return int(getattr(config, "num_executed_layers", None) or config.num_hidden_layers)


@contextmanager
def hidden_states(net: Any) -> Iterator[list[Tensor]]:
    """Captures embeddings and each layer's output of the forwards inside; only the trunk is asked for hidden states."""
    states: list[Tensor] = []

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
def attention_inputs(net: Any) -> Iterator[list[AttentionInput]]:
    """Captures each attention of the forwards inside, in the order in which they run."""
    seen: list[AttentionInput] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((module, args[0] if args else kwargs["hidden_states"]))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in _attentions(net)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def projections(attention: nn.Module, hidden_BTD: Tensor) -> tuple[Tensor, ...]:
    """Computes queries, keys and values, before any rotation, once more from the attention's input."""
    names = next(names for names in PROJECTIONS if all(hasattr(attention, name) for name in names))
    outputs = tuple(getattr(attention, name)(hidden_BTD) for name in names)
    return outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1)


def check_attention(net: Any, *, scores: bool) -> None:
    """Raises ValueError where queries, keys and values of a model are not found, or do not make its `scores` alone."""
    family = family_of(net.config)
    if not _attentions(net):
        raise ValueError(f"no queries, keys and values known in a {family}; expected bert, modernbert, gpt2, llama")
    if scores and hasattr(net.config, "rope_parameters"):
        raise ValueError(
            f"attention scores of a {family} depend on rotary positions; expected relation_kl, or a bert model"
        )


def _attentions(net: Any) -> list[nn.Module]:
    family = family_of(net.config)
    return [module for path, module in net.named_modules() if _is_attention(family, path, module)]


def _is_attention(family: str, path: str, module: nn.Module) -> bool:
    """Returns whether the module projects queries, keys and values; also where it shares these projections with another
    layer."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            places = [place_of(family, f"{path}.{name}.weight") for name in names]
            return places in (["q <- x", "k <- x", "v <- x"], ["q k v <- x"])
    return False
