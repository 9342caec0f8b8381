"""Generation: from a denoiser and prompts to tokens, one block at a time. Imports core and models,
never training or likelihood."""
