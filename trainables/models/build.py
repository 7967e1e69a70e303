"""Builds the transformers model of a `Model` value, from a shape or from pretrained weights, and restores a stored one.

No family is named here: what differs between families is read from the transformers config and the module tree.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from trainables.config.errors import ModelError, is_out_of_memory
from trainables.config.models import Model, Random
from trainables.config.phase import Masking
from trainables.config.value import random_stream
from trainables.models import shared_bert
from trainables.models.configs import auto_class, dropouts, is_masked_lm, make_config, one_line
from trainables.models.initialise import initialise
from trainables.models.pretrained import Folder, class_layer, quiet, refuse_code_of_the_hub, text_part


def build(
    model: Model,
    *,
    name: str,
    seed: int,
    vocab_size: int,
    special_ids: dict[str, int],
    length: int,
    num_labels: int | None = None,
    class_names: Sequence[str] = (),
    is_head_read: bool = True,
) -> Any:
    """Builds a model on the CPU, in its own type. The initial weights depend on (seed, name, module) alone; weights in
    bf16 are those in fp32, rounded.

    `special_ids`: the tokenizer's ids by transformers' names (`pad_token_id`, …). `length`: the longest sequence.
    `num_labels`: classes of a classifier's head (1: a number), called `class_names` where they have names; None: the head
    of a language model, which pretrained weights may lack if it is not `is_head_read`.
    """
    if model.pretrained is not None:
        folder = Folder.read(model.pretrained, model.revision)
        if model.dropout is not None:
            text_part(folder.config).update({key: model.dropout for key in dropouts(text_part(folder.config))})
        start = start_of(folder, num_labels, class_names, special_ids, is_head_read=is_head_read)
        if (rows := text_part(start.config).vocab_size) < vocab_size:
            raise ModelError(f"{model.pretrained!r} has {rows} rows for a tokenizer of {vocab_size} tokens")
        return _load(start, DTYPES[model.dtype], name=name, seed=seed)
    config = make_config(model, vocab_size=vocab_size, special_ids=special_ids, length=length)
    net = from_config(config, num_labels, class_names, special_ids)
    initialise(net, initial(model), name=name, seed=seed)
    return cast(net, DTYPES[model.dtype])


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cast(net: Any, dtype: torch.dtype) -> Any:
    """Casts weights. Buffers keep their type, as in transformers: frequencies of rotary positions need their digits."""
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype)
    return net


def check_dtype(dtype: str, device: str) -> None:
    """Raises ModelError where a device does not compute in `dtype`. CPUs compute in both."""
    if dtype == "bf16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError(
            f"device {device} ({torch.cuda.get_device_name(device)}) does not compute in bf16; expected fp32"
        )


def check_types(precision: str, models: Mapping[str, Model], device: str) -> None:
    """Raises ModelError, with the path in the trial, where the device lacks a type that a trial asks for."""
    for path, dtype in {"precision": precision, **{f"models.{n}.dtype": m.dtype for n, m in models.items()}}.items():
        try:
            check_dtype(dtype, device)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None


def initial(model: Model) -> Random:
    """Returns how weights are drawn that no other model's weights replace."""
    return model.init if isinstance(model.init, Random) else model.init.rest


def check_stream(config: Any, corruption: Masking | None, name: str) -> None:
    """Raises ModelError unless a masked stream has an encoder and a next-token stream a decoder."""
    if (corruption is not None) != is_masked_lm(config.model_type):
        need = (
            "is an encoder: give its stream `corruption`" if corruption is None else "is a decoder: `corruption: null`"
        )
        raise ModelError(f"model {name!r} ({config.model_type}) {need}")


def check_task(config: Any, name: str, *, is_mixed: bool = False) -> None:
    """Raises ModelError where the family has no classifier, cannot tell where a padded sequence ends, or needs tokens to
    find the end of a mixture."""
    if config.model_type not in (*MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, shared_bert.FAMILY):
        raise ModelError(f"model {name!r}: transformers has no classifier of family {config.model_type!r}")
    if not is_masked_lm(config.model_type) and getattr(config, "pad_token_id", None) is None:
        raise ModelError(f"model {name!r} ({config.model_type}): its tokenizer has no padding token, which tasks need")
    if is_mixed and not is_masked_lm(config.model_type):
        raise ModelError(f"model {name!r} ({config.model_type}): mixed examples are for encoders; remove `mix`")


