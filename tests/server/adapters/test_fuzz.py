"""Random damage to everything a user can send: only AdapterError may come out of it."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_server.adapters.errors import AdapterError
from loraplex_server.adapters.formats.lora_fields import APPLIED, UNSUPPORTED, WITHOUT_EFFECT
from loraplex_server.adapters.names import check_adapter_name
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.upload import UploadStaging
from tests.server.adapters.test_upload import tar_gzipped, tarred, zipped
from tests.support.adapters import make_config, make_folder, read_folder

few_hundred = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["q_proj", ".*", "(", "LORA", "pissa", 10**400, -1, 0, 4]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
fields = st.sampled_from(sorted(APPLIED | WITHOUT_EFFECT.keys() | UNSUPPORTED.keys()))


@functools.cache
def whole_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in make_folder(Path(folder)).iterdir()}


@contextlib.contextmanager
def folder_of_its_own() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in whole_files().items():
            Path(folder, name).write_bytes(content)
        yield Path(folder)


@few_hundred
@given(st.dictionaries(fields | st.text(max_size=6), json_values, max_size=4))
def test_any_configuration_is_read_or_refused(changes: dict[str, Any]):
    with folder_of_its_own() as folder, contextlib.suppress(AdapterError):
        (folder / "adapter_config.json").write_text(json.dumps(make_config() | changes))
        read_folder(folder)


@few_hundred
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_configuration_are_refused(content: bytes):
    with folder_of_its_own() as folder, contextlib.suppress(AdapterError):
        (folder / "adapter_config.json").write_bytes(content)
        read_folder(folder)


damages = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 255) | st.binary(max_size=12)), min_size=1, max_size=6
)


def damage(content: bytes, changes: list[tuple[float, int | bytes]], reach: int) -> bytes:
    """Overwrite bytes within the first `reach`, or splice some in and out."""
    broken = bytearray(content)
    for place, change in changes:
        at = int(place * (min(reach, len(broken)) - 1))
        if isinstance(change, int):
            broken[at] = change
        else:
            broken[at : at + len(change) // 2] = change
    return bytes(broken)


@few_hundred
@given(damages)
def test_any_damage_to_a_weights_file_is_read_or_refused(changes: list[tuple[float, int | bytes]]):
    with folder_of_its_own() as folder, contextlib.suppress(AdapterError):
        path = folder / "adapter_model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(damage(whole, changes, reach=900))
        read_folder(folder)


tensor_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "BOOL", "F8_E4M3", "C64", 3]),
        "shape": st.lists(st.integers(-1, 1 << 64) | st.integers(0, 9), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 1 << 65) | st.integers(0, 64), max_size=3),
    }
)
key = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
tensor_names = st.builds(
    key.format, st.integers(0, 3), st.sampled_from("qkvx"), st.sampled_from("AB")
)


@few_hundred
@given(
    st.dictionaries(
        tensor_names | st.just("__metadata__"), tensor_entries | json_values, max_size=4
    ),
    st.integers(0, 128),
)
def test_any_safetensors_header_is_read_or_refused(header: dict[str, Any], num_bytes: int):
    text = json.dumps(header).encode()
    with folder_of_its_own() as folder, contextlib.suppress(AdapterError):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
        read_folder(folder)


FILES = {
    "x/adapter_config.json": b"{}",
    "x/README.md": b"hi",
    "x/adapter_model.safetensors": b"w" * 99,
}
ARCHIVES = [zipped(FILES), zipped(FILES, 0), tarred(FILES), tar_gzipped(FILES)]


@few_hundred
@given(st.sampled_from(ARCHIVES), damages)
def test_any_damage_to_an_archive_is_unpacked_or_refused_inside_the_quarantine(
    archive: bytes, changes: list[tuple[float, int | bytes]]
):
    with tempfile.TemporaryDirectory() as root:
        staging = Path(root, "staging")
        staging.mkdir()
        limits = AdapterLimits(max_upload_bytes=1 << 20)
        with contextlib.suppress(AdapterError), UploadStaging(staging, limits) as upload:
            upload.write_part("a.zip", [damage(archive, changes, reach=len(archive))])
            folder = upload.finish()
            assert len(list(folder.iterdir())) == 2
        assert list(Path(root).rglob("*")) == [staging]


@few_hundred
@given(st.text(max_size=140))
def test_any_name_is_accepted_or_refused(name: str):
    with contextlib.suppress(AdapterError):
        check_adapter_name(name, reserved=("base",))
        assert name.isascii()
        assert not set(name) & set("\\,@ \n\0")
        assert ".." not in name
