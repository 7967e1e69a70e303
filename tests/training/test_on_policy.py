"""Replies that models generate: how often, by which model, and which are kept; on one rank and on several."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from tests.support.trials import STEADY, Lab, answering, interleaved, sampled
from trainables.config.models import Model
from trainables.config.phase import ReplySource
from trainables.config.session import SingleProcess
from trainables.config.value import random_stream
from trainables.data.instructions.packing import ExchangeBatch
from trainables.generation.context import Generation, GenerationContext
from trainables.models import build
from trainables.training import on_policy

END, PAD, VOCAB = 1, 0, 40
ADAPTER: TypeAdapter[Any] = TypeAdapter(ReplySource)


def made_of(**value: Any) -> Any:
    return ADAPTER.validate_python({"kind": "sampled", "by": "m", "max_tokens": 6, **value})


def batch_of(indices: list[int]) -> ExchangeBatch:
    """Prompts by which an exchange is told from others."""
    prompts = tuple(np.array([2, 3 + index % 30, 4 + index // 30], np.int32) for index in indices)
    return ExchangeBatch(prompts, tuple(np.array([5, END], np.int32) for _ in indices), 12, PAD)


def at(
    step: int,
    *,
    of: int = 100,
    nets: Any = None,
    session: Any = None,
    seed: int = 0,
    phase: str = "distil",
    stream: str = "main",
) -> on_policy.StepContext:
    return on_policy.StepContext(
        nets or {"m": None},
        GenerationContext((END,), PAD, VOCAB, "cpu", length=12),
        session or SingleProcess(),
        progress=step / of,
        seed_of=lambda purpose: random_stream(seed, purpose, phase, stream, step),
        within_memory=lambda draw: draw(64),
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`sample` gives every reply a number of its own; the numbers of prompts of each call."""
    calls: list[int] = []

    def count(net: Any, prompts: Any, how: Any, context: Any, **more: Any) -> Generation:
        calls.append(len(prompts))
        numbers = [1000 * len(calls) + i for i in range(len(prompts))]
        return Generation(tuple(np.array([10, number, END], np.int32) for number in numbers), 7 * len(prompts))

    monkeypatch.setattr(on_policy, "sample", count)
    return calls


def read(spec: Any, state: on_policy.ReplyState, step: int, indices: list[int], **more: Any) -> tuple[Any, Any]:
    return on_policy.replace_replies(spec, state, batch_of(indices), indices, context=at(step, **more))


def numbers(batch: ExchangeBatch) -> list[int]:
    return [int(reply[1]) for reply in batch.replies]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_steps_is_made_by_the_streams_own_draw(drawn: list[int], share: float) -> None:
    spec = made_of(share=share)
    found = {}
    for stream in ("main", "side"):
        state = on_policy.new_state()
        found[stream] = [bool(read(spec, state, step, [0, 1], stream=stream)[1]) for step in range(400)]
        assert state["steps"] == 400 and state["generated_steps"] == sum(found[stream])
    assert sum(found["main"]) == pytest.approx(400 * share, abs=40)  # four standard deviations
    assert (found["main"] == found["side"]) == (share != 0.5)
    again = [bool(read(spec, on_policy.new_state(), step, [0, 1])[1]) for step in range(400)]
    assert again == found["main"]  # of the step, and of no step before it


def test_a_larger_share_makes_the_steps_of_a_smaller_one_and_more(drawn: list[int]) -> None:
    """One draw decides: arms that differ by their share differ at no other step."""
    found = []
    for share in (0.3, 0.7):
        spec = made_of(share=share)
        state = on_policy.new_state()
        found.append({step for step in range(100) if read(spec, state, step, [0])[1]})
    assert found[0] < found[1]


def test_a_scheduled_share_follows_the_budget(drawn: list[int]) -> None:
    spec = made_of(share={"kind": "linear", "start": 0, "end": 1})
    state = on_policy.new_state()
    is_made = [bool(read(spec, state, step, [0], of=400)[1]) for step in range(400)]
    assert sum(is_made[:100]) < 30 and sum(is_made[300:]) > 70


@pytest.mark.parametrize("fresh", ["decreasing", "constant", "increasing"])
def test_what_is_kept_is_the_last_replies_and_never_more(drawn: list[int], fresh: str) -> None:
    spec = made_of(replay={"size": 5, "fresh": fresh})
    state, all_of_them, is_fresh = on_policy.new_state(), list[int](), list[bool]()
    for step in range(200):
        batch, computed = read(spec, state, step, [2 * step % 60, (2 * step + 1) % 60], of=200)
        is_fresh.append(bool(computed))
        if computed:
            assert computed == {"m": 14}
            all_of_them += numbers(batch)
        else:
            kept = {(tuple(prompt), reply[1]) for prompt, reply in state["kept"]}
            again = [(tuple(p.tolist()), n) for p, n in zip(batch.prompts, numbers(batch), strict=True)]
            assert set(again) <= kept and len(set(again)) == 2  # with the prompts to which they were given
        assert [reply[1] for _, reply in state["kept"]] == all_of_them[-5:]
    assert is_fresh[:3] == [True] * 3  # until five are there
    assert state["replies"] == len(all_of_them) and state["generated_steps"] == 200
    early, late = sum(is_fresh[3:53]), sum(is_fresh[150:])
    assert {"decreasing": early > 35 and late < 15, "increasing": early < 15 and late > 35, "constant": abs(early - late) < 20}[fresh]  # fmt: skip


