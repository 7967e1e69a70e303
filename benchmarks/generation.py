"""Throughput of `generation.sample` for many prompts, against one prompt at a time and against transformers'
`generate`.

    python -m benchmarks.generation                                   # on two shared cores: some minutes
    python -m benchmarks.generation --top-p 0.9
    python -m benchmarks.generation --device cuda --width 768 --layers 12 --vocab-size 50257 --rounds 5

A model with random weights; prompts of random ids, of random lengths between half of `--prompt-length` and all of it.

    batch                   `sample`, all prompts at once
    one by one              `sample`, one prompt at a time
    generate                transformers' `generate`, all prompts at once, padded on the left
    generate, one by one    the same, one prompt at a time

In `full` no reply ends before `--tokens`. In `ending` the end token has the probability 4 / tokens at every place, so
that replies have a quarter of the length on average. A hook on the model sets the end token's logit.

The variants take turns in a rotating order, in one process, after an uncounted round. tokens/s: tokens of replies over
time, medians over rounds; on a CPU with one thread the thread's own time, else wall time. Ratios: medians within
rounds. Parity: the command fails unless the greedy replies of all variants are equal in fp32.

Not covered: memory, bf16, static or paged caches, compiled models.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainables.config.data import Sampling
from trainables.config.models import Model
from trainables.generation.context import GenerationContext
from trainables.generation.sample import sample
from trainables.models.build import build
from trainables.runtime.trial import fresh

END, PAD = 0, 1
Prompts = Sequence[NDArray[np.int32]]
Way = Callable[[Prompts, int, bool], list[list[int]]]  # prompts, seed, greedy -> replies


def make(arguments: argparse.Namespace) -> Any:
    shape = {"family": arguments.family, "layers": arguments.layers, "width": arguments.width, "dropout": 0}
    model = Model.model_validate({**shape, "init": {"kind": "random", "std": "width"}})
    special = {"pad_token_id": PAD, "bos_token_id": END, "eos_token_id": END}
    length = arguments.prompt_length + arguments.tokens
    net = build(model, name="net", seed=0, vocab_size=arguments.vocab_size, special_ids=special, length=length)
    return net.to(arguments.device).eval()


def end_with(net: Any, chance: float) -> Any:
    """The end token's odds at every place, until the handle that this returns is removed."""

    def move(_module: Any, _args: Any, output: Any) -> Any:
        output.logits[..., END] = -math.inf
        if chance:
            output.logits[..., END] = output.logits.logsumexp(-1) + math.log(chance / (1 - chance))
        return output

    return net.register_forward_hook(move)


def random_prompts(num: int, length: int, vocab_size: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, vocab_size, rng.integers(length // 2, length + 1)).astype(np.int32) for _ in range(num)]


def ways(net: Any, arguments: argparse.Namespace) -> dict[str, Way]:
    how = Sampling(max_tokens=arguments.tokens, top_p=arguments.top_p)
    device = arguments.device

    def ours(prompts: Prompts, seed: int, greedy: bool) -> list[list[int]]:
        context = GenerationContext((END,), PAD, arguments.vocab_size, device)
        return [reply.tolist() for reply in sample(net, prompts, how, context, seed=seed, greedy=greedy).replies]

    @torch.no_grad()
    def theirs(prompts: Prompts, seed: int, greedy: bool) -> list[list[int]]:
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[PAD] * (longest - len(p)) + p.tolist() for p in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        drawn: dict[str, Any] = {"do_sample": False}
        if not greedy:
            drawn = {"do_sample": True, "temperature": 1.0, "top_p": arguments.top_p, "top_k": 0}
        all_BT = net.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            max_new_tokens=arguments.tokens,
            eos_token_id=END,
            pad_token_id=PAD,
            **drawn,
        )
        replies = all_BT[:, longest:].tolist()
        return [reply[: reply.index(END) + 1] if END in reply else reply for reply in replies]

    def alone(way: Way) -> Way:
        return lambda prompts, seed, greedy: [way([prompt], seed + n, greedy)[0] for n, prompt in enumerate(prompts)]

    return {"batch": ours, "one by one": alone(ours), "generate": theirs, "generate, one by one": alone(theirs)}


def tokens_per_second(way: Way, prompts: Prompts, seed: int, device: str) -> float:
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    replies = way(prompts, seed, False)  # lists: what CUDA had to do is done
    return sum(map(len, replies)) / (clock() - started)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="gpt2")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    fresh(0, arguments.threads)
    net = make(arguments)
    prompts = random_prompts(arguments.prompts, arguments.prompt_length, arguments.vocab_size)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    size = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    print(f"{versions}; {arguments.family}, {size:.1f}M parameters; {arguments.prompts} prompts of up to")
    print(
        f"{arguments.prompt_length} tokens, top_p {arguments.top_p:g}; {arguments.device}, {arguments.threads} "
        f"thread{'s' * (arguments.threads > 1)}; load {os.getloadavg()[0]:.1f}"
    )
    how = ways(net, arguments)
    for case, chance in (("full", 0.0), ("ending", 4 / arguments.tokens)):
        handle = end_with(net, chance)
        greedy = {name: way(prompts[:4], 0, True) for name, way in how.items()}
        assert all(replies == greedy["batch"] for replies in greedy.values()), "greedy replies differ"
        found: dict[str, list[float]] = {name: [] for name in how}
        for number in range(arguments.rounds):
            for turn in range(len(how)):
                name = list(how)[(number + turn) % len(how)]
                found[name].append(tokens_per_second(how[name], prompts, 1000 * number, arguments.device))
        handle.remove()
        print(f"{case}: up to {arguments.tokens} tokens a reply")
        for name, rates in found.items():
            ratios = sorted(ours / rate for ours, rate in zip(found["batch"], rates, strict=True))
            spread = f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"
            print(f"  {name:22}{statistics.median(rates):9.0f} tokens/s   batch / this {spread}")


if __name__ == "__main__":
    main()
