"""Time and memory of the two-sided loss in chunks of positions, against whole logits and against Liger.

    python -m benchmarks.fused_loss                              # on a CPU: about half an hour
    python -m benchmarks.fused_loss --device cuda --chunk 1024

Two sides (hidden states [N, D] and [N, D'], head weights [V, D] and [V, D'], random, fp32); a step is the loss and its
backward down to these. Each side has its cross-entropy and a JSD (beta 1/2) to the other, all of weight 1/2. `one
side`: the big side is frozen and has no cross-entropy, the only case that Liger's loss covers.

    plain            `losses.terms` on whole logits                                                 [N, V]
    checkpoint       the same on chunks, recomputed in the backward by `torch.utils.checkpoint`     [chunk, V]
    fused            `losses.chunked`                                                               [chunk, V]
    liger            `LigerFusedLinearJSDLoss` by default (torch.compile, chunks of 1024); for both sides it runs twice
    liger, eager     the same without torch.compile, with our chunks

Time: medians; the variants take turns step by step in a rotating order, in one process. On a CPU the thread's own
seconds, on CUDA wall time. Memory: each variant and N in a fresh process, the peak of a step above the memory with
inputs allocated and one small step done. *In use*: allocated tensors (on a CPU: resident size with
MALLOC_MMAP_THRESHOLD_ such that malloc returns large blocks at once). *Resident*: with malloc's defaults. `-`: whole
logits would not fit. Parity: the command fails unless the values and gradients of all variants agree. Liger is measured
if installed: `pip install liger-kernel`.

Not covered: bf16, several threads, trunks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainables.config.terms import JSD, CrossEntropy, Term
from trainables.losses.chunked import LogitSource, chunked_terms
from trainables.losses.terms import term_loss
from trainables.runtime.trial import fresh
from trainables.training.state import peak_memory

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
WEIGHT = 0.5
HARD: dict[str, Term] = {f"{name}_hard": CrossEntropy(kind="cross_entropy", of=name) for name in ("big", "small")}
FLOWS: dict[str, Term] = {
    f"{a}_to_{b}": JSD.model_validate({"kind": "jsd", "from": a, "to": b, "tau_squared": False})
    for a, b in (("big", "small"), ("small", "big"))
}
CASES: dict[str, dict[str, Term]] = {
    "both sides": {**HARD, **FLOWS},
    "one side": {"small_hard": HARD["small_hard"], "big_to_small": FLOWS["big_to_small"]},
}
Sides = Mapping[str, LogitSource]
Way = Callable[[Sides, Tensor, dict[str, Term], int], Tensor]


def plain_terms(logits: Mapping[str, Tensor], labels_N: Tensor, terms: dict[str, Term]) -> Tensor:
    values = [term_loss(t, logits.get(t.source or ""), logits[t.target], labels_N) for t in terms.values()]
    return WEIGHT * torch.stack(values).sum()


def plain(sources: Sides, labels_N: Tensor, terms: dict[str, Term], chunk: int) -> Tensor:
    return plain_terms({name: F.linear(*side) for name, side in sources.items()}, labels_N, terms)


def checkpointed(sources: Sides, labels_N: Tensor, terms: dict[str, Term], chunk: int) -> Tensor:
    def part(cut: slice) -> Tensor:
        cut_sides = {name: side._replace(hidden_ND=side.hidden_ND[cut]) for name, side in sources.items()}
        return plain(cut_sides, labels_N[cut], terms, chunk)

    cuts = [slice(start, start + chunk) for start in range(0, len(labels_N), chunk)]
    return torch.stack([checkpoint(part, cut, use_reentrant=False) for cut in cuts]).sum()


def fused(sources: Sides, labels_N: Tensor, terms: dict[str, Term], chunk: int) -> Tensor:
    return chunked_terms(sources, labels_N, terms, dict.fromkeys(terms, WEIGHT), chunk=chunk).loss


def liger(*, eager: bool) -> Way:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(sources: Sides, labels_N: Tensor, terms: dict[str, Term], chunk: int) -> Tensor:
        options = {"compiled": False, "chunk_size": chunk} if eager else {}
        of_student = LigerFusedLinearJSDLoss(weight_hard_loss=WEIGHT, weight_soft_loss=WEIGHT, **options)
        total = torch.zeros((), device=labels_N.device)
        for source, target in ((term.source, term.target) for term in terms.values() if term.source is not None):
            student, teacher = sources[target], sources[source]
            mean = of_student(
                student.hidden_ND, student.weight_VD, teacher.hidden_ND.detach(), teacher.weight_VD.detach(), labels_N
            )
            total = total + mean * len(labels_N)
        return total

    return loss


def ways(only: str | None = None) -> dict[str, Way]:
    found: dict[str, Way] = {"plain": plain, "checkpoint": checkpointed, "fused": fused}
    if HAS_LIGER:
        found |= {"liger": liger(eager=False), "liger, eager": liger(eager=True)}
    return found if only is None else {only: found[only]}


def make(arguments: argparse.Namespace, num: int, case: str) -> tuple[dict[str, LogitSource], Tensor]:
    draw = torch.Generator().manual_seed(0)
    sources = {}
    for name, width in zip(("big", "small"), arguments.widths, strict=True):
        hidden_ND = torch.randn((num, width), generator=draw).to(arguments.device)
        weight_VD = (torch.randn((arguments.vocab, width), generator=draw) / width**0.5).to(arguments.device)
        learns = name == "small" or case == "both sides"
        sources[name] = LogitSource(hidden_ND.requires_grad_(learns), weight_VD.requires_grad_(learns))
    return sources, torch.randint(arguments.vocab, (num,), generator=draw).to(arguments.device)


def step(way: Way, sources: Sides, labels_N: Tensor, terms: dict[str, Term], *, chunk: int) -> tuple[float, Tensor]:
    """Seconds, and the loss; gradients are kept."""
    is_cuda = labels_N.is_cuda
    for side in sources.values():
        side.hidden_ND.grad = side.weight_VD.grad = None
    if is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter() if is_cuda else time.thread_time()
    loss = way(sources, labels_N, terms, chunk)
    loss.backward()  # type: ignore[no-untyped-call]
    if is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() if is_cuda else time.thread_time()) - started, loss.detach()


def check_parity(arguments: argparse.Namespace, case: str) -> str:
    """Largest relative differences to the plain path over all ways: of the loss, and of a gradient by its largest
    entry."""
    sources, labels_N = make(arguments, 300, case)
    wanted: list[Tensor] = []
    worst = [0.0, 0.0]
    for way in ways().values():
        loss = step(way, sources, labels_N, CASES[case], chunk=arguments.chunk)[1]
        found = [loss, *(t.grad for side in sources.values() for t in side if t is not None and t.grad is not None)]
        wanted = wanted or found
        assert len(found) == len(wanted)
        far = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]
        worst = [max(worst[0], far[0]), max(worst[1], *far[1:])]
    assert worst[0] < 1e-5 and worst[1] < 1e-3, worst
    return f"loss {worst[0]:.0e}, gradients {worst[1]:.0e}"


def memory(arguments: argparse.Namespace, case: str, way: str, num: int) -> float:
    """Bytes of a step above its inputs, in this fresh process."""
    sources, labels_N = make(arguments, num, case)
    terms = CASES[case]
    function = ways(way)[way]
    small = {name: side._replace(hidden_ND=side.hidden_ND[:8].detach()) for name, side in sources.items()}
    step(function, small, labels_N[:8], terms, chunk=4)
    for side in sources.values():
        side.weight_VD.grad = None
    fresh(0, 1)  # also resets the high-water mark
    before = peak_memory(arguments.device)
    step(function, sources, labels_N, terms, chunk=arguments.chunk)
    return peak_memory(arguments.device) - before


def available(device: str) -> float:
    """Bytes that a process may still take."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def measure(arguments: argparse.Namespace, case: str) -> None:
    print(f"\n{case}: parity: {check_parity(arguments, case)}\n")
    print("| N | way | s/step | / fused | MiB in use | / fused | MiB resident |\n|---|---|---|---|---|---|---|")
    per_position = 0.0  # bytes of the plain path, from a smaller N
    for num in arguments.positions:
        fits = 1.2 * per_position * num < 0.7 * available(arguments.device)
        peaks = {way: of_fresh_processes(arguments, case, way, num) for way in ways() if way != "plain" or fits}
        per_position = peaks["plain"][0] / num if fits else per_position
        seconds = timed(arguments, case, num, list(peaks))
        for way in ways():
            if way not in peaks:
                print(f"| {num} | {way} | - | - | - | - | - |")
                continue
            ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["fused"], strict=True))
            used, resident = (f"{size / 2**20:.0f}" for size in peaks[way])
            more = peaks[way][0] / peaks["fused"][0]
            time_ = f"{statistics.median(seconds[way]):.3g} | {ratio:.2f}"
            print(f"| {num} | {way} | {time_} | {used} | {more:.2f} | {resident} |", flush=True)


