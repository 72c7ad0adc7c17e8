"""First look at a file that claims to be safetensors, before any library parses it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loraplex_server.adapters.errors import InvalidUpload

WEIGHTS_NAME: Final = "adapter_model.safetensors"

#: What `torch.save` writes: a zip since PyTorch 1.6, a bare pickle before.
_PICKLE_STARTS: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

CONVERT_PICKLE: Final = (
    "pickle files can run code and are never read; convert on the training machine: "
    "model.save_pretrained(path, safe_serialization=True)"
)


def check_safetensors_start(path: Path, *, max_header_bytes: int) -> None:
    """Refuse what is plainly not a whole safetensors file, and say what it is.

    Raises:
        InvalidUpload
        OSError: the disk failed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(10)
    except FileNotFoundError as error:
        raise InvalidUpload(f"{WEIGHTS_NAME} is missing") from error
    # The header's JSON comes right behind its length, which itself may look like anything.
    if len(start) < 10 or start[8:9] != b"{":
        if start.startswith(_PICKLE_STARTS):
            raise InvalidUpload(f"{WEIGHTS_NAME} is a pickle file of torch.save; {CONVERT_PICKLE}")
        raise InvalidUpload(f"{WEIGHTS_NAME} is not a safetensors file, or is cut off")
    header_bytes = int.from_bytes(start[:8], "little")
    if header_bytes > max_header_bytes:
        raise InvalidUpload(
            f"{WEIGHTS_NAME} claims a header of {header_bytes} bytes; at most "
            f"{max_header_bytes} are read"
        )
    if 8 + header_bytes > size:
        raise InvalidUpload(f"{WEIGHTS_NAME} is truncated: it ends inside its header")
