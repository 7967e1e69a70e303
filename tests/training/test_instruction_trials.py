"""Trials of models that learn to answer: what is recorded, what a step is, what no number may depend on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyarrow import parquet
from pydantic import TypeAdapter
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from orchestrator.planning import preview
from tests.support.trials import (
    STEADY,
    Lab,
    Listener,
    Ran,
    Stopped,
    answering,
    break_at,
    close_numbers,
    flow,
    hard,
    interleaved,
    model,
    phase,
    same_numbers,
    sampled,
)
from trainables.config.data import Data
from trainables.config.models import Model
from trainables.config.schedules import RisesWithLoss
from trainables.config.trial import TrialSpec
from trainables.config.value import random_stream
from trainables.data.prepare import prepare
from trainables.data.prepared import open_data
from trainables.evaluation.generation import evaluate_exchanges
from trainables.evaluation.per_example import ROWS, Placement
from trainables.generation.context import GenerationContext
from trainables.generation.sample import sample
from trainables.metrics.rouge import rouge_l
from trainables.models import build, lora
from trainables.runtime import trial_attempt
from trainables.training import loop, on_policy
from trainables.training.streams import StreamLoader

REAL = Path(os.environ.get("CODISTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not (REAL / "instructions").is_dir(), reason=f"no instructions in {REAL}: set CODISTILL_DATA"
)
DECODERS = ("gpt2", "llama")
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def shared(new_instructed_lab: Callable[[], Lab]) -> Lab:
    """A lab whose store several tests fill: teachers that are alike are trained once."""
    return new_instructed_lab()


def restored(ran: Ran, name: str, model: str) -> Any:
    published = ran.lab.store.find(ran.phases[name]["key"])
    assert published is not None
    return build.restore(published.configs[model], ran.weights(name, model)).eval()


def opened(lab: Lab, name: str = "ask") -> Any:
    return open_data(str(lab.root / "data"), lab.fingerprints[f"data:{name}"])


def plain_logits(net: Any, batch: Any, vocab_size: int, weights: Weights | None = None) -> Tensor:
    """[N, V] before each token of the replies: every exchange by itself, without packing, padding or a mask."""
    found = []
    for prompt, reply in zip(batch.prompts, batch.replies, strict=True):
        ids_1T = torch.from_numpy(np.concatenate([prompt, reply]).astype(np.int64))[None]
        out = torch.func.functional_call(net, weights or {}, args=(), kwargs={"input_ids": ids_1T, "use_cache": False})
        found.append(out.logits[0, len(prompt) - 1 : -1, :vocab_size])
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------------ what is recorded


@pytest.mark.parametrize("family", DECODERS)
def test_a_model_learns_to_answer_and_is_recorded_with_all_its_numbers(shared: Lab, family: str) -> None:
    lab = shared
    learn = phase("m", {"h": hard("m")}, streams={"main": {"data": "ask"}}, evaluate=[0, 1], budget={"steps": 25})
    learn |= {"optimizer": {"lr": 1e-2}, "eval_only": ["more"]}
    ran = lab.run(lab.spec({"models": {"m": model(family, width=32)}, "phases": {"learn": learn}}), trial=f"l{family}")
    before, after = ran.of("learn", "m", "lm_loss")
    assert after < 0.8 * before
    metrics = ("lm_loss", "lm_accuracy", "rougeL", "greedy_rougeL", "unfinished")
    on_ask = [r for r in ran.records if r["task"] == "ask" and r["split"] in ("dev", "test")]
    assert {(r["split"], r["metric"], r["progress"]) for r in on_ask} == {
        (split, metric, progress) for split in ("dev", "test") for metric in metrics for progress in (0.0, 1.0)
    }
    on_more = [r for r in ran.records if r["task"] == "more"]
    assert {(r["split"], r["metric"], r["progress"]) for r in on_more} == {("test", m, 1.0) for m in metrics}
    assert len(on_more) == len(metrics)
    net = restored(ran, "learn", "m")
    stored = lab.store.examples(ran.phases["learn"]["key"]).to_dict("list")
    for name, records in (("ask", on_ask), ("more", on_more)):
        recorded = {r["metric"]: r["value"] for r in records if (r["split"], r["progress"]) == ("test", 1.0)}
        data = opened(lab, name)
        expected = by_hand(net, data)
        assert recorded == pytest.approx(expected, rel=1e-5), name
        rows = [i for i, task in enumerate(stored["task"]) if task == name]
        assert len(rows) == len(data.test) and [stored["example"][i] for i in rows] == list(range(len(rows)))
        assert np.mean([stored["prediction"][i] for i in rows]) == pytest.approx(recorded["rougeL"])
        drawn = np.array([stored["samples"][i] for i in rows])
        assert drawn.shape == (len(rows), len(data.scoring.seeds)) and drawn.std(1).max() > 0
        assert drawn.mean(1) == pytest.approx([stored["prediction"][i] for i in rows], rel=1e-5)
        loss = sum(stored["loss"][i] for i in rows) / sum(stored["count"][i] for i in rows)
        assert loss == pytest.approx(recorded["lm_loss"])
        assert [stored["count"][i] for i in rows] == [len(data.test.reply(i)) for i in range(len(rows))]


def by_hand(net: Any, data: Any) -> dict[str, float]:
    """The test split's numbers, one exchange at a time but for the draws, which are a batch's."""
    order = np.argsort(data.test.lengths, kind="stable")
    batch = data.test.rows(order)
    assert len(order) <= ROWS
    with torch.no_grad():
        logits_NV = plain_logits(net, batch, data.vocab_size)
    rouge: dict[int | None, float] = {}
    unfinished = []
    for seed in (*data.scoring.seeds, None):
        drawn = sample(
            net,
            batch.prompts,
            data.scoring,
            GenerationContext(data.end_ids, data.end_id, data.vocab_size, "cpu"),
            seed=random_stream("scoring", seed or 0),
            greedy=seed is None,
        )
        texts = [data.tokenizer.decode(reply.tolist(), skip_special_tokens=True) for reply in drawn.replies]
        rouge[seed] = float(
            np.mean([rouge_l(t, data.test.references(int(i))) for t, i in zip(texts, order, strict=True)])
        )
        if seed is not None:
            unfinished.append(np.mean([reply[-1] != data.end_id for reply in drawn.replies]))
    return {
        "lm_loss": F.cross_entropy(logits_NV, batch.labels_N).item(),
        "lm_accuracy": 100 * (logits_NV.argmax(-1) == batch.labels_N).float().mean().item(),
        "rougeL": float(np.mean([rouge[seed] for seed in data.scoring.seeds])),
        "greedy_rougeL": rouge[None],
        "unfinished": float(100 * np.mean(unfinished)),
    }


def test_replies_are_scored_by_each_metric_that_the_data_name(shared: Lab) -> None:
    plain = opened(shared)
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": plain.vocab_size, "n_positions": 2 * plain.length}
    net = GPT2LMHeadModel(GPT2Config(**sizes))
    names = ["chrf", "token_f1", {"kind": "exact_match", "extract": "e"}]
    exchanges = plain.about["exchanges"]
    named = {**exchanges, "scoring": {**exchanges["scoring"], "metrics": names}}
    data = replace(plain, about={**plain.about, "exchanges": named})
    scored = evaluate_exchanges(net, data, "test", on=Placement("cpu"))
    before = evaluate_exchanges(net, plain, "test", on=Placement("cpu"))
    assert before.scores == {} and before.metrics.items() <= scored.metrics.items()
    assert set(scored.scores) == {"chrf", "token_f1", "exact_match"} == scored.metrics.keys() - before.metrics.keys()
    for name, score_E in scored.scores.items():
        assert scored.metrics[name] == pytest.approx(score_E.mean()) and len(score_E) == len(data.test)
    assert 0 < scored.metrics["exact_match"] <= 100 and 0 < scored.metrics["chrf"] < 100


# -------------------------------------------------------------------------------------------------------- what a step is


LEARNS_BACK = {"kind": "lora", "rank": 3, "alpha": 6}


def okd(family: str = "gpt2", *, back: float = 0.7, **more: Any) -> dict[str, Any]:
    """The teacher, by LoRA, learns from the data and from the student; the student from both."""
    trial = answering(family, **{"optimizer": STEADY, "budget": {"steps": 3}, "evaluate": [0, 1], **more})
    trial["phases"]["distil"]["train"] = {"teacher": LEARNS_BACK, "student": "full"}
    trial["phases"]["distil"]["terms"] = {
        "teacher_hard": hard("teacher", weight=0.3),
        "student_hard": hard("student", weight=0.4),
        "student_to_teacher": flow("student", "teacher", "reverse_kl", weight=back),
        "teacher_to_student": flow("teacher", "student"),
    }
    return trial


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`start`: weights of the models before the first step of `distil`, pairs by themselves; `batches`: what it read."""
    seen: dict[str, Any] = {"start": {}, "pairs": {}, "batches": {}}
    step, batch = loop.step, StreamLoader.batch

    def watch_step(at: Any) -> None:
        if (at.instance.phase, at.progress.step) == ("distil", 0):
            for name, net in at.nets.items():
                seen["start"][name] = {key: tensor.clone() for key, tensor in build.weights_of(net).items()}
                if lora.is_attached(net):
                    seen["pairs"][name] = {key: tensor.clone() for key, tensor in lora.adapter_state(net).items()}
        step(at)

    def watch_batch(self: Any, at: int, size: int, seed: int, instance: str) -> Any:
        found = batch(self, at, size, seed, instance)
        if instance == "distil":
            seen["batches"][at] = found
        return found

    monkeypatch.setattr(loop, "step", watch_step)
    monkeypatch.setattr(StreamLoader, "batch", watch_batch)
    return seen


