"""Training: from a config to a run folder with checkpoints, metrics and a model."""
