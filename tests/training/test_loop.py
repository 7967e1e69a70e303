"""Trajectories: settings that must agree do, bit by bit where nothing but bookkeeping differs.

Real trials of tiny models in this process. What a trial's numbers may not depend on: where it was interrupted, what ran
before it, what the store already had, how a batch was divided, and which other models and terms there are.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
import torch
from pydantic import TypeAdapter

from tests.support.specs import BUDGETS, DATA, INITS, SCHEDULES, TERMS
from tests.support.trials import (
    FAMILIES,
    Lab,
    Listener,
    Ran,
    Stopped,
    break_at,
    close_numbers,
    distillation,
    flow,
    hard,
    model,
    phase,
    same_numbers,
)
from trainables.config.data import Data
from trainables.config.errors import ModelError
from trainables.config.models import Depth, Model
from trainables.config.phase import Masking
from trainables.config.trial import NUMERICS, TrialSpec, trial_id
from trainables.data.prepare import prepare
from trainables.data.prepared import open_data
from trainables.data.sources import python_docs, read
from trainables.evaluation.language_modelling import evaluate_corpus
from trainables.evaluation.per_example import ROWS, Placement, Targets
from trainables.losses.logits import cross_entropy
from trainables.losses.terms import divergence
from trainables.models import build
from trainables.runtime import trial_attempt
from trainables.runtime.outcome import Outcome
from trainables.runtime.trial_attempt import Job
from trainables.training import gradients, loop
from trainables.training.streams import StreamLoader

REFERENCE = Path(__file__).parents[1] / "references" / "trajectory.json"
TO_STUDENT = "phases.distil.terms.teacher_to_student"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[Any, Any]]:
    """What trials of this test saw: `begin` (phase, model) -> weights at the start, `batch` (phase, stream, step) -> batch."""
    seen: dict[str, dict[Any, Any]] = {"begin": {}, "batch": {}}
    begin, batch = loop.begin, StreamLoader.batch

    def watch_begin(run: Any, instance: Any) -> Any:
        found = begin(run, instance)
        for name, net in found.nets.items():
            seen["begin"][str(instance), name] = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        return found

    def watch_batch(self: Any, step: int, size: int, seed: int, instance: str) -> Any:
        found = batch(self, step, size, seed, instance)
        seen["batch"][instance, self.name, step] = found
        return found

    monkeypatch.setattr(loop, "begin", watch_begin)
    monkeypatch.setattr(StreamLoader, "batch", watch_batch)
    return seen


def equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------ one step with every member of lists


def one_step(lab: Lab, changes: dict[str, Any]) -> Ran:
    """A student moves by a step, and the numbers are numbers."""
    once = {"phases.teach.budget": {"steps": 1}, "phases.distil.budget": {"steps": 1}}
    return lab.run(lab.spec(distillation(), {**once, **changes}))


@pytest.mark.parametrize("term", TERMS)
def test_every_term_trains_a_step(lab: Lab, watched: dict[str, Any], term: str) -> None:
    ran = one_step(lab, {"phases.distil.terms": {"x": {**TERMS[term], "weight": 2}}})
    assert not equal_weights(ran.weights("distil", "student"), watched["begin"]["distil", "student"])
    assert ran.of("distil", "student", "x", "train")[0] > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_a_step(lab: Lab, schedule: str) -> None:
    ran = one_step(lab, {f"{TO_STUDENT}.weight": SCHEDULES[schedule]})
    assert len(ran.of("distil", "student", "teacher_to_student", "train")) == 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_ends(lab: Lab, budget: str) -> None:
    ran = one_step(lab, {"phases.distil.budget": BUDGETS[budget], "phases.distil.batch": 40})
    step = max(r["step"] for r in ran.records if r["phase"] == "distil")
    about = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"])
    assert step == {"steps": 3, "tokens": 1, "epochs": -(-int(0.5 * len(about.train)) // 40)}[budget]
    assert ran.phases["distil"]["tokens"] == step * 40 * 32


@pytest.mark.parametrize("init", [INITS["random"], *({**INITS["remap"], "depth": d} for d in get_args(Depth))], ids=str)
def test_every_initialisation_trains_a_step(lab: Lab, watched: dict[str, Any], init: dict[str, Any]) -> None:
    adds = init.get("depth") == "identity"  # layers, to a family that can have them
    (family, num_teacher, num_student) = ("modernbert", 1, 2) if adds else ("bert", 2, 1)
    shapes = {
        f"models.{name}": model(family, layers=num)
        for name, num in (("teacher", num_teacher), ("student", num_student))
    }
    ran = one_step(lab, {**shapes, "models.student.init": init})
    start, teacher = watched["begin"]["distil", "student"], ran.weights("teach", "teacher")
    name = "model.layers.0.attn.Wqkv.weight" if adds else "bert.encoder.layer.0.attention.self.query.weight"
    copied = init["kind"] == "remap" and init["depth"] != "random"
    assert torch.equal(start[name], teacher[name]) == copied  # the trained teacher's, not the fresh one's
    word = "model.embeddings.tok_embeddings.weight" if adds else "bert.embeddings.word_embeddings.weight"
    assert torch.equal(start[word], teacher[word]) == (init["kind"] == "remap")


@pytest.mark.parametrize("kind", ["python_docs", "files", "hub"])  # tasks: test_finetune.py
def test_every_data_set_and_tokenizer_trains_a_step(
    lab: Lab, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text = Path(lab.data["corpus"]["train"]).read_text().split("\n\n")
    hub = {"train": text[:40], "validation": text[40:60]}
    load_dataset = lambda name, config, *, revision, split: datasets.Dataset.from_dict({"text": hub[split]})  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # the real documents take seconds: test_corpus.py has them
    monkeypatch.setattr(python_docs, "documents", lambda: text[60:])
    read._load.cache_clear()  # private: the cache outlives the patches
    request.addfinalizer(read._load.cache_clear)
    value = {**DATA[kind], "length": 32, "evaluate": 4}
    value |= {"train": lab.data["corpus"]["train"], "columns": {}} if kind == "files" else {}
    corpus = prepare(TypeAdapter(Data).validate_python(value), str(tmp_path / "data"))
    tokenizer = {"kind": "pretrained", "name": str(tmp_path / "data" / corpus.fingerprint / "tokenizer")}
    again = prepare(TypeAdapter(Data).validate_python({**value, "tokenizer": tokenizer}), str(tmp_path / "data"))
    for found, given in ((corpus, value), (again, {**value, "tokenizer": tokenizer})):
        there = Lab(tmp_path, {"data:corpus": found.fingerprint}, {"corpus": given})
        ran = there.run(there.spec(distillation(), {"phases.distil.budget": {"steps": 1}}), trial=found.fingerprint)
        assert len(ran.of("distil", "student", "mlm_loss")) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_is_reported_under_the_name_of_its_loss(lab: Lab, family: str) -> None:
    kind = "mlm" if build.is_masked_lm(family) else "lm"
    stream = {"main": {"corruption": None} if kind == "lm" else {}}
    spec = lab.spec(
        {
            "models": {"m": model(family, init={"kind": "random", "std": "width"})},
            "phases": {"learn": phase("m", {"h": hard("m")}, streams=stream, evaluate=[0, 1], budget={"steps": 12})},
        }
    )
    ran = lab.run(spec)
    for split in ("dev", "test"):
        before, after = ran.of("learn", "m", f"{kind}_loss", split)
        assert after < before
        assert len(ran.of("learn", "m", f"{kind}_accuracy", split)) == 2
    assert len(ran.of("learn", "m", "h", "train")) == 1


def test_a_model_that_cannot_read_its_stream_is_refused_before_any_step(lab: Lab) -> None:
    with pytest.raises(ModelError, match=r"student.*is a decoder: `corruption: null`"):
        lab.run(lab.spec(distillation(student=model("gpt2"))))


# -------------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="session")
def base(new_lab: Callable[[], Lab]) -> Ran:
    """The trial, uninterrupted, alone in its store."""
    lab = new_lab()
    return lab.run(lab.spec(distillation()))


def with_dropout(lab: Lab) -> TrialSpec:
    changes: dict[str, Any] = {f"models.{name}.dropout": 0.2 for name in ("teacher", "student")}
    changes |= {f"{TO_STUDENT}.weight": {"kind": "linear", "start": 4, "end": 1}, "phases.distil.save_at": [0.25]}
    return lab.spec(distillation(), changes)


@pytest.mark.parametrize("stop_at", [("teach", 0.25), ("distil", 0.25), ("distil", 0.75), ("distil", 1.0)])
def test_a_trial_stopped_at_a_report_goes_on_as_if_nothing_had_been(
    new_lab: Callable[[], Lab], stop_at: tuple[str, float]
) -> None:
    whole, lab = new_lab(), new_lab()
    expected = whole.run(with_dropout(whole))
    with pytest.raises(Stopped):
        lab.run(with_dropout(lab), session=Listener(stop_at), checkpoint_at_reports=True)
    kept = len(lab.records(attempt=1))
    session = Listener()
    ran = lab.run(with_dropout(lab), attempt=2, session=session)
    same_numbers(ran, expected)
    assert sum(len(records) for records in session.reports) == len(ran.records)  # an attempt tells all, once
    assert [r["t"] for r in ran.records[:kept]] == [r["t"] for r in lab.records(attempt=1)]  # and not measured anew
    for number in (1, 2):
        assert not [n for n in lab.storage.list(f"study/trials/t/attempt-{number}") if n.startswith("checkpoint")]


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_trial_that_dies_between_evaluations_goes_on_from_its_latest_checkpoint(
    new_lab: Callable[[], Lab], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lab = new_lab(), new_lab()
    expected = whole.run(with_dropout(whole))
    with monkeypatch.context() as patch:
        break_at(patch, "distil", step)
        with pytest.raises(Stopped):
            lab.run(with_dropout(lab), checkpoint_seconds=0)
    steps: list[tuple[str, int]] = []
    real = loop.step
    monkeypatch.setattr(loop, "step", lambda at: [steps.append((at.instance.phase, at.progress.step)), real(at)])
    ran = lab.run(with_dropout(lab), attempt=2)
    assert steps == [("distil", s) for s in range(step, 8)]
    same_numbers(ran, expected)


def test_a_trial_that_dies_without_a_checkpoint_begins_its_phase_again(
    lab: Lab, base: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_at(patch, "distil", 5)
        with pytest.raises(Stopped):
            lab.run(lab.spec(distillation()))
    ran = lab.run(lab.spec(distillation()), attempt=2)
    same_numbers(ran, base)
    assert not ran.phases["teach"]["reused"]  # the trial's own, from its first attempt


def test_a_damaged_checkpoint_is_passed_over_for_that_of_an_earlier_attempt(
    lab: Lab, base: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, step in ((1, 3), (2, 6)):
        with monkeypatch.context() as patch:
            break_at(patch, "distil", step)
            with pytest.raises(Stopped):
                lab.run(lab.spec(distillation()), attempt=number, checkpoint_seconds=0)
    folder = lab.root / "study/trials/t/attempt-2"
    (file,) = folder.glob("checkpoint-*.pt")
    file.write_bytes(file.read_bytes()[:-100])
    same_numbers(lab.run(lab.spec(distillation()), attempt=3), base)


# ------------------------------------------------------------------------------------------------- batches and precision


STEADY = {
    "lr": 5e-3,
    "warmup": 0.1,
    "eps": 1e-3,
}  # a large eps: Adam's step is then no jump where a gradient is nearly 0


def together(**more: Any) -> dict[str, Any]:
    """Two models that learn from the data and from each other."""
    terms = {
        "big_hard": hard("big"),
        "small_hard": hard("small"),
        "big_to_small": flow("big", "small", "jsd", beta=0.3, weight=2),
        "small_to_big": flow("small", "big", "reverse_kl", temperature=2, tau_squared=True, weight=0.5),
    }
    return {
        "models": {"big": model("modernbert", layers=2), "small": model("bert")},
        "phases": {"co": phase(("big", "small"), terms, optimizer=STEADY, **more)},
    }


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_batch_in_parts_is_the_batch_at_once(new_lab: Callable[[], Lab], micro_batch: int) -> None:
    whole, parts = new_lab(), new_lab()
    expected = whole.run(whole.spec(together()))
    ran = parts.run(parts.spec(together()), micro_batch=micro_batch)
    close_numbers(ran, expected, rtol=2e-6)
    for name in ("big", "small"):
        theirs = expected.weights("co", name)
        for key, tensor in ran.weights("co", name).items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=2e-6, msg=key)
    assert ran.phases["co"]["tokens"] == expected.phases["co"]["tokens"]
    assert ran.phases["co"]["flops"] == pytest.approx(expected.phases["co"]["flops"], rel=1e-9)


def test_when_memory_runs_out_the_micro_batch_is_halved_and_nothing_else_changes(
    new_lab: Callable[[], Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, full = new_lab(), new_lab()
    expected = small.run(small.spec(together()), micro_batch=2)
    real = gradients.run_micro_batch

    def hungry(at: Any, active: Any, parts: Any, *more: Any, **low: int) -> Any:
        found = real(at, active, parts, *more, **low)
        if len(parts["main"].ids_BT) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(gradients, "run_micro_batch", hungry)
    same_numbers(full.run(full.spec(together())), expected)


def test_bf16_runs_keeps_fp32_weights_and_differs_little(new_lab: Callable[[], Lab]) -> None:
    fp32, bf16 = new_lab(), new_lab()
    expected = fp32.run(fp32.spec(together()))
    ran = bf16.run(bf16.spec(together(), {"precision": "bf16"}))
    assert ran.values != expected.values
    close_numbers(ran, expected, rtol=0.02)
    assert {tensor.dtype for tensor in ran.weights("co", "big").values()} == {torch.float32}


# --------------------------------------------------------------------------------------------------- what is independent


def test_a_phase_from_the_store_gives_the_numbers_of_one_that_was_trained(new_lab: Callable[[], Lab]) -> None:
    fresh, shared = new_lab(), new_lab()
    other = {"phases.distil.optimizer.lr": 1e-3}
    expected = fresh.run(fresh.spec(distillation(), other))
    shared.run(shared.spec(distillation()), trial="first")
    ran = shared.run(shared.spec(distillation(), other), trial="second")
    assert ran.phases["teach"]["reused"] and not ran.phases["distil"]["reused"]
    same_numbers(ran, expected)
    again = shared.run(shared.spec(distillation(), other), trial="third")
    assert all(p["reused"] for p in again.phases.values())
    same_numbers(again, expected)
    cost = ("flops", "seconds", "device_seconds", "tokens")  # as recorded, never that of a look into the store
    assert [again.phases["distil"][c] for c in cost] == [ran.phases["distil"][c] for c in cost]


def test_one_teacher_serves_all_seeds_where_its_seed_is_shared(lab: Lab) -> None:
    runs = [
        lab.run(lab.spec(distillation(), {"seed": seed, "phases.teach.seed": "shared"}), trial=str(seed))
        for seed in (1, 2)
    ]
    assert [ran.phases["teach"]["reused"] for ran in runs] == [False, True]
    assert runs[0].of("teach", "teacher", "mlm_loss") == runs[1].of("teach", "teacher", "mlm_loss")
    assert runs[0].of("distil", "student", "mlm_loss") != runs[1].of("distil", "student", "mlm_loss")


def test_a_term_of_weight_zero_is_no_term(new_lab: Callable[[], Lab]) -> None:
    off, none = new_lab(), new_lab()
    ablation = off.spec(distillation(), {f"{TO_STUDENT}.weight": 0})
    plain = distillation()
    del plain["models"]["teacher"], plain["phases"]["teach"], plain["phases"]["distil"]["terms"]["teacher_to_student"]
    spec = none.spec(plain)
    assert trial_id(ablation, off.fingerprints) == trial_id(spec, none.fingerprints)
    ran = off.run(ablation)
    assert list(ran.phases) == ["distil"]
    same_numbers(ran, none.run(spec))


def test_another_model_term_or_stream_changes_no_draw_of_the_others(
    new_lab: Callable[[], Lab], watched: dict[str, dict[Any, Any]]
) -> None:
    arms: dict[str, dict[str, Any]] = {
        "alone": {f"{TO_STUDENT}.weight": 0},
        "taught": {},
        "by a bigger one": {"models.teacher.width": 32, "models.teacher.family": "modernbert"},
        "with a third": {
            "models.third": model("bert", width=8),
            "phases.distil.train": {"third": "full", "student": "full"},
            "phases.distil.terms.third_hard": hard("third"),
            "phases.distil.terms.third_to_student": flow("third", "student"),
        },
        "on two streams": {
            "phases.distil.streams": {"side": {"data": "other"}, "main": {}},
            "phases.distil.terms.side_hard": hard("student", on="side"),
        },
    }
    found = {}
    for name, changes in arms.items():
        lab = new_lab()
        watched["begin"].clear(), watched["batch"].clear()
        lab.run(lab.spec(distillation(), {"models.student.dropout": 0.2, **changes}))
        start = watched["begin"]["distil", "student"]
        found[name] = (
            start,
            {s: b for (at, stream, s), b in watched["batch"].items() if (at, stream) == ("distil", "main")},
        )
    alone, batches = found["alone"]
    assert len(batches) == 8
    for name, (start, seen) in found.items():
        assert equal_weights(start, alone), name
        for step, batch in batches.items():
            assert all(torch.equal(a, b) for a, b in zip(batch, seen[step], strict=True)), (name, step)


def test_two_streams_over_one_data_set_are_evaluated_once(new_lab: Callable[[], Lab]) -> None:
    """As where a hard term reads the data's labels and a soft one generated replies of the same prompts."""
    lab, trial = new_lab(), distillation()
    phase = trial["phases"]["distil"]
    phase["streams"] = {"main": {"data": "corpus"}, "side": {"data": "corpus"}}
    phase["terms"]["side_hard"] = {**hard("student", on="side"), "weight": {"kind": "linear", "start": 1, "end": 0}}
    phase["terms"]["soft"] = {
        **flow("teacher", "student", on="side"),
        "weight": {"kind": "off_when_better", "weight": 1},
    }
    ran = lab.run(lab.spec(trial))
    at_end = [r for r in ran.records if r["phase"] == "distil" and r["split"] in ("dev", "test") and r["progress"] == 1]
    keys = [(r["model"], r["task"], r["split"], r["metric"]) for r in at_end]
    assert keys and len(keys) == len(set(keys))
    examples = lab.store.examples(ran.phases["distil"]["key"])
    assert len(examples) and not examples.duplicated(["model", "task", "split", "example"]).any()


