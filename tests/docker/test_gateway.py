"""The gateway's manifests: what the APIs take, true to the server, with Helm and without."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from loraplex_server.api.series import SERIES
from loraplex_server.config_sources import load_config
from tests.docker.test_helm import CORE, EVERYTHING, KEDA, KUBERNETES, render
from tests.support.gateway_schemas import PICKER_CONFIG, PICKER_FLAGS, PLUGINS, SPECS

GATEWAY = Path(__file__).resolve().parents[2] / "docker" / "gateway"
CONFIG = yaml.safe_load(
    (GATEWAY.parent / "helm" / "loraplex" / "files" / "epp-config.yaml").read_text()
)


def plain() -> dict[str, dict[str, Any]]:
    """Return the plain manifests' objects by `kind/name`."""
    names = yaml.safe_load((GATEWAY / "kustomization.yaml").read_text())["resources"]
    texts = [(GATEWAY / name).read_text() for name in names]
    objects = [found for text in texts for found in yaml.safe_load_all(text)]
    return {f"{found['kind']}/{found['metadata']['name']}": found for found in objects}


SETS = {"plain": plain, "everything": lambda: render(EVERYTHING), "keda": lambda: render(KEDA)}


@pytest.mark.parametrize("objects", SETS.values(), ids=SETS)
def test_every_object_of_an_extension_is_one_that_its_api_takes(objects):
    found = [o for o in objects().values() if (o["apiVersion"], o["kind"]) in SPECS]
    assert {"InferencePool", "HTTPRoute"} <= {each["kind"] for each in found}
    for each in found:
        jsonschema.validate(each["spec"], SPECS[each["apiVersion"], each["kind"]])


def test_a_misspelt_field_would_be_found():
    pool = plain()["InferencePool/loraplex"]["spec"]
    pool["extensionRef"] = pool.pop("endpointPickerRef")
    with pytest.raises(jsonschema.ValidationError, match="extensionRef"):
        jsonschema.validate(pool, SPECS["inference.networking.k8s.io/v1", "InferencePool"])


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_every_plain_object(version):
    found = [o for o in plain().values() if o["apiVersion"] in CORE]
    assert len(found) > 8
    for each in found:
        kubernetes_validate.validate(each, version, strict=True)


def test_plain_manifests_are_what_the_chart_renders():
    written = runpy.run_path(str(GATEWAY / "build.py"))["manifests"]()
    assert written.keys() == set(
        yaml.safe_load((GATEWAY / "kustomization.yaml").read_text())["resources"]
    )
    for name, text in written.items():
        assert (GATEWAY / name).read_text() == text, f"run docker/gateway/build.py ({name})"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_the_plain_manifests():
    command = ["kubectl", "kustomize", str(GATEWAY)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = {f"{o['kind']}/{o['metadata']['name']}": o for o in yaml.safe_load_all(built)}
    assert found.keys() == plain().keys()
    namespace = yaml.safe_load((GATEWAY / "kustomization.yaml").read_text())["namespace"]
    assert {each["metadata"]["namespace"] for each in found.values()} == {namespace}
    (subject,) = found["RoleBinding/loraplex-epp"]["subjects"]
    assert subject["namespace"] == namespace


def test_plain_manifests_name_secrets_and_hold_none():
    assert not [name for name in plain() if name.startswith("Secret/")]
    (container,) = plain()["StatefulSet/loraplex"]["spec"]["template"]["spec"]["containers"]
    sources = [
        entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry
    ]
    assert {source["name"] for source in sources} == {
        *("loraplex-key", "loraplex-registry", "loraplex-s3")
    }


def test_the_picker_is_told_of_series_that_the_server_has():
    jsonschema.validate(CONFIG, PICKER_CONFIG)
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in CONFIG["plugins"]}
    for kind, parameters in plugins.items():
        jsonschema.validate(parameters, PLUGINS[kind])
    extractor = plugins["core-metrics-extractor"]
    (engine,) = extractor["engineConfigs"]
    assert engine["name"] == extractor["defaultEngine"]
    assert {value for key, value in engine.items() if key != "name"} <= SERIES.keys()
    assert plugins["metrics-data-source"]["path"] == "/metrics"
    assert load_config([], {}).metrics_open, "the picker has no key"


