"""The transformer, its weights, and the sampler."""
