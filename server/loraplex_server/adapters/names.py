"""Names: what an adapter may be called, and when two names mean the same base model."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from typing import Final

from loraplex_server.adapters.errors import InvalidAdapterName

MAX_NAME_LEN: Final = 128

_ALLOWED: Final = re.compile(r"[A-Za-z0-9._/:+-]*")

#: How a base was stored, not which base it is.
_STORAGE_SUFFIX: Final = re.compile(
    r"[-_.](unsloth|bnb|mlx|hf|gguf|awq|gptq|int[48]|[248]bit|fp(8|16|32)|bf16|f(16|32)"
    r"|(iq|q)[2-8](_[0-9a-z]+)*)$"
)


def check_adapter_name(name: str, *, reserved: Iterable[str]) -> None:
    """Check that `name` can go into a URL, a `model` field and a log line unchanged.

    Args:
        reserved: names of the base model, compared without regard to case.

    Raises:
        InvalidAdapterName: the first rule that `name` breaks.
    """
    reason = _name_fault(name)
    if reason is None and name.casefold() in {other.casefold() for other in reserved}:
        reason = "is the base model's name"
    if reason is not None:
        raise InvalidAdapterName(name, reason)


def _name_fault(name: str) -> str | None:
    if not 1 <= len(name) <= MAX_NAME_LEN:
        return f"must have 1 to {MAX_NAME_LEN} characters, not {len(name)}"
    if "@" in name:
        return "'@' is reserved for naming a version by its digest"
    if not _ALLOWED.fullmatch(name):
        return "may hold only ASCII letters, digits and . _ / : + -"
    if not name[0].isalnum():
        return "must begin with a letter or a digit"
    if name.endswith("/versions"):
        return "must not end with '/versions': its path would be the one of another's versions"
    if ".." in name or any(part in ("", ".") for part in name.split("/")):
        return "must not hold '..', '//', '/./' or end with '/'"
    return None


def _local_folder(name: str) -> str | None:
    """Return an absolute path in one spelling; None for what else a model can be named by.

    Hub cache snapshots and GGUF files are named by their models, wherever they lie.
    """
    path = posixpath.normpath(name.strip().replace("\\", "/"))
    is_absolute = path.startswith("/") or re.match(r"[A-Za-z]:/", path)
    is_named_by_model = path.lower().endswith(".gguf") or "/snapshots/" in path
    return path if is_absolute and not is_named_by_model else None


def normal_base_name(name: str) -> str:
    """Return the part of a base model's name that tells models apart, in lower case.

    The last component of a hub id or path, without suffixes that only say how the weights are
    stored (`-bnb-4bit`, `.Q8_0.gguf`); for a hub cache snapshot, the repository's name.
    """
    parts = [part for part in re.split(r"[/\\]", name.strip().lower()) if part not in ("", ".")]
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        parts[-1] = parts[-3].split("--")[-1]
    normal = parts[-1] if parts else ""
    while (shorter := _STORAGE_SUFFIX.sub("", normal)) != normal:
        normal = shorter
    return normal


def is_same_base(recorded: str, known: Iterable[str]) -> bool:
    """Whether `recorded` plainly names one of the `known` names of a base model.

    A local folder is its whole path: of two folders called `final`, each holds another model. Only
    where the adapter was trained on one and one is served, else the last component decides.
    """
    known = tuple(known)
    served = {folder for name in known if (folder := _local_folder(name))}
    if served and (folder := _local_folder(recorded)):
        return folder in served
    return normal_base_name(recorded) in {normal_base_name(name) for name in known}
