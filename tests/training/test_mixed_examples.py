"""Mixed examples: the draw, the mixture in the embeddings, the split of hard terms, and a phase that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.support.specs import DATA
from tests.support.trials import Lab, Listener, Stopped, close_numbers, flow, hard, model, phase, same_numbers
from trainables.config.errors import ModelError
from trainables.config.models import Model
from trainables.config.terms import Term
from trainables.config.trial import TrialSpec
from trainables.data.classification.mixing import mixed
from trainables.data.classification.tasks import TaskBatch
from trainables.losses.chunked import LogitSource, chunked_terms
from trainables.models import build
from trainables.models.output_head import class_logits

LENGTHS = [3, 6, 4, 5]


def batch() -> TaskBatch:
    mask_BT = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    ids_BT = torch.randint(5, 40, (4, 6), generator=torch.Generator().manual_seed(1)) * mask_BT
    types_BT = mask_BT * (torch.arange(6) >= 2)
    return TaskBatch(ids_BT, mask_BT, types_BT, torch.tensor([0, 1, 2, 1]))


def test_each_example_has_a_partner_of_the_batch_and_a_share() -> None:
    plain, read = batch(), mixed(batch(), 0.4, seed=3)
    assert read.partners is not None
    partner = [plain.ids_BT.tolist().index(row) for row in read.partners.ids_BT.tolist()]
    assert sorted(partner) == [0, 1, 2, 3]
    assert read.partners.labels_N.tolist() == [plain.labels_N[other].item() for other in partner]
    assert read.mask_BT.sum(1).tolist() == [max(LENGTHS[i], LENGTHS[j]) for i, j in enumerate(partner)]
    assert torch.equal(read.ids_BT, plain.ids_BT) and torch.equal(read.labels_N, plain.labels_N)
    for row in range(4):  # a part has what the whole has, without columns that it does not use
        part = read.rows(row, row + 1)
        length = int(read.mask_BT[row].sum())
        assert part.partners is not None and part.ids_BT.shape == part.partners.ids_BT.shape == (1, length)
        assert torch.equal(part.partners.ids_BT[0], read.partners.ids_BT[row, :length])
    again, other = mixed(batch(), 0.4, seed=3), mixed(batch(), 0.4, seed=4)
    assert again.partners is not None and other.partners is not None
    assert torch.equal(again.partners.shares_N, read.partners.shares_N)
    assert not torch.equal(other.partners.shares_N, read.partners.shares_N)


def test_shares_are_those_of_a_beta_distribution() -> None:
    many = TaskBatch(*(torch.zeros(20_000, 1, dtype=torch.long),) * 2, None, torch.zeros(20_000, dtype=torch.long))
    for alpha in (0.4, 2.0):
        read = mixed(many, alpha, seed=0)
        assert read.partners is not None
        shares_N = read.partners.shares_N.double()
        assert shares_N.mean().item() == pytest.approx(0.5, abs=0.01)
        assert shares_N.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_a_mixture_is_one_of_word_embeddings_and_a_share_of_one_changes_nothing() -> None:
    small = TypeAdapter(Model).validate_python(model())
    net = build.build(
        small, vocab_size=64, length=8, num_labels=3, name="m", seed=0, special_ids={}, class_names=()
    ).eval()
    read = mixed(batch(), 0.4, seed=3)
    assert read.partners is not None and read.types_BT is not None
    of = (read.ids_BT, read.mask_BT, read.types_BT)
    with torch.no_grad():
        ours_BC = class_logits(net, *of, mixed_with=(read.partners.ids_BT, read.partners.shares_N))
        table_VD = net.get_input_embeddings().weight
        share_B11 = read.partners.shares_N[:, None, None]
        embeds_BTD = share_B11 * table_VD[read.ids_BT] + (1 - share_B11) * table_VD[read.partners.ids_BT]
        theirs_BC = net(inputs_embeds=embeds_BTD, attention_mask=read.mask_BT, token_type_ids=read.types_BT).logits
        torch.testing.assert_close(ours_BC, theirs_BC, rtol=1e-5, atol=1e-6)
        alone_BC = class_logits(net, *of, mixed_with=(read.partners.ids_BT, torch.ones(4)))
        torch.testing.assert_close(alone_BC, class_logits(net, *of), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_number", [False, True])
def test_a_hard_term_is_split_between_both_labels(is_number: bool) -> None:
    columns = 1 if is_number else 3
    draws = np.random.default_rng(0)
    values = draws.normal(size=(5, columns))
    labels = [draws.normal(size=5), draws.normal(size=5)] if is_number else [draws.integers(0, 3, 5) for _ in range(2)]
    shares = draws.uniform(size=5)
    expected = 0.0
    for row in range(5):
        for found, share in ((labels[0][row], shares[row]), (labels[1][row], 1 - shares[row])):
            log_z = np.log(np.exp(values[row]).sum())
            loss = (values[row, 0] - found) ** 2 if is_number else log_z - values[row, int(found)]
            expected += share * loss
    to_NV, (first_N, second_N) = torch.tensor(values, requires_grad=True), map(torch.tensor, labels)
    term = TypeAdapter(Term).validate_python(hard("student"))
    fused = chunked_terms(
        {"student": LogitSource(to_NV)},
        first_N,
        {"h": term},
        {"h": 1.0},
        chunk=2,
        second=(second_N, torch.tensor(shares)),
    )
    assert fused.loss.item() == pytest.approx(expected, rel=1e-12)
    fused.loss.backward()  # type: ignore[no-untyped-call]
    if not is_number:
        target = np.zeros((5, 3))
        for row in range(5):
            target[row, labels[0][row]] += shares[row]
            target[row, labels[1][row]] += 1 - shares[row]
        slopes = np.exp(values) / np.exp(values).sum(1, keepdims=True) - target
        torch.testing.assert_close(to_NV.grad, torch.tensor(slopes), rtol=1e-10, atol=1e-12)


def mixing(**more: Any) -> dict[str, Any]:
    terms = {
        "hard": hard("student"),
        "mixed_hard": hard("student", on="mixed"),
        "mixed_soft": flow("teacher", "student", on="mixed", temperature=2),
    }
    streams = {"main": {"data": "pair"}, "mixed": {"data": "pair", "mix": {"alpha": 0.4}}}
    return {
        "models": {"teacher": model(layers=2), "student": model(**more)},
        "phases": {
            "teach": phase("teacher", {"h": hard("teacher")}, streams={"main": {"data": "pair"}}),
            "distil": phase("student", terms, streams=streams),
        },
    }


def test_parts_of_a_batch_and_a_stop_change_no_number(new_task_lab: Callable[[], Lab]) -> None:
    whole, parts, stopped = new_task_lab(), new_task_lab(), new_task_lab()
    expected = whole.run(whole.spec(mixing()))
    close_numbers(parts.run(parts.spec(mixing()), micro_batch=3), expected, rtol=2e-5)
    with pytest.raises(Stopped):
        stopped.run(stopped.spec(mixing()), session=Listener(("distil", 0.5)), checkpoint_at_reports=True)
    same_numbers(stopped.run(stopped.spec(mixing()), attempt=2), expected)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(new_task_lab: Callable[[], Lab]) -> None:
    from tests.support.ranks import run_on_ranks

    whole, lab = new_task_lab(), new_task_lab()
    expected, ran = whole.run(whole.spec(mixing())), run_on_ranks(lab, lab.spec(mixing()), 2)
    theirs = expected.weights("distil", "student")
    for key, tensor in ran.weights("distil", "student").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=2e-3, atol=2e-4)


def test_a_decoder_cannot_read_a_mixture(new_task_lab: Callable[[], Lab]) -> None:
    lab = new_task_lab()
    with pytest.raises(ModelError, match="mixed examples are for encoders"):
        lab.run(lab.spec(mixing(family="gpt2")))


@pytest.mark.parametrize(
    ("streams", "terms", "message"),
    [
        ({"main": {"data": "corpus", "mix": {}}}, {"h": hard("student")}, "mixed examples are for tasks, and corpus is a corpus"),
        ({"main": {"data": "topic", "mix": {}}}, {"h": hard("student", unit_weights={"kind": "revision", "by": "teacher"})}, "which mixed examples have two of"),
    ],
)  # fmt: skip
def test_mixtures_without_meaning_are_refused(streams: Any, terms: Any, message: str) -> None:
    data = {"corpus": DATA["python_docs"], "topic": {"kind": "python_task", "task": "topic"}}
    trial = {
        "models": {"teacher": model(), "student": model()},
        "phases": {"p": phase("student", terms, streams=streams)},
    }
    with pytest.raises(ValidationError, match=message):
        TrialSpec.model_validate({"data": data, **trial})
