"""A prompt as the engine computes it for one adapter: what stands before it, and where it begins
to matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex_memory.adapter_manifest import AdapterManifest


@dataclass(frozen=True)
class AdaptedPrompt:
    """Fields of `scheduler.plan.Request`, named as there.

    Attributes:
        token_ids: the virtual tokens, then the prompt.
        num_virtual: how many of them are virtual.
    """

    adapter: AdapterManifest | None
    token_ids: tuple[int, ...]
    num_virtual: int = 0
    adapter_start: int = 0


def adapt_prompt(
    manifest: AdapterManifest | None, token_ids: Sequence[int], vocab_size: int
) -> AdaptedPrompt:
    """Return what the engine is asked to compute.

    An activated LoRA applies from the last occurrence of its invocation tokens on; a prompt without
    them is the base's (as in PEFT, `peft/tuners/lora/variants.py`, `ALoraLinearVariant`).

    Args:
        manifest: whose prompt it is; None for the base model.
        token_ids: the prompt as the user knows it; all below `vocab_size`.
        vocab_size: rows of the model's embedding, the id of the first virtual token.
    """
    prompt = tuple(token_ids)
    if manifest is None:
        return AdaptedPrompt(None, prompt)
    spec = manifest.spec
    if spec.invocation_token_ids:
        start = _last_occurrence(prompt, spec.invocation_token_ids)
        if start is None:
            return AdaptedPrompt(None, prompt)
        return AdaptedPrompt(manifest, prompt, adapter_start=start)
    num_virtual = spec.num_virtual_tokens
    virtual = tuple(range(vocab_size, vocab_size + num_virtual))
    return AdaptedPrompt(manifest, virtual + prompt, num_virtual)


def _last_occurrence(tokens: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
    length = len(wanted)
    starts = range(len(tokens) - length, -1, -1)
    return next((at for at in starts if tokens[at : at + length] == wanted), None)
