"""`loraplex adapters check`: the server's verdict on a folder, without a server."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.check_adapter import main
from tests.support.peft_cases import PeftCase, make_base
from tests.support.peft_lora_cases import LORA_CASES

DORA, PLAIN = (next(c for c in LORA_CASES if c.name == name) for name in ("dora", "plain"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = make_base()
    model.save_pretrained(folder)
    return folder


def check(base: Path, *args: object) -> int:
    return main([*map(str, args), "--model", str(base)])


def written(case: PeftCase, folder: Path, **fields: Any) -> Path:
    case.write(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_a_good_adapter_is_accounted_for_in_lines(tmp_path: Path, base: Path, capsys: Any):
    assert check(base, written(DORA, tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.startswith("This adapter would be served exactly.\n")
    for part in (
        "largest rank    8, folded",
        "modules         q, k, v, o, gate, up, down",
        "layers.*.self_attn.q_proj.lora_magnitude_vector (2): over the norms of W + s B A",
        "APPLIED as it is\n  ",
        "use_dora",
        "lora_dropout: training only",
        "self-test",
    ):
        assert part in out, part


def test_as_json_every_tensor_is_named(tmp_path: Path, base: Path, capsys: Any):
    assert check(base, written(PLAIN, tmp_path), "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["accepted"] is True
    assert answer["adapter"]["rank_max"] == 8
    assert answer["adapter"]["is_native"] is True
    tensors = [entry for entry in answer["report"] if entry["kind"] == "tensor"]
    assert len(tensors) == 28
    assert {entry["verdict"] for entry in tensors} == {"applied"}


def test_a_refusal_lists_its_reasons_and_fails(tmp_path: Path, base: Path, capsys: Any):
    folder = written(DORA, tmp_path, init_lora_weights="corda", surprise=1)
    assert check(base, folder) == 1
    out = capsys.readouterr().out
    assert out.startswith("This adapter would be refused:\n  - init_lora_weights='corda': ")
    assert "\nREFUSED\n" in out
    assert "  surprise: surprise=1: unknown field" in out
    assert check(base, folder, "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["accepted"], answer["adapter"], len(answer["reasons"])) == (False, None, 2)


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path, base: Path, monkeypatch: Any):
    folder = written(PLAIN, tmp_path / "a")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        assert check(base, folder) == 0


def test_an_archive_is_checked_too(tmp_path: Path, base: Path):
    folder = written(PLAIN, tmp_path / "a")
    assert check(base, shutil.make_archive(str(tmp_path / "b"), "zip", folder)) == 0


def test_another_base_is_refused_unless_the_check_is_off(tmp_path: Path, base: Path):
    folder = written(PLAIN, tmp_path, base_model_name_or_path="acme/other")
    assert check(base, folder) == 1
    assert check(base, folder, "--skip-base-check") == 0


def test_limits_are_those_of_the_server(tmp_path: Path, base: Path, capsys: Any):
    assert check(base, written(PLAIN, tmp_path), "--max-adapter-rank", "4") == 1
    assert "rank 8 is above the limit of 4" in capsys.readouterr().out


def test_what_cannot_be_checked_is_one_line(tmp_path: Path, base: Path, capsys: Any):
    assert check(base, tmp_path) == 1
    assert check(base, tmp_path / "nothing") == 1
    assert main([str(tmp_path), "--model", str(tmp_path / "nothing")]) == 1
    assert check(base, tmp_path, "--max-adapter-rank", "no") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("loraplex adapters check: ") for line in lines)
