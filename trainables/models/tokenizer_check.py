"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoTokenizer,
)

from trainables.config.errors import ModelError
from trainables.config.models import Model
from trainables.models.build import _folder

TOKENIZERS = ["tokenizer*", "vocab*", "merges.txt", "*.model"]  # names of files of which a tokenizer has some


def check_tokenizer(model: Model, data_tokenizer: Any, data_name: str) -> None:
    """Raises ModelError where pretrained weights come with another token -> id map than the data's tokenizer has.

    Rows of embeddings beyond the map are padding, and any number of them is fine; so are weights without a tokenizer.
    """
    if model.pretrained is None:
        return
    folder = _folder(model.pretrained, model.revision, ["config.json", *TOKENIZERS])
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        return
    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).get_vocab()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the tokenizer of {model.pretrained!r} cannot be read: {str(error).splitlines()[0]}"
        ) from None
    if difference := difference_of({repr(model.pretrained): theirs, f"data {data_name!r}": data_tokenizer.get_vocab()}):
        raise ModelError(f"{difference}; expected tokenizer: {{kind: pretrained, name: {model.pretrained}}}")


def difference_of(vocabularies: Mapping[str, Mapping[str, int]]) -> str | None:
    """How the token -> id maps of two tokenizers, by whose they are, differ; None where they do not."""
    (one, theirs), (other, ours) = vocabularies.items()
    differ = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    if not differ:
        return None
    token = min(differ, key=lambda token: (ours.get(token, theirs.get(token)), token))
    ids = " and ".join(
        f"{ids_of[token]} in that of {whose}" if token in ids_of else f"not in that of {whose}"
        for whose, ids_of in zip((name.replace("'", "") for name in vocabularies), vocabularies.values(), strict=True)
    )
    return (
        f"the tokenizers of {one} ({len(theirs)} tokens) and of {other} ({len(ours)}) differ in {len(differ)} tokens: "
        f"{token!r} is {ids}"
    )


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The tokenizer's ids by the names that transformers' configs use."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
