"""Uploads: what arrives stays in quarantine, within its limits, and is gone afterwards."""

from __future__ import annotations

import bz2
import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraplex_server.adapters.errors import InvalidUpload, StorageFailed, UploadTooLarge
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.registration import Registration
from loraplex_server.adapters.upload import UploadStaging
from tests.support.adapters import make_catalog, make_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b'{"r": 8}', WEIGHTS: b"weights" * 1000}

Files = dict[str, bytes]


@pytest.fixture
def quarantine(tmp_path: Path) -> Iterator[Path]:
    """The only folder that may change, and which must be empty in the end."""
    folder = tmp_path / "staging"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == [folder]


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def tarred(files: Files, *, member: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if member:
                member(info)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


def tar_gzipped(files: Files) -> bytes:
    return gzip.compress(tarred(files))


PACKERS = [zipped, tarred, tar_gzipped]


def unpack(
    quarantine: Path, content: bytes, *, name: str = "adapter.zip", **limits: int
) -> dict[str, bytes]:
    """Upload an archive in chunks and return the files that `finish` gives."""
    with UploadStaging(quarantine, AdapterLimits(**limits)) as upload:
        upload.write_part(name, (content[at : at + 999] for at in range(0, len(content), 999)))
        folder = upload.finish()
        assert folder.resolve().is_relative_to(quarantine.resolve())
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_files_are_received_as_sent(quarantine):
    with UploadStaging(quarantine) as upload:
        upload.write_part(CONFIG, [b'{"r"', b": 8}"])
        with upload.open_part(WEIGHTS) as writer:
            writer.write(FILES[WEIGHTS])
        folder = upload.finish()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    upload.close()


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/", "./my adapter/"])
def test_archives_are_told_by_content_and_may_hold_one_folder(quarantine, pack, prefix):
    files = {f"{prefix}{name}": content for name, content in FILES.items()}
    files |= {
        f"{prefix}README.md": b"# hello",
        f"{prefix}training_args.bin": b"pickle",
        f"{prefix}checkpoint-5/optimizer.pt": b"pickle",
        f"{prefix}checkpoint-5/deep/{CONFIG}": b"another",
    }
    assert unpack(quarantine, pack(files), name="whatever.tgz") == FILES


def test_a_real_folder_goes_through_an_archive_into_the_catalogue(tmp_path):
    source = make_folder(tmp_path / "adapter")
    files = {f"sql/{path.name}": path.read_bytes() for path in source.iterdir()}
    catalog = make_catalog(tmp_path / "data")
    plain, _ = catalog.register(Registration("plain"), source)
    for pack in PACKERS:
        with catalog.new_upload() as upload:
            upload.write_part("sql.tar.gz", [pack(files)])
            record, _ = catalog.register(Registration(pack.__name__), upload.finish())
        assert record.id == plain.id
    assert list((tmp_path / "data" / "staging").iterdir()) == []
    catalog.close()


@pytest.mark.parametrize(
    ("filename", "reason"),
    [
        ("adapter_model.bin", "pickle"),
        ("pytorch_model.PT", "pickle"),
        ("../adapter_config.json", "not part of an upload"),
        ("folder/adapter_config.json", "not part of an upload"),
        ("README.md", "not part of an upload"),
        ("", "not part of an upload"),
        ("adapter.rar", "not part of an upload"),
    ],
)
def test_other_files_are_refused_before_a_byte_is_written(quarantine, filename, reason):
    with UploadStaging(quarantine) as upload:
        with pytest.raises(InvalidUpload, match=reason):
            upload.open_part(filename)
        assert [path for path in quarantine.rglob("*") if path.is_file()] == []


def test_a_file_sent_twice_or_beside_an_archive_is_refused(quarantine):
    with UploadStaging(quarantine) as upload:
        upload.write_part(CONFIG, [b"{}"])
        with pytest.raises(InvalidUpload, match="twice"):
            upload.write_part(CONFIG, [b"{}"])
        with pytest.raises(InvalidUpload, match="either"):
            upload.write_part("a.zip", [])
    with UploadStaging(quarantine) as upload:
        upload.write_part("a.zip", [])
        with pytest.raises(InvalidUpload, match="either"):
            upload.write_part(CONFIG, [b"{}"])
        with pytest.raises(InvalidUpload, match="twice"):
            upload.write_part("b.tar", [b"{}"])


@pytest.mark.parametrize("missing", [{CONFIG}, {WEIGHTS}, {CONFIG, WEIGHTS}])
def test_missing_files_are_named(quarantine, missing):
    present = {name: content for name, content in FILES.items() if name not in missing}
    with UploadStaging(quarantine) as upload:
        for name, content in present.items():
            upload.write_part(name, [content])
        with pytest.raises(InvalidUpload) as refusal:
            upload.finish()
        assert all(name in refusal.value.reason for name in missing)
    for pack in PACKERS:
        with pytest.raises(InvalidUpload, match="holds no"):
            unpack(quarantine, pack(present or {"README.md": b""}))


def test_the_byte_limit_holds_over_all_files_together(quarantine):
    with UploadStaging(quarantine, AdapterLimits(max_upload_bytes=100)) as upload:
        upload.write_part(CONFIG, [b"x" * 60])
        with pytest.raises(UploadTooLarge) as error:
            upload.write_part(WEIGHTS, [b"x" * 40, b"x"])
        assert error.value.limit_bytes == 100
        assert sum(path.stat().st_size for path in quarantine.rglob("*") if path.is_file()) <= 100
    with (
        UploadStaging(quarantine, AdapterLimits(max_config_bytes=10)) as upload,
        pytest.raises(UploadTooLarge),
    ):
        upload.write_part(CONFIG, [b"x" * 11])


def test_a_sender_that_fails_midway_leaves_nothing(quarantine):
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError), UploadStaging(quarantine) as upload:
        upload.write_part(WEIGHTS, chunks())


