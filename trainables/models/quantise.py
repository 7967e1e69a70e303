"""Linear layers whose weights are kept in 4 bits, by bitsandbytes, or in 8, for models that a phase reads and does not train.

A weight is made wide again for each product, which runs in the type of its input. (bitsandbytes' own layers round inputs of
int8 products too, look for kernels on the hub, and hide their products from the counter of FLOPs.)
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.errors import ModelError
from trainables.config.models import Quantization
from trainables.models.layouts import is_linear, is_transposed, num_outputs
from trainables.models.output_head import trunk_of

BLOCK, BLOCKS = 64, 256  # numbers that share a scale in nf4, and scales that share a scale of their own


class Quantised(nn.Module):
    """A linear layer with a weight in NormalFloat-4 with scales in 8 bits (QLoRA, Dettmers et al. 2023), or in int8 with a
    scale for each output."""

    def __init__(self, linear: Any, kind: Quantization, device: str) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().to(device)
        weight_OI = (weight_OI.T if is_transposed(linear) else weight_OI).contiguous()
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.kind, self.dtype = kind, weight_OI.dtype
        if kind == "nf4":
            from bitsandbytes import functional

            self.packed, self.state = functional.quantize_4bit(weight_OI, quant_type="nf4", compress_statistics=True)
        else:
            self.state = weight_OI.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
            self.packed = (weight_OI / self.state).round().to(torch.int8)

    @property
    def weight(self) -> Tensor:
        """The weight that products are computed with, [outputs, inputs]."""
        if self.kind == "nf4":
            from bitsandbytes import functional

            wide: Tensor = functional.dequantize_4bit(self.packed, self.state)
            return wide
        weight_OI: Tensor = self.packed * self.state
        return weight_OI.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def quantise(net: Any, kind: Quantization, device: str) -> Any:
    """Replaces the linear layers below the head, on `device`; the plain weights are there one layer at a time.

    Raises ModelError where bitsandbytes is not installed or has nothing for the device.
    """
    check(kind)
    for path, layer in _layers(net):
        try:
            net.set_submodule(path, Quantised(layer, kind, device))
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(f"quantize: {kind} is not there for {device}: {str(error).splitlines()[0]}") from error
    return net


def check(kind: Quantization) -> None:
    """Raises ModelError where bitsandbytes is not installed."""
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise ModelError("quantize: nf4 needs bitsandbytes: pip install 'codistill[eightbit]'; expected that, or int8")


def num_bytes(net: Any, kind: Quantization) -> int:
    """Returns the bytes of a model's weights once its linear layers are quantised; `net` may lie on the meta device."""
    plain: int = sum(p.numel() * p.itemsize for p in net.parameters())
    quantised = 0
    for _, layer in _layers(net):
        number: int = layer.weight.numel()
        plain -= number * layer.weight.itemsize
        nf4 = number // 2 + number // BLOCK + 4 * -(-number // (BLOCK * BLOCKS))
        quantised += nf4 if kind == "nf4" else number + 4 * num_outputs(layer)
    return plain + quantised


def _layers(net: Any) -> list[tuple[str, Any]]:
    below = {id(module) for module in trunk_of(net).modules()}
    return [(path, module) for path, module in net.named_modules() if id(module) in below and is_linear(module)]
