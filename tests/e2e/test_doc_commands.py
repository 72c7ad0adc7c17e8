"""The commands of the documentation do what it says: each page is run as a reader would."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.doc_pages import Page, all_pages
from tests.support.doc_server import ADAPTERS, EXAMPLES, DocServers
from tests.support.doc_session import DocSession
from tests.support.server_process import free_port

PAGES = [page for page in all_pages() if any(block.is_run for block in page.blocks)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[DocServers]:
    with DocServers(tmp_path_factory.mktemp("servers")) as servers:
        yield servers


@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_of_a_page_run(page: Page, servers: DocServers, tmp_path: Path):
    variables, flags = page.server
    server = servers.get(variables, flags)
    ports = {str(port): free_port() for port in (8001, 8002, 8003)}
    for name in ADAPTERS:
        shutil.copytree(EXAMPLES / name, tmp_path / name)
    shutil.copytree(EXAMPLES / "pirate", tmp_path / "out" / "my-adapter")
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "LORAPLEX_BASE_URL": server.base_url,
        # Tests share the machine, and threads that wait for each other take it from others.
        "OMP_NUM_THREADS": "1",
        "LORAPLEX_THREADS": "1",
        "TERM": "dumb",
        **variables,
    }
    with DocSession(tmp_path, env, {"8000": server.port, **ports}) as session:
        for block in page.blocks:
            if block.is_run:
                session.run(block)
