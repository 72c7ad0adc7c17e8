from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.api.services import build_catalog
from loraplex_server.config import Config
from loraplex_server.model.errors import CheckpointError
from loraplex_server.model.source import ModelSource
from tests.server.api.conftest import GEOMETRY, make_adapter


def write_base(folder: Path, config: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def open_catalog(tmp_path: Path, base: Path) -> AdapterCatalog:
    facts = SimpleNamespace(
        source=ModelSource("folder", base, base.name),
        layout=PoolLayout(GEOMETRY),
        base_name=base.name,
    )
    return build_catalog(Config(data_dir=tmp_path / "data"), facts, lambda adapter_id: None)


def test_adapters_follow_the_files_of_their_base_not_its_folders_name(tmp_path):
    first = write_base(tmp_path / "a" / "final", "{}")
    catalog = open_catalog(tmp_path, first)
    catalog.register("x", make_adapter(tmp_path / "x", base="final"))
    catalog.close()
    other = open_catalog(tmp_path, write_base(tmp_path / "b" / "final", '{"a": 1}'))
    assert other.list() == ()
    other.close()
    moved = open_catalog(tmp_path, first.rename(tmp_path / "moved"))
    assert [record.name for record in moved.list()] == ["x"]
    moved.close()


def test_a_base_whose_files_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_catalog(tmp_path, tmp_path)
