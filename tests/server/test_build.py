"""Building an engine: which settings fit, in which order things happen, what is ready after it."""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_kernels.native import load_native
from loraplex_server import build, sizing
from loraplex_server.config import Config
from loraplex_server.engine.errors import EngineConfigError
from tests.support.tiny_models import save_tiny_model

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


def config_of(folder, **settings):
    return Config(**{"model": str(folder), "dtype": "float32", "pool_bytes": MIB, **settings})


def build_core(config):
    return build.build_core(config, build.resolve_facts(config))


@pytest.fixture
def make(folder):
    """Return a function that builds a core, closed after the test."""
    cores = []

    def make(**settings):
        cores.append(build_core(config_of(folder, **settings)))
        return cores[-1]

    yield make
    for core in cores:
        core.close()


def test_a_core_has_the_sizes_that_were_asked_for(make):
    core = make(max_model_len=100, max_step_tokens=32, max_running=32)
    assert core.info.max_model_len == 100
    assert core.info.num_pages == MIB // core.info.page_bytes
    assert (core.scheduler.limits.max_step_tokens, core.scheduler.limits.max_running) == (32, 32)


def test_a_step_smaller_than_what_runs_is_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(build, "load_weights", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(EngineConfigError, match=r"max_step_tokens is 8 and max_running 9"):
        build_core(config_of(folder, max_step_tokens=8, max_running=9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pool_bytes": 100}, "pool_bytes is 100"), ({"max_model_len": 129}, "max_model_len is 129")],
)
def test_sizes_that_do_not_fit_are_refused_by_name(make, settings, message):
    with pytest.raises(EngineConfigError, match=message):
        make(**settings)


def test_the_pool_is_sized_by_what_the_weights_leave(make, monkeypatch):
    is_loaded = []

    def load(*args, **options):
        is_loaded.append(True)
        return load_weights(*args, **options)

    load_weights = build.load_weights
    monkeypatch.setattr(build, "load_weights", load)
    monkeypatch.setattr(sizing, "available_bytes", lambda: 4 * MIB if is_loaded else 400 * MIB)
    core = make(pool_bytes=None)
    assert core.info.num_pages * core.info.page_bytes == pytest.approx(MIB, rel=0.05)


def test_the_thread_count_follows_the_machine_unless_it_is_set(make, monkeypatch):
    counts = []
    monkeypatch.setattr(build.torch, "set_num_threads", counts.append)
    monkeypatch.setattr(sizing, "num_processors", lambda: 3)
    make()
    assert counts[0] == 3, "what follows is the loader's thread settling its own"
    counts.clear()
    make(threads=5)
    assert counts[0] == 5


# ---- compiled kernels ----------------------------------------------------------------------


@pytest.fixture
def _no_kernels_yet():
    load_native.cache_clear()
    yield
    load_native.cache_clear()


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@needs_compiler
@pytest.mark.usefixtures("_no_kernels_yet")
def test_a_core_that_was_built_has_its_kernels(make):
    make()
    assert load_native.cache_info().misses == 1
    assert load_native() is not None


@needs_compiler
@pytest.mark.usefixtures("_no_kernels_yet")
def test_without_a_home_the_kernels_are_compiled_elsewhere(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert load_native() is not None
    assert list(tmp_path.iterdir()) == []


@needs_compiler
@pytest.mark.usefixtures("_no_kernels_yet")
def test_a_cache_that_cannot_be_written_does_not_matter(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_native() is not None


# ---- the engine process --------------------------------------------------------------------


def test_the_engine_process_imports_no_library_of_models(folder):
    """It costs seconds and 200 MB of each process, ranks included."""
    config = config_of(folder)
    build_core = build.build_engine_handle(config, build.resolve_facts(config))._build_core
    code = (
        "import pickle, sys; pickle.load(sys.stdin.buffer)(lambda: None).close(); "
        "assert not {'transformers', 'sympy', 'fastapi'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(build_core), check=True)


async def test_the_engine_process_logs_as_much_as_asked_for(folder, monkeypatch):
    config = config_of(folder, log_level="debug")
    handle = build.build_engine_handle(config, build.resolve_facts(config))
    levels = []
    monkeypatch.setattr(logging, "basicConfig", lambda **to: levels.append(to["level"]))
    handle._build_core(wake=lambda: None).close()
    assert levels == ["DEBUG"]


# ---- quantization --------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("quantization", "said"), [("none", "float32"), ("int8", "float32 with int8 weights")]
)
def test_a_core_says_what_its_weights_were_rounded_to(make, caplog, quantization, said):
    with caplog.at_level(logging.INFO, logger=build.__name__):
        core = make(quantization=quantization)
    assert core.info.dtype == said
    assert [m.partition(" is computed in ")[2] for m in caplog.messages].count(said) == 1


def test_int8_without_kernels_is_refused_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(sizing, "load_native", lambda: None)
    monkeypatch.setattr(build, "load_weights", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(EngineConfigError, match="quantization is int8"):
        build_core(config_of(folder, quantization="int8"))
