"""Our losses against those of other libraries on the same tensors: transformers' own, and TRL's.

What other libraries return is a mean over something; ours is a sum, so each comparison says what was divided by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from trainables.config.terms import Term
from trainables.losses.hidden import scores
from trainables.losses.logits import cross_entropy
from trainables.losses.terms import divergence

B, T, VOCABULARY = 4, 12, 40
MASK_BT = (torch.arange(T) < torch.tensor([12, 9, 5, 2])[:, None]).long()

Net = Any


def bert() -> Net:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            attn_implementation="eager",
        )
    )


def modernbert() -> Net:
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            attn_implementation="eager",
            **ids,
        )
    )


def gpt2() -> Net:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def ready(make: Callable[[], Net]) -> Net:
    torch.manual_seed(0)
    return make().double().eval()


def some_ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(0))


def gradients(net: Net, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("make", [bert, modernbert])
def test_the_hard_loss_of_an_encoder_is_transformers_masked_lm_loss(make: Callable[[], Net]) -> None:
    """Theirs: a mean over labels other than -100."""
    net, ids_BT = ready(make), some_ids()
    at_BT = (torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.4) & MASK_BT.bool()
    labels_BT = torch.randint(0, VOCABULARY, (B, T)).masked_fill(~at_BT, -100)
    num = int(at_BT.sum())
    assert 1 < num < B * T
    output = net(input_ids=ids_BT, attention_mask=MASK_BT, labels=labels_BT)
    ours = cross_entropy(output.logits[at_BT], labels_BT[at_BT])
    assert output.loss.item() * num == pytest.approx(ours.item(), rel=1e-6)  # theirs is made in fp32

    theirs = gradients(net, output.loss * num)
    again = net(input_ids=ids_BT, attention_mask=MASK_BT).logits
    torch.testing.assert_close(
        gradients(net, cross_entropy(again[at_BT], labels_BT[at_BT])), theirs, rtol=1e-4, atol=1e-6
    )
    assert len(theirs) > 10


@pytest.mark.parametrize("num_items", [None, 100])
def test_the_hard_loss_of_a_decoder_is_transformers_causal_lm_loss(num_items: int | None) -> None:
    """Theirs: labels stand where their token stands and are shifted inside. A mean over those other than -100, or, as
    its trainer calls it, a sum over so many items of the global batch: which is how the loop here divides."""
    net, ids_BT = ready(gpt2), some_ids()
    labels_BT = ids_BT.masked_fill(MASK_BT == 0, -100)
    labels_BT[:, :2] = -100  # a prompt
    at_BT = torch.zeros(B, T, dtype=torch.bool)
    at_BT[:, :-1] = labels_BT[:, 1:] != -100  # logits at the position before the label
    num = num_items or int(at_BT.sum())
    more = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    output = net(input_ids=ids_BT, attention_mask=MASK_BT, labels=labels_BT, **more)
    ours = cross_entropy(output.logits[at_BT], labels_BT[labels_BT != -100])
    assert output.loss.item() * num == pytest.approx(ours.item(), rel=1e-6)


def test_scores_are_what_an_encoder_of_transformers_attends_by() -> None:
    """The softmax of our scores over the tokens of a row are its attention weights, in each layer."""
    net, seen = ready(bert), dict[str, Tensor]()
    for name, module in net.named_modules():
        if name.endswith(("attention.self.query", "attention.self.key")):
            module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    output = net(input_ids=some_ids(), attention_mask=MASK_BT, output_attentions=True)
    assert len(seen) == 4
    for layer, weights_BHTT in enumerate(output.attentions):
        at = f"bert.encoder.layer.{layer}.attention.self"
        found = scores(seen[f"{at}.query"], seen[f"{at}.key"], 2)
        masked = found.masked_fill(MASK_BT[:, None, None] == 0, -torch.inf).softmax(-1)
        torch.testing.assert_close(masked, weights_BHTT.double(), rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------------ TRL

# How the conventions map (TRL 1.16, `trl.experimental.gkd`):
#
#   theirs                                       ours
#   teacher_logits, student_logits               from, to; theirs leaves detaching the teacher to the caller
#   0 < beta < 1                                 jsd, same beta: the weight of the teacher, in the mixture and outside
#   beta = 0                                     forward_kl: a jump, for the jsd itself vanishes there
#   beta = 1                                     reverse_kl: the same
#   temperature                                  temperature, tau_squared: false (theirs never multiplies by its square)
#   reduction "sum"                              ours as it is, at positions whose label is not -100
#   "batchmean" with labels                      ours over the number of those positions
#   "batchmean" without labels                   ours over the number of *sequences*
#   "mean"                                       ours over positions x vocabulary
#   num_items_in_batch                           ours over that number: what the loop here does

Theirs = Callable[..., Tensor]


@pytest.fixture
def jsd_of_trl(monkeypatch: pytest.MonkeyPatch) -> Theirs:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip(
        "trl.experimental.gkd", reason="TRL with its GKD trainer is not installed: see pyproject.toml"
    )
    return gkd.GKDTrainer.generalized_jsd_loss  # type: ignore[no-any-return]


def flow(kind: str, **more: Any) -> Term:
    value = {"kind": kind, "from": "teacher", "to": "student", "tau_squared": False, **more}
    return TypeAdapter(Term).validate_python(value)  # type: ignore[no-any-return]


def some_logits(seed: int) -> Tensor:
    return 3 * torch.randn(B, T, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS_BT = torch.ones(B, T, dtype=torch.int64).masked_fill(MASK_BT == 0, -100)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "more", "beta"),
    [
        ("forward_kl", {}, 0),
        ("reverse_kl", {}, 1),
        ("jsd", {}, 0.5),
        ("jsd", {"beta": 0.1}, 0.1),
        ("jsd", {"beta": 0.9}, 0.9),
    ],
)
def test_divergences_are_trls_by_value_and_by_gradient(
    jsd_of_trl: Theirs, kind: str, more: dict[str, float], beta: float, temperature: float
) -> None:
    teacher, student = some_logits(0).requires_grad_(), some_logits(1).requires_grad_()
    ours = divergence(flow(kind, temperature=temperature, **more), teacher[LABELS_BT == 1], student[LABELS_BT == 1])
    theirs = jsd_of_trl(
        student, teacher.detach(), labels=LABELS_BT, beta=beta, temperature=temperature, reduction="sum"
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    (our_gradient,) = torch.autograd.grad(ours, student)
    (their_gradient,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-9, atol=1e-12)
    assert our_gradient.abs().max() > 1e-3


def test_jeffreys_is_the_mean_of_trls_two_ends(jsd_of_trl: Theirs) -> None:
    teacher, student = some_logits(0), some_logits(1)
    ends = [jsd_of_trl(student, teacher, labels=LABELS_BT, beta=beta, reduction="sum").item() for beta in (0, 1)]
    ours = divergence(flow("jeffreys"), teacher[LABELS_BT == 1], student[LABELS_BT == 1]).item()
    assert ours == pytest.approx(sum(ends) / 2, rel=1e-12)


def test_what_trl_divides_by(jsd_of_trl: Theirs) -> None:
    teacher, student = some_logits(0), some_logits(1)
    at = divergence(flow("jsd"), teacher[LABELS_BT == 1], student[LABELS_BT == 1]).item()
    everywhere = divergence(flow("jsd"), teacher.flatten(0, 1), student.flatten(0, 1)).item()
    num = int((LABELS_BT == 1).sum())
    assert jsd_of_trl(student, teacher, labels=LABELS_BT).item() == pytest.approx(at / num)
    assert jsd_of_trl(student, teacher, labels=LABELS_BT, num_items_in_batch=77).item() == pytest.approx(at / 77)
    assert jsd_of_trl(student, teacher).item() == pytest.approx(everywhere / B)
    mean = jsd_of_trl(student, teacher, labels=LABELS_BT, reduction="mean").item()
    assert mean == pytest.approx(at / num / VOCABULARY)
