"""Measurements: this library beside the plain form of the published algorithm, side by side in one
run."""
