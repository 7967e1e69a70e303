"""A pretrained tokenizer reads texts as its tokenizer.json does, whatever class transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen2Config

from trainables.config.data import PretrainedTokenizer
from trainables.data.tokenizer import encode, load_pretrained, open_tokenizer, reads_alike

TEXT = "In 2023 there were 650841823 things; isn't it?"


def write_folder(folder: Path, config: PreTrainedConfig, **about: Any) -> Tokenizer:
    """A byte-level tokenizer that cuts numbers into three digits at a time, in the folder of a model of some type."""
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 20, trainer)
    config.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **about}))
    return backend


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Qwen2Config(), "Qwen2Tokenizer"),
        (LlamaConfig(), "LlamaTokenizer"),
        (LlamaConfig(), "PreTrainedTokenizerFast"),
    ],
)
def test_the_file_counts_and_not_the_class(tmp_path: Path, config: PreTrainedConfig, name: str) -> None:
    backend = write_folder(tmp_path, config, tokenizer_class=name)
    loaded = load_pretrained(PretrainedTokenizer(kind="pretrained", name=str(tmp_path)))
    assert encode(loaded, [TEXT]) == [backend.encode(TEXT, add_special_tokens=False).ids] and loaded.eos_token == "</s>"
    loaded.save_pretrained(tmp_path / "prepared")
    assert reads_alike(open_tokenizer(str(tmp_path / "prepared")), loaded)


def test_what_the_config_sets_itself_counts(tmp_path: Path) -> None:
    write_folder(tmp_path, Qwen2Config(), tokenizer_class="Qwen2Tokenizer", add_prefix_space=True)
    loaded = load_pretrained(PretrainedTokenizer(kind="pretrained", name=str(tmp_path)))
    assert reads_alike(loaded, AutoTokenizer.from_pretrained(tmp_path))
