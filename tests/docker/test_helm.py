"""The chart: rendered by Helm itself, valid for Kubernetes, and true to the server."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from loraplex_server.api.ops import ops_router
from loraplex_server.api.series import SERIES
from loraplex_server.config_sources import load_config

helm = pytest.importorskip("helm_python", reason="Helm, as a library")

DOCKER = Path(__file__).resolve().parents[2] / "docker"
CHART = DOCKER / "helm" / "loraplex"

#: What Kubernetes itself knows; the rest is of operators.
CORE = (
    *("v1", "apps/v1", "policy/v1", "autoscaling/v2", "networking.k8s.io/v1"),
    "rbac.authorization.k8s.io/v1",
)
KUBERNETES = ("1.29", "1.33")

SHARED = {"registrySecret": "postgres", "blobUrl": "s3://adapters/loraplex"}
EVERYTHING: dict[str, Any] = {
    "replicas": 3,
    "gpus": 1,
    "model": "/models/llama",
    "settings": {"max_running": 128, "ttft_slo_s": 1.5, "pool_bytes": "32GiB", "max_queued": 10**7},
    "auth": {"apiKey": "lp-secret"},
    "sharedStorage": SHARED,
    "extraEnv": [{"name": "AWS_REGION", "value": "eu-central-1"}],
    "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "imagePullSecrets": [{"name": "pull"}],
    "persistence": {"storageClass": "fast"},
    "priorityClassName": "high",
    "serviceAccount": {"annotations": {"role": "adapters"}},
    "podAnnotations": {"note": "x"},
    "podLabels": {"llm-d.ai/engine-type": "vllm"},
    "nodeSelector": {"gpu": "yes"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "autoscaling": {"enabled": True},
    "networkPolicy": {"enabled": True, "egress": [{"ports": [{"port": 5432}]}]},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboards": {"enabled": True},
    "inference": {
        "enabled": True,
        "gateway": {"create": True, "className": "istio"},
        "endpointPicker": {"replicas": 2, "flags": {"v": 2}},
        "httpRoute": {"hostnames": ["llm.example.com"]},
        "objectives": {"interactive": 10, "batch": -10},
    },
}
SMALLEST: dict[str, Any] = {
    "persistence": {"enabled": False},
    "podDisruptionBudget": {"enabled": False},
    "auth": {"existingSecret": "mine"},
}
KEDA: dict[str, Any] = {
    **EVERYTHING,
    "affinity": {},
    "antiAffinity": "hard",
    "autoscaling": {"enabled": True, "kind": "keda", "prometheusUrl": "http://prometheus:9090"},
    "inference": {
        "enabled": True,
        "endpointPicker": {"deploy": False},
        "httpRoute": {"gatewayNamespace": "gateways"},
    },
}
VALUES = {"default": {}, "smallest": SMALLEST, "everything": EVERYTHING, "keda": KEDA}


def render(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the objects by `kind/name`."""
    files = helm.Chart.load(CHART).render(values, name="test", namespace="llm")
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    objects = [found for text in texts for found in yaml.safe_load_all(text) if found]
    return {f"{found['kind']}/{found['metadata']['name']}": found for found in objects}


