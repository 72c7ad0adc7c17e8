"""A real server on a real port, over a fake engine and the real adapter catalogue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from safetensors.numpy import save_file

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.api.app import create_app
from loraplex_server.api.http_protocol import HttpProtocol
from loraplex_server.api.services import Services
from loraplex_server.config import Config
from loraplex_server.text.vocabulary import Vocabulary
from tests.support.adapters import TINY, make_catalog
from tests.support.fake_engine import FakeEngine
from tests.support.tiny_tokenizer import make_tokenizer

GEOMETRY = TINY
BASE = "tiny-base"
MAX_UPLOAD_BYTES = 1 << 20


@dataclass
class Running:
    """A server in a thread, and what a test wants to look at."""

    url: str
    engine: FakeEngine
    catalog: AdapterCatalog
    vocabulary: Vocabulary
    data_dir: Path
    loop: asyncio.AbstractEventLoop
    app: FastAPI
    clock: ShiftedClock

    def openai(self, **kwargs) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0, **kwargs)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=20)

    def upload(self, name: str, folder: Path, **fields: str) -> httpx.Response:
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        data = {"name": name, **fields}
        return httpx.post(f"{self.url}/v1/adapters", data=data, files=files, timeout=20)

    def metric(self, line: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        found = [row for row in text.splitlines() if row.startswith(line + " ")]
        assert found, f"{line} is not in\n{text}"
        return float(found[0].split()[-1])


@dataclass
class ShiftedClock:
    """The time of day, and what a test adds to it."""

    offset_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset_s


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def make_adapter(folder: Path, *, rank: int = 4, seed: int = 0, base: str = BASE) -> Path:
    """Write a PEFT folder with LoRA on q in every layer."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(GEOMETRY.num_layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, 64), dtype=np.float32)
        tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((64, rank), dtype=np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def running_server(data_dir: Path, vocabulary: Vocabulary, **settings) -> Iterator[Running]:
    engine, clock = FakeEngine(), ShiftedClock()
    config = Config(data_dir=data_dir, max_upload_bytes=MAX_UPLOAD_BYTES, **settings)
    catalog = make_catalog(
        data_dir,
        base_name=BASE,
        limits=AdapterLimits(max_upload_bytes=MAX_UPLOAD_BYTES),
        on_discard=engine.discard_adapter,
        keep_versions=config.keep_versions,
        clock=clock,
    )
    services = Services(config, engine, catalog, vocabulary, base_names=(BASE,))
    app = create_app(services)
    server = uvicorn.Server(
        uvicorn.Config(app, http=HttpProtocol, port=0, log_level="warning", lifespan="off")
    )
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(
            f"http://127.0.0.1:{port}", engine, catalog, vocabulary, data_dir, loops[0], app, clock
        )
    finally:
        server.should_exit = True
        engine.cancelled.update(request.request_id for request in engine.submitted)
        thread.join(timeout=10)
        catalog.close()


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(make_tokenizer())


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory, vocabulary) -> Iterator[Running]:
    with running_server(tmp_path_factory.mktemp("data"), vocabulary) as running:
        yield running


@pytest.fixture
def server(shared_server) -> Iterator[Running]:
    """A server without adapters, whose engine is as new; in the end nothing may be running."""
    engine, catalog = shared_server.engine, shared_server.catalog
    yield shared_server
    wait_until(lambda: engine.num_running == 0)
    for record in catalog.list():
        wait_until(lambda i=record.id: catalog.num_leases(i) == 0)
        httpx.delete(f"{shared_server.url}/v1/adapters/{record.name}")
    engine.reset()


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture
def adapter(server, tmp_path) -> str:
    """The name of a registered adapter."""
    answer = server.upload("team/pirate", make_adapter(tmp_path / "pirate"))
    assert answer.status_code == 201, answer.text
    return "team/pirate"
