"""Models without weights, for the plan: their sizes, and the activations that a training step keeps for its backward pass.

Parameters are counted on torch's meta device. Activations are the tensors that autograd saves in a forward pass under
FakeTensorMode, which runs the model's own code, autocast and attention kernels of a CPU on tensors without content.
A model whose code needs content (a mixture of experts, routed by values) is estimated from the shapes of its matrices.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from trainables.config.models import Model
from trainables.config.phase import How, Lora
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.data.prepared import Prepared
from trainables.models import build, configs, lora, output_head, quantise, tokenizer_check
from trainables.models.pretrained import Folder, text_part
from trainables.training.layer_outputs import num_executed

Precision = Literal["fp32", "bf16"]
T = TypeVar("T")


@dataclass(frozen=True)
class RowShape:
    """One row of a batch: tokens, supervised positions, and the labels of its task (None: language modelling)."""

    length: int
    positions: int
    num_labels: int | None = None


@dataclass(frozen=True)
class Activations:
    """Bytes that a training step of one model keeps for its backward pass."""

    fixed: int  # whatever the batch: masks, angles of positions, weights cast to bf16
    per_row: int
    num_layers: int
    per_layer_input: int  # of one row, for one layer

    def kept(self, rows: int, *, gradient_checkpointing: bool = False) -> int:
        """Counts what a batch keeps. With gradient checkpointing: the inputs of all layers, and one layer that is computed again."""
        if gradient_checkpointing:
            return self.fixed + rows * self.num_layers * self.per_layer_input + self.one_layer(rows)
        return self.fixed + rows * self.per_row

    def one_layer(self, rows: int) -> int:
        """Counts what one layer holds: the most that a forward pass without gradients holds at once."""
        return rows * self.per_row // self.num_layers


@dataclass(frozen=True)
class Shapes:
    """The models of one plan; each is built and counted once."""

    vocab_size: int
    special_ids: Mapping[str, int]
    reply_share: float = 1.0  # largest share of an exchange's tokens that are its reply
    others: Mapping[str, Shapes] = field(default_factory=dict)  # by tokenizer that models name
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, data: Mapping[str, Prepared]) -> Shapes:
        """Reads the vocabularies from prepared data, by `TrialSpec.readings`."""
        share = max((_reply_share(each) for each in data.values() if isinstance(each, ExchangeSet)), default=1.0)
        by_tokenizer = {
            name.partition("/")[2]: cls(read.vocab_size, tokenizer_check.special_ids(read.tokenizer), share)
            for name, read in [*data.items()][::-1]  # of several the first
        }
        return replace(by_tokenizer[""], others=by_tokenizer)

    def vocabulary(self, model: Model) -> tuple[int, Mapping[str, int]]:
        """Returns the number of tokens and the special ids of the tokenizer with which a model reads."""
        of = self.others.get(model.tokenizer or "", self)
        return of.vocab_size, of.special_ids

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]  # type: ignore[no-any-return]

    def config(self, model: Model, length: int) -> Any:
        """Returns the transformers config of a model. `length`: the longest sequence of the trial. Raises ModelError."""
        return self._once(("config", *_key(model, length)), lambda: self._config(model, length))

    def _config(self, model: Model, length: int) -> Any:
        vocab_size, special_ids = self.vocabulary(model)
        if model.pretrained is not None:
            config = copy.deepcopy(text_part(self.folder(model).config))
        else:
            config = configs.config_of(model, vocab_size=vocab_size, special_ids=special_ids, length=length)
        if not configs.is_masked_lm(config.model_type):  # as where a decoder classifies
            config.pad_token_id = special_ids.get("pad_token_id", getattr(config, "pad_token_id", None))
        return config

    def folder(self, model: Model) -> Folder:
        """Returns what a model's folder of pretrained weights is. Raises ModelError."""
        assert model.pretrained is not None
        name, revision = model.pretrained, model.revision
        return self._once(("folder", name, revision), lambda: Folder.read(name, revision))

    def start(
        self, model: Model, num_labels: int | None, class_names: tuple[str, ...], *, is_head_read: bool
    ) -> build.Start:
        """Returns how a model starts from its pretrained weights. Raises ModelError where they do not fit."""
        _, ids = self.vocabulary(model)
        key, folder = ("start", *_key(model, 0), num_labels, class_names, is_head_read), self.folder(model)
        return self._once(key, lambda: build.start_of(folder, num_labels, class_names, ids, is_head_read=is_head_read))

    def net(self, model: Model, length: int, *, how: How = "full", num_labels: int | None = None) -> Any:
        """Returns the model on the meta device, trained as `how` says, with a classifier's head where `num_labels` is
        given.

        Raises ModelError where the model cannot be built or trained so.
        """

        def make() -> Any:
            with torch.device("meta"):
                net = build.from_config(self.config(model, length), num_labels).float()
            for parameter in net.parameters():
                parameter.data = parameter.data.to(build.DTYPES[model.dtype])
            if isinstance(how, Lora):
                has_head = num_labels is not None and how.head is not False
                lora.attach(net, how, name=model.family or str(model.pretrained), seed=0, with_head=has_head)
            return net

        return self._once(("net", *_key(model, length), str(how), num_labels), make)

    def num_parameters(self, model: Model, length: int) -> int:
        return build.num_parameters(self.net(model, length))

    def num_bytes(self, model: Model, length: int) -> int:
        """Bytes of a model's weights, in their own type."""
        return self.num_parameters(model, length) * build.DTYPES[model.dtype].itemsize

    def num_bytes_held(self, model: Model, length: int) -> int:
        """Bytes of the weights of a model that a phase reads and does not train."""
        if model.quantize is None:
            return self.num_bytes(model, length)
        return quantise.num_bytes(self.net(model, length), model.quantize)

    def activations(
        self, model: Model, length: int, row: RowShape, *, how: How, precision: Precision, drops: bool
    ) -> Activations:
        """Returns what a training step of this model keeps. `drops`: with the masks of dropout, and the attention
        kernel for these."""
        net = self.net(model, length, how=how, num_labels=row.num_labels)
        key = ("activations", *_key(model, length), row, str(how), precision, drops)
        return self._once(key, lambda: count_activations(net, row, precision=precision, drops=drops))


