"""The Ray Serve application over several nodes: `python -m tests.e2e.run_ray_nodes`.

The nodes are Ray's, each with a raylet, an object store and workers of its own, on one machine. One
replica fits on a node. Load makes replicas, and its end takes them away while each has a stream to
finish; then a node is killed under load, with a stream on each, and another node is added.

Prints what was measured, then one JSON line; the exit code is 1 where something was lost.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loraplex import Client
from loraplex.errors import LoraplexError
from tests.support.object_store import running_object_store
from tests.support.postgres import running_postgres
from tests.support.ray_app import API_KEY, RayApp, ray_environment
from tests.support.tiny_serving import NAME, save_served_model, save_tiny_adapter

_NUM_NODES = 3  # beside the head's
_ADAPTERS = tuple(f"adapter-{number}" for number in range(6))
_LONG = 4_000
_CONCURRENCY = 32
_FEW_STREAMS = 6  # fewer than one replica's target
_MANY_STREAMS = 24  # so that each replica has some
_OPTIONS = {
    "front": {"ray_actor_options": {"num_cpus": 0.5, "resources": {"head": 0.5}}},
    "replica": {
        "ray_actor_options": {"num_cpus": 0.5, "resources": {"place": 1}},
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": _NUM_NODES,
            "target_ongoing_requests": 8,
            "upscale_delay_s": 1.0,
            "downscale_delay_s": 2.0,
            "metrics_interval_s": 0.2,
            "look_back_period_s": 1.0,
        },
    },
}


class Load:
    """Requests by the SDK, with its retries, for adapters in turn; from `start` to `stop`."""

    def __init__(self, app: RayApp) -> None:
        self._client = Client(base_url=app.base_url, api_key=API_KEY, timeout=120)
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0

    def start(self) -> Load:
        """Start all callers."""
        for number in range(_CONCURRENCY):
            self._threads.append(threading.Thread(target=self._call, args=(number,)))
            self._threads[-1].start()
        return self

    def stop(self) -> dict[str, Any]:
        """Wait for what is under way; return the figures."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        return {"outcomes": dict(self.outcomes), "slowest_s": round(self.slowest_s, 2)}

    def _call(self, number: int) -> None:
        while not self._is_over.is_set():
            number += 1
            began_s = time.monotonic()
            try:
                model = _ADAPTERS[number % len(_ADAPTERS)]
                self._client.completions.create(
                    model=model, prompt="hello", max_tokens=24, ignore_eos=True
                )
                self.outcomes["answered"] += 1
            except LoraplexError as error:
                self.outcomes[type(error).__name__] += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)


def wait_for(what: str, is_so: Callable[[], bool], app: RayApp) -> float:
    """Wait; return how long, in seconds."""
    began_s = time.monotonic()
    while not is_so():
        assert app.process.poll() is None, app.log.read_text()
        assert time.monotonic() - began_s < 180, f"never so: {what}; {app.log.read_text()}"
        time.sleep(0.1)
    return round(time.monotonic() - began_s, 1)


def stream_ends(app: RayApp, word: str) -> list[str]:
    """Read a long stream of whichever replica the word stays with; return what ended it."""
    body = {"model": NAME, "prompt": "hello", "max_tokens": _LONG, "ignore_eos": True}
    headers = {"serve_multiplexed_model_id": word}
    ends: list[str] = []
    with app.http.stream(
        "POST", "/v1/completions", json={**body, "stream": True}, headers=headers
    ) as answer:
        for line in answer.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            ends += [event["error"]["code"]] if "error" in event else []
            ends += [c["finish_reason"] for c in event.get("choices", ()) if c["finish_reason"]]
    return ends


def running_by_replica(app: RayApp) -> list[float]:
    """Return how many sequences run at each replica."""
    lines = app.http.get("/metrics").text.splitlines()
    return [float(x.split()[-1]) for x in lines if x.startswith("loraplex_requests_running{")]


def begin_streams(app: RayApp, pool: ThreadPoolExecutor, num: int) -> list[Future[list[str]]]:
    """Begin long streams, by words that nobody knows: Serve spreads them over the replicas."""
    began_s = time.time()
    return [pool.submit(stream_ends, app, f"word-{began_s}-{number}") for number in range(num)]


