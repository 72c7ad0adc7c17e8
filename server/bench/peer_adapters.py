"""The adapters of the comparison: folders for every server, and our own registrations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from peer_servers import adapter_name
from synthetic_adapters import write_adapter

from loraplex import Client
from loraplex_memory.layout import PROJECTIONS
from loraplex_server.model.loader import load_spec
from loraplex_server.model.source import resolve_model

RANKS = (8, 16, 32, 64)
_BF16_BYTES = 2


def write_missing(adapters: Path, model: Path, num_adapters: int) -> None:
    """Write generated adapters, ranks in turns, where the folder has none of that name."""
    for index in range(num_adapters):
        if not (adapters / adapter_name(index)).exists():
            _write(adapters / adapter_name(index), model, index)


def register_adapters(
    base_url: str,
    adapters: Path,
    model: Path,
    num_adapters: int,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Upload what the server at `base_url` does not know; others than the folder has are made.

    Args:
        between: called after each upload.
    """
    client = Client(base_url=base_url, timeout=120)
    known = {adapter.name for adapter in client.adapters.list()}
    for index in range(num_adapters):
        name = adapter_name(index)
        if name in known:
            continue
        folder, made = adapters / name, adapters / "made-for-upload"
        if not folder.exists():
            folder = made
            _write(folder, model, index)
        client.adapters.push(folder, name=name, check_base=False)
        if folder == made:
            shutil.rmtree(made)
        between()


def weight_bytes(model: Path) -> int:
    """Return the bytes of bfloat16 weights that a step of one token reads."""
    spec = load_spec(resolve_model(model))
    geometry = spec.geometry
    layer = sum(geometry.in_features(p) * geometry.out_features(p) for p in PROJECTIONS)
    head = spec.vocab_size * geometry.hidden_size
    return _BF16_BYTES * (geometry.num_layers * layer + head)


def _write(folder: Path, model: Path, index: int) -> None:
    source = resolve_model(model)
    rank = RANKS[index % len(RANKS)]
    geometry = load_spec(source).geometry
    write_adapter(folder, geometry, rank=rank, seed=index, base_name=source.name)