def _key(model: Model, length: int) -> tuple[str, int]:
    # how weights are drawn does not change their number, but copied layers bring settings of a model that this one is like
    return model.model_dump_json(exclude={"init"} if model.like is None else None), length


def _reply_share(data: ExchangeSet) -> float:
    parts = (data.train, data.dev, data.test)
    shares = [len(part.reply(i)) / int(part.lengths[i]) for part in parts for i in range(len(part))]
    return max(shares, default=1.0)


def count_activations(net: Any, row: RowShape, *, precision: Precision, drops: bool) -> Activations:
    """Counts what autograd saves for one row and for two, and draws the line through both."""
    net.train(drops)
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # logs an error before it raises
    try:
        one, two = (_saved_bytes(net, row, num, precision) for num in (1, 2))
    except Exception:  # the code needs values, or has no kernel for shapes alone
        one, two = (num * row.length * _token_bytes(net) for num in (1, 2))
    layer_input = row.length * net.config.hidden_size * net.dtype.itemsize
    return Activations(2 * one - two, two - one, num_executed(net.config), layer_input)


def _saved_bytes(net: Any, row: RowShape, num: int, precision: Precision) -> int:
    """Bytes of the storages that autograd saves in a forward pass, weights and inputs aside."""
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
                 for name, tensor in [*net.named_parameters(), *net.named_buffers()]}  # fmt: skip
        ids_BT = torch.zeros(num, row.length, dtype=torch.long)
        positions_N = torch.arange(num * row.positions)
        own = {tensor.untyped_storage()._cdata for tensor in (*state.values(), ids_BT, positions_N)}

        def run(**inputs: Any) -> Any:
            return functional_call(net, state, (), inputs)

        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if row.num_labels is not None:
                output_head.class_logits(net, ids_BT, torch.ones_like(ids_BT), None, through=run)
            else:
                output_head.logits_at(net, ids_BT, positions_N, through=run)
    return sum(storage.nbytes() for where, storage in saved.items() if where not in own)


def _token_bytes(net: Any) -> int:
    """Returns what a layer's matrices read and write for a token, of its experts only those that the token is sent to;
    and a third more for norms and activation functions (measured: 0.94 to 1.05 of what four mixtures of experts keep).
    """
    tables = {id(module.weight) for module in net.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in net.base_model.parameters() if p.ndim >= 2 and id(p) not in tables]
    experts = getattr(net.config, "num_experts_per_tok", None) or 1
    numbers = sum(sum(matrix.shape[-2:]) * (experts if matrix.ndim > 2 else 1) for matrix in matrices)
    return int(numbers * net.dtype.itemsize * 4 // 3)
