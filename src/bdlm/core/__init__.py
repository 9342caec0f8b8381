"""The mathematics of block diffusion: pure functions and frozen records on tensors. Torch and the
standard library only."""