@dataclass(frozen=True)
class Start:
    """Pretrained weights as a model starts with them."""

    folder: Folder
    config: Any
    kind: Any  # class of the model
    fresh: frozenset[str]  # tensors of a head that are drawn anew
    order: tuple[int, ...]  # the folder's number of each class, where the folder has the head


def start_of(
    folder: Folder,
    num_labels: int | None,
    class_names: Sequence[str] = (),
    special_ids: Mapping[str, int] | None = None,
    *,
    is_head_read: bool = True,
) -> Start:
    """Finds out from headers alone how pretrained weights are loaded. Raises ModelError where they do not fit."""
    config = copy.deepcopy(folder.config)
    with torch.device("meta"):
        net = language_model = from_config(config)
        if num_labels is not None:
            net = from_config(config, num_labels, class_names, special_ids)
    fresh = folder.fresh(net, language_model, is_head_read=is_head_read)
    order, config = tuple(range(num_labels or 0)), net.config
    if num_labels is not None and not fresh:
        order = _order_of_classes(folder, class_names)
        if not _are_names(class_names):  # numbers are those of the folder's classes
            names = [folder.config.id2label[i] for i in order]
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    return Start(folder, config, type(net), fresh, order)


def _are_names(classes: Sequence[str]) -> bool:
    return not all(name.isdigit() or name == f"LABEL_{i}" for i, name in enumerate(classes))


def _order_of_classes(folder: Folder, ours: Sequence[str]) -> tuple[int, ...]:
    """Returns the folder's number of each of our classes: by name, or by number. Raises ModelError where the names
    differ."""
    theirs = [str(folder.config.id2label[i]) for i in range(folder.config.num_labels)]
    if sorted(ours) == sorted(map(str, range(len(theirs)))):
        return tuple(map(int, ours))
    if not (_are_names(ours) and _are_names(theirs)):
        return tuple(range(len(theirs)))
    number = {name.casefold(): i for i, name in enumerate(theirs)}
    if sorted(number) != sorted(name.casefold() for name in ours):
        raise ModelError(
            f"{folder.name!r} has the classes {', '.join(theirs)}, and the data have {', '.join(ours)}; expected the same "
            "names, in any order"
        )
    return tuple(number[name.casefold()] for name in ours)


@torch.no_grad()
def _load(start: Start, dtype: torch.dtype, *, name: str, seed: int) -> Any:
    with quiet():  # tensors of parts for images, of heads that are not read: what matters was raised by `start_of`
        net = start.kind.from_pretrained(str(start.folder.path), config=start.config, dtype=dtype, use_safetensors=True)
    _draw_again(net, {path.rpartition(".")[0] for path in start.fresh}, name=name, seed=seed)
    if start.order != tuple(range(len(start.order))):
        for tensor in net.get_submodule(class_layer(net)).parameters():
            tensor.copy_(tensor[list(start.order)])
    net = net if start.order else _text_model(net)
    net.config.architectures = [type(net).__name__]  # not those of the folder, whose head may be another
    return net


def _text_model(net: Any) -> Any:
    """Returns the language model within one that also reads images or sound; another model as it is."""
    if (part := text_part(net.config)) is net.config:
        return net
    text = from_config(part)
    text.base_model.load_state_dict(net.get_decoder().state_dict())
    text.get_output_embeddings().load_state_dict(net.get_output_embeddings().state_dict())
    return text.to(net.dtype).eval()


@torch.no_grad()
def _draw_again(net: PreTrainedModel, paths: set[str], *, name: str, seed: int) -> None:
    """Draws these modules by the family's rule, from their own streams; transformers drew them from the process'."""
    modules = dict(net.named_modules())
    with torch.random.fork_rng(devices=[]):
        for path in sorted(paths):
            for tensor in modules[path].parameters(recurse=False):
                tensor._is_hf_initialized = False  # type: ignore[attr-defined]
            torch.manual_seed(random_stream(seed, "init", name, path))
            net._init_weights(modules[path])


