"""Likelihood of texts under a model, with error bars: the bound, the exact likelihood, their
variance, and statistics of sampled text."""
