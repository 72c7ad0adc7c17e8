"""Damage to `adapter_model.safetensors`: to tensors, to the header's entries, to its bytes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from tests.support.fuzz_config import REGEXES, TEXTS
from tests.support.fuzz_corpus import HeaderEntry, SeedAdapter

Tensors = dict[str, HeaderEntry]

DTYPES: Sequence[str] = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4", "C64", "F128", "", "f32"),
)
SIZES: Sequence[int] = (0, 1, 2, 3, 5, 8, 63, 64, 65, 101, 128, 129, 257, 4096)
_MAX_BYTES = 1 << 20
HUGE: Sequence[int] = (-1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
_FLOATS = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 1e30, 0.0, -0.0, 1e15, 1.0]


@dataclass
class Header:
    """A file to be: entries in order, which may repeat a name, and the bytes behind them."""

    entries: list[tuple[str, Any]] = field(default_factory=list)
    data: bytes = b""

    def to_bytes(self) -> bytes:
        pairs = (f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in self.entries)
        text = ("{" + ",".join(pairs) + "}").encode()
        return len(text).to_bytes(8, "little") + text + self.data


def make_header(tensors: Tensors) -> Header:
    """Return the file of tensors, one behind the other."""
    entries, pieces, at = [], [], 0
    for name, tensor in tensors.items():
        end = at + len(tensor.data)
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        entries.append((name, entry))
        pieces.append(tensor.data)
        at = end
    return Header(entries, b"".join(pieces))


def damage_tensors(rng: Random, tensors: Tensors, other: SeedAdapter) -> Tensors:
    """Return the tensors after a few changes that leave a whole file."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if tensors:
            tensors = rng.choice(_TENSOR_CHANGES)(rng, dict(tensors), rng.choice(list(tensors)))
        if rng.random() < 0.1:
            tensors = {**tensors, **_some_of(rng, other.tensors)}
    return tensors


def _some_of(rng: Random, tensors: Any) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if rng.random() < 0.3}


def _drop(rng: Random, tensors: Tensors, name: str) -> Tensors:
    del tensors[name]
    return tensors


def _drop_alike(rng: Random, tensors: Tensors, name: str) -> Tensors:
    """All tensors of one suffix, or of one linear."""
    part = rng.choice(name.split("."))
    return {key: tensor for key, tensor in tensors.items() if part not in key.split(".")}


def _rename(rng: Random, tensors: Tensors, name: str) -> Tensors:
    parts = name.split(".")
    at = rng.randrange(len(parts))
    words = ("q_proj", "qkv_proj", "up_proj", "embed_tokens", "lm_head", "weight", "bias", "norm")
    numbers = ("0", "1", "2", "01", "-1", "999999", "1000000", "\u0661")
    parts[at] = rng.choice((*words, *numbers, "base_layer", "default", "", rng.choice(TEXTS)))
    long = rng.choice((name + "x" * 300, "y" * 5000, rng.choice(REGEXES), name[:-1], name.upper()))
    tensors[rng.choice((".".join(parts), ".".join(parts), long))] = tensors.pop(name)
    return tensors


def _copy(rng: Random, tensors: Tensors, name: str) -> Tensors:
    for old, new in (("q_proj", "v_proj"), ("layers.0", "layers.1"), ("_A", "_B")):
        if rng.random() < 0.5:
            tensors[name.replace(old, new)] = tensors[name]
    return tensors


