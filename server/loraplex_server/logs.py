"""How the processes of the server write their logs: the same in each of them."""

from __future__ import annotations

import logging


def set_up_logging(level: str) -> None:
    """Write records of at least `level` (debug, info, warning, error) to standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    # They log whole URLs at their info level: signatures of sources and hub files are passwords.
    for name in ("httpx", "urllib3", "botocore", "aiobotocore", "fsspec", "s3fs"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
