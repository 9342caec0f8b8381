"""Comparisons of decoders and adapters for other programs, on top of `LM`."""
