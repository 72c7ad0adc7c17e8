from __future__ import annotations

from pathlib import Path

import pytest

from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.registration import Registration
from loraplex_server.api.services import build_catalog
from loraplex_server.build import ModelFacts
from loraplex_server.config import Config
from loraplex_server.model.errors import CheckpointError
from loraplex_server.model.source import ModelSource
from loraplex_server.model.spec import ModelSpec
from tests.server.api.conftest import make_adapter
from tests.support.adapters import make_tiny_base


def write_base(folder: Path, **config) -> Path:
    base = make_tiny_base()
    base.config.update(config)
    base.save_pretrained(folder)
    return folder


def open_catalog(tmp_path: Path, base: Path) -> AdapterCatalog:
    source = ModelSource("folder", base, base.name)
    spec = ModelSpec.from_config(make_tiny_base().config, base_name=base.name)
    facts = ModelFacts(source, spec, PoolLayout(spec.geometry))
    return build_catalog(Config(data_dir=tmp_path / "data"), facts, lambda adapter_id: None)


def test_adapters_follow_the_files_of_their_base_not_its_folders_name(tmp_path):
    first = write_base(tmp_path / "a" / "final")
    catalog = open_catalog(tmp_path, first)
    catalog.register(Registration("x"), make_adapter(tmp_path / "x", base="final"))
    catalog.close()
    other = open_catalog(tmp_path, write_base(tmp_path / "b" / "final", note="another"))
    assert other.list() == ()
    other.close()
    moved = open_catalog(tmp_path, first.rename(tmp_path / "moved"))
    assert [record.name for record in moved.list()] == ["x"]
    moved.close()


def test_a_base_whose_files_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_catalog(tmp_path, tmp_path)