def test_a_full_disk_while_receiving_is_told(quarantine, monkeypatch):
    with UploadStaging(quarantine) as upload:
        writer = upload.open_part(WEIGHTS)
        writer.close()
        with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123  # a device, not a path
            monkeypatch.setattr(writer, "_file", full)
            with pytest.raises(StorageFailed, match="disk is full"):
                writer.write(b"x")


UNSAFE_NAMES = ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a\\..\\evil", "..", "b/.."]


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_names_that_lead_outside_refuse_the_whole_archive(quarantine, pack, name):
    with pytest.raises(InvalidUpload, match="outside its folder"):
        unpack(quarantine, pack({**FILES, name: b"evil"}))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("victim", [WEIGHTS, "innocent"])
def test_links_and_devices_in_a_tar_are_refused(quarantine, kind, victim):
    def make_special(info: tarfile.TarInfo) -> None:
        if info.name == victim:
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    with pytest.raises(InvalidUpload, match="link or a device"):
        unpack(quarantine, tarred({**FILES, "innocent": b""}, member=make_special))


def test_links_in_a_zip_are_refused(quarantine):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(CONFIG, b"{}")
        info = zipfile.ZipInfo(WEIGHTS)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InvalidUpload, match="link or a device"):
        unpack(quarantine, target.getvalue())


def test_several_adapters_in_one_archive_are_refused(quarantine):
    for other in (f"b/{CONFIG}", CONFIG):
        files = {f"a/{CONFIG}": b"{}", f"a/{WEIGHTS}": b"", other: b"{}"}
        for pack in PACKERS:
            with pytest.raises(InvalidUpload, match="more than one adapter"):
                unpack(quarantine, pack(files))


def test_an_entry_given_twice_is_refused(quarantine):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(CONFIG, b"{}")
        archive.writestr(f"./{CONFIG}", b"[]")
    with pytest.raises(InvalidUpload, match="twice"):
        unpack(quarantine, target.getvalue())


def test_pickled_weights_in_an_archive_are_refused_with_the_way_out(quarantine):
    for pack in PACKERS:
        with pytest.raises(InvalidUpload, match="safe_serialization"):
            unpack(quarantine, pack({CONFIG: b"{}", "adapter_model.bin": b"pickle"}))
        assert unpack(quarantine, pack({**FILES, "adapter_model.bin": b"ignored"})) == FILES


