"""Time and memory of a step whose head runs at supervised positions only, against full logits.

    python -m benchmarks.sparse_head

Random tokens, 15 % of them supervised, batch 16 x 128, V = 30,522; a 4 x 256 encoder alone, and with a 2 x 128 encoder
by mutual KL. A step is forward, losses, backward and AdamW, on one thread of a CPU. Three heads:

    sparse   `output_head.logits_at`: the head runs at the N supervised positions          [N, V]
    rows     full logits, of which the losses read the supervised rows                     [B, T, V], then [N, V]
    full     full logits; cross-entropy over all of them with ignore_index, as in transformers with `labels`, and KL on
             the supervised rows                                                           [B, T, V]

Time: the same models in one process; the heads take turns in a rotating order; ratios are medians over paired steps.
Memory: each head in a fresh process, peak resident size of a few steps above the size before the models are made.
Parity: the command fails unless the losses and gradients of the three agree.

Not covered: GPUs, bf16, other lengths and masking rates; the gain is smaller with a larger trunk.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.models import Model
from trainables.config.phase import Masking
from trainables.config.terms import ForwardKL
from trainables.data.corpus.masking import MaskedBatch, mask_batch
from trainables.losses.logits import cross_entropy
from trainables.losses.terms import divergence
from trainables.models import build, output_head
from trainables.runtime.trial import fresh
from trainables.training.state import peak_memory

SHAPES = {"4x256": [(4, 256)], "4x256 + 2x128": [(4, 256), (2, 128)]}
WARM = [(1, 4)]  # a step of it brings in what transformers and torch import late, some 100 MiB
HEADS = ("sparse", "rows", "full")
VOCAB, BATCH, LENGTH = 30_522, 16, 128
SPECIAL = {"pad_token_id": 0, "unk_token_id": 1, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}
FLOW = ForwardKL.model_validate({"kind": "forward_kl", "from": "a", "to": "b", "tau_squared": False})


def make(shape: list[tuple[int, int]], family: str) -> list[Any]:
    made = []
    for layers, width in shape:
        model = Model(family=family, layers=layers, width=width, dropout=0)
        name = f"{layers}x{width}"
        made.append(build.build(model, name=name, seed=0, vocab_size=VOCAB, special_ids=SPECIAL, length=LENGTH).train())
    return made


def batch(step: int) -> MaskedBatch:
    ids_BT = torch.randint(5, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
    return mask_batch(ids_BT, masking=Masking(), vocab_size=VOCAB, mask_id=4, special_ids=range(5), seed=step)


def loss_of(head: str, nets: list[Any], part: MaskedBatch) -> Tensor:
    """Cross-entropy of each net, and KL in both directions where there are two; a mean over supervised positions."""
    rows, hard = [], []
    for net in nets:
        if head == "sparse":
            rows.append(output_head.logits_at(net, part.ids_BT, part.positions_N))
            hard.append(cross_entropy(rows[-1], part.labels_N))
            continue
        logits_MV = net(input_ids=part.ids_BT).logits.flatten(0, 1)  # M = B * T
        rows.append(logits_MV.index_select(0, part.positions_N) if head == "rows" or len(nets) > 1 else logits_MV)
        if head == "rows":
            hard.append(cross_entropy(rows[-1], part.labels_N))
        else:
            labels_M = torch.full((BATCH * LENGTH,), -100).index_copy(0, part.positions_N, part.labels_N)
            hard.append(F.cross_entropy(logits_MV.float(), labels_M, ignore_index=-100, reduction="sum"))
    soft = [divergence(FLOW, a, b) for a in rows for b in rows if a is not b]
    return torch.stack([*hard, *soft]).sum() / len(part.labels_N)


def step(head: str, nets: list[Any], optimizer: torch.optim.Optimizer, part: MaskedBatch) -> float:
    """Seconds of an optimizer step."""
    started = time.perf_counter()
    loss_of(head, nets, part).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def adamw(nets: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for net in nets for p in net.parameters()], lr=1e-4, fused=True)


def gradients(head: str, nets: list[nn.Module]) -> tuple[float, list[Tensor]]:
    loss = loss_of(head, nets, batch(0))
    loss.backward()  # type: ignore[no-untyped-call]
    found = [p.grad for net in nets for p in net.parameters() if p.grad is not None]
    for net in nets:
        net.zero_grad(set_to_none=True)
    return loss.item(), found


def check_parity(nets: list[Any]) -> str:
    """Each gradient tensor, its difference over its largest entry; and the loss. Raises where they are not float
    error."""
    loss, wanted = gradients("full", nets)
    worst = worst_loss = 0.0
    for head in ("sparse", "rows"):
        other, found = gradients(head, nets)
        assert len(found) == len(wanted)
        worst_loss = max(worst_loss, abs(other - loss) / loss)
        pairs = zip(wanted, found, strict=True)
        worst = max([worst, *(((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() for a, b in pairs)])
    assert worst_loss < 1e-5 and worst < 1e-3, (worst_loss, worst)
    return f"loss {worst_loss:.0e}, gradients {worst:.0e} (largest relative differences)"


def timed(shape: str, family: str, steps: int) -> None:
    nets = make(SHAPES[shape], family)
    print(f"{shape}: parity: {check_parity(nets)}")
    optimizer = adamw(nets)
    seconds: dict[str, list[float]] = {head: [] for head in HEADS}
    for number in range(steps + 1):
        for turn in range(len(HEADS)):
            head = HEADS[(number + turn) % len(HEADS)]
            seconds[head].append(step(head, nets, optimizer, batch(number)))
    for head in HEADS:
        taken = seconds[head][1:]  # the first makes the optimizer's state
        ratios = sorted(a / b for a, b in zip(taken, seconds["sparse"][1:], strict=True))
        spread = f"{ratios[0]:.2f} … {ratios[-1]:.2f}"
        print(f"  {head:8}{statistics.median(taken):7.3f} s   / sparse {statistics.median(ratios):.2f}   ({spread})")


def above_start(shape: str, family: str, head: str, steps: int) -> float:
    """Bytes, in this fresh process."""
    warm = make(WARM, family)
    step("sparse", warm, adamw(warm), batch(0))
    del warm
    fresh(0, 1)  # also resets the high-water mark
    before = peak_memory("cpu")
    nets = make(SHAPES[shape], family)
    optimizer = adamw(nets)
    for number in range(steps):
        step(head, nets, optimizer, batch(number))
    return peak_memory("cpu") - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_head", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each head")
    parser.add_argument("--memory-steps", type=int, default=3)
    parser.add_argument("--family", default="modernbert")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        shape, head = arguments.memory_of
        print(json.dumps(above_start(shape, arguments.family, head, arguments.memory_steps)))
        return
    fresh(0, 1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{versions}; {arguments.family}; 1 thread; load {os.getloadavg()[0]:.1f}")
    for shape in SHAPES:
        timed(shape, arguments.family, arguments.steps)
        peaks = {}
        for head in HEADS:
            command = [sys.executable, "-m", "benchmarks.sparse_head", "--memory-of", shape, head]
            command += ["--family", arguments.family, "--memory-steps", str(arguments.memory_steps)]
            peaks[head] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"  {head:8}{peaks[head] / 2**20:7.0f} MiB / sparse {peaks[head] / peaks['sparse']:.2f}", flush=True)


if __name__ == "__main__":
    main()
