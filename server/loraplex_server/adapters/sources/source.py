"""What a source's URL means, and where the settings let the server read from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from loraplex_server.adapters.archive import WANTED
from loraplex_server.adapters.errors import SourceForbidden, SourceUnsupported
from loraplex_server.adapters.upload import ARCHIVE_SUFFIXES

SourceKind = Literal["file", "https", "object"]

_SCHEMES: Final[dict[str, SourceKind]] = {
    "file": "file",
    "https": "https",
    "http": "https",
    "s3": "object",
    "gs": "object",
    "hf": "object",
}
MAX_URL_CHARS: Final = 2048


@dataclass(frozen=True)
class SourcePolicy:
    """Where the server may read from.

    Attributes:
        root: the folder that `file:` sources lie in; None refuses them all.
        allow_private: let `https:` sources be on private addresses, and `http:` ones be used.
    """

    root: Path | None = None
    allow_private: bool = False


@dataclass(frozen=True)
class Source:
    """A URL that the policy does not refuse by its looks.

    Attributes:
        scheme: `file`, `https`, `http`, `s3`, `gs` or `hf`.
        url: as it came.
    """

    scheme: str
    url: str

    @property
    def kind(self) -> SourceKind:
        return _SCHEMES[self.scheme]

    @property
    def path(self) -> str:
        """The path, decoded where it is one of a file."""
        return unquote(urlsplit(self.url).path)

    @property
    def archive_name(self) -> str | None:
        """The archive's file name; None for a folder that holds the two files."""
        # Queries sign URLs, and are no part of the name; of s3 and gs they are nothing special.
        name = self.path.rsplit("/", 1)[-1]
        return name if name.lower().endswith(ARCHIVE_SUFFIXES) else None

    @property
    def public_url(self) -> str:
        """The URL without what may be secret in it: user, password, signature."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        if not host:  # where `urlunsplit` would make a relative path absolute
            return f"{parts.scheme}:{'//' if parts.path.startswith('/') else ''}{parts.path}"
        return urlunsplit((parts.scheme, host, parts.path, "", ""))

    def files(self) -> dict[str, str]:
        """Return the URL of each file to fetch, by the name under which it is received."""
        if self.archive_name is not None:
            return {self.archive_name: self.url}
        parts = urlsplit(self.url)
        folder = parts.path.rstrip("/")
        if self.kind == "file" and not parts.netloc:  # where `urlunsplit` would add slashes
            return {name: f"file:{folder}/{name}" for name in WANTED}
        return {name: urlunsplit((*parts[:2], f"{folder}/{name}", *parts[3:])) for name in WANTED}


def parse_source(url: str, policy: SourcePolicy) -> Source:
    """Return the source.

    Raises:
        SourceUnsupported: nothing reads such URLs.
        SourceForbidden: the policy refuses it.
    """
    scheme = url.partition(":")[0].lower()
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}:" for name in _SCHEMES if name != "http")
        raise SourceUnsupported(f"a source begins with one of {known}")
    # fsspec would read `a::b` as one file system inside another; addresses have `::` too.
    is_chain = _SCHEMES[scheme] == "object" and "::" in url
    if len(url) > MAX_URL_CHARS or is_chain or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise SourceUnsupported("the source is no plain URL")
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname)
        _ = parts.port
    except ValueError as error:
        raise SourceUnsupported(f"the source is no URL: {error}") from None
    if scheme != "file" and not has_host:
        raise SourceUnsupported("the source names no host, bucket or repository")
    if scheme == "file" and policy.root is None:
        raise SourceForbidden("this server reads no local files: its `adapter_root` is not set")
    if scheme == "http" and not policy.allow_private:
        raise SourceForbidden("http: is not encrypted; use https:, or set allow_private_sources")
    return Source(scheme, url)
