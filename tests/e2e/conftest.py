"""The real model, the real adapters, the judge, and a real server; each loaded once."""

from __future__ import annotations

import json
from pathlib import Path

import anthropic
import openai
import pytest
import torch

from loraplex import Client
from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.registration import Registration
from loraplex_server.model.loader import load_model
from loraplex_server.model.source import resolve_model
from loraplex_server.text.vocabulary import Vocabulary
from tests.support.server_process import ServerProcess

EXAMPLES = Path(__file__).resolve().parents[2] / "clients" / "examples"
ADAPTERS = ("pirate", "json-extract", "sql", "ticket-label")


@pytest.fixture(scope="session")
def source():
    return resolve_model(None)


@pytest.fixture(scope="session")
def model(source):
    torch.set_num_threads(2)
    return load_model(source, dtype=torch.float32, max_model_len=2048)


@pytest.fixture(scope="session")
def vocabulary(source):
    return Vocabulary(source.load_tokenizer())


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server with the example adapters. All modules share it: leave no other adapters behind
    that would be in somebody's way.
    """
    flags = ("--dtype", "float32", "--pool-bytes", "512MiB", "--max-model-len", "1024")
    folder = tmp_path_factory.mktemp("server")
    server = ServerProcess(folder, *flags, "--adapter-root", str(EXAMPLES))
    try:
        server.wait_until_ready()
        with Client(base_url=server.base_url) as client:
            for name in ADAPTERS:
                client.adapters.push(EXAMPLES / name)
        yield server
    finally:
        server.stop()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.base_url, api_key="none", max_retries=0) as claude:
        yield claude


@pytest.fixture(scope="session")
def manifests(source, model, tmp_path_factory):
    """Manifests of the four example adapters, by name, through the real catalogue."""
    catalog = AdapterCatalog(
        data_dir=tmp_path_factory.mktemp("catalog"),
        pool_layout=PoolLayout(model.spec.geometry),
        base_name=source.name,
        reader=FolderReader(BaseModel.open(source, model.spec), (source.name,)),
    )
    leases = {}
    for name in ADAPTERS:
        catalog.register(Registration(name), EXAMPLES / name)
        leases[name] = catalog.acquire(name)
    yield {name: lease.manifest for name, lease in leases.items()}
    for lease in leases.values():
        lease.release()
    catalog.close()


@pytest.fixture(scope="session")
def reference(source):
    from tests.support.reference_model import ReferenceModel

    return ReferenceModel(source, {name: EXAMPLES / name for name in ADAPTERS})


@pytest.fixture(scope="session")
def heldout():
    """Held-out examples by adapter name."""
    return {
        name: [
            json.loads(line)
            for line in (EXAMPLES / name / "heldout.jsonl").read_text().splitlines()
        ]
        for name in ADAPTERS
    }


@pytest.fixture(scope="session")
def chat_prompts(vocabulary, heldout):
    """Token ids of each held-out conversation, by adapter name."""
    return {
        name: [
            vocabulary.encode(vocabulary.render_chat(e["messages"]), add_special_tokens=False)
            for e in examples
        ]
        for name, examples in heldout.items()
    }