def with_pairs(family: str, base: Weights, pairs: Weights, scale: float) -> Weights:
    """W + scale B A at query and value, written out for each family."""
    found = dict(base)
    for path in sorted({key.rsplit(".", 1)[0] for key in pairs}):
        change = scale * pairs[f"{path}.B"] @ pairs[f"{path}.A"]  # [outputs, inputs]
        if family == "llama":
            found[f"{path}.weight"] = base[f"{path}.weight"] + change
            continue
        whole, part = path.rsplit(".", 1)  # one matrix [inputs, query key value]
        width = change.shape[0]
        at = {"query": 0, "value": 2 * width}[part]
        beside = F.pad(change.T, (at, 2 * width - at))
        found[f"{whole}.weight"] = found[f"{whole}.weight"] + beside
    return found


def test_states_are_compared_on_replies_that_models_make(shared: Lab) -> None:
    trial = answering(budget={"steps": 2}, evaluate=[1])
    student = {"main": {"data": "ask", "replies": {"kind": "sampled", "by": "student", "max_tokens": 8}}}
    deep = {"kind": "hidden_mse", "from": "teacher", "to": "student", "layers": "uniform", "projector": True}
    trial["phases"]["distil"] |= {"streams": student, "terms": {"soft": flow("teacher", "student"), "deep": deep}}
    ran = shared.run(shared.spec(trial), trial="deep")
    both = [r["value"] for r in ran.records if r["split"] == "train" and r["metric"] == "deep"]
    assert both and all(0 < value < math.inf for value in both)


