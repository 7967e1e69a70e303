"""Finds out what a folder of pretrained weights is, from its config and the headers of its files; reads no weights.

What is no encoder or decoder in plain floating-point numbers is refused by its name, as are tensors that do not fit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from trainables.config.errors import ModelError
from trainables.storage.hub import model_folder, no_weights

EXPECTED = "expected plain weights of an encoder (bert, roberta, modernbert …) or a decoder (llama, qwen2, gpt2 …)"
LANGUAGE_MODELS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
FILES = ["config.json", "adapter_config.json", "*.safetensors.index.json", "*.safetensors"]
ADAPTER = "adapter_model.safetensors"
POINTER = b"version https://git-lfs"  # how a file begins whose content git has not fetched


@dataclass(frozen=True)
class Folder:
    """A folder of pretrained weights, as its config and the headers of its files describe it."""

    name: str  # as a study names it
    path: Path
    config: Any  # of transformers
    trunk: frozenset[str]  # tensors of the family's model without a head
    tensors: Mapping[str, Tensor]  # on the meta device

    @classmethod
    def read(cls, name: str, revision: str | None) -> Folder:
        """Reads a local folder, or a revision of a hub repository. Raises ModelError where it is no plain language model or
        classifier."""
        path = model_folder(name, revision, FILES)
        _refuse_adapter(name, path)
        fields = _fields(name, path)
        with quiet():
            config, trunk = _config(name, path, fields)
        return cls(name, path, config, frozenset(trunk.state_dict()), _tensors(name, path, fields))

    def fresh(self, net: Any, language_model: Any, *, is_head_read: bool = True) -> frozenset[str]:
        """Returns the tensors of a head that the folder lacks: all of `net` that are drawn anew.

        `net`: a model of this config on the meta device, of the class that will be loaded. `language_model`: the same for
        the family's language model, whose head is drawn anew only if it is not read. Raises ModelError where tensors are missing, unexpected
        or of another shape.
        """
        with quiet():
            _, about = type(net).from_pretrained(
                None,
                config=net.config,
                state_dict=dict(self.tensors),
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        missing, unexpected = set(about["missing_keys"]), set(about["unexpected_keys"])
        shapes = {name: (list(stored), list(wanted)) for name, stored, wanted in about["mismatched_keys"]}
        is_task, known = net is not language_model, language_model.state_dict()
        last, trunk = class_layer(net) if is_task else "", missing
        if is_task or not is_head_read:
            trunk = {name for name in missing if name in known and name.startswith(f"{net.base_model_prefix}.")}
        others = shapes.keys() - {f"{last}.weight", f"{last}.bias"}
        if trunk or others or self._other_parts(net, unexpected, is_task=is_task):
            raise ModelError(self._misfit(type(net).__name__, missing, unexpected, shapes))
        if is_task:
            self._check_head(type(net).__name__, last, missing, shapes)
        return frozenset(missing)

    def _check_head(self, kind: str, last: str, missing: set[str], shapes: Mapping[str, Any]) -> None:
        """Raises ModelError where the last layer is that of other classes, or of another kind of classifier."""
        if shapes:
            (stored, *_), (wanted, *_) = next(iter(shapes.values()))
            raise ModelError(
                f"{self.name!r} is a classifier of {stored} classes, and the data have {wanted}; expected as many, or a "
                "language model"
            )
        classes = self.config.architectures
        if f"{last}.weight" not in missing and (missing or (classes and kind not in classes)):
            what = f"is a {classes[0]}" if classes else f"has a {last} without {min(missing)}"
            raise ModelError(f"{self.name!r} {what}; expected a language model or a {kind}")

    def _other_parts(self, net: PreTrainedModel, unexpected: set[str], *, is_task: bool) -> set[str]:
        """Returns those of unexpected tensors that are neither a pooler nor a head beside that of `net`."""
        prefix, heads = f"{net.base_model_prefix}.", {name.split(".")[0] for name in net.state_dict()}
        trunk = {name.split(".")[0] for name in self.trunk}
        return {
            name
            for name in unexpected
            if name.removeprefix(prefix) not in self.trunk
            and (name.startswith(prefix) or name.split(".")[0] in trunk or not (is_task or name.split(".")[0] in heads))
        }

    def _misfit(self, kind: str, missing: set[str], unexpected: set[str], shapes: Mapping[str, Any]) -> str:
        parts = [
            f"{len(names)} {what}, as {min(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        if shapes:
            name, (stored, wanted) = min(shapes.items())
            parts.append(f"{name} has shape {stored}, expected {wanted}")
        what = self.config.architectures or [f"folder of {self.config.model_type}"]
        for name in sorted(unexpected):
            if before := next((name.removesuffix(own) for own in missing if name.endswith(f".{own}")), ""):
                parts.append(f"remove the prefix {before} from the names")
                break
        return f"{self.name!r} ({what[0]}) has other tensors than {kind} with this config: {'; '.join(parts)}"


def stored_dtype(name: str, revision: str | None) -> torch.dtype | None:
    """Returns the type of pretrained weights, as their config says it, else as most of them have it; None where they are not there
    any more."""
    try:
        folder = Folder.read(name, revision)
    except ModelError:
        return None
    floats = Counter(t.dtype for t in folder.tensors.values() if t.is_floating_point())
    found: torch.dtype = folder.config.dtype or floats.most_common(1)[0][0]
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from printing its table of tensors: what is in it that matters is raised."""
    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def class_layer(net: PreTrainedModel) -> str:
    """Returns the path of a classifier's last layer, which has an output for each class."""
    trunk = {id(module) for module in net.base_model.modules()}
    linear = [path for path, m in net.named_modules() if isinstance(m, nn.Linear) and id(m) not in trunk]
    found: str = next(p for p in reversed(linear) if net.get_submodule(p).out_features == net.config.num_labels)
    return found


