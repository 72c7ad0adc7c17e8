"""Archives around an adapter's files, as attackers and broken tools pack them."""

from __future__ import annotations

import functools
import gzip
import io
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tests.support.fuzz_config import TEXTS

_BOMB_BYTES = 24 << 20
_TYPES = (
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
    *(tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, b"\0", b"Z"),
)
_SIZES = (0, 1, 511, 513, 2**31, 2**33 - 1, 2**63, -1, -512, -1024)
_FILE_TYPES = (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFDIR)


@dataclass
class Member:
    """One entry to be packed."""

    name: str
    data: bytes
    tar_type: bytes = tarfile.REGTYPE
    mode: int = stat.S_IFREG | 0o644
    link: str = ""


def pack(rng: Random, files: dict[str, bytes], outside: str) -> bytes:
    """Return an archive of `files`, mostly with something wrong about it.

    Args:
        outside: path of a folder that names and links try to reach.
    """
    prefix = rng.choice(("", "", "./", "a/", "./my adapter/", "a/b/"))
    members = [Member(prefix + name, data) for name, data in files.items()]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        _damage_members(rng, members, outside)
    content = rng.choice((_zip, _tar, _tar, _targz))(rng, members)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        content = _damage_bytes(rng, content)
    if rng.random() < 0.02:
        return pack(rng, {"inner.zip": content, **files}, outside)
    return content


def _damage_members(rng: Random, members: list[Member], outside: str) -> None:
    victim = rng.choice(members)
    choice = rng.randrange(7)
    if choice == 0:
        members.insert(rng.randrange(2), Member(_bad_name(rng, outside), b"evil"))
    elif choice == 1:
        victim.name = rng.choice((_bad_name(rng, outside), _bad_name(rng, outside) + victim.name))
    elif choice == 2:
        victim.tar_type, victim.mode = rng.choice(_TYPES), rng.choice(_FILE_TYPES) | 0o777
        victim.link = rng.choice((outside, "/etc/passwd", "adapter_config.json", "..", ""))
    elif choice == 3:
        name = rng.choice((victim.name, "b/" + victim.name, victim.name.upper(), victim.name + "/"))
        members.append(Member(name, rng.choice((victim.data, b"", b"{}"))))
    elif choice == 4:
        members.remove(victim) if len(members) > 1 else None
    elif choice == 5:
        count = rng.choice((5, 5, 5, 999, 1001))
        members[:0] = [Member(f"note-{i}", b"") for i in range(count)]
    elif rng.random() < 0.1:
        victim.data = bytes(_BOMB_BYTES)
    else:
        members.append(Member("adapter_model.bin", b"\x80\x02}q\0."))


def _bad_name(rng: Random, outside: str) -> str:
    names = (
        *(
            "../evil",
            "../../evil",
            "a/../../evil",
            "/evil",
            "C:/evil",
            "C:evil",
            "..\\evil",
            "..",
            ".",
        ),
        *("", "/", "//", "a//b", "./../evil", "...", "a\0b", "adapter_config.json\0.txt", "~/evil"),
        *("x" * 300, "d/" * 200 + "x", "con", "nul.txt", "a\nb", "\\\\host\\share"),
        *(f"{outside}/evil", f"../../../../../../../../{outside}/evil"),
    )
    return rng.choice((*names, rng.choice(TEXTS)))


def _zip(rng: Random, members: Sequence[Member]) -> bytes:
    target = io.BytesIO()
    methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2)
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w") as archive:
        warnings.simplefilter("ignore")  # names given twice are the point
        for member in members:
            info = zipfile.ZipInfo("x")
            info.filename = member.name
            info.external_attr = member.mode << 16
            info.compress_type = rng.choice(methods[:3] if rng.random() < 0.95 else methods)
            if member.name.endswith("/"):
                info.compress_type = zipfile.ZIP_STORED
            if len(member.data) == _BOMB_BYTES:
                info.compress_type = zipfile.ZIP_DEFLATED
            try:
                archive.writestr(info, member.data, compresslevel=1)
            except (UnicodeEncodeError, IndexError):  # half a surrogate pair; no name at all
                continue
    content = target.getvalue()
    return _lie_in_zip(rng, content) if rng.random() < 0.2 else content


