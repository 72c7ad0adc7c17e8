"""What the APIs around the inference gateway take of the fields that our manifests set.

Written from the types of Gateway API v1.5 (`apis/v1`), the inference extension v1.5 (`api/v1`),
llm-d-router v0.10 (`apix`) and KEDA 2 (`apis/keda/v1alpha1`), and stricter: a field that is not
here is refused, so a misspelt one is found; one that is new to our manifests has to be looked up
and added.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_TEXT: Schema = {"type": "string", "minLength": 1}
_DURATION: Schema = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(required: str, **properties: Schema) -> Schema:
    """Return a schema of an object with these fields and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def _list(items: Schema, most: int) -> Schema:
    return {"type": "array", "minItems": 1, "maxItems": most, "items": items}


_INFERENCE_POOL = _object(
    "selector targetPorts endpointPickerRef",
    selector=_object("matchLabels", matchLabels={"type": "object", "minProperties": 1}),
    targetPorts=_list(_object("number", number=_PORT), 8),
    # `port` may be left out for other kinds than Service only.
    endpointPickerRef=_object(
        "name port",
        name=_NAME,
        port=_object("number", number=_PORT),
        failureMode={"enum": ["FailOpen", "FailClose"]},
    ),
)
_INFERENCE_OBJECTIVE = _object(
    "poolRef",
    priority={"type": "integer"},
    poolRef=_object("name", group=_NAME, kind=_TEXT, name=_NAME),
)
_GATEWAY = _object(
    "gatewayClassName listeners",
    gatewayClassName=_NAME,
    listeners=_list(
        _object(
            "name port protocol",
            name=_NAME,
            port=_PORT,
            protocol={"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
            allowedRoutes=_object(
                "", namespaces=_object("", **{"from": {"enum": ["All", "Selector", "Same"]}})
            ),
        ),
        64,
    ),
)
_HTTP_ROUTE = _object(
    "parentRefs rules",
    parentRefs=_list(_object("name", group=_NAME, kind=_TEXT, name=_NAME, namespace=_NAME), 32),
    hostnames=_list(_NAME, 16),
    rules=_list(
        _object(
            "matches backendRefs",
            matches=_list(
                _object(
                    "path",
                    path=_object(
                        "type value",
                        type={"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                        value={"type": "string", "pattern": "^/"},
                    ),
                ),
                64,
            ),
            # Of a Service, which is what it is where nothing is said, the port is required.
            backendRefs=_list(
                {
                    **_object("name", group=_NAME, kind=_TEXT, name=_NAME, port=_PORT),
                    "anyOf": [{"required": ["port"]}, {"required": ["group", "kind"]}],
                },
                16,
            ),
            timeouts=_object("", request=_DURATION, backendRequest=_DURATION),
        ),
        16,
    ),
)
_SCALED_OBJECT = _object(
    "scaleTargetRef triggers",
    scaleTargetRef=_object("name", apiVersion=_TEXT, kind=_TEXT, name=_NAME),
    minReplicaCount=_COUNT,
    maxReplicaCount=_COUNT,
    advanced=_object("", horizontalPodAutoscalerConfig=_object("", behavior={"type": "object"})),
    triggers=_list(
        _object(
            "type metadata",
            type={"const": "prometheus"},
            metricType={"enum": ["AverageValue", "Value"]},
            # Its values are strings, numbers among them.
            metadata=_object(
                "serverAddress query threshold", serverAddress=_TEXT, query=_TEXT, threshold=_TEXT
            ),
        ),
        8,
    ),
)

#: Of `spec`, by API version and kind.
SPECS: dict[tuple[str, str], Schema] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): _INFERENCE_POOL,
    ("llm-d.ai/v1alpha2", "InferenceObjective"): _INFERENCE_OBJECTIVE,
    ("gateway.networking.k8s.io/v1", "Gateway"): _GATEWAY,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _HTTP_ROUTE,
    ("keda.sh/v1alpha1", "ScaledObject"): _SCALED_OBJECT,
}

_ENGINE = _object(
    "name",
    name={**_TEXT, "not": {"const": "default"}},
    queuedRequestsSpec=_TEXT,
    runningRequestsSpec=_TEXT,
    kvUsageSpec=_TEXT,
    loraSpec=_TEXT,
    cacheInfoSpec=_TEXT,
)
_NO_PARAMETERS = _object("")

#: Parameters of the picker's plugins, by type.
PLUGINS: dict[str, Schema] = {
    "metrics-data-source": _object("", scheme={"enum": ["http", "https"]}, path=_TEXT),
    "core-metrics-extractor": _object("", defaultEngine=_TEXT, engineConfigs=_list(_ENGINE, 16)),
    "queue-scorer": _NO_PARAMETERS,
    "kv-cache-utilization-scorer": _NO_PARAMETERS,
    "prefix-cache-scorer": _NO_PARAMETERS,
    "lora-affinity-scorer": _NO_PARAMETERS,
    "max-score-picker": _NO_PARAMETERS,
}

#: An `EndpointPickerConfig`; parameters are those of `PLUGINS`.
PICKER_CONFIG: Schema = _object(
    "apiVersion kind plugins schedulingProfiles",
    apiVersion={"const": "llm-d.ai/v1alpha1"},
    kind={"const": "EndpointPickerConfig"},
    plugins=_list(
        _object("type", name=_TEXT, type={"enum": [*PLUGINS]}, parameters={"type": "object"}), 64
    ),
    schedulingProfiles=_list(
        _object(
            "name plugins",
            name=_TEXT,
            plugins=_list(
                _object("pluginRef", pluginRef=_TEXT, weight={"type": "number", "minimum": 0}), 64
            ),
        ),
        1,
    ),
)

#: The picker's flags that we set (llm-d-router, `pkg/epp/server/options.go`).
PICKER_FLAGS = frozenset(
    (
        *("pool-name", "pool-namespace", "pool-group", "config-file", "grpc-port"),
        *("grpc-health-port", "metrics-port", "refresh-metrics-interval"),
        *("metrics-endpoint-auth", "tracing", "ha-enable-leader-election", "v"),
    )
)
