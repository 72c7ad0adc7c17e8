"""A multipart upload, from the socket to the quarantine folder, one chunk in memory at a time.

Starlette's own form parser would collect the files first and know their size too late.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from loraplex_server.adapters.errors import InvalidUpload, UploadTooLarge
from loraplex_server.adapters.registration import UPLOAD, Registration
from loraplex_server.adapters.upload import PartWriter, UploadStaging
from loraplex_server.api.adapter_bodies import AdapterOptions, parse_body
from loraplex_server.api.errors import InvalidRequest

_MAX_VALUE_BYTES: Final = 1024
#: They may hold a chat template and a system prompt.
_MAX_DEFAULTS_BYTES: Final = 256 << 10
_MAX_PARTS: Final = 16
_MAX_HEADER_BYTES: Final = 8192
_FILE_FIELDS: Final = frozenset({"files", "archive"})
#: How each field's text becomes the value that a JSON body would have.
_VALUE_FIELDS: Final[Mapping[str, Callable[[str], Any]]] = {
    "name": str,
    "check_base": json.loads,
    "replace": json.loads,
    "expected_id": str,
    "ttl_s": json.loads,
    "defaults": json.loads,
}


@dataclass(frozen=True)
class UploadForm:
    """The fields of an upload that are not files; `name` is "" where none is needed."""

    name: str
    options: AdapterOptions

    def registration(self) -> Registration:
        return self.options.registration_of(self.name, UPLOAD)


def boundary_of(content_type: str) -> bytes:
    """Return the multipart boundary; raises InvalidRequest where there is none."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest(
            "content-type must be multipart/form-data with a boundary, "
            f"not {content_type or 'missing'}"
        )
    return boundary


class UploadReceiver:
    """Writes the file parts of one body to `staging`; used by one thread at a time."""

    def __init__(
        self,
        boundary: bytes,
        staging: UploadStaging,
        check_name: Callable[[str], None],
        *,
        max_body_bytes: int,
        needs_name: bool = True,
    ) -> None:
        """Prepare to receive.

        Args:
            check_name: refuses a bad name before its files arrive.
            max_body_bytes: of the whole body; the files alone have the staging's limit.
            needs_name: whether a form without a name is refused.
        """
        self._max_body_bytes = max_body_bytes
        self._staging = staging
        self._check_name = check_name
        self._needs_name = needs_name
        self._values: dict[str, str] = {}
        self._num_parts = 0
        self._is_complete = False
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._header_bytes = 0
        self._field = ""
        self._value = bytearray()
        self._writer: PartWriter | None = None
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_header_name,
                    "on_header_value": self._add_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open_part,
                    "on_part_data": self._add_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
                max_size=max_body_bytes,
            )
        except FormParserError as error:
            raise InvalidUpload(f"the multipart boundary is unusable: {error}") from error

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            InvalidUpload, InvalidRequest, InvalidAdapterName, UploadTooLarge, StorageFailed
        """
        if self._is_complete and chunk.strip():
            raise InvalidUpload("the multipart body goes on behind its closing boundary")
        try:
            num_bytes = self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidUpload(f"the multipart body is malformed: {error}") from error
        if num_bytes < len(chunk):
            raise UploadTooLarge(self._max_body_bytes)

    def finish(self) -> UploadForm:
        """Return the form at the end of the body; raises as `feed` does."""
        if not self._is_complete:
            raise InvalidUpload("the multipart body ends before its closing boundary")
        values = dict(self._values)
        name = values.pop("name", "")
        if not name and self._needs_name:
            raise InvalidRequest("`name` is required", param="name")
        return UploadForm(name, _options(values))

    def close(self) -> None:
        """Close the file being received, if any. Idempotent."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise InvalidUpload(f"more than {_MAX_PARTS} parts")
        self._headers.clear()
        self._header_bytes = 0
        self._value.clear()

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._spend_header(end - start)
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._spend_header(end - start)
        self._header_value += data[start:end]

    def _spend_header(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes  # older parsers have no bound of their own
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise InvalidUpload(f"the headers of a part have more than {_MAX_HEADER_BYTES} bytes")

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _open_part(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"").decode("latin-1")
        _, options = parse_options_header(disposition)
        field = self._field = _decode(options.get(b"name", b""))
        if field in _FILE_FIELDS:
            filename = _decode(options.get(b"filename", b""))
            if not filename:
                raise InvalidUpload(f"the part `{field}` has no filename")
            self._writer = self._staging.open_part(filename)
        elif field not in _VALUE_FIELDS:
            raise InvalidRequest(f"unknown field `{field}`", param=field)
        elif field in self._values:
            raise InvalidRequest(f"`{field}` is given twice", param=field)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._writer is not None:
            self._writer.write(data[start:end])
            return
        self._value += data[start:end]
        limit_bytes = _MAX_DEFAULTS_BYTES if self._field == "defaults" else _MAX_VALUE_BYTES
        if len(self._value) > limit_bytes:
            raise InvalidRequest(f"`{self._field}` is too long", param=self._field)

    def _end_part(self) -> None:
        if self._writer is not None:
            self.close()
            return
        value = self._values[self._field] = _decode(bytes(self._value))
        if self._field == "name":
            self._check_name(value)

    def _end(self) -> None:
        self._is_complete = True


def _options(texts: Mapping[str, str]) -> AdapterOptions:
    """Return the options as a JSON body would give them; raises RequestValidationError."""
    values: dict[str, Any] = {}
    for field, text in texts.items():
        try:
            values[field] = _VALUE_FIELDS[field](text)
        except (ValueError, RecursionError):
            kind = "JSON" if field == "defaults" else "true or false"
            kind = "a number, or null" if field == "ttl_s" else kind
            raise InvalidRequest(f"`{field}` must be {kind}", param=field) from None
    return parse_body(AdapterOptions, values)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidUpload("a field or filename is not UTF-8") from None