def test_a_bystander_changes_no_number_of_a_model_with_dropout(new_lab: Callable[[], Lab]) -> None:
    """Two models side by side without a flow between them: each learns as it would alone, dropout draws included."""
    values = {}
    for names in (("a",), ("b", "a")):
        lab = new_lab()
        shapes = {name: model(dropout=0.2, layers=2 if name == "b" else 1) for name in names}
        spec = lab.spec({"models": shapes, "phases": {"p": phase(names, {f"{n}_hard": hard(n) for n in names})}})
        values[names] = {key: value for key, value in lab.run(spec).values.items() if key[1] == "a"}
    assert values["a",] == values["b", "a"]


def test_a_trial_has_the_same_numbers_as_the_first_and_as_the_third_of_a_process(
    new_lab: Callable[[], Lab], base: Ran
) -> None:
    other, lab = new_lab(), new_lab()
    other.run(other.spec(together(budget={"steps": 1}), {"precision": "bf16", "seed": 7}), threads=2)
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        same_numbers(lab.run(lab.spec(distillation())), base)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)


def test_seeds_differ(new_lab: Callable[[], Lab], base: Ran) -> None:
    lab = new_lab()
    other = lab.run(lab.spec(distillation(), {"seed": 1}))
    assert other.values.keys() == base.values.keys() and other.values != base.values


