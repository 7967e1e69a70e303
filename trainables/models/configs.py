"""Makes the transformers config of a model: of a shape from the family's defaults, or like another model's config.

What was asked for is read back from the config that transformers made, which accepts fields that the family lacks or computes
itself, and ignores them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainables.config.errors import ModelError
from trainables.config.layer_maps import Layers, depth_plan
from trainables.config.models import Model, Remap
from trainables.models import shared_bert
from trainables.models.initialise import position_table
from trainables.models.layouts import INNER_SIZES
from trainables.models.pretrained import Folder, text_part

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
T = TypeVar("T")


def make_config(model: Model, *, vocab_size: int, special_ids: Mapping[str, int], length: int) -> Any:
    """Returns the transformers config of a shape. Raises ModelError for what the family does not have or transformers
    rejects.

    Nested mappings in `config` are merged into those of the family, or of the model that this one is like.
    """
    if isinstance(model.like, Model):
        fields = _like(model, config_of(model.like, vocab_size=vocab_size, special_ids=special_ids, length=length))
        if fields["vocab_size"] < vocab_size:
            raise ModelError(
                f"like: a model with {fields['vocab_size']} rows of embeddings, and the data's tokenizer has {vocab_size} tokens"
            )
    else:
        assert model.family is not None
        config = family_config(model.family)
        fields = {
            "model_type": config.model_type,
            **_own_names(config, _sizes(model, config) | {"vocab_size": vocab_size}),
        }
        ids = {key: special_ids.get(key) for key in SPECIAL_IDS if _takes(config, key, special_ids.get(key))}
        if has_field(config, "max_position_embeddings"):
            unused = max(
                _unused_positions({**fields, "vocab_size": config.vocab_size}), _unused_positions(fields | ids)
            )
            fields |= _own_names(config, {"max_position_embeddings": max(length, 8) + unused})
        fields |= ids | _changes(model, config)
    config = by_transformers(f"make a {fields['model_type']} of this shape", lambda: AutoConfig.for_model(**fields))
    _read_back(model, config)
    if model.sharing is None:
        return config
    try:
        return shared_bert.shared(config, model.sharing.order, model.sharing.swap)
    except shared_bert.SharingError as error:
        raise ModelError(str(error)) from None


def config_of(model: Model, *, vocab_size: int, special_ids: Mapping[str, int], length: int) -> Any:
    """Returns the transformers config of a shape or of pretrained weights. Raises ModelError."""
    if model.pretrained is None:
        return make_config(model, vocab_size=vocab_size, special_ids=special_ids, length=length)
    config = text_part(Folder.read(model.pretrained, model.revision).config)
    if model.dropout is not None:
        config.update({key: model.dropout for key in dropouts(config)})
    return config


def family_config(family: str) -> Any:
    """Returns the default config of a family of language models; of one that also reads images or sound, that of its
    text part."""
    if not is_language_model(family):
        raise ModelError(f"transformers has no language model of family {family!r}; expected bert, modernbert, gpt2 …")
    config = text_part(by_transformers(f"make a {family}", lambda: AutoConfig.for_model(family)))
    if not is_language_model(config.model_type):
        raise ModelError(f"the text part of a {family} ({config.model_type}) is no language model of its own")
    if parts := [key for key in config.sub_configs if key.startswith(("vision", "audio"))]:
        raise ModelError(f"a {family} also reads images or sound ({', '.join(parts)}), and has no text part of its own")
    if config.is_encoder_decoder:
        raise ModelError(
            f"a {family} is an encoder-decoder; expected an encoder or a decoder: bert, modernbert, gpt2 …"
        )
    return config


def is_language_model(family: str) -> bool:
    return is_masked_lm(family) or family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_masked_lm(family: str) -> bool:
    return family in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, shared_bert.FAMILY)


def auto_class(family: str) -> Any:
    """Returns transformers' class for language models of this family."""
    return AutoModelForMaskedLM if is_masked_lm(family) else AutoModelForCausalLM


def dropouts(config: Any) -> Iterator[str]:
    """Yields the fields of a transformers config that are dropout rates, except that of a classifier's head."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and key.endswith(("dropout", "dropout_prob", "pdrop")) and "classifier" not in key:
            yield key


def one_line(error: BaseException) -> str:
    """Returns what transformers says of a config or a model that it rejects; of an error without a message in words,
    the type."""
    said = " ".join(str(error).split())
    plain = re.sub(r"^(Class v|V)alidation error for .*?: (\w+Error: )?", "", said)
    if plain == said and not isinstance(error, ValueError):
        plain = f"{type(error).__name__}: {said}"
    plain = plain or type(error).__name__
    return plain if len(plain) <= 300 else plain[:300] + " …"


# --------------------------------------------------------------------------------------------------------------- fields


def has_field(config: Any, key: str) -> bool:
    """Returns whether a config of this class stores a field of this name, or under another one."""
    return key in config.attribute_map or key in config.to_dict()


def _own_names(config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by the names under which this class stores them, e.g. n_embd for hidden_size."""
    return {config.attribute_map.get(key, key): value for key, value in fields.items()}


