"""TODO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainables.config.errors import ModelError
from trainables.models.build import is_masked_lm


def logits_at(
    net: nn.Module,
    ids_BT: Tensor,
    positions_N: Tensor,
    *,
    places_BT: Tensor | None = None,
    through: nn.Module | None = None,
) -> Tensor:
    """Logits at flat positions b*T+t only, [N, V]: the head never sees the others. `through`: what wraps `net`, if any.

    `places_BT`: where several sequences lie in one row, the place of each token in its own, from 0; none sees another.

    Between trunk and head stands a hook that keeps the wanted positions, so that any family's own head code runs as it
    is. Heads of language models act on each position by itself; the parity test holds every family to that. The few
    families whose forward goes around their trunk (OPT) give all logits, and the wanted ones are taken afterwards.
    """
    with keep_positions(net.base_model, positions_N):  # type: ignore[arg-type]
        logits_BTV: Tensor = (through or net)(input_ids=ids_BT, **_placed(places_BT), **_no_cache(net)).logits
    whole = logits_BTV.shape[:2] == ids_BT.shape and ids_BT.shape != (1, len(positions_N))
    return logits_BTV.flatten(0, 1).index_select(0, positions_N) if whole else logits_BTV[0]


def class_logits(
    net: nn.Module, ids_BT: Tensor, mask_BT: Tensor, types_BT: Tensor | None, *, through: nn.Module | None = None
) -> Tensor:
    """[B, C]: one row a sequence. `mask_BT` is 0 at padding; `types_BT` tells a pair's halves apart, where a family can."""
    takes_types = types_BT is not None and getattr(net.config, "type_vocab_size", 0) > 1
    inputs = {"token_type_ids": types_BT} if takes_types else {}
    logits_BC: Tensor = (through or net)(input_ids=ids_BT, attention_mask=mask_BT, **inputs, **_no_cache(net)).logits
    return logits_BC


def _placed(places_BT: Tensor | None) -> dict[str, Tensor]:
    return {} if places_BT is None else {"position_ids": places_BT}


def _no_cache(net: nn.Module) -> dict[str, bool]:
    return {} if is_masked_lm(net.config.model_type) else {"use_cache": False}  # type: ignore[union-attr,arg-type]


@contextmanager
def keep_positions(trunk: nn.Module, positions_N: Tensor) -> Iterator[None]:
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
    """The last layer of a language model: logits = hidden @ weight.T + bias. The weight may be that of the embeddings."""

    weight_VD: Tensor
    bias_V: Tensor | None


@torch.no_grad()
def head_of(net: nn.Module) -> Head | None:
    """The head of `net`, or None where it is more than a linear layer (softcaps and scales of logits): a forward tells.

    To be asked under the autocast of later forwards: there some families (Mamba) cast their logits back.
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
    places_BT: Tensor | None = None,
    through: nn.Module | None = None,
) -> Tensor:
    """What the head turns into logits at flat positions b*T+t, [N, D]: logits_at = hidden_at @ weight.T + bias.

    Whatever the family puts between trunk and head (BERT's transform) is in it. The head itself runs on no position.
    Raises ModelError where the logits are not what the head gives, as it gives it: see `head_of`.
    """
    last = net.get_output_embeddings()  # type: ignore[operator]
    with keep_positions(net.base_model, positions_N), capture_head_input(last) as seen:  # type: ignore[arg-type]
        output = (through or net)(input_ids=ids_BT, **_placed(places_BT), **_no_cache(net))
    if len(seen) != 1 or output.logits is not seen[0][1]:
        raise ModelError(f"the logits of a {net.config.model_type} are more than a linear layer of its hidden states")  # type: ignore[union-attr]
    hidden_BTD = seen[0][0]
    whole = hidden_BTD.shape[:2] == ids_BT.shape and ids_BT.shape != (1, len(positions_N))
    return hidden_BTD.flatten(0, 1).index_select(0, positions_N) if whole else hidden_BTD[0]


@contextmanager
def capture_head_input(last: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keeps what a linear layer is given, with what it gives, and lets it see none of it; [] for other layers."""
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
