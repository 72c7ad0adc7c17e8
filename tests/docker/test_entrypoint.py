"""The entrypoint of the images, under a plain shell, starting the real server."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server_process import free_port
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docker" / "entrypoint.sh"
SHELL = shutil.which("dash") or "/bin/sh"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Container:
    """What the image gives the entrypoint, without the image: a home, /data, a few variables."""

    def __init__(self, folder: Path, model: Path, **variables: str) -> None:
        self.port = free_port()
        self.data = folder / "data"
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(self.data),
            "OMP_NUM_THREADS": "1",
            "LORAPLEX_DATA_DIR": str(self.data),
            # The image says 0.0.0.0, which the tests' machine is not to listen on; to the script
            # every address but loopback is the same.
            "LORAPLEX_HOST": "0.0.0.0",
            "LORAPLEX_PORT": str(self.port),
            "LORAPLEX_MODEL": str(model),
            "LORAPLEX_POOL_BYTES": "4MiB",
            "LORAPLEX_HOST_BYTES": "0",
            **variables,
        }

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = [SHELL, str(SCRIPT), *args]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as output:
            return subprocess.Popen(
                [SHELL, str(SCRIPT), *args], env=self.env, stdout=output, stderr=output
            )

    def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.base_url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"not ready: {self.log.read_text()}")


@pytest.fixture
def container(tmp_path, model) -> Iterator[Container]:
    return Container(tmp_path, model)


def test_a_first_start_makes_a_key_serves_drains_and_exits_with_0(container):
    # On loopback by a flag, which the script leaves to the server: it sees the image's 0.0.0.0.
    process = container.start("--host", "127.0.0.1")
    try:
        container.wait_until_ready(process)
        key_file = container.data / "admin-key"
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        key = key_file.read_text().strip()
        assert key.startswith("lp-")
        assert len(key) >= 35
        assert key not in container.log.read_text(), "a secret has no place in a log"
        assert f"it is in {key_file}" in container.log.read_text()
        url = f"{container.base_url}/v1/completions"
        body = {"model": base_name(container, key), "prompt": "a", "max_tokens": 8}
        assert httpx.post(url, json=body).status_code == 401
        bearer = {"authorization": f"Bearer {key}"}
        # It is in its stream when the signal comes, and still gets its end.
        request = {**body, "max_tokens": 100, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", url, json=request, headers=bearer, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert process.wait(timeout=60) == 0, container.log.read_text()
    finally:
        process.kill()
        process.wait()
    again = container.run("--host", "127.0.0.1", "--port", "no-port")
    assert "using the one in" in again.stderr
    assert key_file.read_text().strip() == key


def base_name(container: Container, key: str) -> str:
    answer = httpx.get(
        f"{container.base_url}/v1/models", headers={"authorization": f"Bearer {key}"}
    )
    return str(answer.json()["data"][0]["id"])


def test_the_server_takes_the_place_of_the_script(container):
    process = container.start("--host", "127.0.0.1")
    try:
        container.wait_until_ready(process)
        arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        assert arguments[1:3] == [b"-m", b"loraplex_server"]
        assert container.run("healthcheck").returncode == 0
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert container.run("healthcheck").returncode != 0


def test_a_key_from_a_mounted_secret_is_used_and_none_is_made(container, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("lp-from-a-file\n")
    container.env["LORAPLEX_API_KEY_FILE"] = str(secret)
    command = [*("sh", "-c"), 'printf "%s" "${LORAPLEX_API_KEY:-none} ${LORAPLEX_API_KEY_FILE:-}"']
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{command[2]}\n")
    fake.chmod(0o755)
    container.env["PATH"] = f"{fake.parent}:{container.env['PATH']}"
    assert container.run("--port", "1").stdout == "lp-from-a-file "
    assert not (container.data / "admin-key").exists()


def test_a_key_in_the_configuration_file_is_respected(container, tmp_path):
    toml = tmp_path / "loraplex.toml"
    toml.write_text('api_key = "lp-of-the-file"\nport = "no port"\n')
    del container.env["LORAPLEX_PORT"]
    for flags in (["--config", str(toml)], [f"--config={toml}"]):
        result = container.run(*flags)
        assert "key `port` of the configuration file" in result.stderr
        assert not (container.data / "admin-key").exists()


def test_a_server_that_is_meant_to_be_open_gets_no_key(container):
    container.run("--allow-open", "on", "--port", "no-port")
    container.env["LORAPLEX_ALLOW_OPEN"] = "on"
    container.run("--port", "no-port")
    assert not (container.data / "admin-key").exists()


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "is the secret mounted"), ("", "is empty")]
)
def test_a_secret_that_is_not_there_is_one_clear_line(container, tmp_path, content, problem):
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_text(content)
    container.env["LORAPLEX_API_KEY_FILE"] = str(secret)
    result = container.run()
    assert result.returncode == 78
    assert problem in result.stderr
    assert str(secret) in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_data_folder_that_cannot_be_made_is_one_clear_line(container, tmp_path):
    (tmp_path / "file").write_text("")
    container.env["LORAPLEX_DATA_DIR"] = str(tmp_path / "file" / "data")
    result = container.run()
    assert result.returncode == 78
    assert "mount a volume" in result.stderr


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="needs root, and setpriv of util-linux, to become somebody else",
)
def test_a_data_folder_of_somebody_else_is_one_clear_line(container):
    somebody = ["setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups"]
    # Not pytest's folder, where only its owner can go; and the script by standard input, as the
    # repository may lie in such a folder too.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        result = subprocess.run(
            [*somebody, SHELL, "-s"],
            input=SCRIPT.read_text(),
            cwd="/",
            env={**container.env, "LORAPLEX_DATA_DIR": folder},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode == 78
    assert "not writable for user 10001" in result.stderr


def test_variables_that_kubernetes_sets_for_a_service_do_no_harm(container):
    container.env["LORAPLEX_PORT"] = "tcp://10.0.0.1:8000"
    container.env["LORAPLEX_SERVICE_HOST"] = "10.0.0.1"
    result = container.run("--port", "no-port")
    assert "--port must be" in result.stderr


def test_another_command_runs_instead_of_the_server(container):
    result = container.run("loraplex", "--version")
    assert result.stdout.startswith("loraplex ")
    assert not container.data.exists()
