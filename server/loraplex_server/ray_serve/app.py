"""The application as Serve deploys it: from arguments to two deployments and their options.

Everything that Serve scales, places and watches by is an option of a deployment, which Serve's own
configuration may override; here are the defaults that fit the server's settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import torch
from ray import serve
from ray.serve import Application

from loraplex_server.config import Config
from loraplex_server.config_sources import config_of_arguments
from loraplex_server.ray_serve.front import REPLICA_DEPLOYMENT, front_builder
from loraplex_server.ray_serve.replica import Replica
from loraplex_server.sizing import choose_step_sizes

#: Settings of what Serve has in the place of a server's own sockets and signals.
_SERVES_OWN: Final = {
    "host": "http_options.host in Serve's configuration",
    "port": "http_options.port in Serve's configuration",
    "max_connections": "a load balancer before Serve's proxies",
    "send_timeout_s": "a load balancer before Serve's proxies",
    "drain_delay_s": "graceful_shutdown_timeout_s; Serve's routers know first that a replica ends",
}
#: Requests that a front holds are nearly nothing to it; Serve's default would be 5.
_FRONT_REQUESTS: Final = 10_000
#: A front that is to end stays while answers go through it, which end at the latest with their
#: replicas; this is for those whose replicas stay.
_FRONT_GRACE_S: Final = 3600.0
#: What the end of a replica takes beyond the requests that it waits for.
_CLOSING_S: Final = 10.0


def build_app(arguments: Mapping[str, Any]) -> Application:
    """Return the application, for `serve run loraplex_server.ray_serve.app:build_app name=value`.

    Args:
        arguments: settings of `loraplex serve` by their names. As there, the environment has those
            that are not given, and secrets in any case.

    Raises:
        ConfigError: a setting is unknown, impossible, or Serve's to decide.
    """
    config = config_of_arguments(arguments, os.environ, elsewhere=_SERVES_OWN)
    replicas = serve.deployment(**_replica_options(config))(Replica).bind(config)
    front = front_builder(
        receive_timeout_s=config.receive_timeout_s, request_timeout_s=config.request_timeout_s
    )
    return serve.deployment(**_front_options())(serve.ingress(front)()).bind(replicas)


def _front_options() -> dict[str, Any]:
    return {
        "name": "front",
        "num_replicas": 2,  # as streams end with the front that they go through
        "max_ongoing_requests": _FRONT_REQUESTS,
        "graceful_shutdown_timeout_s": _FRONT_GRACE_S,
        "ray_actor_options": {"num_cpus": 0.5},
    }


def _replica_options(config: Config) -> dict[str, Any]:
    """Return options by which the engine is full before requests wait or go elsewhere.

    Twice what runs at once may be at a replica, so that the engine has a queue to choose from:
    fairness, deadlines and the lookahead are in its order of that queue. A replica with more than
    what runs at once is a reason for another one.
    """
    is_gpu = config.device == "cuda"
    max_running = choose_step_sizes(
        config, torch.device(config.device if is_gpu else "cpu")
    ).max_running
    scale: dict[str, Any] = {"num_replicas": 1}
    if config.registry_url is not None:
        scaling = {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": max_running}
        scale = {"autoscaling_config": scaling}
    return {
        "name": REPLICA_DEPLOYMENT,
        "max_ongoing_requests": 2 * max_running,
        "max_queued_requests": max(1, config.max_queued),
        "graceful_shutdown_timeout_s": config.shutdown_grace_s + _CLOSING_S,
        "ray_actor_options": {
            "num_cpus": config.threads or config.tensor_parallel,
            "num_gpus": config.tensor_parallel if is_gpu else 0,
        },
        **scale,
    }
