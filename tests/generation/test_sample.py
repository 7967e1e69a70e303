"""Replies: batched ones against transformers' own, one prompt at a time; draws against the probabilities; two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.config.data import Sampling
from trainables.config.models import Model
from trainables.config.phase import Interleaved
from trainables.generation import sample as sample_
from trainables.generation import speculative
from trainables.generation.context import Generation, GenerationContext, GenerationError
from trainables.generation.kv_cache import CachedModel, check, left_padded, prefill
from trainables.generation.sample import _descending, draw, uniform_streams
from trainables.models.build import build

VOCAB, PAD, END = 61, 0, 2
FAMILIES = {"gpt2": {}, "llama": {}, "qwen3": {}, "mistral": {"sliding_window": 4}, "bloom": {}}
HOW: dict[str, Any] = {"end_ids": (END,), "pad_id": PAD, "vocab_size": VOCAB, "seed": 5, "device": "cpu"}


def make(family: str, *, seed: int = 0, vocab_size: int = VOCAB, length: int = 64, dropout: float = 0.0) -> Any:
    shape: dict[str, Any] = {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "intermediate_size": 32,
        "config": FAMILIES.get(family, {}),
    }
    lacks = {"bloom": ("intermediate_size",), "mamba": ("heads", "dropout")}.get(family, ())
    shape |= {"family": family, "dropout": dropout, "init": {"kind": "random", "std": "width"}}
    model = Model.model_validate({key: value for key, value in shape.items() if key not in lacks})
    special = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END}
    return build(model, name="m", seed=seed, vocab_size=vocab_size, special_ids=special, length=length).eval()


def some_prompts(*lengths: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, length).astype(np.int32) for length in lengths]


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the context in a value, the others as they are."""
    own = {name: value for name, value in arguments.items() if name in GenerationContext.__dataclass_fields__}
    others = {name: value for name, value in arguments.items() if name not in own}
    return {"context": GenerationContext(**own), **others}


def sample(net: Any, prompts: Any, how: Sampling, **more: Any) -> Generation:
    return sample_.sample(net, prompts, how, **given(more))


def interleave(draft: Any, teacher: Any, prompts: Any, how: Interleaved, **more: Any) -> Generation:
    return speculative.interleave((draft, teacher), prompts, how, **given(more))


def lists(drawn: Generation) -> list[list[int]]:
    return [reply.tolist() for reply in drawn.replies]


PROMPTS = some_prompts(3, 11, 1, 6, 6, 2, 9)


# ---------------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_reply_in_a_batch_equals_transformers_own_reply_to_the_prompt(family: str) -> None:
    net = make(family)
    together = sample(net, PROMPTS, Sampling(max_tokens=14), greedy=True, **HOW)
    assert len({token for reply in lists(together) for token in reply}) > 5  # no constant
    for prompt, reply in zip(PROMPTS, together.replies, strict=True):
        ids_BT = torch.tensor(prompt, dtype=torch.long)[None]
        theirs = net.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        assert reply.tolist() == theirs[0, len(prompt) :].tolist() and reply.dtype == np.int32
        assert reply.tolist() == lists(sample(net, [prompt], Sampling(max_tokens=14), greedy=True, **HOW))[0]