def test_the_profile_weighs_plugins_that_there_are():
    kinds = {plugin["type"] for plugin in CONFIG["plugins"]}
    (profile,) = CONFIG["schedulingProfiles"]
    weights = {plugin["pluginRef"]: plugin.get("weight", 0) for plugin in profile["plugins"]}
    assert weights.keys() == kinds - {"metrics-data-source", "core-metrics-extractor"}
    # The longest queue loses to the shortest, whatever is cached there.
    cached = 0.2 * weights["lora-affinity-scorer"] + weights["prefix-cache-scorer"]
    assert weights["queue-scorer"] > cached
    # A replica without room loses to one with room, unless that one has the longest queue.
    assert 0.8 * weights["lora-affinity-scorer"] > weights["prefix-cache-scorer"]


@pytest.mark.parametrize(
    "objects", [plain, lambda: render(EVERYTHING)], ids=["plain", "everything"]
)
def test_the_picker_finds_its_pool_and_the_pool_its_picker(objects):
    found = objects()
    pool = next(o for name, o in found.items() if name.startswith("InferencePool/"))
    picker = pool["spec"]["endpointPickerRef"]
    service = found[f"Service/{picker['name']}"]["spec"]
    (port,) = (p for p in service["ports"] if p["port"] == picker["port"]["number"])
    template = found[f"Deployment/{picker['name']}"]["spec"]["template"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    # Or the pool would take its picker for a replica.
    members = pool["spec"]["selector"]["matchLabels"]
    assert not members.items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in container["args"])
    assert flags.keys() <= PICKER_FLAGS
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert flags["pool-name"] == pool["metadata"]["name"]
    assert pool["apiVersion"].startswith(f"{flags['pool-group']}/")
    assert int(flags["grpc-port"]) == ports[port["targetPort"]]
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == int(flags["grpc-health-port"])
    (mount,) = container["volumeMounts"]
    folder, _, file = flags["config-file"].rpartition("/")
    assert mount["mountPath"] == folder
    (volume,) = (v for v in template["spec"]["volumes"] if v["name"] == mount["name"])
    config = found[f"ConfigMap/{volume['configMap']['name']}"]["data"][file]
    assert yaml.safe_load(config) == CONFIG


def test_only_a_picker_of_several_may_hold_a_lease():
    def may(found: dict[str, Any]) -> set[str]:
        rules = found["Role/loraplex-epp"]["rules"]
        return {resource for rule in rules for resource in rule["resources"]}

    assert may(plain()) == {
        "pods",
        "inferencepools",
        "inferenceobjectives",
        "inferencemodelrewrites",
    }
    assert "leases" in may(render(EVERYTHING))


def test_what_goes_past_the_picker_goes_to_the_service_of_the_replicas():
    _, rest = plain()["HTTPRoute/loraplex"]["spec"]["rules"]
    assert rest["matches"] == [{"path": {"type": "PathPrefix", "value": "/"}}]
    (backend,) = rest["backendRefs"]
    service = plain()[f"Service/{backend['name']}"]["spec"]
    assert backend["port"] in {port["port"] for port in service["ports"]}
    members = plain()["InferencePool/loraplex"]["spec"]["selector"]["matchLabels"]
    assert service["selector"] == members


@pytest.mark.parametrize(
    ("values", "expected_s"),
    [
        ({}, load_config([], {}).request_timeout_s + 20),
        ({"settings": {"request_timeout_s": 1800}}, 1820),
        ({"inference": {"enabled": True, "httpRoute": {"requestTimeout": "90s"}}}, 90),
    ],
)
def test_routes_wait_longer_than_the_server_so_that_it_says_what_took_too_long(values, expected_s):
    objects = render({"inference": {"enabled": True}, **values})
    for rule in objects["HTTPRoute/test"]["spec"]["rules"]:
        assert rule["timeouts"]["request"] == f"{expected_s:.0f}s"