def timed(arguments: argparse.Namespace, case: str, num: int, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each step, by way."""
    sources, labels_N = make(arguments, num, case)
    cut = slice(0, min(num, 1024))  # one of Liger's chunks, which it compiles
    warm = {
        n: s._replace(hidden_ND=s.hidden_ND[cut].detach().requires_grad_(s.hidden_ND.requires_grad))
        for n, s in sources.items()
    }
    for name in names:
        step(ways(name)[name], warm, labels_N[cut], CASES[case], chunk=arguments.chunk)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            seconds[name].append(step(ways(name)[name], sources, labels_N, CASES[case], chunk=arguments.chunk)[0])
    return seconds


def of_fresh_processes(arguments: argparse.Namespace, case: str, way: str, num: int) -> tuple[float, float]:
    """Bytes in use and resident."""
    command = [sys.executable, "-m", "benchmarks.fused_loss", "--memory-of", case, way, str(num)]
    command += ["--device", arguments.device, "--chunk", str(arguments.chunk), "--vocab", str(arguments.vocab)]
    command += ["--widths", *map(str, arguments.widths)]
    found = []
    for more in ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {}):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **more})
        found.append(float(json.loads(done.stdout.splitlines()[-1])))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused_loss", description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 2048, 4096, 8192], metavar="N")
    parser.add_argument("--vocab", type=int, default=30_522)
    parser.add_argument("--widths", type=int, nargs=2, default=[256, 256], metavar="D", help="of the big and the small")
    parser.add_argument("--chunk", type=int, default=128, help="positions at a time")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each way")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    fresh(0, 1)
    if arguments.memory_of:
        case, way, num = arguments.memory_of
        print(json.dumps(memory(arguments, case, way, int(num))))
        return
    packages = ("torch", "liger-kernel") if HAS_LIGER else ("torch",)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(
        f"{versions}{'' if HAS_LIGER else ', no liger-kernel here'}; {arguments.device}; load {os.getloadavg()[0]:.1f}"
    )
    print(f"V = {arguments.vocab}, D = {arguments.widths}, chunk {arguments.chunk}, fp32, {arguments.rounds} rounds")
    for case in CASES:
        measure(arguments, case)


if __name__ == "__main__":
    main()