def container_of(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the specification of the pods, and of their container."""
    pod = render(values)["StatefulSet/test"]["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_helm_finds_nothing_to_say(values):
    report = helm.lint(CHART, values, strict=True)
    worse_than_info = [m for m in report["messages"] if m["severity"] > 1]
    assert not worse_than_info
    assert not report["errors"]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_kubernetes_takes_every_object(values, version):
    found = [o for o in render(values).values() if o["apiVersion"] in CORE]
    assert found
    for each in found:
        kubernetes_validate.validate(each, version, strict=True)


def test_values_of_a_kind_each_are_rendered():
    kinds = {name.partition("/")[0] for name in render(EVERYTHING)}
    assert kinds == {
        *("StatefulSet", "Service", "ServiceAccount", "Secret", "PodDisruptionBudget"),
        *("HorizontalPodAutoscaler", "NetworkPolicy", "ServiceMonitor", "PrometheusRule"),
        *("ConfigMap", "InferencePool", "InferenceObjective", "HTTPRoute", "Gateway"),
        *("Deployment", "Role", "RoleBinding"),
    }
    assert "ScaledObject/test" in render(KEDA)
    assert set(render({})) == {
        *("StatefulSet/test", "Service/test", "Service/test-replicas", "ServiceAccount/test"),
        "PodDisruptionBudget/test",
    }


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_server_takes_every_variable(values):
    """With a value in place of each secret, as the container starts it."""
    secrets = {
        "LORAPLEX_API_KEY": "lp-x",
        "LORAPLEX_REGISTRY_URL": "postgresql://a@b/c",
    }
    _, container = container_of(values)
    variables = {e["name"]: e.get("value", secrets.get(e["name"])) for e in container["env"]}
    config = load_config([], variables)
    for name, value in values.get("settings", {}).items():
        if not isinstance(value, str):
            assert getattr(config, name) == value
    assert (config.api_key is not None) == ("auth" in values)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_pod_gets_the_time_its_server_takes_to_leave(values):
    pod, container = container_of(values)
    variables = {e["name"]: e.get("value") for e in container["env"]}
    leaving_s = int(variables["LORAPLEX_DRAIN_DELAY_S"])
    leaving_s += int(variables["LORAPLEX_SHUTDOWN_GRACE_S"])
    # The server takes 5 s more for the last writes.
    assert pod["terminationGracePeriodSeconds"] >= leaving_s + 10
    readiness = container["readinessProbe"]
    noticed_s = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert int(variables["LORAPLEX_DRAIN_DELAY_S"]) >= noticed_s


def test_probes_ask_for_paths_that_the_server_has():
    # The paths need nothing of what answers them.
    operations = ops_router(**dict.fromkeys(inspect.signature(ops_router).parameters))
    paths = {route.path for route in operations.routes}
    _, container = container_of({})
    assert container["ports"] == [{"name": "http", "containerPort": load_config([], {}).port}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == "http"
        assert asked["path"] in paths


def test_the_pod_runs_as_the_user_of_the_image_and_may_write_where_the_image_expects_it():
    pod, container = container_of({})
    image = (DOCKER / "Dockerfile").read_text()
    who = pod["securityContext"]
    assert f"USER {who['runAsUser']}:{who['runAsGroup']}\n" in image
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/data", "/tmp"} <= mounted
    assert "LORAPLEX_DATA_DIR=/data" in image


def test_selectors_find_the_pods_and_ports_by_their_names():
    found = render(EVERYTHING)
    template = found["StatefulSet/test"]["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    selectors = [
        found["StatefulSet/test"]["spec"]["selector"]["matchLabels"],
        found["Service/test"]["spec"]["selector"],
        found["Service/test-replicas"]["spec"]["selector"],
        found["PodDisruptionBudget/test"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy/test"]["spec"]["podSelector"]["matchLabels"],
        found["InferencePool/test"]["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels
    monitor = found["ServiceMonitor/test"]["spec"]
    chosen = [
        (name, port["name"])
        for name, service in found.items()
        if name.startswith("Service/")
        and monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        for port in service["spec"]["ports"]
        if port["name"] == monitor["endpoints"][0]["port"]
    ]
    assert chosen == [("Service/test", "http")], "each replica is scraped once"
    port = found["InferencePool/test"]["spec"]["targetPorts"]
    assert port == [{"number": template["spec"]["containers"][0]["ports"][0]["containerPort"]}]
    assert found["StatefulSet/test"]["spec"]["serviceName"] == "test-replicas"


def test_objects_that_name_each_other_agree():
    found = render(EVERYTHING)
    rules = found["HTTPRoute/test"]["spec"]["rules"]
    route = rules[0]["backendRefs"][0]
    pool = found["InferencePool/test"]
    assert (route["kind"], route["name"]) == ("InferencePool", pool["metadata"]["name"])
    assert pool["apiVersion"].startswith(f"{route['group']}/")
    for name in ("interactive", "batch"):
        assert found[f"InferenceObjective/{name}"]["spec"]["poolRef"]["name"] == "test"
    scaled = found["HorizontalPodAutoscaler/test"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("StatefulSet", "test")
    assert "replicas" not in found["StatefulSet/test"]["spec"], "the autoscaler's to say"


def test_keda_asks_for_the_series_that_the_server_has():
    (trigger,) = render(KEDA)["ScaledObject/test"]["spec"]["triggers"]
    (series,) = re.findall(r"vllm:\w+", trigger["metadata"]["query"])
    assert series in SERIES
    assert "HorizontalPodAutoscaler/test" not in render(KEDA)
    assert "replicas" not in render(KEDA)["StatefulSet/test"]["spec"]
    with pytest.raises(helm.HelmError, match="prometheusUrl"):
        render({**KEDA, "autoscaling": {"enabled": True, "kind": "keda"}})


def test_a_pod_has_a_gpu_for_each_rank_and_shared_memory_for_them():
    pod, container = container_of({"tensorParallel": 4, "gpus": 1, "shmSize": "8Gi"})
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    variables = {e["name"]: e.get("value") for e in container["env"]}
    assert variables["LORAPLEX_TENSOR_PARALLEL"] == "4"
    assert load_config([], variables).tensor_parallel == 4
    (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
    (volume,) = (v for v in pod["volumes"] if v["name"] == mount["name"])
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    _, on_cpus = container_of({"tensorParallel": 2})
    assert "nvidia.com/gpu" not in on_cpus["resources"]["limits"]
    _, alone = container_of({"gpus": 1})
    assert alone["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "LORAPLEX_TENSOR_PARALLEL" not in {e["name"] for e in alone["env"]}


def test_replicas_keep_off_one_anothers_nodes_unless_told_otherwise():
    fleet = {"replicas": 3, "sharedStorage": SHARED, "auth": {"existingSecret": "key"}}
    labels = render(fleet)["StatefulSet/test"]["spec"]["template"]["metadata"]["labels"]
    pod, _ = container_of(fleet)
    soft = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    pod, _ = container_of({**fleet, "antiAffinity": "hard"})
    hard = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [term["podAffinityTerm"] for term in soft] == hard
    assert hard[0]["labelSelector"]["matchLabels"].items() <= labels.items()
    assert "affinity" not in container_of({**fleet, "antiAffinity": "none"})[0]


def test_rules_and_dashboards_are_those_that_compose_uses():
    found = render(EVERYTHING)
    groups = found["PrometheusRule/test"]["spec"]["groups"]
    files = sorted((DOCKER / "prometheus").rglob("*.yml"))
    expected = [g for path in files for g in yaml.safe_load(path.read_text()).get("groups", ())]
    assert expected
    assert groups == expected
    boards = {path.name: path for path in (DOCKER / "grafana" / "dashboards").glob("*.json")}
    shipped = [o["data"] for name, o in found.items() if name.startswith("ConfigMap/test-dash")]
    assert boards
    assert {name for data in shipped for name in data} == boards.keys()
    for data in shipped:
        for name, text in data.items():
            assert json.loads(text) == json.loads(boards[name].read_text())


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"replicas": 2}, "sharedStorage"),
        ({"autoscaling": {"enabled": True}}, "sharedStorage"),
        ({"replicas": 2, "sharedStorage": SHARED}, "one key"),
        ({"sharedStorage": {"blobUrl": "s3://b"}}, "both"),
        ({"auth": {"existingSecret": "a", "apiKey": "b"}}, "not both"),
        ({"inference": {"enabled": True, "gateway": {"create": True}}}, "className"),
    ],
)
def test_what_would_not_work_is_refused_with_advice(values, advice):
    with pytest.raises(helm.HelmError, match=advice):
        render(values)


@pytest.mark.parametrize(
    "values",
    [
        {"replica": 2},
        {"settings": {"api_key": "in plain sight"}},
        {"settings": {"drain_delay_s": 3}},
        {"settings": {"prefix_cache": True}},
        {"gpus": 2},
        {"settings": {"tensor_parallel": 2}},
        {"tensorParallel": 0},
        {"antiAffinity": "strict"},
    ],
)
def test_the_schema_refuses_values_that_mean_nothing(values):
    with pytest.raises(helm.HelmError):
        helm.Chart.load(CHART).validate_schema(helm.Chart.load(CHART).merge_values(values))


def test_the_schema_knows_every_value():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema["properties"].keys() - {"global"} == values.keys()
    for name, value in values.items():
        known = schema["properties"][name]
        if isinstance(value, dict) and known.get("additionalProperties") is False:
            assert known["properties"].keys() == value.keys(), name
