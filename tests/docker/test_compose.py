"""The compose files: valid by the specification, and true to the images and the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplex_server.config_sources import load_config

compose_spec = pytest.importorskip("compose_spec", reason="a parser of compose files")

DOCKER = Path(__file__).resolve().parents[2] / "docker"
FILES = ("compose.yaml", "compose.gpu.yaml")
ENTRYPOINT = (DOCKER / "entrypoint.sh").read_text()


def interpolated(name: str) -> str:
    """Return a file as compose reads it where none of its variables is set."""
    text = (DOCKER / name).read_text()
    return re.sub(r"\$\{\w+(?::-(.*?))?\}", lambda match: match[1] or "", text)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load(interpolated("compose.yaml"))["services"]


@pytest.mark.parametrize("name", FILES)
def test_it_is_valid_by_the_specification(name):
    compose_spec.PyCompose.from_yaml(interpolated(name)).validate()


@pytest.mark.parametrize("name", FILES)
def test_the_files_it_names_exist(name):
    for service in yaml.safe_load(interpolated(name))["services"].values():
        if build := service.get("build"):
            context = DOCKER / build.get("context", "..")
            assert (context / build["dockerfile"]).is_file()
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source


def test_the_variables_of_the_server_are_settings(services):
    config = load_config([], services["loraplex"]["environment"])
    grace_s = int(services["loraplex"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > config.drain_delay_s + config.shutdown_grace_s + 5


def test_what_waits_for_health_waits_for_a_service_that_tells_it(services):
    for service in services.values():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in services[other]


def test_the_port_of_the_server_is_the_one_the_image_exposes(services):
    for name in ("Dockerfile", "Dockerfile.cpu"):
        assert "EXPOSE 8000\n" in (DOCKER / name).read_text()
    assert load_config([], {}).port == 8000
    assert services["loraplex"]["ports"] == ["127.0.0.1:8000:8000"]


def test_nothing_but_the_api_can_be_opened_to_other_machines():
    for service in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].values():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:") or port.endswith(":8000:8000")


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus(services):
    scraped = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    targets = [
        target
        for job in scraped["scrape_configs"]
        for static in job.get("static_configs", ())
        for target in static["targets"]
    ]
    assert "loraplex:8000" in targets
    folder = DOCKER / "grafana" / "provisioning" / "datasources"
    (source,) = [yaml.safe_load(path.read_text()) for path in folder.glob("*.y*ml")]
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert {"loraplex", "prometheus"} <= services.keys()
