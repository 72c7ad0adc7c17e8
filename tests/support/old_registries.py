"""Data folders as earlier releases wrote them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex_server.adapters.registry import scope_of
from tests.support.adapters import BASE_NAME, TINY


def write_registry_1(
    data_dir: Path, tensors: Mapping[str, torch.Tensor], *, name: str = "a"
) -> str:
    """Write what the first release had after an upload of LoRA `tensors` of alpha / r = 2.

    Returns:
        The id that it gave the adapter.
    """
    blobs = data_dir / "blobs"
    blobs.mkdir(parents=True)
    pairs, ranks = {}, {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        module = f"{parts[4]}.{parts[6].removesuffix('_proj')}"
        side = parts[-2].removeprefix("lora_")
        pairs[f"{module}.{side}"] = tensor
        if side == "A":
            ranks[module] = tensor.shape[0]
    digits = hashlib.sha256(name.encode()).hexdigest()
    file = blobs / f"{digits}.safetensors"
    scales = json.dumps(dict.fromkeys(ranks, 2.0))
    save_file(pairs, file, metadata={"format": "loraplex-adapter-1", "scales": scales})
    row = (f"sha256:{digits}", json.dumps(ranks), file.stat().st_size)
    _write_tables(data_dir, version=1, column="ranks", row=row, name=name)
    return row[0]


def write_registry_2(data_dir: Path, row: tuple[str, str, int], *, name: str = "a") -> None:
    """Write the tables of schema 2 with one adapter (id, spec as JSON, bytes), and no file."""
    data_dir.mkdir(parents=True, exist_ok=True)
    _write_tables(data_dir, version=2, column="spec", row=row, name=name)


def _write_tables(
    data_dir: Path, *, version: int, column: str, row: tuple[str, str, int], name: str
) -> None:
    connection = sqlite3.connect(data_dir / "catalog.sqlite3")
    connection.executescript(f"""
        PRAGMA journal_mode = WAL;
        CREATE TABLE adapters (
            id VARCHAR NOT NULL, {column} VARCHAR NOT NULL, size_bytes INTEGER NOT NULL,
            PRIMARY KEY (id));
        CREATE TABLE names (
            scope VARCHAR NOT NULL, name VARCHAR NOT NULL, adapter_id VARCHAR NOT NULL,
            base_model VARCHAR NOT NULL, created INTEGER NOT NULL,
            PRIMARY KEY (scope, name), FOREIGN KEY(adapter_id) REFERENCES adapters (id));
        CREATE INDEX ix_names_adapter_id ON names (adapter_id);
        PRAGMA user_version = {version};
    """)
    connection.execute("INSERT INTO adapters VALUES (?, ?, ?)", row)
    scope = scope_of(BASE_NAME, TINY)
    values = (scope, name, row[0], BASE_NAME, 1_700_000_000)
    connection.execute("INSERT INTO names VALUES (?, ?, ?, ?, ?)", values)
    connection.commit()
    connection.close()