def test_replies_end_with_the_end_token_and_rows_that_ended_are_no_longer_computed() -> None:
    net = make("llama")
    whole = sample(net, PROMPTS, Sampling(max_tokens=40), greedy=True, **{**HOW, "end_ids": (VOCAB,)})
    end = max(range(VOCAB), key=lambda token: sum(token in reply for reply in lists(whole)))
    ending = sample(net, PROMPTS, Sampling(max_tokens=40), greedy=True, **{**HOW, "end_ids": (end,)})
    wanted = [reply[: reply.index(end) + 1] if end in reply else reply for reply in lists(whole)]
    assert lists(ending) == wanted
    assert 0 < sum(end not in reply for reply in wanted) < len(wanted)
    # prompts are read in parts of similar lengths: 1 and 2, 3 and 6, 6 and 9, 11
    assert ending.num_tokens < whole.num_tokens == 2 * 2 + 2 * 6 + 2 * 9 + 11 + len(PROMPTS) * 39


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prompts_read_in_parts_leave_what_reading_them_at_once_leaves(family: str) -> None:
    net, prompts = make(family), sorted(PROMPTS, key=len)
    context = GenerationContext((END,), PAD, VOCAB, "cpu")
    reading, logits_BV = prefill(net, prompts, context)
    plain = CachedModel(net, VOCAB)
    ids_BT, mask_BT = left_padded(prompts, context)
    torch.testing.assert_close(logits_BV, plain.read(ids_BT, mask_BT, 1)[:, 0])
    assert reading.mask_BT is not None and torch.equal(reading.mask_BT, mask_BT)
    is_token_B1T1 = mask_BT[:, None, :, None]
    for layer, other in zip(reading.cache.layers, plain.cache.layers, strict=True):
        for states, others in ((layer.keys, other.keys), (layer.values, other.values)):
            torch.testing.assert_close(states * is_token_B1T1, others * is_token_B1T1)
            assert states.isfinite().all()  # 0 times what is masked is no number where that is none
    assert reading.num_tokens < plain.num_tokens == ids_BT.numel()


# ----------------------------------------------------------------------------------------------------------------- draws


def expected(logits_V: Tensor, how: Sampling) -> NDArray[np.float64]:
    """Probabilities after temperature, top_k and top_p, from their definition."""
    weights = np.exp(np.asarray(logits_V.double()) / how.temperature)
    order = np.argsort(-weights)[: how.top_k]
    kept, held = [], 0.0
    for token in order:
        kept.append(token)
        held += weights[token] / weights[order].sum()
        if held >= how.top_p:
            break
    found = np.zeros_like(weights)
    found[kept] = weights[kept] / weights[kept].sum()
    return found


CASES = [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8}]