def _sizes(model: Model, config: Any) -> dict[str, Any]:
    """Returns the sizes of a shape without `like`, and those that follow from these where the family has them."""
    assert model.width is not None
    fields: dict[str, Any] = {"num_hidden_layers": model.layers, "hidden_size": model.width}
    if lacking := [key for key in (*fields, "vocab_size") if not has_field(config, key)]:
        raise ModelError(f"a {config.model_type} config has no {', '.join(lacking)}: its shape cannot be set here")
    if model.intermediate_size is not None or inner_size(config) is not None:
        fields[_inner_size(config)] = model.intermediate_size or 4 * model.width
    elif model.intermediate_size is not None:
        raise ModelError(
            f"a {config.model_type} config has no field for intermediate_size; give its own one in `config`"
        )
    follow = {"num_attention_heads": model.num_heads, "num_key_value_heads": model.num_heads}
    follow["head_dim"] = model.width // model.num_heads
    return fields | {key: value for key, value in follow.items() if has_field(config, key)}


def _changes(model: Model, config: Any) -> dict[str, Any]:
    """Returns the fields that a model sets beyond its sizes."""
    changes = {} if model.dropout is None else {key: model.dropout for key in dropouts(config)}
    known = config.to_dict()
    for key, value in _own_names(config, model.config).items():
        if key not in known and not hasattr(config, key):
            raise ModelError(f"a {config.model_type} config has no field {key!r}")
        changes[key] = _merged(known.get(key), value)
    return changes


def _merged(default: Any, value: Any) -> Any:
    if not isinstance(default, Mapping) or not isinstance(value, Mapping):
        return value
    return {**default, **{key: _merged(default.get(key), item) for key, item in value.items()}}


def _like(model: Model, other: Any) -> dict[str, Any]:
    """Returns the fields of another model's config with those that `model` changes, and what follows from these."""
    fields: dict[str, Any] = other.to_dict() | {"dtype": None}
    asked = {"num_hidden_layers": model.layers, "hidden_size": model.width, "num_attention_heads": model.heads}
    sizes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if model.intermediate_size is not None:
        sizes[_inner_size(other)] = model.intermediate_size
    if (heads := getattr(other, "num_attention_heads", None)) is not None:
        new_heads, width = model.heads or heads, other.hidden_size
        if fields.get("num_key_value_heads") == heads:
            sizes["num_key_value_heads"] = new_heads
        if fields.get("head_dim") == width // heads:
            sizes["head_dim"] = (model.width or width) // new_heads
    if model.layers is not None:
        num: int = other.num_hidden_layers
        plan: Layers = (None,) * model.layers
        if isinstance(model.init, Remap):
            plan = depth_plan(model.init.depth, num, model.layers)
        sources = [layer if isinstance(layer, int) else i % num for i, layer in enumerate(plan)]
        fields |= {key: [value[layer] for layer in sources] for key, value in per_layer(other).items()}
    return fields | _own_names(other, sizes) | _changes(model, other)


def per_layer(config: Any) -> dict[str, Any]:
    """Returns the fields of a config that have a value for each layer, which is not the number of a layer."""
    lists = {key: [*value] for key, value in config.to_dict().items() if isinstance(value, list | tuple)}
    num, others = getattr(config, "num_hidden_layers", None), ("token_id", "architectures")
    found = {key: value for key, value in lists.items() if len(value) == num and not key.endswith(others)}
    return {key: value for key, value in found.items() if value != [*range(len(value))]}


def inner_size(config: Any) -> str | None:
    """Returns the field for the size of the inner layer."""
    return next((key for key in INNER_SIZES if has_field(config, key)), None)


def _inner_size(config: Any) -> str:
    if (key := inner_size(config)) is None:
        raise ModelError(
            f"a {config.model_type} config has no field for intermediate_size; give its own one in `config`"
        )
    return key


def _takes(config: Any, key: str, value: int | None) -> bool:
    """Returns whether a family has this token's id, and may be without one where the tokenizer has none."""
    if not has_field(config, key):
        return False
    try:
        setattr(config, key, value)
    except Exception:  # a type of transformers' own for a value of another type
        return False
    return True


def _unused_positions(fields: Mapping[str, Any]) -> int:
    """Counts rows of the position table that no position uses: RoBERTa counts positions from the padding index."""
    with torch.device("meta"), suppress(Exception):  # that the family rejects these fields, is said when it is made
        table = position_table(auto_class(fields["model_type"]).from_config(AutoConfig.for_model(**fields)))
        return 0 if table is None or table.padding_idx is None else table.padding_idx + 1
    return 0


def by_transformers(what: str, call: Callable[[], T]) -> T:
    """Calls transformers' code, which rejects a config by errors of many types. Raises ModelError with what it says."""
    try:
        return call()
    except Exception as error:
        raise ModelError(f"transformers cannot {what}: {one_line(error)}") from None


def _read_back(model: Model, config: Any) -> None:
    """Raises ModelError where the config has not the sizes and fields that the model asks for."""
    sizes = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
    asked = {key: getattr(model, size) for size, key in sizes.items() if getattr(model, size) is not None}
    if model.intermediate_size is not None and (inner := inner_size(config)) is not None:
        asked[inner] = model.intermediate_size
    made = config.to_dict()
    for key, value in (*asked.items(), *model.config.items()):
        own = config.attribute_map.get(key, key)
        found = made[own] if own in made else getattr(config, key, None)
        if not _holds(found, value):
            which = "has no such field" if found is None else f"makes that {found!r}"
            raise ModelError(f"{key} {value!r} was asked for, and a {config.model_type} {which}")


def _holds(found: Any, asked: Any) -> bool:
    """Returns whether a value is the one asked for; a mapping may have more keys, and a number may stand for each
    layer."""
    if isinstance(asked, Mapping):
        return isinstance(found, Mapping) and all(_holds(found.get(key), value) for key, value in asked.items())
    if isinstance(found, list | tuple):
        return all(item == asked for item in found) if not isinstance(asked, list | tuple) else [*found] == [*asked]
    return bool(found == asked)
