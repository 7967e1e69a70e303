"""The role of each parameter in an architecture: which space of the transformer a module writes to and reads from.

Spaces: the residual stream (`x`), the heads' queries, keys and values (`q`, `k`, `v`), the values as the output projection
reads them (`o`), the inner layer of the MLP (`inner`). Width remaps, LoRA and losses inside the model read this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trainables.config.errors import ModelError

LAYOUTS: dict[str, dict[str, str]] = {  # family -> end of a module's path -> role; of linear layers: writes <- reads
    "bert": {
        "word_embeddings": "table",
        "position_embeddings": "table",
        "token_type_embeddings": "table",
        "LayerNorm": "norm",
        "self.query": "q <- x",
        "self.key": "k <- x",
        "self.value": "v <- x",
        "attention.output.dense": "x <- o",
        "intermediate.dense": "inner <- x",
        "output.dense": "x <- inner",
        "transform.dense": "x <- x",
        "transform.LayerNorm": "last norm",
        "predictions.decoder": "head",
        "cls.predictions": "head",
        "pooler.dense": "x <- x",
        "classifier": "head",
    },
    "modernbert": {
        "tok_embeddings": "table",
        "norm": "norm",
        "attn_norm": "norm",
        "mlp_norm": "norm",
        "final_norm": "norm",
        "attn.Wqkv": "q k v <- x",
        "attn.Wo": "x <- o",
        "mlp.Wi": "inner inner <- x",
        "mlp.Wo": "x <- inner",
        "head.dense": "x <- x",
        "head.norm": "last norm",
        "decoder": "head",
        "classifier": "head",
    },
    "gpt2": {
        "wte": "table",
        "wpe": "table",
        "ln_1": "norm",
        "ln_2": "norm",
        "attn.c_attn": "q k v <- x",
        "attn.c_proj": "x <- o",
        "mlp.c_fc": "inner <- x",
        "mlp.c_proj": "x <- inner",
        "ln_f": "last norm",
        "lm_head": "head",
        "score": "head",
    },
    "llama": {
        "embed_tokens": "table",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
        "q_proj": "q <- x",
        "k_proj": "k <- x",
        "v_proj": "v <- x",
        "o_proj": "x <- o",
        "gate_proj": "inner <- x",
        "up_proj": "inner <- x",
        "down_proj": "x <- inner",
        "model.norm": "last norm",
        "lm_head": "head",
        "score": "head",
    },
}
PRE_NORM = ("modernbert", "gpt2", "llama")  # blocks add to the residual stream: a block that adds 0 changes nothing
NORM_EPS = {"bert": "layer_norm_eps", "modernbert": "norm_eps", "gpt2": "layer_norm_epsilon", "llama": "rms_norm_eps"}


def family_of(config: Any) -> str:
    """Returns the family whose layout a transformers config has; a family with shared layers has that of the plain one."""
    return str(config.model_type).removeprefix("shared_")


def place_of(family: str, name: str) -> str | None:
    """Returns the role of the tensor `name`, by the longest known end of its module's path; None where no role is
    known."""
    path, layout = name.rpartition(".")[0], LAYOUTS.get(family, {})
    known = [end for end in layout if path == end or path.endswith(f".{end}")]
    return layout[max(known, key=len)] if known else None


def is_transposed(module: Any) -> bool:
    """Returns whether the module's weight is [inputs, outputs] (GPT-2's Conv1D)."""
    return type(module).__name__ == "Conv1D"


LOGICAL = {"q": "query", "k": "key", "v": "value", "o": "output"}
USUAL = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))  # within one module
USUAL_OUTPUTS = (
    "o_proj",
    "out_proj",
    "out_lin",
    "dense",
)  # in the same module; like BERT: one module up, `output.dense`
INNER_SIZES = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")  # fields of configs for the inner layer's size

# families without a layout whose query, key and value are one matrix: ends of its path and of the output's
FUSED = {
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj"),
    "gpt_neox": ("attention.query_key_value", "attention.dense"),
    "bloom": ("self_attention.query_key_value", "self_attention.dense"),
}
HEAD_BY_HEAD = ("gpt_neox", "bloom")  # fused matrices that hold the three projections of each head side by side
Outputs = NDArray[np.int64]


def projections_of(net: nn.Module) -> dict[str, dict[str, Outputs]]:
    """Returns path of a linear layer of attention -> its projections (query, key, value, output) -> the indices of their outputs.
    Families without a layout: where the fused matrix is known, or modules have the usual names."""
    family, found = family_of(net.config), dict[str, dict[str, Outputs]]()
    if family in FUSED:
        return _fused_projections(net, family)
    if family not in LAYOUTS:
        names = _usual_projections(net)
        return {path: {name: np.arange(num_outputs(net.get_submodule(path)))} for path, name in names.items()}
    for path, module in net.named_modules():
        if is_linear(module) and (place := place_of(family, f"{path}.weight")) is not None:
            writes, _, reads = place.partition(" <- ")
            if reads == "o" or set(writes.split()) <= {"q", "k", "v"}:
                spaces = ("o" if reads == "o" else writes).split()
                parts = np.split(np.arange(num_outputs(module)), len(spaces))
                found[path] = {LOGICAL[space]: part for space, part in zip(spaces, parts, strict=True)}
    return found


def _fused_projections(net: nn.Module, family: str) -> dict[str, dict[str, Outputs]]:
    shape, (fused, output), found = shape_of(net.config), FUSED[family], dict[str, dict[str, Outputs]]()
    for path, module in net.named_modules():
        if path.endswith(f".{output}"):
            found[path] = {"output": np.arange(num_outputs(module))}
        elif path.endswith(f".{fused}"):
            outputs = np.arange(num_outputs(module))
            if family in HEAD_BY_HEAD:
                parts = list(outputs.reshape(shape.heads, 3, shape.head_size).swapaxes(0, 1).reshape(3, -1))
            else:
                ends = np.cumsum([shape.heads, shape.kv_heads]) * shape.head_size
                parts = np.split(outputs, ends)
            found[path] = dict(zip(("query", "key", "value"), parts, strict=True))
    return found


def _usual_projections(net: nn.Module) -> dict[str, str]:
    modules, found = dict(net.named_modules()), dict[str, str]()
    for path in modules:
        for names in USUAL:
            if all(is_linear(modules.get(f"{path}.{name}")) for name in names):
                found |= {f"{path}.{name}": what for name, what in zip(names, ("query", "key", "value"), strict=True)}
                outputs = [f"{path}.{name}" for name in USUAL_OUTPUTS] + [f"{path.rpartition('.')[0]}.output.dense"]
                found |= {where: "output" for where in outputs if is_linear(modules.get(where))}
    return found


def is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def num_outputs(module: Any) -> int:
    """Outputs of a linear layer."""
    return int(module.weight.shape[1 if is_transposed(module) else 0])


@dataclass(frozen=True)
class Shape:
    """The sizes that a width remap may change, and how attention uses them."""

    hidden: int
    heads: int
    kv_heads: int  # as many as heads, or fewer: each serves a group of heads
    head_size: int
    inner: int
    is_rotary: bool
    is_scaled: bool  # scores are divided by sqrt(head_size)


def shape_of(config: Any) -> Shape:
    """Returns the shape of a transformers config. Raises ModelError where a size differs between layers."""
    try:
        return _shape(config)
    except Exception as error:  # of a type of transformers' own
        raise ModelError(f"a {config.model_type} has layers of several shapes: {str(error).splitlines()[0]}") from None


def _shape(config: Any) -> Shape:
    inner = (getattr(config, key, None) for key in INNER_SIZES)
    heads = getattr(config, "num_attention_heads", None) or 1
    return Shape(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        inner=next(filter(None, inner), 4 * config.hidden_size),
        is_rotary=hasattr(config, "rope_parameters"),
        is_scaled=getattr(config, "scale_attn_weights", True),
    )
