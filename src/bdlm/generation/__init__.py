"""Sampling: from a denoiser and prompts to tokens, one block at a time. Depends on core and models,
never on training or likelihood."""
