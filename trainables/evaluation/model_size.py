"""The size and the speed of a model: parameters, FLOPs of a forward, latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainables.evaluation.per_example import in_eval_mode
from trainables.models.build import num_parameters
from trainables.models.output_head import class_logits, logits_at

RUNS = 9  # timed forwards of one sequence, after two that warm up


@torch.no_grad()
def flops_per_token(net: Any, *, length: int, device: str) -> float:
    """Counts the FLOPs of a forward over a sequence of `length`, the head at each of its tokens, by token."""
    ids_BT = torch.zeros((1, length), dtype=torch.long, device=device)
    with in_eval_mode(net), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        logits_at(net, ids_BT, torch.arange(length, device=device))
    return float(counter.get_total_flops()) / length


@torch.no_grad()
def size_and_speed(
    net: Any, *, length: int, is_task: bool, device: str, autocast: Callable[[], Any] = nullcontext
) -> dict[str, float]:
    """Measures `parameters` (shared ones once), `forward_flops` of one sequence, and its median `latency_ms`.

    The sequence has `length` tokens and no padding; the head runs at all positions. Other trials on the machine make it
    slower.
    """
    ids_BT = torch.ones((1, length), dtype=torch.long, device=device)

    def forward() -> None:
        with autocast():
            if is_task:
                class_logits(net, ids_BT, torch.ones_like(ids_BT), None)
            else:
                logits_at(net, ids_BT, torch.arange(length, device=device))
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    with in_eval_mode(net):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            forward()
        forward()
        for _ in range(RUNS):
            started = time.perf_counter()
            forward()
            times.append(time.perf_counter() - started)
    return {
        "parameters": float(num_parameters(net)),
        "forward_flops": float(counter.get_total_flops()),
        "latency_ms": 1000 * sorted(times)[RUNS // 2],
    }


def _attention_flops(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    """Counts two products for each pair of positions."""
    b, h, t, d = query
    return int(2 * b * h * t * key[2] * (d + value[3]))


def _attention_backward_flops(_grad: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    """Counts five products: the scores again, then gradients of values, of weights, of queries and of keys."""
    b, h, t, d = query
    return int(2 * b * h * t * key[2] * (3 * d + 2 * value[3]))


_ATEN = torch.ops.aten
FLOPS = {  # PyTorch has formulas for the kernels of GPUs, but none for that of CPUs
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
