"""From sources of text to batches of tokens: splits, tokenizers, files, masks. Knows no model and no phase."""
