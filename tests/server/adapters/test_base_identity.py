from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplex_server.adapters.base_identity import base_identity


def write_base(folder: Path, *, seed: int = 0, config: str = "{}", num_rows: int = 4000) -> Path:
    """Write a model of two megabytes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    weight = random.standard_normal((num_rows, 128), dtype=np.float32)
    save_file({"weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return folder


def identity(folder: Path) -> str:
    return base_identity([folder / "config.json", folder / "model.safetensors"])


def test_a_base_is_the_same_wherever_it_lies(tmp_path):
    first = identity(write_base(tmp_path / "a" / "base"))
    assert first.startswith("sha256:")
    assert identity(write_base(tmp_path / "b" / "renamed")) == first


@pytest.mark.parametrize("other", [{"seed": 1}, {"config": '{"a": 1}'}, {"num_rows": 4001}])
def test_another_base_in_a_folder_of_the_same_name_is_another(tmp_path, other):
    first = identity(write_base(tmp_path / "a" / "final"))
    assert identity(write_base(tmp_path / "b" / "final", **other)) != first


@pytest.mark.parametrize("place", [0.001, 0.5, 0.999])
def test_a_layer_that_was_trained_further_makes_another_base(tmp_path, place):
    path = tmp_path / "model.gguf"
    content = bytearray(24 << 20)
    path.write_bytes(content)
    first = base_identity([path])
    at = int(place * (len(content) - (1 << 20)))
    content[at : at + (2 << 20)] = b"x" * (2 << 20)
    path.write_bytes(content[: 24 << 20])
    assert base_identity([path]) != first


def test_small_and_empty_files_are_read_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    empty = base_identity([path])
    path.write_bytes(b"short")
    assert base_identity([path]) != empty
