"""Linear layers in 4 or 8 bits: what they compute, what they weigh, and which phase keeps a model so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, LlamaConfig

from orchestrator.planning.meta_models import Shapes
from tests.support.trials import Lab, distillation, model
from trainables.config.errors import ModelError
from trainables.config.models import Model
from trainables.config.trial import trial_id
from trainables.evaluation.model_size import flops_per_token
from trainables.models import quantise
from trainables.training.phase_graph import phase_key, phase_runs

SHAPES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2)),
    "llama": lambda: AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    ),
}


@pytest.fixture(params=["nf4", "int8"])
def kind(request: pytest.FixtureRequest) -> Any:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes", reason="the extra `eightbit` is not installed")
    return request.param


def made(family: str) -> Any:
    torch.manual_seed(0)
    return SHAPES[family]().eval()


def ids() -> Tensor:
    return torch.arange(3 * 20).reshape(3, 20) % 96


@pytest.mark.parametrize("family", SHAPES)
def test_outputs_are_those_of_the_weights_as_they_are_kept(family: str, kind: Any) -> None:
    plain, kept = made(family), quantise.quantise(made(family), kind, "cpu")
    layers = {path: m for path, m in kept.named_modules() if isinstance(m, quantise.Quantised)}
    assert len(layers) == {"gpt2": 8, "llama": 14, "bert": 12}[family]  # those below the head
    errors = []
    for path, layer in layers.items():
        own = plain.get_submodule(path)
        weight_OI = own.weight.T if family == "gpt2" else own.weight
        errors.append(((layer.weight - weight_OI).square().sum() / weight_OI.square().sum()).sqrt())
        with torch.no_grad():
            own.weight.copy_(layer.weight.T if family == "gpt2" else layer.weight)
    # the error of a normal number: a uniform step of range / 127 in int8 (rows of 64: about 2.5 sigma), .092 in NormalFloat-4
    assert 0.003 < max(errors) < (0.12 if kind == "nf4" else 0.01)
    with torch.no_grad():
        torch.testing.assert_close(kept(ids()).logits, plain(ids()).logits, rtol=1e-5, atol=1e-6)
    assert flops_per_token(kept, length=20, device="cpu") == flops_per_token(plain, length=20, device="cpu")


@pytest.mark.parametrize("family", SHAPES)
def test_the_plan_counts_the_bytes_that_are_kept(family: str, kind: Any) -> None:
    expected, kept = quantise.num_bytes(made(family), kind), quantise.quantise(made(family), kind, "cpu")
    found = sum(p.numel() * p.itemsize for p in kept.parameters())
    for layer in (m for m in kept.modules() if isinstance(m, quantise.Quantised)):
        scales = layer.state if kind == "int8" else (layer.state.absmax, layer.state.state2.absmax)
        found += sum(t.numel() * t.itemsize for t in (layer.packed, *(scales if kind == "nf4" else (scales,))))
    assert found == expected < 0.6 * sum(p.numel() * p.itemsize for p in made(family).parameters())
    shapes = Shapes(vocab_size=500, special_ids={"pad_token_id": 0})
    value = {"family": "llama", "layers": 2, "width": 64}
    one, other = (Model.model_validate(more) for more in (value, {**value, "quantize": kind}))
    assert shapes.num_bytes(other, 32) == shapes.num_bytes_held(one, 32) > 1.5 * shapes.num_bytes_held(other, 32)


def quantised(spec: dict[str, Any], kind: str | None) -> dict[str, Any]:
    spec["models"]["teacher"] |= {"quantize": kind} if kind is not None else {}
    return spec


def test_a_teacher_is_plain_where_it_learns_and_quantised_where_it_teaches(lab: Lab) -> None:
    plain, kept = (lab.spec(quantised(distillation(), kind)) for kind in (None, "int8"))
    first, second = lab.run(plain, trial="plain"), lab.run(kept, trial="kept")
    assert first.phases["teach"]["key"] == second.phases["teach"]["key"]
    assert first.phases["distil"]["key"] != second.phases["distil"]["key"]
    (before,), (after,) = (ran.of("distil", "student", "mlm_loss")[-1:] for ran in (first, second))
    assert before != after and before == pytest.approx(after, rel=0.02)
    assert trial_id(plain, lab.fingerprints) != trial_id(kept, lab.fingerprints)


def test_types_of_pretrained_weights_tell_trials_apart(lab: Lab) -> None:
    """Ids once left out the type, so that two arms that differ by it alone shared one trial."""
    spec = lab.spec({**distillation(), "models": {"teacher": model(), "student": {"pretrained": "some/model"}}})
    prints = {**lab.fingerprints, "model:student": "0"}
    wide = trial_id(spec, prints)
    spec.models["student"] = spec.models["student"].model_copy(update={"dtype": "bf16"})
    keys = {phase_key(spec.pruned(), run, prints) for run in phase_runs(spec.pruned())}
    assert trial_id(spec, prints) != wide and len(keys) == 2


def test_a_model_that_every_phase_trains_is_never_quantised(lab: Lab) -> None:
    trial = distillation()
    trial["models"]["student"]["quantize"] = "int8"
    with pytest.raises(ValueError, match=r"models.student.quantize: weights are kept in int8 where .* remove quantize"):
        lab.spec(trial)


def test_4_bits_need_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"nf4 needs bitsandbytes: pip install 'codistill\[eightbit\]'"):
        quantise.check("nf4")
    quantise.check("int8")
