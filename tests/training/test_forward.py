"""Terms below the logits on packed exchanges: what each exchange gives when it is read alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from trainables.config.terms import Term
from trainables.data.instructions.packing import ExchangeBatch, PackedBatch
from trainables.training.forward import ForwardContext, Models, make_projectors, normaliser, run_terms

VOCABULARY, LENGTH = 40, 32
SIZES = ((3, 5), (7, 2), (2, 9), (12, 6), (1, 1))  # tokens of each prompt and reply; the first three share a row
TERMS: dict[str, dict[str, Any]] = {
    "states": {"kind": "hidden_mse", "layers": "uniform"},
    "projected": {"kind": "hidden_mse", "layers": "uniform", "projector": True},
    "first": {"kind": "hidden_mse", "layers": "uniform", "positions": "first", "normalise": True},
    "cosine": {"kind": "hidden_cosine"},
    "attention": {"kind": "attention_mse"},
    "relations": {"kind": "relation_kl", "heads": 4},
}


def nets(family: str) -> dict[str, Any]:
    torch.manual_seed(0)
    made = {}
    for name, layers in (("teacher", 4), ("student", 2)):
        if family == "gpt2":
            shape: Any = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0)  # fmt: skip
        else:
            shape = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32)  # fmt: skip
        made[name] = AutoModelForCausalLM.from_config(shape).double().eval()
    return made


def exchanges(*, is_packed: bool = True) -> ExchangeBatch:
    draw = np.random.default_rng(0)
    prompts, replies = zip(*([draw.integers(1, VOCABULARY, n).astype(np.int32) for n in sizes] for sizes in SIZES), strict=True)  # fmt: skip
    return ExchangeBatch(prompts, replies, LENGTH, 0, is_packed)


def summed(models: Models, term: Term, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The sum of a term over a batch, and the gradient of the student's weights."""
    context = ForwardContext("cpu", nullcontext, lambda model, stream: 0)
    loss, sums = run_terms(models, {"t": term}, {"main": batch}, {"t": 1.0}, context=context)
    net = models.nets["student"]
    net.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return sums["t"], torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("family", "kind"), [(f, kind) for f in ("gpt2", "llama") for kind in TERMS if (f, kind) != ("llama", "attention")]
)
def test_a_term_on_packed_exchanges_is_the_sum_over_each_alone(family: str, kind: str) -> None:
    term = TypeAdapter(Term).validate_python({"from": "teacher", "to": "student", **TERMS[kind]})
    made, whole = nets(family), exchanges()
    projectors = make_projectors({"t": term}, made, seed=0, phase="distil")
    for projector in projectors.values():
        projector.double()
    heads = {name: None for name in made}
    models = Models(made, frozenset({"student"}), heads, projectors=projectors)
    packed = whole.to("cpu")
    assert len(packed.ids_BT) < len(whole)  # rows are shared
    value, gradient = summed(models, term, packed)
    alone = [summed(models, term, whole.rows(i, i + 1).to("cpu")) for i in range(len(whole))]
    torch.testing.assert_close(value, torch.stack([each for each, _ in alone]).sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, torch.stack([each for _, each in alone]).sum(0), rtol=1e-7, atol=1e-10)
    own_rows = summed(models, term, exchanges(is_packed=False).to("cpu"))
    torch.testing.assert_close(own_rows, (value, gradient), rtol=1e-7, atol=1e-10)
    assert value > 0 and gradient.abs().max() > 0
    tokens, count = sum(map(sum, SIZES)), len(SIZES)
    assert normaliser(term, whole) == (count if kind == "first" else tokens)


@pytest.mark.parametrize("projector", [False, True])
def test_deep_layers_of_a_model_teach_its_own_shallow_ones(projector: bool) -> None:
    """Compared with hidden states as transformers gives them: the gradient reaches the shallow layer alone."""
    value = {"kind": "hidden_mse", "from": "student", "to": "student", "layers": [[2, 1]], "projector": projector}
    term, net = TypeAdapter(Term).validate_python(value), nets("gpt2")["student"]
    assert term.reads == ("student",)
    projectors = make_projectors({"t": term}, {"student": net}, seed=0, phase="p")
    for made in projectors.values():
        made.double()
    models = Models({"student": net}, frozenset({"student"}), {"student": None}, projectors=projectors)
    batch = exchanges(is_packed=False).to("cpu")
    found, slopes = summed(models, term, batch)
    net.zero_grad()
    expected = torch.zeros((), dtype=torch.float64)
    for row, sizes in enumerate(SIZES):
        states = net(input_ids=batch.ids_BT[row : row + 1, : sum(sizes)], output_hidden_states=True).hidden_states
        shallow = states[1] if not projector else states[1] @ projectors["t"].weights_LED[0].T
        expected = expected + (shallow - states[2].detach()).square().mean(-1).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
    theirs = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(slopes, theirs, rtol=1e-8, atol=1e-11)
    assert all(p.grad is None for p in net.transformer.h[1].parameters())


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "hidden_mse", "layers": "uniform"},
        {"kind": "hidden_mse", "layers": [[2, 1], [1, 1]]},
        {"kind": "hidden_cosine"},
        {"kind": "forward_kl", "tau_squared": False},
        {"kind": "hidden_mse", "layers": [[2, 1]], "weight": {"kind": "off_when_better", "weight": 1}},
    ],
)
def test_a_flow_within_a_model_needs_different_layers(value: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"to itself; expected hidden_mse with pairs|here `from` is `to`"):
        TypeAdapter(Term).validate_python({"from": "student", "to": "student", **value})
