"""BERT whose layers run more than once: shuffled parameter sharing (Pea-KD, arXiv 2009.14822), and its controls.

A further run is a BertLayer without weights: it reads those of the first run as it executes, with query and key swapped
where asked, so that scores q_i·k_j become k_i·q_j. Parameters, state dict and files therefore equal those of a plain BERT
with as many layers; each loads the other's. Importing this module registers the family with transformers.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    BertOnlyMLMHead,
    BertPooler,
    BertPreTrainedModel,
    BertSelfAttention,
)
from transformers.utils.output_capturing import OutputRecorder

from trainables.config.models import Sharing
from trainables.models.layouts import LAYOUTS

ORDERS = get_args(Sharing.model_fields["order"].annotation)
FAMILY = "shared_bert"
NOT_SHAPE = ("model_type", "architectures", "transformers_version", "layer_order", "layer_swap")


class SharingError(ValueError):
    """Layers that cannot be shared as asked; the message says which, why, and what is expected."""


def execution(order: str, num_layers: int, swap: bool) -> tuple[tuple[int, bool], ...]:
    """Returns the runs in order: (layer from 0, whether query and key are swapped). Only further runs swap, if `swap`.

    For layers 1 2 3 4: twice 1 2 3 4 1 2 3 4, each_twice 1 1 2 2 3 3 4 4, mirror 1 2 3 4 4 3 2 1, upper_twice
    1 2 3 4 3 4, lower_twice 1 2 3 4 1 2. Halves need an even number.
    """
    if num_layers < 1:
        raise SharingError(f"there must be a layer to share; there are {num_layers}")
    if order in ("upper_twice", "lower_twice") and num_layers % 2:
        raise SharingError(f"order {order} needs an even number of layers; there are {num_layers}")
    once, half = range(num_layers), num_layers // 2
    match order:
        case "twice":
            runs = [*once, *once]
        case "each_twice":
            runs = [layer for layer in once for _ in range(2)]
        case "mirror":
            runs = [*once, *reversed(once)]
        case "upper_twice":
            runs = [*once, *once[half:]]
        case "lower_twice":
            runs = [*once, *once[:half]]
        case _:
            raise SharingError(f"there is no order {order!r} of layers; expected {', '.join(ORDERS)}")
    return tuple((layer, swap and layer in runs[:at]) for at, layer in enumerate(runs))


def check(config: Any) -> None:
    """Raises SharingError where the layers of this transformers config cannot run again with query and key swapped."""
    family, heads = config.model_type, getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if any(place.startswith("q k") for place in LAYOUTS.get(family, {}).values()):
        raise SharingError(f"a {family} fuses query and key, which cannot be swapped; expected bert")
    if groups != heads:
        raise SharingError(f"a {family} of {heads} query heads and {groups} key heads cannot swap them; expected bert")
    if family not in ("bert", FAMILY):
        raise SharingError(f"a {family} has no form with shared layers here; expected bert")
    if config.is_decoder or config.add_cross_attention:
        raise SharingError("layers are shared in encoders only; expected is_decoder false, add_cross_attention false")


def shared(config: BertConfig, order: str, swap: bool) -> SharedBertConfig:
    """Returns a config of the same shape whose layers run in this order. Raises SharingError."""
    check(config)
    execution(order, config.num_hidden_layers, swap)
    return SharedBertConfig(**_shape(config), layer_order=order, layer_swap=swap)


def _shape(config: Any) -> dict[str, Any]:
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_SHAPE}
    return {**fields, "attn_implementation": config._attn_implementation}


# --------------------------------------------------------------------------------------------------------- further runs


class SelfAttentionAgain(BertSelfAttention):  # type: ignore[misc]
    """A further run of a self-attention. It looks projections up as it runs: replacing one (LoRA) serves all runs."""

    def __init__(self, first: BertSelfAttention, swap: bool) -> None:
        with torch.device("meta"):
            super().__init__(first.config, is_causal=first.is_causal, layer_idx=first.layer_idx)
        del self.query, self.key, self.value
        self.first = (first,)  # in a tuple, not a submodule: weights have one owner and one name
        self.swap = swap

    @property
    def query(self) -> nn.Module:
        return self.first[0].key if self.swap else self.first[0].query  # type: ignore[no-any-return]

    @property
    def key(self) -> nn.Module:
        return self.first[0].query if self.swap else self.first[0].key  # type: ignore[no-any-return]

    @property
    def value(self) -> nn.Module:
        return self.first[0].value  # type: ignore[no-any-return]


class AttentionAgain(BertAttention):  # type: ignore[misc]
    """A further run of an attention block."""

    def __init__(self, first: BertAttention, swap: bool) -> None:
        nn.Module.__init__(self)
        self.is_cross_attention = False
        self.self = SelfAttentionAgain(first.self, swap)
        self.first = (first,)

    @property
    def output(self) -> nn.Module:
        return self.first[0].output  # type: ignore[no-any-return]


class LayerAgain(BertLayer):  # type: ignore[misc]
    """A further run of a layer; a layer of its own for hooks, train() and gradient checkpointing."""

    def __init__(self, first: BertLayer, swap: bool) -> None:
        nn.Module.__init__(self)
        self.chunk_size_feed_forward, self.seq_len_dim = first.chunk_size_feed_forward, first.seq_len_dim
        self.is_decoder = self.add_cross_attention = False
        self.attention = AttentionAgain(first.attention, swap)
        self.first = (first,)

    @property
    def intermediate(self) -> nn.Module:
        return self.first[0].intermediate  # type: ignore[no-any-return]

    @property
    def output(self) -> nn.Module:
        return self.first[0].output  # type: ignore[no-any-return]


class SharedBertEncoder(BertEncoder):  # type: ignore[misc]
    """`layer` holds the layers with weights, as BERT does; `again` their further runs."""

    def __init__(self, config: SharedBertConfig) -> None:
        super().__init__(config)
        self.again = nn.ModuleList()
        self.places: list[tuple[str, int]] = []  # of what runs, in order: in which list, and where there
        for layer, swap in execution(config.layer_order, config.num_hidden_layers, config.layer_swap):
            if ("layer", layer) not in self.places:
                self.places.append(("layer", layer))
            else:
                self.places.append(("again", len(self.again)))
                self.again.append(LayerAgain(self.layer[layer], swap))

    @property
    def executed(self) -> list[nn.Module]:
        """What runs, in order: a module for each run."""
        return [getattr(self, which)[at] for which, at in self.places]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        for layer in self.executed:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


# --------------------------------------------------------------------------------------------------------------- models


class SharedBertConfig(BertConfig):  # type: ignore[misc]
    """A BERT of `num_hidden_layers` layers with weights, executed in `layer_order` (see `execution`)."""

    model_type = FAMILY
    layer_order: str = "twice"
    layer_swap: bool = True

    @property
    def num_executed_layers(self) -> int:
        return len(execution(self.layer_order, self.num_hidden_layers, self.layer_swap))


class SharedBertModel(BertModel):  # type: ignore[misc]
    """Like BertModel; `hidden_states` has one for each executed layer, after the embeddings."""

    config_class = SharedBertConfig
    _can_record_outputs = {
        "hidden_states": OutputRecorder(BertLayer, num_hidden_layers_key="num_executed_layers"),
        "attentions": BertSelfAttention,
    }

    def __init__(self, config: SharedBertConfig, add_pooling_layer: bool = True) -> None:
        check(config)
        BertPreTrainedModel.__init__(self, config)  # not BertModel's, which makes a plain encoder
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(config)
        self.encoder = SharedBertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()


class SharedBertForMaskedLM(BertForMaskedLM):  # type: ignore[misc]
    config_class = SharedBertConfig

    def __init__(self, config: SharedBertConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.bert = SharedBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()


class SharedBertForSequenceClassification(BertForSequenceClassification):  # type: ignore[misc]
    config_class = SharedBertConfig

    def __init__(self, config: SharedBertConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = SharedBertModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


AutoConfig.register(FAMILY, SharedBertConfig, exist_ok=True)
AutoModel.register(SharedBertConfig, SharedBertModel, exist_ok=True)
AutoModelForMaskedLM.register(SharedBertConfig, SharedBertForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(SharedBertConfig, SharedBertForSequenceClassification, exist_ok=True)


# ------------------------------------------------------------------------------------------------------------- unrolled


@torch.no_grad()
def unrolled(net: Any) -> Any:
    """Returns a plain BERT with a layer for each run, equal in all outputs: loads without this package, and holds
    shared weights as often as they run. `net`: one of the three models above. Its device, dtype and mode are kept."""
    config = net.config
    plain = next(kind for kind in (BertForMaskedLM, BertForSequenceClassification, BertModel) if isinstance(net, kind))
    runs = execution(config.layer_order, config.num_hidden_layers, config.layer_swap)
    options = {"add_pooling_layer": net.pooler is not None} if plain is BertModel else {}
    with torch.random.fork_rng(devices=[]):  # drawn weights are overwritten, and no one else's draws are touched
        deep = plain(BertConfig(**{**_shape(config), "num_hidden_layers": len(runs)}), **options)
    prefix = "encoder.layer." if plain is BertModel else "bert.encoder.layer."
    weights = {
        name: tensor
        for own, tensor in net.state_dict().items()
        for name in (_names(own.removeprefix(prefix), prefix, runs) if own.startswith(prefix) else [own])
    }
    deep.to(device=net.device, dtype=net.dtype).load_state_dict(weights)
    return deep.train(net.training)


def _names(own: str, prefix: str, runs: tuple[tuple[int, bool], ...]) -> list[str]:
    """Returns where a layer's tensor, as `0.attention.self.key.weight`, stands if each run is a layer."""
    number, _, rest = own.partition(".")
    crossed = {"query": "key", "key": "query"}
    swapped = ".".join(crossed.get(part, part) for part in rest.split("."))
    return [
        f"{prefix}{at}.{swapped if swap else rest}" for at, (layer, swap) in enumerate(runs) if layer == int(number)
    ]