def refuse_code_of_the_hub(config: Any, where: str) -> None:
    """Refuses an attention called `owner/name`: transformers would fetch and run this code, whatever else it trusts."""
    for field in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, field, None)):
            raise ModelError(
                f"{where}: its config asks for code of the hub ({getattr(config, field)}), which is refused"
            )


def _refuse_adapter(name: str, path: Path) -> None:
    if (path / "adapter_config.json").is_file():
        whole = (
            "holds a LoRA adapter beside weights"
            if any(file.name != ADAPTER for file in path.glob("*.safetensors"))
            else "is a LoRA adapter without its base model"
        )
        raise ModelError(
            f"{name!r} {whole} (adapter_config.json); expected the merged model, as peft's merge_and_unload gives it"
        )


def _fields(name: str, path: Path) -> dict[str, Any]:
    """Reads config.json, and refuses what it says that the model is."""
    fields = _json(name, path / "config.json")
    if not isinstance(fields, dict):
        raise ModelError(f"{name!r}: config.json holds a {type(fields).__name__}, expected an object")
    for key in ("quantization_config", "compression_config"):
        if fields.get(key):
            about = fields[key] if isinstance(fields[key], dict) else {}
            method = about.get("quant_method", key)
            raise ModelError(f"{name!r} is quantised ({method}), and quantised weights are not read; {EXPECTED}")
    return fields


def _json(name: str, file: Path) -> Any:
    if not file.is_file():
        raise no_weights(name, f"it has no {file.name}")
    try:
        _refuse_pointer(name, file)
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{name!r}: {file.name} cannot be read: {error}") from None


def _refuse_pointer(name: str, file: Path) -> None:
    with file.open("rb") as content:
        if content.read(len(POINTER)) == POINTER:
            raise ModelError(f"{name!r}: {file.name} is a Git LFS pointer and not the file; run git lfs pull there")


