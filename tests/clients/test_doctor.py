"""`loraplex doctor`: each check on what it judges, and the command against real servers."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from typer.testing import CliRunner

from loraplex import Client
from loraplex.cli.app import app
from loraplex.cli.doctor import machine
from loraplex.cli.doctor.finding import Verdict
from loraplex.cli.doctor.machine import check_data_dir, check_python, judge_devices
from loraplex.cli.doctor.server import check_clock, check_server, is_same_base
from tests.clients.tiny_loraplex import TinyLoraplex
from tests.support.http_server import Reply, serve

CPU = {"is_available": False, "cuda": None, "devices": [], "cpu": "AVX2"}


def verdicts(findings) -> dict[str, Verdict]:
    return {finding.subject: finding.verdict for finding in findings}


def test_an_old_python_fails():
    assert check_python((3, 10, 4)).verdict is Verdict.FAIL
    assert check_python((3, 11, 0)).verdict is Verdict.OK


def test_a_machine_without_a_gpu_is_told_and_works(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    [finding] = judge_devices(CPU, has_triton=True)
    assert (finding.verdict, "AVX2" in finding.told) == (Verdict.NOTE, True)


def test_a_torch_without_cuda_beside_a_gpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    [finding] = judge_devices(CPU, has_triton=True)
    assert "install one for CUDA" in finding.advice


@pytest.mark.parametrize(
    ("major", "has_triton", "failing"), [(9, True, []), (7, True, ["gpu"]), (9, False, ["triton"])]
)
def test_a_gpu_is_judged_by_its_age_and_what_its_kernels_need(major, has_triton, failing):
    found = {**CPU, "is_available": True, "devices": [["H200", 139 << 30, major, 0]]}
    findings = list(judge_devices(found, has_triton=has_triton))
    assert [f.subject for f in findings if f.verdict is Verdict.FAIL] == failing


def test_the_data_folder_is_tried_and_nothing_stays(tmp_path):
    [finding] = check_data_dir(tmp_path / "a" / "b")
    assert finding.verdict is Verdict.OK
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    [finding] = check_data_dir(tmp_path / "file" / "b")
    assert finding.verdict is Verdict.FAIL
    assert "choose another --data-dir" in finding.advice


def test_no_compiler_is_a_note(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.check_compiler().verdict is Verdict.NOTE


@pytest.mark.parametrize(
    ("trained_on", "served", "same"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", True),
        ("/models/tiny", "Tiny", True),
        ("tiny", "tiny-q8", True),
        ("tiny2", "tiny", False),
        ("", "tiny", False),
    ],
)
def test_bases_are_compared_without_owner_and_folder(trained_on, served, same):
    assert is_same_base(trained_on, served) is same


@pytest.fixture
def tiny():
    tiny = TinyLoraplex()
    tiny.failing["GET", "/health"] = Reply({"status": "ok"})
    tiny.failing["GET", "/version"] = Reply({"version": "9.9"})
    return tiny


def ask(tiny, model=None):
    with serve(tiny.answer) as running, Client(base_url=running.url) as client:
        return list(check_server(client, model))


def test_a_refused_key_is_told(tiny):
    error = {"error": {"message": "no such key", "code": "invalid_api_key"}}
    tiny.failing["GET", "/v1/models"] = Reply(error, 401)
    findings = ask(tiny)
    assert findings[-1].subject == "key"
    assert findings[-1].advice == "give a key with --api-key or LORAPLEX_API_KEY"


def test_a_model_that_is_not_there_and_adapters_of_another_base_are_told(tiny):
    tiny.add("stranger", base_model="someone/else")
    findings = ask(tiny, "absent")
    found = verdicts(findings)
    assert (found["models"], found["adapters"]) == (Verdict.FAIL, Verdict.NOTE)
    assert "stranger (someone/else)" in findings[-1].told


def test_another_version_is_a_note(tiny):
    assert verdicts(ask(tiny))["version"] is Verdict.NOTE


def test_a_server_that_is_not_ready_fails(tiny):
    tiny.failing["GET", "/health"] = Reply({"status": "starting"}, 503)
    assert verdicts(ask(tiny))["server"] is Verdict.FAIL


@pytest.mark.parametrize(("skew_s", "verdict"), [(0, Verdict.OK), (-600, Verdict.NOTE)])
def test_a_clock_that_is_off_is_told(skew_s, verdict, monkeypatch):
    import httpx

    when = datetime.now(UTC) + timedelta(seconds=skew_s)
    response = httpx.Response(200, headers={"date": format_datetime(when, usegmt=True)})
    monkeypatch.setattr(httpx, "get", lambda *args, **options: response)
    assert check_clock("http://x").verdict is verdict


def test_nobody_there_says_whether_the_port_is_free():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with Client(base_url=f"http://127.0.0.1:{port}") as client:
            # Bound and not listening: nobody answers, and nobody else can have it.
            assert verdicts(check_server(client, None))["port"] is Verdict.FAIL
    with Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert verdicts(check_server(client, None))["port"] is Verdict.OK


def test_the_command_tells_all_of_a_real_server(tiny_server, tmp_path):
    command = ["--base-url", tiny_server.base_url, "doctor", "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--json", "--model", "tiny"])
    found = {item["subject"]: item["verdict"] for item in json.loads(result.stdout)}
    assert result.exit_code == 0, result.stdout
    wanted = {"python", "packages", "gpu", "compiler", "memory", "data folder", "server", "clock"}
    assert wanted | {"key", "version", "models", "adapters"} == set(found)
    failing = CliRunner().invoke(app, [*command, "--model", "absent"])
    assert failing.exit_code == 1
    assert "-> push it: loraplex adapters push FOLDER --name absent" in failing.stdout
    assert failing.stdout.rstrip().endswith("1 fail")
