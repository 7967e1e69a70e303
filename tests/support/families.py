"""Small models of every family of language models that the installed transformers has."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainables.config.errors import ModelError
from trainables.models.configs import family_config

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
}


def small(family: str) -> dict[str, Any]:
    """A model of this family for a spec."""
    shape = {"family": family, "layers": 2, "width": 32, "heads": 2, "dropout": 0}
    try:
        known = family_config(family).to_dict()
    except ModelError:
        return shape
    return {**shape, "config": {key: size for key, size in SMALL.items() if isinstance(known.get(key), int)}}
