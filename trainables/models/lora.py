"""LoRA (Hu et al. 2022, arXiv 2106.09685) on logical projections, by peft: h = W x + alpha / rank · B A x, W frozen.

A matrix that holds query, key and value is first split into a layer for each: every target has a pair of its own, and
other projections do not change by one bit. `merged` joins the matrices again.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables.config.errors import ModelError
from trainables.config.phase import Lora
from trainables.config.value import random_stream
from trainables.models.build import weights_of
from trainables.models.configs import dropouts
from trainables.models.layouts import Outputs, is_linear, is_transposed, projections_of
from trainables.models.output_head import trunk_of

ADAPTER = "default"  # peft's name of a single adapter


class Split(nn.Module):
    """A matrix of several projections as one layer for each; the order of outputs stays."""

    order: Tensor | None  # of each output of the matrix: its index among the outputs of all projections, concatenated

    def __init__(self, whole: Any, outputs: Mapping[str, Outputs]) -> None:
        super().__init__()
        self.output_axis = 1 if is_transposed(whole) else 0
        for name, places in outputs.items():
            own = torch.from_numpy(places).to(whole.weight.device)
            part = copy.deepcopy(whole)
            part.weight = nn.Parameter(whole.weight.detach().index_select(self.output_axis, own))
            part.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach().index_select(0, own))
            setattr(part, "nf" if is_transposed(whole) else "out_features", len(places))
            self.add_module(name, part)
        order = np.argsort(np.concatenate(list(outputs.values())))
        is_same = bool((order == np.arange(len(order))).all())
        self.register_buffer(
            "order", None if is_same else torch.from_numpy(order).to(whole.weight.device), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.join([part(x) for part in self.children()], -1)

    def join(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Joins a tensor of each projection in the matrix's order of outputs."""
        whole = torch.cat(list(parts), axis)
        return whole if self.order is None else whole.index_select(axis, self.order.to(whole.device))