@pytest.mark.parametrize("family", DECODERS)
def test_both_models_step_from_one_pass_before_any_update(shared: Lab, watched: Any, family: str) -> None:
    """Three steps of OKD, written by hand: no packing, no peft, no fused terms."""
    lab, steps = shared, 3
    spec = lab.spec(okd(family))
    ran = lab.run(spec, trial=f"okd{family}")
    rule = spec.phases["distil"].optimizer_of("student")
    teacher, student = restored(ran, "teach", "teacher"), restored(ran, "distil", "student")
    base = {key: tensor.detach() for key, tensor in ran.weights("teach", "teacher").items()}
    pairs = {key: tensor.clone().requires_grad_() for key, tensor in watched["pairs"]["teacher"].items()}
    assert len(pairs) == 4 and all((tensor == 0).all() == key.endswith(".B") for key, tensor in pairs.items())
    student.load_state_dict(watched["start"]["student"], strict=False)
    learn = {"teacher": list(pairs.values()), "student": list(student.parameters())}
    optimizers = {
        name: torch.optim.AdamW(
            [
                {"params": [p for p in params if p.ndim >= 2], "weight_decay": rule.weight_decay},
                {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
            ],
            betas=rule.betas,
            eps=rule.eps,
        )
        for name, params in learn.items()
    }
    vocab_size = opened(lab).vocab_size
    for step in range(steps):
        batch = watched["batches"][step]
        ours_NV = plain_logits(student, batch, vocab_size)
        theirs_NV = plain_logits(teacher, batch, vocab_size, with_pairs(family, base, pairs, 6 / 3))
        log_s, log_t = ours_NV.log_softmax(-1), theirs_NV.log_softmax(-1)
        num, labels_N = len(ours_NV), batch.labels_N

        def kl(log_p: Tensor, log_q: Tensor, num: int = num) -> Tensor:
            return (log_p.exp() * (log_p - log_q)).sum() / num

        loss = 0.4 * F.cross_entropy(ours_NV, labels_N) + kl(log_t.detach(), log_s)
        loss = loss + 0.3 * F.cross_entropy(theirs_NV, labels_N) + 0.7 * kl(log_t, log_s.detach())
        loss.backward()
        for name, optimizer in optimizers.items():
            torch.nn.utils.clip_grad_norm_(learn[name], rule.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rule.lr * rule.lr_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad()
    found = ran.weights("distil", "student")
    expected = build.weights_of(student)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6, msg=key)
    found, expected = ran.weights("distil", "teacher"), with_pairs(family, base, pairs, 6 / 3)
    assert found.keys() == base.keys()  # a plain model
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key].detach(), rtol=0, atol=1e-6, msg=key)
    moved = {key for key in found if not torch.equal(found[key], base[key])}
    fused = {"llama": ("q_proj.weight", "v_proj.weight"), "gpt2": ("c_attn.weight",)}[family]
    assert moved == {key for key in found if key.endswith(fused)}
    if family == "gpt2":
        (key,) = moved
        width = base[key].shape[0]
        assert torch.equal(found[key][:, width : 2 * width], base[key][:, width : 2 * width])  # keys are no target


def test_agreement_is_told_with_the_teacher_as_it_is_and_as_it_was(shared: Lab) -> None:
    lab = shared
    ran = lab.run(lab.spec(okd("gpt2")), trial="agree")
    for split in ("dev", "test"):
        adapted, original = (ran.of("distil", "student", f"teacher{w}_kl", split) for w in ("", "_original"))
        assert adapted[0] == original[0] and adapted[1] != original[1]
        for metric in ("teacher_agreement", "teacher_original_agreement"):
            assert len(ran.of("distil", "student", metric, split)) == 2
        assert ran.of("distil", "teacher", "student_kl", split) and not ran.of(
            "distil", "teacher", "student_original_kl"
        )
    fixed = okd("gpt2")
    fixed["phases"]["distil"]["train"] = {"student": "full"}
    fixed["phases"]["distil"]["terms"] = {"teacher_to_student": flow("teacher", "student")}
    still = lab.run(lab.spec(fixed), trial="agree-fixed")
    as_it_was = still.of("distil", "student", "teacher_original_kl", "test")
    assert as_it_was and as_it_was == still.of("distil", "student", "teacher_kl", "test")
    data, student = opened(lab), restored(ran, "distil", "student")
    batch = data.test.rows(range(len(data.test)))
    with torch.no_grad():
        log_s = plain_logits(student, batch, data.vocab_size).log_softmax(-1)
        for what, source in (("", "distil"), ("_original", "teach")):
            log_t = plain_logits(restored(ran, source, "teacher"), batch, data.vocab_size).log_softmax(-1)
            kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean().item()
            same = 100 * (log_t.argmax(-1) == log_s.argmax(-1)).float().mean().item()
            assert ran.of("distil", "student", f"teacher{what}_kl", "test")[-1] == pytest.approx(kl, rel=1e-4)
            assert ran.of("distil", "student", f"teacher{what}_agreement", "test")[-1] == pytest.approx(same, rel=1e-5)


