"""What our three proxies make of requests and of replicas, each run with the file that we ship."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
import yaml

from loraplex.calls.call import AFFINITY_HEADER
from loraplex_server.config_sources import load_config
from tests.support.proxies import (
    ENVOY_CONFIG,
    HAPROXY_CONFIG,
    NGINX_CONFIG,
    PROXIES,
    envoy_command,
    envoy_config,
    running_proxy,
    why_no_proxy,
)
from tests.support.routed_echo import Replica, running_replicas

HAPROXY, NGINX = HAPROXY_CONFIG.read_text(), NGINX_CONFIG.read_text()
ENVOY = yaml.safe_load(ENVOY_CONFIG.read_text())["static_resources"]
API = (NGINX_CONFIG.parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
#: What a POST changes, so that it is not to be sent again once it was.
CHANGING = (
    r"/v1/adapters(/validate|/\{name\}/\w+)?|/v1/keys|(/v1)?/(un)?load_lora_adapter",
    r"/v1/models/\{id\}",
)


def check_command(name: str, folder: Path) -> list[str]:
    """Return what has a proxy look at its file."""
    if name == "haproxy":
        return ["haproxy", "-c", "-f", str(HAPROXY_CONFIG)]
    if name == "nginx":
        return ["nginx", "-t", "-e", "stderr", "-c", str(NGINX_CONFIG)]
    path = folder / "envoy.yaml"
    path.write_text(envoy_config())
    return envoy_command(path, "--mode", "validate")


def test_a_server_starts_in_the_environment_that_haproxy_reads():
    found = dict(re.findall(r"^ *presetenv (\w+) (.+)$", HAPROXY, re.M))
    assert len(found) == 6
    assert load_config([], found) == load_config([], {})


@pytest.mark.parametrize("name", PROXIES)
def test_a_configuration_is_valid_as_it_is_shipped(name, tmp_path):
    if (reason := why_no_proxy(name)) is not None:
        pytest.skip(reason)
    # As many open files as systemd gives a service that asks for no more.
    command = ["prlimit", "--nofile=1024:", *check_command(name, tmp_path)]
    ours, theirs = socket.socketpair()  # what systemd gives a service as its standard output
    with ours, theirs:
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if os.geteuid() == 0:  # others are told that they cannot choose whom to run as
        assert "warn" not in done.stderr.lower()


def computing_paths() -> set[str]:
    """Return the paths of POSTs that only compute, as docs/api.md has them."""
    table = API.partition("## Endpoints")[2].partition("## ")[0]
    posts = set(re.findall(r"`POST (/[^`?]*)`", table))
    assert len(posts) > 15
    return {path for path in posts if not any(re.fullmatch(kind, path) for kind in CHANGING)}


def test_haproxy_sends_again_all_that_only_computes_and_nothing_else():
    lines = re.findall(r"^ +acl is_repeatable path (.*)$", HAPROXY, re.M)
    assert {path for line in lines for path in line.split()} == computing_paths()


def test_nginx_sends_again_all_that_only_computes_and_nothing_else():
    pattern = re.search(r"location ~ (\^/\(v1/.*\$) \{", NGINX)[1]
    posts = re.findall(r"`POST (/[^`?]*)`", API)
    assert {path for path in posts if re.match(pattern, path)} == computing_paths()


def test_envoy_sends_again_all_that_only_computes_and_nothing_else():
    (listener,) = ENVOY["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    _, *changing, adapter, rest = host["routes"]
    assert [route["route"]["cluster"] for route in changing] == ["adapters", "any"]
    assert not any("reset" in retried_on(route).split(",") for route in changing)
    assert {"reset", "retriable-status-codes"} <= {*retried_on(adapter).split(",")}
    assert retried_on(adapter) == retried_on(rest)
    for route in changing:
        _, *exceptions = [
            found["string_match"]["safe_regex"]["regex"]
            for found in route["match"]["headers"]
            if "safe_regex" in found.get("string_match", {})
        ]
        posts = re.findall(r"`POST (/[^`?]*)`", API)
        again = {path for path in posts if any(re.fullmatch(e, path) for e in exceptions)}
        assert again == computing_paths()


def retried_on(route: dict) -> str:
    return route["route"]["retry_policy"]["retry_on"]


def test_both_backends_have_the_same_replicas():
    first, second = ENVOY["clusters"]
    assert first["load_assignment"] == second["load_assignment"]
    assert first["health_checks"] == second["health_checks"]
    for config, form in ((HAPROXY, r"^ +server (\w+ \S+)"), (NGINX, r"^ +server (\S+ \S+ \S+);")):
        servers = re.findall(form, config, re.M)
        assert len(servers) == 6
        assert servers[:3] == servers[3:]


def test_proxies_look_for_the_header_that_our_sdk_sends():
    assert f"req.hdr({AFFINITY_HEADER.lower()})" in HAPROXY
    assert f"['{AFFINITY_HEADER}']" in NGINX_CONFIG.with_name("affinity.js").read_text()
    assert f'"{AFFINITY_HEADER.lower()}"' in ENVOY_CONFIG.with_name("model_header.lua").read_text()


@dataclass(frozen=True)
class Front:
    """A proxy before three replicas that echo."""

    name: str
    url: str
    client: httpx.Client
    replicas: list[Replica]
    log: Path

    def ask(self, path: str, method: str = "POST", **options: object) -> httpx.Response:
        return self.client.request(method, path, **options)

    def num_asked(self) -> int:
        return sum(len(replica.asked) for replica in self.replicas)

    def be(self, *moods: str) -> None:
        for replica, mood in zip(self.replicas, moods, strict=True):
            replica.mood = mood

    def wait_for_log(self, text: str) -> str:
        """Wait until it is in the log; return all of that."""
        for _ in range(600):
            if text in (log := self.log.read_text()):
                return log
            time.sleep(0.05)
        raise AssertionError(log)


Start = Callable[..., Front]


@pytest.fixture
def start(tmp_path) -> Iterator[Start]:
    """Yield what runs a proxy, by its name, before three replicas of its own."""
    tmp_path.chmod(0o755)
    with ExitStack() as stack:

        def run(name: str, **options: int) -> Front:
            if (reason := why_no_proxy(name)) is not None:
                pytest.skip(reason)
            replicas = stack.enter_context(running_replicas())
            urls = [replica.url for replica in replicas]
            url = stack.enter_context(running_proxy(name, tmp_path, urls, "base", **options))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=30))
            return Front(name, url, client, replicas, tmp_path / f"{name}.log")

        yield run


@pytest.fixture(params=PROXIES)
def front(request, start) -> Front:
    return start(request.param)


def test_no_spelling_of_a_path_reaches_what_is_of_one_replica(front):
    paths = ("/metrics", "/%6detrics", "/loa%64", "/v1/%70ool?x=1", "/v1%2Fpool", "/v1%2fpoo%6C")
    for path in paths:
        answer = front.ask(path, "GET")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    assert front.num_asked() == 0
    assert front.ask("/v1/models", "GET").json()["path"] == "/v1/models"


def test_no_name_of_an_adapter_begins_a_line_of_the_log(front):
    line_end = {"haproxy": r"\n", "nginx": r"\x0A", "envoy": "%0A"}[front.name]
    assert front.ask("/v1/adapters/one%0Atwo", "GET").status_code == 200
    log = front.wait_for_log(f"one{line_end}two")
    assert not any(line.startswith("two") for line in log.splitlines())


NAMES = ('q"uote', "new\nline", "tab\t", "br{ace", "\u00e9", "\U0001f600", "back\\slash", "x" * 300)


def test_any_name_in_a_body_leaves_request_and_log_whole(front):
    for name in NAMES:
        for text in (json.dumps({"model": name}), json.dumps({"model": name}, ensure_ascii=False)):
            body = text.encode()
            answer = front.ask("/v1/completions", content=body, headers=JSON)
            assert answer.status_code == 200, (name, answer.text)
            assert answer.json()["body"] == body.decode("latin1")
    assert front.ask("/v1/adapters/x", "GET").status_code == 200
    log = front.wait_for_log("/v1/adapters/x")
    lines = [line for line in log.splitlines() if "/v1/completions" in line]
    assert len(lines) == 2 * len(NAMES)
    assert all(str(200) in line for line in lines)


JSON = {"Content-Type": "application/json"}


def pieces(name: str) -> Iterator[bytes]:
    yield b'{"prompt": "x", "mod'
    yield f'el": "{name}"}}'.encode()


def test_a_name_leads_to_one_replica_however_it_is_given(front):
    for name in ("acme/pirate", "b", "c", "d"):
        ways = [
            front.ask("/v1/completions", json={}, headers={AFFINITY_HEADER: name}),
            front.ask("/v1/completions", json={"model": name, "prompt": "x"}),
            front.ask("/v1/completions", json={"model": "base", "lora_path": name}),
            front.ask("/generate", json={"inputs": "x", "parameters": {"adapter_id": name}}),
            front.ask("/v1/completions", content=pieces(name), headers=JSON),
            front.ask(f"/v1/adapters/{name}/prefetch"),
            front.ask(f"/v1/adapters/{name.replace('/', '%2F')}?x=y", "GET"),
        ]
        assert {way.status_code for way in ways} == {200}
        homes = [way.headers["X-Loraplex-Replica"] for way in ways]
        # HAProxy may still count the request before, and the bound of so few is one.
        assert max(homes.count(home) for home in homes) >= (4 if front.name == "haproxy" else 7)


def test_an_empty_header_names_nobody_and_the_body_is_asked(front):
    headers = {AFFINITY_HEADER: ""}
    bodies = [{"model": f"adapter-{number}"} for number in range(40)]
    answers = [front.ask("/v1/completions", json=body, headers=headers) for body in bodies]
    assert len({answer.headers["X-Loraplex-Replica"] for answer in answers}) == 3


def test_a_body_that_no_replica_would_take_is_refused_in_json(front):
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'", "model": "late"}'
    answer = front.ask("/v1/completions", content=body, headers=JSON)
    if front.name == "haproxy":  # lets it pass: it looks at 64 KiB only
        assert answer.json()["body"] == body.decode()
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert front.num_asked() == 0


def test_an_upload_goes_on_as_it_comes(front):
    """So it may be larger than any buffer, and whoever sends it has one replica to the end."""
    host, _, port = front.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as upload:
        head = "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 12000000\r\n\r\n"
        upload.sendall(head.encode() + b"x" * 2_000_000)
        deadline = time.monotonic() + 30
        while not any(replica.body_began.is_set() for replica in front.replicas):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        upload.sendall(b"x" * 10_000_000)
        assert upload.recv(12) == b"HTTP/1.1 200"


def test_what_only_computes_is_asked_of_another_replica_than_one_that_drains_or_breaks_off(front):
    # Another one each time, as nginx leaves out for a while what failed once.
    cases = [("answers", "drains", "answers"), ("answers", "answers", "breaks")]
    if front.name == "envoy":  # HAProxy may go to and fro between two
        cases.append(("drains", "answers", "breaks"))
    for moods in cases:
        front.be(*moods)
        before = front.num_asked()
        answers = [front.ask("/v1/completions", json={"model": f"{i}"}) for i in range(40)]
        assert {answer.status_code for answer in answers} == {200}
        assert front.num_asked() > before + 40


def test_what_changes_something_is_sent_to_one_replica_only(front):
    front.be("breaks", "breaks", "breaks")
    # A client's word for Envoy, as from any that is inside.
    headers = {"X-Envoy-Retry-On": "5xx,reset", "X-Envoy-Max-Retries": "3"}
    answer = front.ask("/v1/adapters", content=b"x", headers=headers)
    assert front.num_asked() == 1
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "replica_lost")
    if front.name != "nginx":  # which leaves one out that failed, and has no checks
        front.be("drains", "drains", "drains")
        assert front.ask("/v1/adapters", content=b"x").status_code == 503
        assert front.num_asked() == 2


def test_no_replica_at_all_is_said_in_json(front):
    for replica in front.replicas:
        replica.vanish()
    for path in ("/v1/completions", "/v1/adapters"):
        answer = front.ask(path, json={"model": "x"})
        error = answer.json()["error"]
        if front.name == "nginx":
            assert (answer.status_code, error["code"]) == (502, "replica_lost")
        else:
            assert (answer.status_code, error["code"]) == (503, "no_replica")
            assert answer.headers["Retry-After"] == "1"
        assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("name", PROXIES)
def test_a_replica_that_says_nothing_is_given_up(start, name):
    front = start(name, silence_s=1)
    front.be("waits", "waits", "waits")
    answer = front.ask("/v1/adapters", content=b"x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "replica_timeout")


def test_replicas_are_told_who_asks(front):
    headers = {"X-Forwarded-For": "192.0.2.7", "Host": "llm.example.com", "X-Request-Id": "mine"}
    told = front.ask("/v1/models", "GET", headers=headers).json()["headers"]
    first, _, last = told["x-forwarded-for"].replace(" ", "").partition(",")
    assert first == "192.0.2.7"
    assert last
    assert told["host"] == "llm.example.com"
    assert told["x-request-id"] == "mine"
    assert told.get("x-forwarded-proto", "http") == "http"


def test_a_client_of_http_1_0_is_served(front):
    host, _, port = front.url.removeprefix("http://").partition(":")
    connection = HTTPConnection(host, int(port), timeout=30)
    connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 200
    connection.close()


def wait_for_probes(local: int | None = None, remotes: frozenset[int] = frozenset()) -> None:
    """Wait until the kernel probes a connection of a port here, or to one of ports there.

    It waits for acknowledgements of what was sent first, with the same timer.
    """
    for _ in range(600):
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, here, there, state, _, timer, *_ = line.split()
            is_meant = int(here[-4:], 16) == local or int(there[-4:], 16) in remotes
            if is_meant and (state, timer[:2]) == ("01", "02"):  # established, keep-alive
                return
        time.sleep(0.05)
    raise AssertionError(Path("/proc/net/tcp").read_text())


def test_a_machine_that_is_gone_is_noticed_while_an_answer_is_waited_for(front):
    """It says nothing, and somebody who waits for it says nothing either: the kernel has to ask."""
    assert front.ask("/v1/models", "GET").status_code == 200
    wait_for_probes(local=httpx.URL(front.url).port)
    if front.name != "nginx":  # which can ask replicas as often as the whole machine does only
        wait_for_probes(remotes=frozenset(replica.server_port for replica in front.replicas))
