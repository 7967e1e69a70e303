"""Checks that pretrained weights and prepared data have the same tokenizer: equal token -> id maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer

from trainables.config.errors import ModelError
from trainables.config.models import Model
from trainables.models.configs import one_line
from trainables.storage.hub import model_folder

TOKENIZERS = ["tokenizer*", "vocab*", "merges.txt", "*.model"]  # files of a tokenizer, of which each kind has some


def check_tokenizer(model: Model, data_tokenizer: Any, data_name: str) -> None:
    """Raises ModelError where pretrained weights come with another token -> id map than that of the data's tokenizer.

    Rows of embeddings beyond the map are padding, of any number. Weights without a tokenizer pass.
    """
    if model.pretrained is None:
        return
    folder = model_folder(model.pretrained, model.revision, ["config.json", *TOKENIZERS])
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        return
    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).get_vocab()
    except Exception as error:  # what a tokenizer's files make transformers raise is of any kind
        raise ModelError(f"the tokenizer of {model.pretrained!r} cannot be read: {one_line(error)}") from None
    if difference := difference_of({repr(model.pretrained): theirs, f"data {data_name!r}": data_tokenizer.get_vocab()}):
        own = f"a model may read with one of data.{data_name}.tokenizers where no token is compared"
        raise ModelError(f"{difference}; {own}; expected tokenizer: {{kind: pretrained, name: {model.pretrained!r}}}")


def difference_of(vocabularies: Mapping[str, Mapping[str, int]]) -> str | None:
    """Returns how the token -> id maps of two tokenizers, by their owners, differ; None where they are equal."""
    (first, theirs), (second, ours) = vocabularies.items()
    differ = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    if not differ:
        return None
    token = min(differ, key=lambda token: (ours.get(token, theirs.get(token)), token))
    ids = " and ".join(
        (f"{ids_of[token]} in" if token in ids_of else "not in") + f" that of {owner}"
        for owner, ids_of in zip((name.replace("'", "") for name in vocabularies), (theirs, ours), strict=True)
    )
    return (
        f"the tokenizers of {first} ({len(theirs)} tokens) and of {second} ({len(ours)}) differ in {len(differ)} tokens: "
        f"{token!r} is {ids}"
    )


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Returns the tokenizer's ids by the names that transformers' configs use."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


def other_special_ids(config: Any, tokenizer: Any) -> list[str]:
    """Says where a pretrained model's config has other special tokens than the tokenizer, by which data are read."""
    lines = []
    for name, ours in special_ids(tokenizer).items():
        theirs = getattr(config, name, None)
        if theirs is not None and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            lines.append(f"its config.json has {name} {theirs}, the tokenizer {ours}; the tokenizer's is read")
    return lines