def restore(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """Returns a model as it was stored by `plain_config` and `weights_of`, types included. Raises ModelError if they do
    not fit."""
    made = AutoConfig.for_model(**config)
    num_labels = made.num_labels if _is_classifier(config) else None
    net = _typed(from_config(made, num_labels, tuple(made.id2label.values())), weights)
    missing, unexpected = net.load_state_dict(dict(weights), strict=False)
    net.tie_weights()
    state = net.state_dict()
    loaded = {state[name].data_ptr() for name in weights if name in state}
    # a tied tensor was loaded under its other name
    absent = [name for name in missing if state[name].data_ptr() not in loaded]
    if absent or unexpected:
        raise ModelError(f"stored weights do not fit a {config['model_type']}: {sorted([*absent, *unexpected])[0]}")
    return net


@torch.no_grad()
def with_head(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    num_labels: int | None,
    init: Random,
    *,
    name: str,
    seed: int,
    class_names: Sequence[str] = (),
    special_ids: Mapping[str, int] | None = None,
) -> Any:
    """Returns a stored model with a fresh head for `num_labels` classes (None: of a language model), in the type of the
    weights.

    As in transformers, tensors of equal name and shape are copied; from one classifier to another only the trunk's, since
    as many labels may mean something else.
    """
    net = from_config(AutoConfig.for_model(**config), num_labels, class_names, special_ids)
    initialise(net, init, name=name, seed=seed)
    _typed(net, weights)
    only = f"{net.base_model_prefix}." if num_labels is not None and _is_classifier(config) else ""
    state = net.state_dict()
    for path, tensor in weights.items():
        if path.startswith(only) and path in state and state[path].shape == tensor.shape:
            state[path].copy_(tensor)
    return net


def _typed(net: Any, weights: Mapping[str, Tensor]) -> Any:
    """Casts `net` to the type of stored weights."""
    return cast(net, next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), torch.float32))


def _is_classifier(config: Mapping[str, Any]) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def from_config(
    config: Any,
    num_labels: int | None = None,
    class_names: Sequence[str] = (),
    special_ids: Mapping[str, int] | None = None,
) -> Any:
    """Returns a language model, or a classifier of named classes, of this config, with arbitrary weights (none on the
    meta device).

    A classifying decoder finds the last token by the padding token: the tokenizer's, or the config's where that has none.
    """
    refuse_code_of_the_hub(config, config.model_type)
    if num_labels is not None:
        config = copy.deepcopy(config)
        names = list(class_names) or [f"LABEL_{i}" for i in range(num_labels)]
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
        if not is_masked_lm(config.model_type):
            config.pad_token_id = (special_ids or {}).get("pad_token_id", getattr(config, "pad_token_id", None))
    try:
        net = _auto(config, num_labels).from_config(config, trust_remote_code=False)
    except Exception as error:  # each family checks its config in its own way
        if is_out_of_memory(error):
            raise
        raise ModelError(f"transformers cannot make a {config.model_type} of this config: {one_line(error)}") from None
    net.config.architectures = [type(net).__name__]
    return net


def _auto(config: Any, num_labels: int | None) -> Any:
    return auto_class(config.model_type) if num_labels is None else AutoModelForSequenceClassification


def enable_gradient_checkpointing(net: Any) -> None:
    """Lets the backward pass compute activations again. Raises ModelError where the family cannot."""
    try:
        net.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"gradient_checkpointing: {str(error).splitlines()[0]}") from None


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict with each tied tensor once, under its first name: safetensors refuses a second one."""
    seen: set[int] = set()
    state = {}
    for name, tensor in net.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state


def plain_config(config: Any) -> dict[str, Any]:
    """Returns the fields of a transformers config that `restore` needs."""
    drop = ("transformers_version", "_name_or_path", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in drop}


def weights_fingerprint(name: str, revision: str | None) -> str:
    """Computes SHA-256 over the config and weights of a folder, or of a revision of a hub repository. Raises ModelError where the
    folder is none that can be loaded."""
    folder = Folder.read(name, revision)
    # earlier versions took named classes in the folder's order: what they stored must not be taken for this
    by_name = folder.config.id2label and _are_names(list(map(str, folder.config.id2label.values())))
    total = hashlib.sha256(b"classes by name" if by_name else b"")
    for path in sorted((*folder.path.glob("config.json"), *folder.path.glob("*.safetensors"))):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def num_parameters(net: nn.Module) -> int:
    """Returns number of distinct parameters: tied ones count once."""
    return sum(p.numel() for p in net.parameters())
