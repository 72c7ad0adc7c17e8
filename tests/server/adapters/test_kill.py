"""`kill -9` at every stage of every change: afterwards the old state or the new one, never half."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_server.adapters.registration import Registration
from tests.server.adapters import registry_driver
from tests.support.adapters import make_catalog, make_folder, make_tensors, save_peft_adapter
from tests.support.old_registries import write_registry_1

REGISTERING = [
    "received",
    "read",
    "tested",
    "stored native",
    "written",
    "stored",
    "committed",
    "done",
]
STAGES = [
    *(("upload", stage) for stage in REGISTERING),
    *(("replace", stage) for stage in REGISTERING),
    ("rollback", "rolled back"),
    ("rollback", "done"),
    *(("delete", stage) for stage in ("unnamed", "file deleted", "done")),
    *(("prune", stage) for stage in ("unnamed", "file deleted", "done")),
]
#: From here on the change has happened.
DURABLE = {"committed", "rolled back", "unnamed", "file deleted", "done"}


def state_of(data_dir: Path) -> tuple:
    """Open the catalogue, check that it is whole, and return what it holds."""
    catalog = make_catalog(data_dir)
    versions = [v for record in catalog.list() for v in catalog.versions(record.name)]
    for version in versions:
        with catalog.acquire(f"{version.name}@{version.id}") as lease:
            weights = read_adapter_file(Path(lease.manifest.path))
            assert weights.spec(len(version.spec.ranks)) == version.spec
    catalog.close()
    assert not any((data_dir / "staging").iterdir())
    files = {path.name.partition(".")[0] for path in (data_dir / "blobs").iterdir()}
    assert files == {version.id.removeprefix("sha256:") for version in versions}
    natives = {p.name for p in (data_dir / "blobs").iterdir() if p.name.endswith(".native.tar")}
    assert natives == {
        f"{v.id.removeprefix('sha256:')}.native.tar" for v in versions if v.native_bytes
    }
    return tuple((v.name, v.version, v.id, v.is_current) for v in versions)


def prepare(tmp_path: Path, change: str) -> None:
    catalog = make_catalog(tmp_path / "data")
    catalog.register(Registration("other"), make_folder(tmp_path / "other", seed=9))
    if change != "upload":
        seeds = (1,) if change in ("replace", "delete") else (1, 2)
        for seed in seeds:
            folder = make_folder(tmp_path / f"v{seed}", seed=seed)
            catalog.register(Registration("a", replace=True), folder)
    catalog.close()


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory) -> Path:
    """An adapter that has to be folded, so that its own files are kept as well."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("new")
    save_peft_adapter(folder, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    return folder


@pytest.fixture(scope="module")
def run_change(new_folder) -> Iterator[Callable[[Path, str, str], int]]:
    """Return a function that makes one change in a process of its own, and its exit code."""
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    driver = subprocess.Popen(
        [sys.executable, registry_driver.__file__],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None

    def run(data_dir: Path, change: str, stage: str) -> int:
        driver.stdin.write(json.dumps([str(data_dir), change, stage, str(new_folder)]) + "\n")
        driver.stdin.flush()
        return int(driver.stdout.readline())

    yield run
    driver.stdin.close()
    driver.wait(timeout=30)
    driver.stdout.close()


@pytest.mark.parametrize(("change", "stage"), STAGES)
def test_a_kill_leaves_the_old_state_or_the_new_one(tmp_path, run_change, change, stage):
    data_dir = tmp_path / "data"
    prepare(tmp_path, change)
    old = state_of(data_dir)
    assert run_change(data_dir, change, stage) == -signal.SIGKILL, f"{change} has no {stage}"
    left = state_of(data_dir)
    assert (left != old) == (stage in DURABLE)
    assert ("other", 1) in [row[:2] for row in left]
    if left == old:  # and it can be made after all
        assert run_change(data_dir, change, "never") == registry_driver.SURVIVED
        assert state_of(data_dir) != old


def test_a_kill_in_the_middle_of_a_migration_leaves_the_old_registry(tmp_path, run_change):
    data_dir = tmp_path / "data"
    old_id = write_registry_1(data_dir, make_tensors(seed=3))
    assert run_change(data_dir, "rollback", "written") == -signal.SIGKILL
    assert run_change(data_dir, "rollback", "stored") == -signal.SIGKILL
    ((name, version, new_id, is_current),) = state_of(data_dir)
    assert (name, version, is_current) == ("a", 1, True)
    assert new_id != old_id
