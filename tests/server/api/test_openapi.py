"""The document against the server: it describes every route, and whatever comes back is in it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import schemathesis
from fastapi.routing import APIRoute, iter_route_contexts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from loraplex_server.api.openapi_tables import (
    ANSWERS,
    BODIES,
    EXAMPLES,
    MORE_STATUSES,
    STREAMS,
    WHOLE,
)
from loraplex_server.text.vocabulary import Vocabulary
from tests.server.api.conftest import BASE, Running, make_adapter, running_server, wait_until
from tests.support.tiny_tokenizer import make_tokenizer

NUM_EXAMPLES = 6
#: An admin's: the keys that are made here would shut anybody else out.
KEY = "admin"
HEADERS = {"authorization": f"Bearer {KEY}"}

#: Left out of schemathesis' checks: `positive_data_acceptance`, as a schema cannot tell which
#: adapters exist, how long a context is or which parameters exclude each other; `use_after_free`
#: and `ensure_resource_availability`, which only runs with links have; `ignored_auth`, which
#: `test_guard` is about.
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    allow_header_conformance,
    missing_required_header,
    unsupported_method,
]
#: What is wrong with an upload is the answer of these.
JUDGES = {"POST /v1/adapters/validate"}
#: What is no server error in the sense of a bug: an engine or a tier that is not there now.
ANSWERED_LATER = {503, 504}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Running:
    vocabulary = Vocabulary(make_tokenizer())
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder / "data", vocabulary, api_key=KEY) as running:
        for name in ("pirate", "team/sql"):
            made = make_adapter(folder / name.replace("/", "-"), seed=len(name))
            assert upload(running, name, made).status_code == 201
        yield running


def upload(server: Running, name: str, folder: Path, **fields: str) -> httpx.Response:
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    url, data = f"{server.url}/v1/adapters", {"name": name, **fields}
    return httpx.post(url, data=data, files=files, headers=HEADERS, timeout=20)


@pytest.fixture(scope="module")
def document(server) -> dict:
    return httpx.get(f"{server.url}/openapi.json", headers=HEADERS, timeout=20).json()


def operations(document: dict):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_every_route_is_in_the_document(server, document):
    routes = {
        (method.lower(), context.path_format)
        for context in iter_route_contexts(server.app.routes)
        if isinstance(context.original_route, APIRoute)
        for method in context.methods
    }
    assert routes == {(method, path) for method, path, _ in operations(document)}


def test_every_operation_says_what_it_does_takes_and_answers(document):
    for method, path, operation in operations(document):
        where = f"{method} {path}"
        assert operation["summary"], where
        assert operation["description"], where
        assert operation["tags"], where
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            assert content["schema"], f"{where} does not say what it takes as {kind}"
        success = [status for status in operation["responses"] if status.startswith("2")]
        assert success, where
        for status in success:
            told = operation["responses"][status]["content"]
            untyped = [kind for kind, content in told.items() if not is_typed(content)]
            assert untyped == [], (
                f"{where} answers {untyped} of no known shape: give its route a response_model or "
                "`responses`, or add it to openapi_tables.ANSWERS"
            )


def is_typed(content: dict) -> bool:
    schema = content.get("itemSchema") or content["schema"]
    is_map = isinstance(schema.get("additionalProperties"), dict)
    return is_map or "$ref" in schema or "properties" in schema or schema.get("type") == "string"


def test_every_failure_has_a_shape(document):
    for method, path, operation in operations(document):
        failures = {s: r for s, r in operation["responses"].items() if not s.startswith("2")}
        assert {"401", "500", "503"} <= failures.keys(), f"{method} {path}"
        for status, response in failures.items():
            schema = response["content"]["application/json"]["schema"]
            assert schema, f"{method} {path} {status}"


def test_the_tables_name_only_operations_that_exist(document):
    known = {(method, path) for method, path, _ in operations(document)}
    assert {*ANSWERS, *BODIES, *EXAMPLES, *MORE_STATUSES, *STREAMS, *WHOLE} <= known


def test_all_references_lead_somewhere(document):
    text = json.dumps(document)
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= document["components"]["schemas"].keys()


def test_the_examples_of_generation_are_answered(server):
    for (_, path), example in EXAMPLES.items():
        if example.keys() & {"model", "inputs"}:
            body = json.loads(json.dumps(example).replace("MODEL", BASE))
            answer = httpx.post(f"{server.url}{path}", json=body, headers=HEADERS, timeout=20)
            assert answer.status_code == 200, answer.text
            if "application/json" in answer.headers["content-type"]:
                ANSWERS["post", path].model_validate(answer.json(), strict=True)


def test_an_upload_with_the_documented_fields_is_accepted(server, document, tmp_path):
    operation = document["paths"]["/v1/adapters"]["post"]
    ref = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["$ref"]
    fields = document["components"]["schemas"][ref.rpartition("/")[2]]["properties"]
    given = {"replace": "true", "ttl_s": "60", "defaults": "{}", "check_base": "true"}
    assert fields.keys() == given.keys() | {"name", "files", "archive", "expected_id"}
    folder: Path = make_adapter(tmp_path / "a", seed=9)
    assert upload(server, "fields", folder, **given).status_code == 201


# ---- whatever is sent ------------------------------------------------------------------------


def aim(case):
    """Name what is there in every other case, so that more than the names is looked at."""
    body, names = case.body, ("pirate", BASE)
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 2:
        body["model"] = names[len(body["model"]) % 3 == 0]
    for field in ("adapter_id", "lora_path", "adapters"):
        if isinstance(body, dict) and body.get("model") in names:
            body.pop(field, None)
    if "name" in case.path_parameters and len(str(case.path_parameters["name"])) % 2:
        case.path_parameters["name"] = "pirate"
    return case


def check(case) -> None:
    """Send it; raise what schemathesis finds wrong with the answer."""
    response = case.call(headers=HEADERS, timeout=20)
    checks = [*CHECKS]
    if response.status_code not in ANSWERED_LATER:
        checks.append(not_a_server_error)
    is_negative = case.meta.generation.mode is GenerationMode.NEGATIVE
    if is_negative and case.operation.label not in JUDGES:
        checks.append(negative_data_rejection)
    case.validate_response(response, checks=checks)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_whatever_is_sent_the_answer_is_in_the_document(server, tmp_path, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)
    folder = make_adapter(tmp_path / "pirate")
    problems = []
    for found in schema.get_all_operations():
        operation = found.ok()
        upload(server, "pirate", folder, replace="true")

        @settings(
            max_examples=NUM_EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode).map(aim))
        def sends(case):
            check(case)

        try:
            sends()
        except Unsatisfiable:  # nothing of it can be wrong
            assert mode is GenerationMode.NEGATIVE
        except FailureGroup as group:
            problems += [f"{operation.label}: {error}" for error in group.exceptions]
    assert problems == [], "\n\n".join(problems)
    wait_until(lambda: server.engine.num_running == 0)
