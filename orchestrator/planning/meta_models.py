"""The shapes that a study can reach: each model made once, without memory, and run there to count what it would take.

Everything happens on torch's meta device, where a tensor has a shape and no content. What a real tensor would decide by
its device (which attention runs, what autocast casts) is decided here in its place; tests hold the counts to real ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig
from transformers.cache_utils import Cache, DynamicLayer

from orchestrator.scheduling.trials import strata
from orchestrator.study.schema import Study
from trainables.config import errors
from trainables.config.data import Sampling
from trainables.config.models import Model
from trainables.config.phase import How, Lora, Phase
from trainables.config.terms import Inner, reads
from trainables.config.trial import TrialSpec
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.data.prepared import Prepared
from trainables.generation.kv_cache import cache_name
from trainables.generation.sample import draw
from trainables.losses.chunked import LogitSource, chunked_terms
from trainables.losses.logits import kl
from trainables.models import build, lora, output_head, tokenizer_check
from trainables.training.forward import chunk, num_executed

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
T = TypeVar("T")


class Uncounted(Exception):
    """A model whose code cannot run without content (some mixtures of experts); nothing can be said of it."""


# --------------------------------------------------------------------------------------------------- trials of a study


@dataclass(frozen=True)
class ReachableTrial:
    """A trial that the study can ask for, and how."""

    spec: TrialSpec  # pruned
    name: str  # for people
    point: Mapping[str, Any]
    end: tuple[str, str] | None = None  # the sizes and the one axis besides, where a search brings it


def reachable(study: Study) -> Iterator[ReachableTrial]:
    """Each arm, each end of each range at any sizes, and what points are compared with at those sizes."""
    for arm in study.arms:
        yield ReachableTrial(study.spec(arm=arm, seed=0).pruned(), f"arm {arm}", {})
    rivals = {study.objective.minus, study.confirm.against if study.confirm else None} - {None}
    for sizes in strata(study):
        for axis in study.vary:
            for end in study.vary[axis].ends():
                wanted = {**sizes, **study.point_at(axis, end)}
                if (found := reached_at(study, wanted, (str(sizes), axis))) is not None:
                    yield found
        for arm in sorted(filter(None, rivals)) if sizes else ():
            name = f"arm {arm} at {_words(sizes)}"
            yield ReachableTrial(study.spec(arm=arm, point=sizes, seed=0).pruned(), name, sizes)
    if not study.arms and not study.vary:
        yield ReachableTrial(study.spec(seed=0).pruned(), "the trial", {})


def reached_at(study: Study, point: Mapping[str, Any], end: tuple[str, str] | None = None) -> ReachableTrial | None:
    """The trial at a point, or None where the study excludes it."""
    point = {axis: point[axis] for axis in study.vary if axis in point}
    if study.is_excluded(point):
        return None
    return ReachableTrial(study.spec(point=point, seed=0).pruned(), f"point {_words(point)}", point, end)


def _words(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis.rsplit('.', 1)[-1]} {value}" for axis, value in point.items())


# -------------------------------------------------------------------------------------------------- models and counts


@dataclass(frozen=True)
class ForwardMemory:
    """What running a model takes, bytes, its weights aside. `side` has tensors without content."""

    kept: int  # what the backward will need, hidden states or logits at supervised positions aside
    peak: int  # while it ran
    side: LogitSource


@dataclass(frozen=True)
class Shapes:
    """The shape-only models of one plan, and what they were seen to take."""

    vocab_size: int
    special_ids: Mapping[str, int]
    reply_share: float = 1.0  # of an exchange's tokens, those of its reply at most; packed rows have no more
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, data: Prepared, *more: Prepared) -> Shapes:
        """`more`: further data with the same tokenizer."""
        shares = [_reply_share(one) for one in (data, *more) if isinstance(one, ExchangeSet)]
        return cls(data.vocab_size, tokenizer_check.special_ids(data.tokenizer), max(shares, default=1.0))

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[no-any-return]

    def config(self, model: Model, length: int) -> Any:
        """`length`: the longest sequence of the trial. Raises ModelError."""
        return self._once(("config", *_key(model, length)), lambda: self._config(model, length))

    def _config(self, model: Model, length: int) -> Any:
        if model.pretrained is None:
            return build.make_config(
                model, vocab_size=self.vocab_size, special_ids=dict(self.special_ids), length=length
            )
        try:
            name, revision = model.pretrained, model.revision or "main"
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise errors.ModelError(f"no model at {model.pretrained!r}: {str(error).splitlines()[0]}") from None

    def net(
        self,
        model: Model,
        length: int,
        num_labels: int | None = None,
        how: How = "full",
        recompute: bool = False,
    ) -> Any:
        """The model on the meta device, weights in its own type; with a head for so many labels, or of a language model.

        `how` it is trained, where it is; `recompute`: as a phase says. Raises ModelError where it cannot be.
        """

        def make() -> Any:
            with torch.device("meta"):
                net = build.from_config(self.config(model, length), num_labels).float()
            for parameter in net.parameters():
                parameter.data = parameter.data.to(build.DTYPES[model.dtype])
            if isinstance(how, Lora):
                lora.attach(net, how, name=model.family or str(model.pretrained), seed=0)
            if recompute:
                build.recompute(net)
            return net

        return self._once(("net", *_key(model, length), num_labels, _how(how), recompute), make)

    def num_parameters(self, model: Model, length: int) -> int:
        return self._once(("size", *_key(model, length)), lambda: build.num_parameters(self.net(model, length)))

    def num_bytes(self, model: Model, length: int) -> int:
        """Of its weights, in its type."""
        return self.num_parameters(model, length) * build.DTYPES[model.dtype].itemsize

    def num_tied(self, model: Model, length: int) -> int:
        """Entries of the embeddings if they are the head's weights, too."""
        net = self.net(model, length)
        embeddings, head = net.get_input_embeddings(), net.get_output_embeddings()
        return embeddings.weight.numel() if head is not None and head.weight is embeddings.weight else 0

    def forward(
        self,
        model: Model,
        length: int,
        rows: Rows,
        *,
        trained: bool,
        at: At,
        how: How = "full",
        recompute: bool = False,
    ) -> ForwardMemory:
        """What a forward of these sequences takes, with or without gradients. Raises Uncounted.

        `recompute`: only what goes into each layer is kept, and all of one layer while the backward makes it again.
        """

        def make(again: bool) -> ForwardMemory:
            net = self.net(model, length, rows.num_labels, how, again)
            where = ("forward", *_key(model, length), rows, trained, at, _how(how), again)
            return self._once(where, lambda: forward(net, rows, trained, at))

        if not (recompute and trained):
            return make(False)
        whole, least = make(False), make(True)
        of_one = (whole.kept - least.kept) // num_executed(self.config(model, length))
        return ForwardMemory(least.kept + of_one, max(least.peak, least.kept + of_one), least.side)

    def scoring(self, model: Model, length: int, rows: Rows, *, at: At, how: How = "full") -> int:
        """The most bytes at once while batches of these sequences are evaluated. Raises Uncounted."""
        net = self.net(model, length, rows.num_labels, how)
        where = ("scoring", *_key(model, length), rows, at, _how(how))
        return self._once(where, lambda: scoring(net, rows, at))

    def cached(self, model: Model, length: int, *, at: At, how: How = "full") -> int:
        """Bytes of keys and values of one token while a reply is made. Raises Uncounted."""
        net = self.net(model, length, None, how)
        return self._once(("cached", *_key(model, length), at, _how(how)), lambda: cached(net, at))

    def drawing(self, num: int, how: Sampling) -> int:
        """The most bytes at once while the next token of so many replies is drawn."""
        return self._once(("drawing", num, how.model_dump_json()), lambda: drawing(num, self.vocab_size, how))

    def agreeing(self, num: int) -> int:
        """The most bytes at once while the logits of two models at so many positions are compared."""
        return self._once(("agreeing", num), lambda: agreeing(num, self.vocab_size))

    def scores(self, phase: Phase, sides: Mapping[tuple[str, str], LogitSource], at: At) -> int:
        """The most bytes at once from what the forwards gave to its gradients. `sides`: by (model, stream)."""
        given = tuple((key, tuple(t if t is None else (t.shape, t.dtype) for t in side)) for key, side in sides.items())
        terms = tuple((term.kind, term.on, reads(term)) for term in phase.terms.values())
        trained = tuple((name, _how(how)) for name, how in phase.train.items())
        return self._once(
            ("scores", given, terms, trained, at), lambda: scores(phase, sides, at, vocab_size=self.vocab_size)
        )


