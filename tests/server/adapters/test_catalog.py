"""Names, files and leases: what is registered stays, what is used stays, nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import (
    AdapterNameTaken,
    AdapterNotFound,
    AdapterRefused,
    InvalidAdapterName,
    InvalidUpload,
)
from loraplex_server.adapters.registration import Registration
from tests.support.adapters import (
    BASE_NAME,
    TINY,
    make_catalog,
    make_config,
    make_folder,
    make_tensors,
    read_folder,
)


@pytest.fixture
def discarded() -> list[str]:
    return []


@pytest.fixture
def catalog(tmp_path: Path, discarded: list[str]) -> Iterator[AdapterCatalog]:
    catalog = make_catalog(tmp_path / "data", on_discard=discarded.append)
    yield catalog
    catalog.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "adapter")


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "other", seed=1)


def blobs(tmp_path: Path) -> set[str]:
    return {f"sha256:{path.stem}" for path in (tmp_path / "data" / "blobs").iterdir()}


def staging(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data" / "staging").iterdir())


def test_a_registered_adapter_is_described_and_stored_exactly(catalog, folder):
    record, is_new = catalog.register(Registration("acme/sql"), folder)
    expected = read_folder(folder).weights
    assert is_new
    assert record == catalog.get("acme/sql")
    assert record.id.startswith("sha256:")
    assert record.base_model == BASE_NAME
    assert record.spec == expected.spec(TINY.num_layers)
    assert (record.rank_max, record.target_modules) == (4, ("q", "v"))
    assert record.pool_pages == AdapterLayout(PoolLayout(TINY), record.spec).num_pages
    with catalog.acquire("acme/sql") as lease:
        assert lease.record == record
        assert (lease.manifest.adapter_id, lease.manifest.spec) == (record.id, record.spec)
        path = Path(lease.manifest.path)
        assert path.is_absolute()
        assert path.stat().st_size == record.size_bytes
        stored = read_adapter_file(path).lora
    assert stored.keys() == expected.lora.keys()
    for key, pair in expected.lora.items():
        assert torch.equal(stored[key].a, pair.a)
        assert torch.equal(stored[key].b, pair.b)
        assert stored[key].scale == pair.scale


def test_fused_linears_are_stored_split(catalog, tmp_path):
    stem = "base_model.model.model.layers.0.self_attn.qkv_proj"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(4, 64),
        f"{stem}.lora_B.weight": torch.randn(128, 4),
    }
    config = make_config(target_modules=["qkv_proj"])
    record, _ = catalog.register(
        Registration("a"), make_folder(tmp_path / "x", config=config, tensors=tensors)
    )
    assert record.target_modules == ("q", "k", "v")
    with catalog.acquire("a") as lease:
        stored = read_adapter_file(Path(lease.manifest.path)).lora
    b = torch.cat([stored[0, p].b for p in ("q", "k", "v")])
    assert torch.equal(b, tensors[f"{stem}.lora_B.weight"])
    assert all(torch.equal(stored[0, p].a, tensors[f"{stem}.lora_A.weight"]) for p in "qkv")


def test_the_same_name_with_the_same_content_changes_nothing(catalog, folder, tmp_path):
    first, _ = catalog.register(Registration("a"), folder)
    again = make_folder(tmp_path / "again", config=make_config(lora_dropout=0.5))
    assert catalog.register(Registration("a"), again) == (first, False)


def test_the_same_name_with_other_content_is_taken(catalog, folder, other_folder, tmp_path):
    first, _ = catalog.register(Registration("a"), folder)
    with pytest.raises(AdapterNameTaken) as taken:
        catalog.register(Registration("a"), other_folder)
    assert taken.value.name == "a"
    assert catalog.get("a") == first
    assert blobs(tmp_path) == {first.id}


def test_refusals_carry_the_name_and_leave_nothing(catalog, tmp_path):
    with pytest.raises(AdapterRefused) as refusal:
        catalog.register(
            Registration("a"), make_folder(tmp_path / "bad", config=make_config(use_dora=True))
        )
    assert refusal.value.name == "a"
    with pytest.raises(InvalidUpload):
        catalog.register(Registration("a"), tmp_path / "nowhere")
    with pytest.raises(InvalidAdapterName):
        catalog.register(Registration(BASE_NAME.upper()), tmp_path / "bad")
    assert catalog.list() == ()
    assert blobs(tmp_path) == set()
    assert staging(tmp_path) == []


def test_an_adapter_larger_than_the_pool_is_refused(catalog, folder):
    with pytest.raises(AdapterRefused, match="which has 0"):
        catalog.register(Registration("a"), folder, max_pages=0)
    record, _ = catalog.register(Registration("a"), folder, max_pages=1000)
    with pytest.raises(AdapterRefused, match=f"needs {record.pool_pages} pages"):
        catalog.register(Registration("b"), folder, max_pages=record.pool_pages - 1)


def test_the_base_check_can_be_switched_off(catalog, tmp_path):
    folder = make_folder(tmp_path / "x", config=make_config(base_model_name_or_path="/me/mine"))
    with pytest.raises(AdapterRefused, match="/me/mine"):
        catalog.register(Registration("a"), folder)
    record, _ = catalog.register(Registration("a", check_base=False), folder)
    assert record.base_model == "/me/mine"


def test_lists_are_ordered_and_paged_by_name(catalog, folder):
    names = ["b", "a/x", "c", "a", "B"]
    for name in names:
        catalog.register(Registration(name), folder)
    assert [record.name for record in catalog.list()] == sorted(names)
    assert [record.name for record in catalog.list(limit=2)] == ["B", "a"]
    assert [record.name for record in catalog.list(limit=2, after="a")] == ["a/x", "b"]
    assert catalog.list(after="c") == ()


def test_unknown_names_are_not_found(catalog):
    for use in (catalog.get, catalog.delete, catalog.acquire):
        with pytest.raises(AdapterNotFound) as error:
            use("nobody")
        assert error.value.name == "nobody"


def test_delete_frees_the_name_the_file_and_the_pages(
    catalog, folder, other_folder, tmp_path, discarded
):
    record, _ = catalog.register(Registration("a"), folder)
    assert catalog.delete("a").record == record
    assert blobs(tmp_path) == set()
    assert discarded == [record.id]
    second, is_new = catalog.register(Registration("a"), other_folder)
    assert is_new
    assert second.id != record.id


def test_an_adapter_deleted_in_use_stays_until_the_last_user_ends(
    catalog, folder, tmp_path, discarded
):
    record, _ = catalog.register(Registration("a"), folder)
    first, second = catalog.acquire("a"), catalog.acquire("a")
    assert catalog.num_leases(record.id) == 2
    catalog.delete("a")
    with pytest.raises(AdapterNotFound):
        catalog.acquire("a")
    first.release()
    first.release()
    assert read_adapter_file(Path(second.manifest.path))
    assert discarded == []
    second.release()
    assert blobs(tmp_path) == set()
    assert discarded == [record.id]
    assert catalog.num_leases(record.id) == 0


def test_a_name_replaced_in_use_keeps_meaning_the_old_adapter_to_its_users(
    catalog, folder, other_folder, tmp_path
):
    old, _ = catalog.register(Registration("a"), folder)
    lease = catalog.acquire("a")
    catalog.delete("a")
    new, _ = catalog.register(Registration("a"), other_folder)
    assert lease.record.id == old.id
    assert Path(lease.manifest.path).exists()
    with catalog.acquire("a") as fresh:
        assert fresh.record.id == new.id
    lease.release()
    assert blobs(tmp_path) == {new.id}


def test_content_registered_again_while_its_last_user_runs_stays(
    catalog, folder, tmp_path, discarded
):
    record, _ = catalog.register(Registration("a"), folder)
    with catalog.acquire("a"):
        catalog.delete("a")
        catalog.register(Registration("b"), folder)
    assert blobs(tmp_path) == {record.id}
    assert discarded == []


def test_two_names_of_one_content_share_a_file_and_each_can_go(
    catalog, folder, tmp_path, discarded
):
    first, _ = catalog.register(Registration("a"), folder)
    second, is_new = catalog.register(Registration("b"), folder)
    assert is_new
    assert first.id == second.id
    catalog.delete("a")
    assert discarded == []
    with catalog.acquire("b") as lease:
        assert Path(lease.manifest.path).exists()
    catalog.delete("b")
    assert blobs(tmp_path) == set()
    assert discarded == [first.id]


def test_a_remote_blob_store_serves_local_files(tmp_path, folder):
    settings = {"blob_url": f"memory://{tmp_path.name}/blobs"}
    catalog = make_catalog(tmp_path / "data", **settings)
    catalog.register(Registration("a"), folder)
    catalog.close()
    catalog = make_catalog(tmp_path / "data", **settings)
    with catalog.acquire("a") as lease:
        assert read_adapter_file(Path(lease.manifest.path))
    catalog.delete("a")
    assert not Path(lease.manifest.path).exists()
    catalog.close()


def test_many_ranks_survive_the_database(catalog, tmp_path):
    tensors = {}
    for layer, ranks in enumerate(({"q": 1, "down": 7}, {"k": 3, "gate": 2})):
        made = make_tensors(ranks, num_layers=layer + 1, seed=layer)
        tensors |= {name: t for name, t in made.items() if f".layers.{layer}." in name}
    config = make_config(rank_pattern={"q_proj": 1, "k_proj": 3, "gate_proj": 2, "down_proj": 7})
    record, _ = catalog.register(
        Registration("a"), make_folder(tmp_path / "x", config=config, tensors=tensors)
    )
    assert record.spec.ranks == ((1, 0, 0, 0, 0, 0, 7), (0, 3, 0, 0, 2, 0, 0))
    assert catalog.get("a") == record
    assert record.target_modules == ("q", "k", "gate", "down")
    assert record.rank_max == 7
