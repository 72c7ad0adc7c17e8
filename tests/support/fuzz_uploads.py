"""Feeds damaged uploads through the way of real ones, and judges what comes of each.

An input is a function of seed and index alone, so that any one can be made again. It passes if it
is accepted, or refused by one of the errors that an uploader can cause, within bounds of time and
memory, and if nothing but its quarantine has changed meanwhile, which is gone afterwards.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterRefused, InvalidUpload, UploadTooLarge
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.registration import Registration
from tests.support.adapters import BASE_NAME, base_model_of
from tests.support.fuzz_archives import pack
from tests.support.fuzz_config import config_text, damage_config, damage_text
from tests.support.fuzz_corpus import Corpus
from tests.support.fuzz_weights import damage_file, damage_header, damage_tensors, make_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Of the process, so that other work on the machine does not count.
MAX_CPU_S = 5.0
#: A hang, on however loaded a machine.
MAX_WALL_S = 120.0
#: Of addresses, above what the process has when it begins.
MAX_EXTRA_BYTES = 1 << 30
LIMITS = AdapterLimits(max_upload_bytes=4 << 20)
#: Of accepted uploads, one in so many is registered as well.
_REGISTER_EVERY = 8


@dataclass(frozen=True)
class FuzzInput:
    """What one client sends: names and contents of files, for one base model."""

    base: str
    seed_name: str
    parts: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Outcome:
    """What came of one input.

    Attributes:
        kind: `accepted`, or the name of the error.
        fault: why this is a defect of ours; None if it is not.
    """

    kind: str
    cpu_s: float
    wall_s: float
    fault: str | None = None


def make_input(corpus: Corpus, seed: int, index: int, outside: str) -> FuzzInput:
    """Return the input `index`; about one in twenty is whole."""
    rng = Random(f"{seed}/{index}")
    adapter, other = rng.choice(corpus.seeds), rng.choice(corpus.seeds)
    damages = rng.choice(("config", "config", "tensors", "tensors", "both", "header", "bytes", ""))
    config = dict(adapter.config)
    tensors = dict(adapter.tensors)
    if damages in ("config", "both"):
        config = damage_config(rng, adapter, corpus.seeds)
    if damages in ("tensors", "both"):
        tensors = damage_tensors(rng, tensors, other)
    header = make_header(tensors)
    if damages == "header":
        damage_header(rng, header)
    text, weights = config_text(config), header.to_bytes()
    if damages == "bytes":
        weights = damage_file(rng, weights)
    if rng.random() < 0.12:
        text = damage_text(rng, text)
    files = {CONFIG: text, WEIGHTS: weights}
    if rng.random() < (0.8 if damages == "" else 0.25):
        name = rng.choice(("a.zip", "a.tar", "a.tar.gz", "A.TGZ"))
        return FuzzInput(adapter.base, adapter.name, ((name, pack(rng, files, outside)),))
    if rng.random() < 0.03:
        files = rng.choice(
            ({CONFIG: text}, {"../x": text, **files}, {**files, "a.bin": b"", "": b""})
        )
    return FuzzInput(adapter.base, adapter.name, tuple(files.items()))


class UploadFuzzer:
    """Owns a folder with catalogues, a working directory and a folder for temporary files.

    One for a process, as it changes the working directory and `tempfile.tempdir`.
    """

    def __init__(self, corpus: Corpus, root: Path, seed: int) -> None:
        self._corpus = corpus
        self._seed = seed
        self._root = root
        self._outside = root / "outside"
        for name in ("outside", "cwd", "tmp", "data"):
            (root / name).mkdir()
            (root / name / "sentinel").write_text("as it was")
        self._catalogs = {
            name: _open_catalog(root / "data" / name, base) for name, base in corpus.bases.items()
        }
        self._before = _watch(root)

    def make(self, index: int) -> FuzzInput:
        return make_input(self._corpus, self._seed, index, str(self._outside))

    def feed(self, index: int) -> Outcome:
        """Send input `index` and judge what comes of it."""
        sent = self.make(index)
        faulthandler.dump_traceback_later(MAX_WALL_S, exit=True)
        wall, cpu = time.perf_counter(), time.process_time()
        kind, fault = self._send(sent, index)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        faulthandler.cancel_dump_traceback_later()
        if cpu > MAX_CPU_S:
            fault = fault or f"took {cpu:.1f} s of computing"
        return Outcome(kind, cpu, wall, fault or self._changes(sent.base))

    def close(self) -> None:
        for catalog in self._catalogs.values():
            catalog.close()

    def _send(self, sent: FuzzInput, index: int) -> tuple[str, str | None]:
        catalog = self._catalogs[sent.base]
        try:
            with catalog.new_upload() as upload:
                for name, content in sent.parts:
                    upload.write_part(name, _chunks(content))
                return self._judge(catalog, upload.finish(), index)
        except (AdapterRefused, InvalidUpload, UploadTooLarge) as error:
            return type(error).__name__, _fault_of_answer([str(error)])
        except Exception as error:  # noqa: BLE001  # what a fuzzer is for
            return type(error).__name__, _describe(error)

    def _judge(self, catalog: AdapterCatalog, folder: Path, index: int) -> tuple[str, str | None]:
        validation = catalog.validate(folder)
        fault = _fault_of_answer(validation.to_json())
        if validation.form is None:
            return AdapterRefused.__name__, fault
        if index % _REGISTER_EVERY == 0:
            record, _ = catalog.register(Registration("fuzz", replace=True), folder)
            if record.id != validation.form.adapter_id:
                fault = "registered under another id than validated"
        return "accepted", fault

    def _changes(self, base: str) -> str | None:
        """Return what is not as it was, and mend it."""
        staging = self._root / "data" / base / "staging"
        if left := sorted(path.name for path in staging.iterdir()):
            shutil.rmtree(staging)
            staging.mkdir()
            return f"left in quarantine: {left}"
        after = _watch(self._root)
        if after != self._before:
            changed = sorted(str(path) for path, _ in after ^ self._before)
            self._before = after
            return f"changed outside the quarantine: {changed}"
        return None


def _open_catalog(data_dir: Path, reference: Any) -> AdapterCatalog:
    base = base_model_of(reference)
    return AdapterCatalog(
        data_dir=data_dir,
        pool_layout=PoolLayout(base.geometry),
        base_name=BASE_NAME,
        reader=FolderReader(base, (BASE_NAME,), LIMITS),
        limits=LIMITS,
    )


def _chunks(content: bytes) -> Iterator[bytes]:
    return (content[at : at + (64 << 10)] for at in range(0, len(content), 64 << 10))


def _watch(root: Path) -> frozenset[tuple[Path, tuple[int, int, int]]]:
    """Return everything around the quarantine that may not change, with size, mode and time."""
    folders = [root, root.parent, *(root / name for name in ("outside", "cwd", "tmp", "data"))]
    found = set()
    for folder in folders:
        for path in folder.iterdir():
            status = path.lstat()
            own = path.is_dir() and path.parent in (root, root.parent)
            found.add((path, (status.st_mode, status.st_size, 0 if own else status.st_mtime_ns)))
    return frozenset(found)


def _fault_of_answer(answer: Any) -> str | None:
    """Answers are JSON, and go into logs and a database."""
    try:
        json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        return f"the answer cannot be written: {error}"
    return None


def _describe(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "loraplex" in f.filename]
    where = ours[-1] if ours else last
    return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"[:400]


@contextlib.contextmanager
def bounded_process() -> Iterator[None]:
    """Bound this process's addresses, and put it back afterwards where it worked before."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    directory, temporary = Path.cwd(), tempfile.tempdir
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + MAX_EXTRA_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.chdir(directory)
        tempfile.tempdir = temporary


def enter(root: Path) -> None:
    """Make `root` the place of everything that a process writes without naming a folder."""
    os.chdir(root / "cwd")
    tempfile.tempdir = str(root / "tmp")


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident_bytes() -> int:
    """Return what the process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the most that the process has ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