def test_a_zip_bomb_stops_at_the_limit(quarantine):
    bomb = zipped({CONFIG: b"{}", WEIGHTS: bytes(5_000_000)})
    assert len(bomb) < 10_000
    with pytest.raises(UploadTooLarge):
        unpack(quarantine, bomb, max_upload_bytes=100_000)


def test_a_zip_that_lies_about_its_sizes_stops_too(quarantine):
    bomb = zipped({CONFIG: b"{}", WEIGHTS: bytes(5_000_000)})
    honest, lie = (5_000_000).to_bytes(4, "little"), (50).to_bytes(4, "little")
    assert bomb.count(honest) >= 1
    with pytest.raises((InvalidUpload, UploadTooLarge)):
        unpack(quarantine, bomb.replace(honest, lie), max_upload_bytes=100_000)


@pytest.mark.parametrize("name", [WEIGHTS, "skipped.dat"])
def test_a_gzip_bomb_stops_at_the_limit_also_in_what_is_skipped(quarantine, name):
    bomb = tar_gzipped({CONFIG: b"{}", name: bytes(5_000_000), "z": b""})
    with pytest.raises(UploadTooLarge):
        unpack(quarantine, bomb, max_upload_bytes=100_000)


@pytest.mark.parametrize("pack", PACKERS)
def test_too_many_entries_are_refused(quarantine, pack):
    files = FILES | {f"note-{index}": b"" for index in range(50)}
    with pytest.raises(InvalidUpload, match="more than 50 entries"):
        unpack(quarantine, pack(files), max_archive_entries=50)


def test_a_huge_zip_directory_is_not_read_into_memory(quarantine):
    many = zipped({f"{index:0200}": b"" for index in range(6000)})
    with pytest.raises(InvalidUpload, match="unreasonable size"):
        unpack(quarantine, many)


def test_a_huge_tar_header_is_not_read_into_memory(quarantine):
    def add_comment(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"comment": "x" * 2_000_000}

    with pytest.raises(InvalidUpload, match="unreasonable size"):
        unpack(quarantine, gzip.compress(tarred(FILES, member=add_comment)))


def test_a_tar_of_nested_headers_does_not_exhaust_the_stack(quarantine):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5
    block = header.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")
    with pytest.raises(InvalidUpload):
        unpack(quarantine, block * 3000)


def test_a_tar_that_leads_back_does_not_go_round(quarantine):
    content = bytearray(tarred({"junk": b"", **FILES}))
    size = b"\xff" * 10 + (2**16 - 1024).to_bytes(2, "big")  # -1024 in base 256
    content[124:136] = size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    with pytest.raises(InvalidUpload):
        unpack(quarantine, bytes(content))


def test_an_encrypted_zip_is_refused(quarantine):
    content = bytearray(zipped({CONFIG: b"{}", WEIGHTS: b"x"}, zipfile.ZIP_STORED))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content[at + offset] |= 1
    with pytest.raises(InvalidUpload, match="encrypted"):
        unpack(quarantine, bytes(content))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(quarantine, method):
    with pytest.raises(InvalidUpload, match="deflate"):
        unpack(quarantine, zipped(FILES, method))
    with pytest.raises(InvalidUpload, match="neither zip nor tar"):
        unpack(quarantine, bz2.compress(tarred(FILES)))


@pytest.mark.parametrize("pack", PACKERS)
def test_truncated_archives_are_refused(quarantine, pack):
    whole = pack({"first": bytes(range(256)) * 10, **FILES})
    for cut in (0, 1, 100, len(whole) // 3, len(whole) // 2):
        with pytest.raises(InvalidUpload):
            unpack(quarantine, whole[:cut])


@pytest.mark.parametrize("content", [b"", b"{}", b"PK", b"Rar!\x1a\x07", bytes(1024)])
def test_what_is_no_archive_is_refused(quarantine, content):
    with pytest.raises(InvalidUpload):
        unpack(quarantine, content)
