"""Draws from logits: counter-based noise, filters, guidance. Pure functions."""
