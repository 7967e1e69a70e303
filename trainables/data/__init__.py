"""Text in, sequences of tokens out: sources, splits, tokenizer, packed files, masks. Knows no model and no phase."""
