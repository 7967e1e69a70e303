"""Width remaps: a model's tensors at another hidden size, number of heads, head size or inner layer.

An operator says for each space of `layouts.py` how new coordinates come from old ones, by two sparse matrices: B for
tensors that write to the space and R for tensors that read it. In every family

    W' = B_out · W · R_in + own · (1 - B_in · R_in)

The last part only ever meets zeros, so the target's own fresh weights may stand there, and copies learn apart. Outputs do
not change where R·B = 1 and every norm sees the same mean and mean square as before. (Net2Net,
arXiv 1511.05641; bert2BERT, 2110.07143; LEMON, 2310.07999; HyperCloning, 2409.12903; Gesmundo and Maile, 2308.06103.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainables.config.models import Width
from trainables.models import importance
from trainables.models.layouts import Shape, family_of, is_transposed, place_of, shape_of

COPIES: tuple[Width, ...] = ("replicate", "replicate_noise", "aki")
CHOICES: tuple[Width, ...] = ("select", "importance")
NOISE = 10 ** (-10 / 20)  # amplitude relative to the copied weights: 10 dB below (HyperCloning)


# ---------------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Pairs:
    """Which new coordinates (or heads) come from which old ones, with the factors of writing and reading."""

    num_new: int
    num_old: int
    new: Tensor  # [P]
    old: Tensor  # [P]
    write: Tensor  # [P] B[new, old]
    read: Tensor  # [P] R[old, new]

    @property
    def untouched(self) -> Tensor:
        """[num_new] whether a coordinate has no old one."""
        return ~torch.zeros(self.num_new, dtype=torch.bool).index_fill(0, self.new, True)

    @property
    def is_copy(self) -> Tensor:
        """[P] whether an earlier pair has the same old coordinate."""
        order = self.old.argsort(stable=True)
        again = self.old[order].diff(prepend=torch.tensor([-1])) == 0
        return torch.zeros_like(again).scatter(0, order, again)

    @property
    def is_identity(self) -> bool:
        kept = torch.arange(self.num_new)
        same = self.num_new == self.num_old == len(self.new) and self.new.equal(kept) and self.old.equal(kept)
        return same and bool((self.write == 1).all() and (self.read == 1).all())

    def back(self) -> Pairs:
        """Returns the inverse direction: undoes these pairs where they lose nothing."""
        return Pairs(self.num_old, self.num_new, self.old, self.new, self.read, self.write)

    def each(self, inner: Pairs) -> Pairs:
        """Heads by these pairs, the channels within each by `inner`."""
        return Pairs(
            self.num_new * inner.num_new,
            self.num_old * inner.num_old,
            (self.new[:, None] * inner.num_new + inner.new).flatten(),
            (self.old[:, None] * inner.num_old + inner.old).flatten(),
            (self.write[:, None] * inner.write).flatten(),
            (self.read[:, None] * inner.read).flatten(),
        )


def taking(sources: Sequence[int | None], num_old: int) -> Pairs:
    """Makes new coordinate i a copy of sources[i] (None: of no old one); readers of several copies share evenly."""
    new, old = torch.tensor([(i, j) for i, j in enumerate(sources) if j is not None]).unbind(1)
    count = old.bincount(minlength=num_old)[old]
    return Pairs(len(sources), num_old, new, old, torch.ones(len(old), dtype=torch.float64), 1 / count.double())


def fit(width: Width, num_old: int, num_new: int, score: Tensor | None = None) -> Pairs:
    """Coordinates without further structure: hidden channels, inner neurons. `score`: [num_old], for a choice."""
    if num_new >= num_old:
        return taking([i % num_old if width in COPIES or i < num_old else None for i in range(num_new)], num_old)
    if width in CHOICES:
        return taking(chosen(num_old, num_new, score), num_old)
    return fit(width, num_new, num_old).back()


def chosen(num_old: int, num_new: int, score: Tensor | None = None) -> list[int]:
    """Returns the best by score, in their order; without scores evenly spread (weight selection, arXiv 2311.18823)."""
    if score is not None:
        found = score.argsort(descending=True, stable=True)[:num_new].sort().values
    elif num_old % num_new == 0:
        found = torch.arange(0, num_old, num_old // num_new)
    else:
        found = torch.linspace(0, num_old - 1, num_new, dtype=torch.float64).round().long()
    return [int(i) for i in found]


def fit_heads(
    width: Width, old: tuple[int, int], new: tuple[int, int], score: Tensor | None = None
) -> tuple[Pairs, Pairs]:
    """Returns (query heads, key-value heads). `old`, `new`: numbers of both; `score`: [query heads], for a choice.

    Query head j reads key-value head j // group, before and after. So key-value heads come first, and the queries of each
    take the slots of all its copies.
    """
    (heads, kv_heads), (new_heads, new_kv_heads) = old, new
    group, new_group = heads // kv_heads, new_heads // new_kv_heads
    shrinks = old != new and new_heads <= heads and new_kv_heads <= kv_heads
    if shrinks and width not in CHOICES:
        queries, keys = fit_heads(width, new, old)
        return queries.back(), keys.back()
    kv_of: list[int | None]
    if new_kv_heads < kv_heads:
        kv_of = [*chosen(kv_heads, new_kv_heads, None if score is None else score.view(kv_heads, group).sum(1))]
    else:
        # without copies, further key-value heads serve only queries that need room
        num = new_kv_heads if width in COPIES else kv_heads * -(-group // new_group)
        kv_of = [i % kv_heads if i < num else None for i in range(new_kv_heads)]
    head_of: list[int | None] = [None] * new_heads
    for kv in range(kv_heads):
        slots = [i * new_group + j for i, which in enumerate(kv_of) if which == kv for j in range(new_group)]
        local = None if score is None else score[kv * group : (kv + 1) * group]
        wanted = range(group) if len(slots) >= group or not slots else chosen(group, len(slots), local)
        for number, slot in enumerate(slots):
            if number < len(wanted) or width in COPIES:
                head_of[slot] = kv * group + wanted[number % len(wanted)]
    return taking(head_of, heads), taking(kv_of, kv_heads)


def fit_channels(width: Width, old: int, new: int, *, is_rotary: bool) -> Pairs:
    """Channels within a head: padded, never copied, since no two rotary channels turn at one speed.

    Rotary channels i and i + size/2 turn together by base^(-2i/size): each pair goes to the pair of nearest speed, which
    is the same speed where one size is a multiple of the other.
    """
    if new < old:
        if width in CHOICES and not is_rotary:
            return taking(chosen(old, new), old)
        return fit_channels(width, new, old, is_rotary=is_rotary).back()
    if not is_rotary:
        return fit("zero_pad", old, new)
    found: list[int | None] = [None] * new
    for pair in range(old // 2):
        at = (2 * pair * new + old) // (2 * old)  # pair * new / old, rounded
        found[at], found[at + new // 2] = pair, pair + old // 2
    return taking(found, old)


# --------------------------------------------------------------------------------------------------------------- spaces


@dataclass(frozen=True)
class Space:
    """How a space of the source becomes the same space of the target."""

    pairs: Pairs
    fresh: Tensor  # [num_new] coordinates that nothing reads yet: tensors that write there keep their own weights
    has_mean: bool = False  # coordinates without an old one hold the mean of the old ones; else zero
    own: Literal["nothing", "untouched", "copies"] = (
        "nothing"  # where readers keep their own weights, which meet only zeros
    )
    from_next: bool = False  # copies are taken from the next layer
    gain: float = 1.0  # of its norms
    keeps_vectors: bool = False  # biases and gains keep their own entries at coordinates without an old one


def is_padded(width: Width, old: Shape, new: Shape) -> bool:
    """Returns whether hidden channels are padded, or padding is removed: gains of norms then scale by sqrt(old/new)."""
    grows, shrinks = new.hidden > old.hidden, new.hidden < old.hidden
    return (width in ("zero_pad", "mean_pad") and (grows or shrinks)) or (width in CHOICES and grows)


def spaces(
    width: Width, old: Shape, new: Shape, *, has_mean: bool, score: Mapping[str, Tensor] | None = None
) -> dict[str, Space]:
    """Returns all spaces of a layer. `has_mean`: of padded channels; `score`: of `x`, `q` and `inner`, for select and
    importance."""
    score = score or {}

    def space(pairs: Pairs, **more: Any) -> Space:
        fresh = pairs.untouched & (width != "prefix")
        own: Literal["nothing", "copies"] = "copies" if width == "replicate_noise" else "nothing"
        return replace(Space(pairs, fresh, own=own, from_next=width == "aki", keeps_vectors=width == "prefix"), **more)

    x = space(fit(width, old.hidden, new.hidden, score.get("x")), fresh=torch.zeros(new.hidden, dtype=torch.bool))
    if is_padded(width, old, new):
        x = replace(x, has_mean=has_mean, own="untouched", gain=math.sqrt(old.hidden / new.hidden))
    numbers = (old.heads, old.kv_heads), (new.heads, new.kv_heads)
    heads, kv_heads = fit_heads(width, *numbers, score.get("q"))
    turning, still = (
        fit_channels(width, old.head_size, new.head_size, is_rotary=rotary) for rotary in (old.is_rotary, False)
    )
    queries = heads.each(turning)
    is_plain = width == "prefix" or (width in CHOICES and new.head_size < old.head_size)  # as published: no rescaling
    if old.is_scaled and not is_plain:
        queries = replace(queries, write=queries.write * math.sqrt(new.head_size / old.head_size))
    keys = space(kv_heads.each(turning))
    in_fresh_head = kv_heads.untouched.repeat_interleave(new.head_size)
    return {
        "x": x,
        "q": space(queries),
        "k": replace(keys, fresh=keys.fresh & in_fresh_head),  # the others are zero, so that new queries meet nothing
        "v": space(kv_heads.each(still)),
        "o": space(heads.each(still)),
        "inner": space(fit(width, old.inner, new.inner, score.get("inner"))),
    }


def written(space: Space, old: Tensor, own: Tensor, following: Tensor | None = None) -> Tensor:
    """Returns a tensor that writes to the space, [new, …] from [old, …]. `own`: [new, …]; `following`: of the next
    layer."""
    pairs = space.pairs
    if pairs.is_identity:
        return old
    rows = old[pairs.old]
    if space.from_next and following is not None:
        rows = torch.where(_column(pairs.is_copy, rows), following[pairs.old], rows)
    found = torch.zeros_like(own).index_add_(0, pairs.new, rows * _column(pairs.write.to(rows), rows))
    if space.has_mean:
        found[pairs.untouched] = old.mean(0)
    found[space.fresh] = own[space.fresh]
    return found


def read(space: Space, old: Tensor, own: Tensor | None = None) -> Tensor:
    """Returns a tensor that reads the space, […, new] from […, old]. `own`: […, new], kept where it meets only zeros."""
    pairs = space.pairs
    if pairs.is_identity:
        return old
    found = _spread(old, pairs.old, pairs.new, weight=pairs.read, size=pairs.num_new)
    return found if own is None else found + unseen(space, own, found)


def unseen(space: Space, own: Tensor, beside: Tensor) -> Tensor:
    """Computes own · (1 - B·R), […, new]: unchanged at coordinates without an old one; over copies at NOISE of the copies `beside`."""
    pairs = space.pairs
    if pairs.is_identity or space.own == "nothing":
        return torch.zeros_like(own)
    seen = _spread(own, pairs.new, pairs.old, weight=pairs.write, size=pairs.num_old)
    rest = own - _spread(seen, pairs.old, pairs.new, weight=pairs.read, size=pairs.num_new)
    if space.own == "untouched":
        return rest * pairs.untouched
    rest = rest * ~pairs.untouched
    copied = beside[..., pairs.new[pairs.read < 1]]
    amplitude: Tensor = NOISE * copied.norm() / rest.norm().clamp_min(1e-30)
    return rest * amplitude


def _spread(tensor: Tensor, source: Tensor, target: Tensor, *, weight: Tensor, size: int) -> Tensor:
    """Adds weighted columns `source` up at columns `target`, […, size]."""
    found = tensor.new_zeros(*tensor.shape[:-1], size)
    return found.index_add_(-1, target, tensor[..., source] * weight.to(tensor))


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (like.ndim - 1))


# -------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Resizing:
    """How one model becomes as wide as another: applied to one tensor at a time by `resize`."""

    family: str
    layers: str  # prefix of the layers in the state dict
    spaces: tuple[Mapping[str, Space], ...]  # by layer of the source
    gains: Mapping[str, float]  # factors of norms' gains by path, where they differ from that of the space
    is_tied: bool  # the target's head is its embeddings
    is_transposed: bool  # weights are [reads, writes]


def plan_resizing(width: Width, source: Any, target: Any, layers: str) -> Resizing:
    """Returns how `source` becomes as wide as `target`, both of one family of LAYOUTS. `layers`: their prefix."""
    old, new = shape_of(source.config), shape_of(target.config)
    is_centred = any(isinstance(module, nn.LayerNorm) for module in source.modules())
    has_mean = width == "mean_pad" or (width in CHOICES and is_centred)
    if width == "importance":
        scores = importance.scores(source, layers)
        found = tuple(spaces(width, old, new, has_mean=has_mean, score=score) for score in scores)
    else:
        found = (spaces(width, old, new, has_mean=has_mean),) * source.config.num_hidden_layers
    gains = {}
    if width == "importance" and new.hidden < old.hidden:
        gains = importance.shares(source, found[0]["x"].pairs.old)
    return Resizing(
        family=family_of(source.config),
        layers=layers,
        spaces=found,
        gains=gains,
        is_tied=target.config.tie_word_embeddings and target.get_output_embeddings() is not None,
        is_transposed=any(is_transposed(module) for module in source.modules()),
    )


def resize(how: Resizing, name: str, old: Tensor, own: Tensor, *, following: Tensor | None) -> Tensor:
    """Returns the source's tensor `name` at the target's width. `own`: the target's; `following`: of the source's next
    layer."""
    place = place_of(how.family, name)
    assert place is not None, name
    layer = name.removeprefix(how.layers).partition(".")[0] if name.startswith(how.layers) else "0"
    found = how.spaces[int(layer)]
    match place:
        case "table":
            return with_own_rows(written(found["x"], old.t(), own.new_zeros(own.shape[1], len(old))).t(), own)
        case "head":
            return old if old.ndim == 1 else read(found["x"], old, own)
        case "norm" | "last norm":
            return _norm(how, found["x"], name, old, own=own, is_last=place == "last norm")
    writes, _, reads = place.partition(" <- ")
    fused = writes.split()
    turned = how.is_transposed and old.ndim == 2
    matrices = [side.t() if turned and side is not None else side for side in (old, own, following)]
    pieces = [[None] * len(fused) if side is None else side.chunk(len(fused)) for side in matrices]
    whole = torch.cat([_linear(found[to], found[reads], three) for to, *three in zip(fused, *pieces, strict=True)])
    return whole.t() if turned else whole


def with_own_rows(old: Tensor, own: Tensor) -> Tensor:
    """Returns a table with as many rows as the target's; rows that only the target has (positions) are its own."""
    return torch.cat([old[: len(own)], own[len(old) :]])


def _linear(writes: Space, reads: Space, tensors: Sequence[Any]) -> Tensor:
    """Returns a weight [writes, reads] or a bias [writes]. `tensors`: old, the target's own, that of the next layer or
    None."""
    old, own, following = tensors
    if old.ndim == 1:
        fresh = writes.pairs.untouched if writes.keeps_vectors else writes.fresh
        return written(replace(writes, fresh=fresh), old, own, following)
    found = written(writes, read(reads, old), own, None if following is None else read(reads, following))
    return found + unseen(reads, own, found) * ~writes.fresh[:, None]


def _norm(how: Resizing, x: Space, name: str, old: Tensor, *, own: Tensor, is_last: bool) -> Tensor:
    """Returns a gain or a bias. In the last norm before a tied head, copies are divided here, elsewhere in their
    readers."""
    path, _, leaf = name.rpartition(".")
    pairs, is_gain = x.pairs, leaf == "weight"
    if is_last and how.is_tied:
        pairs = replace(pairs, write=pairs.read)
    fresh = pairs.untouched & (is_gain or x.keeps_vectors)
    return written(
        replace(x, pairs=pairs, fresh=fresh, has_mean=False), old * how.gains.get(path, x.gain) if is_gain else old, own
    )
