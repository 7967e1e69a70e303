"""Tokenizers: trained on a corpus, or pretrained. Each ends as an ordinary Hugging Face folder."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainables.config.data import PretrainedTokenizer
from trainables.config.errors import DataError
from trainables.config.value import digest
from trainables.storage.hub import why_not

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Two tokenizers with one vocabulary may still differ in what they do to case, accents, spaces and numbers.
PROBE = "The naïve Café's  RÉSUMÉ, don't_split: 1,234.5e-6 x[0] = {'key': \"value\"}\n\tunbelievably ﬁne… 中文 🙂"


def train_wordpiece(texts: Sequence[str], size: int) -> Any:
    """A lower-casing BERT tokenizer with `size` entries at most. The same texts give the same vocabulary."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    by_count = sorted((char for char in counts if not char.isspace()), key=lambda char: (-counts[char], char))
    alphabet = sorted(by_count[: min(1000, size // 4)])
    # The trainer numbers the `##x` of the alphabet in the order of a randomly seeded hash map, and breaks ties between
    # merges by number. Named as special tokens they are numbered first, and in our order.
    continuing = [f"##{char}" for char in alphabet if not _splits_words(char)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(texts, trainer)

    backend = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))  # in which no `##x` is special
    backend.normalizer, backend.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    backend.decoder = decoders.WordPiece()
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    pad, unk, cls, sep, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, mask_token=mask
    )


def load_pretrained(spec: PretrainedTokenizer) -> Any:
    """From a folder if there is one, else from the hub."""
    folder = Path(spec.name).expanduser()
    if not folder.is_dir() and spec.name.startswith(("/", ".", "~")):
        raise DataError(f"tokenizer: there is no folder {spec.name!r}; name a tokenizer's folder or a hub id")
    try:
        where = str(folder) if folder.is_dir() else spec.name
        tokenizer = AutoTokenizer.from_pretrained(where, revision=spec.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        at = f" at {spec.revision!r}" if spec.revision else ""
        reason = why_not(spec.name, "tokenizer", error)
        raise DataError(f"tokenizer: cannot load {spec.name!r}{at} from a folder or the hub: {reason}") from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer: {spec.name!r} has no fast form; choose one with a tokenizer.json")
    return tokenizer


def open_tokenizer(folder: str) -> Any:
    """From a folder that `prepare` wrote."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def num_ids(tokenizer: Any) -> int:
    """One more than its greatest id. That is `len`, but where a vocabulary has gaps."""
    greatest: int = max(tokenizer.get_vocab().values())
    return max(len(tokenizer), 1 + greatest)


def identity(tokenizer: Any) -> str:
    """Hash of the sorted token -> id map: equal where logits of two models mean the same tokens."""
    return digest(sorted(tokenizer.get_vocab().items()), 16)


def behaviour(tokenizer: Any) -> str:
    """Hash of whatever of a tokenizer changes the ids of a corpus; where it lies does not count."""
    return digest([identity(tokenizer), encode(tokenizer, [PROBE]), ends(tokenizer), special_ids(tokenizer)], 16)


def encode(tokenizer: Any, texts: Sequence[str], *, is_template: bool = False) -> list[list[int]]:
    """Ids of each text, to which no special tokens are added: `[MASK]` written in a text is text.

    `is_template`: special tokens are what they are, since a chat template is made of them.
    """
    encoded: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not is_template,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents are longer than a model's input; they are packed
    )["input_ids"]
    return encoded


def ends(tokenizer: Any) -> tuple[int | None, int | None]:
    """(what starts a sequence, what ends a document): [CLS] or BOS, [SEP] or EOS, or None."""
    pairs = ((tokenizer.cls_token_id, tokenizer.bos_token_id), (tokenizer.sep_token_id, tokenizer.eos_token_id))
    start, end = (first if first is not None else second for first, second in pairs)
    return start, end


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Never supervised under masking and never drawn."""
    return tuple(sorted(set(tokenizer.all_special_ids)))


def _splits_words(char: str) -> bool:
    """Whether BERT's pre-tokenizer makes a word of its own of it, so that it never continues one."""
    return unicodedata.category(char).startswith("P") or (char.isascii() and not char.isalnum())
