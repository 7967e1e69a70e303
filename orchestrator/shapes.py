"""The shapes that a study can reach: each model made once, without memory, and run there to count what it would take.

Everything happens on torch's meta device, where a tensor has a shape and no content. What a real tensor would decide by
its device (which attention runs, what autocast casts) is decided here in its place; tests hold the counts to real ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from orchestrator.plan import strata
from orchestrator.study import Study
from trainables import models
from trainables.data.corpus import Corpus
from trainables.data.tasks import Task
from trainables.losses.fused import Side, fused_terms
from trainables.passes import chunk
from trainables.spec.models import Model
from trainables.spec.phase import Phase
from trainables.spec.terms import Inner, reads
from trainables.spec.trial import TrialSpec

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
T = TypeVar("T")


class Uncounted(Exception):
    """A model whose code cannot run without content (some mixtures of experts); nothing can be said of it."""


# --------------------------------------------------------------------------------------------------- trials of a study


@dataclass(frozen=True)
class Reached:
    """A trial that the study can ask for, and how."""

    spec: TrialSpec  # pruned
    name: str  # for people
    point: Mapping[str, Any]
    end: tuple[str, str] | None = None  # the sizes and the one axis besides, where a search brings it


def reachable(study: Study) -> Iterator[Reached]:
    """Each arm, each end of each range at any sizes, and what points are compared with at those sizes."""
    for arm in study.arms:
        yield Reached(study.spec(arm=arm, seed=0).pruned(), f"arm {arm}", {})
    rivals = {study.objective.minus, study.confirm.against if study.confirm else None} - {None}
    for sizes in strata(study):
        for axis in study.vary:
            for end in study.vary[axis].ends():
                wanted = {**sizes, **study.point_at(axis, end)}
                if (found := reached_at(study, wanted, (str(sizes), axis))) is not None:
                    yield found
        for arm in sorted(filter(None, rivals)) if sizes else ():
            name = f"arm {arm} at {_words(sizes)}"
            yield Reached(study.spec(arm=arm, point=sizes, seed=0).pruned(), name, sizes)
    if not study.arms and not study.vary:
        yield Reached(study.spec(seed=0).pruned(), "the trial", {})


def reached_at(study: Study, point: Mapping[str, Any], end: tuple[str, str] | None = None) -> Reached | None:
    """The trial at a point, or None where the study excludes it."""
    point = {axis: point[axis] for axis in study.vary if axis in point}
    if study.is_excluded(point):
        return None
    return Reached(study.spec(point=point, seed=0).pruned(), f"point {_words(point)}", point, end)


def _words(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis.rsplit('.', 1)[-1]} {value}" for axis, value in point.items())


# -------------------------------------------------------------------------------------------------- models and counts


@dataclass(frozen=True)
class Taken:
    """What running a model takes, bytes, its weights aside. `side` has tensors without content."""

    kept: int  # what the backward will need, hidden states or logits at supervised positions aside
    peak: int  # while it ran
    side: Side


@dataclass(frozen=True)
class Shapes:
    """The shape-only models of one plan, and what they were seen to take."""

    vocab_size: int
    special_ids: Mapping[str, int]
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, data: Corpus | Task) -> Shapes:
        return cls(data.vocab_size, models.special_ids(data.tokenizer))

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[no-any-return]

    def config(self, model: Model, length: int) -> Any:
        """`length`: the longest sequence of the trial. Raises ModelError."""
        return self._once(("config", *_key(model, length)), lambda: self._config(model, length))

    def _config(self, model: Model, length: int) -> Any:
        if model.pretrained is None:
            return models.make_config(
                model, vocab_size=self.vocab_size, special_ids=dict(self.special_ids), length=length
            )
        try:
            name, revision = model.pretrained, model.revision or "main"
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise models.ModelError(f"no model at {model.pretrained!r}: {str(error).splitlines()[0]}") from None

    def net(self, model: Model, length: int, num_labels: int | None = None) -> Any:
        """The model on the meta device, in fp32; with a head for so many labels, or of a language model."""

        def make() -> Any:
            with torch.device("meta"):
                return models.skeleton(self.config(model, length), num_labels).float()

        return self._once(("net", *_key(model, length), num_labels), make)

    def num_parameters(self, model: Model, length: int) -> int:
        return self._once(("size", *_key(model, length)), lambda: models.num_parameters(self.net(model, length)))

    def num_tied(self, model: Model, length: int) -> int:
        """Entries of the embeddings if they are the head's weights, too."""
        net = self.net(model, length)
        embeddings, head = net.get_input_embeddings(), net.get_output_embeddings()
        return embeddings.weight.numel() if head is not None and head.weight is embeddings.weight else 0

    def forward(self, model: Model, length: int, rows: Rows, *, trained: bool, at: At) -> Taken:
        """What a forward of these sequences takes, with or without gradients. Raises Uncounted."""
        net = self.net(model, length, rows.num_labels)
        return self._once(("forward", *_key(model, length), rows, trained, at), lambda: forward(net, rows, trained, at))

    def scoring(self, model: Model, length: int, rows: Rows, *, at: At) -> int:
        """The most bytes at once while batches of these sequences are evaluated. Raises Uncounted."""
        net = self.net(model, length, rows.num_labels)
        return self._once(("scoring", *_key(model, length), rows, at), lambda: scoring(net, rows, at))

    def scores(self, phase: Phase, sides: Mapping[tuple[str, str], Side], at: At) -> int:
        """The most bytes at once from what the forwards gave to its gradients. `sides`: by (model, stream)."""
        given = tuple((key, tuple(t if t is None else (t.shape, t.dtype) for t in side)) for key, side in sides.items())
        terms = tuple((term.kind, term.on, reads(term)) for term in phase.terms.values())
        return self._once(("scores", given, terms, tuple(phase.train), at), lambda: scores(phase, sides, at))


