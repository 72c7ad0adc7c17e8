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
from tests.support.fleet import running_fleet, why_no_fleet
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


@pytest.fixture(scope="session")
def cases(chat_prompts):
    """(id, adapter, prompt): two conversations per model, the base gets one of each kind."""
    found = [(f"base-{a}", None, chat_prompts[a][0]) for a in ADAPTERS]
    found += [(f"{a}-{i}", a, chat_prompts[a][i]) for a in ADAPTERS for i in (0, 1)]
    return found


@pytest.fixture
def judge(reference, cases, capsys, model):
    """Return a function that judges all outputs and prints how many ties were excused.

    An answer must be whole: all the tokens asked for, or an end token last and nowhere else.
    """
    eos = model.spec.eos_token_ids

    def run(outputs, label, *, max_tokens=24, ignore_eos=False):
        num_tokens = num_excused = 0
        for case_id, adapter, prompt in cases:
            if case_id in outputs:
                tokens = outputs[case_id]
                if not ignore_eos:
                    assert not eos.intersection(tokens[:-1]), case_id
                assert len(tokens) == max_tokens or (not ignore_eos and tokens[-1] in eos), case_id
                verdict = reference.judge(adapter, prompt, outputs[case_id])
                assert verdict.wrong_at is None, f"{label}: {case_id} differs: {verdict}"
                num_tokens += verdict.num_tokens
                num_excused += verdict.num_excused
        with capsys.disabled():
            print(f"\n  {label}: {num_tokens} tokens identical, {num_excused} ties excused")
        assert num_tokens > 0

    return run


@pytest.fixture(scope="session")
def fleet(tmp_path_factory):
    """Three servers over one PostgreSQL and one bucket, without adapters. All modules share them:
    leave them running, and no adapters or keys behind.
    """
    if (reason := why_no_fleet()) is not None:
        pytest.skip(reason)
    # As long as proxies take to look at `/ready` twice, and what is under way under any load.
    flags = ("--drain-delay-s", "2", "--shutdown-grace-s", "60")
    with running_fleet(tmp_path_factory.mktemp("fleet"), 3, *flags) as fleet:
        yield fleet
