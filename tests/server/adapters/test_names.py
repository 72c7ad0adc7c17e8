"""Names of adapters and of base models."""

from __future__ import annotations

import pytest

from loraplex_server.adapters.errors import InvalidAdapterName
from loraplex_server.adapters.names import check_adapter_name, is_same_base


@pytest.mark.parametrize(
    "name",
    ["a", "sql", "acme/sql-v1.2", "org/team/model:latest", "A+B_c.d-e", "0" * 128, "a."],
)
def test_usual_names_are_accepted(name: str):
    check_adapter_name(name, reserved=("base",))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "1 to 128"),
        ("x" * 129, "1 to 128"),
        ("../etc/passwd", "begin with"),
        ("a/../b", "'..'"),
        ("a..b", "'..'"),
        ("a/./b", "'/./'"),
        ("a//b", "'//'"),
        ("a/", "end with '/'"),
        ("/a", "begin with"),
        ("-a", "begin with"),
        (".a", "begin with"),
        ("a b", "ASCII"),
        ("a,b", "ASCII"),
        ("a\\b", "ASCII"),
        ("a\n", "ASCII"),
        ("a\0b", "ASCII"),
        ("naïve", "ASCII"),
        ("x²", "ASCII"),
        ("a@sha256:00", "'@' is reserved"),
        ("Base/Model", "base model's name"),
        ("alias", "base model's name"),
    ],
)
def test_names_that_break_a_rule_are_refused_with_the_rule(name: str, reason: str):
    with pytest.raises(InvalidAdapterName) as refusal:
        check_adapter_name(name, reserved=("base/model", "alias"))
    assert reason in refusal.value.reason


SMOL = ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    "recorded",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "smollm2-135m-instruct",
        "./models/SmolLM2-135M-Instruct/",
        "C:\\models\\SmolLM2-135M-Instruct",
        "unsloth/SmolLM2-135M-Instruct-bnb-4bit",
        "unsloth/SmolLM2-135M-Instruct-unsloth-bnb-4bit",
        "SmolLM2-135M-Instruct-Q4_K_M.gguf",
        "SmolLM2-135M-Instruct.Q8_0.gguf",
        "/cache/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0123abcd",
        "smollm2",
    ],
)
def test_one_base_goes_by_many_names(recorded: str):
    assert is_same_base(recorded, SMOL)


@pytest.mark.parametrize(
    "recorded",
    [
        "HuggingFaceTB/SmolLM2-135M",
        "SmolLM2-360M-Instruct",
        "SmolLM2-135M-Instruct/checkpoint-5",
        "x",
    ],
)
def test_other_bases_are_told_apart(recorded: str):
    assert not is_same_base(recorded, SMOL)


@pytest.mark.parametrize(
    ("recorded", "is_same"),
    [
        ("/models/final", True),
        ("/models/x/../final/", True),
        ("/runs/7/final", False),
        ("C:\\models\\final", False),
        ("final", True),
        ("./final", True),
        ("acme/final", True),
        ("/models/other", False),
        ("/cache/hub/models--acme--final/snapshots/0123", True),
    ],
)
def test_a_local_folder_is_told_by_its_whole_path(recorded: str, is_same: bool):
    assert is_same_base(recorded, ("final", "/models/final")) == is_same


def test_a_base_from_the_hub_or_a_gguf_file_is_told_by_its_name():
    snapshot = "/cache/hub/models--acme--final/snapshots/0123"
    assert is_same_base("/runs/7/final", ("final", "acme/final", snapshot))
    assert is_same_base("/runs/7/final", ("final", "/models/final-Q8_0.gguf"))
