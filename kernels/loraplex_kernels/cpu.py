"""The CPU path (being written): forwards to the reference for now."""

from loraplex_kernels.reference import add_lora, paged_attention

__all__ = ["add_lora", "paged_attention"]
