"""From text to windows of token ids: sources, tokenizers, packing, a resumable stream (layer 1;
knows no model)."""
