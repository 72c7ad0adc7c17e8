"""`s3:`, `gs:` and `hf:` sources, through fsspec; credentials are the server's environment's."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

from fsspec.core import url_to_fs

from loraplex_server.adapters.errors import SourceFailed, SourceUnsupported

_CHUNK_BYTES: Final = 4 << 20
_EXTRAS: Final = {"s3": "s3", "gs": "gcs", "hf": "hf"}


def read_object(url: str) -> Generator[bytes]:
    """Yield the content of an object.

    Raises:
        SourceUnsupported: the library for it is not installed.
        SourceFailed: it cannot be fetched.
    """
    scheme = url.partition(":")[0]
    try:
        fs, path = url_to_fs(url)
        # What it remembers of an earlier fetch may be gone, or another version by now.
        fs.invalidate_cache()
        with fs.open(path, "rb", block_size=_CHUNK_BYTES, cache_type="readahead") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except ImportError as error:
        raise SourceUnsupported(
            f"{scheme}: sources need another library: pip install 'loraplex[{_EXTRAS[scheme]}]'"
        ) from error
    except FileNotFoundError as error:
        raise SourceFailed(f"there is no {_shown(error, url)}") from error
    except (SourceFailed, SourceUnsupported):
        raise
    except Exception as error:
        raise SourceFailed(f"the source cannot be fetched: {_first_line(error)}") from error


def _shown(error: Any, url: str) -> str:
    return str(getattr(error, "filename", None) or url.partition("?")[0])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
