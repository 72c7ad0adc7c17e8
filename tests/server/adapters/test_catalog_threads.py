"""Many threads on one catalogue."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_server.adapters.errors import AdapterNameTaken, AdapterNotFound
from loraplex_server.adapters.registration import Registration
from tests.support.adapters import make_catalog, make_folder


def blobs(tmp_path: Path) -> set[str]:
    return {f"sha256:{path.stem}" for path in (tmp_path / "data" / "blobs").iterdir()}


def test_of_concurrent_uploads_of_one_name_exactly_one_wins(tmp_path):
    catalog = make_catalog(tmp_path / "data")
    folders = [make_folder(tmp_path / f"f{seed}", seed=seed) for seed in range(4)]
    barrier = threading.Barrier(8)

    def upload(folder: Path) -> str | None:
        barrier.wait()
        try:
            record, is_new = catalog.register(Registration("a"), folder)
        except AdapterNameTaken:
            return None
        return f"{record.id} {is_new}"

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(upload, folders * 2))
    winner = catalog.get("a").id
    assert outcomes.count(f"{winner} True") == 1
    assert outcomes.count(f"{winner} False") == 1
    assert outcomes.count(None) == 6
    assert blobs(tmp_path) == {winner}
    catalog.close()


def test_threads_registering_using_and_deleting_leave_a_consistent_catalogue(tmp_path):
    catalog = make_catalog(tmp_path / "data")
    folders = [make_folder(tmp_path / f"f{seed}", seed=seed) for seed in range(3)]

    def work(worker: int) -> int:
        used = 0
        for step in range(30):
            name = f"n{(worker + step) % 3}"
            folder = folders[(worker * 7 + step) % 3]
            try:
                if step % 3 == 0:
                    catalog.register(Registration(name), folder)
                elif step % 3 == 1:
                    with catalog.acquire(name) as lease:
                        catalog.delete(name)
                        # Held, so it is whole whatever the others do.
                        assert read_adapter_file(Path(lease.manifest.path))
                        used += 1
                else:
                    with catalog.acquire(name) as lease:
                        assert read_adapter_file(Path(lease.manifest.path))
                        used += 1
            except (AdapterNotFound, AdapterNameTaken):
                pass
        return used

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(work, range(6))) > 0
    assert blobs(tmp_path) == {record.id for record in catalog.list()}
    assert list((tmp_path / "data" / "staging").iterdir()) == []
    for record in catalog.list():
        with catalog.acquire(record.name) as lease:
            assert read_adapter_file(Path(lease.manifest.path))
        assert catalog.num_leases(record.id) == 0
    catalog.close()
