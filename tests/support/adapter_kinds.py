"""Requests of adapters of every kind, for whole engines; imports no pytest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loraplex_memory.adapter_file import write_adapter_file
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_scheduler.plan import Request
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.adapted_prompt import adapt_prompt
from tests.support.adapter_parts import INVOCATION
from tests.support.tiny_models import VOCAB

Manifests = Mapping[str | None, AdapterManifest | None]

PROMPT = tuple(4 + (5 * i) % 80 for i in range(40))

#: Both begin alike, so that prefixes are found; the activated adapter starts in the third page.
PROMPTS = [(*PROMPT[:35], *INVOCATION, 7, 9), (*PROMPT, *INVOCATION, 8)]


def save_kinds(folder: Path, adapters: Mapping[str, AdapterWeights]) -> Manifests:
    """Write adapters of a model of two layers; return the manifests, and None of the base."""
    manifests: dict[str | None, AdapterManifest | None] = {None: None}
    for name, weights in adapters.items():
        path = folder / f"{name}.safetensors"
        write_adapter_file(path, weights)
        manifests[name] = AdapterManifest(name, str(path), weights.spec(2))
    return manifests


def make_request(
    request_id: str,
    manifest: AdapterManifest | None,
    prompt: Sequence[int],
    *,
    max_tokens: int = 6,
) -> Request:
    """Return a greedy request as the server would make it."""
    adapted = adapt_prompt(manifest, prompt, VOCAB)
    return Request(
        request_id,
        adapted.token_ids,
        SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        adapted.adapter,
        adapter_start=adapted.adapter_start,
        num_virtual=adapted.num_virtual,
    )


def make_mixture(request_id: str, manifests: Manifests, *, max_tokens: int) -> Request:
    """Return a request of both plain adapters at weights of their own."""
    other = manifests["other plain"]
    assert other is not None
    request = make_request(request_id, manifests["plain"], PROMPTS[0], max_tokens=max_tokens)
    return replace(request, adapter_weight=0.5, more_adapters=((other, -2.0),))


def make_requests(manifests: Manifests, *, max_tokens: int = 6) -> list[Request]:
    """Return a request of each adapter for each prompt, named `<adapter> <prompt>`."""
    return [
        make_request(f"{name} {i}", manifest, prompt, max_tokens=max_tokens)
        for i, prompt in enumerate(PROMPTS)
        for name, manifest in manifests.items()
    ]
