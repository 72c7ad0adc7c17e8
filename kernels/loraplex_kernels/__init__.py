"""LoRA over paged weights and attention over paged KV.

`batch` holds what the kernels take; `reference` defines every operation in plain torch; `cpu` is
the fast CPU path; `ops` alone chooses between them.
"""
