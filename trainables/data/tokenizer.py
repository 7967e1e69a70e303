"""Tokenizers, trained on a data set or pretrained; each is saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from trainables.config.data import PretrainedTokenizer
from trainables.config.errors import DataError
from trainables.config.value import digest
from trainables.storage.hub import looked_in, why_not

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Keys of tokenizer_config.json that change what tokenizer.json says.
OVERRIDES = ("add_prefix_space", "do_lower_case", "strip_accents", "tokenize_chinese_chars")

# Two tokenizers with one vocabulary may still differ in what they do to case, accents, spaces and numbers.
PROBE = "The naïve Café's  RÉSUMÉ, don't_split: 1,234.5e-6 x[0] = {'key': \"value\"}\n\tunbelievably ﬁne… 中文 🙂"


def train_wordpiece(texts: Sequence[str], size: int) -> Any:
    """Trains a lower-casing BERT tokenizer with `size` entries at most. The same texts give the same vocabulary."""
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
    """Loads a tokenizer from a folder if there is one, else from the hub."""
    where = _folder_or_id(spec.name)
    if not Path(where).is_dir() and spec.name.startswith(("/", ".", "~")):
        raise DataError(
            f"tokenizer: there is no folder {spec.name!r} ({looked_in(spec.name)}); name a tokenizer's folder or a hub id"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=spec.revision, trust_remote_code=False)
    except Exception as error:  # what the files of a folder make transformers raise is of any kind
        at = f" at {spec.revision!r}" if spec.revision else ""
        reason = why_not(spec.name, "tokenizer", error)
        raise DataError(f"tokenizer: cannot load {spec.name!r}{at} from a folder or the hub: {reason}") from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer: {spec.name!r} has no fast form; choose one with a tokenizer.json")
    return _as_its_file(tokenizer, where, spec.revision)


def _as_its_file(tokenizer: Any, where: str, revision: str | None) -> Any:
    """Returns the tokenizer of `tokenizer.json`, with which the model was trained.

    AutoTokenizer gives some model types (Qwen2, Phi-3) the rules of their class in place of the file's, whatever the file says.
    What tokenizer_config.json sets itself counts.
    """
    if any(tokenizer.init_kwargs.get(key) is not None for key in OVERRIDES):
        return tokenizer
    try:
        plain = PreTrainedTokenizerFast.from_pretrained(where, revision=revision)
    except (OSError, ValueError):  # there is no such file
        return tokenizer
    return tokenizer if reads_alike(tokenizer, plain) else plain


def _folder_or_id(name: str) -> str:
    """Returns the local folder of this name where there is one, else the name, as a hub id."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def reads_alike(tokenizer: Any, other: Any) -> bool:
    """Returns whether two tokenizers give a text of all kinds of characters the same ids."""
    return encode(tokenizer, [PROBE]) == encode(other, [PROBE])


def open_tokenizer(folder: str) -> Any:
    """Opens a tokenizer in a folder that `prepare` wrote."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def chat_template(tokenizer: Any, tools: Sequence[Any] | None = None) -> str:
    """Returns the template of a chat model's tokenizer; some have another one for conversations with tools.

    Raises DataError where there is none.
    """
    try:
        template: str = tokenizer.get_chat_template(tools=tools or None)
    except ValueError:  # there is none, or several without a default
        raise DataError(
            "template: chat is the tokenizer's own, and this tokenizer has none; expected `template: alpaca`, or the "
            "tokenizer of a chat model"
        ) from None
    return template


def num_ids(tokenizer: Any) -> int:
    """Returns one more than the greatest id: `len`, unless the vocabulary has gaps."""
    greatest: int = max(tokenizer.get_vocab().values())
    return max(len(tokenizer), 1 + greatest)


def identity(tokenizer: Any) -> str:
    """Hashes the sorted token -> id map: equal where logits of two models mean the same tokens."""
    return digest(sorted(tokenizer.get_vocab().items()), 16)


def behaviour(tokenizer: Any) -> str:
    """Hashes all of a tokenizer that changes the ids of a corpus; its path does not count."""
    return digest([identity(tokenizer), encode(tokenizer, [PROBE]), ends(tokenizer), special_ids(tokenizer)], 16)


def encode(tokenizer: Any, texts: Sequence[str], *, is_template: bool = False) -> list[list[int]]:
    """Encodes texts without adding special tokens; `[MASK]` written in a text is text.

    `is_template`: special tokens in the texts are special, since a chat template is made of them.
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
    """Returns the tokens that (start a sequence, end a document): [CLS] or BOS, [SEP] or EOS, or None."""
    pairs = ((tokenizer.cls_token_id, tokenizer.bos_token_id), (tokenizer.sep_token_id, tokenizer.eos_token_id))
    start, end = (first if first is not None else second for first, second in pairs)
    return start, end


def stops(spec: PretrainedTokenizer, tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids that end a reply whatever the template: the tokenizer's own, and those that the `generation_config`
    beside it lists."""
    beside = generation_config(spec.name, spec.revision)
    return tuple(dict.fromkeys([*listed(ends(tokenizer)[1]), *(listed(beside.eos_token_id) if beside else ())]))


def generation_config(name: str, revision: str | None) -> GenerationConfig | None:
    """Returns the `generation_config` of a folder or of the hub, where there is one."""
    try:
        return GenerationConfig.from_pretrained(_folder_or_id(name), revision=revision)
    except (OSError, ValueError):
        return None


def listed(ids: int | list[int] | None) -> list[int]:
    """Returns token ids as a list: configs hold one, several or none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def marks(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of added tokens with which templates mark the parts of a conversation: neither blanks nor unknown."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, token in added if not str(token.content).isspace() and i != tokenizer.unk_token_id)


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids that are never masked and never drawn."""
    return tuple(sorted(set(tokenizer.all_special_ids)))


def _splits_words(char: str) -> bool:
    """Returns whether BERT's pre-tokenizer makes a word of the character, so that it never continues a word."""
    return unicodedata.category(char).startswith("P") or (char.isascii() and not char.isalnum())