# -------------------------------------------------------------------------------------------- gradients, and what moves


def test_the_gradient_of_each_flow_reaches_only_its_target(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Co-training's gradients are those of each model learning alone from the other's logits as constants."""
    seen: dict[str, Any] = {}
    real = gradients.backward

    def watch(at: Any, terms: Any, weights: Any, batches: Any) -> Any:
        nets = {name: {k: t.clone() for k, t in net.state_dict().items()} for name, net in at.nets.items()}
        sums = real(at, terms, weights, batches)
        grads = {n: {k: p.grad.clone() for k, p in net.named_parameters()} for n, net in at.nets.items()}
        seen.update(nets=nets, grads=grads, batch=batches["main"], at_step=at.nets, sums=sums)
        return sums

    spec = lab.spec(together(budget={"steps": 3}))
    monkeypatch.setattr(gradients, "backward", watch)
    lab.run(spec)
    terms, batch = spec.phases["co"].terms, seen["batch"]
    nets = {}
    for name, net in seen["at_step"].items():
        nets[name] = build.restore(build.plain_config(net.config), seen["nets"][name])
    logits = {n: net(input_ids=batch.ids_BT).logits.flatten(0, 1)[batch.positions_N] for n, net in nets.items()}
    for to, source, name in (("small", "big", "big_to_small"), ("big", "small", "small_to_big")):
        soft = divergence(terms[name], logits[source].detach(), logits[to])  # type: ignore[arg-type]
        hard_loss = cross_entropy(logits[to], batch.labels_N)
        ((hard_loss + terms[name].weight.value_at(0) * soft) / len(batch.labels_N)).backward()  # type: ignore[arg-type, no-untyped-call]
        for key, parameter in nets[to].named_parameters():
            torch.testing.assert_close(seen["grads"][to][key], parameter.grad, rtol=1e-4, atol=1e-6, msg=key)
        assert seen["sums"][name].item() == pytest.approx(soft.item(), rel=1e-5)
        assert not seen["sums"][name].requires_grad


def test_frozen_models_stay_in_eval_mode_and_trained_ones_are_in_train_mode(
    lab: Lab, watched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, modes, ends = loop.step, set(), {}

    def watch(at: Any) -> None:
        real(at)
        for name, net in at.nets.items():
            trained = any(p.requires_grad for p in net.parameters())
            modes.add((at.instance.phase, name, {m.training for m in net.modules()} == {True}, net.training, trained))
            ends[at.instance.phase, name] = {key: tensor.clone() for key, tensor in net.state_dict().items()}

    monkeypatch.setattr(loop, "step", watch)
    dropout = {"models.teacher.dropout": 0.3, "models.student.dropout": 0.3}
    ran = lab.run(lab.spec(distillation(), dropout))  # evaluated in between, which must leave no trace
    assert modes == {
        ("teach", "teacher", True, True, True),
        ("distil", "teacher", False, False, False),
        ("distil", "student", True, True, True),
    }
    assert equal_weights(ends["distil", "teacher"], watched["begin"]["distil", "teacher"])
    assert equal_weights(ran.weights("teach", "teacher"), {
        k: t for k, t in watched["begin"]["distil", "teacher"].items() if k in ran.weights("teach", "teacher")
    })  # fmt: skip
    start, end = watched["begin"]["distil", "student"], ends["distil", "student"]
    assert all(not torch.equal(start[key], end[key]) for key in start)
    published = lab.store.find(ran.phases["distil"]["key"])
    assert published is not None and set(published.files) == set(published.configs) == {"student"}


def test_a_models_own_learning_rate_is_used_and_a_models_own_gradient_is_clipped(new_lab: Callable[[], Lab]) -> None:
    """Side by side, each model's step is the one that it would make alone: nothing is joint."""
    rules = {
        "a": {"lr": 1e-3, "max_grad_norm": 0.01, "weight_decay": 0.5, "eps": 1e-3},
        "b": {"lr": 1e-2, "max_grad_norm": None, "eps": 1e-3},
    }
    found: dict[Any, Any] = {}
    for names in (("a",), ("b",), ("a", "b")):
        lab = new_lab()
        terms = {f"{n}_hard": hard(n) for n in names}
        phases = {"p": phase(names, terms, optimizer={n: rules[n] for n in names})}
        ran = lab.run(lab.spec({"models": {n: model() for n in names}, "phases": phases}))
        found |= {(names, n): ran.weights("p", n) for n in names}
    for name in ("a", "b"):
        assert equal_weights(found[("a", "b"), name], found[(name,), name])


def test_a_step_at_which_every_weight_is_zero_changes_nothing_and_breaks_nothing(
    lab: Lab, watched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    after: list[Any] = []
    real = loop.step
    monkeypatch.setattr(loop, "step", lambda at: [real(at), after.append(at.nets["teacher"].state_dict()["cls.predictions.bias"].clone())])  # fmt: skip
    rising = {"kind": "step", "start": 0, "end": 1, "at": 0.5}
    trial = {
        "models": {"teacher": model()},
        "phases": {"teach": phase("teacher", {"h": hard("teacher", weight=rising)})},
    }
    ran = lab.run(lab.spec(trial))
    start = watched["begin"]["teach", "teacher"]["cls.predictions.bias"]
    assert [torch.equal(bias, start) for bias in after] == [True] * 4 + [False] * 4
    assert ran.phases["teach"]["tokens"] == 4 * 8 * 32


# ----------------------------------------------------------------------------------------------------------- off-switch


def switching(lab: Lab, *, teacher_steps: int) -> TrialSpec:
    changes = {
        f"{TO_STUDENT}.weight": {"kind": "off_when_better", "weight": 2},
        "phases.teach.budget": {"steps": teacher_steps},
        "phases.teach.optimizer.lr": 1e-5 if teacher_steps == 1 else 2e-2,
        "phases.distil.budget": {"steps": 12},
    }
    return lab.spec(distillation(), changes)


def test_the_off_switch_stays_on_while_the_teacher_is_better(lab: Lab) -> None:
    ran = lab.run(switching(lab, teacher_steps=30))
    assert min(ran.of("distil", "student", "mlm_loss")) > ran.of("teach", "teacher", "mlm_loss")[-1]
    assert len(ran.of("distil", "student", "teacher_to_student", "train")) == 4


def test_the_off_switch_latches_saves_the_teachers_pass_and_survives_a_resume(new_lab: Callable[[], Lab]) -> None:
    whole, lab = new_lab(), new_lab()
    expected = whole.run(switching(whole, teacher_steps=1))
    assert len(expected.of("distil", "student", "teacher_to_student", "train")) == 1  # until the first look
    always = new_lab()
    steady = always.run(always.spec(distillation(), {"phases.distil.budget": {"steps": 12}}))
    assert expected.phases["distil"]["flops"] < 0.9 * steady.phases["distil"]["flops"]
    with pytest.raises(Stopped):
        lab.run(switching(lab, teacher_steps=1), session=Listener(("distil", 0.5)), checkpoint_at_reports=True)
    same_numbers(lab.run(switching(lab, teacher_steps=1), attempt=2), expected)


def test_a_student_that_learns_only_from_a_switched_off_flow_stands_still(lab: Lab) -> None:
    only = {"f": flow("teacher", "student", weight={"kind": "off_when_better", "weight": 1})}
    trial = switching(lab, teacher_steps=1).model_dump(mode="json")
    ran = lab.run(lab.spec(trial, {"phases.distil.terms": only, "phases.distil.evaluate": [0, 0.25, 0.5, 1]}))
    before, *after = ran.of("distil", "student", "mlm_loss")
    teacher = ran.of("teach", "teacher", "mlm_loss")[-1]
    assert before > teacher > after[0] and len(set(after)) == 1
    assert len(ran.of("distil", "student", "f", "train")) == 1


# -------------------------------------------------------------------------------------------- where a phase starts from


def test_weights_kept_on_the_way_are_those_of_a_run_that_ended_there(new_lab: Callable[[], Lab]) -> None:
    constant = {"lr": 5e-3, "schedule": "constant"}
    long, short = new_lab(), new_lab()
    changes = {"phases.teach.optimizer": constant, "phases.teach.save_at": [0.5]}
    start = {"phases.distil.start": {"teacher": "teach@0.5"}}
    ran = long.run(long.spec(distillation(), {**changes, **start}))
    half = {"phases.teach.optimizer": constant, "phases.teach.budget": {"steps": 4}}
    expected = short.run(short.spec(distillation(), half))
    assert equal_weights(ran.weights("teach", "teacher@0.5"), expected.weights("teach", "teacher"))
    assert not equal_weights(ran.weights("teach", "teacher@0.5"), ran.weights("teach", "teacher"))
    assert ran.of("distil", "student", "mlm_loss") == expected.of("distil", "student", "mlm_loss")


def test_every_fraction_to_keep_is_kept_however_few_steps_there_are(lab: Lab) -> None:
    changes = {"phases.teach.save_at": [0.1, 0.4, 0.5], "phases.teach.budget": {"steps": 2}}
    ran = lab.run(lab.spec(distillation(), changes))
    published = lab.store.find(ran.phases["teach"]["key"])
    assert published is not None
    assert set(published.files) == {"teacher", "teacher@0.1", "teacher@0.4", "teacher@0.5"}


def test_no_evaluation_but_that_at_zero_is_before_the_first_step(lab: Lab) -> None:
    ran = lab.run(
        lab.spec(distillation(), {"phases.teach.budget": {"steps": 1}, "phases.distil.evaluate": [0, 0.01, 1]})
    )
    places = {(r["phase"], r["step"], r["progress"]) for r in ran.records}
    assert places == {("teach", 1, 1.0), ("distil", 0, 0.0), ("distil", 1, 0.01), ("distil", 8, 1.0)}


def test_a_fan_out_starts_each_time_from_the_same_place_and_never_chains(
    lab: Lab, new_lab: Callable[[], Lab], watched: dict[str, Any]
) -> None:
    trial = distillation()
    trial["phases"]["tune"] = phase("student", {"h": hard("student")}, for_each_dataset=["corpus", "other"])
    ran = lab.run(lab.spec(trial))
    assert list(ran.phases) == ["teach", "distil", "tune[corpus]", "tune[other]"]
    end = ran.weights("distil", "student")
    for item in ("corpus", "other"):
        start = watched["begin"][f"tune[{item}]", "student"]
        assert equal_weights({key: start[key] for key in end}, end)
    assert {r["task"] for r in ran.records if r["phase"] == "tune"} == {"corpus", "other"}
    one = new_lab()
    trial["phases"]["tune"]["for_each_dataset"] = ["other"]
    alone = one.run(one.spec(trial))
    assert equal_weights(alone.weights("tune", "student", "other"), ran.weights("tune", "student", "other"))


def test_phases_that_follow_each_other_go_on_with_the_same_model(lab: Lab, watched: dict[str, Any]) -> None:
    trial = distillation()
    trial["phases"]["more"] = phase("student", {"h": hard("student")})
    ran = lab.run(lab.spec(trial))
    end = ran.weights("distil", "student")
    assert equal_weights({key: watched["begin"]["more", "student"][key] for key in end}, end)


def test_pretrained_weights_are_where_training_starts(lab: Lab, tmp_path: Path, watched: dict[str, Any]) -> None:
    donor = lab.run(lab.spec(distillation()))
    published = lab.store.find(donor.phases["teach"]["key"])
    assert published is not None
    net = build.restore(published.configs["teacher"], donor.weights("teach", "teacher"))
    net.save_pretrained(tmp_path / "teacher")
    found = {**lab.fingerprints, "model:student": build.weights_fingerprint(str(tmp_path / "teacher"), None)}
    there = Lab(lab.root, found, lab.data)
    spec = there.spec(distillation(), {"models.student": {"pretrained": str(tmp_path / "teacher"), "dropout": 0}})
    ran = there.run(spec, trial="u")
    assert equal_weights(watched["begin"]["distil", "student"], net.state_dict())
    assert not equal_weights(ran.weights("distil", "student"), donor.weights("teach", "teacher"))


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["weights", "marker"])
def test_a_damaged_phase_is_set_aside_and_trained_again_with_the_same_numbers(
    new_lab: Callable[[], Lab], damage: str
) -> None:
    clean, lab = new_lab(), new_lab()
    other = {"phases.distil.optimizer.lr": 1e-3}
    expected = clean.run(clean.spec(distillation(), other))
    key = lab.run(lab.spec(distillation()), trial="first").phases["teach"]["key"]
    home = lab.root / "phases" / key
    (file,) = home.glob("*.safetensors") if damage == "weights" else home.glob("phase.json")
    content = file.read_bytes()
    file.write_bytes(
        content[:-1] + bytes([content[-1] ^ 1]) if damage == "weights" else content.replace(b"mlm", b"xlm")
    )
    ran = lab.run(lab.spec(distillation(), other), trial="second")
    same_numbers(ran, expected)
    assert len(list(home.glob("corrupt-*.json"))) == 1
    assert not ran.phases["teach"]["reused"]  # this trial paid for it
    assert len(ran.records) == len(expected.records)  # no record twice


def test_several_damaged_phases_are_all_trained_again(new_lab: Callable[[], Lab]) -> None:
    trial = distillation(second=model())
    trial["phases"] = {"teach_second": phase("second", {"h": hard("second")}), **trial["phases"]}
    trial["phases"]["distil"]["terms"]["second_to_student"] = flow("second", "student")
    clean, lab = new_lab(), new_lab()
    other = {"phases.distil.optimizer.lr": 1e-3}
    expected = clean.run(clean.spec(trial, other))
    first = lab.run(lab.spec(trial), trial="first")
    for name in ("teach", "teach_second"):
        for file in (lab.root / "phases" / first.phases[name]["key"]).glob("*.safetensors"):
            file.write_bytes(b"")
    same_numbers(lab.run(lab.spec(trial, other), trial="second"), expected)


# ------------------------------------------------------------------------------------------------------------- outcomes


def job(lab: Lab, spec: TrialSpec, **more: Any) -> Job:
    fields: dict[str, Any] = {
        "trial": trial_id(spec, lab.fingerprints),
        "spec": spec.model_dump_json(),
        "fingerprints": lab.fingerprints,
        "storage": str(lab.root),
        "folder": "study",
        "threads": 1,
        "device": "cpu",
        "checkpoint_at_reports": False,
        "provenance": {"commit": "abc"},
    }
    return Job(**{**fields, **more})


def log_of(lab: Lab, of: Job) -> str:
    return (lab.root / "study/trials" / of.trial / "log.txt").read_text()


def test_an_attempt_ends_with_its_phases_and_says_where_it_ran(lab: Lab) -> None:
    this = job(lab, lab.spec(distillation()))
    end = trial_attempt.run(json_round_trip(this), Listener())
    assert (end.status, end.reason, end.attempts) == ("ended", None, 1)
    assert set(end.phases) == {"teach", "distil"} and end.peak_memory > 1e6
    assert Outcome.from_json(end.to_json()) == end
    assert "ended" in log_of(lab, this)
    published = lab.store.find(end.phases["teach"]["key"])
    assert published is not None and published.provenance["commit"] == "abc" and published.provenance["torch"]


def json_round_trip(this: Job) -> Job:
    from dataclasses import asdict

    return Job(**json.loads(json.dumps(asdict(this))))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"phases.teach.optimizer.lr": 1e30}, "diverged: phase teach: teacher_hard is nan"),
        (  # the only step breaks the weights after its loss was still a number
            {"phases.teach.optimizer": {"lr": 1e30}, "phases.teach.budget": {"steps": 1}},
            "diverged: phase teach: the dev loss of teacher is nan",
        ),
    ],
    ids=["on the way", "by the last step"],
)
def test_divergence_is_an_outcome_with_a_reason_and_a_log_and_attempts_count_up(
    lab: Lab, changes: dict[str, Any], reason: str
) -> None:
    this = job(lab, lab.spec(distillation(), changes))
    for number in (1, 2):
        end = trial_attempt.run(this, Listener())
        assert (end.status, end.attempts) == ("failed", number)
        assert end.reason.startswith(reason)
        assert reason in "\n".join(end.last_lines)
        assert f"attempt {number} of trial {this.trial}" in log_of(lab, this)
    assert lab.storage.list("phases") == []


