"""Copies of remote files on this machine's disk: which go, and when."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_server.adapters import local_copies
from loraplex_server.adapters.local_copies import LocalCopies
from loraplex_server.adapters.registration import Registration
from tests.support.adapters import make_catalog, make_folder

IDS = ["sha256:" + letter * 64 for letter in "abc"]
SIZE = 1000


def download(adapter_id: str, to: Path) -> None:
    to.write_bytes(adapter_id[-1].encode() * SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fill(copies: LocalCopies) -> None:
    """Fetch all, used in their order."""
    for used_s, adapter_id in enumerate(IDS):
        os.utime(copies.fetch(adapter_id, download), (used_s, used_s))


def those_left(copies: LocalCopies) -> list[str]:
    return [adapter_id for adapter_id in IDS if copies.find(adapter_id) is not None]


def make_room(copies: LocalCopies, *held: str) -> None:
    def remove(adapter_id: str) -> bool:
        if adapter_id not in held:
            copies.remove(adapter_id)
        return adapter_id not in held

    copies.make_room(remove)


def test_those_used_longest_ago_go_first(folder):
    copies = LocalCopies(folder, 2 * SIZE)
    make_room(copies)  # there is no folder yet
    fill(copies)
    assert copies.find(IDS[0]) is not None, "which is a use of it"
    make_room(copies)
    assert those_left(copies) == [IDS[0], IDS[2]]


def test_those_in_use_stay(folder):
    copies = LocalCopies(folder, SIZE)
    fill(copies)
    make_room(copies, IDS[0])
    assert those_left(copies) == [IDS[0]]
    copies = LocalCopies(folder, 1)
    make_room(copies, *IDS)
    assert those_left(copies) == [IDS[0]]


@pytest.mark.parametrize(
    ("free", "left"), [(10 * SIZE, IDS), (9 * SIZE, IDS[1:]), (0, [])], ids=["enough", "less", "no"]
)
def test_a_tenth_of_the_disk_stays_free_where_nobody_gives_a_number(
    folder, monkeypatch, free, left
):
    disk = SimpleNamespace(total=100 * SIZE, free=free)
    monkeypatch.setattr(local_copies.shutil, "disk_usage", lambda path: disk)
    copies = LocalCopies(folder)
    fill(copies)
    make_room(copies)
    assert those_left(copies) == left


def test_what_is_being_fetched_is_left_alone(folder):
    copies = LocalCopies(folder, 1)

    def download_slowly(adapter_id: str, to: Path) -> None:
        download(adapter_id, to)
        make_room(copies)

    assert copies.fetch(IDS[0], download_slowly).stat().st_size == SIZE


def test_a_fetch_that_fails_leaves_nothing(folder):
    def fail(adapter_id: str, to: Path) -> None:
        to.write_bytes(b"half")
        raise OSError("it broke off")

    with pytest.raises(OSError, match="broke off"):
        LocalCopies(folder).fetch(IDS[0], fail)
    assert list(folder.iterdir()) == []


def test_a_file_that_cannot_be_kept_leaves_no_old_copy(folder, tmp_path, monkeypatch):
    copies = LocalCopies(folder)
    copies.fetch(IDS[0], download)
    file = tmp_path / "staged"
    file.write_bytes(b"new")

    def fail(path: Path, target: Path) -> None:
        raise OSError("another disk")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        copies.take(IDS[0], file)
    assert copies.find(IDS[0]) is None
    assert not file.exists()


def test_a_catalogue_keeps_its_copies_within_their_bytes(tmp_path):
    url = f"memory://{tmp_path.name}/blobs"
    with_files = make_catalog(tmp_path / "a", blob_url=url, copies_bytes=1)
    for seed, name in enumerate(("held", "idle")):
        with_files.register(Registration(name), make_folder(tmp_path / name, seed=seed))
    copies = tmp_path / "a" / "cache"
    with with_files.acquire("held") as lease:
        with_files.make_room()
        assert [str(path) for path in copies.iterdir()] == [lease.manifest.path]
    with with_files.acquire("idle") as lease:
        assert read_adapter_file(Path(lease.manifest.path)).lora
        with_files.make_room()
        assert [str(path) for path in copies.iterdir()] == [lease.manifest.path]
    with_files.close()


def test_uploading_again_heals_a_damaged_copy(tmp_path):
    catalog = make_catalog(tmp_path / "a", blob_url=f"memory://{tmp_path.name}/blobs")
    folder = make_folder(tmp_path / "n")
    catalog.register(Registration("n"), folder)
    (copy,) = (tmp_path / "a" / "cache").iterdir()
    copy.write_bytes(b"damaged")
    catalog.register(Registration("n"), folder)
    with catalog.acquire("n") as lease:
        assert read_adapter_file(Path(lease.manifest.path)).lora
    catalog.close()
