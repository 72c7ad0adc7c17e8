"""Which of the server's paths the gateway's route gives to the endpoint picker."""

from __future__ import annotations

from pathlib import Path

import httpx
import yaml

GATEWAY = Path(__file__).resolve().parents[3] / "docker" / "gateway" / "gateway.yaml"
#: Computes nothing with an adapter.
PAST_THE_PICKER = {"/v1/messages/count_tokens"}


def test_the_picker_gets_all_that_generates_and_names_a_model_and_nothing_else(server):
    paths = httpx.get(f"{server.url}/openapi.json", timeout=20).json()["paths"]
    generating = {
        path
        for path, methods in paths.items()
        if "generation" in methods.get("post", {}).get("tags", ())
    }
    objects = yaml.safe_load_all(GATEWAY.read_text())
    (route,) = (found for found in objects if found["kind"] == "HTTPRoute")
    matches = route["spec"]["rules"][0]["matches"]
    assert {match["path"]["type"] for match in matches} == {"Exact"}
    assert {match["path"]["value"] for match in matches} == generating - PAST_THE_PICKER
    assert generating >= PAST_THE_PICKER