def _reshape(rng: Random, tensors: Tensors, name: str) -> Tensors:
    """Another shape, and as many bytes as it needs."""
    tensor = tensors[name]
    shape = list(tensor.shape)
    if shape and rng.random() < 0.7:
        shape[rng.randrange(len(shape))] = rng.choice(SIZES)
    elif rng.random() < 0.5:
        shape = rng.choice((shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)], shape[:1]))
    else:
        shape = [0, *rng.sample(HUGE[1:7], k=rng.choice((1, 1, 2)))]
        rng.shuffle(shape)
    width = len(tensor.data) // math.prod(tensor.shape) if 0 not in tensor.shape else 4
    num_bytes = min(math.prod(shape) * width, _MAX_BYTES)
    data = (tensor.data * (num_bytes // max(1, len(tensor.data)) + 1))[:num_bytes]
    tensors[name] = replace(tensor, shape=tuple(shape), data=data.ljust(num_bytes, b"\0"))
    return tensors


def _retype(rng: Random, tensors: Tensors, name: str) -> Tensors:
    """Another dtype of the same width, or of another with as many bytes as it needs."""
    tensor = tensors[name]
    dtype = rng.choice(DTYPES)
    digits = "".join(char for char in dtype.partition("_")[0] if char.isdigit())
    num_bits = math.prod(tensor.shape) * int(digits or 8)
    data = (tensor.data * 3)[: num_bits // 8].ljust(num_bits // 8, b"\0")
    tensors[name] = replace(tensor, dtype=dtype, data=data)
    return tensors


def _fill(rng: Random, tensors: Tensors, name: str) -> Tensors:
    """Numbers at the edges, in one element, one tensor or all."""
    names = rng.choice(([name], [name], list(tensors)))
    value = rng.choice(_FLOATS)
    where = rng.choice(("one", "all"))
    for key in names:
        tensor = tensors[key]
        if tensor.dtype == "F32" and len(tensor.data) >= 4:
            number = struct.pack("<f", value)
            at = 4 * rng.randrange(len(tensor.data) // 4)
            one = tensor.data[:at] + number + tensor.data[at + 4 :]
            whole = number * (len(tensor.data) // 4)
            tensors[key] = replace(tensor, data=one if where == "one" else whole)
        elif tensor.data:
            byte = rng.choice((b"\xff", b"\x7f", b"\0"))
            tensors[key] = replace(tensor, data=byte * len(tensor.data))
    return tensors


def _flood(rng: Random, tensors: Tensors, name: str) -> Tensors:
    """Very many small tensors."""
    if rng.random() < 0.95:
        return _rename(rng, tensors, name)
    empty = HeaderEntry("F32", (0,), b"")
    stem = rng.choice(("base_model.model.x{}.weight", "base_model.model.lm_head{}.lora_A.weight"))
    count = rng.choice((2000, 19_000, 20_001))
    return {**tensors, **{stem.format(i): empty for i in range(count)}}


_TENSOR_CHANGES: Sequence[Callable[[Random, Tensors, str], Tensors]] = (
    *(_drop, _drop_alike, _rename, _copy, _reshape, _reshape, _retype, _fill, _fill, _flood),
)


def damage_header(rng: Random, header: Header) -> None:
    """Change one entry of a header, so that it lies."""
    if not header.entries:
        return
    at = rng.randrange(len(header.entries))
    name, entry = header.entries[at]
    begin, end = entry["data_offsets"]
    numbers: Sequence[Any] = (*HUGE, 0, 1, 4, begin, end, 1.5, "4", None, True)
    choice = rng.randrange(9)
    if choice == 0:
        header.entries.insert(rng.randrange(at + 1), (name, entry))
    elif choice == 1:
        entry["shape"] = rng.choice(([rng.choice(numbers) for _ in entry["shape"]], {}, None, "4"))
    elif choice == 2:
        entry["data_offsets"] = [rng.choice(numbers), rng.choice((end, *numbers))]
    elif choice == 3:
        shift = rng.choice((-4, -1, 1, 4, 64))
        entry["data_offsets"] = [begin + shift, end + shift]
    elif choice == 4:
        entry["data_offsets"] = rng.choice(([end, begin], [begin], [], [0, len(header.data)]))
    elif choice == 5:
        entry["dtype"] = rng.choice((*DTYPES, 3, None, []))
    elif choice == 6:
        del entry[rng.choice(list(entry))]
    elif choice == 7:
        entry[rng.choice(TEXTS)] = rng.choice(numbers)
    else:
        value = rng.choice(({"format": "pt"}, {"format": 3}, [], "pt", {"a": {"b": "c"}}, {}))
        header.entries.insert(0, ("__metadata__", value))


def damage_file(rng: Random, content: bytes) -> bytes:
    """Change the bytes of a file."""
    length = int.from_bytes(content[:8], "little")
    choice = rng.randrange(8)
    if choice == 0:
        return content[: rng.choice((0, 7, 8, 9, 8 + length, rng.randrange(len(content) + 1)))]
    if choice == 1:
        return content + bytes(rng.choice((1, 4, 512)))
    if choice == 2:
        wrong = rng.choice(
            (0, 1, 2, length - 1, length + 1, len(content), 16 << 20, 2**63, 2**64 - 1)
        )
        return wrong.to_bytes(8, "little") + content[8:]
    if choice == 3:
        padding = b" " * rng.choice((1, 8, 1000, 1 << 20))
        return (
            (length + len(padding)).to_bytes(8, "little")
            + content[8 : 8 + length]
            + padding
            + (content[8 + length :])
        )
    if choice == 4:
        text = rng.choice(
            (b"{}", b"{", b"[]", b"{\xff}", b'{"a":' * 900, b'{"a":{}}', b'{"\\ud800":0}')
        )
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    if choice == 5:
        return rng.choice(
            (b"", b"{}", b"PK\x03\x04", b"\x80\x02}", bytes(9), b"\x02" + bytes(7) + b"{}")
        )
    broken = bytearray(content or b"\0")
    reach = min(len(broken), 8 + length if choice == 6 else len(broken))
    for _ in range(rng.randrange(1, 9)):
        broken[rng.randrange(max(1, reach))] = rng.randrange(256)
    return bytes(broken)