def _lie_in_zip(rng: Random, content: bytes) -> bytes:
    """Change one number of a header of one entry, of the directory, or of its end."""
    signature, num_bytes = rng.choice(
        ((b"PK\x03\x04", 30), (b"PK\x01\x02", 46), (b"PK\x01\x02", 46), (b"PK\x05\x06", 22))
    )
    places = []
    at = -1
    while (at := content.find(signature, at + 1)) >= 0 and len(places) < 20:
        places.append(at)
    if not places:
        return content
    broken = bytearray(content)
    width = rng.choice((2, 4))
    at = rng.choice(places) + rng.randrange(4, num_bytes - width)
    value = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)))
    broken[at : at + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(broken)


def _tar(rng: Random, members: Sequence[Member]) -> bytes:
    target = io.BytesIO()
    chosen = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    for member in members:
        info = tarfile.TarInfo(member.name)
        info.size, info.type, info.linkname = len(member.data), member.tar_type, member.link
        if rng.random() < 0.05:
            info.pax_headers = _pax_headers(rng)
        try:
            header = info.tobuf(chosen, "utf-8", "surrogateescape")
        except ValueError:
            header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        if rng.random() < 0.05:
            header = _lie_in_tar(rng, header)
        target.write(header)
        target.write(member.data.ljust(-(-len(member.data) // 512) * 512, b"\0"))
    target.write(bytes(rng.choice((0, 512, 1024, 10_240))))
    return target.getvalue()


def _pax_headers(rng: Random) -> dict[str, str]:
    key = rng.choice(
        ("path", "linkpath", "size", "mtime", "GNU.sparse.map", "GNU.sparse.major", "hdrcharset")
    )
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 18}
    value = rng.choice(
        ("../evil", "-1", "9" * 30, "nan", "0,1,2", "", "1" * 5000, "x\0y", "BINARY")
    )
    return rng.choice(({key: value}, {**sparse, key: value}, {"comment": "x" * 2000}))


def _lie_in_tar(rng: Random, header: bytes) -> bytes:
    """Change the last header block, with a checksum that is right again."""
    block = bytearray(header[-512:])
    size = rng.choice(_SIZES)
    if rng.random() < 0.5:
        block[124:136] = (
            b"\x80" + size.to_bytes(11, "big")
            if size >= 0
            else (b"\xff" + (256**11 + size).to_bytes(11, "big"))
        )
    else:
        at = rng.randrange(512)
        block[at : at + rng.choice((1, 8))] = rng.randbytes(1)
        block = block.ljust(512, b"\0")[:512]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) % 8**6)
    return header[:-512] + bytes(block)


def _targz(rng: Random, members: Sequence[Member]) -> bytes:
    if rng.random() < 0.01:
        return _gzip_bomb()
    return gzip.compress(_tar(rng, members), compresslevel=1, mtime=0)


@functools.cache
def _gzip_bomb() -> bytes:
    """Return zeros behind a plausible header, packed to a thousandth."""
    info = tarfile.TarInfo("skipped.dat")
    info.size = _BOMB_BYTES
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(info.tobuf() + bytes(_BOMB_BYTES)) + packer.flush()


def _damage_bytes(rng: Random, content: bytes) -> bytes:
    choice = rng.randrange(6)
    if choice == 0:
        return content[: rng.randrange(len(content) + 1)]
    if choice == 1:
        return content + rng.choice((b"\0", content, b"PK\x05\x06" + bytes(18), rng.randbytes(64)))
    if choice == 2:
        return (
            rng.choice((b"PK\x03\x04", b"\x1f\x8b", b"\x1f\x8b\x08\0", b"Rar!", b"")) + content[4:]
        )
    if choice == 3:
        size = struct.pack("<I", rng.choice((0, 50, 2**31, 2**32 - 1)))
        at = rng.randrange(max(1, len(content) - 4))
        return content[:at] + size + content[at + 4 :]
    broken = bytearray(content or b"\0")
    reach = len(broken) if choice == 4 else min(len(broken), 600)
    for _ in range(rng.randrange(1, 9)):
        broken[rng.randrange(reach)] = rng.randrange(256)
    return bytes(broken)