def test_without_a_flow_into_the_teacher_it_learns_from_the_data_alone(shared: Lab) -> None:
    lab = shared
    ran = lab.run(lab.spec(okd(back=0)), trial="alpha0")
    assert {r["metric"] for r in ran.records if (r["phase"], r["split"]) == ("distil", "train")} == {
        "teacher_hard", "student_hard", "teacher_to_student",
    }  # fmt: skip
    alone = okd(back=0)
    del alone["models"]["student"], alone["phases"]["distil"]["train"]["student"]
    alone["phases"]["distil"]["terms"] = {"teacher_hard": hard("teacher", weight=0.3)}
    expected = lab.run(lab.spec(alone), trial="alone").weights("distil", "teacher")
    for key, tensor in ran.weights("distil", "teacher").items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-7, msg=key)
    both = lab.run(lab.spec(okd()), trial="agree again").weights("distil", "teacher")
    assert any(not torch.equal(both[key], expected[key]) for key in both)


# ------------------------------------------------------------------------------------- what no number may depend on


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_batch_in_parts_is_packed_otherwise_and_gives_the_same_numbers(
    new_instructed_lab: Callable[[], Lab], shared: Lab, micro_batch: int
) -> None:
    parts, steady = new_instructed_lab(), {"phases.teach.optimizer": STEADY}
    expected = shared.run(shared.spec(okd(), steady), trial=f"whole{micro_batch}")
    ran = parts.run(parts.spec(okd(), steady), micro_batch=micro_batch)
    drawn = ("rougeL", "greedy_rougeL", "unfinished")  # a draw may go the other way by float error
    for one in (ran, expected):
        one.records[:] = [r for r in one.records if r["metric"] not in drawn and "agreement" not in r["metric"]]
    close_numbers(ran, expected, rtol=5e-6)
    for name in ("teacher", "student"):
        theirs = expected.weights("distil", name)
        for key, tensor in ran.weights("distil", name).items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=2e-6)
    assert ran.phases["distil"]["tokens"] == expected.phases["distil"]["tokens"]


def lora_and_taid() -> dict[str, Any]:
    trial = okd(budget={"steps": 8}, evaluate=[0.25, 0.5, 1])
    trial["models"]["teacher"]["dropout"] = trial["models"]["student"]["dropout"] = 0.2
    trial["phases"]["distil"]["train"]["teacher"] = {**LEARNS_BACK, "dropout": 0.1}
    trial["phases"]["distil"]["terms"]["teacher_to_student"] = flow("teacher", "student", "interpolated_kl", alpha=0.1)
    return trial


INTERRUPTED: dict[str, Callable[[], dict[str, Any]]] = {
    "lora and taid": lora_and_taid,
    "replay that rises with the loss": lambda: answering(
        streams=sampled("student", share={"kind": "rises_with_loss", "start": 0.6, "step": 0.2, "tolerance": 0}, replay={"size": 12, "fresh": "constant"}),
        budget={"steps": 16},
        optimizer={"lr": 0.3, "schedule": "constant"},
        evaluate=[0, 0.125, 0.25, 0.375, 0.5, 1],
    ),
    "once": lambda: answering(streams=sampled("teacher", once=True), budget={"epochs": 1.5}),
    "interleaved": lambda: answering(streams=interleaved(share=0.7)),
}  # fmt: skip


