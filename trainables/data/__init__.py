"""Text in, sequences of tokens out: sources, splits, tokenizer, packed files, masks. Knows no model and no phase."""


class DataError(ValueError):
    """What is wrong with the data, where, and what would be valid: one sentence for the one who wrote the study."""
