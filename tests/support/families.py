"""Small models of every family of language models that the installed transformers has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainables.config.errors import ModelError
from trainables.models.configs import family_config, has_field

FAMILIES = tuple(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES]))
SMALL: dict[str, Any] = {  # sizes beyond those of a shape, where a family has them
    "embedding_size": 32,
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 8,
    "entity_vocab_size": 8,
    "entity_emb_size": 8,
    "hash_size": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "dff": 64,
    "dim_ff": 64,
    "d_inner": 64,
    "ffn_hidden_size": 64,
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "feed_forward_size": 64,
    "moe_k": 2,
    "unpadded_vocab_size": 115,  # as many as the tokenizer of the tests has
    "moe_topk": 2,
    "rotary_dim": 8,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "num_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

# Families with a text part that runs alone: fields of their text and vision configs beyond the usual sizes.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({}, {}),
    "llama4": (
        {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "qwen3_5": (
        {f"linear_{name}": size for name, size in (("num_key_heads", 2), ("num_value_heads", 2), ("key_head_dim", 16))}
        | {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16},
    ),
    "gemma4": ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "num_kv_shared_layers": 0}, {}),
}


def multimodal_folder(family: str, to: Path, text: Mapping[str, Any] | None = None) -> Path:
    """Writes a small random model that reads text and images, as a folder; of `MULTIMODAL`, or with its own fields of text."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    own_text, own_vision = MULTIMODAL.get(family, (text or {}, {}))
    text_config = {**sizes, "vocab_size": 300, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
    text_config |= {"max_position_embeddings": 64, "pad_token_id": 1, **own_text}
    vision_config = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8, **own_vision}
    config = AutoConfig.for_model(family, text_config=text_config, vision_config=vision_config)
    AutoModelForImageTextToText.from_config(config).save_pretrained(to)
    return to


def small(family: str) -> dict[str, Any]:
    """A model of this family for a spec."""
    shape = {"family": family, "layers": 2, "width": 32, "dropout": 0}
    try:
        config = family_config(family)
    except ModelError:
        return shape
    if has_field(config, "num_attention_heads"):
        shape["heads"] = 2
    known = config.to_dict()
    return {
        **shape,
        "config": {key: size for key, size in SMALL.items() if key in known and isinstance(known[key], int | None)},
    }
