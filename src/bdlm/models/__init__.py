"""Things that satisfy the Denoiser contract. They depend on `bdlm.core` alone."""
