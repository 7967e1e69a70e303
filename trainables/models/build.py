"""Builds the transformers model of a `Model` value, from a shape or from pretrained weights, and restores a stored one.

No family is named here: what differs between families is read from the transformers config and the module tree.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from trainables.config.errors import ModelError
from trainables.config.models import Model, Random
from trainables.config.phase import Masking
from trainables.config.value import random_stream
from trainables.models import shared_bert
from trainables.models.configs import auto_class, dropouts, is_masked_lm, make_config, one_line, text_part
from trainables.models.initialise import initialise
from trainables.storage.hub import why_not


def build(
    model: Model,
    *,
    name: str,
    seed: int,
    vocab_size: int,
    special_ids: dict[str, int],
    length: int,
    num_labels: int | None = None,
) -> Any:
    """Builds a model on the CPU, in its own type. The initial weights depend on (seed, name, module) alone; weights in
    bf16 are those in fp32, rounded.

    `special_ids`: the tokenizer's ids by transformers' names (`pad_token_id`, …). `length`: the longest sequence.
    `num_labels`: classes of a fresh classifier's head (1: a number); None: the head of a language model.
    """
    if model.pretrained is not None:
        return _load(model, vocab_size, num_labels, special_ids, name=name, seed=seed)
    config = make_config(model, vocab_size=vocab_size, special_ids=special_ids, length=length)
    net = from_config(config, num_labels)
    initialise(net, initial(model), name=name, seed=seed)
    return _cast(net, DTYPES[model.dtype])


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _cast(net: Any, dtype: torch.dtype) -> Any:
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
    """How weights are drawn that no other model's weights replace."""
    return model.init if isinstance(model.init, Random) else model.init.rest


def check_stream(config: Any, corruption: Masking | None, name: str) -> None:
    """Raises ModelError unless a masked stream has an encoder and a next-token stream a decoder."""
    if (corruption is not None) != is_masked_lm(config.model_type):
        need = (
            "is an encoder: give its stream `corruption`" if corruption is None else "is a decoder: `corruption: null`"
        )
        raise ModelError(f"model {name!r} ({config.model_type}) {need}")


def check_task(config: Any, name: str) -> None:
    """Raises ModelError where the family has no classifier, or cannot tell where a padded sequence ends."""
    if config.model_type not in (*MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, shared_bert.FAMILY):
        raise ModelError(f"model {name!r}: transformers has no classifier of family {config.model_type!r}")
    if not is_masked_lm(config.model_type) and config.pad_token_id is None:
        raise ModelError(f"model {name!r} ({config.model_type}): its tokenizer has no padding token, which tasks need")


def _load(
    model: Model, vocab_size: int, num_labels: int | None, special_ids: dict[str, int], *, name: str, seed: int
) -> Any:
    try:
        config = AutoConfig.from_pretrained(
            model.pretrained, revision=model.revision or "main", trust_remote_code=False
        )
        _refuse_code_of_the_hub(config, repr(model.pretrained))
        if model.dropout is not None:
            text_part(config).update({key: model.dropout for key in dropouts(text_part(config))})
        if num_labels is not None:
            _give_labels(config, num_labels)
            if config.pad_token_id is None:
                config.pad_token_id = special_ids.get("pad_token_id")
        auto = _auto(config, num_labels)
        net, about = auto.from_pretrained(
            model.pretrained,
            revision=model.revision or "main",
            config=config,
            dtype=DTYPES[model.dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=num_labels is not None,  # a head of other classes is drawn anew
        )
    except ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        expected = "a folder with config.json and model.safetensors, or a hub id"
        raise _missing(str(model.pretrained), expected, error) from None
    if num_labels is None:
        net = _text_model(net)
    if net.config.vocab_size < vocab_size:
        raise ModelError(
            f"{model.pretrained!r} has {net.config.vocab_size} rows for a tokenizer of {vocab_size} tokens"
        )
    if num_labels is not None:
        absent = {*about["missing_keys"], *(entry[0] for entry in about["mismatched_keys"])}
        _draw_again(net, {path.rpartition(".")[0] for path in absent}, name=name, seed=seed)
    return net


def _text_model(net: Any) -> Any:
    """The language model within one that also reads images or sound; another model as it is."""
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
    """A model as it was stored by `plain_config` and `weights_of`, types included. Raises ModelError if they do not fit."""
    made = AutoConfig.for_model(**config)
    net = _typed(from_config(made, made.num_labels if _is_classifier(config) else None), weights)
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
) -> Any:
    """A stored model with a fresh head for `num_labels` classes (None: of a language model), in the type of the weights.

    As in transformers, tensors of equal name and shape are copied; from one classifier to another only the trunk's, since
    as many labels may mean something else.
    """
    net = from_config(AutoConfig.for_model(**config), num_labels)
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
    return _cast(net, next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), torch.float32))


def _is_classifier(config: Mapping[str, Any]) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def from_config(config: Any, num_labels: int | None = None) -> Any:
    """A language model, or a classifier, of this config, with arbitrary weights (none on the meta device)."""
    _refuse_code_of_the_hub(config, config.model_type)
    if num_labels is not None:
        config = copy.deepcopy(config)
        _give_labels(config, num_labels)
    try:
        net = _auto(config, num_labels).from_config(config, trust_remote_code=False)
    except Exception as error:  # each family checks its config in its own way
        raise ModelError(f"transformers cannot make a {config.model_type} of this config: {one_line(error)}") from None
    net.config.architectures = [type(net).__name__]
    return net


def _auto(config: Any, num_labels: int | None) -> Any:
    return auto_class(config.model_type) if num_labels is None else AutoModelForSequenceClassification


def _give_labels(config: Any, num_labels: int) -> None:
    config.num_labels = num_labels
    config.problem_type = "regression" if num_labels == 1 else "single_label_classification"


def enable_gradient_checkpointing(net: Any) -> None:
    """Lets the backward pass compute activations again. Raises ModelError where the family cannot."""
    try:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"gradient_checkpointing: {str(error).splitlines()[0]}") from None


def _refuse_code_of_the_hub(config: Any, where: str) -> None:
    """Refuses an attention called `owner/name`: transformers would fetch and run this code, whatever else it trusts."""
    for field in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, field, None)):
            raise ModelError(
                f"{where}: its config asks for code of the hub ({getattr(config, field)}), which is refused"
            )


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tied tensor once, under its first name: safetensors refuses a second one."""
    seen: set[int] = set()
    state = {}
    for name, tensor in net.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state


def plain_config(config: Any) -> dict[str, Any]:
    """The fields of a transformers config that `restore` needs."""
    drop = ("transformers_version", "_name_or_path", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in drop}


def weights_fingerprint(name: str, revision: str | None) -> str:
    """SHA-256 over the config and weights of a folder, or of a revision of a hub repository."""
    folder = model_folder(name, revision, ["config.json", "*.safetensors"])
    files = sorted((*folder.glob("config.json"), *folder.glob("*.safetensors")))
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"{name!r} holds no *.safetensors; pickled weights are refused")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def model_folder(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a model: a local one, or the hub's files of these patterns, downloaded. Raises ModelError."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision or "main", allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise _missing(name, "a folder, or a hub id that can be reached", error) from None


def _missing(name: str, expected: str, error: BaseException) -> ModelError:
    return ModelError(f"no weights at {name!r} (expected {expected}): {why_not(name, 'model', error)}")


def num_parameters(net: nn.Module) -> int:
    """Number of distinct parameters: tied ones count once."""
    return sum(p.numel() for p in net.parameters())
