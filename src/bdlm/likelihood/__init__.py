"""How likely a model finds a text, with error bars: the bound, the exact likelihood, their
variance, and measures of sampled text."""