@pytest.mark.parametrize("which", INTERRUPTED)
def test_a_trial_that_dies_goes_on_to_the_same_bits(
    new_instructed_lab: Callable[[], Lab], which: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, lab = new_instructed_lab(), new_instructed_lab()
    ended: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        real = loop.step
        patch.setattr(loop, "step", lambda at: [real(at), ended.update(progress=at.progress)])
        expected = whole.run(whole.spec(INTERRUPTED[which]()))
    progress = ended["progress"]
    if "rises" in which:
        assert progress.replies["main"]["share"]["value"] > 0.6  # else this would tell nothing of it
        assert len(progress.replies["main"]["kept"]) == 12
    if "taid" in which:
        assert 0.4 < progress.terms["teacher_to_student"]["t"] < 1
    died = progress.step - 3
    with monkeypatch.context() as patch:
        break_at(patch, "distil", died)
        with pytest.raises(Stopped):
            lab.run(lab.spec(INTERRUPTED[which]()), checkpoint_seconds=0)
    steps: list[int] = []
    real = loop.step
    monkeypatch.setattr(loop, "step", lambda at: [steps.append(at.progress.step), real(at)])
    ran = lab.run(lab.spec(INTERRUPTED[which]()), attempt=2)
    assert "skipped" not in caplog.text
    assert steps == list(range(died, progress.step))
    same_numbers(ran, expected)


# ---------------------------------------------------------------------------------------------- replies that models make


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of each step that could read made replies: the batch, the state after it, and what was computed."""
    seen: list[dict[str, Any]] = []
    real = on_policy.replace_replies

    def watch(spec: Any, state: Any, batch: Any, indices: Any, **more: Any) -> Any:
        found, computed = real(spec, state, batch, indices, **more)
        kept, length = len(state["kept"]), more["context"].generation.length
        seen.append(
            {"data": batch, "batch": found, "computed": computed, "kept": kept, "indices": indices, "length": length}
        )
        return found, computed

    monkeypatch.setattr(on_policy, "replace_replies", watch)
    return seen


def test_a_share_of_nothing_is_the_data_exactly(shared: Lab, read: list[Any]) -> None:
    lab = shared
    expected = lab.run(lab.spec(answering()), trial="data")
    ran = lab.run(lab.spec(answering(streams=sampled("student", share=0))), trial="share 0")
    assert len(read) == 8 and all(step["batch"] is step["data"] for step in read)
    assert ran.of("distil", "student", "made_share", "train") == [0, 0]
    same = {key: value for key, value in ran.values.items() if key[4] != "made_share"}
    assert same == expected.values and ran.phases["distil"]["flops"] == expected.phases["distil"]["flops"]


def test_a_share_of_all_makes_every_step_within_the_room(shared: Lab, read: list[Any]) -> None:
    lab = shared
    ran = lab.run(lab.spec(answering(streams=sampled("student"))), trial="share 1")
    assert len(read) == 8
    data = opened(lab)
    for step in read:
        assert [p.tolist() for p in step["batch"].prompts] == [p.tolist() for p in step["data"].prompts]
        assert [r.tolist() for r in step["batch"].replies] != [r.tolist() for r in step["data"].replies]
        for reply in step["batch"].replies:
            assert 1 <= len(reply) <= 6 and data.end_id not in reply[:-1] and reply.max() < data.vocab_size
    assert ran.of("distil", "student", "made_share", "train") == [100, 100]
    cut = [reply[-1] != data.end_id for step in read[:4] for reply in step["batch"].replies]
    assert ran.of("distil", "student", "unfinished", "train")[0] == pytest.approx(100 * np.mean(cut))
    sizes = [len(reply) for step in read[:4] for reply in step["batch"].replies]
    assert ran.of("distil", "student", "reply_tokens", "train")[0] == pytest.approx(np.mean(sizes))
    assert ran.phases["distil"]["tokens"] == sum(step["batch"].num_tokens for step in read)


def test_another_model_or_term_changes_no_draw_of_replies(shared: Lab, read: list[Any]) -> None:
    """The teacher answers, which is frozen: so its replies are equal to the token, whatever learns from them."""
    lab = shared
    found = []
    alone = answering(streams=sampled("teacher", share=0.5), budget={"steps": 12})
    more = answering(streams=sampled("teacher", share=0.5), budget={"steps": 12})
    more["models"]["third"] = model("gpt2", width=8)
    more["phases"]["distil"]["train"]["third"] = "full"
    more["phases"]["distil"]["terms"] |= {"third_soft": flow("teacher", "third"), "x": flow("third", "student", "jsd")}
    for name, trial in (("alone", alone), ("more", more)):
        lab.run(lab.spec(trial), trial=f"draws {name}")
        found.append([(bool(s["computed"]), [r.tolist() for r in s["batch"].replies]) for s in read])
        read.clear()
    assert found[0] == found[1]
    assert 0 < sum(is_made for is_made, _ in found[0]) < 12


def test_once_answers_each_prompt_once(shared: Lab, read: list[Any]) -> None:
    lab = shared
    num = len(opened(lab).train)
    trial = answering(streams=sampled("teacher", once=True), budget={"epochs": 2}, evaluate=[1], batch=12)
    ran = lab.run(lab.spec(trial), trial="once")
    first = -(-num // 12)
    known: dict[int, list[int]] = {}
    for step in read:
        for index, reply in zip(step["indices"], step["batch"].replies, strict=True):
            assert known.setdefault(index, reply.tolist()) == reply.tolist()
    assert len(known) == num
    assert all(step["computed"] for step in read[: first - 1]) and not any(s["computed"] for s in read[first:])
    assert ran.of("distil", "teacher", "made_share", "train") == [100]


def test_replayed_steps_compute_nothing_and_flops_are_those_of_what_was_made(
    shared: Lab, read: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, flops = shared, list[float]()
    real = loop.step

    def watch(at: Any) -> None:
        before = at.progress.flops
        real(at)
        if at.instance.phase == "distil":
            flops.append(at.progress.flops - before)
            tokens["of"] = at.token_flops["student"]

    tokens: dict[str, float] = {}
    monkeypatch.setattr(loop, "step", watch)
    replay = {"size": 6, "fresh": "constant"}  # a batch: what is read again is what was read, in another order
    lab.run(lab.spec(answering(streams=sampled("student", replay=replay), budget={"steps": 12})), trial="replay")
    assert [step["kept"] for step in read] == [6] * 12 and read[0]["computed"]
    pairs = [i for i in range(1, 12) if read[i - 1]["computed"] and not read[i]["computed"]]
    assert pairs and sum(not step["computed"] for step in read) >= 2
    for i in pairs:
        of, again = (
            [(p.tolist(), r.tolist()) for p, r in zip(s["batch"].prompts, s["batch"].replies, strict=True)]
            for s in read[i - 1 : i + 1]
        )
        assert sorted(of) == sorted(again)
        made = tokens["of"] * read[i - 1]["computed"]["student"]
        assert made > 0 and flops[i - 1] - flops[i] == pytest.approx(made, rel=1e-6)


def test_interleaved_replies_are_counted_for_both_who_write_them(shared: Lab, read: list[Any]) -> None:
    lab = shared
    ran = lab.run(lab.spec(answering(streams=interleaved())), trial="interleaved")
    assert all(set(step["computed"]) == {"student", "teacher"} and min(step["computed"].values()) > 0 for step in read)
    assert ran.of("distil", "student,teacher", "made_share", "train") == [100, 100]


def test_a_teachers_replies_are_labels_and_those_of_one_who_learns_here_are_not(shared: Lab, read: list[Any]) -> None:
    lab = shared
    trial = answering(streams=sampled("teacher"))
    trial["phases"]["distil"]["terms"] = {"sequence": hard("student")}
    ran = lab.run(lab.spec(trial), trial="seqkd")
    assert all(step["computed"].keys() == {"teacher"} for step in read)
    assert ran.of("distil", "student", "lm_loss")[-1] > 0 and not ran.of("distil", "student", "teacher_kl")
    trial["phases"]["distil"]["streams"] = sampled("student")
    with pytest.raises(ValueError, match=r"distil\.terms\.sequence: replies of 'student', which learns here"):
        lab.spec(trial)


def test_a_reply_that_never_ends_is_cut_and_counted(shared: Lab, read: list[Any], tmp_path: Path) -> None:
    """In training and where it is scored: at `max_tokens`, however unlikely an end is."""
    data = opened(shared)
    value = Model.model_validate(model("llama", init={"kind": "random", "std": "width"}))
    net = build.build(
        value, name="m", seed=0, vocab_size=data.vocab_size, special_ids={"eos_token_id": data.end_id}, length=80
    )
    with torch.no_grad():
        net.get_output_embeddings().weight.mul_(100)
        net.get_output_embeddings().weight[data.end_id] = 0  # never the likeliest by far
    net.save_pretrained(str(tmp_path))
    lab = replace(
        shared, fingerprints={**shared.fingerprints, "model:student": build.weights_fingerprint(str(tmp_path), None)}
    )
    trial = answering("llama", streams=sampled("student"), optimizer={"lr": 1e-9}, evaluate=[1])
    trial["models"]["student"] = {"pretrained": str(tmp_path)}
    ran = lab.run(lab.spec(trial), trial="endless")
    assert all(len(reply) == 6 for step in read for reply in step["batch"].replies) and len(read) == 8
    for split in ("train", "dev", "test"):
        assert ran.of("distil", "student", "unfinished", split) == [100], split
    assert ran.of("distil", "student", "reply_tokens", "train") == [6]


# ------------------------------------------------------------------------------------------------ memory and vocabularies


@pytest.mark.parametrize("streams", [sampled("student"), interleaved()], ids=["sampled", "interleaved"])
def test_out_of_memory_halves_the_prompts_at_a_time_and_changes_nothing_else(
    shared: Lab, new_instructed_lab: Callable[[], Lab], monkeypatch: pytest.MonkeyPatch, streams: Any
) -> None:
    small, at_once = new_instructed_lab(), list[int]()
    expected = shared.run(shared.spec(answering(streams=streams)), trial=f"roomy {streams['main']['replies']['kind']}")

    def hungry(real: Callable[..., Any]) -> Callable[..., Any]:
        def draw(net: Any, prompts: Any, how: Any, context: GenerationContext, **more: Any) -> Any:
            found = real(net, prompts, how, context, **more)
            assert context.rows is not None
            at_once.append(context.rows)
            if context.rows > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        return draw

    monkeypatch.setattr(on_policy, "sample", hungry(on_policy.sample))
    monkeypatch.setattr(on_policy, "interleave", hungry(on_policy.interleave))
    ran = small.run(small.spec(answering(streams=streams)))
    assert at_once == [6, 3] + [1] * 8  # found out once
    assert ran.values == expected.values and ran.phases["distil"]["tokens"] == expected.phases["distil"]["tokens"]
    for key, tensor in ran.weights("distil", "student").items():
        assert torch.equal(tensor, expected.weights("distil", "student")[key])


def test_memory_that_is_too_small_for_one_prompt_ends_the_trial(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(on_policy, "sample", hungry)
    with pytest.raises(torch.OutOfMemoryError):
        shared.run(shared.spec(answering(streams=sampled("student", share=0.9))), trial="no room")


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_models_that_do_not_support_packing_read_each_exchange_in_its_own_row(
    shared: Lab, watched: Any, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    lab = shared
    trial = answering(family, streams={"main": {"data": "ask"}}, eval_only=["more"])
    with caplog.at_level("INFO"):
        ran = lab.run(lab.spec(trial), trial=f"apart {family}")
    assert "one exchange per row: student, teacher cannot separate packed exchanges" in caplog.text
    student, teacher = (restored(ran, *which) for which in (("distil", "student"), ("teach", "teacher")))
    for name in ("ask", "more"):
        data = opened(lab, name)
        batch = data.test.rows(range(len(data.test)))
        with torch.no_grad():
            ours_NV, theirs_NV = (plain_logits(net, batch, data.vocab_size) for net in (student, teacher))
        (loss,) = [r["value"] for r in ran.records if (r["phase"], r["task"], r["split"], r["metric"], r["progress"]) == ("distil", name, "test", "lm_loss", 1)]  # fmt: skip
        assert loss == pytest.approx(F.cross_entropy(ours_NV, batch.labels_N).item(), rel=1e-5)
        if name == "ask":
            log_s, log_t = ours_NV.log_softmax(-1), theirs_NV.log_softmax(-1)
            kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean().item()
            assert ran.of("distil", "student", "teacher_kl", "test")[-1] == pytest.approx(kl, rel=1e-4)
    assert [watched["batches"][step].is_packed for step in range(8)] == [False] * 8


@pytest.mark.parametrize("path", ["precision", "models.teacher.dtype"])
def test_a_type_that_the_device_lacks_is_a_row_that_failed(
    shared: Lab, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    spec = shared.spec(answering(), {path: "bf16"})
    job = trial_attempt.Job(
        "no bf16", spec.model_dump_json(), shared.fingerprints, str(shared.root), "study", 1, "cuda:0", False, {}
    )
    end = trial_attempt.run(job, Listener())
    assert (end.status, end.reason) == (
        "failed",
        f"{path}: device cuda:0 (Tesla T4) does not compute in bf16; expected fp32",
    )


def test_recomputed_activations_give_equal_numbers(shared: Lab) -> None:
    lab = shared
    trial = okd(streams={**sampled("student", share=0.5), "side": {"data": "ask"}})
    trial["models"]["student"]["dropout"] = 0.2
    for name in ("student_hard", "teacher_hard"):
        trial["phases"]["distil"]["terms"][name]["on"] = "side"
    plain = lab.run(lab.spec(trial), trial="kept")
    again = lab.run(lab.spec(trial, {"phases.distil.gradient_checkpointing": True}), trial="recomputed")
    close_numbers(again, plain, rtol=1e-6)
    assert again.phases["distil"]["key"] != plain.phases["distil"]["key"]
    assert again.phases["distil"]["flops"] > plain.phases["distil"]["flops"]


def test_a_teacher_in_bf16_and_adafactor_run(shared: Lab) -> None:
    lab = shared
    changes = {"models.teacher.dtype": "bf16", "phases.teach.optimizer": {"lr": 1e-2, "kind": "adafactor"}}
    changes |= {"phases.distil.streams": interleaved()}
    ran = lab.run(lab.spec(answering("llama"), changes), trial="bf16")
    assert {tensor.dtype for tensor in ran.weights("teach", "teacher").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in ran.weights("distil", "student").values()} == {torch.float32}
    first, last = ran.of("distil", "student", "teacher_to_student", "train")
    assert last < first and all(math.isfinite(value) for value in ran.values.values())


@pytest.mark.parametrize("family", DECODERS)
def test_rows_beyond_the_tokenizer_are_never_read_or_drawn(
    shared: Lab, family: str, tmp_path: Path, read: list[Any]
) -> None:
    lab = shared
    teacher = lab.run(lab.spec(answering(family)), trial=f"padded {family}")
    num, found = opened(lab).vocab_size, {}
    read.clear()
    for more in (0, 9):
        net = restored(teacher, "teach", "teacher")
        net.resize_token_embeddings(num + more, mean_resizing=False)
        with torch.no_grad():  # whoever looked at them would draw nothing else
            net.get_output_embeddings().weight[num:] = 100 * net.get_output_embeddings().weight.abs().max()
            if family == "llama":
                net.get_input_embeddings().weight[num:] = 7
        folder = str(tmp_path / f"{more}")
        net.save_pretrained(folder)
        here = replace(lab, fingerprints={**lab.fingerprints, "model:student": build.weights_fingerprint(folder, None)})
        streams = {**sampled("student", share=0.5), "side": {"data": "ask"}}
        trial = answering(family, streams=streams, evaluate=[0, 1], optimizer={**STEADY, "weight_decay": 0})
        trial["phases"]["distil"]["terms"]["hard"] = hard("student", on="side")
        trial["models"]["student"] = {"pretrained": folder}
        found[more] = here.run(here.spec(trial), trial=f"padded {family} {more}")
        assert found[more].weights("distil", "student")[WORDS[family]].shape[0] == num + more
    assert all(reply.max() < num for step in read for reply in step["batch"].replies)
    assert any(step["computed"] for step in read)
    for key, value in found[0].values.items():
        assert found[9].values[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


WORDS = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}


def test_a_stream_may_be_called_as_a_data_set_that_is_only_scored(shared: Lab) -> None:
    trial = answering(streams={"more": {"data": "ask"}}, eval_only=["more"], budget={"steps": 2})
    trial["phases"]["distil"]["terms"]["teacher_to_student"]["on"] = "more"
    ran = shared.run(shared.spec(trial), trial="names")
    records = [r for r in ran.records if (r["phase"], r["metric"]) == ("distil", "rougeL")]
    found = sorted((r["task"], r["split"], r["progress"]) for r in records)
    assert found == [
        ("ask", "dev", 0.5),
        ("ask", "dev", 1),
        ("ask", "test", 0.5),
        ("ask", "test", 1),
        ("more", "test", 1),
    ]
    stored = shared.store.examples(ran.phases["distil"]["key"])
    assert not stored.duplicated(["model", "task", "example"]).any()
    assert set(stored["task"]) == {"ask", "more"}


def test_the_share_rises_with_the_loss_of_who_makes_the_replies(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another model learns beside it, and stands first."""
    reported: list[float] = []
    real = RisesWithLoss.observe

    def watch(share: Any, state: Any, loss: Any, source_loss: Any) -> Any:
        reported.append(loss())
        return real(share, state, loss, source_loss)

    monkeypatch.setattr(RisesWithLoss, "observe", watch)
    trial = okd(streams={**sampled("student", share={"kind": "rises_with_loss"}), "side": {"data": "ask"}})
    for name in ("student_hard", "teacher_hard"):
        trial["phases"]["distil"]["terms"][name]["on"] = "side"
    ran = shared.run(shared.spec(trial), trial="rises")
    of = [
        r
        for r in ran.records
        if (r["phase"], r["model"], r["metric"], r["split"]) == ("distil", "student", "lm_loss", "dev")
    ]
    assert reported == [next(r["value"] for r in of if r["progress"] == progress) for progress in (0, 1)]


def test_weights_kept_on_the_way_are_plain_models(shared: Lab) -> None:
    ran = shared.run(shared.spec(okd(save_at=[0.4])), trial="keep")
    kept, end, start = (ran.weights(*which) for which in (("distil", "teacher@0.4"), ("distil", "teacher"), ("teach", "teacher")))  # fmt: skip
    assert kept.keys() == end.keys() == start.keys()
    (key,) = (key for key in end if not torch.equal(end[key], start[key]))
    assert not torch.equal(kept[key], start[key]) and not torch.equal(kept[key], end[key])


def test_what_is_scored_is_part_of_the_key(shared: Lab) -> None:
    """Other rows behind the same name are other numbers: nothing that is stored may stand for them."""
    spec: TrialSpec = shared.spec(answering(eval_only=["more"]))
    other = replace(shared, fingerprints={**shared.fingerprints, "data:more": "0" * 32})
    assert shared.key(spec, "distil") != other.key(spec, "distil")
    assert shared.key(spec, "teach") == other.key(spec, "teach")


# ------------------------------------------------------------------------------------------------------------- real data


@needs_real_data
def test_dolly_is_learnt_and_the_papers_other_files_are_scored(lab: Lab, tmp_path: Path) -> None:
    """SelfInst, Vicuna, and a file as of Super-NaturalInstructions, whose outputs are lists; the plan tells of all."""
    natural = [
        {
            "definition": "Count the animals.",
            "inputs": "A cat sat by a dog.",
            "output": ["two", "Two.", "There are 2."],
        },
        {"definition": "Name the colour.", "inputs": "The sky is blue.", "output": ["blue"]},
        {"definition": "Answer yes or no.", "inputs": "", "output": []},
    ]
    (tmp_path / "natural.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in natural))
    files = REAL / "instructions"
    some = parquet.read_table(files / "databricks-dolly-15k" / "train.parquet").slice(0, 100)
    parquet.write_table(some, tmp_path / "dolly.parquet")
    common = {"kind": "instruction_files", "scoring": {"max_tokens": 5, "seeds": [10]}, "evaluate": 3}
    same, model_at = {"kind": "same", "as": "dolly"}, str(REAL / "models" / "stories260K")
    data: dict[str, Any] = {
        "dolly": {**common, "train": str(tmp_path / "dolly.parquet"), "columns": {"context": "context"}, "examples": 8,
                  "tokenizer": {"kind": "pretrained", "name": model_at}},
        "self_inst": {**common, "test": str(files / "self_instruct_user_oriented" / "test.parquet"), "tokenizer": same,
                      "columns": {"context": "input", "response": "output"}},
        "vicuna": {**common, "test": str(files / "vicuna_bench" / "test.parquet"), "tokenizer": same, "columns": {"response": "answer_gpt35"}},
        "natural": {**common, "test": str(tmp_path / "natural.jsonl"), "tokenizer": same,
                    "columns": {"prompt": "definition", "context": "inputs", "response": "output"}},
    }  # fmt: skip
    others = {name: TypeAdapter[Any](Data).validate_python(value) for name, value in data.items()}
    sets = {name: prepare(one, str(tmp_path / "data"), others) for name, one in others.items()}
    found = {f"data:{name}": one.fingerprint for name, one in sets.items()}
    found |= {"model:m": build.weights_fingerprint(model_at, None)}
    home = Lab(tmp_path, found, data)
    further = ["self_inst", "vicuna", "natural"]
    learn = phase("m", {"h": hard("m")}, streams={"main": {"data": "dolly"}}, eval_only=further, evaluate=[1])
    learn |= {"budget": {"steps": 2}, "batch": 4, "optimizer": {"lr": 1e-4}}
    spec = home.spec({"models": {"m": {"pretrained": model_at}}, "phases": {"learn": learn}})
    lines = preview._data(spec, sets)
    reported = {name: next(line for line in lines if line.startswith(f"{name}: ")) for name in data}
    assert reported["self_inst"].startswith("self_inst: test 3 exchanges; alpaca template; ")
    assert (
        "rows left out: 82 with a prompt over 256 tokens" in reported["self_inst"]
        and "train 8 exchanges, dev 3 " in reported["dolly"]
    )
    assert reported["natural"].startswith(
        "natural: test 2 exchanges; scored against the best of up to 3 references; alpaca template; 0.0% of the replies cut"
    )
    assert "rows left out: 1 with an empty reply" in reported["natural"]
    shown = [line for line in lines if line.startswith("natural, an example: ")]
    assert len(shown) == 2 and shown[0].endswith("### Response: «two</s>»")
    assert all(any(line.startswith(f"{name}, an example: ") for line in lines) for name in data)
    ran = home.run(spec)
    recorded = {
        (r["task"], r["metric"]): r["value"] for r in ran.records if r["split"] == "test" and r["progress"] == 1
    }
    net = restored(ran, "learn", "m")
    for name in data:
        expected = by_hand(net, sets[name])
        assert {m: recorded[name, m] for m in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4), name
    stored = home.store.examples(ran.phases["learn"]["key"])
    assert stored.groupby("task").size().to_dict() == {"dolly": 3, "self_inst": 3, "vicuna": 3, "natural": 2}