def test_out_of_memory_is_an_outcome(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(gradients, "run_micro_batch", hungry)
    end = trial_attempt.run(job(lab, lab.spec(distillation())), Listener())
    assert (end.status, end.reason) == ("failed", "out of memory: CUDA out of memory. Tried to allocate 2 GiB")


def test_an_error_of_ours_is_an_outcome_with_a_traceback_in_the_log(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> Any:
        raise KeyError("oops")

    this = job(lab, lab.spec(distillation()))
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "backward", wrong)
        end = trial_attempt.run(this, Listener())
    assert (end.status, end.reason) == ("failed", "KeyError: 'oops'")
    assert "Traceback" in log_of(lab, this)
    refused = trial_attempt.run(job(lab, lab.spec(distillation(student=model("gpt2")))), Listener())
    assert refused.status == "failed" and refused.reason.startswith("model 'student' (gpt2) is a decoder")


def test_a_stop_passes_through_and_leaves_a_log_and_the_next_attempt_resumes(
    lab: Lab, base: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tune(Listener):
        def report(self, records: list[dict[str, Any]]) -> None:
            super().report(records)
            if records[-1]["phase"] == "distil":
                raise SystemExit(0)

    this = job(lab, lab.spec(distillation()), checkpoint_at_reports=True)
    with pytest.raises(SystemExit):
        trial_attempt.run(this, Tune())
    assert "attempt 1" in log_of(lab, this)
    steps: list[int] = []
    real = loop.step
    monkeypatch.setattr(loop, "step", lambda at: [steps.append(at.progress.step), real(at)])
    end = trial_attempt.run(this, Listener())
    assert (end.status, end.attempts, steps) == ("ended", 2, [2, 3, 4, 5, 6, 7])
    assert end.phases["distil"]["key"] == base.phases["distil"]["key"]
    assert "attempt 2" in log_of(lab, this)


# --------------------------------------------------------------------------------------------------- costs, evaluation


def test_a_step_costs_three_forwards_and_a_teachers_pass_one_more(new_lab: Callable[[], Lab], base: Ran) -> None:
    """Online distillation from a teacher of the student's size costs 1 + 1/3 of training alone."""
    lab = new_lab()
    alone = lab.run(lab.spec(distillation(), {f"{TO_STUDENT}.weight": 0}))
    assert base.phases["distil"]["flops"] / alone.phases["distil"]["flops"] == pytest.approx(4 / 3, rel=0.02)
    assert base.phases["distil"]["tokens"] == alone.phases["distil"]["tokens"] == 8 * 8 * 32


def test_evaluation_does_not_depend_on_batches_and_leaves_the_model_unchanged(
    lab: Lab,
) -> None:
    corpus = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"])
    shape = Model.model_validate(model(dropout=0.3))
    net = build.build(shape, name="m", seed=0, vocab_size=corpus.vocab_size, special_ids={}, length=32)
    net.train()
    whole, parts = (
        evaluate_corpus(net, corpus, "dev", Targets(Masking()), on=Placement("cpu", rows=rows)).metrics
        for rows in (ROWS, 5)
    )
    assert net.training and parts["mlm_accuracy"] == whole["mlm_accuracy"]
    assert parts["mlm_loss"] == pytest.approx(whole["mlm_loss"], rel=1e-6)


# ------------------------------------------------------------------------------------------------- the stored trajectory


def reference_trial() -> dict[str, Any]:
    """A little of everything that decides numbers: families, inits, divergences, schedules, both corruptions."""
    wide = {"init": {"kind": "random", "std": "width", "positions": "sinusoid"}}
    distil = {
        "student_hard": hard("student"),
        "teacher_to_student": flow(
            "teacher", "student", temperature=2, weight={"kind": "linear", "start": 4, "end": 1}
        ),
        "modern_to_student": flow("modern", "student", "jsd", beta=0.3),
        "modern_hard": hard("modern"),
        "student_to_modern": flow("student", "modern", "reverse_kl", tau_squared=True, temperature=1.5),
    }
    speak = {"h": hard("first"), "f": flow("second", "first", "jeffreys"), "g": hard("second")}
    next_token = {"main": {"corruption": None}}
    return {
        "models": {
            "teacher": model("bert", **wide),
            "student": model("bert", layers=2, init={"kind": "remap", "from": "teacher", "depth": "stack"}),
            "modern": model("modernbert", layers=2),
            "first": model("gpt2", layers=2),
            "second": model("llama", init={"kind": "random", "std": "width"}),
        },
        "phases": {
            "teach": phase("teacher", {"teacher_hard": hard("teacher")}, optimizer=STEADY, budget={"steps": 12}),
            "distil": phase(("student", "modern"), distil, optimizer={**STEADY, "schedule": "cosine"}),
            "speak": phase(("first", "second"), speak, optimizer=STEADY, streams=next_token),
        },
    }


def test_the_reference_trajectory_holds(lab: Lab) -> None:
    """Whoever changes these numbers on purpose raises NUMERICS, so that no phase from before is taken for one of now."""
    ran = lab.run(lab.spec(reference_trial()))
    corpus = open_data(str(lab.root / "data"), lab.fingerprints["data:corpus"])
    values = {"/".join(map(str, key[:6])): value for key, value in ran.values.items() if "accuracy" not in key[4]}
    if os.environ.get("CODISTILL_STORE"):
        store_reference({"numerics": NUMERICS, "tokenizer": corpus.tokenizer_identity, "values": values})
    stored = json.loads(REFERENCE.read_text())
    anew = "raise NUMERICS (trainables/config/trial.py) and store it anew: CODISTILL_STORE=1 pytest tests/training/test_loop.py"
    assert stored["tokenizer"] == corpus.tokenizer_identity, "another version of tokenizers made another vocabulary"
    assert stored["numerics"] == NUMERICS, f"NUMERICS is {NUMERICS}, the trajectory is of {stored['numerics']}: {anew}"
    assert stored["values"].keys() == values.keys(), anew
    worst = max(values, key=lambda key: abs(values[key] / stored["values"][key] - 1))
    assert values[worst] == pytest.approx(stored["values"][worst], rel=1e-5), f"{worst} has changed: {anew}"


def store_reference(value: dict[str, Any]) -> None:
    if REFERENCE.exists():
        old = json.loads(REFERENCE.read_text())
        assert old["numerics"] != NUMERICS or old == value, "raise NUMERICS first: its trajectory is stored already"
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(json.dumps(value, indent=1) + "\n")


def test_no_stored_trajectory_was_replaced_under_the_same_numerics() -> None:
    root = REFERENCE.parents[2]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)

    name = str(REFERENCE.relative_to(root))
    commits = git("log", "--format=%H", "--", name)
    if commits.returncode:
        pytest.skip(f"no history: {commits.stderr.strip()}")
    seen = {}
    for commit in reversed(commits.stdout.split()):
        text = git("show", f"{commit}:{name}")
        if text.returncode == 0:
            value = json.loads(text.stdout)
            seen.setdefault(value["numerics"], value["values"])
    now = json.loads(REFERENCE.read_text())
    assert seen.get(now["numerics"], now["values"]) == now["values"], (
        "values changed: raise NUMERICS and store them anew"
    )