def test_once_computes_only_what_was_never_answered(drawn: list[int]) -> None:
    spec = made_of(once=True)
    state = on_policy.new_state()
    first, computed = read(spec, state, 0, [4, 7, 9])
    assert computed == {"m": 21} and drawn == [3]
    second, computed = read(spec, state, 1, [7, 5, 4])
    assert computed == {"m": 7} and drawn == [3, 1]
    assert numbers(second) == [numbers(first)[1], 2000, numbers(first)[0]]
    _, computed = read(spec, state, 2, [9, 5])
    assert computed == {} and drawn == [3, 1] and state["replies"] == 4


def test_replies_are_cut_to_the_room_and_counted_as_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = (np.array([9] * 8 + [END], np.int32), np.array([9] * 9 + [END], np.int32), np.array([9], np.int32))

    def cut(_net: Any, prompts: Any, _how: Any, context: GenerationContext, **_more: Any) -> Generation:
        assert context.length is not None
        return Generation(
            tuple(end[: context.length - len(prompt)] for end, prompt in zip(ends, prompts, strict=True)), 5
        )

    monkeypatch.setattr(on_policy, "sample", cut)
    spec = made_of()
    state = on_policy.new_state()
    batch, _ = read(spec, state, 0, [0, 1, 2])
    assert [len(p) + len(r) for p, r in zip(batch.prompts, batch.replies, strict=True)] == [12, 12, 4]
    assert [int(reply[-1]) for reply in batch.replies] == [END, 9, 9]
    reported = on_policy.take_counts(state)
    assert reported == {"made_share": 100, "unfinished": pytest.approx(200 / 3), "reply_tokens": pytest.approx(19 / 3)}
    assert on_policy.take_counts(state) == {}  # since the last time
    assert {type(value) for value in state.values()} <= {int, dict, list}  # a checkpoint reads no other


# -------------------------------------------------------------------------------------------------------- several ranks


def tiny(name: str, **more: Any) -> Any:
    value = Model.model_validate({"family": "gpt2", "layers": 1, "width": 16, "heads": 2, "dropout": 0, **more})
    return build.build(value, name=name, seed=0, vocab_size=VOCAB, special_ids={"eos_token_id": END}, length=12).eval()


@pytest.mark.parametrize("which", ["sampled", "once", "interleaved"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_prompts_and_all_get_the_replies_of_one(which: str, world: int) -> None:
    nets = {"m": tiny("m"), "t": tiny("t", width=32)}
    spec = made_of(once=True) if which == "once" else made_of()
    if which == "interleaved":
        spec = ADAPTER.validate_python({"kind": "interleaved", "draft": "m", "teacher": "t", "max_tokens": 6, "top": 5})
    batches = [list(range(8)), [1, 20, 21, 3, 22, 5, 23, 7]]

    def all_of(rank: int, world: int, gather: Callable[[Any], list[Any]]) -> Any:
        state, found = on_policy.new_state(), []
        session = SingleProcess()
        session.rank, session.world, session.gather = rank, world, gather  # type: ignore[method-assign]
        own = copy.deepcopy(nets)
        for step, indices in enumerate(batches):
            batch, computed = read(spec, state, step, indices, nets=own, session=session)
            found.append(([reply.tolist() for reply in batch.replies], computed))
        return found, state

    alone, state = all_of(0, 1, lambda value: [value])
    reported: dict[int, Any] = {}
    meet, box = threading.Barrier(world), dict[int, Any]()

    def of_rank(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            meet.wait()
            box[rank] = value
            meet.wait()
            return [box[other] for other in range(world)]

        reported[rank] = all_of(rank, world, gather)

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(reported) == world
    for found, state_there in reported.values():
        assert [replied for replied, _ in found] == [replied for replied, _ in alone]
        assert state_there == state
        assert found == reported[0][0]  # what was computed, too: FLOPs are over all ranks


def test_the_draws_are_those_of_seed_phase_stream_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def note(net: Any, prompts: Any, how: Any, context: Any, **more: Any) -> Generation:
        seeds.append(more["seed"])
        return Generation(tuple(np.array([END], np.int32) for _ in prompts), 1)

    monkeypatch.setattr(on_policy, "sample", note)
    spec = made_of()
    for step, more in ((0, {}), (1, {}), (0, {"seed": 1}), (0, {"stream": "side"}), (0, {"phase": "other"}), (0, {})):
        read(spec, on_policy.new_state(), step, [0], **more)  # type: ignore[arg-type]
    assert len(set(seeds)) == 5 and seeds[0] == seeds[-1] == random_stream(0, "sampling", "distil", "main", 0)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [sampled("student", share=0.6, replay={"size": 6}), interleaved()], ids=["replay", "interleaved"])  # fmt: skip
def test_two_processes_give_the_numbers_of_one(new_instructed_lab: Callable[[], Lab], streams: Any) -> None:
    from tests.support.ranks import run_on_ranks

    whole, lab = new_instructed_lab(), new_instructed_lab()
    trial = answering(streams=streams, optimizer=STEADY)
    trial["phases"]["teach"] |= {"optimizer": STEADY, "budget": {"steps": 4}}
    trial["phases"]["distil"]["terms"]["teacher_to_student"]["kind"] = "interpolated_kl"
    expected = whole.run(whole.spec(trial))
    ran = replace(run_on_ranks(lab, lab.spec(trial), 2), phases=expected.phases)
    assert ran.values.keys() == expected.values.keys()
    for key, value in expected.values.items():
        if "rouge" not in key[4] and "agreement" not in key[4] and "accuracy" not in key[4]:
            assert ran.values[key] == pytest.approx(value, rel=2e-5), key
    theirs = expected.weights("distil", "student")
    for key, tensor in ran.weights("distil", "student").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=5e-6)