def run(app: RayApp, kill_node: Callable[[], Any], add_one: Callable[[], Any]) -> dict[str, Any]:
    """Go through all of it; return the figures."""
    found: dict[str, Any] = {"ready_s": wait_for("ready", lambda: num_replicas(app) >= 1, app)}
    with Client(base_url=app.base_url, api_key=API_KEY, timeout=120) as client:
        for number, name in enumerate(_ADAPTERS):
            with tempfile.TemporaryDirectory() as folder:
                client.adapters.push(save_tiny_adapter(Path(folder), seed=number), name=name)
    load = Load(app).start()
    found["scaled_up_s"] = wait_for("all", lambda: num_replicas(app) == _NUM_NODES, app)
    with ThreadPoolExecutor(_MANY_STREAMS) as pool:
        streams = begin_streams(app, pool, _FEW_STREAMS)
        found["while_scaling_up"] = load.stop()
        found["streams_at_replicas"] = running_by_replica(app)
        found["scaled_down_s"] = wait_for("one", lambda: num_replicas(app) == 1, app)
        found["streams_running_then"] = sum(not stream.done() for stream in streams)
        found["streams_scaled_down"] = Counter(str(s.result()) for s in streams)
        load = Load(app).start()
        wait_for("all", lambda: num_replicas(app) == _NUM_NODES, app)
        streams = begin_streams(app, pool, _MANY_STREAMS)
        time.sleep(1.0)  # so that they have begun
        began_s = time.monotonic()
        kill_node()
        while not any(stream.done() for stream in streams):
            time.sleep(0.05)
        found["first_stream_ended_s"] = round(time.monotonic() - began_s, 1)
        found["streams_of_killed_node"] = Counter(str(s.result()) for s in streams)
        add_one()
        found["back_after_adding_s"] = wait_for("all", lambda: num_replicas(app) == _NUM_NODES, app)
        found["while_a_node_died"] = load.stop()
    return found


def num_replicas(app: RayApp) -> int:
    """Return how many replicas answer."""
    return len(app.requests_by_replica())


def main() -> int:
    """Start everything, run, and print; return 1 where an answer was lost that need not be."""
    with (
        tempfile.TemporaryDirectory(prefix="nodes-", dir="/tmp") as folder,
        running_postgres() as postgres,
        running_object_store(Path(folder)) as files,
    ):
        # Nodes and all that they start inherit this; Ray reads some of it when it is imported.
        env = {"LORAPLEX_REGISTRY_URL": postgres.url, **files.env}
        os.environ.update(ray_environment(RAY_TMPDIR=folder, LORAPLEX_API_KEY=API_KEY, **env))
        found = run_nodes(Path(folder), env, files.url)
    for name, figure in found.items():
        print(f"{name:24} {figure}")
    print(json.dumps(found))
    return 0 if is_good(found) else 1


def run_nodes(folder: Path, env: dict[str, str], blob_url: str) -> dict[str, Any]:
    """Start a cluster and the application, go through all of it, and end both."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "resources": {"head": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [add_node(cluster) for _ in range(_NUM_NODES)]
        model = save_served_model(folder / "model")
        config = json.loads((model / "config.json").read_text())
        config["max_position_embeddings"] = 16_384
        (model / "config.json").write_text(json.dumps(config))
        arguments = {"model": str(model), "served_model_name": NAME, "dtype": "float32"}
        arguments |= {"data_dir": str(folder / "data"), "blob_url": blob_url}
        arguments |= {"pool_bytes": "16MiB", "host_bytes": "8MiB", "shutdown_grace_s": 600}
        app = RayApp(folder, arguments, env, options=_OPTIONS, address=cluster.address)
        try:
            return run(
                app,
                lambda: cluster.remove_node(nodes[0], allow_graceful=False),
                lambda: add_node(cluster),
            )
        finally:
            app.stop()
    finally:
        cluster.shutdown()


def add_node(cluster: Any) -> Any:
    """Add a node with room for one replica."""
    return cluster.add_node(num_cpus=1, resources={"place": 1})


def is_good(found: dict[str, Any]) -> bool:
    """Whether all was answered, but for the streams of the node that was killed."""
    loads = [found["while_scaling_up"], found["while_a_node_died"]]
    ends = found["streams_scaled_down"].keys() | found["streams_of_killed_node"].keys()
    return (
        all(load["outcomes"].keys() == {"answered"} for load in loads)
        and found["streams_scaled_down"].keys() == {"['length']"}
        and ends == {"['length']", "['engine_unavailable']"}
    )


if __name__ == "__main__":
    sys.exit(main())
