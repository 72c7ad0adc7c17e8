from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex import AsyncClient, Client

GENERATOR = Path(__file__).parents[2] / "clients" / "generate_sync.py"


def test_the_synchronous_half_is_as_it_would_be_written():
    done = subprocess.run(
        [sys.executable, str(GENERATOR), "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run: python {GENERATOR}"


def test_both_clients_have_the_same_methods_with_the_same_arguments():
    for sync, other in _pairs(Client, AsyncClient):
        names = {name for name in dir(sync) if not name.startswith("_")}
        assert names == {name for name in dir(other) if not name.startswith("_")}
        for name in names:
            ours, theirs = getattr(sync, name), getattr(other, name)
            if callable(ours):
                assert list(inspect.signature(ours).parameters) == list(
                    inspect.signature(theirs).parameters
                ), name


@pytest.mark.parametrize("word", ["async", "await", "Async", "asyncio"])
def test_nothing_of_asyncio_is_left_in_the_synchronous_half(word):
    import loraplex.client
    import loraplex.resources.generation
    import loraplex.stream

    for module in (loraplex.client, loraplex.resources.generation, loraplex.stream):
        code = inspect.getsource(module).partition("\n")[2]  # the first line names the source
        assert word not in code.replace("async_", ""), module


def _pairs(sync: type, other: type):
    yield sync, other
    with Client() as client:
        twin = AsyncClient()
        for name, value in inspect.getmembers(sync):
            if isinstance(value, property):
                yield type(getattr(client, name)), type(getattr(twin, name))
