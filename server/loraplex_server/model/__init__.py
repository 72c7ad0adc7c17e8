"""The base model: where its files are, what it computes, its weights, and the sampler."""