def _config(name: str, path: Path, fields: Mapping[str, Any]) -> tuple[Any, PreTrainedModel]:
    """Makes the config and, on the meta device, the model without a head. Raises ModelError where transformers refuses."""
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # what a config's code raises is of any kind
        if fields.get("auto_map"):
            what = "needs code of its own (auto_map in config.json), which is never run"
            raise ModelError(f"{name!r} {what}; {EXPECTED}") from None
        raise ModelError(f"{name!r}: {_fault(fields, error)}") from None
    refuse_code_of_the_hub(config, repr(name))
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False) or getattr(type(config)(), "is_encoder_decoder", False):
        raise ModelError(f"{name!r} is an encoder-decoder ({family}), which is not supported; {EXPECTED}")
    if not {family, text_part(config).model_type} <= LANGUAGE_MODELS:
        others = [key for key in config.sub_configs if key.startswith(("vision", "audio"))]
        what = f"also reads images or sound ({family}: {', '.join(others)}), and has no text part of its own"
        raise ModelError(f"{name!r} {what if others else f'is no language model ({family})'}; {EXPECTED}")
    try:
        return config, _without_weights(config)
    except Exception as error:
        raise ModelError(f"{name!r}: {_fault(fields, error)}") from None


def text_part(config: Any) -> Any:
    """Returns the config of the text part, where a config has one for each kind of input (Gemma 3, Llama 4); else the config."""
    part = config.get_text_config(decoder=True)
    return config if part.model_type == config.model_type else part


def _without_weights(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False)


def _fault(fields: Mapping[str, Any], error: Exception) -> str:
    """Names the field of config.json without which transformers takes the others, if there is one, and what it says."""
    why = " ".join(str(error).split())[:300] or type(error).__name__
    for key, value in fields.items() if isinstance(fields.get("model_type"), str) else ():
        others = {field: value for field, value in fields.items() if field != key}
        try:
            _without_weights(AutoConfig.for_model(**others))
        except Exception:
            continue
        return f"config.json: {key}: {json.dumps(value)} is refused by transformers ({why})"
    return f"config.json: {why}"


def _files(name: str, path: Path, named: str | None) -> list[Path]:
    """Lists the files that transformers loads: the one that config.json names, or the usual one, or the shards of an index."""
    files = [path / file for file in ([named] if named else ["model.safetensors", "model.safetensors.index.json"])]
    found = next((file for file in files if file.is_file()), None)
    if found is None or not found.name.endswith(".index.json"):
        return [found] if found is not None else []
    shards = _json(name, found)
    if not isinstance(shards, dict) or not isinstance(shards.get("weight_map"), dict):
        raise no_weights(name, f"{found.name} has no weight_map")
    return [path / shard for shard in sorted(set(shards["weight_map"].values()))]


def _tensors(name: str, path: Path, fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads names, shapes and types of the stored tensors. Raises ModelError unless weights are floats of 16 bits or more."""
    named = fields.get("transformers_weights")
    is_plain_name = isinstance(named, str) and Path(named).name == named and ".safetensors" in named
    if named is not None and not is_plain_name:
        raise no_weights(name, f"config.json: transformers_weights: {named!r}; expected a *.safetensors of the folder")
    files = _files(name, path, named)
    if named is not None and not files:
        raise no_weights(name, f"it has no {named}, which config.json names as transformers_weights")
    if not files:
        raise no_weights(name, "it holds no *.safetensors; pickled weights are refused")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise no_weights(name, f"{file.name}, which its index names, is not there")
        _refuse_pointer(name, file)
        try:
            tensors |= load_state_dict(str(file), map_location="meta")
        except (OSError, ValueError, SafetensorError) as error:
            raise no_weights(name, f"{file.name}: {error}") from None
    for tensor_name, tensor in tensors.items():
        is_plain = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if tensor_name.endswith("weight") and not is_plain:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{name!r} is quantised: {tensor_name} is {kind}; {EXPECTED}")
    return tensors
