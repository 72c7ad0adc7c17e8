"""What the settings make of Serve's options, and what is refused; no Ray runs here."""

from __future__ import annotations

import pytest

from loraplex_server.config import ConfigError

pytest.importorskip("ray.serve", reason="pip install 'loraplex[ray]'")

from loraplex_server.ray_serve.app import build_app


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch):
    for name in ("LORAPLEX_REGISTRY_URL", "LORAPLEX_PORT"):
        monkeypatch.delenv(name, raising=False)


def replica_of(app):
    """Return the deployment of the replicas, which the front's is bound to."""
    return app._bound_deployment.init_args[0]._bound_deployment


def test_without_a_shared_registry_there_is_one_replica():
    replica = replica_of(build_app({"max_running": 10, "shutdown_grace_s": 7, "threads": 3}))
    assert (replica.name, replica.num_replicas) == ("replica", 1)
    assert replica.max_ongoing_requests == 20
    assert replica.ray_actor_options["num_cpus"] == 3
    assert replica.ray_actor_options["num_gpus"] == 0
    assert replica._deployment_config.autoscaling_config is None
    assert replica._deployment_config.graceful_shutdown_timeout_s >= 7


def test_a_front_outlives_the_answers_that_go_through_it():
    app = build_app({"shutdown_grace_s": 60})
    front = app._bound_deployment._deployment_config
    replica = replica_of(app)._deployment_config
    assert front.graceful_shutdown_timeout_s > 2 * replica.graceful_shutdown_timeout_s


def test_with_one_replicas_come_and_go_by_the_requests_at_them(monkeypatch):
    monkeypatch.setenv("LORAPLEX_REGISTRY_URL", "postgresql://user:hidden@db/loraplex")
    app = build_app({"blob_url": "s3://bucket/files", "max_running": "10", "device": "cuda"})
    replica = replica_of(app)
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.target_ongoing_requests) == (1, 10)
    assert replica.ray_actor_options["num_gpus"] == 1
    assert "hidden" not in repr(replica.init_args)


def test_each_rank_of_a_replica_has_a_gpu_or_else_a_core_of_its_own():
    on_gpus = replica_of(build_app({"tensor_parallel": 4, "device": "cuda"}))
    assert on_gpus.ray_actor_options == {"num_gpus": 4, "num_cpus": 4}
    on_cores = replica_of(build_app({"tensor_parallel": "2", "device": "cpu"}))
    assert on_cores.ray_actor_options == {"num_gpus": 0, "num_cpus": 2}
    fewer = replica_of(build_app({"tensor_parallel": 2, "threads": 1}))
    assert fewer.ray_actor_options["num_cpus"] == 1, "what was asked for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": 8000}, "http_options.port"),
        ({"drain_delay_s": 5}, "graceful_shutdown_timeout_s"),
        ({"max_runing": 8}, "did you mean max_running"),
        ({"max_running": 0}, "argument max_running must be"),
        ({"api_key": "lp-secret"}, "set LORAPLEX_API_KEY instead"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_app(arguments)


def test_so_are_such_settings_in_the_environment(monkeypatch):
    monkeypatch.setenv("LORAPLEX_PORT", "8000")
    with pytest.raises(ConfigError, match=r"LORAPLEX_PORT has no effect here; use http_options"):
        build_app({})