@dataclass(frozen=True)
class Rows:
    """Sequences of a forward: how many, how long, and how many positions of each are supervised; of a task, its labels."""

    num: int
    length: int
    positions: int
    num_labels: int | None = None


@dataclass(frozen=True)
class At:
    """What a number of bytes depends on beside shapes."""

    device: Device = "cpu"
    precision: Precision = "fp32"


def _key(model: Model, length: int) -> tuple[str, int]:
    return model.model_dump_json(exclude={"init"}), length  # how weights are drawn does not change their number


def forward(net: Any, rows: Rows, trained: bool, at: At) -> Taken:
    """Counts a forward, on the device on which `net` is; on meta as if it were on `at.device`."""
    net.train(trained).requires_grad_(trained)
    ids_BT, positions_N, _ = _inputs(net, rows)
    with _as_if(net, at):
        head = None if rows.num_labels else _head(net)
    with (
        torch.set_grad_enabled(trained),
        _as_if(net, at),
        Live([*net.parameters(), *net.buffers(), ids_BT, positions_N]) as live,
    ):
        given_N = _run(net, ids_BT, positions_N, rows, whole=head is None)
    return Taken(live.now - _bytes(given_N), live.peak, Side(given_N.detach(), *(head or ())))


@torch.no_grad()
def scoring(net: Any, rows: Rows, at: At) -> int:
    """Peak of an evaluation, from its second batch on: the logits of the batch before are still there."""
    net.eval().requires_grad_(True)  # autocast keeps what it casts of weights that learn, also where nothing learns
    ids_BT, positions_N, labels_N = _inputs(net, rows)
    with _as_if(net, at), Live([*net.parameters(), *net.buffers(), ids_BT, positions_N, labels_N]) as live:
        logits_NV = torch.empty(len(positions_N), rows.num_labels or net.config.vocab_size, device=ids_BT.device)
        logits_NV = _run(net, ids_BT, positions_N, rows, whole=True).float()
        if rows.num_labels != 1:
            F.cross_entropy(logits_NV, labels_N, reduction="none")
            (logits_NV.argmax(-1) == labels_N).sum()
    return int(live.peak)


