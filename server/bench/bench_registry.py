"""What ten thousand registered adapters cost: start-up, lists, look-ups, and files that are read.

Bound: SQLite's B-trees and, at the start, one listing of the folder of files; no adapter's file is
opened by any of it, which is counted here by an audit hook. Rows are written straight into the
registry, each with a small real file, as ten thousand uploads would take an hour.

    python server/bench/bench_registry.py [--adapters 10000] [--folder KEPT_FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loraplex_memory.adapter_file import write_adapter_file
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.adapters.reader import ReadAdapter
from loraplex_server.adapters.registry import Registry, scope_of
from loraplex_server.adapters.registry_database import open_database, sqlite_url
from loraplex_server.adapters.version_row import NewVersion, StoredAdapter

BASE = "bench-base"
#: Of an 8B model, so that specs are as long as they come.
GEOMETRY = ModelGeometry(32, 4096, 32, 8, 128, 14336)
PAGE = 100


class NoReader:
    """Nothing is uploaded here."""

    def read(self, folder: Path, *, check_base: bool = True) -> ReadAdapter:
        raise AssertionError("nothing is registered")


def fill(folder: Path, num_adapters: int) -> None:
    """Write `num_adapters` rows and files, as registrations would have left them."""
    open_catalog(folder).close()
    registry = Registry(scope_of(BASE, GEOMETRY), GEOMETRY.num_layers)
    small = LoRAPair(torch.zeros(1, 4096), torch.zeros(4096, 1), 1.0)
    template = folder / "template"
    write_adapter_file(template, AdapterWeights({(0, "q"): small}))
    content = template.read_bytes()
    template.unlink()
    pairs = {
        (layer, projection): LoRAPair(torch.empty(16, 1), torch.empty(1, 16), 1.0)
        for layer in range(GEOMETRY.num_layers)
        for projection in ("q", "k", "v", "o")
    }
    spec = AdapterWeights(pairs).spec(GEOMETRY.num_layers)
    engine = open_database(sqlite_url(folder / "catalog.sqlite3"), lambda old_id: None)
    with engine.begin() as connection:
        for index in range(num_adapters):
            digest = hashlib.sha256(str(index).encode()).hexdigest()
            (folder / "blobs" / f"{digest}.safetensors").write_bytes(content)
            stored = StoredAdapter(f"sha256:{digest}", spec, len(content), 0, 1e-7)
            name = f"tenant-{index % 100:02d}/adapter-{index:05d}"
            new = NewVersion(name, stored, BASE, 1_700_000_000, "upload", "[]")
            registry.add_version(connection, new)
    engine.dispose()


def open_catalog(folder: Path) -> AdapterCatalog:
    return AdapterCatalog(
        data_dir=folder, pool_layout=PoolLayout(GEOMETRY), base_name=BASE, reader=NoReader()
    )


class OpenedFiles:
    """Counts files of adapters that this process opens; there is no way to remove the hook."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self.num_opened = 0
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(self._folder):
            self.num_opened += 1


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median and the worst of some runs, in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times), max(times)


def list_all(catalog: AdapterCatalog) -> int:
    num_found, after = 0, None
    while page := catalog.list(limit=1000, after=after):
        num_found, after = num_found + len(page), page[-1].name
    return num_found


def known(lease: AdapterLease | None) -> AdapterLease:
    assert lease is not None, "it was acquired a moment ago"
    return lease


def measure(folder: Path, num_adapters: int) -> dict[str, float]:
    opened = OpenedFiles(folder / "blobs")
    started = time.perf_counter()
    catalog = open_catalog(folder)
    startup_s = time.perf_counter() - started
    middle = catalog.list(limit=1, after=f"tenant-50/adapter-{num_adapters // 2:05d}")[0].name
    figures = {"startup_s": round(startup_s, 3)}
    runs: dict[str, Callable[[], object]] = {
        "first_page_ms": lambda: catalog.list(limit=PAGE),
        "middle_page_ms": lambda: catalog.list(limit=PAGE, after=middle),
        "get_ms": lambda: catalog.get(middle),
        "acquire_ms": lambda: catalog.acquire(middle, is_fresh=True).release(),
        "acquire_known_ms": lambda: known(catalog.try_acquire(middle)).release(),
        "write_uses_ms": catalog.write_uses,
        "expire_ms": catalog.delete_expired,
    }
    for name, run in runs.items():
        figures[name], figures[name.replace("_ms", "_max_ms")] = (
            round(ms, 3) for ms in timed(run, 50)
        )
    started = time.perf_counter()
    assert list_all(catalog) == num_adapters
    figures["list_all_s"] = round(time.perf_counter() - started, 2)
    figures["adapter_files_opened"] = opened.num_opened
    catalog.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keep the registry here and use it again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary, "data")
        if not folder.exists():
            started = time.perf_counter()
            fill(folder, options.adapters)
            print(f"{options.adapters} adapters written in {time.perf_counter() - started:.0f} s")
        figures = measure(folder, options.adapters)
    for name, value in figures.items():
        print(f"{name:<22} {value}")
    print(json.dumps(environment() | {"adapters": options.adapters, **figures}))


def environment() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "benchmark": "bench_registry",
        "commit": commit.stdout.strip(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("loraplex", "sqlalchemy")},
    }


if __name__ == "__main__":
    main()
