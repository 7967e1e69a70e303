"""Replies that models make for a stream in place of those of the data: when, by whom, and which are read again."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainables.config.phase import Interleaved, Made, Sampled
from trainables.config.value import random_stream
from trainables.data.instructions.packing import ExchangeBatch
from trainables.generation.sample import Generation, sample
from trainables.generation.speculative import interleave
from trainables.training.controllers import fresh_share, share_at

State = dict[str, Any]  # of one stream, in the checkpoint: plain numbers and lists


class Step(NamedTuple):
    """Where a step is, and what made replies are a function of beside the weights."""

    seed: int
    phase: str
    stream: str
    step: int
    progress: float  # of the budget, 0 … 1


class GenerationContext(NamedTuple):
    """The models by name, how they are called, and the ranks, of which each answers its part of a batch."""

    nets: Mapping[str, Any]
    end_id: int
    pad_id: int
    vocab_size: int
    length: int  # of prompt and reply together
    device: str
    autocast: Callable[[], AbstractContextManager[Any]]
    rank: int
    world: int
    gather: Callable[[Any], list[Any]]  # of all ranks, in their order
    within_memory: Callable[
        [Callable[[int], Generation]], Generation
    ]  # calls it with as many prompts at a time as there is room for


def new_state(share: Mapping[str, Any]) -> State:
    """`share`: the state of what decides how often replies are made."""
    return {"share": dict(share), "kept": [], "answered": {}, **_COUNTS}


_COUNTS = {"steps": 0, "made_steps": 0, "replies": 0, "unfinished": 0, "tokens": 0}


def made(
    spec: Made, state: State, batch: ExchangeBatch, indices: list[int], at: Step, by: GenerationContext
) -> tuple[ExchangeBatch, dict[str, int]]:
    """The batch that the step reads, and how many tokens each model computed for it, over all ranks.

    In a share of the steps replies of models, fresh or out of what is kept; else those of the data. `indices`: the
    examples of the batch. Changes `state`. The same on all ranks.
    """
    chance = random.Random(random_stream(at.seed, "replies", at.phase, at.stream, at.step))
    share, drawn = share_at(spec.share, state["share"], at.progress), chance.random()
    state["steps"] += 1
    if drawn >= share:
        return batch, {}
    state["made_steps"] += 1
    if spec.replay is not None:
        is_full = len(state["kept"]) >= spec.replay.size
        if is_full and drawn >= share * fresh_share(spec.replay, at.progress):
            chosen = chance.sample(state["kept"], len(batch))
            prompts, replies = (tuple(np.asarray(one[k], np.int32) for one in chosen) for k in (0, 1))
            return replace(batch, prompts=prompts, replies=replies), {}
    if isinstance(spec, Sampled) and spec.once:
        return _answered(spec, state, batch, indices, at, by)
    replies, computed = _draw(spec, state, batch.prompts, at, by)
    if spec.replay is not None:
        fresh = [[prompt.tolist(), reply.tolist()] for prompt, reply in zip(batch.prompts, replies, strict=True)]
        state["kept"] = [*state["kept"], *fresh][-spec.replay.size :]
    return batch.with_replies(replies), computed


def counts(state: State) -> dict[str, float]:
    """What was made since the last time, as numbers to record: shares x 100, and tokens of a reply."""
    found = {"made_share": 100 * state["made_steps"] / state["steps"]} if state["steps"] else {}
    if state["replies"]:
        found["unfinished"] = 100 * state["unfinished"] / state["replies"]
        found["reply_tokens"] = state["tokens"] / state["replies"]
    state.update(_COUNTS)
    return found


def _answered(
    spec: Sampled, state: State, batch: ExchangeBatch, indices: list[int], at: Step, by: GenerationContext
) -> tuple[ExchangeBatch, dict[str, int]]:
    """Each prompt is answered the first time that it comes."""
    known: dict[int, list[int]] = state["answered"]
    new = [row for row, index in enumerate(indices) if index not in known]
    computed: dict[str, int] = {}
    if new:
        replies, computed = _draw(spec, state, tuple(batch.prompts[row] for row in new), at, by)
        known.update({indices[row]: reply.tolist() for row, reply in zip(new, replies, strict=True)})
    return batch.with_replies(tuple(np.asarray(known[index], np.int32) for index in indices)), computed


def _draw(
    spec: Made, state: State, prompts: tuple[NDArray[np.int32], ...], at: Step, by: GenerationContext
) -> tuple[tuple[NDArray[np.int32], ...], dict[str, int]]:
    """Each rank answers its share of the prompts; all get all of them."""
    low, high = (len(prompts) * rank // by.world for rank in (by.rank, by.rank + 1))
    how: dict[str, Any] = {
        "end_id": by.end_id,
        "pad_id": by.pad_id,
        "vocab_size": by.vocab_size,
        "seed": random_stream(at.seed, "sampling", at.phase, at.stream, at.step),
        "first": low,
        "length": by.length,
        "device": by.device,
        "autocast": by.autocast,
    }

    def draw(rows: int) -> Generation:
        if isinstance(spec, Interleaved):
            return interleave(by.nets[spec.draft], by.nets[spec.teacher], prompts[low:high], spec, rows=rows, **how)
        return sample(by.nets[spec.by], prompts[low:high], spec, rows=rows, **how)

    mine = [by.within_memory(draw)] if low < high else []
    everyone = [drawn for of_rank in by.gather(mine) for drawn in of_rank]
    replies = tuple(reply for drawn in everyone for reply in drawn.replies)
    state["replies"] += len(replies)
    state["unfinished"] += sum(int(reply[-1]) != by.end_id for reply in replies)
    state["tokens"] += sum(map(len, replies))
    computed = {spec.makers[0]: sum(drawn.num_tokens for drawn in everyone)}
    if isinstance(spec, Interleaved):
        computed[spec.teacher] = sum(drawn.teacher_tokens for drawn in everyone)
    return replies, computed
