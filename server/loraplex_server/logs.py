"""How the processes of the server write their logs: the same in each of them."""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final

#: The logger of access lines, one for each HTTP request where they are wished for.
ACCESS_LOG: Final = "loraplex_server.access"

#: Of the HTTP request that is being answered; "" outside of one.
REQUEST_ID: Final[ContextVar[str]] = ContextVar("request_id", default="")

LOG_FORMATS: Final = ("text", "json")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time`, `level`, `logger`, `message` and what else there is.

    Args:
        rank: what every line names as its `rank`, if anything.
    """

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        written: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._rank is not None:
            written["rank"] = self._rank
        if request_id := REQUEST_ID.get():
            written["request_id"] = request_id
        written |= getattr(record, "fields", {})
        if record.exc_info:
            written["exception"] = self.formatException(record.exc_info)
        return json.dumps(written, ensure_ascii=False, default=str)


def set_up_logging(level: str, log_format: str = "text", rank: int | None = None) -> None:
    """Write records of at least `level` (debug, info, warning, error) to standard error.

    Args:
        log_format: one of `LOG_FORMATS`.
        rank: of a process that computes a part of the model for another; every line says it.
    """
    handler = logging.StreamHandler()
    about = "" if rank is None else f" [rank {rank}]"
    text = logging.Formatter(f"%(asctime)s %(levelname)-7s %(name)s{about}: %(message)s")
    handler.setFormatter(JsonFormatter(rank) if log_format == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Whoever wishes for access lines gets them, however quiet the rest is.
    logging.getLogger(ACCESS_LOG).setLevel(logging.INFO)
    # They log whole URLs at their info level: signatures of sources and hub files are passwords.
    for name in ("httpx", "urllib3", "botocore", "aiobotocore", "fsspec", "s3fs"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def without_password(url: str) -> str:
    """Return a URL as logs may show it: without the user and the password that it may name."""
    return re.sub("//[^/]*@", "//", url)