def attach(net: Any, how: Lora, *, name: str, seed: int, with_head: bool = False) -> Any:
    """Adds a pair at each target to `net`: only pairs learn, in fp32 at least, and the head `with_head`; at first no output
    changes.

    The base's dropout stays off in training; the dropout before A is `how.dropout`. A is drawn from U(±sqrt(1 / inputs)),
    Kaiming's rule as in peft, by (seed, name, path, target) alone; B is zero.
    Raises ModelError where a target has no projection; the message names the linear layers.
    """
    import peft  # takes seconds to import, and few trials need it

    assert not is_attached(net)
    paths = []
    found: Mapping[str, Mapping[str, Outputs]] = projections_of(net)
    if how.targets == "all_linear":
        found = _linear_layers(net, found)
    else:
        _check_targets(net, how.targets, {target for targets in found.values() for target in targets}, name)
    for path, targets in found.items():
        wanted = [target for target in targets if how.targets == "all_linear" or target in how.targets]
        if len(targets) > 1 and wanted:
            net.set_submodule(path, Split(net.get_submodule(path), targets))
        paths += [f"{path}.{target}" if len(targets) > 1 else path for target in wanted]
    _without_dropout(net)
    config = peft.LoraConfig(
        r=how.rank,
        lora_alpha=how.alpha or how.rank,
        use_rslora=how.rslora,
        lora_dropout=how.dropout,
        target_modules="|".join(re.escape(path) for path in paths),
        fan_in_fan_out=any(is_transposed(net.get_submodule(path)) for path in paths),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        peft.inject_adapter_in_model(config, net, ADAPTER)
    for path, layer in _layers(net):
        for pair in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            pair.to(torch.promote_types(pair.weight.dtype, torch.float32))
        drawn = torch.empty(layer.lora_A[ADAPTER].weight.shape)
        generator = torch.Generator().manual_seed(random_stream(seed, "lora", name, path))
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            layer.lora_A[ADAPTER].weight.copy_(drawn)
    if with_head:
        for parameter in _head(net).values():
            parameter.requires_grad_(True)
    return net


def is_attached(net: nn.Module) -> bool:
    """Returns whether a model has LoRA pairs."""
    return next(_layers(net), None) is not None


@torch.no_grad()
def merged(net: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of the plain model with the pairs added to its weights, in names, shapes and types of the
    family's own class, as `build.weights_of`. (Weights in bf16 round the sum.)"""
    state = {name: tensor for name, tensor in weights_of(net).items() if ".lora_" not in name}
    for path, layer in _layers(net):
        base = state[f"{path}.base_layer.weight"]
        state[f"{path}.base_layer.weight"] = (base + layer.get_delta_weight(ADAPTER)).to(base.dtype)
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
    for path, module in net.named_modules():
        if isinstance(module, Split):
            for leaf, axis in (("weight", module.output_axis), ("bias", 0)):
                names = [f"{path}.{part}.{leaf}" for part, _ in module.named_children()]
                if names[0] in state:
                    state[f"{path}.{leaf}"] = module.join([state.pop(name) for name in names], axis)
    return state


@contextmanager
def original(net: nn.Module) -> Iterator[None]:
    """Turns the pairs off inside: `net` is then the base model."""
    layers = [layer for _, layer in _layers(net)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_state(net: nn.Module) -> dict[str, Tensor]:
    """Returns what learns: the pairs, by the path of their projection: `….query.A` [rank, inputs], `….query.B` [outputs, rank];
    and the head's tensors, where it learns, by their names."""
    return {name: tensor.detach() for name, tensor in _learning(net).items()}


@torch.no_grad()
def load_adapter_state(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `adapter_state` gave into `net`. Raises ModelError where names or shapes differ."""
    pairs = _learning(net)
    for name in sorted(pairs.keys() | state.keys()):
        shapes = [tuple(side[name].shape) if name in side else None for side in (pairs, state)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"stored LoRA pairs do not fit: {name} is {shapes[1]}, the model has {shapes[0]}")
    for name, tensor in pairs.items():
        tensor.copy_(state[name])


def as_peft(net: nn.Module, how: Lora, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Returns peft's config and tensors of an adapter of a language model. `net`: the plain model; `state`: as `adapter_state` gave
    it. Raises ModelError where pairs change a part of a matrix of `net`, or a head learnt beside them."""
    import peft

    modules = {path for path, _ in net.named_modules()}
    paths = sorted({name.rpartition(".")[0] for name in state})
    if any(not name.endswith((".A", ".B")) for name in state):
        raise ModelError("a classifier's head learnt beside the pairs, which peft would draw anew")
    if split := next((path for path in paths if path not in modules), ""):
        raise ModelError(f"{split} is a part of one matrix in this family, and peft's adapters change whole ones")
    config = peft.LoraConfig(
        r=how.rank,
        lora_alpha=how.alpha or how.rank,
        use_rslora=how.rslora,
        lora_dropout=how.dropout,
        target_modules=paths,
        fan_in_fan_out=any(is_transposed(net.get_submodule(path)) for path in paths),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    names = ((name, *name.rsplit(".", 1)) for name in state)
    return config, {f"base_model.model.{path}.lora_{pair}.weight": state[name] for name, path, pair in names}


def _head(net: nn.Module) -> dict[str, nn.Parameter]:
    """Returns a classifier's parameters above the layers: those outside the trunk, and of its pooler."""
    trunk = {id(parameter) for path, parameter in trunk_of(net).named_parameters() if "pooler" not in path}
    return {path: parameter for path, parameter in net.named_parameters() if id(parameter) not in trunk}


def _learning(net: nn.Module) -> dict[str, nn.Parameter]:
    found = {
        path: parameter for path, parameter in _head(net).items() if parameter.requires_grad and ".lora_" not in path
    }
    for path, layer in _layers(net):
        found |= {f"{path}.A": layer.lora_A[ADAPTER].weight, f"{path}.B": layer.lora_B[ADAPTER].weight}
    return found


def _layers(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields peft's layers with their paths; imports no peft."""
    for path, module in net.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            yield path, module


def _linear_layers(
    net: nn.Module, projections: Mapping[str, Mapping[str, Outputs]]
) -> dict[str, Mapping[str, Outputs]]:
    """Returns the linear layers below the head (peft's `all-linear`): those of attention by projection, others whole."""
    below = {id(module) for module in trunk_of(net).modules()}
    paths = (path for path, module in net.named_modules() if id(module) in below and is_linear(module))
    return {path: projections.get(path, {"": np.empty(0, np.int64)}) for path in paths}


def _check_targets(net: nn.Module, targets: Sequence[str], known: set[str], name: str) -> None:
    absent = [target for target in targets if target not in known]
    if absent:
        linear = (path for path, module in net.named_modules() if is_linear(module))
        kinds = dict.fromkeys(re.sub(r"(^|\.)\d+\.", r"\1*.", path) for path in linear)
        raise ModelError(
            f"model {name!r} ({net.config.model_type}): no projection is known as {absent[0]}; "  # type: ignore[union-attr]
            f"linear layers: {', '.join(kinds)}; expected targets: {', '.join([*sorted(known), 'all_linear'])}"
        )


def _without_dropout(net: Any) -> None:
    """Sets every dropout rate to zero: of modules, in attributes of modules, in configs that inner modules read. The
    model's own config, which is stored, keeps its rates."""
    quiet: dict[int, Any] = {}
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for field, value in vars(module).items():
            if "drop" in field and isinstance(value, float):
                setattr(module, field, 0.0)
        config = getattr(module, "config", None)
        if module is not net and hasattr(config, "to_dict"):
            if id(config) not in quiet:
                quiet[id(config)] = copy.deepcopy(config)
                quiet[id(config)].update(dict.fromkeys(dropouts(config), 0.0))
            module.config = quiet[id(config)]
