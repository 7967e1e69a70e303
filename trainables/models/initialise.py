"""Draws the initial weights of a model, each module from a random stream of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainables.config.errors import ModelError
from trainables.config.models import Random
from trainables.config.value import random_stream


@torch.no_grad()
def initialise(net: PreTrainedModel, init: Random, *, name: str, seed: int) -> None:
    """Draws each module's weights from its own stream, so that equal shapes get equal weights in every arm.

    `std: family` calls the family's own rule for each module; `width` draws every matrix from N(0, 1/sqrt(width)), with
    which a small encoder learns more than unigrams hundreds of steps earlier. Raises ModelError without learned positions.
    """
    for tensor in [*net.parameters(), *net.buffers()]:
        tensor._is_hf_initialized = False  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        _draw_modules(net, net, "", seed=seed, name=name)
        width = net.config.hidden_size
        if init.std != "family":
            std = 1 / math.sqrt(width) if init.std == "width" else init.std
            for path, parameter in net.named_parameters():
                if parameter.ndim >= 2:
                    torch.manual_seed(random_stream(seed, "init", name, path))
                    parameter.normal_(0.0, std)
    if init.positions == "sinusoid":
        table = position_table(net)
        if table is None:
            raise ModelError(
                f"model {name!r} ({net.config.model_type}) has no learned positions; remove `positions: sinusoid`"
            )
        table.weight.copy_(sinusoids(*table.weight.shape) * table.weight.std())


def _draw_modules(net: PreTrainedModel, module: nn.Module, path: str, *, seed: int, name: str) -> None:
    """Calls the family's rule on each module, children first as transformers does: a block that scales the projections
    inside (GPT-2, ModernBERT) comes last."""
    for child, inner in module.named_children():
        _draw_modules(net, inner, f"{path}.{child}" if path else child, seed=seed, name=name)
    torch.manual_seed(random_stream(seed, "init", name, path))
    net._init_weights(module)
    if module is net.base_model:
        for tensor in module.parameters():  # a head tied to the embeddings keeps their draw
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def position_table(net: PreTrainedModel) -> nn.Embedding | None:
    """Returns the embeddings of learned positions; None where the family has none."""
    length = getattr(net.config, "max_position_embeddings", None)
    for path, module in net.named_modules():
        is_table = path.rsplit(".", 1)[-1] in ("position_embeddings", "wpe")
        if is_table and isinstance(module, nn.Embedding) and module.num_embeddings == length:
            return module
    return None


def num_positions(net: PreTrainedModel) -> int | None:
    """Returns the most positions that a sequence may have, None where the config has no limit. RoBERTa counts them from
    the padding index, so that the first rows of its table have none."""
    table = position_table(net)
    if table is None:
        return getattr(net.config, "max_position_embeddings", None)
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def sinusoids(length: int, width: int) -> Tensor:
    """Computes sinusoids (Vaswani et al. 2017, section 3.5), scaled to unit standard deviation; [length, width]."""
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angle_TF = torch.arange(length)[:, None] * frequency[None]
    table = torch.zeros(length, width)
    table[:, 0::2] = angle_TF.sin()
    table[:, 1::2] = angle_TF.cos()[:, : width // 2]
    return table / table.std()
