"""Versions, settings and deletion over HTTP, with requests running meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import quote

import httpx
import pytest

from loraplex_server.api import envelope
from loraplex_server.engine.messages import FreedMemory
from tests.server.api.conftest import make_adapter, running_server, wait_until
from tests.support.http_server import serve_with, url_of

NAME = "team/pirate"
LONG = {"model": NAME, "prompt": "a b c", "max_tokens": 200, "ignore_eos": True, "stream": True}


@pytest.fixture
def folders(tmp_path):
    return [make_adapter(tmp_path / f"v{i}", seed=i) for i in range(3)]


def path_of(server, name=NAME, suffix=""):
    return f"{server.url}/v1/adapters/{quote(name, safe='')}{suffix}"


def get(server, name=NAME):
    return httpx.get(path_of(server, name)).json()


def error_of(answer):
    return answer.status_code, answer.json()["error"]["code"]


def test_replacing_makes_a_version_and_comparing_guards_it(server, folders):
    first = server.upload(NAME, folders[0]).json()
    assert error_of(server.upload(NAME, folders[1])) == (409, "adapter_name_taken")
    second = server.upload(NAME, folders[1], replace="true", expected_id=first["id"])
    assert second.status_code == 201
    assert (second.json()["version"], second.json()["current"]) == (2, True)
    late = server.upload(NAME, folders[2], replace="true", expected_id=first["id"])
    assert error_of(late) == (409, "version_conflict")
    assert late.json()["error"]["current_id"] == second.json()["id"]
    assert late.headers["x-should-retry"] == "false"
    again = server.upload(NAME, folders[1], replace="true", expected_id=first["id"])
    assert again.status_code == 200
    alone = server.upload(NAME, folders[1], expected_id=first["id"])
    assert error_of(alone) == (400, "invalid_request")


def test_versions_are_listed_rolled_back_and_named(server, folders):
    ids = [server.upload(NAME, f, replace="true").json()["id"] for f in folders]
    listed = httpx.get(path_of(server, suffix="/versions"), params={"limit": 2}).json()
    assert [v["version"] for v in listed["data"]] == [3, 2]
    assert (listed["has_more"], listed["last"]) == (True, 2)
    rest = httpx.get(path_of(server, suffix="/versions"), params={"after": 2}).json()
    assert [(v["id"], v["current"]) for v in rest["data"]] == [(ids[0], False)]
    old = get(server, f"{NAME}@{ids[0][:20]}")
    assert (old["id"], old["version"]) == (ids[0], 1)
    back = httpx.post(path_of(server, suffix="/rollback"), json={"version": 1})
    assert back.json()["id"] == ids[0]
    assert get(server)["id"] == ids[0]
    forth = httpx.post(path_of(server, suffix="/rollback"), json={"id": ids[2]})
    assert forth.json()["version"] == 3
    for body in ({}, {"id": ids[0], "version": 1}, {"version": 0}):
        answer = httpx.post(path_of(server, suffix="/rollback"), json=body)
        assert error_of(answer) == (400, "invalid_request")
    missing = httpx.post(path_of(server, suffix="/rollback"), json={"version": 9})
    assert error_of(missing) == (404, "adapter_not_found")


def test_a_request_gets_exactly_the_version_it_names(server, folders):
    ids = [server.upload(NAME, f, replace="true").json()["id"] for f in folders[:2]]
    for model, expected in ((NAME, ids[1]), (f"{NAME}@{ids[0]}", ids[0]), (NAME, ids[1])):
        answer = server.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200
        assert answer.json()["model"] == model
        assert server.engine.submitted[-1].adapter.adapter_id == expected
    short = server.post("/v1/completions", {"model": f"{NAME}@{ids[0][:15]}", "prompt": "a"})
    assert error_of(short) == (400, "invalid_adapter_name")
    unknown = server.post("/v1/completions", {"model": f"{NAME}@sha256:{'0' * 64}", "prompt": "a"})
    assert error_of(unknown) == (404, "model_not_found")


def test_a_running_request_keeps_the_version_it_began_with(server, folders):
    old = server.upload(NAME, folders[0]).json()
    server.engine.step_s = 0.02
    with server.http() as http, http.stream("POST", "/v1/completions", json=LONG) as answer:
        next(answer.iter_text())
        new = server.upload(NAME, folders[1], replace="true").json()
        assert server.engine.submitted[-1].adapter.adapter_id == old["id"]
        server.post("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 1})
        assert server.engine.submitted[-1].adapter.adapter_id == new["id"]


def test_one_old_version_can_be_deleted_but_not_the_current_one(server, folders):
    ids = [server.upload(NAME, f, replace="true").json()["id"] for f in folders[:2]]
    current = httpx.delete(path_of(server, f"{NAME}@{ids[1]}"))
    assert error_of(current) == (409, "version_is_current")
    gone = httpx.delete(path_of(server, f"{NAME}@{ids[0]}")).json()
    assert gone["id"] == ids[0]
    assert gone["freed"]["disk_bytes"] > 0
    listed = httpx.get(path_of(server, suffix="/versions")).json()["data"]
    assert [v["id"] for v in listed] == [ids[1]]


def test_a_delete_drains_and_says_what_it_freed(server, folders):
    record = server.upload(NAME, folders[0]).json()
    server.engine.freed_memory = FreedMemory(weight_pages=3, prefix_pages=2, host_bytes=77)
    server.engine.gate = threading.Event()
    with server.http() as http, http.stream("POST", "/v1/completions", json=LONG) as answer:
        pieces = answer.iter_text()
        next(pieces)
        deleted: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: deleted.append(httpx.delete(path_of(server), timeout=20))
        )
        thread.start()
        wait_until(lambda: httpx.get(path_of(server)).status_code == 404)
        assert not deleted
        server.engine.gate.set()
        text = "".join(pieces)
        thread.join()
    assert '"finish_reason":"length"' in text
    assert deleted[0].json()["freed"] == {
        "pool_bytes": 5 * 4096,
        "host_bytes": 77,
        "disk_bytes": record["size_bytes"],
    }


def test_a_delete_that_cancels_ends_each_request_once(server, folders):
    server.upload(NAME, folders[0])
    server.engine.gate = threading.Event()
    bodies = [{**LONG, "stream": False}, {**LONG, "stream": False}]
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda b=b: answers.append(server.post("/v1/completions", b)))
        for b in bodies
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.engine.num_running == 2)
    gone = httpx.delete(path_of(server), params={"mode": "cancel"}, timeout=20)
    for thread in threads:
        thread.join()
    assert gone.status_code == 200, gone.text
    assert [error_of(answer) for answer in answers] == [(409, "adapter_deleted")] * 2
    assert server.engine.num_running == 0


def test_a_cancelled_stream_ends_with_an_error_event(server, folders):
    server.upload(NAME, folders[0])
    server.engine.gate = threading.Event()
    with server.http() as http, http.stream("POST", "/v1/completions", json=LONG) as answer:
        pieces = answer.iter_text()
        next(pieces)
        httpx.delete(path_of(server), params={"mode": "cancel"}, timeout=20)
        text = "".join(pieces)
    assert text.count('"code":"adapter_deleted"') == 1
    assert text.endswith("data: [DONE]\n\n")


def test_cancelling_leaves_another_name_of_the_same_content_alone(server, folders):
    server.upload(NAME, folders[0])
    server.upload("other", folders[0])
    server.engine.gate = threading.Event()
    body = {**LONG, "model": "other"}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        pieces = answer.iter_text()
        next(pieces)
        gone = httpx.delete(path_of(server), params={"mode": "cancel"}, timeout=20).json()
        assert gone["freed"] == {"pool_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
        server.engine.gate.set()
        text = "".join(pieces)
    assert '"finish_reason":"length"' in text


def test_settings_are_changed_one_by_one_and_checked(server, folders):
    defaults = {"system_prompt": "Ahoy", "generation": {"temperature": 0.5, "stop": ["x"]}}
    record = server.upload(NAME, folders[0], ttl_s="60", defaults=json.dumps(defaults)).json()
    assert (record["ttl_s"], record["defaults"], record["pinned"]) == (60, defaults, False)
    changed = httpx.patch(path_of(server), json={"ttl_s": None}).json()
    assert (changed["ttl_s"], changed["defaults"]) == (None, defaults)
    changed = httpx.patch(path_of(server), json={"defaults": {"max_context": 9}}).json()
    assert changed["defaults"] == {"max_context": 9}
    bad = [
        {},
        {"colour": 1},
        {"ttl_s": 0},
        {"pinned": None},
        {"defaults": {"generation": {"temperatur": 1}}},
        {"defaults": {"generation": {"temperature": -1}}},
        {"defaults": {"chat_template": "{% if %}"}},
    ]
    for body in bad:
        answer = httpx.patch(path_of(server), json=body)
        assert error_of(answer) == (400, "invalid_request"), body
    assert error_of(httpx.patch(path_of(server, "nobody"), json={"ttl_s": 1}))[0] == 404


def test_pinned_adapters_are_kept_within_a_share_of_the_pool(server, folders):
    record = server.upload(NAME, folders[0]).json()
    pinned = httpx.patch(path_of(server), json={"pinned": True}).json()
    assert pinned["pinned"] is True
    assert server.engine.kept == {record["id"]}
    # Nobody waits for the loading: its file may have to be fetched.
    wait_until(lambda: [m.adapter_id for m in server.engine.prefetched] == [record["id"]])
    second = server.upload(NAME, folders[1], replace="true").json()
    assert server.engine.kept == {second["id"]}
    big = make_adapter(folders[0].parent / "big", rank=256)
    server.upload("big", big)
    refused = httpx.patch(path_of(server, "big"), json={"pinned": True})
    assert error_of(refused) == (409, "pin_refused")
    httpx.patch(path_of(server), json={"pinned": False})
    assert server.engine.kept == frozenset()


def test_validate_judges_and_registers_nothing(server, folders):
    files = [("files", (p.name, p.read_bytes())) for p in sorted(folders[0].iterdir())]
    good = httpx.post(f"{server.url}/v1/adapters/validate", files=files).json()
    assert good["valid"] is True
    assert good["adapter"]["adapter_id"].startswith("sha256:")
    assert good["adapter"]["self_test_error"] < 1e-5
    assert {entry["verdict"] for entry in good["report"]} <= {"applied", "folded", "no effect"}
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    config["use_qalora"] = "perhaps"
    files[0] = ("files", ("adapter_config.json", json.dumps(config).encode()))
    bad = httpx.post(f"{server.url}/v1/adapters/validate", files=files)
    assert bad.status_code == 200
    assert bad.json()["valid"] is False
    assert any("use_qalora" in reason for reason in bad.json()["reasons"])
    assert any(entry["verdict"] == "refused" for entry in bad.json()["report"])
    broken = [("archive", ("a.zip", b"no zip"))]
    answer = httpx.post(f"{server.url}/v1/adapters/validate", files=broken)
    assert (answer.status_code, answer.json()["valid"]) == (200, False)
    assert server.catalog.list() == ()
    assert not any((server.data_dir / "staging").iterdir())


def test_the_engine_is_told_last_what_is_pinned_now(server, folders, monkeypatch):
    record = server.upload(NAME, folders[0]).json()
    upkeep, real = server.app.state.upkeep, server.catalog.pinned
    is_read, may_go_on = threading.Event(), threading.Event()

    def slow_once():
        monkeypatch.undo()
        found = real()
        is_read.set()
        assert may_go_on.wait(10)
        return found

    monkeypatch.setattr(server.catalog, "pinned", slow_once)
    tick = asyncio.run_coroutine_threadsafe(upkeep.tick(), server.loop)
    assert is_read.wait(10)
    with ThreadPoolExecutor(1) as pool:
        pinned = pool.submit(httpx.patch, path_of(server), json={"pinned": True})
        wait_until(lambda: get(server)["pinned"])
        may_go_on.set()
        assert pinned.result(10).status_code == 200
    tick.result(10)
    assert server.engine.kept == {record["id"]}


def test_only_files_may_be_larger_than_other_bodies(server, folders, monkeypatch):
    monkeypatch.setattr(envelope, "MAX_BODY_BYTES", 2000)
    files = [("files", (f.name, f.read_bytes())) for f in sorted(folders[0].iterdir())]
    for path, data in (("/v1/adapters", {"name": NAME}), ("/v1/adapters/validate", {})):
        answer = httpx.post(f"{server.url}{path}", data=data, files=files)
        assert answer.is_success, answer.text
        body = {"name": NAME, "source": "file:x", "defaults": {"system_prompt": "x" * 4000}}
        refused = server.post(path, body)
        assert refused.status_code in (400, 413)
    assert error_of(server.post("/v1/adapters", body)) == (413, "body_too_large")


def test_the_record_tells_where_an_adapter_came_from(server, folders):
    record = server.upload(NAME, folders[0]).json()
    shown = get(server)
    assert shown["source"] == "upload"
    assert shown["self_test_error"] < 1e-5
    assert shown["last_used"] is None
    assert {entry["subject"] for entry in shown["report"]} >= {"r", "lora_alpha"}
    assert "report" not in record
    server.post("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 1})
    assert get(server)["last_used"] >= record["created"]


def test_expired_names_go_when_nobody_uses_them(server, folders):
    record = server.upload(NAME, folders[0], ttl_s="50").json()
    server.engine.gate = threading.Event()
    upkeep = server.app.state.upkeep

    def tick():
        asyncio.run_coroutine_threadsafe(upkeep.tick(), server.loop).result(10)

    with server.http() as http, http.stream("POST", "/v1/completions", json=LONG) as answer:
        next(answer.iter_text())
        server.clock.offset_s += 100
        tick()
        assert get(server)["id"] == record["id"]
    wait_until(lambda: server.catalog.num_leases(record["id"]) == 0)
    tick()
    assert get(server)["id"] == record["id"]  # its use has just ended
    server.clock.offset_s += 100
    tick()
    assert httpx.get(path_of(server)).status_code == 404
    wait_until(lambda: server.engine.discarded == [record["id"]])


# ---- sources ------------------------------------------------------------------------------------


def test_an_adapter_is_fetched_from_a_source(sourcing_server):
    server, root = sourcing_server
    make_adapter(root / "pirate", seed=3)
    body = {"name": NAME, "source": "file:pirate", "ttl_s": 60, "defaults": {"max_context": 9}}
    answer = server.post("/v1/adapters", body)
    assert answer.status_code == 201, answer.text
    record = answer.json()
    assert (record["source"], record["ttl_s"]) == ("file:pirate", 60)
    assert server.post("/v1/adapters", body).status_code == 200
    uploaded = server.upload("uploaded", root / "pirate").json()
    assert uploaded["id"] == record["id"]
    wrong = server.post("/v1/adapters", {**body, "sha256": "0" * 64})
    assert error_of(wrong) == (422, "digest_mismatch")
    for source, expected in (
        ("file:../x", (403, "source_forbidden")),
        ("file:nothing", (502, "source_failed")),
        ("ftp://x/y", (400, "source_unsupported")),
        ("https://127.0.0.1/x", (403, "source_forbidden")),
    ):
        answer = server.post("/v1/adapters", {"name": "x", "source": source})
        assert error_of(answer) == expected, answer.text
    for bad in ({"name": "x"}, {**body, "colour": 1}, {**body, "sha256": "zz"}):
        assert error_of(server.post("/v1/adapters", bad)) == (400, "invalid_request")
    raw = httpx.post(
        f"{server.url}/v1/adapters", content=b"{", headers={"content-type": "application/json"}
    )
    assert error_of(raw) == (400, "invalid_request")
    assert not any((server.data_dir / "staging").iterdir())


def test_a_fetch_ends_with_its_client(private_server, web):
    host = private_server.url.removeprefix("http://").partition(":")
    body = json.dumps({"name": "slow", "source": f"{web.url}/slow.zip"}).encode()
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    staging = private_server.data_dir / "staging"
    with socket.create_connection((host[0], int(host[2]))) as connection:
        connection.sendall(head + body)
        wait_until(lambda: web.num_sent > 2)
        assert len([*staging.iterdir()]) == 1
    wait_until(lambda: not any(staging.iterdir()))
    assert private_server.catalog.list() == ()


def test_slow_sources_hold_up_no_upload(private_server, web, folders):
    body = {"source": f"{web.url}/slow.zip"}
    head, staging = private_server.url, private_server.data_dir / "staging"
    with ThreadPoolExecutor(5) as pool, httpx.Client(base_url=head, timeout=20) as http:
        fetches = [
            pool.submit(http.post, "/v1/adapters", json={"name": f"slow{i}", **body})
            for i in range(5)
        ]
        wait_until(lambda: len([*staging.iterdir()]) == 5)
        assert private_server.upload(NAME, folders[0]).status_code == 201
        assert not any(fetch.done() for fetch in fetches)
        web.is_over.set()
        assert {fetch.result(20).status_code for fetch in fetches} == {400}


def test_what_a_file_says_of_its_base_is_shown_within_bounds(server, tmp_path):
    for name, base, shown in (
        ("long", "x" * 100_000, "x" * 500),
        ("odd", "a\0b\nc", "a\ufffdb\ufffdc"),
    ):
        folder = make_adapter(tmp_path / name, base=base, seed=len(base))
        answer = server.upload(name, folder, check_base="false")
        assert answer.status_code == 201, answer.text
        assert answer.json()["base_model"] == shown


def test_names_that_nobody_can_have_are_not_echoed_at_length(server):
    for path in ("x" * 5000, "a%00b", "%ff", f"a@sha256:{'0' * 12}"):
        answer = httpx.get(f"{server.url}/v1/adapters/{path}")
        assert error_of(answer) == (404, "adapter_not_found")
        assert len(answer.content) < 1000
    answer = server.post("/v1/completions", {"model": "x" * 100_000, "prompt": "a"})
    assert error_of(answer) == (404, "model_not_found")
    assert len(answer.content) < 1000


@dataclass
class SlowWeb:
    url: str = ""
    num_sent: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def web():
    """A site whose one file ends when it is told so."""
    site = SlowWeb()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not site.is_over.is_set():
                    self.wfile.write(b"x" * 1024)
                    self.wfile.flush()
                    site.num_sent += 1
                    time.sleep(0.01)

        def log_message(self, *args):
            pass

    with serve_with(Handler) as server:
        site.url = url_of(server)
        yield site


@pytest.fixture
def sourcing_server(tmp_path, vocabulary):
    root = tmp_path / "root"
    root.mkdir()
    with running_server(tmp_path / "data", vocabulary, adapter_root=root) as running:
        yield running, root


@pytest.fixture
def private_server(tmp_path, vocabulary):
    with running_server(tmp_path / "data", vocabulary, allow_private_sources=True) as running:
        yield running
