"""Generation with full-sequence (MDLM-style) models under an approximate cache."""