def scores(phase: Phase, sides: Mapping[tuple[str, str], Side], at: At) -> int:
    """Counts the terms at the logits, by `fused_terms`, and the gradients that it leaves for the backward."""
    total = 0
    for stream in phase.streams:
        terms = {n: term for n, term in phase.terms.items() if term.on == stream and not isinstance(term, Inner)}
        if not terms:
            continue
        leaves = {m: _leaf(side, m in phase.train) for (m, on), side in sides.items() if on == stream}
        known = [t for side in leaves.values() for t in side if t is not None]
        first = known[0]
        is_number = all(side.weight_VD is None and side.hidden_ND.shape[1] == 1 for side in leaves.values())
        labels_N = torch.zeros(len(first), dtype=torch.float32 if is_number else torch.long, device=first.device)
        with Live(known) as live, torch.enable_grad():
            fused = fused_terms(leaves, labels_N, terms, dict.fromkeys(terms, 1.0), chunk=chunk(leaves, at.device))
            fused.loss.backward()  # type: ignore[no-untyped-call]
        total = max(total, int(live.peak)) + sum(_bytes(side.hidden_ND) for side in leaves.values())
        if at.precision == "bf16":  # a cast of each head, which meta tensors do not get
            total += sum(_bytes(side.weight_VD) // 2 for side in leaves.values() if side.weight_VD is not None)
    return total


def _leaf(side: Side, learns: bool) -> Side:
    def leaf(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor).requires_grad_(learns)

    weight, bias = (None if tensor is None else leaf(tensor) for tensor in side[1:])
    return Side(leaf(side.hidden_ND), weight, bias)


def _inputs(net: nn.Module, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    device = next(net.parameters()).device
    ids_BT = torch.zeros(rows.num, rows.length, dtype=torch.long, device=device)
    first_B1 = torch.arange(rows.num, device=device)[:, None] * rows.length
    positions_N = (first_B1 + torch.arange(rows.positions, device=device)).flatten()
    return ids_BT, positions_N, torch.zeros_like(positions_N)


def _head(net: Any) -> models.Head | None:
    try:
        return models.head_of(net)
    except (RuntimeError, NotImplementedError) as error:
        raise Uncounted(f"{net.config.model_type}: {str(error).splitlines()[0]}") from error


def _run(net: Any, ids_BT: Tensor, positions_N: Tensor, rows: Rows, *, whole: bool) -> Tensor:
    """Logits (`whole`), or what a linear head makes them from."""
    try:
        if rows.num_labels is not None:
            return models.class_logits(net, ids_BT, torch.ones_like(ids_BT), None)
        return (models.logits_at if whole else models.hidden_at)(net, ids_BT, positions_N)
    except (RuntimeError, NotImplementedError) as error:
        raise Uncounted(f"{net.config.model_type}: {str(error).splitlines()[0]}") from error


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
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


def _as_if(net: nn.Module, at: At) -> Any:
    device = next(net.parameters()).device.type
    if device == "meta":
        return _AsIf(at)
    return nullcontext() if at.precision == "fp32" else torch.autocast(device, dtype=torch.bfloat16)


class _AsIf(TorchFunctionMode):
    """Lets meta tensors go the way that real ones of a device go. (Fake tensors would, but transformers tells them from
    real ones and takes other ways; autocast leaves meta tensors alone.)
    """

    def __init__(self, at: At) -> None:
        super().__init__()
        self.at = at
        self.casts: dict[int, Tensor] = {}  # of weights that learn: autocast makes each once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__bool__":  # transformers asks whether a mask hides nothing and no row is packed: so it is
            return True
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
