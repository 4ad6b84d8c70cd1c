"""Stream video from a compiled causal denoiser."""
