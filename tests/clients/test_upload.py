from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import httpx
import pytest
from python_multipart.multipart import parse_form

from loraplex import (
    AdapterFilesError,
    APIConnectionError,
    Client,
    ConflictError,
    UnprocessableEntityError,
)
from loraplex.adapter_files import default_name, find_parts
from loraplex.multipart import BLOCK_BYTES, MultipartBody

RECORD = {
    "object": "adapter",
    "name": "sql",
    "id": "sha256:00",
    "base_model": "base",
    "rank_max": 8,
    "target_modules": ["q_proj"],
    "size_bytes": 1,
    "pool_pages": 1,
    "created": 1,
    "state": "registered",
}
WEIGHTS = bytes(range(256)) * 3000 + b"\r\n--boundary\r\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "sql-writer"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text("not sent")
    return folder


def parse(headers: httpx.Headers, body: bytes) -> list[tuple[str, str | None, bytes]]:
    """Return (field, filename, content) of each part in order, read by another implementation."""
    parts: list[tuple[str, str | None, bytes]] = []

    def on_field(field):
        parts.append((field.field_name.decode(), None, field.value))

    def on_file(file):
        file.file_object.seek(0)
        name = file.file_name.decode()
        parts.append((file.field_name.decode(), name, file.file_object.read()))
        file.close()

    wanted = {
        "Content-Type": headers["content-type"].encode(),
        "Content-Length": headers["content-length"].encode(),
    }
    parse_form(wanted, io.BytesIO(body), on_field, on_file)
    return parts