@dataclass(frozen=True)
class Rows:
    """Sequences of a forward: how many, how long, and how many positions of each are supervised; of a task, its labels."""

    num: int
    length: int
    positions: int
    num_labels: int | None = None
    packed: bool = False  # several exchanges in a row, of which none sees another


@dataclass(frozen=True)
class At:
    """What a number of bytes depends on beside shapes."""

    device: Device = "cpu"
    precision: Precision = "fp32"


def _key(model: Model, length: int) -> tuple[str, int]:
    return model.model_dump_json(exclude={"init"}), length  # how weights are drawn does not change their number


def _how(how: How) -> str:
    return how if isinstance(how, str) else how.model_dump_json()


def _reply_share(data: ExchangeSet) -> float:
    parts = (data.train, data.dev, data.test)
    shares = [len(one.reply(i)) / int(one.lengths[i]) for one in parts for i in range(len(one))]
    return max(shares, default=1.0)


def _learn(net: Any, learns: bool) -> None:
    """Weights that gradients are to reach: all, or the pairs of LoRA."""
    only_pairs = lora.is_attached(net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(learns and (".lora_" in name or not only_pairs))


def forward(net: Any, rows: Rows, trained: bool, at: At) -> ForwardMemory:
    """Counts a forward, on the device on which `net` is; on meta as if it were on `at.device`."""
    _learn(net.train(trained), trained)
    given = _inputs(net, rows)
    with _as_if(net, at):
        head = None if rows.num_labels else _head(net)
    with (
        torch.set_grad_enabled(trained),
        _as_if(net, at, rows.packed),
        StorageTracker([*net.parameters(), *net.buffers(), *given]) as live,
    ):
        given_N = _run(net, given, rows, whole=head is None)
    return ForwardMemory(live.now - _bytes(given_N), live.peak, LogitSource(given_N.detach(), *(head or ())))


@torch.no_grad()
def scoring(net: Any, rows: Rows, at: At) -> int:
    """Peak of an evaluation, from its second batch on: the logits of the batch before are still there."""
    _learn(net.eval(), True)  # autocast keeps what it casts of weights that learn, also where nothing learns
    given = _inputs(net, rows)
    labels_N = torch.zeros_like(given.positions_N)
    with _as_if(net, at, rows.packed), StorageTracker([*net.parameters(), *net.buffers(), *given, labels_N]) as live:
        num_columns = rows.num_labels or net.config.vocab_size
        logits_NV = torch.empty(len(labels_N), num_columns, device=labels_N.device)
        logits_NV = _run(net, given, rows, whole=True).float()
        if rows.num_labels != 1:
            F.cross_entropy(logits_NV, labels_N, reduction="none")
            (logits_NV.argmax(-1) == labels_N).sum()
    return int(live.peak)


@torch.no_grad()
def cached(net: Any, at: At) -> int:
    """Bytes of keys and values that one token leaves, of whatever type the layers make them."""
    _learn(net.eval(), True)
    ids_11 = torch.zeros(1, 1, dtype=torch.long, device=next(net.parameters()).device)
    cache = Cache(layer_class_to_replicate=_Seen)
    try:
        with _as_if(net, at):
            net(input_ids=ids_11, use_cache=True, **{str(cache_name(net)): cache})
    except (RuntimeError, NotImplementedError) as error:
        raise Uncounted(f"{net.config.model_type}: {str(error).splitlines()[0]}") from error
    return sum(layer.num_bytes for layer in cache.layers)


class _Seen(DynamicLayer):  # type: ignore[misc]
    """Of a cache: only how much there is to keep."""

    num_bytes = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.num_bytes = key_states.nbytes + value_states.nbytes
        return key_states, value_states


def drawing(num: int, vocab_size: int, how: Sampling) -> int:
    """Counts one draw, and its logits."""
    logits_BV = torch.empty(num, vocab_size, device="meta")
    at_B = torch.empty(num, dtype=torch.float64, device="meta")
    with StorageTracker([logits_BV, at_B]) as live:
        draw(logits_BV, at_B, how)
    return int(live.peak) + logits_BV.nbytes


@torch.no_grad()
def agreeing(num: int, vocab_size: int) -> int:
    """Counts the comparison of `evaluate.agreement`, and both models' logits."""
    ours_NV, theirs_NV = (torch.empty(num, vocab_size, device="meta") for _ in range(2))
    with StorageTracker([ours_NV, theirs_NV]) as live:
        kl(theirs_NV.log_softmax(-1), ours_NV.log_softmax(-1))
    return int(live.peak) + ours_NV.nbytes + theirs_NV.nbytes


def scores(phase: Phase, sides: Mapping[tuple[str, str], LogitSource], at: At, *, vocab_size: int | None = None) -> int:
    """Counts the terms at the logits, by `fused_terms`, and the gradients that it leaves for the backward."""
    total = 0
    for stream in phase.streams:
        terms = {n: term for n, term in phase.terms.items() if term.on == stream and not isinstance(term, Inner)}
        if not terms:
            continue
        leaves = {m: _leaf(side, phase.train.get(m)) for (m, on), side in sides.items() if on == stream}
        known = [t for side in leaves.values() for t in side if t is not None]
        first = known[0]
        is_number = all(side.weight_VD is None and side.hidden_ND.shape[1] == 1 for side in leaves.values())
        labels_N = torch.zeros(len(first), dtype=torch.float32 if is_number else torch.long, device=first.device)
        with StorageTracker(known) as live, torch.enable_grad():
            rows = None if all(side.weight_VD is None for side in leaves.values()) else vocab_size
            how: dict[str, Any] = {"chunk": chunk(leaves, at.device), "vocab_size": rows}
            fused = chunked_terms(leaves, labels_N, terms, dict.fromkeys(terms, 1.0), **how)
            fused.loss.backward()  # type: ignore[no-untyped-call]
        total = max(total, int(live.peak)) + sum(_bytes(side.hidden_ND) for side in leaves.values())
        if at.precision == "bf16":  # a cast of each head, which meta tensors do not get
            total += sum(_bytes(side.weight_VD) // 2 for side in leaves.values() if side.weight_VD is not None)
    return total


def _leaf(side: LogitSource, how: How | None) -> LogitSource:
    """Anew, of a model that is trained so; None: of one that is not. LoRA leaves the head alone."""

    def leaf(tensor: Tensor, learns: bool) -> Tensor:
        return torch.empty_like(tensor).requires_grad_(learns)

    weight, bias = (None if tensor is None else leaf(tensor, how == "full") for tensor in side[1:])
    return LogitSource(leaf(side.hidden_ND, how is not None), weight, bias)


class _Inputs(NamedTuple):
    ids_BT: Tensor
    positions_N: Tensor
    places_BT: Tensor


def _inputs(net: nn.Module, rows: Rows) -> _Inputs:
    """Of packed rows, two exchanges each: how many there are changes no shape."""
    device = next(net.parameters()).device
    ids_BT = torch.zeros(rows.num, rows.length, dtype=torch.long, device=device)
    first_B1 = torch.arange(rows.num, device=device)[:, None] * rows.length
    positions_N = (first_B1 + torch.arange(rows.positions, device=device)).flatten()
    places_T = torch.arange(rows.length, device=device) % -(-rows.length // 2)
    return _Inputs(ids_BT, positions_N, places_T.expand(rows.num, -1).contiguous())


def _head(net: Any) -> output_head.Head | None:
    try:
        return output_head.head_of(net)
    except (RuntimeError, NotImplementedError) as error:
        raise Uncounted(f"{net.config.model_type}: {str(error).splitlines()[0]}") from error


def _run(net: Any, given: _Inputs, rows: Rows, *, whole: bool) -> Tensor:
    """Logits (`whole`), or what a linear head makes them from."""
    try:
        if rows.num_labels is not None:
            return output_head.class_logits(net, given.ids_BT, torch.ones_like(given.ids_BT), None)
        places_BT = given.places_BT if rows.packed else None
        run = output_head.logits_at if whole else output_head.head_inputs
        return run(net, given.ids_BT, given.positions_N, places_BT=places_BT)
    except (RuntimeError, NotImplementedError) as error:
        raise Uncounted(f"{net.config.model_type}: {str(error).splitlines()[0]}") from error


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, while these live; `known` ones are not counted."""

    def __init__(self, known: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _see(self, storage: Any) -> None:
        where = storage._cdata
        if where in self._known or where in self._alive:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._alive[where]
            self.now -= size

        self._alive[where] = weakref.ref(storage, gone)
        self.now += size


# ------------------------------------------------------------------------------------- meta tensors in a device's stead

_CAST = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "scaled_dot_product_attention"}  # fmt: skip


def _as_if(net: nn.Module, at: At, packed: bool = False) -> Any:
    device = next(net.parameters()).device.type
    if device == "meta":
        return DeviceEmulation(at, packed)
    return nullcontext() if at.precision == "fp32" else torch.autocast(device, dtype=torch.bfloat16)


class DeviceEmulation(TorchFunctionMode):
    """Lets meta tensors go the way that real ones of a device go. (Fake tensors would, but transformers tells them from
    real ones and takes other ways; autocast leaves meta tensors alone.)
    """

    def __init__(self, at: At, packed: bool = False) -> None:
        super().__init__()
        self.at = at
        self.packed = packed
        self.casts: dict[int, Tensor] = {}  # of weights that learn: autocast makes each once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__bool__":  # transformers asks whether a mask hides nothing, and whether no row is packed
            return not self.packed
        if name == "__contains__":  # … and warns where there is padding
            return False
        if self.at.precision == "bf16" and name in _CAST:
            args, kwargs = self._narrow(args, kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self.at.device == "cuda":
            return self._dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _narrow(self, args: Any, kwargs: Any) -> Any:
        """What autocast does before a matrix product. One without weights and in fp32 is of angles of positions, which
        transformers keeps out of autocast."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not any(isinstance(tensor, nn.Parameter) or tensor.dtype == torch.bfloat16 for tensor in tensors):
            return args, kwargs
        return tuple(self._cast(value) for value in args), {key: self._cast(value) for key, value in kwargs.items()}

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.requires_grad and value.is_leaf):
            return value.bfloat16()
        if id(value) not in self.casts:
            self.casts[id(value)] = value.bfloat16()
        return self.casts[id(value)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Devices have kernels that never hold the weights of attention; that of CPUs cannot drop any of them."""
        if dropout_p and self.at.device == "cpu":
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            wide = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = wide.masked_fill_(attn_mask.logical_not(), float("-inf"))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attended: Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return attended

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """On CUDA what is dropped is kept as one byte each."""
        return torch.native_dropout(input, p, True)[0] if p and training else input
