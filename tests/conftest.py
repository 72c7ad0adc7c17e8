"""Settings that must be made before anything is imported; the database that tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Triton decides when a kernel is defined whether it is compiled or interpreted, and there is no
# GPU here to compile for. `test_aot.py` compiles in processes of its own, without this.
os.environ["TRITON_INTERPRET"] = "1"
# Tests compute little and many run at once; threads that wait for each other cost more than they
# give. Processes that tests start set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server's URL. Whoever writes into its database empties it again."""
    from tests.support.postgres import running_postgres, why_no_postgres

    if (reason := why_no_postgres()) is not None:
        pytest.skip(reason)
    with running_postgres() as server:
        yield server.url