def distance(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Chi-squared over its degrees of freedom: near 1 if they fit."""
    possible = probabilities > 0
    if counts[~possible].any():
        return float("inf")
    wanted = counts.sum() * probabilities[possible]
    return float(((counts[possible] - wanted) ** 2 / wanted).sum() / max(possible.sum() - 1, 1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(case: dict[str, Any]) -> None:
    net, how = make("llama", vocab_size=12), Sampling(max_tokens=1, **case)
    prompt = np.array([3, 7, 4], np.int32)
    with torch.no_grad():
        logits_V = net(torch.tensor(prompt, dtype=torch.long)[None]).logits[0, -1]
    drawn = sample(net, [prompt] * 3000, how, **{**HOW, "vocab_size": 12, "end_ids": (11,)})
    counts = np.bincount([reply[0] for reply in drawn.replies], minlength=12)
    fit = {str(other): distance(counts, expected(logits_V, Sampling(max_tokens=1, **other))) for other in CASES}
    assert fit[str(case)] < 2.5
    assert all(far > 10 for other, far in fit.items() if other != str(case)), fit


def test_a_draw_is_never_a_token_without_probability() -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    uniforms_B = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(logits_BV, uniforms_B, Sampling()).tolist() == [1, 3, 3]
    for how in (Sampling(top_k=1), Sampling(top_p=0.3)):
        assert draw(logits_BV, uniforms_B, how).tolist() == [1, 3, 3]  # both are the likeliest
    assert Sampling.model_validate({"top_k": 0}) == Sampling()  # none are left out


def test_the_sort_of_numpy_is_that_of_torch() -> None:
    values_BV = torch.randn((5, 300), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_descending(values_BV), values_BV.sort(descending=True).values)


def test_a_reply_depends_on_seed_and_number_and_not_on_who_is_in_the_batch() -> None:
    net, how = make("llama"), Sampling(max_tokens=12, temperature=1.3)
    whole = lists(sample(net, PROMPTS, how, **HOW))
    for rows in (1, 2, 5):
        assert lists(sample(net, PROMPTS, how, rows=rows, **HOW)) == whole
    parts = [lists(sample(net, PROMPTS[a:b], how, first=a, **HOW)) for a, b in ((0, 3), (3, 7))]
    assert parts[0] + parts[1] == whole
    assert lists(sample(net, PROMPTS, how, **{**HOW, "seed": 6})) != whole
    assert whole[3] != lists(sample(net, [PROMPTS[3]], how, **HOW))[0]  # another number
    longer = lists(sample(net, PROMPTS, how.model_copy(update={"max_tokens": 30}), **HOW))
    assert [reply[:12] for reply in longer] == whole


def test_rows_of_padding_in_the_head_are_never_drawn() -> None:
    net = make("llama", vocab_size=32)
    with torch.no_grad():
        net.get_output_embeddings().weight[20:] *= 30
        logits_V = net(torch.tensor([[3, 4]])).logits[0, -1]
    assert logits_V.argmax() >= 20
    prompts = [np.array([3, 4], np.int32)] * 20
    for greedy in (False, True):
        drawn = sample(net, prompts, Sampling(max_tokens=5), greedy=greedy, **{**HOW, "vocab_size": 20})
        assert max(token for reply in lists(drawn) for token in reply) < 20
    assert drawn.replies[0][0] == logits_V[:20].argmax()


# ------------------------------------------------------------------------------------------------------- limits and state


def test_a_reply_is_cut_where_the_models_positions_end() -> None:
    net = make("gpt2", length=16)
    drawn = sample(net, some_prompts(12, 4, 16), Sampling(max_tokens=10), **{**HOW, "end_ids": (VOCAB,)})
    assert [len(reply) for reply in drawn.replies] == [4, 10, 1]
    shorter = sample(net, some_prompts(12, 4, 16), Sampling(max_tokens=10), length=13, **{**HOW, "end_ids": (VOCAB,)})
    assert lists(shorter) == [reply[:num] for reply, num in zip(lists(drawn), (1, 9, 1), strict=True)]
    assert shorter.num_tokens < drawn.num_tokens
    with pytest.raises(
        GenerationError, match="prompt 1 has 17 tokens, but the gpt2 that is to answer has positions for 16"
    ):
        sample(net, some_prompts(3, 17), Sampling(max_tokens=10), **HOW)
    with pytest.raises(GenerationError, match="prompt 0 is empty"):
        sample(net, some_prompts(0, 3), Sampling(max_tokens=10), **HOW)
    with pytest.raises(GenerationError, match="unsupported for a mamba"):
        sample(make("mamba"), PROMPTS, Sampling(max_tokens=10), **HOW)
    mixed_layers = make("llama")
    mixed_layers.config.layer_types = ["conv", "full_attention"]  # as LFM2's, of which one keeps no tokens
    with pytest.raises(GenerationError, match="no standard KV cache"):
        check(mixed_layers)
    assert sample(net, [], Sampling(), **HOW) == Generation((), 0)


def test_sampling_leaves_model_and_process_and_ignores_the_generation_config() -> None:
    wanted = lists(sample(make("llama"), PROMPTS, Sampling(max_tokens=8), **HOW))
    net = make("llama", dropout=0.5).train()
    net.gradient_checkpointing_enable()
    net.model.norm.eval()
    net.generation_config.update(temperature=9.0, max_length=3, forced_eos_token_id=7, top_k=1, repetition_penalty=5.0)
    modes, state = [module.training for module in net.modules()], torch.random.get_rng_state()
    assert lists(sample(net, PROMPTS, Sampling(max_tokens=8), **HOW)) == wanted
    assert [module.training for module in net.modules()] == modes and torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    net(torch.tensor([[3, 4, 5]]), use_cache=False).logits.sum().backward()  # what was cached bars no training


def test_generation_runs_under_the_autocast_that_it_is_given() -> None:
    net, seen = make("qwen3"), set[torch.dtype]()
    net.get_output_embeddings().register_forward_hook(lambda _m, _a, output: seen.add(output.dtype))
    under = {**HOW, "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16)}
    drawn = sample(net, PROMPTS, Sampling(max_tokens=8), **under)
    assert seen == {torch.bfloat16} and all(0 < len(reply) <= 8 for reply in drawn.replies)
    both = interleave(net, make("gpt2"), PROMPTS, mixed(top=2, max_tokens=8), **under)
    assert all(0 < len(reply) <= 8 for reply in both.replies)


# ------------------------------------------------------------------------------------------------------------ two models


def mixed(**parts: Any) -> Interleaved:
    return Interleaved.model_validate({"kind": "interleaved", "draft": "a", "teacher": "b", "max_tokens": 17, **parts})


@torch.no_grad()
def plainly(draft: Any, teacher: Any, prompt: Sequence[int], number: int, how: Interleaved, room: int) -> list[int]:
    """The algorithm as it is told: one prompt, no cache, all read again for every token."""
    own, others = (
        uniform_streams(HOW["seed"], name, [number], num=how.max_tokens, device="cpu")[0]
        for name in ("draw", "teacher")
    )
    of_teacher = Sampling(temperature=how.teacher_temperature, top_p=how.teacher_top_p)
    prompt, reply = list(prompt), list[int]()
    while len(reply) < room and END not in reply:
        proposed = list[int]()
        while len(proposed) < how.block and len(reply + proposed) < room and END not in proposed:
            logits_BV = draft(torch.tensor([prompt + reply + proposed])).logits[:, -1]
            proposed.append(int(draw(logits_BV, own[[len(reply + proposed)]], how)))
        logits_TV = teacher(torch.tensor([prompt + reply + proposed[:-1]])).logits[0, len(prompt + reply) - 1 :]
        for token, logits_V in zip(proposed, logits_TV, strict=True):
            if token not in logits_V.topk(min(how.top, VOCAB)).indices:
                reply.append(int(draw(logits_V[None], others[[len(reply)]], of_teacher)))
                break
            reply.append(token)
    return reply


@pytest.mark.parametrize(
    ("draft", "teacher", "how"),
    [
        ("gpt2", "llama", {"top": 20}),
        ("llama", "qwen3", {"top": 40, "block": 3, "temperature": 0.7, "top_p": 0.9, "teacher_temperature": 2.0}),
        ("mistral", "gpt2", {"top": 10, "block": 4, "teacher_top_p": 0.5}),
        ("bloom", "mistral", {"top": 30, "block": 6, "top_k": 20}),
    ],
    ids=str,
)
def test_interleaved_replies_on_caches_equal_those_of_the_plain_algorithm(
    draft: str, teacher: str, how: dict[str, Any]
) -> None:
    nets, spec = (make(draft, length=24), make(teacher, seed=1, length=24)), mixed(**how)
    prompts = [*PROMPTS, *some_prompts(22, 24)]
    together = interleave(*nets, prompts, spec, **HOW)
    limits = [getattr(net.config, "max_position_embeddings", 10**9) for net in nets]
    room = [max(1, min(17, min(limits) - len(prompt))) for prompt in prompts]
    wanted = [plainly(*nets, p.tolist(), i, spec, room[i]) for i, p in enumerate(prompts)]
    assert lists(together) == wanted
    assert lists(interleave(*nets, prompts, spec, rows=2, **HOW)) == wanted
    assert lists(interleave(*nets, prompts[4:], spec, first=4, **HOW)) == wanted[4:]
    assert lists(interleave(*nets, prompts, spec.model_copy(update={"block": 1}), **HOW)) == wanted
    alone = lists(sample(nets[0], prompts, Sampling(**{k: getattr(spec, k) for k in Sampling.model_fields}), **HOW))
    assert alone != wanted  # the teacher has a say


def test_a_teacher_that_accepts_all_leaves_the_drafts_own_replies() -> None:
    draft, teacher, how = make("gpt2"), make("llama", seed=1), mixed(top=VOCAB, max_tokens=10)
    both = interleave(draft, teacher, PROMPTS, how, **HOW)
    assert lists(both) == lists(sample(draft, PROMPTS, Sampling(max_tokens=10), **HOW))
    never = interleave(draft, teacher, some_prompts(6, 6, 6), how, **{**HOW, "end_ids": (VOCAB,)})
    assert (never.num_tokens, never.teacher_tokens) == (3 * (6 + 9), 3 * (6 + 9))


def test_a_teacher_that_accepts_its_first_choice_only_writes_all_of_it() -> None:
    draft, teacher = make("gpt2"), make("llama", seed=1)
    both = interleave(draft, teacher, PROMPTS, mixed(top=1, teacher_temperature=1e-4, max_tokens=12), **HOW)
    assert lists(both) == lists(sample(teacher, PROMPTS, Sampling(max_tokens=12), greedy=True, **HOW))
    assert both.num_tokens > 1.5 * sample(draft, PROMPTS, Sampling(max_tokens=12), **HOW).num_tokens  # thrown away
