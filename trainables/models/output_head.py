"""Runs a model up to the positions that are needed: their logits, what its head reads there, or a classifier's logits.

A hook between trunk and head keeps the wanted positions, so that every family's own code of the head runs unchanged.
Legend: B rows, T tokens of a row, N positions b*T+t of the flattened batch, D width, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainables.config.errors import ModelError
from trainables.models.configs import is_masked_lm


def logits_at(
    net: nn.Module,
    ids_BT: Tensor,
    positions_N: Tensor,
    *,
    position_ids_BT: Tensor | None = None,
    through: Callable[..., Any] | None = None,
) -> Tensor:
    """Computes logits at flat positions only, [N, V]: the head never sees the others. `through`: the wrapper of `net`, if any.

    `position_ids_BT`: of rows that hold several sequences, the index of each token in its own; no sequence sees another.
    Heads of language models act on each position alone; the parity test holds every family to that. The few families whose
    forward goes around their trunk (OPT) give all logits, and the wanted ones are selected afterwards.
    """
    with keep_positions(trunk_of(net), positions_N):
        logits_BTV: Tensor = (through or net)(input_ids=ids_BT, **_options(net, position_ids_BT)).logits
    return _selected(logits_BTV, ids_BT, positions_N)


def class_logits(
    net: nn.Module,
    ids_BT: Tensor,
    mask_BT: Tensor,
    types_BT: Tensor | None,
    *,
    through: Callable[..., Any] | None = None,
    mixed_with: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns a classifier's logits, [B, C]. `mask_BT` is 0 at padding; `types_BT` separates a pair's halves, where a
    family can. `mixed_with`: other tokens [B, T], and the shares [B] of the embeddings of `ids_BT` in the mixture.

    A decoder looks for the last token that is no padding token: padding has to be that of its own config.
    """
    if not is_masked_lm(net.config.model_type):  # type: ignore[union-attr,arg-type]
        ids_BT = ids_BT.masked_fill(mask_BT == 0, net.config.pad_token_id)  # type: ignore[union-attr,arg-type]
    takes_types = types_BT is not None and getattr(net.config, "type_vocab_size", 0) > 1
    inputs = {"token_type_ids": types_BT} if takes_types else {}
    inputs |= {"input_ids": ids_BT} if mixed_with is None else {"inputs_embeds": _mixture(net, ids_BT, *mixed_with)}
    logits_BC: Tensor = (through or net)(attention_mask=mask_BT, **inputs, **_options(net)).logits
    return logits_BC


def _mixture(net: nn.Module, ids_BT: Tensor, other_BT: Tensor, shares_B: Tensor) -> Tensor:
    tokens = net.get_input_embeddings()  # type: ignore[operator]
    first_BTD, second_BTD = tokens(ids_BT), tokens(other_BT)
    return torch.lerp(second_BTD, first_BTD, shares_B[:, None, None].to(first_BTD.dtype))


def _options(net: nn.Module, position_ids_BT: Tensor | None = None) -> dict[str, Any]:
    cache = {} if is_masked_lm(net.config.model_type) else {"use_cache": False}  # type: ignore[union-attr,arg-type]
    return cache if position_ids_BT is None else {**cache, "position_ids": position_ids_BT}


def _selected(given: Tensor, ids_BT: Tensor, positions_N: Tensor) -> Tensor:
    """Selects [N, …] of [1, N, …], or of [B, T, …] where the forward went around the trunk."""
    is_whole = given.shape[:2] == ids_BT.shape and ids_BT.shape != (1, len(positions_N))
    return given.flatten(0, 1).index_select(0, positions_N) if is_whole else given[0]


def trunk_of(net: Any) -> Any:
    """Returns the model below the head; transformers' base_model is the whole one where a family's own part has another
    name (Llama 4)."""
    if net.base_model is not net:
        return net.base_model
    tokens = net.get_input_embeddings()
    return next(child for child in net.children() if any(module is tokens for module in child.modules()))


@contextmanager
def keep_positions(trunk: nn.Module, positions_N: Tensor) -> Iterator[None]:
    """Makes the trunk give, inside, its hidden states at these flat positions only, as one row."""

    def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden_BTD = output[0]
        kept_1ND = hidden_BTD.flatten(0, 1).index_select(0, positions_N)[None]
        output.last_hidden_state = kept_1ND
        return output

    handle = trunk.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


class Head(NamedTuple):
    """The last layer of a language model: logits = hidden @ weight.T + bias. The embeddings may be its weight."""

    weight_VD: Tensor
    bias_V: Tensor | None


@torch.no_grad()
def head_of(net: nn.Module) -> Head | None:
    """Returns the head of `net`, found by a forward pass; None where logits are more than a linear layer (softcaps,
    scales).

    Call this under the autocast of later passes: under autocast some families (Mamba) cast their logits back.
    """
    device = next(net.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout draws
        try:
            head_inputs(net, torch.zeros((1, 2), dtype=torch.long, device=device), torch.tensor([1], device=device))
        except ModelError:
            return None
    last = net.get_output_embeddings()  # type: ignore[operator]
    return Head(last.weight, last.bias)


def head_inputs(
    net: nn.Module,
    ids_BT: Tensor,
    positions_N: Tensor,
    *,
    position_ids_BT: Tensor | None = None,
    through: Callable[..., Any] | None = None,
) -> Tensor:
    """Returns what the head turns into logits at flat positions, [N, D]: logits_at = head_inputs @ weight.T + bias.

    Modules between trunk and head (BERT's transform) have run; the head itself runs on no position.
    Raises ModelError where the model's logits are not the head's own output: see `head_of`.
    """
    last = net.get_output_embeddings()  # type: ignore[operator]
    with keep_positions(trunk_of(net), positions_N), capture_head_input(last) as seen:
        output = (through or net)(input_ids=ids_BT, **_options(net, position_ids_BT))
    if len(seen) != 1 or output.logits is not seen[0][1]:
        raise ModelError(f"the logits of a {net.config.model_type} are more than a linear layer of its hidden states")  # type: ignore[union-attr]
    return _selected(seen[0][0], ids_BT, positions_N)


@contextmanager
def capture_head_input(last: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Records (input, output) of a linear layer, which is run on no position at all; [] for other layers."""
    given: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []

    def take(_module: nn.Module, args: Any) -> Any:
        given.append(args[0])
        return (args[0][..., :0, :],)

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append((given.pop(), output))

    with ExitStack() as stack:
        if isinstance(last, nn.Linear):
            stack.callback(last.register_forward_pre_hook(take).remove)
            stack.callback(last.register_forward_hook(note).remove)
        yield seen
