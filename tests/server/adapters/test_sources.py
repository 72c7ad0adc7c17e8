"""Fetching adapters: from files, from a local HTTP server, and from a local S3 server."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loraplex_server.adapters.errors import (
    DigestMismatch,
    InvalidUpload,
    SourceFailed,
    SourceForbidden,
    SourceUnsupported,
    UploadTooLarge,
)
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.sources import fetch as fetch_module
from loraplex_server.adapters.sources import https_files
from loraplex_server.adapters.sources.fetch import FetchCancelled, fetch
from loraplex_server.adapters.sources.https_files import judge_host
from loraplex_server.adapters.sources.source import SourcePolicy, parse_source
from loraplex_server.adapters.upload import UploadStaging
from tests.support.adapters import make_folder, read_folder
from tests.support.http_server import serve_with, url_of

PRIVATE = SourcePolicy(allow_private=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "root" / "pirate")


@pytest.fixture
def archive(folder, tmp_path) -> Path:
    path = tmp_path / "root" / "pirate.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, "pirate")
    return path


@pytest.fixture
def get(tmp_path):
    """Return a function that fetches into a quarantine, reads it and sweeps it."""
    quarantines = tmp_path / "quarantines"
    quarantines.mkdir()

    def run(url, policy, *, limits=None, cancelled=None, **options):
        source = parse_source(url, policy)
        with UploadStaging(quarantines, limits) as staging:
            event = cancelled or threading.Event()
            fetch(source, policy, staging, cancelled=event, **options)
            return read_folder(staging.finish())

    yield run
    assert list(quarantines.iterdir()) == []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what is refused before anything is read ---------------------------------------------------


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ftp://host/x", SourceUnsupported),
        ("pirate", SourceUnsupported),
        ("memory://x", SourceUnsupported),
        ("s3://bucket::file:///etc/passwd", SourceUnsupported),
        ("https://host/a b", SourceUnsupported),
        ("https:///x", SourceUnsupported),
        ("https://host:port/x", SourceUnsupported),
        ("https://h/" + "x" * 3000, SourceUnsupported),
        ("s3:bucket/x", SourceUnsupported),
        ("file:pirate", SourceForbidden),
        ("http://host/x", SourceForbidden),
    ],
)
def test_a_source_that_nothing_may_read_is_refused_by_its_looks(url, error):
    with pytest.raises(error):
        parse_source(url, SourcePolicy())


def test_what_a_record_shows_of_a_source_has_no_secrets():
    source = parse_source("https://me:secret@host/a/b.zip?X-Amz-Signature=1#x", SourcePolicy())
    assert source.public_url == "https://host/a/b.zip"
    assert source.archive_name == "b.zip"
    assert list(source.files().values()) == [source.url]


@pytest.mark.parametrize("url", ["file:a/b", "file:///srv/a", "file:///srv/a%20b.zip"])
def test_a_record_shows_local_sources_as_they_were_named(url):
    assert parse_source(url, SourcePolicy(root=Path("/srv"))).public_url == url


def test_what_is_logged_of_a_source_has_no_secrets(web):
    script = (
        "import sys; from pathlib import Path; from loraplex_server.logs import set_up_logging\n"
        "set_up_logging('debug')\n"
        "from loraplex_server.adapters.sources.https_files import read_https\n"
        "assert b''.join(read_https(sys.argv[1], allow_private=True))\n"
    )
    url = f"{web.url}/pirate/adapter_config.json?X-Amz-Signature=secret"
    run = [sys.executable, "-c", script, url]
    logged = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    assert "secret" not in logged


def test_a_folder_is_two_files_and_keeps_its_query():
    source = parse_source("https://host/a/?sig=1", SourcePolicy())
    assert source.files() == {
        "adapter_config.json": "https://host/a/adapter_config.json?sig=1",
        "adapter_model.safetensors": "https://host/a/adapter_model.safetensors?sig=1",
    }


# ---- file: --------------------------------------------------------------------------------------


def test_files_below_the_root_are_read(get, folder, archive):
    policy = SourcePolicy(root=folder.parent)
    urls = ("file:pirate", f"file://{folder}", "file:pirate.tar.gz", f"file://localhost{archive}")
    for url in urls:
        assert get(url, policy).weights.lora
    digest = sha256(folder / "adapter_model.safetensors")
    assert get("file:pirate", policy, sha256=digest).weights.lora
    assert get("file:pirate.tar.gz", policy, sha256=sha256(archive)).weights.lora
    with pytest.raises(DigestMismatch) as mismatch:
        get("file:pirate", policy, sha256="0" * 64)
    assert mismatch.value.details == {"sha256": digest}


def test_nothing_outside_the_root_is_read(get, folder, tmp_path):
    policy = SourcePolicy(root=folder.parent)
    secret = make_folder(tmp_path / "secret")
    (folder.parent / "link").symlink_to(secret)
    half = folder.parent / "half"
    half.mkdir()
    (half / "adapter_config.json").symlink_to(secret / "adapter_config.json")
    bad = [
        f"file://{secret}",
        "file:../secret",
        "file:%2e%2e/secret",
        "file:link",
        "file:half",
        "file:///nothing",
    ]
    for url in [*bad, "file://elsewhere/pirate"]:
        with pytest.raises(SourceForbidden):
            get(url, policy)
    with pytest.raises(SourceFailed):
        get("file:missing", policy)
    with pytest.raises(SourceFailed):
        get("file:pirate%00", policy)


def test_a_link_that_stays_below_the_root_is_followed(get, folder):
    (folder.parent / "latest").symlink_to(folder)
    assert get("file:latest", SourcePolicy(root=folder.parent)).weights.lora


def test_a_link_that_was_put_on_the_way_leads_nowhere(get, folder, tmp_path, monkeypatch):
    secret = make_folder(tmp_path / "secret")
    real = Path.resolve

    def resolve_and_swap(path, strict=False):
        found = real(path, strict=strict)
        if found.parent == folder and not folder.is_symlink():
            folder.rename(folder.parent / "aside")
            folder.symlink_to(secret)
        return found

    monkeypatch.setattr(Path, "resolve", resolve_and_swap)
    with pytest.raises(SourceFailed):
        get("file:pirate", SourcePolicy(root=folder.parent))


def test_a_pipe_is_no_file(get, folder):
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(SourceForbidden, match="not a regular file"):
        get("file:pirate", SourcePolicy(root=folder.parent))


def test_a_fetch_is_bounded_and_can_be_cancelled(get, folder):
    policy = SourcePolicy(root=folder.parent)
    with pytest.raises(UploadTooLarge):
        get("file:pirate", policy, limits=AdapterLimits(max_upload_bytes=1000))
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(FetchCancelled):
        get("file:pirate", policy, cancelled=cancelled)
    ticks = iter([0.0, 1.0, fetch_module.MAX_FETCH_S + 1])
    with pytest.raises(SourceFailed, match="longer than"):
        get("file:pirate", policy, clock=lambda: next(ticks))


# ---- https: -------------------------------------------------------------------------------------


@dataclass
class Web:
    """A local server of files, and what it was asked."""

    url: str
    root: Path
    redirects: dict[str, str] = field(default_factory=dict)
    hosts: list[str] = field(default_factory=list)


@pytest.fixture
def web(folder) -> Iterator[Web]:
    site = Web("", folder.parent)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site.root))

        def do_GET(self):
            site.hosts.append(self.headers["host"])
            if self.path in site.redirects:
                self.send_response(302)
                self.send_header("location", site.redirects[self.path])
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    with serve_with(Handler) as server:
        site.url = url_of(server)
        yield site


def test_folders_and_archives_are_fetched_over_http(get, web, archive):
    assert get(f"{web.url}/pirate", PRIVATE).weights.lora
    assert get(f"{web.url}/pirate.tar.gz?x=1", PRIVATE, sha256=sha256(archive)).weights.lora
    with pytest.raises(SourceFailed, match="status 404"):
        get(f"{web.url}/nothing", PRIVATE)
    (web.root / "pirate" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InvalidUpload):
        get(f"{web.url}/pirate", PRIVATE)


def test_redirects_are_followed_so_far_and_relative_ones_too(get, web, archive):
    web.redirects["/old.zip"] = "/pirate.tar.gz"
    assert get(f"{web.url}/old.zip", PRIVATE).weights.lora
    web.redirects["/loop.zip"] = "/loop.zip"
    with pytest.raises(SourceFailed, match="redirects more than"):
        get(f"{web.url}/loop.zip", PRIVATE)
    web.redirects["/odd.zip"] = "ftp://host/x"
    with pytest.raises(SourceForbidden):
        get(f"{web.url}/odd.zip", PRIVATE)


def test_a_server_that_cannot_be_reached_is_told(get):
    with pytest.raises(SourceFailed, match="cannot be fetched"):
        get("http://127.0.0.1:1/x.zip", PRIVATE)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "::7f00:1",
        "64:ff9b:1::7f00:1",
        "fec0::1",
    ],
)
def test_private_addresses_are_refused_however_they_are_written(address):
    with pytest.raises(SourceForbidden):
        judge_host(address, 443, allow_private=False)
    assert judge_host(address, 443, allow_private=True)


def test_an_address_in_brackets_is_judged_as_any_host(get):
    for host in ("[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "127.1"):
        with pytest.raises(SourceForbidden, match="private address"):
            get(f"https://{host}/x.zip", SourcePolicy())


def test_public_addresses_are_let_through():
    assert judge_host("93.184.216.34", 443, allow_private=False) == "93.184.216.34"
    assert judge_host("2606:4700::1111", 443, allow_private=False) == "2606:4700::1111"


def test_a_name_is_judged_by_every_address_and_used_by_the_one_judged(get, web, monkeypatch):
    port = int(web.url.rpartition(":")[2])
    answers = [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"]]

    def resolve(host, port, **options):
        assert host == "evil.example"
        return [(2, 1, 6, "", (address, port)) for address in answers[0]]

    monkeypatch.setattr(https_files.socket, "getaddrinfo", resolve)
    for _ in range(2):
        with pytest.raises(SourceForbidden, match="private address"):
            get(f"https://evil.example:{port}/pirate", SourcePolicy())
        answers.reverse()
    assert web.hosts == []
    # What the name resolves to now is connected to, and the server still sees the name.
    monkeypatch.setattr(
        https_files.socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", ("127.0.0.1", port))]
    )
    assert get(f"http://evil.example:{port}/pirate", PRIVATE).weights.lora
    assert set(web.hosts) == {f"evil.example:{port}"}


def test_a_redirect_to_a_private_address_is_refused(get, web, monkeypatch):
    port = int(web.url.rpartition(":")[2])
    real = https_files.judge_host
    # As if the first host were public.
    monkeypatch.setattr(
        https_files,
        "judge_host",
        lambda host, port, allow_private: (
            "127.0.0.1" if host == "public.example" else real(host, port, allow_private=False)
        ),
    )
    web.redirects["/x.zip"] = f"http://localhost:{port}/pirate.tar.gz"
    with pytest.raises(SourceForbidden, match="private address"):
        get(f"http://public.example:{port}/x.zip", PRIVATE)


# ---- s3: ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server", reason="no local S3 server: moto[server]")
    pytest.importorskip("s3fs", reason="no client for S3: s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, folder, archive) -> Iterator[str]:
    """A bucket with the folder and its archive; the process's environment leads there."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.makedirs("adapters", exist_ok=True)
    for path in (*folder.iterdir(), archive):
        files.put_file(str(path), f"adapters/{path.relative_to(folder.parent)}")
    yield "s3://adapters"
    s3fs.S3FileSystem.clear_instance_cache()


def test_folders_and_archives_are_fetched_from_s3(get, bucket, archive):
    assert get(f"{bucket}/pirate", SourcePolicy()).weights.lora
    url = f"{bucket}/pirate.tar.gz"
    assert get(url, SourcePolicy(), sha256=sha256(archive)).weights.lora
    with pytest.raises(SourceFailed, match="there is no"):
        get(f"{bucket}/nothing", SourcePolicy())
    with pytest.raises(SourceFailed):
        get("s3://no-such-bucket/x.zip", SourcePolicy())
    with pytest.raises(UploadTooLarge):
        get(url, SourcePolicy(), limits=AdapterLimits(max_upload_bytes=1000))


def test_a_missing_library_is_named(get, monkeypatch):
    monkeypatch.setattr(
        "loraplex_server.adapters.sources.object_files.url_to_fs",
        lambda url: (_ for _ in ()).throw(ImportError("Install gcsfs")),
    )
    with pytest.raises(SourceUnsupported, match=r"pip install 'loraplex\[gcs\]'"):
        get("gs://bucket/x.zip", SourcePolicy())