class Recording(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Reads each upload block by block, as the network would, and answers from a script."""

    def __init__(self, *outcomes: httpx.Response | Exception) -> None:
        self.outcomes = list(outcomes)
        self.blocks: list[list[bytes]] = []
        self.headers: list[httpx.Headers] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        self.blocks.append([block for block in request.stream])  # noqa: C416 - a stream, read
        return self._answer()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        self.blocks.append([block async for block in request.stream])
        return self._answer()

    def _answer(self) -> httpx.Response:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def created() -> httpx.Response:
    return httpx.Response(201, json=RECORD)


async def test_a_folder_is_sent_name_first_and_file_by_file(folder, on_client):
    transport = Recording(created())
    record = await on_client(transport, lambda c: c.adapters.push(folder, name="team/é sql"))
    assert (record.name, record.state) == ("sql", "registered")
    [blocks] = transport.blocks
    assert parse(transport.headers[0], b"".join(blocks)) == [
        ("name", None, "team/é sql".encode()),
        ("files", "adapter_config.json", b'{"r": 8}'),
        ("files", "adapter_model.safetensors", WEIGHTS),
    ]
    assert "transfer-encoding" not in transport.headers[0]
    assert int(transport.headers[0]["content-length"]) == sum(map(len, blocks))
    assert max(map(len, blocks)) <= BLOCK_BYTES < len(WEIGHTS)


async def test_the_base_check_can_be_turned_off(folder, on_client):
    transport = Recording(created())
    await on_client(transport, lambda c: c.adapters.push(folder, check_base=False))
    fields = parse(transport.headers[0], b"".join(transport.blocks[0]))[:2]
    assert fields == [("name", None, b"sql-writer"), ("check_base", None, b"false")]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz"])
async def test_an_archive_is_sent_as_it_is(suffix, tmp_path, on_client):
    path = tmp_path / f'a "b"{suffix}'
    path.write_bytes(b"archive")
    transport = Recording(created())
    await on_client(transport, lambda c: c.adapters.push(path))
    assert parse(transport.headers[0], b"".join(transport.blocks[0])) == [
        ("name", None, b'a "b"'),
        ("archive", f"a %22b%22{suffix}", b"archive"),
    ]


async def test_progress_counts_what_was_sent_and_starts_again_on_a_retry(folder, on_client):
    busy = httpx.Response(503, headers={"Retry-After": "0"})
    transport = Recording(busy, created())
    seen: list[tuple[int, int]] = []
    await on_client(
        transport, lambda c: c.adapters.push(folder, on_progress=lambda *sent: seen.append(sent))
    )
    total = int(transport.headers[0]["content-length"])
    assert [sent for sent, _ in seen].count(0) == 2
    assert seen[-1] == (total, total)
    assert {of for _, of in seen} == {total}
    second = seen[seen.index((0, total), 1) :]
    assert second == sorted(second)
    assert len(second) > 5
    assert transport.blocks[0] == transport.blocks[1]


async def test_an_upload_that_broke_half_way_is_not_sent_again(folder, on_client, sleeps):
    with pytest.raises(APIConnectionError):
        await on_client(Recording(httpx.WriteError("reset")), lambda c: c.adapters.push(folder))
    assert sleeps == []


@pytest.mark.parametrize(("status", "error"), [(409, ConflictError), (422, None)])
async def test_a_refused_upload_is_not_sent_again(status, error, folder, on_client, sleeps):
    body = {"error": {"message": "no", "reasons": ["r1", "r2"]}}
    transport = Recording(httpx.Response(status, json=body))
    with pytest.raises(error or UnprocessableEntityError) as caught:
        await on_client(transport, lambda c: c.adapters.push(folder))
    assert (caught.value.reasons, sleeps) == (("r1", "r2"), [])


def test_a_large_file_is_never_in_memory(folder):
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(64 << 20)

    class Discarding(httpx.BaseTransport):
        def handle_request(self, request):
            assert sum(len(block) for block in request.stream) > 64 << 20
            return created()

    with httpx.Client(transport=Discarding()) as http:
        tracemalloc.start()
        try:
            Client(http_client=http).adapters.push(folder)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes < 4 << 20


async def test_a_file_that_shrinks_while_it_is_sent_is_reported(folder, on_client):
    def shrink(sent_bytes, total_bytes):
        (folder / "adapter_model.safetensors").write_bytes(b"")

    with pytest.raises(AdapterFilesError, match="got shorter"):
        await on_client(Recording(created()), lambda c: c.adapters.push(folder, on_progress=shrink))


def test_a_file_that_grows_is_sent_as_long_as_promised(folder):
    body = MultipartBody({"name": "n"}, find_parts(folder))
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"more")
    assert sum(map(len, body.stream())) == body.content_length


async def test_a_file_that_vanishes_is_reported(folder, on_client):
    def remove(sent_bytes, total_bytes):
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)

    with pytest.raises(AdapterFilesError, match="No such file"):
        await on_client(Recording(created()), lambda c: c.adapters.push(folder, on_progress=remove))


def test_what_is_missing_is_named(folder):
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterFilesError, match=r"has no adapter_config\.json;"):
        find_parts(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFilesError, match=r"and no adapter_model\.safetensors"):
        find_parts(folder)


def test_pickled_weights_are_refused_with_the_way_out(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFilesError, match=r"pickle.*safe_serialization=True"):
        find_parts(folder)


def test_a_folder_above_the_adapter_points_to_it(folder):
    with pytest.raises(AdapterFilesError, match=r"did you mean .*sql-writer\?"):
        find_parts(folder.parent)


def test_other_paths_are_refused(folder):
    with pytest.raises(AdapterFilesError, match="no such file"):
        find_parts(folder / "nothing")
    with pytest.raises(AdapterFilesError, match="push the folder"):
        find_parts(folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFilesError, match=r"neither a folder nor one of \.zip"):
        find_parts(folder / "README.md")
    (folder / "adapter_config.json").write_text("")
    with pytest.raises(AdapterFilesError, match="empty"):
        find_parts(folder)


def test_the_default_name_is_the_folders(folder, monkeypatch, tmp_path):
    assert default_name(folder) == "sql-writer"
    monkeypatch.chdir(folder)
    assert default_name(Path()) == "sql-writer"
    dotted = tmp_path / "v1.tar"
    dotted.mkdir()
    assert default_name(dotted) == "v1.tar"
